"""DAFormer's context-aware fusion (Hoyer et al., CVPR 2022, section 3.1): all maps at the finest
size, then dilated convolutions over the whole stack, where SegFormer's decoder has a 1x1
convolution.

    model.decoder: {name: daformer.DAFormer, width: 256}

From general knowledge of the paper and its release: no image-pooling branch, depthwise and
pointwise convolutions each with batch norm and ReLU, a 3x3 convolution that joins the branches. The
sizes agree with the paper, which gives this decoder 3.7 M parameters (on MiT-B5, with the
classifier of 19 classes).
"""

import torch
from torch import nn

from engine.ranges import Momentum, Rates, Width
from engine.statistics import resize_logits
from models.blocks import conv_bn_relu


def separable(in_channels, out_channels, dilation):
    """Depthwise dilated 3x3 convolution, then 1x1; the size stays."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            in_channels,
            3,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        ),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        conv_bn_relu(in_channels, out_channels, 1),
    )


class DAFormer(nn.Module):
    """Maps -> features (B, width, h, w) at the stride of the finest map.

    Args:
        width: D, also the channels of each embedded map and of each dilated branch.
        rates: dilations; the branch of rate 1 is a plain 1x1 convolution.
        dropout: of whole feature channels, before the classifier.
    """

    def __init__(
        self,
        *,
        in_channels,
        width: Width = 256,
        rates: Rates = (1, 6, 12, 18),
        dropout: Momentum = 0.1,
    ):
        super().__init__()
        self.embed = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        stack = width * len(in_channels)
        self.branches = nn.ModuleList(
            conv_bn_relu(stack, width, 1) if rate == 1 else separable(stack, width, rate)
            for rate in rates
        )
        self.fuse = conv_bn_relu(width * len(rates), width)
        self.dropout = nn.Dropout2d(dropout)
        self.channels = width

    def forward(self, maps):
        size = maps[0].shape[-2:]
        x = torch.cat(
            [resize_logits(embed(x), size) for embed, x in zip(self.embed, maps, strict=True)], 1
        )
        return self.dropout(self.fuse(torch.cat([branch(x) for branch in self.branches], 1)))
