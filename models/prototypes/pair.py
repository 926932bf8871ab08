"""Class means of each image of a batch, with their gradient: the prototypes of BCL, masked average pooling.

    prototypes.pair: {name: pair.Pair}

Lee et al., "Bi-directional Contrastive Learning for Domain Adaptive Semantic Segmentation", ECCV 2022. For the image b
and its pixels p of class c,

    rho_b^c = sum_p f_b(p) / |{p}|

BCL contrasts the pixels of one image of a pair with the prototypes of the other, and the released code sends gradients
through both.
"""

import torch
from torch import nn

from engine.statistics import class_sums
from models.prototypes.centroids import Centroids


class Pair(nn.Module):
    """`pair_means` has no state. The rest of the family's contract [R] is the class means of the last step, where a
    class that did not occur keeps those of its last occurrence."""

    def __init__(self, *, num_classes, in_channels):
        super().__init__()
        self.last = Centroids(num_classes=num_classes, in_channels=in_channels, momentum=0.0)

    def pair_means(self, features, labels):
        """Features (B, D, h, w), labels (B, h, w) -> means (B, K, D), zero where present (B, K) is False."""
        sums, counts = class_sums(features, labels, len(self.seen), per_image=True)
        return sums / torch.where(counts > 0, counts, 1)[..., None], counts > 0

    @property
    def seen(self):
        return self.last.seen

    def means(self):
        """(K, D)."""
        return self.last.means()

    def score(self, features):
        """Cosine similarity: (B, D, h, w) -> (B, K, h, w)."""
        return self.last.score(features)

    def update(self, batches):
        """Means over all images of the step."""
        self.last.update(batches)

    def fit(self, batches):
        """Means over a data set."""
        self.last.fit(batches)
