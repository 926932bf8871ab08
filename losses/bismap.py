"""BiSMAP: "Bidirectional Self-Training with Multiple Anisotropic Prototypes for Domain Adaptive Semantic Segmentation"
(Lu et al., ACM MM 2022). Constants of its released code [C]; [R] marks what is reconstructed or differs.

    prototypes:
      mixtures: {name: mixtures.Mixtures, components: 8, view: none}          # fitted once, never updated
    uda:
      labelers: [{name: bismap.LikelihoodLabels, threshold: {nats: 100}}]     # source -> target
      source_weights: {name: bismap.Transferability, entropy: gta5}           # target -> source
      mixer: {name: mixers.Strong}                                            # views source, target, strong
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: bismap.SymmetricCrossEntropy, view: target}
      - {name: bismap.Consistency, weight: 30}
    stages: [{name: warmup, teacher: none, ...}, {name: self_training, init: imagenet}, {name: distillation, ...}]

The whole recipe is configs/base/uda_bismap.yaml: a warm-up on (stylised) source images; a mixture of Gaussians per
class, fitted to its features; target pixels labelled by their likelihood; self-training from ImageNet weights; two
distillations with `self_training.StoredConfidence` and `Distillation`. The stylised source is `data.train.stylised` or
`uda.style`. In the other direction, source pixels that look like nothing in the target lose weight.

What differs from the released code: the teacher runs in eval mode (there with batch statistics and without dropout),
the mean distance is that of the whole source (there a running mean that depends on the order), scores are upsampled
instead of features, and the sample of vectors per class is uniform (there a share per class).
"""

import math
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine import distributed
from engine.errors import UserError
from engine.statistics import IGNORE, resize_labels, resize_logits

SAMPLE = 2000  # scores per class and image from which the quantile of a member without `quantiles` is taken

# --- source -> target: labels by likelihood ------------------------------------------------------------------------


