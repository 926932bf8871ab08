"""Focal loss: well classified pixels lose weight (Lin et al., ICCV 2017).

    losses: [{name: focal.Focal, gamma: 2.0}]

Their alpha, a weight of each class, is left out: `class_weights` of cross_entropy.py has weights.
"""

import torch
import torch.nn.functional as F

from engine.ranges import NonNegative
from engine.statistics import precise, resize_logits
from losses.base import Loss


class Focal(Loss):
    """sum_p w(p) (1 - p_y)^gamma CE(p) / number of labelled pixels; gamma 0 is cross-entropy."""

    def __init__(self, *, gamma: NonNegative = 2.0, view: str = "source"):
        super().__init__()
        self.gamma, self.view = gamma, view

    def forward(self, step):
        labels = step.labels[self.view]  # (B, H, W), 255 = ignore
        logits = resize_logits(precise(step.outputs[self.view].logits), labels.shape[-2:])
        loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
        wrong = -torch.expm1(-loss)  # 1 - p_y; the power has no gradient at 0
        loss = wrong.clamp_min(1e-6) ** self.gamma * loss  # 0 where ignored
        loss = loss * step.weights.get(self.view, 1)
        return loss.sum() / step.pixels(self.view).to(loss.dtype)
