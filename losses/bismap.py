"""BiSMAP: "Bidirectional Self-Training with Multiple Anisotropic Prototypes for Domain Adaptive
Semantic Segmentation" (Lu et al., ACM MM 2022). Equations and constants of its released code [C];
[R] marks what is reconstructed.

    prototypes: {mixtures: {name: mixtures.Mixtures, components: 8, pool: 300000, view: none}}
    uda:
      source_weights:
        {name: bismap.Transferability, encoder: {name: resnet.ResNet, depth: 101}, entropy: gta5}
    losses: [{name: cross_entropy.CrossEntropy, view: source}]
    stages:
      - {name: warmup, teacher: none}
      - name: self_training
        init: imagenet
        uda:
          labelers: [{name: bismap.LikelihoodLabels, threshold: {nats: 100}}]
          mixer: {name: mixers.Strong}
        losses:
          - {name: cross_entropy.CrossEntropy, view: source}
          - {name: bismap.SymmetricCrossEntropy, view: target}
          - {name: bismap.Consistency, weight: 30}
      - name: distillation
        repeat: 2
        init: imagenet                            # the paper: a SimCLR ResNet-101
        teacher: frozen
        uda:
          labelers:
            - name: self_training.StoredConfidence
              threshold: 0
              scales: [0.75, 1.0, 1.5]
              flip: true
          mixer: {name: mixers.SourceTarget}
        losses:
          - {name: cross_entropy.CrossEntropy, view: source}
          - {name: bismap.SymmetricCrossEntropy, view: target}
          - {name: bismap.Distillation}

1. Source pixels that look like nothing in the target lose weight (Transferability). 2. A warm-up
learns the source in the style of the target (`data.train.stylised`, or `uda.style` as it trains).
3. A mixture of Gaussians per class is fitted to its features and labels the target by likelihood
(LikelihoodLabels). 4. Self-training on these labels, from ImageNet weights, consistent with an
averaged teacher. 5. Distillation, twice, each with the labels of the last network.

Differences from the released code: the teacher is in eval mode (there it normalises by its batch);
distances are divided by their mean over the whole source (there a running mean, which depends on
the order); scores are upsampled (there features); the vectors of a class are a uniform sample of
300,000 (there the first million at a rate kappa_c, then 300,000 of these); variances are clamped to
1e-6 (there 1e-6 is added).
"""

import math
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from engine import distributed
from engine.errors import UserError
from engine.ranges import Count, Natural, NonNegative, Share, Size
from engine.statistics import IGNORE, class_sums, pixel_hash, precise, resize_labels, resize_logits
from losses.base import Labeler, Loss, member, output_of


def resized(logits, size):
    """Logits (B, K, h, w) -> (B, K, H, W) of at least float32."""
    return resize_logits(precise(logits), size)


# --- source -> target: labels by likelihood -------------------------------------------------------

SAMPLE = (
    20_000  # pixels of a class that quantiles are taken from, where a member has no `quantiles`
)
NEVER = 2**32  # above every hash


