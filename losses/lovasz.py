"""Lovász-softmax: a convex surrogate of 1 - IoU (Berman, Triki, Blaschko, CVPR 2018).

    losses: [{name: cross_entropy.CrossEntropy}, {name: lovasz.LovaszSoftmax, weight: 1.0}]

For each class present, the errors |y - p_c| of the labelled pixels are sorted, the largest first,
and weighed by how much the Jaccard loss grows when they are counted as wrong one after the other:

    L = mean_c sum_i e_c(i) (J_c(i) - J_c(i - 1)),    J_c(i) = 1 - (n_c - fg(i)) / (n_c + bg(i))

n_c: pixels of c; fg(i), bg(i): pixels of c, and others, among the first i. [C] of the authors'
release (bermanmaxim/LovaszSoftmax): classes present, over the batch, or with `per_image` the mean
over images. A pixel of weight w counts w times [R], an ignored one not at all.

The batch is a process's own micro-batch: sorting pixels of all processes would move them all. With
`per_image`, processes and micro-batches change nothing. It sorts K B H W values, which takes
longer than cross-entropy where classes are many.
"""

import torch

from engine.statistics import IGNORE, precise, resize_logits
from losses.base import Loss


def lovasz(errors, foreground, weights):
    """Errors (..., N) of a class in [0, 1], whether a pixel is of it (..., N) and the pixels'
    weights (N) or (..., N) -> loss (...); 0 where no weight is in the foreground."""
    errors, order = errors.sort(-1, descending=True)
    members = (weights * foreground).gather(-1, order)
    others = (weights * (1 - foreground)).gather(-1, order)
    area = members.sum(-1, keepdim=True)
    wrong, union = members.cumsum(-1), area + others.cumsum(-1)
    jaccard = torch.where(area > 0, 1 - (area - wrong) / torch.where(area > 0, union, 1), 0)
    return (errors * jaccard.diff(dim=-1, prepend=torch.zeros_like(area))).sum(-1)


class LovaszSoftmax(Loss):
    """Mean Lovász extension of the Jaccard loss over the classes present.

    Args:
        per_image: of each image, and the mean over images; or of the batch as one.
        view: the view whose logits are scored.
    """

    def __init__(self, *, per_image: bool = False, view: str = "source"):
        super().__init__()
        self.per_image, self.view = per_image, view

    def forward(self, step):
        labels, output = step.labels[self.view], step.outputs[self.view]
        chances = resize_logits(precise(output.logits), labels.shape[-2:]).softmax(1)
        classes = torch.arange(chances.shape[1], device=labels.device)[:, None, None]
        foreground = (labels[:, None] == classes).to(chances.dtype)  # (B, K, H, W)
        weights = ((labels != IGNORE) * step.weights.get(self.view, 1)).to(chances.dtype)
        weights = weights[:, None].expand_as(foreground)
        # (B, K, H W), or (1, K, B H W)
        parts = [maps.flatten(2) for maps in ((foreground - chances).abs(), foreground, weights)]
        if not self.per_image:
            parts = [maps.transpose(0, 1).flatten(1)[None] for maps in parts]
        loss, present = lovasz(*parts), (parts[1] * parts[2]).sum(-1) > 0
        return (loss.sum(1) / present.sum(1).clamp_min(1)).mean()
