"""Maps of labels and logits for tests of losses, and cross-entropy on them."""

import numpy as np
import torch

from engine.statistics import IGNORE
from losses.cross_entropy import CrossEntropy
from tests.records import a_step, an_output


def patches(batch, height, width, classes, seed=0):
    """Label maps (B, h, w) of 4 x 4 squares with some ignored cells."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.append(classes, IGNORE), (batch, -(-height // 4), -(-width // 4)))
    return torch.from_numpy(coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width].astype(np.int64))


def pixel_loss(logits, labels, pixels=None, weights=None, **options):
    """The loss term on one view; `pixels` are those of the whole step."""
    step = a_step(an_output(logits), labels, weights)
    if pixels is not None:
        step.counts["source"] = torch.tensor(pixels)
    return CrossEntropy(**options)(step)


def logits_and_labels(k=5, dtype=torch.float64):
    return torch.randn(2, k, 6, 5, dtype=dtype, requires_grad=True), patches(2, 24, 20, range(k))
