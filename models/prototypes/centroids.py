"""Class centroids with momentum: the mean feature of each class, followed during training.

    prototypes.centroids: {name: centroids.Centroids, momentum: 0.99}

Sums and counts are all-reduced before the one update. (Averaging prototypes that each process has already moved would
pull a class back wherever one process has not seen it.)
"""

import torch
from torch import nn

from engine import distributed
from engine.ranges import Momentum
from engine.statistics import class_sums, cosine


class Centroids(nn.Module):
    """Running class means, c <- m c + (1 - m) mean; the first visit of a class copies its mean.

    Args:
        momentum: m.
    """

    def __init__(self, *, num_classes, in_channels, momentum: Momentum = 0.99):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("vectors", torch.zeros(num_classes, in_channels))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def means(self):
        """(K, D); zero rows for classes not seen yet."""
        return self.vectors

    def score(self, features):
        """Cosine similarity: (B, D, h, w) -> (B, K, h, w)."""
        return cosine(features, self.vectors)

    def _means_of(self, batches):
        """All-reduced class means (K, D) of some batches, and which classes occur."""
        total = torch.zeros(
            len(self.seen),
            self.vectors.shape[1] + 1,
            dtype=self.vectors.dtype,
            device=self.vectors.device,
        )
        for features, labels, weights in batches:
            sums, counts = class_sums(features, labels, len(self.seen), weights)
            total += torch.cat([sums, counts[:, None]], 1).to(total.dtype)
        total = distributed.all_reduce(total)
        counts = total[:, -1:]
        return total[:, :-1] / torch.where(counts > 0, counts, 1), counts[:, 0] > 0

    @torch.no_grad()
    def update(self, batches):
        """Move the classes that occur in the batches of a step; the others stay as they are."""
        means, present = self._means_of(batches)
        moved = torch.where(
            self.seen[:, None], torch.lerp(means, self.vectors, self.momentum), means
        )
        self.vectors.copy_(torch.where(present[:, None], moved, self.vectors))
        self.seen |= present

    @torch.no_grad()
    def fit(self, batches):
        """Exact means over a data set; classes without a pixel keep what they had."""
        means, present = self._means_of(batches())
        self.vectors.copy_(torch.where(present[:, None], means, self.vectors))
        self.seen |= present
