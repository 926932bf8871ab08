"""FCN head on the coarsest map (Long et al., CVPR 2015), in the form of today's tool boxes: two 3x3
convolutions, then one over their output and their input.

    model.decoder: {name: fcn.FCN, width: 512}      with output stride 8, as in the CBP paper's FCN
                                                    rows
"""

import torch
from torch import nn

from engine.ranges import Momentum, Width
from models.blocks import conv_bn_relu


class FCN(nn.Module):
    """Maps -> features (B, width, h, w) at the stride of the coarsest map.

    Args:
        width: D.
        dropout: of whole feature channels, before the classifier.
    """

    def __init__(self, *, in_channels, width: Width = 512, dropout: Momentum = 0.1):
        super().__init__()
        self.convs = nn.Sequential(conv_bn_relu(in_channels[-1], width), conv_bn_relu(width, width))
        self.join = conv_bn_relu(in_channels[-1] + width, width)
        self.dropout = nn.Dropout2d(dropout)
        self.channels = width

    def forward(self, maps):
        x = maps[-1]
        return self.dropout(self.join(torch.cat([x, self.convs(x)], 1)))
