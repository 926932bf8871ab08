"""Self-training with an averaged teacher: the common control of the UDA papers (DACS, Tranheden et al., WACV 2021; its
recipe as in DAFormer, Hoyer et al., CVPR 2022).

    uda:
      labeler: {name: self_training.TeacherConfidence, threshold: 0.968}
      mixer: {name: mixers.ClassMix}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: cross_entropy.CrossEntropy, view: mixed}

The teacher labels every target pixel by its most probable class. How far a batch is trusted is one number, the share of
its pixels whose probability exceeds the threshold, which weights all its pixels.
"""

import torch

from engine import distributed
from engine.statistics import resize_logits


class TeacherConfidence:
    """Labeler: arg max of the teacher, weighted by the share of confident pixels.

    Args:
        threshold: probability above which a pixel is confident.
        ignore_top, ignore_bottom: rows (pixels of the crop) whose weight is zero, such as sky rectification borders and
            the own bonnet; DAFormer uses 15 and 120 of 512.
    """

    def __init__(self, *, threshold: float = 0.968, ignore_top: int = 0, ignore_bottom: int = 0):
        self.threshold, self.ignore_top, self.ignore_bottom = threshold, ignore_top, ignore_bottom

    @torch.no_grad()
    def before(self, batch, teacher, step):
        """Target images -> {"target": (B, H, W) ids}, {"target": (B, H, W) weights}."""
        image = batch["target"]["image"]
        logits = resize_logits(teacher.network.segment(image).logits.float(), image.shape[-2:])
        confidence, labels = logits.softmax(1).max(1)  # (B, H, W)
        share = distributed.mean((confidence > self.threshold).to(image.dtype).mean())
        weights = share.expand_as(confidence).clone()
        weights[:, : self.ignore_top] = 0
        weights[:, confidence.shape[1] - self.ignore_bottom :] = 0
        return {"target": labels}, {"target": weights}
