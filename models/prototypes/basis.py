"""Frozen prototypes that know nothing of their classes: orthogonal ones, algorithm 1 of "Frozen is
better than learning" (Chen et al., PR 2024), and random directions. And what the classifier of that
paper (models/classifiers/ cbp.py) makes of its rows otherwise.

prototypes.basis: {name: basis.OrthogonalBasis, length: 1}      prototypes.random: {name:
                                                                basis.RandomDirections}

In fewer channels than rows, K > D, nothing is orthogonal. Some two of K unit vectors then have

    |cos| >= sqrt((K - D) / (D (K - 1)))                (Welch, 1974)

`frame` comes near this bound: 0.112 for 19 rows in 16 channels (bound 0.102), 0.105 for 150 in 64
(0.095) and 0.036 for 150 in 128 (0.034), where random directions have 0.60, 0.45 and 0.34. To the
paper this case is a limitation; taking frames is an idea of this project.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from engine.ranges import Positive
from models.prototypes.base import Prototypes

STEPS, RATE = 1000, 0.03  # of the descent on the coherence


def kaiming_rows(count, dim):
    """Rows (K, D), float64, normal with standard deviation sqrt(2 / D), from PyTorch's global
    generator."""
    rows = torch.empty(count, dim, dtype=torch.float64)
    return nn.init.kaiming_normal_(rows)  # fan_in = D


def gram_schmidt(rows, equal=True):
    """Rows (K, D), K <= D, made orthogonal one after the other; of length 1, or with `equal` false
    as long as Gram-Schmidt leaves them.

    The paper gives all rows the same length after the last one. That it is the last step matters:
    Gram-Schmidt leaves rows of unequal length, which would be a prior on classes. QR in float64
    with the sign of R's diagonal is the same frame without classical Gram-Schmidt's rounding
    errors.

    Raises:
        ValueError: rows that depend on each other, whose remainders would be rounding noise.
    """
    q, r = torch.linalg.qr(rows.T)  # (D, K), (K, K)
    left = r.diagonal().abs()
    if not rows.is_meta and not left.min() > 1e-6 * left.max():
        raise ValueError(
            "rows that depend on each other, or are zero or not finite, cannot be made orthogonal"
        )
    return (q * (r.diagonal().sign() if equal else r.diagonal())).T


def orthogonal_rows(num_classes, dim, length):
    """Random W (K, D) with W W^T = length^2 I.

    Raises:
        ValueError: K > D, where rows after the D-th would be normalised rounding noise.
    """
    if num_classes > dim:
        raise ValueError(
            f"{num_classes} classes need at least {num_classes} feature channels for orthogonal "
            f"prototypes, and the decoder has {dim}: raise model.decoder.width"
        )
    return gram_schmidt(kaiming_rows(num_classes, dim)) * length


def resized_rows(rows, dim):
    """Rows (K, D') -> (K, D). Fewer channels are placed in D by random orthogonal vectors, which
    keeps all inner products; of more, the principal components remain. These are not centred [R],
    so that as long as D >= K nothing is lost here either."""
    if rows.shape[1] > dim:
        u, s, _ = torch.linalg.svd(rows, full_matrices=False)
        rows = (u * s)[:, :dim]
    return rows if rows.shape[1] == dim else rows @ orthogonal_rows(rows.shape[1], dim, 1.0)


def nearest_frame(rows):
    """U V^T of U S V^T = rows (K, D): the nearest matrix with orthonormal rows, or columns where K
    > D."""
    u, _, v = torch.linalg.svd(rows, full_matrices=False)
    return u @ v


def coherence(rows):
    """Largest |cos| between two of the rows (K, D), a 0-dim tensor."""
    unit = F.normalize(rows, dim=1)
    return (unit @ unit.T).fill_diagonal_(0).abs().amax()


def frame(rows, kind):
    """K unit vectors that lie far apart, near to given rows (K, D). Deterministic.

    Args:
        kind: project: the nearest tight frame, its rows normalised; of random rows this is a random
            orthonormal basis of K dimensions, projected to D. polar: from there, descent on log
            sum_ij exp(b cos_ij^2) with b rising from 1e2 to 1e5, which lowers the largest |cos|.
            etf: simplex, all cosines -1 / (K - 1), turned towards the rows.
    Raises:
        ValueError: etf of more than D + 1 rows.
    """
    count, dim = rows.shape
    if kind == "etf":
        if count > dim + 1:
            raise ValueError(
                f"a simplex of {count} prototypes needs at least {count - 1} feature channels, and "
                f"the decoder has {dim}: set model.classifier.fallback=polar"
            )
        center = torch.eye(count, dtype=rows.dtype) - 1 / count
        plane = torch.linalg.eigh(center).eigenvectors[
            :, 1:
        ]  # (K, K - 1): all but the direction of ones
        return math.sqrt(count / (count - 1)) * plane @ nearest_frame(plane.T @ rows)
    unit = F.normalize(nearest_frame(rows), dim=1)
    own = torch.eye(count, dtype=torch.bool)
    for step in range(STEPS if kind == "polar" and not rows.is_meta else 0):
        cosines = unit @ unit.T
        sharp = 10 ** (2 + 3 * step / STEPS)
        worst = (
            (sharp * cosines.square())
            .masked_fill(own, -math.inf)
            .flatten()
            .softmax(0)
            .view_as(cosines)
        )
        slope = (worst * cosines) @ unit
        slope = slope - (slope * unit).sum(1, keepdim=True) * unit  # along the sphere
        slope = slope / slope.norm(dim=1).amax().clamp_min(1e-12)
        unit = F.normalize(unit - RATE * (1 - step / STEPS) * slope, dim=1)
    return unit


def inner_products(features, vectors):
    """Features (B, D, h, w) and vectors (K, D) -> (B, K, h, w)."""
    return F.conv2d(features, vectors[:, :, None, None].to(features.dtype))


class Rows(Prototypes):
    """K given vectors, saved in the checkpoint.

    Args:
        rows: (K, D).
        learned: the optimiser trains them (models/classifiers/cbp.py).
    """

    def __init__(self, rows, learned=False):
        super().__init__()
        vectors = rows.to(torch.get_default_dtype())
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.register_buffer("seen", torch.ones(len(rows), dtype=torch.bool))

    def score(self, features):
        """Inner products: (B, D, h, w) -> (B, K, h, w)."""
        return inner_products(features, self.vectors)


class OrthogonalBasis(Rows):
    """K orthogonal vectors of one length, drawn from PyTorch's global generator.

    Args:
        length: T, the norm of every prototype.
    """

    def __init__(self, *, num_classes, in_channels, length: Positive = 1.0):
        super().__init__(orthogonal_rows(num_classes, in_channels, length))


class RandomDirections(Rows):
    """K unit vectors, uniform on the sphere and drawn from PyTorch's global generator: what remains
    of a text prototype without the text (an ablation)."""

    def __init__(self, *, num_classes, in_channels):
        super().__init__(
            F.normalize(torch.randn(num_classes, in_channels, dtype=torch.float64), dim=1)
        )
