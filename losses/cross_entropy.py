"""Pixel cross-entropy, normalised by the global number of labelled pixels, optionally on hard pixels only.

    losses: [{name: cross_entropy.CrossEntropy, weight: 1}]

OHEM (online hard example mining; Shrivastava et al., CVPR 2016; per pixel) keeps the pixels whose true class has a
probability below `ohem`, and at least `ohem_min` pixels per image. How many these are is known only after the forward
pass, so each micro-batch is then normalised by its own number and the step is the mean of its micro-batches.
"""

import math

import torch
import torch.nn.functional as F

from engine import distributed
from engine.ranges import Count, Natural, Share
from engine.statistics import IGNORE, precise, resize_labels, resize_logits
from losses.base import Loss


class CrossEntropy(Loss):
    """sum_p w(p) CE(p) / number of labelled pixels.

    Args:
        view: the view whose logits are scored.
        head: "logits", or other class scores of the output: "auxiliary" and "region" of model.heads, "query0" ... of
            the layers of queries.Queries.
        ohem: probability of the true class below which a pixel is hard; 0 keeps all pixels.
        ohem_min: pixels per image that are kept at least.
        stride: only every n-th row and column of the label is scored, which divides the cost by n^2 where features are
            coarse and classes many; each micro-batch is then normalised by its own number of pixels.
        by_weights: divide by the sum of the weights, over all processes, instead of the number of pixels (PPAR); each
            micro-batch by its own.
    """

    def __init__(
        self,
        *,
        view: str = "source",
        head: str = "logits",
        ohem: Share = 0.0,
        ohem_min: Natural = 10000,
        stride: Count = 1,
        by_weights: bool = False,
    ):
        super().__init__()
        self.view, self.head, self.by_weights = view, head, by_weights
        self.ohem, self.ohem_min, self.stride = ohem, ohem_min, stride

    def forward(self, step):
        logits, labels = step.outputs[self.view].scores(self.head), step.labels[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            count = step.pixels(self.view)
            if self.stride > 1:
                labels = resize_labels(labels, [-(-n // self.stride) for n in labels.shape[-2:]])
                count = distributed.mean((labels != IGNORE).sum().double())
            logits = resize_logits(precise(logits), labels.shape[-2:])
            # (B, H, W), 0 where ignored
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            count = count.to(loss.dtype)
            if self.ohem:
                kept = self.hard(loss.detach(), labels)
                loss, count = loss * kept, distributed.mean(kept.sum())
            if self.view in step.weights:
                weights = resize_labels(step.weights[self.view], labels.shape[-2:])
                loss = loss * weights
                if self.by_weights:
                    counted = weights * (labels != IGNORE) * (kept if self.ohem else 1)
                    count = distributed.mean(counted.sum()).to(loss.dtype)
                    return loss.sum() / torch.where(count > 0, count, 1)
            return loss.sum() / count.clamp_min(1)

    def hard(self, loss, labels):
        """Mask (B, H, W) of the pixels that OHEM keeps; image by image, so that it does not depend on the batch."""
        k = min(self.ohem_min, loss[0].numel())
        # the k-th largest loss of each image
        least = loss.flatten(1).topk(k, 1).values[:, -1, None, None]
        bound = least.clamp_max(-math.log(self.ohem))
        return ((loss >= bound) & (labels != IGNORE)).to(loss.dtype)
