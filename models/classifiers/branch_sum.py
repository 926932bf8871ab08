"""The sum over branches as the classifier, without parameters: the second half of DeepLabV2's head.

model.classifier: {name: branch_sum.BranchSum}
"""

import torch

from engine.ranges import Few
from models.classifiers.base import Classifier


class BranchSum(Classifier):
    """Features (B, branches * K, h, w), K channels per branch -> logits (B, K, h, w).

    Args:
        branches: number of dilations in the decoder `deeplabv2.DeepLabV2`, whose width is K.
    Raises:
        ValueError: the features are not K channels of each branch.
    """

    def __init__(self, *, in_channels, num_classes, branches: Few = 4):
        super().__init__()
        if in_channels != branches * num_classes:
            raise ValueError(
                f"the sum of {branches} branches over {num_classes} classes needs {branches} x "
                f"{num_classes} = {branches * num_classes} feature channels, and the decoder has "
                f"{in_channels}: set model.decoder.width={num_classes}"
            )
        self.blocks = (branches, num_classes)
        # means(): the matrix (K, D) of zeros and ones by which the sum multiplies
        self.register_buffer(
            "vectors", torch.eye(num_classes).repeat(1, branches), persistent=False
        )

    def forward(self, features, output=None):
        return features.unflatten(1, self.blocks).sum(1)
