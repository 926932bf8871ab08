"""BCL: "Bi-directional Contrastive Learning for Domain Adaptive Semantic Segmentation" (Lee et al.,
ECCV 2022).

    uda:
      labelers:
        - {name: bcl.StaticLabels, share: 0.1}
        - {name: bcl.LabelTransfer, confidence: 0.8, momentum: 0.99}
      mixer: {name: mixers.SourceTarget}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source, weight: 1.0}
      - {name: cross_entropy.CrossEntropy, view: target, weight: 0.3}
      - {name: entropy.Entropy, view: source, weight: 0.4}
      - {name: entropy.Entropy, view: target, weight: 0.12}
      - {name: bcl.Contrast, weight: 0.2}
    stages:
      - {name: source, ...}     # source only: the first round labels with it
      - {name: round, init: previous, repeat: 10, lr_scale: 0.5}    # new labels, half the rate

Its labels go with ClassMix too (ours): `mixers.ClassMix, target: true` and cross-entropy on the
view "mixed". Contrast and LabelTransfer keep to the pairs as they come.

The batch is a set of pairs, the i-th source with the i-th target image, and the pixels of each are
drawn to the class means of the other. With features f, labels y (y_T: pseudo labels) and cosine -1
for classes without a mean:

    rho_S^k = mean of f_S(p) over y_S(p) = k        z_k(p) = cos(rho_S^k, f_T(p)) / tau
    L_FCL   = mean of -log softmax(z(p))_{y_T(p)} over y_T(p) in O      O = classes of y_S and y_T
    L_BCL   = the same with rho_T, f_S, y_S

The target's labels are hybrid: static ones of the classifier, made once per stage (StaticLabels),
and in their holes dynamic ones of every step (LabelTransfer): the nearest class mean of the source
image, which a bias per class moves towards the target.

How sure this is. Contrast is what the authors' code does [C]. Its static rule accepts a pixel if
*any* class exceeds its own threshold; here the arg max has to [R]. It has no calibration, and makes
dynamic labels but never uses them: LabelTransfer is reconstructed [R] from the paper's overview
figure and abstract. Released behaviour: `dynamic: off, calibration: off`, which equals no
LabelTransfer at all.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from engine import distributed
from engine.ranges import Momentum, Positive, Share
from engine.statistics import IGNORE, class_sums, precise, resize_labels, resize_logits
from losses.base import Labeler, Loss, comparable, output_of

EPS = 1e-6  # vectors shorter than this have no direction
# Range of the histograms of log-odds, and bins per unit: a power of 2 has exact edges.
LOW, HIGH, STEPS = -8, 120, 512


def log_odds(logits, size):
    """The arg max of each pixel, and its log p / (1 - p), which orders pixels as p does, but never
    rounds to 1.

    Args:
        logits: (B, K, h, w).
        size: (H, W), to which the logits are resized first.
    Returns:
        log-odds (B, H, W) of at least float32, classes (B, H, W).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = resize_logits(precise(logits), size)
        top, classes = logits.max(1)
        return top - logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1), classes