class LikelihoodLabels(Labeler):
    """Labeler: the class with the largest score, where the score of that class's prototype reaches
    its threshold.

    The prototypes are fitted to the source in the style in which the student sees it, to pixels
    that the network classifies correctly at feature size. Scores of mixtures are log-densities,
    without a prior. **Nats do not carry over to another network**: with 256 channels a deviation of
    0.1 gives 354 nats at a mean and one of 1 gives -235, so 100 is right for the paper's network
    alone. `source_quantile` adapts to the network [R]: the share of a class's own source pixels
    below its threshold.

    [R] Scores are computed at feature size and then upsampled: 16 times cheaper at stride 4 than
    the upsampled features of the released code, and not bit-identical.

    Args:
        prototypes: name of a member of the prototype family, or "classifier" for the logits.
        threshold: {"nats": T}, for scores of any kind, or {"source_quantile": q} with q in 0..1.
        fit: fit the member first; otherwise it is taken as it is.
        agree: ours, not of the paper: the classifier must predict the same class with at least
            this probability; 0 asks nothing of it. Likelihood alone labels road as pavement where
            the classifier doubts.
    Raises:
        ValueError: not exactly one of the two thresholds, or no number.
        UserError, from `prepare` or `label`: there is no such member.

    State: threshold (K), infinite for classes without a prototype.
    """

    stored = learned = True
    labels_images = True

    def __init__(
        self,
        *,
        num_classes,
        seed=0,
        prototypes: str = "mixtures",
        threshold: dict = {"nats": 100.0},  # noqa: B006
        fit: bool = True,
        agree: Share = 0.0,
    ):
        super().__init__()
        value = threshold.get("nats", threshold.get("source_quantile"))
        if len(threshold) != 1 or not isinstance(value, (int, float)) or math.isnan(value):
            raise ValueError(
                f"threshold must be one of {{nats: T}} and {{source_quantile: q}}, not {threshold}"
            )
        if not 0 <= threshold.get("source_quantile", 0) <= 1:
            raise ValueError(
                f"source_quantile={value} is no share of the pixels: it must lie in 0..1"
            )
        self.seed, self.prototypes, self.rule, self.fit = seed, prototypes, dict(threshold), fit
        self.agree = agree
        self.register_buffer("threshold", torch.full((num_classes,), torch.inf))

    def member(self, prototypes):
        remedy = "Add prototypes.mixtures={name: mixtures.Mixtures, view: none}"
        return member(prototypes, self.prototypes, "bismap.LikelihoodLabels", remedy)

    def scores(self, output, prototypes):
        """Output -> scores (B, K, h, w) of at least float32, and which classes (K) have a
        prototype."""
        if self.prototypes == "classifier":
            # Of the network that made the output, which is not always the one that is trained.
            return precise(output.logits), torch.ones_like(self.threshold, dtype=torch.bool)
        mixtures = self.member(prototypes)
        return precise(mixtures.score(output.features)), mixtures.seen

    @torch.no_grad()
    def prepare(self, preparation):
        """Fit the member, find the thresholds, store the labels of the target."""
        prototypes = preparation.prototypes
        fitted = None if self.prototypes == "classifier" else self.member(prototypes)

        def correct():
            """(index, Output, labels (1, h, w): 255 where the prediction is wrong) of each source
            image."""
            for index, image, label in preparation.images(preparation.source):
                output = preparation.segment(image, "source")
                label = resize_labels(label, output.logits.shape[-2:])
                yield index, output, torch.where(output.logits.argmax(1) == label, label, IGNORE)

        if self.fit and fitted:
            fitted.fit(
                lambda: ((out.features, label, None) for _, out, label in correct()), prototypes
            )
        if "nats" in self.rule:
            bound = torch.full_like(self.threshold, self.rule["nats"])
        else:
            level = self.rule["source_quantile"]
            bound = fitted.quantiles(level) if self.fit and fitted else None
            bound = self.measure(correct(), prototypes, level) if bound is None else bound
        seen = fitted.seen if fitted else torch.ones_like(self.threshold, dtype=torch.bool)
        self.threshold.copy_(torch.where(seen, bound.to(self.threshold), torch.inf))

        def make(index, image, label):
            return self.choose(preparation.segment(image), image.shape[-2:], prototypes)[0]

        reached = [float(t) if t.isfinite() else None for t in self.threshold.to("cpu")]
        settings = {
            "labeler": "bismap.LikelihoodLabels",
            "prototypes": self.prototypes,
            "rule": self.rule,
            "threshold": reached,
            "agree": self.agree,
        }
        preparation.store("pseudo_labels", preparation.target, make, settings, palette=True)

    def measure(self, correct, prototypes, level):
        """A quantile (K) of the true class's score, infinite for classes without a correct pixel.

        Of each class the SAMPLE pixels with the smallest hashes count: a uniform sample, the same
        on any number of processes.
        """
        classes = torch.arange(len(self.threshold), device=self.threshold.device)[:, None]
        lots = torch.full((len(classes), SAMPLE), NEVER, device=classes.device)
        values = self.threshold.new_full(lots.shape, torch.inf)
        for index, output, labels in correct:
            scores, ids = self.scores(output, prototypes)[0], labels.flatten()
            own = labels[:, None].clamp_max(len(classes) - 1)
            true = scores.gather(1, own).flatten().to(values)  # (N)
            drawn = pixel_hash(self.seed, torch.tensor([index], device=ids.device), len(ids))
            drawn = torch.where((ids == classes) & true.isfinite(), drawn, NEVER)  # (K, N)
            lots, place = torch.cat([lots, drawn], 1).topk(SAMPLE, largest=False)
            values = torch.cat([values, true.expand(len(classes), -1)], 1).gather(1, place)
        parts = distributed.gather((lots.to("cpu"), values.to("cpu")))
        lots, values = (torch.cat(part, 1) for part in zip(*parts))
        lots, place = lots.topk(SAMPLE, largest=False)
        values = values.gather(1, place).masked_fill(lots == NEVER, torch.inf).sort(1).values
        counts = (lots != NEVER).sum(1, keepdim=True)
        ranks = (counts.double() * level).ceil().long() - 1
        return values.gather(1, ranks.clamp_min(0))[:, 0]

    def choose(self, output, size, prototypes):
        """Output -> labels (B, H, W)."""
        scores, seen = self.scores(output, prototypes)
        # Infinite only after the interpolation, where a factor of 0 would make NaN of it.
        best, classes = resized(scores, size).masked_fill(~seen[:, None, None], -torch.inf).max(1)
        accepted = best >= self.threshold.to(best.dtype)[classes]
        if self.agree:
            confidence, predicted = resized(output.logits, size).softmax(1).max(1)
            accepted &= (predicted == classes) & (confidence >= self.agree)
        return torch.where(accepted, classes, IGNORE)

    def label(self, network, image, prototypes):
        """Images (B, 3, H, W) -> labels (B, H, W); valid only for the network that `prepare` was
        fitted to."""
        return self.choose(network.segment(image), image.shape[-2:], prototypes)


