"""No decoder: the backbone's maps with batch norm, as DINOv2's linear protocol has it before the
linear classifier (Oquab et al., TMLR 2024).

    model.decoder: {name: batchnorm.BatchNorm}      with model.frozen: [backbone]
"""

import torch
from torch import nn

from engine.statistics import resize_logits


class BatchNorm(nn.Module):
    """Maps -> features (B, sum of their channels, h, w) at the size of the finest map."""

    def __init__(self, *, in_channels):
        super().__init__()
        self.channels = sum(in_channels)
        self.norm = nn.BatchNorm2d(self.channels)

    def forward(self, maps):
        size = maps[0].shape[-2:]
        return self.norm(torch.cat([resize_logits(x, size) for x in maps], 1))
