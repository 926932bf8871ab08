"""Text in the space of an image tower that has never met text, such as DINOv2's.

    dg.tower: {name: vit.ViT, size: s, patch: 14, positions: 518, layer_scale: true, weights: PATH}
    prototypes.text: {name: mapped.Mapped, space: joint, view: tower, file: PATH}

Before the first step the centred rows of the text are turned and scaled as they come nearest to the
centred class means of the tower's features (orthogonal Procrustes; Schoenemann, 1966): what the
text says of how alike classes are stays, the axes are the tower's. Of a class that the tower has
not seen that part stays which lies in the span of the others. **This is ours**: PPAR (Zhang et al.,
IEEE T-ITS 2025) takes CLIP, whose space has both.
"""

import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.ranges import Count
from engine.statistics import class_means
from models.prototypes.base import Prototypes
from models.prototypes.text import class_rows


class Mapped(Prototypes):
    """A frozen member of the prototype family, zero until it is fitted.

    Args:
        offline: training images whose cells of one class give the class means.
        file, rows, map, center: as of text.Text. With center: false the rows lie around the mean of
            the class means.

    State: vectors (K, D), unit rows in the tower's space; text (K, D'), unit rows of the file; seen
    (K).
    """

    def __init__(
        self,
        *,
        num_classes,
        in_channels,
        classes,
        file: str,
        rows: str | list[str] | None = None,
        map: dict[str, list[str] | str] | None = None,
        center: bool = True,
        offline: Count = 1000,
    ):
        super().__init__()
        self.offline, self.center = offline, center
        text, _ = class_rows(file, rows, map or {}, classes, num_classes, center)
        self.keep(
            vectors=torch.zeros(num_classes, in_channels),
            text=text.float(),
            seen=torch.zeros(num_classes, dtype=torch.bool),
        )

    @torch.no_grad()
    def fit(self, batches, prototypes):
        means, present = class_means(batches(), self.vectors)
        if present.sum() < 2:
            raise UserError("mapped.Mapped has seen cells of fewer than two classes: raise offline")
        means, text = F.normalize(means.double(), dim=1), self.text.double()
        offset, known = means[present].mean(0), text[present].mean(0)
        u, lengths, v = torch.linalg.svd(
            (text[present] - known).T @ (means[present] - offset), full_matrices=False
        )
        rank = int((lengths > 1e-6 * lengths.max()).sum())
        scale = lengths.sum() / (text[present] - known).square().sum()
        mapped = scale * (text - known) @ u[:, :rank] @ v[:rank]
        self.vectors.copy_(F.normalize(mapped if self.center else mapped + offset, dim=1))
        self.seen.fill_(True)
