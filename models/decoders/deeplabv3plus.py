"""DeepLabV3+ decoder: ASPP on the coarsest map, joined with the finest one (Chen et al., ECCV
2018).

model.decoder: {name: deeplabv3plus.DeepLabV3Plus, width: 256}
"""

import torch
from torch import nn

from engine.ranges import Few, Momentum, Width
from engine.statistics import resize_logits
from models.blocks import conv_bn_relu


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and the image mean, fused by a 1x1
    convolution.

    The image-pooling branch has a bias instead of batch norm: its maps are 1x1, and batch
    statistics over one value per image fail for a batch of one.
    """

    def __init__(self, in_channels, width, rates):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(in_channels, width, 1)]
            + [conv_bn_relu(in_channels, width, 3, rate) for rate in rates]
        )
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, width, 1), nn.ReLU(inplace=True)
        )
        self.fuse = conv_bn_relu(width * (len(rates) + 2), width, 1)

    def forward(self, x):
        pooled = self.pool(x).expand(-1, -1, *x.shape[-2:])
        return self.fuse(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))


class DeepLabV3Plus(nn.Module):
    """Maps -> features (B, width, h, w) at the stride of the finest map.

    Args:
        width: D, channels of ASPP and of the features.
        low_width: channels that the finest map is reduced to.
        rates: dilations of ASPP; [] takes 6, 12, 18 at stride 16 or more and the double at stride
            8.
        dropout: of whole feature channels, before the classifier.
    """

    def __init__(
        self,
        *,
        in_channels,
        strides,
        width: Width = 256,
        low_width: Width = 48,
        rates: list[Few] = (),
        dropout: Momentum = 0.1,
    ):
        super().__init__()
        rates = list(rates) or [r * (2 if strides[-1] == 8 else 1) for r in (6, 12, 18)]
        self.aspp = ASPP(in_channels[-1], width, rates)
        self.low = conv_bn_relu(in_channels[0], low_width, 1)
        self.fuse = nn.Sequential(
            conv_bn_relu(width + low_width, width), conv_bn_relu(width, width)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.channels = width

    def forward(self, maps):
        fine = self.low(maps[0])
        coarse = resize_logits(self.aspp(maps[-1]), fine.shape[-2:])
        return self.dropout(self.fuse(torch.cat([coarse, fine], 1)))
