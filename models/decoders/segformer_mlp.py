"""SegFormer's all-MLP decoder (Xie et al., NeurIPS 2021): one linear layer per map, brought to the
finest size, concatenated from coarse to fine and fused.

    model.decoder: {name: segformer_mlp.SegFormerMLP, width: 256}

The width is 768 for MiT-B2 and larger in the authors' release.
"""

import torch
from torch import nn

from engine.ranges import Momentum, Width
from engine.statistics import resize_logits
from models.blocks import conv_bn_relu


class SegFormerMLP(nn.Module):
    """Maps -> features (B, width, h, w) at the stride of the finest map.

    Args:
        width: D.
        dropout: of whole feature channels, before the classifier.
        project: a last 1x1 convolution without ReLU, so that features have either sign, as frozen
            prototypes do. Behind a ReLU no feature is nearer to a prototype than its positive part.
    """

    def __init__(
        self, *, in_channels, width: Width = 256, dropout: Momentum = 0.1, project: bool = False
    ):
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.fuse = conv_bn_relu(width * len(in_channels), width, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.project = nn.Conv2d(width, width, 1) if project else nn.Identity()
        self.channels = width

    def forward(self, maps):
        size = maps[0].shape[-2:]
        maps = [
            resize_logits(linear(x), size) for linear, x in zip(self.linears, maps, strict=True)
        ]
        return self.project(self.dropout(self.fuse(torch.cat(maps[::-1], 1))))
