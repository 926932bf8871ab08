"""Text prototypes refined by each image: the attention variant of PPAR's visual-text prototypes [R].

    model: {projector: {channels: 512}, text_attention: {layers: 1}}
    losses: [..., {name: ppar.Alignment, easy: attention}, {name: ppar.TextFidelity, weight: 0.1}]

    U = norm(T + gamma * Dec(T; {g}))

as in DenseCLIP (Rao et al., CVPR 2022) and tqdm (Pak et al., ECCV 2024): text rows look at the dense features of the
image by cross-attention. gamma starts at 1e-4, so that training starts from the text.
"""

import torch
import torch.nn.functional as F
from torch import nn


class TextAttention(nn.Module):
    """Cross-attention from K text rows to the cells of an image.

    Args:
        channels: D of the joint space.
        layers: decoder layers (self-attention, cross-attention, MLP).
        width, heads: of the attention.
    """

    def __init__(self, channels, layers=1, width=256, heads=4):
        super().__init__()
        self.query, self.key = nn.Linear(channels, width), nn.Linear(channels, width)
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.out = nn.Linear(width, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-4))

    def forward(self, text, dense):
        """text (K, D), dense features (B, D, h, w) -> unit rows (B, K, D)."""
        cells = self.key(dense.flatten(2).transpose(1, 2))  # (B, N, width)
        rows = self.query(text).expand(len(dense), -1, -1)  # (B, K, width)
        change = self.out(self.decoder(rows, cells))
        return F.normalize(text + self.gamma * change, dim=-1, eps=1e-6)
