"""Soft Dice loss: overlap of class areas, in which small classes count as much as large ones
(Milletari et al., V-Net, 3DV 2016; for several classes Sudre et al., DLMIA 2017).

    losses: [{name: cross_entropy.CrossEntropy}, {name: dice.Dice, weight: 1.0}]

    L = mean_c 1 - (2 sum_p w p_c y_c + s) / (sum_p w p_c + sum_p w y_c + s)

over the classes c that have a labelled pixel, and the labelled pixels p of the batch of all
processes; of each micro-batch by itself. V-Net squares the terms of the denominator, Sudre et al.
weigh classes by their area; here, as in segmentation_models_pytorch, neither is done [R].
"""

from engine.ranges import Positive
from engine.statistics import class_sums, precise, resize_logits
from losses.base import Loss


class Dice(Loss):
    """Mean of 1 - Dice over the classes present.

    Args:
        smooth: s, in pixels.
        view: the view whose logits are scored.
    """

    def __init__(self, *, smooth: Positive = 1.0, view: str = "source"):
        super().__init__()
        self.smooth, self.view = smooth, view

    def forward(self, step):
        logits, labels = precise(step.outputs[self.view].logits), step.labels[self.view]
        chances = resize_logits(logits, labels.shape[-2:]).softmax(1)  # (B, K, H, W)
        weights = step.weights.get(self.view)
        # sums: (K, K), class of the label by class of the probability.
        sums, areas = class_sums(chances, labels, logits.shape[1], weights, sync=True)
        overlap = (2 * sums.diagonal() + self.smooth) / (sums.sum(0) + areas + self.smooth)
        present = areas > 0
        return ((1 - overlap) * present).sum() / present.sum().clamp_min(1)
