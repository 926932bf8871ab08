"""Class sums, the one kernel that prototypes, contrast and calibration share; cosines of features
and prototypes.

    sums, counts = class_sums(features, labels, num_classes)
    means = sums / counts[:, None].clamp_min(1)

The features stay as they lie in memory: copying maps (B, D, h, w) to rows (B h w, D) or back costs
more than the sums. So does a loop over classes, or a boolean mask, which also makes a GPU wait.
Rows (channels_last) are added to their class's row. Maps of few classes take a product with one-hot
labels, whose cost grows with K; others are scattered. A GPU always takes the product. Measure with
`python -m benchmarks.kernels`.
"""

import torch
import torch.nn.functional as F

from engine import distributed

IGNORE = 255
FEW = 32  # classes up to which a product sums maps faster than a scatter does,
WIDE = 64  # if they have so many channels


def resize_labels(labels, size):
    """Labels (B, H, W) -> (B, h, w): the label at the centre of each feature cell
    (align_corners=False)."""
    if labels.shape[-2:] == tuple(size):
        return labels
    (height, width), (h, w) = labels.shape[-2:], size
    rows = (2 * torch.arange(h, device=labels.device) + 1) * height // (2 * h)
    columns = (2 * torch.arange(w, device=labels.device) + 1) * width // (2 * w)
    return labels[..., rows[:, None], columns]


def pure_labels(labels, size, share=0.75):
    """Labels (B, H, W) -> (B, h, w): the label at the centre of each cell, 255 where less than a
    share of the cell's pixels carry it."""
    cells = resize_labels(labels, size)
    same = labels == F.interpolate(cells[:, None].to(torch.float32), labels.shape[-2:])[:, 0]
    return torch.where(
        F.adaptive_avg_pool2d(same[:, None].to(torch.float32), size)[:, 0] >= share, cells, IGNORE
    )


def resize_logits(logits, size):
    """Logits (B, K, h, w) -> (B, K, H, W), bilinear, align_corners=False."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_hash(seed, samples, pixels):
    """Pseudo-random integers in [0, 2^32) of every (sample, pixel) -> (B, pixels), the same on
    every device."""
    mask = 0xFFFFFFFF
    pixel = torch.arange(pixels, device=samples.device)
    x = (samples[:, None] * 0x9E3779B1 + pixel * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D) & mask
    for multiplier in (0x7FEB352D, 0x846CA68B):  # two rounds of xor-shift and multiply mix all bits
        x = x ^ (x >> 16)
        x = (x * multiplier) & mask
    return x ^ (x >> 16)


def class_sums(features, labels, num_classes, weights=None, sync=False, per_image=False):
    """Sum the features of each class.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w) integers; a value outside 0..K-1 (255) belongs to no class.
        num_classes: K.
        weights: (B, h, w) factor of each pixel, or None for ones.
        sync: add the sums of all processes; gradients are those of the global sums (see
            distributed.synced_sum).
        per_image: keep the images apart; without `sync`.
    Returns:
        sums (K, D) with the graph of the features, counts (K) = sum of the weights; both at least
        float32. Per image (B, K, D) and (B, K).
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        maps = features.flatten(2).to(dtype)  # (B, D, N)
        ids = labels.flatten(1).long()
        ids = torch.where((ids >= 0) & (ids < num_classes), ids, num_classes)  # (B, N), K for none
        factors = ids.new_ones(ids.shape, dtype=dtype)
        if weights is not None:
            factors = weights.flatten(1).to(dtype)
        rows = features.is_contiguous(memory_format=torch.channels_last)
        # On a GPU the other ways add in another order each time, and a run would not be repeatable.
        if features.is_cuda or (not rows and num_classes <= FEW and maps.shape[1] >= WIDE):
            classes = torch.arange(num_classes + 1, device=ids.device)[:, None]
            members = (ids[:, None] == classes) * factors[:, None]  # (B, K + 1, N)
            counts = members.sum(2)
            # The order of the product decides how its gradient lies: as the features do.
            sums = torch.bmm(members, maps.mT) if rows else torch.bmm(maps, members.mT).mT
        else:
            counts = factors.new_zeros(len(ids), num_classes + 1).scatter_add(1, ids, factors)
            maps = maps if weights is None else maps * factors[:, None]
            if rows:
                images = len(ids) if per_image else 1
                start = (num_classes + 1) * torch.arange(images, device=ids.device)[:, None]
                sums = maps.new_zeros(images * (num_classes + 1), maps.shape[1])
                sums = sums.index_add(0, (ids + start).flatten(), maps.mT.flatten(0, 1))
                sums = sums.unflatten(0, (-1, num_classes + 1))
            else:
                sums = maps.new_zeros(*maps.shape[:2], num_classes + 1)
                sums = sums.scatter_add(2, ids[:, None].expand_as(maps), maps).mT
        sums, counts = sums[:, :-1], counts[:, :-1]
        if per_image:
            return sums, counts
        sums, counts = sums.sum(0), counts.sum(0)  # (K, D), (K)
        if sync:
            both = distributed.synced_sum(torch.cat([sums, counts[:, None]], 1))  # one collective
            sums, counts = both[:, :-1], both[:, -1].detach()
    return sums, counts