class StaticLabels(Labeler):
    """Labeler: arg max of the pixels that are sure for their class, and of those that are sure for
    their image.

    A class's threshold is what `share` of the pixels predicted as it reach in the whole target set
    (the code looks at every fifth of them). An image's pixels are chosen by rank: the code compares
    with a quantile, which no pixel exceeds if the surest all have a probability of 1.

    Args:
        share: of the pixels of each class, and of each image, in (0, 1]. So 1 to 2 times `share`
            get a label.

    State: theta (K), thresholds in log-odds, to 1/512 and 120 at most; infinite for classes that
    were never predicted.
    """

    stored = learned = True
    labels_images = True

    def __init__(self, *, num_classes, share: Annotated[float, "(0, 1]"] = 0.1):
        super().__init__()
        self.share = share
        self.register_buffer("theta", torch.full((num_classes,), torch.inf))

    @torch.no_grad()
    def prepare(self, preparation):
        """Thresholds from one pass over the target set, labels from a second."""
        bins = (HIGH - LOW) * STEPS
        counts = torch.zeros(len(self.theta) * bins, dtype=torch.long, device=self.theta.device)
        for _, image, _ in preparation.images(preparation.target):
            sure, classes = log_odds(preparation.segment(image).logits, image.shape[-2:])
            place = (sure * STEPS).floor().clamp(LOW * STEPS, HIGH * STEPS - 1).long() - LOW * STEPS
            counts += torch.bincount((classes * bins + place).flatten(), minlength=len(counts))
        # Pixels in a bin or above it; the highest bin that holds the share counts whole, so no tie
        # is ever left out.
        above = distributed.all_reduce(counts).view(-1, bins).flip(1).cumsum(1).flip(1)
        highest = (above >= self.share * above[:, :1].double()).sum(1) - 1
        self.theta.copy_(torch.where(above[:, 0] > 0, highest / STEPS + LOW, torch.inf))

        preparation.store(
            "pseudo_labels",
            preparation.target,
            lambda index, image, label: self.label(preparation, image, {})[0],
            {
                "labeler": "bcl.StaticLabels",
                "share": self.share,
                "log_odds": [float(t) if t.isfinite() else None for t in self.theta.to("cpu")],
            },
            palette=True,
        )

    def select(self, sure, classes):
        """Log-odds and arg max, both (B, H, W) -> labels (B, H, W)."""
        chosen = sure >= self.theta.to(sure.dtype)[classes]
        flat = sure.flatten(1)
        count = max(1, round(self.share * flat.shape[1]))
        bound = flat.kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
        # Of equal ones the first are taken, so that a larger share only adds pixels.
        above, ties = flat > bound, flat == bound
        best = above | (
            ties & (ties.cumsum(1, dtype=torch.int32) <= count - above.sum(1, keepdim=True))
        )
        chosen |= best.view_as(chosen)
        return torch.where(chosen, classes, IGNORE)

    def label(self, network, image, prototypes):
        """Images (B, 3, H, W) -> labels (B, H, W) with the thresholds of the last `prepare`.

        Args:
            network: anything with the method `segment`.
        """
        return self.select(*log_odds(network.segment(image).logits, image.shape[-2:]))


def cosines(features, means, present):
    """Features (B, D, h, w), means (B, K, D), present (B, K) -> (B, K, h, w), -1 for absent
    classes."""
    maps, means = features.flatten(2), F.normalize(means, dim=2, eps=EPS)
    # The order of the product decides the layout of its gradient: the features' own saves a fifth
    # of the time.
    if features.is_contiguous(memory_format=torch.channels_last):
        products = torch.bmm(maps.transpose(1, 2), means.transpose(1, 2)).transpose(1, 2)
    else:
        products = torch.bmm(means, maps)  # (B, K, N)
    products = products / maps.norm(dim=1, keepdim=True).clamp_min(EPS)
    return products.masked_fill(~present[..., None], -1).unflatten(2, features.shape[2:])


def on_cells(features, labels, weights):
    """The same with labels and weights of the features' size."""
    size = features.shape[-2:]
    weights = None if weights is None else resize_labels(weights, size)
    return features, resize_labels(labels, size), weights


def image_sums(features, labels, num_classes, weights=None):
    """Class sums (B, K, D) of each image, and which classes occur in it (B, K) with a weight above
    0."""
    features, labels, weights = on_cells(features, labels, weights)
    sums, counts = class_sums(features, labels, num_classes, weights, per_image=True)
    return sums, counts > 0


