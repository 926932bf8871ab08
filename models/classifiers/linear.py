"""The ordinary classifier: a learned 1x1 convolution with bias.

model.classifier: {name: linear.Linear}
"""

from torch import nn


class Linear(nn.Module):
    """Features (B, D, h, w) -> logits (B, K, h, w)."""

    def __init__(self, *, in_channels, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def means(self):
        """The learned class vectors (K, D), with their graph."""
        return self.conv.weight.flatten(1)

    def forward(self, features):
        return self.conv(features)
