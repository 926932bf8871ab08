"""The ordinary classifier: a learned 1x1 convolution with bias.

model.classifier: {name: linear.Linear}
"""

from torch import nn

from engine.ranges import NonNegative
from models.classifiers.base import Classifier


class Linear(Classifier):
    """Features (B, D, h, w) -> logits (B, K, h, w).

    Args:
        std: standard deviation of the weights at the start; 0.01 is MMSegmentation's. A class
            vector then has the length std sqrt(D), and how long it is decides how soon rare classes
            are learnt: 0.177 in 128 channels is as long as the prototypes of cbp.CBP, 2
            (benchmarks/grids/camvid_cbp_ablations.yaml).
    """

    def __init__(self, *, in_channels, num_classes, std: NonNegative = 0.01):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=std)
        nn.init.zeros_(self.conv.bias)

    def means(self):
        """The learned class vectors (K, D), with their graph."""
        return self.conv.weight.flatten(1)

    def forward(self, features, output=None):
        return self.conv(features)
