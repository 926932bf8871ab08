"""Self-training: the target's labels are the predictions of another network.

Online, by the averaged teacher, the common control of the UDA papers (DACS, Tranheden et al., WACV
2021; its recipe as in DAFormer, Hoyer et al., CVPR 2022):

    uda:
      labelers: [{name: self_training.TeacherConfidence, threshold: 0.968}]
      mixer: {name: mixers.ClassMix}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: cross_entropy.CrossEntropy, view: mixed}

Once per stage, by the network that the stage starts from, as in the distillation stages of ProDA
(Zhang et al., CVPR 2021) and BiSMAP:

    uda:
      labelers:
        - name: self_training.StoredConfidence
          threshold: 0.0
          scales: [0.75, 1.0, 1.5]
          flip: true
      mixer: {name: mixers.SourceTarget}
"""

from types import SimpleNamespace

import torch

from engine import distributed
from engine.inference import predict
from engine.ranges import Natural, Scales, Share
from engine.statistics import IGNORE, resize_logits
from losses.base import Labeler


class TeacherConfidence(Labeler):
    """Labeler: arg max of the teacher. How far a batch is trusted is one number, the share of its
    pixels whose probability exceeds the threshold, which weights all its pixels.

    Args:
        threshold: probability above which a pixel is confident.
        ignore_top, ignore_bottom: rows (pixels of the crop) whose weight is zero, such as sky
            rectification borders and the bonnet of the own car; DAFormer uses 15 and 120 of 512.
    """

    needs_teacher = True
    labels_images = True

    def __init__(
        self, *, threshold: Share = 0.968, ignore_top: Natural = 0, ignore_bottom: Natural = 0
    ):
        super().__init__()
        self.threshold, self.ignore_top, self.ignore_bottom = threshold, ignore_top, ignore_bottom

    def confidence(self, output, size):
        """Output -> probability and id of the most probable class, both (B, H, W)."""
        return resize_logits(output.logits.float(), size).softmax(1).max(1)

    def before(self, step):
        """Labels and weights of the target."""
        image = step.target.image
        confidence, labels = self.confidence(step.teacher, image.shape[-2:])
        share = distributed.mean((confidence > self.threshold).to(image.dtype).mean())
        weights = share.expand_as(confidence).clone()
        weights[:, : self.ignore_top] = 0
        weights[:, max(0, confidence.shape[1] - self.ignore_bottom) :] = 0
        step.labels["target"], step.weights["target"] = labels, weights

    def label(self, network, image, prototypes):
        """The confident pixels of images (B, 3, H, W) -> (B, H, W), for exported labels and their
        accuracy."""
        confidence, labels = self.confidence(network.segment(image), image.shape[-2:])
        return torch.where(confidence > self.threshold, labels, IGNORE)


class StoredConfidence(Labeler):
    """Labeler: arg max of the network that the stage starts from, stored once.

    Args:
        threshold: probability that a pixel needs; 0 labels all of them.
        scales, flip: average the probabilities over scaled and mirrored images.
    """

    stored = learned = True
    labels_images = True

    def __init__(self, *, threshold: Share = 0.95, scales: Scales = (1.0,), flip: bool = False):
        super().__init__()
        self.threshold = threshold
        self.options = SimpleNamespace(mode="whole", short_side=0, scales=list(scales), flip=flip)

    def prepare(self, preparation):
        """Store the labels of the target."""

        def make(index, image, label):
            with preparation.autocast:
                return self.label(preparation.network, image, preparation.prototypes)[0]

        settings = {
            "rule": "StoredConfidence",
            "threshold": self.threshold,
            "scales": self.options.scales,
            "flip": self.options.flip,
        }
        preparation.store("pseudo_labels", preparation.target, make, settings, palette=True)

    def label(self, network, image, prototypes):
        """Pixels of images (1, 3, H, W) above the threshold -> (1, H, W)."""
        scores = predict(network, image, self.options)
        several = (
            len(self.options.scales) > 1 or self.options.flip
        )  # `predict` then returns probabilities
        confidence, labels = (scores if several else scores.softmax(1)).max(1)
        return torch.where(confidence >= self.threshold, labels, IGNORE)
