"""OCCL, online centroid contrast: "Frozen is better than learning" (Chen et al., Pattern Recognition, 2024).

    losses: [..., {name: occl.OCCL, weight: 1, centroid: 1.0, category: 0.1}]

The pixels of each class are split into two halves, the views. With v_lx the mean feature of class l in view x, s_l the
mean of both and w_l the class prototype, all normalised (equations 3 to 6; lambda = centroid, phi = category):

    L_v(x) = mean_l -log  exp(<v_l1, v_l2> / tau) / (exp(<v_l1, v_l2> / tau) + sum_{j != l} exp(<v_lx, sg(s_j)> / tau))
    L_c(x) = mean_l -log  exp(<v_lx, w_l> / tau) / sum_j exp(<v_lx, w_j> / tau)
    L      = (lambda (L_v(1) + L_v(2)) + phi (L_c(1) + L_c(2))) / 2

Reconstructed [R], because the paper does not say or prints something else: the logarithm and the indices of the
negatives (standard InfoNCE), normalised vectors, the mean over present classes (the paper prints a sum), and how the
views are drawn. Here each image's pixels of a class are halved by a hash of (seed, sample, pixel); the sample's number
in the stream stands for the step. So a resumed or differently distributed run draws the same views. Each of these has a
key for the other readings; the defaults are the equations above.

    losses: [..., {name: occl.Orthogonality, weight: 0.01}]     # with cbp.CBP, update: penalty
"""

from typing import Literal

import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.ranges import Count, NonNegative, Positive
from engine.statistics import IGNORE, class_sums, pixel_hash, precise, resize_labels
from losses.base import Loss, member

# Logit of a class without pixels: finite, so that fully masked rows have finite gradients.
ABSENT = -1e9


def halve(labels, samples, num_classes, seed, split="random"):
    """Split the pixels of each class in two.

    Args:
        labels: (B, h, w); values outside 0..K-1 belong to no class.
        samples: (B) int64, number of each sample in the stream.
        split: see OCCL.
    Returns:
        (B, h, w) int64: label for the first half, K + label for the second, 255 or more elsewhere. With `random`, of n
        pixels of a class in an image n // 2 go to the first half.
    """
    known = (labels >= 0) & (labels < num_classes)
    if split != "random":
        rows, columns = (torch.arange(size, device=labels.device) for size in labels.shape[1:])
        second = (
            rows[:, None] + columns if split == "checkerboard" else samples[:, None, None]
        ) % 2
        return torch.where(known, labels + num_classes * second, 2 * num_classes + IGNORE)
    ids = torch.where(known, labels, num_classes).flatten(1)  # (B, N)
    # By class, and at random within it: the number of a class lies above the 32 bits of the hash.
    keys, order = ((ids << 32) | pixel_hash(seed, samples, ids.shape[1])).sort(1)
    sorted_ids = keys >> 32
    classes = torch.arange(num_classes + 2, device=ids.device).repeat(len(ids), 1)
    starts = torch.searchsorted(
        sorted_ids, classes
    )  # (B, K + 2), the position of the first pixel of each class
    middles = (starts[:, :-1] + starts[:, 1:]) // 2
    second = torch.arange(ids.shape[1], device=ids.device) >= middles.gather(1, sorted_ids)
    views = torch.where(
        sorted_ids < num_classes, sorted_ids + num_classes * second, 2 * num_classes + IGNORE
    )
    return torch.empty_like(views).scatter_(1, order, views).view_as(labels)