# --- target -> source: how much a source pixel looks like the target ------------------------------

# e of the 19 classes of Cityscapes in the released code, which does not say how they were measured.
ENTROPY = {
    "gta5": (
        0.1502,
        0.2935,
        0.1362,
        0.4436,
        0.4393,
        0.2795,
        0.3139,
        0.3106,
        0.1068,
        0.3195,
        0.0719,
        0.2364,
        0.4754,
        0.0986,
        0.3673,
        0.4127,
        0.4826,
        0.5645,
        0.6694,
    ),
    "synthia": (  # the zeros are classes that it does not have
        0.1039,
        0.1333,
        0.0960,
        0.4322,
        0.4646,
        0.2801,
        0.3994,
        0.3480,
        0.1437,
        0.0,
        0.1032,
        0.2556,
        0.4076,
        0.1399,
        0.0,
        0.3501,
        0.0,
        0.5117,
        0.4416,
    ),
}
SEED = 5  # of k-means


def nearest_distances(regions, centres):
    """Euclidean distance of each region (N, D) to the nearest centre (P, D) -> (N)."""
    return torch.cdist(regions, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def region_weights(distances, mean):
    """w = 2^-(d / mean)^2: 1 on a centre, 1/2 at the mean distance. All 1 where the mean is 0."""
    return torch.where(mean > 0, torch.exp2(-(distances / mean).square()), 1.0)


def class_offsets(entropies):
    """e (K) -> (e - min e) / (max e - min e). 0 for classes whose e is NaN, and for all if none
    differ."""
    known = ~entropies.isnan()
    low, high = (torch.where(known, entropies, bound) for bound in (torch.inf, -torch.inf))
    low, high = low.amin(), high.amax()
    return torch.where(known & (high > low), (entropies - low) / (high - low), 0.0)


def pixel_weights(regions, labels, offset):
    """W = clip(w + e_class, 0, 1): w (B, rows, columns), labels (B, H, W), offset (K) ->
    (B, H, W)."""
    table = torch.zeros(256, dtype=regions.dtype, device=regions.device)
    table[: len(offset)] = offset
    return (resize_labels(regions, labels.shape[-2:]) + table[labels]).clamp(0, 1)


class Transferability(Labeler):
    """Weights of the source's pixels: little where their region looks like nothing in the target.

        w(r) = 2^-(d(r) / mean d)^2        W(p) = clip(w(r(p)) + e_class(p), 0, 1)

    d is the distance of a region's feature to the nearest of the target's centres, so nothing
    depends on the scale of the features. e lies in 0..1, and pixels of rare and hard classes keep
    their weight. W is stored once per image, in 8 bits, and read back in training. The images are
    those that the student sees: stylised by `data.train.stylised`, as in the paper, or `uda.style`.
    With an encoder and offsets of its own no trained network enters: later stages with the same
    settings and pictures read the maps of the first.

    Args:
        encoder: what makes the features: a backbone such as {name: resnet.ResNet, depth: 101,
            weights: PATH}; the paper has a SimCLR ResNet-152 with selective kernels, on pictures
            that are not normalised. {name: none} is the backbone of the network that the stage
            starts from [R].
        size: [H, W] to which images are resized for it.
        grid: [rows, columns] of regions, means over parts of its coarsest map.
        clusters: centres of k-means, at most as many as there are regions of the target.
        entropy: "gta5" and "synthia" are the released e, for 19 classes. "measured": the mean
            entropy that predictions of the network that the stage starts from have on the source
            pixels of a class [R]; not in a first stage from ImageNet, whose network has learnt
            nothing. "none":
            no offset.
    Raises:
        ValueError: released constants for other than 19 classes.
    """

    def __init__(
        self,
        *,
        num_classes,
        seed=0,
        encoder: dict = {"name": "none"},  # noqa: B006 (never changed)
        size: Size = (128, 256),
        grid: Size = (4, 4),
        clusters: Count = 40,
        entropy: Literal["gta5", "synthia", "measured", "none"] = "measured",
    ):
        super().__init__()
        if entropy in ENTROPY and num_classes != len(ENTROPY[entropy]):
            raise ValueError(
                f"entropy={entropy} has 19 classes, the data {num_classes}: use measured or none"
            )
        self.num_classes, self.seed = num_classes, seed
        self.learned = entropy == "measured"
        self.clusters, self.entropy = clusters, entropy
        self.encoder, self.size, self.grid = dict(encoder), tuple(size), tuple(grid)

    @torch.no_grad()
    def prepare(self, preparation):
        """Centres of the target, distances of the source, and its weights; or those of an earlier
        stage, if no trained network enters them."""
        own = self.encoder.get("name") == "none"
        settings = {
            "rule": "bismap.Transferability",
            "encoder": self.encoder,
            "size": self.size,
            "grid": self.grid,
            "clusters": self.clusters,
            "entropy": self.entropy,
        }
        made_of = None if own or self.entropy == "measured" else settings
        if made_of and preparation.reuse("transferability", preparation.source, made_of):
            return
        encoder = preparation.network.backbone if own else preparation.backbone(self.encoder)
        regions = {
            index: np.asarray(self.regions(encoder, image).to("cpu"))
            for index, image, _ in preparation.images(preparation.target)
        }
        centres = self.centres(regions).to(preparation.device)

        distances, sums = {}, torch.zeros(2, dtype=torch.float64, device=preparation.device)
        entropies = torch.zeros(self.num_classes, 2, dtype=torch.float64, device=preparation.device)
        for index, image, label in preparation.images(preparation.source):
            found = self.regions(encoder, image)
            distances[index] = nearest_distances(found, centres.to(found))
            sums += torch.stack([distances[index].sum().double(), sums.new_tensor(len(found))])
            if self.entropy == "measured":
                logits = preparation.segment(image, "source").logits
                entropies += self.entropies(logits, label)
        sums, entropies = distributed.all_reduce(sums), distributed.all_reduce(entropies)
        mean = sums[0] / sums[1]
        known = entropies[:, 0] / entropies[:, 1]
        if self.entropy != "measured":
            known = known.new_tensor(ENTROPY.get(self.entropy, [0.0] * self.num_classes))
        offset = class_offsets(known)

        def make(index, image, label):
            weights = region_weights(distances[index].double(), mean).view(1, *self.grid)
            return (pixel_weights(weights, label, offset)[0] * 255).round().to(torch.uint8)

        found = {
            "clusters": len(centres),
            "mean_distance": float(mean),
            "offsets": [float(e) for e in offset.to("cpu")],
        }
        preparation.store(
            "transferability", preparation.source, make, settings | found, made_of=made_of
        )

    def regions(self, encoder, image):
        """Image (1, 3, H, W) -> features (regions, D) of at least float32."""
        small = F.interpolate(
            image, self.size, mode="bilinear", align_corners=False, antialias=True
        )
        return F.adaptive_avg_pool2d(precise(encoder(small)[-1]), self.grid)[0].flatten(1).T

    def centres(self, regions):
        """{index of a target image: (regions, D)} on each process -> k-means centres (P, D), the
        same on all."""
        regions = {
            index: rows for part in distributed.gather(regions) for index, rows in part.items()
        }
        centres = None
        if distributed.is_main():
            rows = np.concatenate([regions[index] for index in sorted(regions)]).astype(np.float32)
            cv2.setRNGSeed(SEED + self.seed)
            *_, centres = cv2.kmeans(
                rows,
                min(self.clusters, len(rows)),
                None,
                # Or when nothing moves: a distance would depend on the scale.
                (cv2.TERM_CRITERIA_COUNT, 100, 0),
                1,
                cv2.KMEANS_PP_CENTERS,
            )
        return torch.from_numpy(distributed.gather(centres)[0])

    def entropies(self, logits, labels):
        """Logits (1, K, h, w), labels (1, H, W) -> (K, 2): sums of H(p) by class, and pixels. The
        unit cancels."""
        log_p = precise(logits).log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
        sums, counts = class_sums(
            entropy, resize_labels(labels, logits.shape[-2:]), self.num_classes
        )
        return torch.cat([sums, counts[:, None]], 1).double()

    def before(self, step):
        """Weights (B, H, W) in [0, 1] of the source's pixels."""
        weights = step.source.extra["transferability"]
        step.weights["source"] = weights.to(torch.get_default_dtype()) / 255


# --- losses ---------------------------------------------------------------------------------------


class SymmetricCrossEntropy(Loss):
    """sum_p w(p) (ce CE(p) + rce RCE(p)) / number of labelled pixels (Wang et al., ICCV 2019).

    RCE exchanges label and prediction, -sum_c p_c log q_c with the one-hot label q clamped to at
    least `floor`. Of a labelled pixel that is -log(floor) (1 - p_y): bounded by 9.2103, so that a
    wrong label does little harm. (The released code clamps p to at least 1e-7 too, which adds less
    than K 1e-6.)

    Args:
        view: the view whose logits are scored.
        ce, rce: factors.
        floor: smallest value of a label.
    """

    def __init__(
        self,
        *,
        view: str = "target",
        ce: NonNegative = 0.1,
        rce: NonNegative = 1.0,
        floor: Annotated[float, "(0, 1]"] = 1e-4,
    ):
        super().__init__()
        self.view, self.ce, self.rce, self.floor = view, ce, rce, floor

    def forward(self, step):
        logits, labels = step.outputs[self.view].logits, step.labels[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            logits = resized(logits, labels.shape[-2:])
            # (B, H, W), 0 where ignored
            ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            rce = math.log(self.floor) * torch.expm1(-ce)  # 0 there too
            loss = self.ce * ce + self.rce * rce
            if self.view in step.weights:
                loss = loss * step.weights[self.view]
            return loss.sum() / step.pixels(self.view).to(loss.dtype)


class Consistency(Loss):
    """The student on the strong view follows the teacher on the plain target image, outside the
    cut-out:

        w(t) mean_p mean_c t_c (log t_c - log s_c)        w(t) = exp(-5 (1 - min(t, ramp) / ramp)^2)

    The paper's factor is 30 (`weight: 30`); the mean over 19 classes makes it 1.6 per pixel.

    Args:
        view: the strong view of `mixers.Strong`, whose weights are 0 in the cut-out and 1
            elsewhere.
        ramp: steps until w is 1; 0: always 1.
    Raises:
        UserError, from `forward`: there is no such view.
    """

    needs_teacher = True

    def __init__(self, *, view: str = "strong", ramp: Natural = 4000):
        super().__init__()
        self.view, self.ramp = view, ramp

    def factor(self, step):
        """w(t)."""
        return math.exp(-5 * (1 - min(step, self.ramp) / self.ramp) ** 2) if self.ramp else 1.0

    def forward(self, step):
        if self.view not in step.outputs or self.view not in step.weights:
            raise UserError(
                f"bismap.Consistency needs the view '{self.view}': set uda.mixer={{name: "
                f"mixers.Strong}}"
            )
        logits, kept = step.outputs[self.view].logits, step.weights[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            student = resized(logits, kept.shape[-2:]).log_softmax(1)
            guide = resized(step.teacher.logits.detach(), kept.shape[-2:]).log_softmax(1)
            divergence = F.kl_div(student, guide, reduction="none", log_target=True).mean(1)
            kept = kept.to(divergence.dtype)
            pixels = distributed.mean(kept.sum())
            pixels = torch.where(pixels > 0, pixels, 1)
            return self.factor(step.number) * (divergence * kept).sum() / pixels


class Distillation(Loss):
    """The student follows a frozen teacher on the target; mean over pixels, at feature size, and
    classes.

    Args:
        view: one with the pixels that the teacher sees: the target as it comes, or its strong view.
        kd: "linear" is the released form, which has probabilities in the place of
            log-probabilities, sum_c t_c (log t_c - s_c): the gradient is that of -sum_c t_c s_c.
            "kl" is the divergence [R].
    """

    needs_teacher = True

    def __init__(
        self,
        *,
        view: Literal["target", "strong"] = "target",
        kd: Literal["linear", "kl"] = "linear",
    ):
        super().__init__()
        self.view, self.kd = view, kd

    def forward(self, step):
        logits = output_of(step, self.view, "bismap.Distillation").logits
        with torch.autocast(logits.device.type, enabled=False):
            student = precise(logits).log_softmax(1)
            guide = resized(step.teacher.logits.detach(), logits.shape[-2:]).log_softmax(1)
            student = student.exp() if self.kd == "linear" else student
            return F.kl_div(student, guide, reduction="none", log_target=True).mean()
