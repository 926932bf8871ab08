"""Features into a joint space of text and images, where only directions count (train_dg.py).

model.heads.projector: {name: projector.Projector, channels: 512}
"""

from torch import nn

from models.heads.base import Head


class Projector(Head):
    """Features (B, D, h, w) -> `output.embedding` (B, D', h, w), of any length; dropped at test.

    Args:
        channels: D': 512 for CLIP ViT-B/16, 1024 for RN50.
        width: channels between its two 1x1 convolutions; 0: as many.
    """

    def __init__(self, *, in_channels, channels: int, width: int = 0):
        super().__init__()
        width = width or channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1),
        )

    def forward(self, view, maps, output, step):
        output.embedding = self.layers(output.features)