class OCCL(Loss):
    """Contrast of online class centroids.

    Args:
        centroid: lambda, factor of the centroid loss L_v.
        category: phi, factor of the category loss L_c.
        temperature: tau.
        min_pixels: classes with fewer labelled feature cells in the batch are left out.
        split: views of the cells of a class. random: halves in each image, by a hash; checkerboard: by the parity of
            row + column; image: every other sample of the stream is one view, and classes that one of them lacks are
            left out.
        negatives: of the centroid loss: category, the s_j; view, the v_j of the other view; without gradient both.
        against: classes in the sum of the category loss: all, or those that are present.
        partner: whether v_l2 gets a gradient where v_l1 is drawn to it, and the reverse.
        normalize: unit vectors in all inner products.
        reduction: over the classes present.
        sync: centroids over the batch of all processes, so that the loss does not depend on their number; otherwise
            each process uses its own images.
        view: the view whose features are contrasted.
        prototypes: whose class vectors are w: "classifier" or a named member.
    """

    def __init__(
        self,
        *,
        num_classes,
        seed=0,
        centroid: NonNegative = 1.0,
        category: NonNegative = 0.1,
        temperature: Positive = 0.07,
        min_pixels: Count = 2,
        split: Literal["random", "checkerboard", "image"] = "random",
        negatives: Literal["category", "view"] = "category",
        against: Literal["all", "present"] = "all",
        partner: bool = True,
        normalize: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
        sync: bool = True,
        view: str = "source",
        prototypes: str = "classifier",
    ):
        super().__init__()
        self.num_classes, self.seed, self.min_pixels, self.sync = (
            num_classes,
            seed,
            min_pixels,
            sync,
        )
        self.centroid, self.category, self.temperature = centroid, category, temperature
        self.view, self.prototypes = view, prototypes
        self.split, self.negatives, self.against, self.partner = split, negatives, against, partner
        self.normalize, self.reduction = normalize, reduction

    def forward(self, step):
        prototypes = member(step.prototypes, self.prototypes, "occl.OCCL")
        if prototypes.space != "features":
            raise UserError(
                "occl.OCCL compares class means of the features, and this classifier's vectors lie in an embedding of "
                "its own: take protoseg.Contrast or gmmseg.Contrast, or another classifier"
            )
        features = step.outputs[self.view].features
        labels = resize_labels(step.labels[self.view], features.shape[-2:])
        views = halve(labels, step.samples(self.view), self.num_classes, self.seed, self.split)
        sums, counts = class_sums(features, views, 2 * self.num_classes, sync=self.sync)
        with torch.autocast(features.device.type, enabled=False):
            means = (sums / counts[:, None].clamp_min(1)).view(2, self.num_classes, -1)  # (2, K, D)
            n = counts.view(2, self.num_classes)
            present = (n > 0).all(0) & (n.sum(0) >= self.min_pixels)
            return self.contrast(means, present, prototypes.means().to(means.dtype))

    def contrast(self, means, present, prototypes):
        """Equations 4 to 6.

        Args:
            means: (2, K, D) view centroids.
            present: (K) bool, the classes that take part.
            prototypes: (K, D).
        """
        center, views = means.mean(0).detach(), means  # s, stop-gradient
        if self.normalize:
            center, views, prototypes = (
                F.normalize(x, dim=-1, eps=1e-6) for x in (center, views, prototypes)
            )
        targets = torch.arange(len(present), device=present.device)
        own = torch.eye(len(present), dtype=torch.bool, device=present.device)
        count = present.sum().clamp_min(1) if self.reduction == "mean" else 1
        positive = (views[0] * views[1]).sum(1)  # (K)
        total = 0
        for view, other in zip(views, views.detach().flip(0)):
            if not self.partner:
                positive = (view * other).sum(1)
            negatives = center if self.negatives == "category" else other
            between = torch.where(own, positive[:, None], view @ negatives.T) / self.temperature
            between = between.masked_fill(~present, ABSENT)
            to_prototypes = view @ prototypes.T / self.temperature
            if self.against == "present":
                to_prototypes = to_prototypes.masked_fill(~present, ABSENT)
            centroid = F.cross_entropy(between, targets, reduction="none")
            category = F.cross_entropy(to_prototypes, targets, reduction="none")
            total = (
                total
                + ((self.centroid * centroid + self.category * category) * present).sum() / count
            )
        return total / 2


class Orthogonality(Loss):
    """mean_{i != j} cos(w_i, w_j)^2: what `update: penalty` of cbp.CBP adds, with the weight 0.01. That the cosines are
    squared is a reconstruction [R].

    Args:
        prototypes: whose vectors are w, all of them where a class has several: "classifier" or a named member.
    """

    def __init__(self, *, prototypes: str = "classifier"):
        super().__init__()
        self.prototypes = prototypes

    def forward(self, step):
        vectors = member(step.prototypes, self.prototypes, "occl.Orthogonality").every()
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = F.normalize(precise(vectors), dim=1, eps=1e-6)
            squares, count = (vectors @ vectors.T).square(), len(vectors)
            return (squares.sum() - squares.trace()) / max(1, count * (count - 1))
