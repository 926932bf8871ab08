"""Class sums: the one kernel that prototypes, contrast and calibration share.

    sums, counts = class_sums(features, labels, num_classes)      means = sums / counts[:, None].clamp_min(1)

The features stay a map (B, D, h, w): copying them to rows (B h w, D) costs more than the sums themselves, and so does a loop
over classes or a boolean mask (which also makes a GPU wait). Measure with `python -m benchmarks.kernels`.
"""

import torch
import torch.nn.functional as F

from engine import distributed

IGNORE = 255
# Number of classes from which on the CPU adds into bins: as fast as the product at 64, twice as fast at 150. Not on a
# GPU, where the order of atomic additions, and with it the rounding, changes from run to run.
SCATTER_FROM = 64


def resize_labels(labels, size):
    """Labels (B, H, W) -> (B, h, w): the label at the centre of each feature cell (align_corners=False)."""
    if labels.shape[-2:] == tuple(size):
        return labels
    (height, width), (h, w) = labels.shape[-2:], size
    rows = ((torch.arange(h, device=labels.device) + 0.5) * (height / h)).long().clamp_max(height - 1)
    columns = ((torch.arange(w, device=labels.device) + 0.5) * (width / w)).long().clamp_max(width - 1)
    return labels[..., rows[:, None], columns]


def resize_logits(logits, size):
    """Logits (B, K, h, w) -> (B, K, H, W), bilinear, align_corners=False."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _sums_by_matmul(maps, ids, num_classes, weights=None):
    """Maps (B, D, N) times memberships (B, N, K): in this order the gradient comes out as a map, without a copy."""
    members = (ids[..., None] == torch.arange(num_classes, device=ids.device)).to(maps.dtype)  # (B, N, K)
    if weights is not None:
        members = members * weights.flatten(1)[..., None].to(maps.dtype)
    return torch.bmm(maps, members).sum(0).T, members.sum((0, 1))


def _sums_by_scatter(maps, ids, num_classes):
    """The time does not grow with K, and no memberships are stored."""
    ids = torch.where((ids >= 0) & (ids < num_classes), ids.long(), num_classes)  # the last bin is thrown away
    bins = maps.new_zeros(*maps.shape[:2], num_classes + 1)  # (B, D, K + 1)
    sums = bins.scatter_add_(2, ids[:, None].expand_as(maps), maps).sum(0).T
    counts = torch.bincount(ids.flatten(), minlength=num_classes + 1).to(maps.dtype)
    return sums[:-1], counts[:-1]


def class_sums(features, labels, num_classes, weights=None, sync=False):
    """Sum the features of each class.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w) integers; a value outside 0..K-1 (255) belongs to no class.
        num_classes: K.
        weights: (B, h, w) factor of each pixel, or None for ones.
        sync: add the sums of all processes; gradients are those of the global sums (see distributed.synced_sum).
    Returns:
        sums (K, D) with the graph of the features, counts (K) = sum of the weights; both at least float32.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        maps = features.flatten(2).to(dtype)  # (B, D, N)
        ids = labels.flatten(1)  # (B, N)
        if num_classes >= SCATTER_FROM and weights is None and not maps.is_cuda:
            sums, counts = _sums_by_scatter(maps, ids, num_classes)
        else:
            sums, counts = _sums_by_matmul(maps, ids, num_classes, weights)
        if sync:
            both = distributed.synced_sum(torch.cat([sums, counts[:, None]], 1))  # one collective
            sums, counts = both[:, :-1], both[:, -1].detach()
    return sums, counts
