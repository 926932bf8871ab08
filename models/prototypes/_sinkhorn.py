"""Balanced assignment: the pixels of each class in equal shares to its M prototypes, by
Sinkhorn-Knopp.

Without balance the prototype that starts nearest takes the whole class, and the others never move.
With scores S (a cosine, say) of pixels to the prototypes of their own class and the sharpness
kappa, Q = exp(S / kappa) is scaled in turn, prototypes to a mass of n / M pixels and pixels to 1,
for every class by itself (Cuturi, NeurIPS 2013; the constants of ProtoSeg, CVPR 2022: kappa 0.05,
three rounds).

All classes at once: the sums over the pixels of a class are one scatter per round, (K, M), which
all processes add, so their number changes nothing but rounding. The shares themselves are scaled,
in float64, whose range holds exp(+-600): one exponential instead of two and a logarithm per round.
"""

import torch

from engine import distributed

LARGEST = 300.0  # of |S / kappa|: the square of e to that power and its reciprocal are float64
SMALLEST = 1e-300


@torch.no_grad()
def transport(scores, classes, num_classes, sharpness, rounds):
    """Shares (N, M) float64 of each pixel in the prototypes of its class; they add up to 1.
    Arguments: `balanced`."""
    classes = torch.where((classes >= 0) & (classes < num_classes), classes, num_classes)
    shares = torch.empty_like(scores.T, dtype=torch.float64, memory_format=torch.contiguous_format)
    shares.copy_(scores.T).div_(sharpness).clamp_(-LARGEST, LARGEST).exp_()  # (M, N)
    index, factors = classes.expand_as(shares), torch.empty_like(shares)
    for _ in range(rounds):
        mass = shares.new_zeros(len(shares), num_classes + 1).scatter_add_(1, index, shares)
        mass = distributed.all_reduce(mass).clamp_min(SMALLEST)
        shares *= torch.gather(mass.reciprocal(), 1, index, out=factors)
        shares /= shares.sum(0)  # at most M, since a prototype's are at most 1
    return (shares if rounds else shares / shares.sum(0)).T


def balanced(scores, classes, num_classes, sharpness, rounds):
    """The prototype that each pixel has the largest share in; a collective.

    Args:
        scores: (N, M), of each pixel with the prototypes of its own class.
        classes: (N); a value outside 0..K-1 (255) is in no class: such pixels take part in nothing,
            and the number they get means nothing.
        num_classes: K.
        sharpness: kappa, by which the scores are divided: a smaller one follows them more closely.
        rounds: of scaling; 0 takes the largest score.
    Returns:
        (N) int64 in 0..M-1.
    """
    return transport(scores, classes, num_classes, sharpness, rounds).max(1).indices


@torch.no_grad()
def numbered(scores, labels, choose):
    """Which of all K M prototypes each pixel belongs to.

    Args:
        scores: (B, K, M, h, w).
        labels: (B, h, w); values outside 0..K-1 belong to no class.
        choose: function from the scores (N, M) with the prototypes of a pixel's own class, and
            classes (N) in 0..K, where K is none, to a number (N) in 0..M-1.
    Returns:
        (B, h, w) int64, M class + number, -1 for no class.
    """
    k, m = scores.shape[1:3]
    known = (labels >= 0) & (labels < k)
    own = torch.where(known, labels, k - 1)[:, None, None].expand(-1, -1, m, -1, -1)
    rows = scores.gather(1, own)[:, 0].movedim(1, -1).flatten(0, -2)  # (N, M), N = B h w
    numbers = choose(rows, torch.where(known, labels, k).flatten()).view(labels.shape)
    return torch.where(known, m * labels + numbers, -1)
