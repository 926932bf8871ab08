"""ProDA's denoising of pseudo labels by prototypes: the closest peer of BiSMAP and BCL (Zhang et
al., "Prototypical Pseudo Label Denoising and Target Structure Learning for Domain Adaptive Semantic
Segmentation", CVPR 2021).

    prototypes:
      target: {name: centroids.Centroids, momentum: 0.9999, view: target}
    uda:
      labelers: [{name: proda.Denoise}]
      mixer: {name: mixers.SourceTarget}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: bismap.SymmetricCrossEntropy, view: target, weight: 1.0}
      - {name: proda.Regularity, weight: 0.1}
    stages: [{name: source, teacher: none, ...}, {name: adapt, init: previous, teacher: frozen}]

The predictions of the source model stay fixed; what changes while the student learns is how far
each class is believed, by the distance of the pixel's feature to the target's class centroids:

    w_k(p) = softmax_k(-|f(p) - eta_k| / tau)            label(p) = argmax_k w_k(p) p_k(p)

[R] Where the paper stores the soft predictions once and takes features of an averaged teacher, here
a frozen teacher predicts the same crop again (no K maps per image on the disk) and the features are
the student's. Its third part, the consistency of prototype assignments between views, is not built;
`bismap.Consistency` is the nearest term here.
"""

import torch
import torch.nn.functional as F

from engine.ranges import Positive
from engine.statistics import precise, resize_logits
from losses.base import Labeler, Loss, comparable, output_of


class Denoise(Labeler):
    """Labeler: the teacher's probabilities, weighted by the distances to the target's prototypes.

    Args:
        prototypes: name of the member that holds the target's centroids; `prepare` fits it with the
            predictions of the network that the stage starts from.
        temperature: tau.
    """

    needs_teacher = learned = True
    labels_images = True

    def __init__(self, *, prototypes: str = "target", temperature: Positive = 1.0):
        super().__init__()
        self.prototypes, self.temperature = prototypes, temperature

    def member(self, prototypes):
        remedy = (
            f"Add prototypes.{self.prototypes}={{name: centroids.Centroids, momentum: 0.9999, "
            f"view: target}}"
        )
        return comparable(prototypes, self.prototypes, "proda.Denoise", remedy)

    def prepare(self, preparation):
        """Fit the member on all target pixels, each with its predicted class."""

        def batches():
            for _, image, _ in preparation.images(preparation.target):
                output = preparation.segment(image)
                yield output.features, output.logits.argmax(1), None

        self.member(preparation.prototypes).fit(batches, preparation.prototypes)

    def denoise(self, logits, features, prototypes, size):
        """Logits (B, K, h, w) of the fixed model and features (B, D, h, w) of the student -> labels
        (B, H, W)."""
        with torch.autocast(logits.device.type, enabled=False):
            rows = precise(features).flatten(2).mT  # (B, N, D)
            centroids = prototypes.means().to(rows.dtype)  # (K, D)
            distances = torch.cdist(rows, centroids.expand(len(rows), -1, -1)).mT  # (B, K, N)
            distances = distances.masked_fill(~prototypes.seen[:, None], torch.inf)
            trust = (-distances / self.temperature).softmax(1)
            # Nothing seen: every class is believed alike.
            trust = torch.where(prototypes.seen.any(), trust, 1.0)
            trust = resize_logits(trust.unflatten(2, features.shape[-2:]), logits.shape[-2:])
            return resize_logits(trust * logits.to(rows.dtype).softmax(1), size).argmax(1)

    def after(self, step):
        """Labels of all pixels of the target, as in the paper (threshold 0)."""
        features = output_of(step, "target", "proda.Denoise").features
        size = step.target.image.shape[-2:]
        centroids = self.member(step.prototypes)
        step.labels["target"] = self.denoise(step.teacher.logits, features, centroids, size)

    def label(self, network, image, prototypes):
        """Images (B, 3, H, W) -> (B, H, W), one network in both roles."""
        output = network.segment(image)
        return self.denoise(
            output.logits, output.features, self.member(prototypes), image.shape[-2:]
        )


class Regularity(Loss):
    """-1/K sum_k log p_k, averaged over pixels: the divergence from the uniform distribution up to
    a constant, which keeps predictions from becoming too sure of noisy labels.

    Args:
        view: the view whose logits it takes.
    """

    def __init__(self, *, view: str = "target"):
        super().__init__()
        self.view = view

    def forward(self, step):
        logits = step.outputs[self.view].logits
        with torch.autocast(logits.device.type, enabled=False):
            return -F.log_softmax(precise(logits), 1).mean()
