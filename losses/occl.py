"""OCCL, online centroid contrast: "Frozen is better than learning" (Chen et al., Pattern
Recognition, 2024).

    losses: [..., {name: occl.OCCL, weight: 1, centroid: 0.3, category: 0.5}]

The feature cells of each class are split into two halves, the views. v_lx is the mean feature of
class l in view x, s_l the mean of both and w_l the class prototype, all normalised (equations 3 to
6; lambda = centroid, phi = category):

    L_v(x) = mean_l -log  exp(<v_l1, v_l2> / tau)
                          / (exp(<v_l1, v_l2> / tau) + sum_{j != l} exp(<v_lx, sg(s_j)> / tau))
    L_c(x) = mean_l -log  exp(<v_lx, w_l> / tau) / sum_j exp(<v_lx, w_j> / tau)
    L      = (lambda (L_v(1) + L_v(2)) + phi (L_c(1) + L_c(2))) / 2

Reconstructed [R], because the paper does not say or prints something else: the logarithm and the
indices of the negatives (standard InfoNCE), normalised vectors, and the mean over present classes
(the paper prints a sum). Options are the other readings; the defaults are the equations above.

How views are drawn is reconstructed too. To the paper, "different objects in a mini-batch belonging
to the same category" augment each other. Of the labels y, its y_1 and y_2 each have all categories
and half of the objects. `split` says what is dealt out, over the whole batch:

    objects         connected regions of a class, the literal reading; what an occluder cuts in two
                    counts as two objects
    image           images, class by class: one may show its cars to view 1, its trees to view 2
    random          cells: both views hold all objects; their means differ by sampling noise alone
    checkerboard    cells too, by whether row + column is even

Of a class that is one object, or lies in one image, the cells are dealt out instead, so that it is
not lost. Every labelled cell counts alike, whatever weight its pixels have in the cross-entropy.

Two things differ from the paper, or may. `sync` takes the centroids of all processes' images. The
paper has 2 images on each of 8 GPUs, and does not say that they share centroids. And `features` lie
behind the decoder's dropout, where there is one: centroids are means of what it left.

    losses: [..., {name: occl.Orthogonality, weight: 0.01}]     # with cbp.CBP, update: penalty
"""

from typing import Literal

import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.ranges import Count, NonNegative, Positive
from engine.statistics import class_sums, precise, resize_labels
from losses._views import halve
from losses.base import Loss, comparable, member

# Logit of a class without pixels: finite, so that fully masked rows have finite gradients.
ABSENT = -1e9


class OCCL(Loss):
    """Contrast of online class centroids.

    Args:
        centroid: lambda, factor of the centroid loss L_v.
        category: phi, factor of the category loss L_c.
        temperature: tau.
        min_pixels: classes with fewer labelled feature cells in the batch are left out.
        split: what is dealt out between the views; see above.
        negatives: of the centroid loss: category, the s_j; view, the v_j of the other view; without
            gradient both.
        against: classes in the sum of the category loss: all, or those that are present.
        partner: whether v_l2 gets a gradient where v_l1 is drawn to it, and the reverse.
        normalize: unit vectors in all inner products.
        reduction: over the classes present.
        sync: centroids over the batch of all processes, so that the loss does not depend on their
            number; otherwise each process uses its own images.
        view: the view whose features are contrasted.
        prototypes: whose class vectors are w: "classifier" or a named member.
    """

    def __init__(
        self,
        *,
        num_classes,
        seed=0,
        centroid: NonNegative = 0.3,
        category: NonNegative = 0.5,
        temperature: Positive = 0.07,
        min_pixels: Count = 2,
        split: Literal["objects", "image", "random", "checkerboard"] = "objects",
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
        self.num_classes, self.seed, self.sync = num_classes, seed, sync
        self.centroid, self.category, self.temperature = centroid, category, temperature
        self.view, self.prototypes, self.split = view, prototypes, split
        self.negatives, self.against, self.partner = negatives, against, partner
        self.normalize, self.reduction, self.min_pixels = normalize, reduction, min_pixels

    def forward(self, step):
        prototypes = comparable(step.prototypes, self.prototypes, "occl.OCCL")
        features = step.outputs[self.view].features
        labels = resize_labels(step.labels[self.view], features.shape[-2:])
        samples = step.batch(self.view).sample
        views = halve(labels, samples, self.num_classes, self.seed, self.split, self.sync)
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
        other = views.flip(0)
        partner = other if self.partner else other.detach()
        positive = (views * partner).sum(2, keepdim=True)  # (2, K, 1)
        negatives = center if self.negatives == "category" else other.detach()
        own = torch.eye(len(present), dtype=torch.bool, device=present.device)
        between = torch.where(own, positive, views @ negatives.mT) / self.temperature  # (2, K, K)
        between = between.masked_fill(~present, ABSENT)
        to_prototypes = views @ prototypes.T / self.temperature
        if self.against == "present":
            to_prototypes = to_prototypes.masked_fill(~present, ABSENT)
        targets = torch.arange(len(present), device=present.device).repeat(2)
        centroid = F.cross_entropy(between.flatten(0, 1), targets, reduction="none")  # (2 K)
        category = F.cross_entropy(to_prototypes.flatten(0, 1), targets, reduction="none")
        loss = (self.centroid * centroid + self.category * category) * present.repeat(2)
        count = present.sum().clamp_min(1) if self.reduction == "mean" else 1
        return loss.sum() / count / 2


class Orthogonality(Loss):
    """mean_{i != j} cos(w_i, w_j)^2: what `update: penalty` of cbp.CBP adds, with the weight 0.01.
    That the cosines are squared is a reconstruction [R].

    Args:
        prototypes: whose vectors are w, all of them where a class has several: "classifier" or a
            named member.
    Raises UserError: nothing trains them.
    """

    def __init__(self, *, prototypes: str = "classifier"):
        super().__init__()
        self.prototypes = prototypes

    def forward(self, step):
        vectors = member(step.prototypes, self.prototypes, "occl.Orthogonality").every()
        if torch.is_grad_enabled() and not vectors.requires_grad:
            raise UserError(
                f"occl.Orthogonality: nothing trains the vectors of '{self.prototypes}'; for "
                "cbp.CBP set update: gradient or penalty"
            )
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = F.normalize(precise(vectors), dim=1, eps=1e-6)
            squares, count = (vectors @ vectors.T).square(), len(vectors)
            return (squares.sum() - squares.trace()) / max(1, count * (count - 1))
