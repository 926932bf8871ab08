"""An FCN head on one map of the backbone, for training alone.

model.heads.auxiliary: {name: auxiliary.Auxiliary, stage: 3}
losses: [..., {name: cross_entropy.CrossEntropy, head: auxiliary, weight: 0.4}]
"""

from torch import nn

from models.blocks import conv_bn_relu
from models.heads.base import Head


class Auxiliary(Head):
    """Map (B, C, h', w') -> `output.auxiliary`, logits (B, K, h', w').

    Args:
        stage: which map of the backbone, counted from 1.
        width: channels of its 3x3 convolutions.
        convs: how many of them, each with batch norm and ReLU, before the 1x1 classifier.
        dropout: of whole feature channels, before the classifier.
    Raises:
        ValueError: there is no such map.
    """

    needs = (("auxiliary", "{name: cross_entropy.CrossEntropy, head: auxiliary, weight: 0.4}"),)

    def __init__(
        self,
        *,
        map_channels,
        num_classes,
        stage: int,
        width: int = 256,
        convs: int = 1,
        dropout: float = 0.1,
    ):
        super().__init__()
        if not 1 <= stage <= len(map_channels):
            raise ValueError(
                f"stage={stage} must be a map of the backbone, 1 to {len(map_channels)}"
            )
        self.stage = stage
        channels = [map_channels[stage - 1], *[width] * convs]
        self.convs = nn.Sequential(*(conv_bn_relu(channels[i], width) for i in range(convs)))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels[-1], num_classes, 1)

    def forward(self, view, maps, output, step):
        output.auxiliary = self.classifier(self.dropout(self.convs(maps[self.stage - 1])))
