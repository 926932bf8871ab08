"""Text prototypes refined by each image: the attention variant of PPAR's visual-text prototypes
[R].

    model.heads:
      projector: {name: projector.Projector, channels: 512}
      text_attention: {name: text_attention.TextAttention, layers: 1}
    losses: [..., {name: ppar.Alignment, easy: attention}, {name: ppar.TextFidelity, weight: 0.1}]

    U = norm(T + gamma * Dec(T; {g}))

as in DenseCLIP (Rao et al., CVPR 2022) and tqdm (Pak et al., ECCV 2024): text rows look at the
dense features of the image by cross-attention. gamma starts at 1e-4, so that training starts from
the text.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.statistics import unit
from models.heads.base import Head


class TextAttention(Head):
    """Cross-attention from the K text rows of the view to the cells of its image -> `output.text`.

    Args:
        layers: decoder layers (self-attention, cross-attention, MLP).
        width, heads: of the attention.
    Raises:
        ValueError: there is no joint space of text and images.
    """

    def __init__(self, *, joint, layers: int = 1, width: int = 256, heads: int = 4):
        super().__init__()
        if not joint:
            raise ValueError("it needs a joint space of text and images: set model.heads.projector")
        self.query, self.key = nn.Linear(joint, width), nn.Linear(joint, width)
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.out = nn.Linear(width, joint)
        self.gamma = nn.Parameter(torch.full((joint,), 1e-4))

    def forward(self, view, maps, output, step):
        if view.text is not None:
            dense = unit(output.embedding.detach()) if view.dense is None else view.dense
            output.text = self.attend(view.text, dense)

    def attend(self, text, dense):
        """text (K, D), dense features (B, D, h, w) -> unit rows (B, K, D)."""
        cells = self.key(dense.flatten(2).transpose(1, 2))  # (B, N, width)
        rows = self.query(text).expand(len(dense), -1, -1)  # (B, K, width)
        change = self.out(self.decoder(rows, cells))
        return F.normalize(text + self.gamma * change, dim=-1, eps=1e-6)
