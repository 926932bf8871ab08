"""Small pieces that several networks share."""

from typing import NamedTuple

import torch
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Pictures in [0, 1] -> (x - mean) / std per channel. Not part of the state dict, since the weights imply it."""

    def __init__(self, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image):
        return (image - self.mean) / self.std


def conv_bn_relu(in_channels, out_channels, kernel=3, dilation=1):
    """Convolution without bias, batch norm, ReLU; the size stays."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Guide(NamedTuple):
    """What a block's attention gets: floats (B, 1, 1, M) added to its logits; a factor (B, 1, M, 1) of its values."""

    bias: torch.Tensor | None = None
    values: torch.Tensor | None = None


def guided(guide, v):
    """A Guide, a bias alone or None, and values (B, heads, M, D) -> the bias for the logits and the values."""
    bias, factor = guide if isinstance(guide, Guide) else (guide, None)
    return None if bias is None else bias.to(v.dtype), v if factor is None else v * factor.to(v.dtype)


def received(q, k, guide=None):
    """Queries (B, heads, N, D), keys (B, heads, M, D) -> the attention that each key gets (B, M), mean over heads and
    queries. Only for pictures: it makes the whole matrix."""
    bias, values = guided(guide, torch.ones_like(k[..., :1]))
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(3)  # (B, heads, N, M)
    return (weights * values.transpose(2, 3)).mean((1, 2))
