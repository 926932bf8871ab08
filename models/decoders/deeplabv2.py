"""DeepLabV2's head (Chen et al., PAMI 2018) in the form that contrast between pixels and prototypes
needs: the dilated convolutions side by side, before they are summed.

    model.decoder: {name: deeplabv2.DeepLabV2, width: 19}
    model.classifier: {name: branch_sum.BranchSum}      with width = K the pair is DeepLabV2,
                                                        exactly

BCL (Lee et al., ECCV 2022) contrasts this concatenation, 4 x 19 = 76 channels. Any other classifier
works on it too, and then with any width.
"""

import torch
from torch import nn

from engine.ranges import Rates, Width


class DeepLabV2(nn.Module):
    """Maps -> features (B, branches * width, h, w) at the stride of the coarsest map.

    Args:
        width: channels of each branch: the number of classes for the head of the paper.
        rates: dilations, one branch each.

    Weights start from a normal distribution of std 0.01, as in the released code, and biases at
    zero (both general knowledge).
    """

    def __init__(self, *, in_channels, width: Width = 19, rates: Rates = (6, 12, 18, 24)):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels[-1], width, 3, padding=rate, dilation=rate) for rate in rates
        )
        for conv in self.branches:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        self.channels = len(rates) * width

    def forward(self, maps):
        return torch.cat([branch(maps[-1]) for branch in self.branches], 1)
