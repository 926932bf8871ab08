"""Entropy of the predictions: lowering it moves the boundaries between classes to where features
are sparse.

    losses: [..., {name: entropy.Entropy, view: target, weight: 0.12}]

    L = mean_p H(softmax(logits(p)))

Direct entropy minimisation of ADVENT (Vu et al., CVPR 2019), which divides H by log K
(`normalized`). BCL (bcl.py) uses it on both domains, undivided.
"""

import torch

from engine.statistics import precise
from losses.base import Loss


class Entropy(Loss):
    """Mean entropy of all pixels, labelled or not, at feature size, in nats.

    Args:
        view: the view whose logits are scored.
    """

    def __init__(self, *, view: str = "target"):
        super().__init__()
        self.view = view

    def forward(self, step):
        logits = step.outputs[self.view].logits
        with torch.autocast(logits.device.type, enabled=False):
            log_p = precise(logits).log_softmax(1)
            return -(log_p.exp() * log_p).sum(1).mean()
