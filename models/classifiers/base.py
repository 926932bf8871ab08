"""The face of a classifier: a member of the prototype family that the network compares its features
with."""

import torch
from torch import Tensor

from engine.step import Output
from models.prototypes.base import Prototypes


class Classifier(Prototypes):
    """Features (B, D, h, w) -> logits (B, K, h, w).

    `forward` may write further fields of the view's Output in training (`components`, `layers`),
    and read `regions`. Constructors get `in_channels`, `num_classes` and, if they ask for them,
    `classes` (names).

    Attributes:
        takes_masks: it is a query decoder that asks `output.regions.opens` for further pixels.
        densities: the scores of its components are log-densities, not cosines.
    """

    takes_masks = False
    densities = False

    def forward(self, features: Tensor, output: Output | None = None) -> Tensor:
        raise NotImplementedError

    def score(self, features: Tensor) -> Tensor:
        """Its logits."""
        return self(features)

    @property
    def seen(self) -> Tensor:
        """(K) bool: all of them."""
        return torch.ones(len(self.means()), dtype=torch.bool, device=self.means().device)

    def assign(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Of several components a class: scores (B, K, M, h, w), labels (B, h, w) -> which of the K
        M a pixel belongs to (B, h, w), -1 where there is no label."""
        raise NotImplementedError
