"""ProtoSeg's losses: "Rethinking Semantic Segmentation: A Prototype View" (Zhou et al., CVPR 2022).

    model.classifier: {name: protoseg.ProtoSeg}
    losses:
      - {name: cross_entropy.CrossEntropy}
      - {name: protoseg.Contrast, weight: 0.01}         # PPC
      - {name: protoseg.Distance, weight: 0.001}        # PPD

With the prototype p_t that the balanced assignment gives to pixel z within its class, of all K M
prototypes p_j:

    PPC = -log softmax_j(<z, p_j> / tau)_t        PPD = (1 - <z, p_t>)^2

Both are means over the labelled pixels, on labels at feature size: a cell stands for the pixels
that it covers, whatever weight they have in the cross-entropy. The gradient reaches the embedding
alone; with cbp.CBP whose `update` is gradient or penalty, the vectors too. Assignments are those of
all images of a micro-batch, on all processes. Any other classifier will do whose output has
`components`, cosines: cbp.CBP with several prototypes per class.
"""

import torch

from engine.errors import UserError
from engine.ranges import Positive
from engine.statistics import precise, resize_labels
from losses.base import Loss


class Contrast(Loss):
    """PPC, contrast of a pixel with all prototypes.

    Args:
        temperature: tau; 1 is that of the released code.
        view: the view whose pixels are contrasted.
    """

    def __init__(self, *, temperature: Positive = 0.1, view: str = "source"):
        super().__init__()
        self.temperature, self.view = temperature, view

    def forward(self, step):
        scores, labels = step.outputs[self.view].components, step.labels[self.view]
        if scores is None:
            name = f"{type(self).__module__}.{type(self).__name__}".removeprefix("losses.")
            raise UserError(
                f"{name} needs a classifier with several components a class: protoseg.ProtoSeg, "
                "gmmseg.GMMSeg, or cbp.CBP with per_class above 1"
            )
        with torch.autocast(scores.device.type, enabled=False):
            scores = precise(scores)  # (B, K, M, h, w)
            cells = resize_labels(labels, scores.shape[-2:])
            targets = step.prototypes["classifier"].assign(scores.detach(), cells).flatten()
            # (K M, N), as the classifier made them
            flat = scores.movedim(0, 2).flatten(2).flatten(0, 1)
            loss = self.cost(flat, flat.gather(0, targets.clamp_min(0)[None])[0]) * (targets >= 0)
            pixels = step.pixels(self.view).to(loss.dtype)
            return loss.sum() * (labels.numel() / cells.numel()) / pixels

    def cost(self, scores, own):
        """Scores (K M, N), and those of the assigned components (N) -> loss (N)."""
        return (scores / self.temperature).logsumexp(0) - own / self.temperature


class Distance(Contrast):
    """PPD, distance of a pixel from its prototype.

    Args:
        view: the view whose pixels are drawn to their prototypes.
    """

    def __init__(self, *, view: str = "source"):
        super().__init__(view=view)

    def forward(self, step):
        if step.prototypes["classifier"].densities:
            raise UserError(
                "protoseg.Distance needs cosines, and the scores of this classifier are "
                "log-densities: take gmmseg.Contrast alone, or the classifier protoseg.ProtoSeg"
            )
        return super().forward(step)

    def cost(self, scores, own):
        return (1 - own).square()
