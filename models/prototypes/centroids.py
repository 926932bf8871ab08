"""Class centroids with momentum: the mean feature of each class, followed during training.

    prototypes.centroids: {name: centroids.Centroids, momentum: 0.99}

Sums and counts are all-reduced before the one update. (Averaging prototypes that each process has
already moved would pull a class back wherever one process has not seen it.)
"""

import torch

from engine.ranges import Momentum
from engine.statistics import class_means
from models.prototypes.base import Prototypes


class Centroids(Prototypes):
    """Running class means, c <- m c + (1 - m) mean; the first visit of a class copies its mean.

    Args:
        momentum: m.
    """

    def __init__(self, *, num_classes, in_channels, momentum: Momentum = 0.99):
        super().__init__()
        self.momentum = momentum
        self.keep(
            vectors=torch.zeros(num_classes, in_channels),
            seen=torch.zeros(num_classes, dtype=torch.bool),
        )

    @torch.no_grad()
    def update(self, batches, step=None):
        """Move the classes that occur in the batches of a step; the others stay as they are."""
        means, present = class_means(batches, self.vectors)
        moved = torch.where(
            self.seen[:, None], torch.lerp(means, self.vectors, self.momentum), means
        )
        self.vectors.copy_(torch.where(present[:, None], moved, self.vectors))
        self.seen |= present

    @torch.no_grad()
    def fit(self, batches, prototypes=None):
        """Exact means over a data set; classes without a pixel keep what they had."""
        means, present = class_means(batches(), self.vectors)
        self.vectors.copy_(torch.where(present[:, None], means, self.vectors))
        self.seen |= present
