"""UPerNet (Xiao et al., ECCV 2018): pyramid pooling on the coarsest map, then a feature pyramid,
all maps joined.

    model.decoder: {name: upernet.UPerNet, width: 512}
    model.heads.auxiliary: {name: auxiliary.Auxiliary, stage: 3}      # usually comes with it
    losses:
      - {name: cross_entropy.CrossEntropy}
      - {name: cross_entropy.CrossEntropy, head: auxiliary, weight: 0.4}

Layers as in MMSegmentation, by general knowledge: every convolution without bias and followed by
batch norm and ReLU. The sizes agree with the papers of Swin and ConvNeXt (121 and 122 M with the B
models, 150 classes, the auxiliary head).
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.ranges import Momentum, Width
from engine.statistics import resize_logits
from models.blocks import conv_bn_relu

POOLS = (1, 2, 3, 6)  # sides of the grids that the coarsest map is averaged to


class PooledNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a channel has a single value, the mean of
    one image alone."""

    def forward(self, x):
        if x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class UPerNet(nn.Module):
    """Maps -> features (B, width, h, w) at the stride of the finest map.

    Args:
        width: D, also the channels of each pooled, lateral and joined map.
        dropout: of whole feature channels, before the classifier.
    """

    def __init__(
        self,
        *,
        in_channels,
        width: Width = 512,
        dropout: Momentum = 0.1,
    ):
        super().__init__()
        *finer, coarsest = in_channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *conv_bn_relu(coarsest, width, 1))
            for side in POOLS
        )
        self.pools[0][2] = PooledNorm(width)
        self.join = conv_bn_relu(coarsest + width * len(POOLS), width)
        self.laterals = nn.ModuleList(conv_bn_relu(channels, width, 1) for channels in finer)
        self.smooth = nn.ModuleList(conv_bn_relu(width, width) for _ in finer)
        self.fuse = conv_bn_relu(width * len(in_channels), width)
        self.dropout = nn.Dropout2d(dropout)
        self.channels = width

    def forward(self, maps):
        *finer, coarsest = maps
        size = coarsest.shape[-2:]
        pooled = [resize_logits(pool(coarsest), size) for pool in self.pools]
        x = self.join(torch.cat([coarsest, *pooled], 1))
        joined = [x]  # from coarse to fine
        for lateral, smooth, y in reversed([*zip(self.laterals, self.smooth, finer, strict=True)]):
            x = lateral(y) + resize_logits(x, y.shape[-2:])
            joined.append(smooth(x))
        size = maps[0].shape[-2:]
        return self.dropout(
            self.fuse(torch.cat([resize_logits(y, size) for y in reversed(joined)], 1))
        )