class LikelihoodLabels(nn.Module):
    """Labeler: the class under which a pixel's feature is most likely, where it is likely enough.

    The prototypes are fitted to the features of source pixels that the network classifies correctly; the score of a
    class is its log-density, without a prior. 100 nats are the paper's threshold, for its network: a density depends on
    the number and scale of the features, so another network needs `source_quantile`, the share of a class's own source
    pixels that may stay below its threshold [R]. Any member of the prototype family can take the mixtures' place.

    Args:
        prototypes: name of the member.
        threshold: {"nats": T} or {"source_quantile": q}, q in 0..1; None: 100 nats.
        fit: fit the member first; False takes it as it is.

    State: threshold (K), infinite for classes without a prototype.
    """

    def __init__(self, *, num_classes, prototypes: str = "mixtures", threshold: dict | None = None, fit: bool = True):
        super().__init__()
        threshold = {"nats": 100.0} if threshold is None else threshold
        if len(threshold) != 1 or not {*threshold} <= {"nats", "source_quantile"}:
            raise ValueError(f"threshold must be {{nats: T}} or {{source_quantile: q}}, not {threshold}")
        if not 0 <= threshold.get("source_quantile", 0) <= 1:
            raise ValueError(f"source_quantile must lie in 0..1, not {threshold['source_quantile']}")
        self.prototypes, self.rule, self.fit = prototypes, dict(threshold), fit
        self.register_buffer("threshold", torch.full((num_classes,), torch.inf))

    def member(self, prototypes):
        member = prototypes.get(self.prototypes) if self.prototypes in prototypes else None
        if member is None or not hasattr(member, "score"):
            raise UserError(
                f"bismap.LikelihoodLabels needs the prototypes '{self.prototypes}'; there are {', '.join(prototypes)}. "
                "Add prototypes: {mixtures: {name: mixtures.Mixtures, view: none}}"
            )
        return member

    @torch.no_grad()
    def prepare(self, preparation):
        """Fit the member, find the thresholds, store the labels of the target."""
        member = self.member(preparation.prototypes)

        def batches():
            """Features of the source with their labels where the network is right, 255 elsewhere."""
            for _, image, label in preparation.images(preparation.source):
                output = preparation.segment(image)
                label = resize_labels(label, output.features.shape[-2:])
                predicted = resize_logits(output.logits.float(), label.shape[-2:]).argmax(1)
                yield output.features, torch.where(predicted == label, label, IGNORE), None

        if self.fit:
            member.fit(batches)
        self.threshold.copy_(torch.where(member.seen, self.bound(member, batches).to(self.threshold), torch.inf))

        def make(index, image, label):
            with preparation.autocast:
                return self.label(preparation.network, image, preparation.prototypes)[0]

        reached = [float(t) if t.isfinite() else None for t in self.threshold.to("cpu")]
        settings = {"labeler": "bismap.LikelihoodLabels", "prototypes": self.prototypes, "rule": self.rule}
        preparation.store("pseudo_labels", preparation.target, make, settings | {"threshold": reached}, palette=True)

    def bound(self, member, batches):
        """Threshold of each class (K)."""
        if "nats" in self.rule:
            return torch.full_like(self.threshold, self.rule["nats"])
        level = self.rule["source_quantile"]
        if hasattr(member, "quantiles"):
            return member.quantiles(level)
        found = [[] for _ in self.threshold]  # cosines: a pass over the source, a bounded sample of each image
        for features, labels, _ in batches():
            scores = member.score(features).float()
            for c, values in enumerate(found):
                own = torch.where(labels == c, scores[:, c], torch.nan).flatten()
                own = own.sort().values[: int((labels == c).sum())]  # NaN comes last
                values.append(own[:: max(1, len(own) // SAMPLE)].to("cpu"))
        gathered = distributed.gather([torch.cat(values) for values in found])
        pooled = [np.concatenate([np.asarray(part[c]) for part in gathered]) for c in range(len(found))]
        return torch.tensor([float(np.quantile(v, level)) if len(v) else math.inf for v in pooled])

    def label(self, network, image, prototypes):
        """Images (B, 3, H, W) -> labels (B, H, W)."""
        member = self.member(prototypes)
        scores = member.score(network.segment(image).features)
        scores = scores.masked_fill(~member.seen[:, None, None], -1e30)  # finite: 0 times infinity has no value
        best, classes = resize_logits(scores, image.shape[-2:]).max(1)
        return torch.where(best >= self.threshold.to(best)[classes], classes, IGNORE)

    def before(self, batch):
        """{"target": the stored labels (B, H, W)}, no weights."""
        return {"target": batch["target"]["extra"]["pseudo_labels"].long()}, {}


# --- target -> source: how much a source pixel looks like the target -----------------------------------------------

# "Class entropy" of the released code: rare and hard classes have much of it, and their pixels keep their weight.
ENTROPY = {
    "gta5": (
        0.1502, 0.2935, 0.1362, 0.4436, 0.4393, 0.2795, 0.3139, 0.3106, 0.1068, 0.3195, 0.0719, 0.2364, 0.4754, 0.0986,
        0.3673, 0.4127, 0.4826, 0.5645, 0.6694,
    ),
    "synthia": (
        0.1039, 0.1333, 0.0960, 0.4322, 0.4646, 0.2801, 0.3994, 0.3480, 0.1437, 0.0, 0.1032, 0.2556, 0.4076, 0.1399,
        0.0, 0.3501, 0.0, 0.5117, 0.4416,
    ),
}  # fmt: skip


def region_weights(distances, mean):
    """2^-(d / mean)^2: 1 at the nearest prototype, 1/2 at the mean distance; all 1 where the mean is 0."""
    return torch.where(mean > 0, torch.exp2(-(distances / torch.where(mean > 0, mean, 1)).square()), 1.0)


def class_offsets(entropy):
    """Entropies (K) -> (K), linearly from 0 for the smallest to 1 for the largest; all 0 where they are equal."""
    low, high = entropy.amin(), entropy.amax()
    return torch.where(high > low, (entropy - low) / torch.where(high > low, high - low, 1), 0.0)


def nearest_distances(features, centres):
    """Euclidean distance of each row (N, D) to the nearest of the centres (P, D) -> (N)."""
    return torch.cdist(features, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


class Transferability(nn.Module):
    """Source weights W(p) = clip(2^-(d / mean d)^2 + e_class, 0, 1), stored once as 8-bit maps.

    d is the distance of the region that a pixel lies in, one of a few per image, to the nearest of k-means centres of
    all target regions, in the features of a frozen encoder; the mean is that over the source [R]. So no scale is left.

    Args:
        encoder: a backbone such as {name: resnet.ResNet, depth: 101, weights: PATH}; the paper has a SimCLR ResNet-152
            with selective kernels. None takes the backbone of the network that the stage starts from [R].
        size: [H, W] pixels to which images are resized for it.
        grid: [rows, columns] of regions in an image.
        clusters: target prototypes.
        entropy: e, "gta5" and "synthia" as published, for the 19 classes of Cityscapes; "measured": mean prediction
            entropy of the network, by class of the source pixels [R]; "none": 0.
    Raises:
        ValueError: the published constants with another number of classes.
    """

    def __init__(
        self,
        *,
        num_classes,
        encoder: dict | None = None,
        size: list = (128, 256),
        grid: list = (4, 4),
        clusters: int = 40,
        entropy: Literal["gta5", "synthia", "measured", "none"] = "measured",
    ):
        super().__init__()
        if entropy in ENTROPY and num_classes != 19:
            raise ValueError(
                f"entropy: {entropy} has 19 classes, the data {num_classes}; set entropy: measured or none"
            )
        self.num_classes, self.encoder, self.size, self.grid = num_classes, encoder, list(size), list(grid)
        self.clusters, self.entropy = clusters, entropy

    @torch.no_grad()
    def prepare(self, preparation):
        """Store the weights of all source pixels."""
        backbone = preparation.backbone(self.encoder) if self.encoder else preparation.network.backbone
        target = [self.regions(backbone, image, preparation) for _, image, _ in preparation.images(preparation.target)]
        centres = self.centres(torch.cat(target)).to(target[0])
        distances = {}  # by index of the source image
        sums = target[0].new_zeros(2, dtype=torch.float64)  # of distances, and their number
        entropies = target[0].new_zeros(2, self.num_classes + 1, dtype=torch.float64)  # the same of each class
        for index, image, label in preparation.images(preparation.source):
            distances[index] = nearest_distances(self.regions(backbone, image, preparation), centres)
            sums += torch.stack([distances[index].sum(), distances[index].new_tensor(len(distances[index]))])
            if self.entropy == "measured":
                entropies += self.entropy_of(preparation.segment(image).logits, label)
        total = distributed.all_reduce(sums)
        mean, offsets = total[0] / total[1], self.offsets(distributed.all_reduce(entropies))

        def make(index, image, label):
            regions = region_weights(distances[index], mean.float()).view(1, *self.grid)
            weights = resize_labels(regions, label.shape[-2:])  # the region that the pixel's centre lies in
            known = torch.where(label == IGNORE, 0, label)
            offset = torch.where(label == IGNORE, 0, offsets.to(weights)[known])
            return ((weights + offset).clamp(0, 1) * 255).round()[0]

        settings = {"rule": "bismap.Transferability", "encoder": self.encoder, "entropy": self.entropy}
        settings |= {"mean distance": float(mean), "offsets": [float(e) for e in offsets.to("cpu")]}
        preparation.store("transferability", preparation.source, make, settings)

    def regions(self, backbone, image, preparation):
        """Image (1, 3, H, W) -> features (regions, D) of the coarsest map."""
        small = F.interpolate(image, self.size, mode="bilinear", antialias=True)
        with preparation.autocast:
            maps = backbone(small)[-1]
        return F.adaptive_avg_pool2d(maps.float(), self.grid)[0].flatten(1).T

    def centres(self, regions):
        """k-means over the target regions of all processes (N, D) -> (P, D), the same on each of them."""
        everything = np.concatenate([np.asarray(part) for part in distributed.gather(regions.to("cpu"))])
        everything = np.ascontiguousarray(everything[np.lexsort(everything.T[:2])], np.float32)  # in any order
        found = None
        if distributed.is_main():
            cv2.setRNGSeed(5)
            stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
            clusters = min(self.clusters, len(everything))
            found = cv2.kmeans(everything, clusters, None, stop, 1, cv2.KMEANS_PP_CENTERS)[2]
        return torch.from_numpy(distributed.gather(found)[0])

    def entropy_of(self, logits, label):
        """Sums of H(p) / log K by class of the label, and numbers of pixels (2, K + 1); the last column is ignored."""
        log_p = logits.float().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1) / math.log(log_p.shape[1])  # (1, h, w)
        ids = resize_labels(label, entropy.shape[-2:]).flatten().clamp_max(self.num_classes)
        values = torch.stack([entropy.flatten(), torch.ones_like(entropy).flatten()]).double()
        return values.new_zeros(2, self.num_classes + 1).index_add_(1, ids, values)

    def offsets(self, measured):
        """e (K) in 0..1; `measured` (2, K + 1) is what `entropy_of` has summed over the source."""
        if self.entropy == "none":
            return torch.zeros(self.num_classes)
        if self.entropy in ENTROPY:
            return class_offsets(torch.tensor(ENTROPY[self.entropy]))
        total, count = measured[:, :-1]
        mean = total / count.clamp_min(1)
        # A class without a pixel takes no part in the range.
        return class_offsets(torch.where(count > 0, mean, total.sum() / count.sum()).float())

    def forward(self, batch):
        """Weights (B, H, W) in [0, 1] of the source pixels."""
        return batch["source"]["extra"]["transferability"].to(torch.get_default_dtype()) / 255


# --- losses --------------------------------------------------------------------------------------------------------


def full_size(logits, size):
    """Logits (B, K, h, w) -> (B, K, H, W) of at least float32."""
    return resize_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)


class SymmetricCrossEntropy(nn.Module):
    """ce CE + rce RCE, over the labelled pixels (Wang et al., ICCV 2019): RCE exchanges the roles of label and
    prediction, -sum_c p_c log q_c with the one-hot label q clamped to `floor`, which is -log(floor) (1 - p_y): bounded,
    so that a wrong label does little harm.

    Args:
        view: the view whose logits are scored.
        floor: 1e-4 gives a wrong pixel 9.21.
    """

    def __init__(self, *, view: str = "target", ce: float = 0.1, rce: float = 1.0, floor: float = 1e-4):
        super().__init__()
        if not 0 < floor < 1:
            raise ValueError(f"floor must lie between 0 and 1, not {floor}")
        self.view, self.ce, self.rce, self.floor = view, ce, rce, floor

    def forward(self, outputs, labels, valid, weights):
        logits, labels = outputs[self.view].logits, labels[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            log_p = -F.cross_entropy(
                full_size(logits, labels.shape[-2:]), labels, ignore_index=IGNORE, reduction="none"
            )  # (B, H, W), 0 where ignored, which is RCE 0 too
            loss = -self.ce * log_p - self.rce * math.log(self.floor) * (1 - log_p.exp())
            if self.view in weights:
                loss = loss * weights[self.view]
            return loss.sum() / valid[self.view].to(loss.dtype).clamp_min(1)


class Consistency(nn.Module):
    """w(t) KL(teacher on the target image || student on its strong view), mean over the pixels outside the cut-out and
    over classes; w(t) = exp(-5 (1 - t / ramp)^2), 1 from there on. The paper's factor is 30 (`weight: 30`): the mean
    over 19 classes makes that 1.6 per pixel.

    Args:
        ramp: steps.
        view: the strong view; weights[view] is 0 in the cut-out.
    """

    def __init__(self, *, ramp: int = 4000, view: str = "strong"):
        super().__init__()
        self.ramp, self.view = ramp, view

    def factor(self, step):
        return math.exp(-5 * (1 - min(step / self.ramp, 1)) ** 2) if self.ramp else 1.0

    def forward(self, outputs, teacher, weights, step):
        logits, kept = outputs[self.view].logits, weights[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            log_s = full_size(logits, kept.shape[-2:]).log_softmax(1)
            log_t = full_size(teacher.logits.detach(), kept.shape[-2:]).log_softmax(1)
            divergence = (log_t.exp() * (log_t - log_s)).mean(1) * kept  # (B, H, W)
            pixels = distributed.mean(kept.sum().to(divergence.dtype))
            return self.factor(step) * divergence.sum() / pixels.clamp_min(1)


class Distillation(nn.Module):
    """The student follows a frozen teacher on the target, mean over pixels and classes.

    Args:
        kd: "linear" is the released code, which passes probabilities where log-probabilities belong:
            sum t (log t - s), whose gradient is that of -sum t s. "kl" is the divergence itself [R].
        view: the plain target view.
    """

    def __init__(self, *, kd: Literal["linear", "kl"] = "linear", view: str = "target"):
        super().__init__()
        self.kd, self.view = kd, view

    def forward(self, outputs, teacher):
        logits = outputs[self.view].logits
        with torch.autocast(logits.device.type, enabled=False):
            log_s = full_size(logits, logits.shape[-2:]).log_softmax(1)
            log_t = full_size(teacher.logits.detach(), logits.shape[-2:]).log_softmax(1)
            return (log_t.exp() * (log_t - (log_s.exp() if self.kd == "linear" else log_s))).mean()