def class_means(batches, like):
    """Mean feature of each class over all batches of all processes, with one all-reduce and without
    a graph.

    Args:
        batches: iterable of (features (B, D, h, w), labels (B, h, w), weights (B, h, w) or None).
        like: (K, D) tensor whose dtype and device the sums have.
    Returns:
        means (K, D), zero rows for classes that do not occur; which classes occur (K) bool.
    """
    total = like.new_zeros(len(like), like.shape[1] + 1)
    for features, labels, weights in batches:
        sums, counts = class_sums(features, labels, len(like), weights)
        total += torch.cat([sums, counts[:, None]], 1).to(total.dtype)
    total = distributed.all_reduce(total)
    counts = total[:, -1:]
    return total[:, :-1] / torch.where(counts > 0, counts, 1), counts[:, 0] > 0


def precise(tensor):
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit(features):
    """(B, D, ...), L2-normalised over D in at least float32."""
    return F.normalize(precise(features), dim=1, eps=1e-6)


def cosine(features, vectors):
    """Cosine similarity of features (B, D, h, w) with vectors (K, D), or (B, K, D) of each image ->
    (B, K, h, w), in at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        features = precise(features)
        vectors = F.normalize(vectors, dim=-1, eps=1e-6).to(features.dtype)
        if vectors.dim() == 2:
            scores = F.conv2d(features, vectors[:, :, None, None])
        else:
            scores = (vectors @ features.flatten(2)).unflatten(2, features.shape[2:])
        # Normalising the scores instead of the features saves copies of the features, forward and
        # backward.
        return scores / features.norm(dim=1, keepdim=True).clamp_min(1e-6)


class Contrast(torch.autograd.Function):
    """Cross-entropy of cosines; see `contrast`. Neither the normalised features nor the softmax are
    kept for the way back."""

    @staticmethod
    def forward(ctx, maps, vectors, ids, temperature):
        """Maps (B, D, N), unit vectors (K, D) or (B, K, D), ids (B, N), K for none -> losses (B, N)
        and cosines (B, K, N)."""
        scores = vectors @ maps
        # Across the maps `norm` takes more than twice as long as two passes.
        rows = maps.mT.is_contiguous()
        norms = maps.norm(dim=1) if rows else maps.square().sum(1).sqrt()
        norms = norms.clamp_min(1e-6)[:, None]
        scores /= norms
        log_p = (scores / temperature).log_softmax(1)
        known = ids < scores.shape[1]
        own = ids.where(known, 0)[:, None]
        ctx.save_for_backward(maps, vectors, own, known, norms, log_p)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(scores)
        return (-log_p.gather(1, own)[:, 0]).where(known, 0), scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        maps, vectors, own, known, norms, log_p = ctx.saved_tensors
        shares = log_p.exp().scatter_add_(1, own, torch.full_like(norms, -1))  # sum to 0, so that
        shares *= (gradient * known)[:, None] / (ctx.temperature * norms)
        # log p stands for the logits in what the length of a feature takes from its cosines.
        length = (shares * log_p).sum(1, keepdim=True) * (ctx.temperature / norms) * (norms > 1e-6)
        to_maps = to_vectors = None
        if ctx.needs_input_grad[0]:
            rows = maps.mT.is_contiguous()  # the gradient lies as the maps do
            to_maps = (shares.mT @ vectors).mT if rows else vectors.mT @ shares
            to_maps.addcmul_(maps, length, value=-1)
        if ctx.needs_input_grad[1]:
            to_vectors = shares @ maps.mT
            to_vectors = to_vectors.sum(0) if vectors.dim() == 2 else to_vectors
        return to_maps, to_vectors, None, None


def contrast(features, vectors, ids, temperature):
    """Cross-entropy of the cosines of features and vectors, over the temperature, as `cosine` and
    F.cross_entropy have it in twice the time.

    Args:
        features: (B, D, h, w).
        vectors: (K, D), or (B, K, D) of each image.
        ids: (B, h, w) integers; a value outside 0..K-1 (255) has no loss.
    Returns:
        losses (B, h, w), 0 where there is no class, and cosines (B, K, h, w) without a graph; both
        at least float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = precise(features)
        vectors = F.normalize(vectors, dim=-1, eps=1e-6).to(features.dtype)
        ids = ids.flatten(1).long()
        ids = torch.where((ids >= 0) & (ids < vectors.shape[-2]), ids, vectors.shape[-2])
        losses, scores = Contrast.apply(features.flatten(2), vectors, ids, temperature)
        size = features.shape[2:]
        return losses.unflatten(1, size), scores.unflatten(2, size)
