"""One query per class that attends to the features by itself: Mask2Former's decoder as a
classifier.

    model.classifier: {name: queries.Queries, layers: 3}
    losses:
      - {name: cross_entropy.CrossEntropy}
      - {name: cross_entropy.CrossEntropy, head: query0, weight: 1.0}      # and query1 ...

"Masked-attention Mask Transformer for Universal Image Segmentation" (Cheng et al., CVPR 2022): a
query sees only the pixels that the layer before gave to it, and its embedding is compared with
every pixel. For semantic segmentation each query is that of one class, so nothing has to be matched
(the "fixed" variant of MaskFormer, NeurIPS 2021) and the masks are the logits of ordinary
cross-entropy; there is one scale of features, that of the decoder.

TMT puts its region transferability after a pixel decoder, into attention masks like these:
`model.heads.region: {name: region.Region, stage: -1, variant: mask}` opens further pixels to all
queries (models/heads/region.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from engine.ranges import Few
from models.classifiers.base import Classifier


def positions(height, width, channels, device):
    """Sines and cosines of the place of each pixel, (h w, D), as in DETR: half of the channels for
    y, half for x."""
    count = math.ceil(channels / 4)
    rates = 10000 ** (-torch.arange(count, device=device) / count)
    ends = (
        torch.linspace(0, 2 * math.pi, n + 1, device=device)[1:, None] * rates
        for n in (height, width)
    )
    y, x = (torch.cat([angles.sin(), angles.cos()], 1) for angles in ends)
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], 2).flatten(
        0, 1
    )[:, :channels]


class Attention(nn.Module):
    """What queries (B, K, D) find in keys and values (B, N, D)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.q, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(3))
        self.k = nn.Linear(
            channels, channels, bias=False
        )  # a constant on all keys would change nothing

    def forward(self, queries, keys, values, mask=None):
        """`mask` (B, K, N) bool, true where a query sees a key."""
        q, k, v = self.q(queries), self.k(keys), self.v(values)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None]
        )
        return self.proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Masked attention to the pixels, attention among the queries, a feed-forward layer; each a
    residual and a norm."""

    def __init__(self, channels, heads):
        super().__init__()
        self.cross, self.own = Attention(channels, heads), Attention(channels, heads)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels)
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, queries, names, keys, values, mask):
        """`names` (K, D): which class a query is of, added wherever queries are compared."""
        queries = self.norm1(queries + self.cross(queries + names, keys, values, mask))
        named = queries + names
        queries = self.norm2(queries + self.own(named, named, queries))
        return self.norm3(queries + self.mlp(queries))


class Queries(Classifier):
    """Features (B, D, h, w) -> logits (B, K, h, w).

    Args:
        layers: of attention; in training `output.layers` gets the logits before each of them.
        heads: of each attention; they divide D.
    Raises:
        ValueError: a number of feature channels that the heads do not divide.
    """

    takes_masks = True

    def __init__(self, *, in_channels, num_classes, layers: Few = 3, heads: Few = 8):
        super().__init__()
        if in_channels % heads:
            raise ValueError(f"heads={heads} must divide the {in_channels} feature channels")
        self.queries, self.names = (
            nn.Parameter(torch.randn(num_classes, in_channels)) for _ in range(2)
        )
        self.norm, self.layers = (
            nn.LayerNorm(in_channels),
            nn.ModuleList(Layer(in_channels, heads) for _ in range(layers)),
        )
        widths = [nn.Linear(in_channels, in_channels) for _ in range(3)]
        self.embed = nn.Sequential(widths[0], nn.ReLU(), widths[1], nn.ReLU(), widths[2])

    def project(self, queries):
        """What pixels are compared with."""
        return self.embed(self.norm(queries))

    def means(self):
        """Class vectors (K, D) before any image was looked at, with their graph."""
        return self.project(self.queries)

    def forward(self, features, output=None):
        """`output.regions` with `opens` (models/heads/region.py) opens further pixels to every
        query."""
        opens = output.regions.opens if output is not None and output.regions else None
        pixels = features.flatten(2).mT  # (B, N, D)
        keys = pixels + positions(*features.shape[2:], features.shape[1], features.device).to(
            pixels.dtype
        )
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            logits = torch.einsum("bkd,bdhw->bkhw", self.project(queries), features)
            if output is not None and self.training:
                output.layers += (logits,)
            with torch.no_grad():
                mask = logits.float().softmax(1) >= 0.5
                mask = mask if opens is None else mask | opens(logits)[:, None]
                mask = mask.flatten(2)
                mask |= ~mask.any(2, keepdim=True)  # a query without a pixel sees all of them
            queries = layer(queries, self.names, keys, pixels, mask)
        return torch.einsum("bkd,bdhw->bkhw", self.project(queries), features)
