"""PPAR-style domain generalisation: alignment of pixels to text prototypes, from easy to difficult,
and reweighting.

    model.heads.projector: {name: projector.Projector, channels: 512}
    prototypes:
      text: {name: text.Text, space: joint, view: none, file: PATH}
      visual:
        {name: visual_text.VisualText, space: joint, view: teacher, temperature: 0.1, start: 0.1}
    dg: {reweight: {name: ppar.Reweight}}
    losses:
      - {name: cross_entropy.CrossEntropy, by_weights: true}
      - {name: ppar.Alignment, weight: 0.1}

"Prototypical Progressive Alignment and Reweighting for Generalizable Semantic Segmentation" (Zhang
et al., IEEE T-ITS 2025). **Only its abstract was at hand, and no code is public: this file is a
reconstruction.**

What the abstract says:

1. Earlier prototypes, means of batches of the source, overfit and take in unrelated source data;
   earlier alignment is coarse and treats all samples alike.
2. Two prototypes per class are made by CLIP instead: the original text prototype T (OTP) and the
   visual text prototype U (VTP).
3. Alignment goes from easy to difficult, "to reduce domain-variant information progressively
   instead of directly".
4. The importance (reliability) of the source data is estimated and corrects its learning weight,
   against negative transfer.
5. A theoretical analysis relates this to the theory of domain generalisation.

What is ours: every equation below. No line here follows from the theory; terms of the usual bound
are measured by `eval.py CHECKPOINT domains=true` (engine/domains.py). Of the constants, only the
weight 0.1 is that of the authors' earlier work. With s the share of the training done, z the unit
features of a pixel in the joint space (the projector's output), g those of CLIP's image tower, y
its label, tau a temperature, and R and F the reliability of a pixel and of its image or source:

    P(s) = norm((1 - omega) U + omega T)                                  order of the prototypes
           with omega = clip((s - 0.2) / 0.6, 0, 1)
    d    = 1 - cos(z, P_y) + max_{c != y} cos(z, P_c)                     difficulty of a pixel
    m    = 1 for the easiest share min(1, 0.5 + 0.5 s / 0.6) of a class   order of the pixels
    L    = sum m w CE(z P(s)^T / tau, y) / sum m w                        Alignment
    R    = 1/2 softmax(z U^T / tau)_y + 1/2 softmax(kappa g U^T)_y        reliability
    w    = bound(R^alpha / mean_{same class} R^alpha)                     Reweight, level: pixel
    w f  with f = bound(F^alpha / mean_{batch} F^alpha), F = mean R       level: image, source

bound(x) is x within [0.2, 2], and then moved towards the farther bound until its mean is 1 again.
U is nearer to the pixels (easy), T has nothing of any domain but lies across the gap between text
and images (difficult). The share of T in what a class is aligned to never falls: the class takes no
part before its U is there, unless omega is 1. The opposite order is as defensible, so it is an
option; so is the reading that a pixel's own difficulty says which of the two it is aligned to
(`order: by_difficulty`).

**U is the paper's VTP only where CLIP's image tower makes it** (`view: tower`). Another frozen
tower (vit.ViT with mapped.Mapped) makes visual-text prototypes too, in its own space: ours. With
`view: teacher` it is what the abstract warns of, running means of the student over the source:
teacher prototypes. Text is centred before it is used (models/prototypes/text.py), which the paper
may not do.

The weights w say which pixels of a class count, not how much a class counts; the factors f say how
much an image or a source counts, whatever its classes are. Difficulty and reliability look at
nearly the same thing (their correlation is 0.94 in a toy), so look at them one by one before
stacking them.

What it did (docs/results.md, CamVid by day to dusk and facades, two backbones, three seeds): it
gains on the domain of the source and nothing on unseen ones, and the distance between the domains
stays. The weights do both: rare classes are predicted more often.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from engine import distributed
from engine.errors import UserError
from engine.ranges import Count, NonNegative, Positive, Share
from engine.statistics import (
    IGNORE,
    class_sums,
    contrast,
    cosine,
    pixel_hash,
    precise,
    resize_labels,
    unit,
)
from losses.base import Labeler, Loss, member

BINS = 128  # of the difficulty, which lies in -1..3
END = 0.8  # share of the training after which the second prototype alone is left
RAMP = 0.6  # share of the training after which no pixel is left out
SOURCES = 256  # most data sets of a list that are told apart


def embedding(output):
    """Features (B, D, h, w) of the joint space, of any length."""
    if output.embedding is None:
        raise UserError(
            "losses of PPAR need a projector: set model.heads.projector={name: "
            "projector.Projector, channels: N} with the dimension N of the text"
        )
    return precise(output.embedding)


def image_prototypes(output):
    """The text rows (B, K, D) as each image changes them."""
    if output.text is None:
        raise UserError(
            "PPAR needs prototypes of each image here: set model.heads.text_attention={name: "
            "text_attention.TextAttention}"
        )
    return precise(output.text)


def joint_member(prototypes, name):
    """A prototype member of the joint space."""
    chosen = member(prototypes, name, "ppar")
    if chosen.space != "joint":
        raise UserError(f"ppar compares embeddings: set prototypes.{name}.space: joint")
    return chosen


def class_vectors(prototypes, name, fallback=None):
    """Unit vectors (K, D) of a member, where it has seen a class, otherwise of `fallback`."""
    easy = joint_member(prototypes, name)
    vectors = precise(easy.means().detach())
    if fallback is not None and name != fallback:
        others = precise(joint_member(prototypes, fallback).means().detach())
        vectors = torch.where(easy.seen[:, None], vectors, others)
    return F.normalize(vectors, dim=-1, eps=1e-6)


def easy_vectors(step, part):
    """Class vectors (K, D) of the member `part.easy`, or (B, K, D) of each image of its view."""
    if part.easy == "attention":
        return image_prototypes(step.outputs[part.view])
    return class_vectors(step.prototypes, part.easy, part.hard)


def at_labels(scores, labels):
    """Scores (B, K, h, w) of the label of each pixel (B, H, W), taken from its nearest cell; 0
    where there is none."""
    (height, width), (k, h, w) = labels.shape[-2:], scores.shape[1:]
    rows, columns = (
        (2 * torch.arange(n, device=labels.device) + 1) * m // (2 * n)
        for n, m in ((height, h), (width, w))
    )
    known = labels < k
    place = (torch.where(known, labels, 0) * h + rows[:, None]) * w + columns
    return scores.flatten(1).gather(1, place.flatten(1)).view(labels.shape) * known


def means_of_classes(values, labels, num_classes):
    """Means (K) of values (B, H, W) over the pixels of each class in the batch of all processes; 1
    for absent ones."""
    total = 0
    # Image by image: K maps of the whole batch at image size would be large.
    for value, label in zip(values, labels):
        sums, counts = class_sums(value[None, None], label[None], num_classes)
        total = total + torch.cat([sums, counts[:, None]], 1)
    sums, counts = distributed.all_reduce(total).unbind(1)
    return torch.where(counts > 0, sums / counts.clamp_min(1), 1)


def balanced(labels, keys, num_classes, count):
    """Places (B, count) of pixels of labels (B, N), of each class in turn until none is left, by
    the order of `keys` (B, N) within a class; pixels without a label come last."""
    ids = torch.where(labels < num_classes, labels, num_classes)
    sorted_keys, order = ((ids << 32) | keys).sort(1)
    ids = sorted_keys >> 32
    classes = torch.arange(num_classes + 1, device=ids.device).repeat(len(ids), 1)
    starts = torch.searchsorted(ids, classes)  # of each class in the sorted row
    n = ids.shape[1]
    turn = torch.where(
        ids < num_classes, torch.arange(n, device=ids.device) - starts.gather(1, ids), n
    )
    return order.gather(1, (turn * (num_classes + 1) + ids).topk(count, 1, largest=False).indices)


def mean_over(counts):
    """A function from values (B) of images with these pixel counts (B) to their mean over the
    pixels of all processes."""

    def mean(values):
        sums, pixels = distributed.all_reduce(torch.stack([values @ counts, counts.sum()]))
        return (sums / pixels.clamp_min(1)).to(values)

    return mean


class Reweight(Labeler):
    """Weights of the source's pixels by their reliability (dg.reweight; the module docstring has
    the equations).

    Args:
        view: the view that is weighted.
        easy, hard: members; reliability is measured with `easy`, and with `hard` for classes that
            it has not seen.
        source: whose features tell: the student's, CLIP's image tower's (`dg.tower`), or both, half
            and half.
        alpha: exponent; 0 makes all weights 1.
        low, high: bounds of the weights of a class's pixels, whose mean is 1, and of the factors.
        temperature: tau, of the student's features.
        scale: kappa, of CLIP's. 100 is CLIP's own, for text as it is. Centred text is stretched to
            unit length again, so that it needs 100 times its length before, 34 to 49 for CamVid's.
        warmup: share of the training in which weights move from 1 to their value.
        level: "pixel"; or times a factor of each "image", or of each "source", a data set of the
            list `data.train`. An image or a source that fits the prototypes badly, compared with
            the others of the batch, loses weight as a whole, and difficult classes with it.
    Raises:
        UserError, from `after`: there is no projector or no such member, or a single source.
    """

    def __init__(
        self,
        *,
        view: str = "source",
        easy: str = "visual",
        hard: str = "text",
        source: Literal["clip", "student", "both"] = "student",
        alpha: NonNegative = 1.0,
        low: Share = 0.2,
        high: Annotated[float, "[1, inf)"] = 2.0,
        temperature: Positive = 0.1,
        scale: Positive = 100.0,
        warmup: Share = 0.1,
        level: Literal["pixel", "image", "source"] = "pixel",
    ):
        super().__init__()
        self.view, self.easy, self.hard, self.source, self.level = view, easy, hard, source, level
        self.alpha, self.low, self.high, self.warmup = alpha, low, high, warmup
        self.temperature, self.scale = temperature, scale
        self.needs_tower = source != "student"

    def reliability(self, step, vectors):
        """R (B, H, W), 0 where there is no label."""
        labels, parts = step.labels[self.view], []
        if self.source != "clip":
            parts.append((embedding(step.outputs[self.view]).detach(), 1 / self.temperature))
        if self.needs_tower:
            parts.append((precise(step.tower), self.scale))
        found = [
            at_labels((cosine(features, vectors) * scale).softmax(1), labels)
            for features, scale in parts
        ]
        return sum(found) / len(found)

    def bounded(self, reliability, mean):
        """R^alpha over its mean, within the bounds and with the mean 1; `mean` is a function from
        values to theirs."""
        powers = reliability**self.alpha
        weights = powers / mean(powers).clamp_min(torch.finfo(powers.dtype).tiny)
        weights = weights.clamp(self.low, self.high)
        means = mean(weights)
        # Towards the farther bound, which keeps the order of the weights and both bounds.
        bound = torch.where(means < 1, self.high, self.low)
        gap = bound - means
        return weights + (1 - means) * (bound - weights) / torch.where(gap == 0, 1, gap)

    def factors(self, step, reliability, known):
        """f (B, 1, 1) of reliability and known pixels (B, H, W)."""
        sums, counts = (values.sum((1, 2)) for values in (reliability * known, known))
        mean = mean_over(counts)
        if self.level == "source":
            part = step.batch(self.view).part
            if part is None:
                raise UserError(
                    "ppar.Reweight: level: source needs several sources: a list as data.train"
                )
            total = torch.stack([sums, counts], 1)
            total = distributed.all_reduce(total.new_zeros(SOURCES, 2).index_add_(0, part, total))
            sums, counts = total[part].unbind(1)
        return self.bounded(sums / counts.clamp_min(1), mean)[:, None, None]

    def after(self, step):
        """Weights of the view; 0 for pixels without a label."""
        labels = step.labels[self.view]
        with torch.autocast(labels.device.type, enabled=False):
            vectors = easy_vectors(step, self).detach()
            reliability, num_classes = self.reliability(step, vectors), vectors.shape[-2]
            known = (labels < num_classes).to(reliability)
            place = labels.clamp(0, num_classes - 1)
            weights = self.bounded(
                reliability, lambda values: means_of_classes(values, labels, num_classes)[place]
            )
            if self.level != "pixel":
                weights = weights * self.factors(step, reliability, known)
            ramp = min(1.0, step.number / (self.warmup * step.total)) if self.warmup else 1.0
            step.weights[self.view] = (1 + ramp * (weights - 1)) * known


class Alignment(Loss):
    """Pixels to prototypes, the module docstring's L. Only the network learns: its features, and
    its attention if there is one; no gradient reaches a member of the prototype family.

    Args:
        view: the view whose embedding is aligned.
        easy, hard: members of the prototype family, U and T; `easy: attention` are the prototypes
            of each image (models/heads/text_attention.py). Classes that `easy` has not seen take
            `hard`; their pixels take no part in "easy_to_hard" before `hard` alone is left.
        order: "easy_to_hard", "hard_to_easy", "both" (the mean of two fixed losses), only "easy"
            or "hard", or "by_difficulty": at all times the easiest share `curriculum` of a class's
            pixels, as `easy` measures them, is aligned to `easy` and the others to `hard`.
        start: share of the training after which one prototype becomes the other, until 0.8 of it.
        curriculum: share of each class's pixels, the easiest, at the start; it grows to 1; 1 keeps
            all at all times.
        granularity: "pixel", or "coarse_to_fine" for the class means of the batch first, and pixels
            as omega grows; not with "by_difficulty".
        temperature: tau.
        samples: most pixels of an image, of all its classes alike.
        ramp: share of the training in which the loss grows from 0 to its weight.
    Raises:
        ValueError: "by_difficulty" with "coarse_to_fine".
        UserError, from `forward`: there is no projector or no such member.
    """

    def __init__(
        self,
        *,
        num_classes,
        seed=0,
        view: str = "source",
        easy: str = "visual",
        hard: str = "text",
        order: Literal[
            "easy_to_hard", "hard_to_easy", "both", "easy", "hard", "by_difficulty"
        ] = "easy_to_hard",
        start: Annotated[float, "[0, 0.8]"] = 0.2,
        curriculum: Annotated[float, "(0, 1]"] = 0.5,
        granularity: Literal["pixel", "coarse_to_fine"] = "pixel",
        temperature: Positive = 0.1,
        samples: Count = 4096,
        ramp: Share = 0.05,
    ):
        super().__init__()
        self.num_classes, self.seed, self.view = num_classes, seed, view
        self.easy, self.hard, self.order = easy, hard, order
        self.start, self.curriculum = start, curriculum
        self.granularity, self.temperature = granularity, temperature
        self.samples, self.ramp = samples, ramp
        if order == "by_difficulty" and granularity != "pixel":
            raise ValueError("order: by_difficulty is of single pixels, not of coarse_to_fine")

    def omega(self, done):
        """Share of the second prototype after a share of the training."""
        if self.start == END:
            return float(done >= END)
        return min(1.0, max(0.0, (done - self.start) / (END - self.start)))

    def kept(self, done):
        """Share of the pixels of each class that takes part."""
        return min(1.0, self.curriculum + (1 - self.curriculum) * done / RAMP)

    def targets(self, step):
        """[class vectors (K, D) or (B, K, D)] that the pixels are aligned to: one, or two with
        `both` and `by_difficulty`."""
        hard = class_vectors(step.prototypes, self.hard)
        if self.order == "hard":
            return [hard]
        easy = easy_vectors(step, self)
        if self.order in ("easy", "both", "by_difficulty"):
            return [easy] if self.order == "easy" else [easy, hard]
        omega = self.omega(step.progress)
        share = omega if self.order == "easy_to_hard" else 1 - omega
        return [F.normalize((1 - share) * easy + share * hard, dim=-1, eps=1e-6)]

    def begun(self, step, ids):
        """Labels like `ids`; 255 where a class would start from the hard prototype, for want of the
        easy one, and get easier when that arrives."""
        if (
            self.order != "easy_to_hard"
            or self.easy == "attention"
            or self.omega(step.progress) == 1
        ):
            return ids
        seen = member(step.prototypes, self.easy, "ppar").seen
        return torch.where(seen[ids.clamp(0, self.num_classes - 1)], ids, IGNORE)

    def forward(self, step):
        features = embedding(step.outputs[self.view])
        size, done = features.shape[-2:], step.progress
        with torch.autocast(features.device.type, enabled=False):
            ids = self.begun(step, resize_labels(step.labels[self.view], size))  # (B, h, w)
            weights = torch.ones_like(ids, dtype=features.dtype)
            if self.view in step.weights:
                weights = resize_labels(step.weights[self.view], size).to(features.dtype)
            flat = ids.flatten(1)
            if self.samples < flat.shape[1]:
                keys = pixel_hash(self.seed, step.batch(self.view).sample, flat.shape[1])
                place = balanced(flat, keys, self.num_classes, self.samples)
                chosen = torch.full_like(flat, IGNORE)
                ids = chosen.scatter(1, place, flat.gather(1, place)).view_as(ids)
            targets = self.targets(step)
            if self.order == "by_difficulty":
                losses = [self.align_by_difficulty(features, ids, weights, *targets)]
            else:
                losses = [self.align(features, ids, weights, vectors, done) for vectors in targets]
            ramp = min(1.0, done / self.ramp) if self.ramp else 1.0
            return sum(losses) / len(losses) * ramp

    def weighted(self, losses, weights):
        """Losses and weights (B, h, w) -> scalar."""
        return (losses * weights).sum() / distributed.mean(weights.sum()).clamp_min(1e-6)

    def align_by_difficulty(self, features, ids, weights, easy, hard):
        """Each pixel to one of two class vectors; otherwise as `align`."""
        losses, scores = contrast(features, easy, ids, self.temperature)
        first = self.easiest(scores, ids, self.curriculum).bool()
        losses = torch.where(first, losses, contrast(features, hard, ids, self.temperature)[0])
        return self.weighted(losses, weights * (ids != IGNORE))

    def align(self, features, ids, weights, vectors, done):
        """Features (B, D, h, w), labels and weights (B, h, w), class vectors -> scalar."""
        losses, scores = contrast(features, vectors, ids, self.temperature)
        weights = weights * self.easiest(scores, ids, self.kept(done))
        pixels = self.weighted(losses, weights)
        if self.granularity == "pixel":
            return pixels
        share = self.omega(done)
        return share * pixels + (1 - share) * self.align_means(
            unit(features), ids, weights, vectors
        )

    def align_means(self, features, ids, weights, vectors):
        """The same for the mean of each class in the batch of all processes."""
        sums, counts = class_sums(features, ids, self.num_classes, weights, sync=True)
        if vectors.dim() == 3:  # of each image, whose mean is that over all processes
            images = len(vectors) * distributed.world_size()
            vectors = distributed.synced_sum(vectors.sum(0)) / images
        scores = F.normalize(sums, dim=1, eps=1e-6) @ vectors.to(sums.dtype).T / self.temperature
        loss = F.cross_entropy(
            scores, torch.arange(len(scores), device=scores.device), reduction="none"
        )
        present = (counts > 0).to(loss.dtype)
        return (loss * present).sum() / present.sum().clamp_min(1)

    def easiest(self, scores, ids, share):
        """Mask like `ids`: the easiest `share` of the pixels of each class, to 1 / 128 of the range
        of the difficulty.

        The order of the pixels comes from one histogram per class over all processes, so it does
        not depend on their number; at least one pixel of a class that is there is kept.
        """
        known = ids < self.num_classes
        own = torch.where(known, ids, 0)
        mine = scores.gather(1, own[:, None])[:, 0]
        others = scores.scatter(1, own[:, None], -torch.inf).amax(1)
        difficulty = torch.where(known, 1 - mine + others, 0)
        bins = ((difficulty + 1) * (BINS / 4)).long().clamp(0, BINS - 1)
        histogram = torch.zeros((self.num_classes + 1) * BINS, dtype=torch.int64, device=ids.device)
        place = torch.where(known, ids, self.num_classes) * BINS + bins
        histogram.scatter_add_(0, place.flatten(), torch.ones_like(place).flatten())
        histogram = distributed.all_reduce(histogram).view(-1, BINS)[: self.num_classes]
        below = histogram.cumsum(1)  # (K, bins)
        # The first bin up to which there are enough.
        bound = (below < share * below[:, -1:]).sum(1)
        return (known & (bins <= bound[own])).to(scores.dtype)


class TextFidelity(Loss):
    """The prototypes of each image stay those of their class (attention variant): CE(U_b T^T / tau,
    own class).

    Args:
        view: the view with the attention.
        text: the member that T is taken from.
        temperature: tau; 0.07 as in tqdm.
    """

    def __init__(self, *, view: str = "source", text: str = "text", temperature: Positive = 0.07):
        super().__init__()
        self.view, self.text, self.temperature = view, text, temperature

    def forward(self, step):
        own = image_prototypes(step.outputs[self.view])  # (B, K, D)
        with torch.autocast(own.device.type, enabled=False):
            vectors = class_vectors(step.prototypes, self.text).to(own.dtype)
            scores = own @ vectors.T / self.temperature
            classes = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores))
            return F.cross_entropy(scores.flatten(0, 1), classes)


class FrozenFeatures(Loss):
    """The student's mean embedding of an image stays near that of the frozen image tower:
    |norm(mean z) - norm(mean g)|^2, of unit vectors z and g, mean over images. A complement to
    PPAR, after the regulariser of tqdm (Pak et al., ECCV 2024), which compares CLIP's class tokens.

    Args:
        view: the view of the student; the tower sees the image without strong changes.
    """

    needs_tower = True

    def __init__(self, *, view: str = "source"):
        super().__init__()
        self.view = view

    def forward(self, step):
        own = embedding(step.outputs[self.view])
        with torch.autocast(own.device.type, enabled=False):
            mine, frozen = (unit(unit(features).mean((2, 3))) for features in (own, step.tower))
            return (mine - frozen.to(mine)).square().sum(1).mean()