class LabelTransfer(Labeler):
    """Labeler [R]: pixels without a static label take the class of the nearest mean of their pair's
    source image.

    With features and means of unit length, and b as the last step left it,

        y_D(p) = arg max over the classes k of y_S of cos(rho_S^k + g b^k, f_T(p))
        b^k   <- m b^k + (1 - m) (rho_F^k - rho_S^k), averaged over the pairs of a
                   step where both images have k

    rho_F are the target's means over static labels alone: a bias that follows the labels it makes
    confirms itself. It comes after any labeler of the target view; without one b stays zero, and
    the dynamic labels are the only ones.

    Args:
        dynamic: "fill" gives y_D to unlabelled pixels; "off" leaves the labels as they are.
        calibration: "ema" moves b; "off" keeps it at zero.
        confidence: probability, the softmax of cos / tau over all K classes, that y_D has to
            exceed. With 19 classes in the source image 0.8 needs a cosine 0.43 above the others;
            absent ones have the cosine -1, so with two classes 0.14 is enough.
        momentum: m.
        ramp: share of the stage's steps over which g rises from 0 to 1; 0: always 1.
        temperature: tau.

    State: bias (K, D), and updates (K), the number of steps that moved each class.
    """

    def __init__(
        self,
        *,
        num_classes,
        in_channels,
        dynamic: Literal["off", "fill"] = "fill",
        calibration: Literal["off", "ema"] = "ema",
        confidence: Share = 0.8,
        momentum: Momentum = 0.99,
        ramp: Share = 0.0,
        temperature: Positive = 0.1,
    ):
        super().__init__()
        self.dynamic, self.calibration, self.ramp = dynamic, calibration, ramp
        self.confidence, self.momentum, self.temperature = confidence, momentum, temperature
        self.register_buffer("bias", torch.zeros(num_classes, in_channels))
        self.register_buffer("updates", torch.zeros(num_classes, dtype=torch.long))
        # Of the running step, on this process: sums of rho_F - rho_S, and the number of pairs in
        # the last column.
        self.register_buffer("moves", torch.zeros(num_classes, in_channels + 1), persistent=False)

    @torch.no_grad()
    def after(self, step):
        """Hybrid labels of the target; without a labeler before it, dynamic ones alone."""
        truth = step.labels["source"]
        static = step.labels.get("target", torch.full_like(truth, IGNORE))
        with torch.autocast(truth.device.type, enabled=False):
            source, target = (
                F.normalize(
                    precise(output_of(step, view, "bcl.LabelTransfer").features), dim=1, eps=EPS
                )
                for view in ("source", "target")
            )
            means, known = self.unit_means(source, truth, step.weights.get("source"))
            if self.calibration == "ema":
                reached, found = self.unit_means(target, static, step.weights.get("target"))
                both = (known & found)[..., None].to(means.dtype)  # (B, K, 1)
                self.moves += (
                    torch.cat([(reached - means) * both, both], 2).sum(0).to(self.moves.dtype)
                )
            if self.dynamic == "fill":
                strength = min(1.0, step.progress / self.ramp) if self.ramp else 1.0
                dynamic = self.nearest(target, means + strength * self.bias, known)
                static = static.where(static != IGNORE, resize_labels(dynamic, static.shape[-2:]))
        step.labels["target"] = static

    def unit_means(self, features, labels, weights):
        """Class means (B, K, D) of unit length, the direction of the sums, and which classes occur
        (B, K)."""
        sums, known = image_sums(features, labels, len(self.updates), weights)
        return F.normalize(sums, dim=2, eps=EPS), known

    def nearest(self, features, means, known):
        """y_D (B, h, w) of features (B, D, h, w), from means (B, K, D) of which some are known (B,
        K)."""
        scores = cosines(features, means.to(features.dtype), known) / self.temperature
        confidence, classes = scores.softmax(1).max(1)
        sure = known.gather(1, classes.flatten(1)).view_as(classes) & (confidence > self.confidence)
        return classes.where(sure, IGNORE)

    @torch.no_grad()
    def update(self, step):
        """Move b by what `after` has summed, on all processes."""
        total = distributed.all_reduce(self.moves).masked_fill(step.skipped, 0)
        moved = total[:, -1] > 0
        mean = total[:, :-1] / total[:, -1:].clamp_min(1)
        self.bias.copy_(self.bias.where(~moved[:, None], mean.lerp(self.bias, self.momentum)))
        self.updates += moved
        self.moves.zero_()


