"""Class means of each image of a batch, with their gradient: the prototypes of BCL, masked average
pooling.

    prototypes.pair: {name: pair.Pair}

Lee et al., "Bi-directional Contrastive Learning for Domain Adaptive Semantic Segmentation", ECCV
2022. For the image b and its pixels p of class c,

    rho_b^c = sum_p f_b(p) / |{p}|

BCL contrasts the pixels of one image of a pair with the prototypes of the other, and the released
code sends gradients through both.
"""

import torch

from engine.statistics import class_sums
from models.prototypes.base import Prototypes
from models.prototypes.centroids import Centroids


def pair_means(features, labels, num_classes, weights=None):
    """Class means of each image, with the graph: features (B, D, h, w), labels, and weights or None
    (B, h, w) -> means (B, K, D), zero where present (B, K) is False."""
    sums, counts = class_sums(features, labels, num_classes, weights, per_image=True)
    return sums / torch.where(counts > 0, counts, 1)[..., None], counts > 0


class Pair(Prototypes):
    """`pair_means` has no state. The rest of the family's contract [R] is the class means of the
    last step, where a class that did not occur keeps those of its last occurrence."""

    def __init__(self, *, num_classes, in_channels):
        super().__init__()
        self.last = Centroids(num_classes=num_classes, in_channels=in_channels, momentum=0.0)

    def pair_means(self, features, labels, weights=None):
        """As the function of this name."""
        return pair_means(features, labels, len(self.seen), weights)

    @property
    def seen(self):
        return self.last.seen

    def means(self):
        """(K, D)."""
        return self.last.means()

    def update(self, batches, step=None):
        """Means over all images of the step."""
        self.last.update(batches, step)

    def fit(self, batches, prototypes=None):
        """Means over a data set."""
        self.last.fit(batches, prototypes)
