"""Frozen prototypes that know nothing of their classes: orthogonal ones, algorithm 1 of "Frozen is better than
learning" (Chen et al., PR 2024), and random directions.

prototypes.basis: {name: basis.OrthogonalBasis, length: 1}      prototypes.random: {name: basis.RandomDirections}
"""

import torch
import torch.nn.functional as F
from torch import nn


def orthogonal_rows(num_classes, dim, length):
    """Random W (K, D) with W W^T = length^2 I.

    The paper draws Kaiming-normal rows, makes them orthogonal by Gram-Schmidt and then gives all the same length. QR in
    float64 with the sign of R's diagonal is the same frame without classical Gram-Schmidt's rounding errors. Equalising
    last matters: Gram-Schmidt leaves rows of unequal length, which would be a prior on classes.

    Raises:
        ValueError: K > D, where rows after the D-th would be normalised rounding noise.
    """
    if num_classes > dim:
        raise ValueError(
            f"{num_classes} classes need at least {num_classes} feature channels for orthogonal prototypes, and the "
            f"decoder has {dim}: raise model.decoder.width"
        )
    rows = torch.empty(num_classes, dim, dtype=torch.float64)
    nn.init.kaiming_normal_(rows)  # fan_in = D
    q, r = torch.linalg.qr(rows.T)  # (D, K), (K, K)
    return (q * r.diagonal().sign()).T * length


class _Frozen(nn.Module):
    """K vectors that are never updated; saved in the checkpoint. `rows` (K, D)."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("vectors", rows.to(torch.get_default_dtype()))
        self.register_buffer("seen", torch.ones(len(rows), dtype=torch.bool))

    def means(self):
        """(K, D)."""
        return self.vectors

    def score(self, features):
        """Inner products: (B, D, h, w) -> (B, K, h, w)."""
        return F.conv2d(features, self.vectors[:, :, None, None].to(features.dtype))

    def update(self, batches):
        """Frozen: nothing changes."""

    def fit(self, batches):
        """Frozen: nothing changes."""


class OrthogonalBasis(_Frozen):
    """K orthogonal vectors of one length, drawn from PyTorch's global generator.

    Args:
        length: T, the norm of every prototype.
    """

    def __init__(self, *, num_classes, in_channels, length: float = 1.0):
        super().__init__(orthogonal_rows(num_classes, in_channels, length))


class RandomDirections(_Frozen):
    """K unit vectors, uniform on the sphere and drawn from PyTorch's global generator: what remains of a text prototype
    without the text (an ablation)."""

    def __init__(self, *, num_classes, in_channels):
        super().__init__(F.normalize(torch.randn(num_classes, in_channels, dtype=torch.float64), dim=1))