def pixels_of_cells(labels, size, num_classes, weights=None):
    """How many pixels of each class a feature cell covers, or the sum of their weights, which may
    have another size: labels and weights (B, H, W) -> (B, K, h, w)."""
    cells = torch.arange(size[0] * size[1], device=labels.device).view(1, *size)
    ids = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    places = (ids * cells.numel() + resize_labels(cells, labels.shape[-2:])).flatten(1)
    each = torch.ones_like(labels) if weights is None else resize_labels(weights, labels.shape[-2:])
    counts = each.new_zeros(len(places), (num_classes + 1) * cells.numel())
    counts.scatter_add_(1, places, each.flatten(1))
    return counts.view(-1, num_classes + 1, *size)[:, :-1]


class Contrast(Loss):
    """forward_weight L_FCL + backward_weight L_BCL, mean over the pairs; a pair whose O is empty
    has 0. Weights of pixels (`step.weights`) multiply them in the means rho and in the losses,
    whose divisor stays the number of pixels.

    Args:
        forward_weight: factor of L_FCL, target pixels to source means.
        backward_weight: factor of L_BCL, source pixels to target means.
        temperature: tau.
        detach_prototypes: no gradient through the means, so that L_FCL reaches f_T alone and L_BCL
            f_S; in the released code both losses reach both.
        source, target: whose vectors are rho_S and rho_T: "pair", the means of each image, which
            needs no member of that name, or a member such as centroids or mixtures, whose `seen`
            classes then count as present.
    """

    def __init__(
        self,
        *,
        num_classes,
        forward_weight: float = 1.0,
        backward_weight: float = 1.0,
        temperature: Positive = 0.1,
        detach_prototypes: bool = False,
        source: str = "pair",
        target: str = "pair",
    ):
        super().__init__()
        self.num_classes, self.temperature = num_classes, temperature
        self.forward_weight, self.backward_weight = forward_weight, backward_weight
        self.detach_prototypes, self.members = detach_prototypes, (source, target)

    def forward(self, step):
        with torch.autocast(step.labels["source"].device.type, enabled=False):
            source, target = (
                (
                    precise(output_of(step, view, "bcl.Contrast").features),
                    step.labels[view],
                    step.weights.get(view),
                )
                for view in ("source", "target")
            )
            rho_s, in_source = self.vectors(self.members[0], step.prototypes, *source)
            rho_t, in_target = self.vectors(self.members[1], step.prototypes, *target)
            both = in_source & in_target  # O, (B, K)
            return self.forward_weight * self.towards(
                rho_s, in_source, both, *target
            ) + self.backward_weight * self.towards(rho_t, in_target, both, *source)

    def vectors(self, name, prototypes, features, labels, weights):
        """Vectors (B, K, D) of a member for each image, and which classes have one (B, K)."""
        if name == "pair" and name not in prototypes:
            # Sums stand for means, since a cosine divides by the length.
            means, present = image_sums(features, labels, self.num_classes, weights)
        else:
            chosen = comparable(prototypes, name, "bcl.Contrast")
            means, present = chosen.pair_means(*on_cells(features, labels, weights))
        means = means.detach() if self.detach_prototypes else means
        return means.to(features.dtype), present

    def towards(self, means, present, both, features, labels, weights):
        """The loss of one direction.

        z is upsampled to the labels as nearest neighbours. All pixels of a cell share its
        log-probabilities, so the sum over pixels is one over cells that counts their pixels, and
        nothing of the labels' size needs a gradient.
        """
        log_p = (cosines(features, means, present) / self.temperature).log_softmax(1)
        size, both = features.shape[-2:], both[..., None, None]
        counts = pixels_of_cells(labels, size, self.num_classes) * both
        weighted = (
            counts
            if weights is None
            else pixels_of_cells(labels, size, self.num_classes, weights.to(log_p)) * both
        )
        return -((log_p * weighted).sum((1, 2, 3)) / counts.sum((1, 2, 3)).clamp_min(1)).mean()
