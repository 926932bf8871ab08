"""Pixel cross-entropy, normalised by the global number of labelled pixels, optionally on hard pixels only.

    losses: [{name: cross_entropy.CrossEntropy, weight: 1}]

OHEM (online hard example mining; Shrivastava et al., CVPR 2016; per pixel) keeps the pixels whose true class has a
probability below `ohem`, and at least `ohem_min` pixels per image. How many these are is known only after the forward
pass, so each micro-batch is then normalised by its own number and the step is the mean of its micro-batches.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from engine import distributed
from engine.errors import UserError
from engine.ranges import Natural, Share
from engine.statistics import IGNORE, precise, resize_logits


class CrossEntropy(nn.Module):
    """sum_p w(p) CE(p) / number of labelled pixels.

    Args:
        view: the view whose logits are scored.
        head: "logits", or another map of class scores in the output's `aux`: "auxiliary" of model.auxiliary, "region"
            of model.region.
        ohem: probability of the true class below which a pixel is hard; 0 keeps all pixels.
        ohem_min: pixels per image that are kept at least.
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
        by_weights: bool = False,
    ):
        super().__init__()
        self.view, self.head, self.ohem, self.ohem_min, self.by_weights = (
            view,
            head,
            ohem,
            ohem_min,
            by_weights,
        )

    def scores(self, output):
        """Logits (B, K, h, w) of the head."""
        if self.head == "logits":
            return output.logits
        if self.head not in output.aux:
            raise UserError(
                f"cross_entropy.CrossEntropy: the network has no head '{self.head}'; 'auxiliary' is that of "
                "model.auxiliary.stage, 'region' that of model.region.stage"
            )
        return output.aux[self.head]

    def forward(self, outputs, labels, valid, weights):
        logits, labels = self.scores(outputs[self.view]), labels[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            logits = resize_logits(precise(logits), labels.shape[-2:])
            loss = F.cross_entropy(
                logits, labels, ignore_index=IGNORE, reduction="none"
            )  # (B, H, W), 0 where ignored
            count = valid[self.view].to(loss.dtype)
            if self.ohem:
                kept = self.hard(loss.detach(), labels)
                loss, count = loss * kept, distributed.mean(kept.sum())
            if self.view in weights:
                loss = loss * weights[self.view]
                if self.by_weights:
                    trusted = weights[self.view] * (labels != IGNORE) * (kept if self.ohem else 1)
                    count = distributed.mean(trusted.sum()).to(loss.dtype)
                    return loss.sum() / torch.where(count > 0, count, 1)
            return loss.sum() / count.clamp_min(1)

    def hard(self, loss, labels):
        """Mask (B, H, W) of the pixels that OHEM keeps; image by image, so that it does not depend on the batch."""
        k = min(self.ohem_min, loss[0].numel())
        least = (
            loss.flatten(1).topk(k, 1).values[:, -1, None, None]
        )  # the k-th largest loss of each image
        bound = least.clamp_max(-math.log(self.ohem))
        return ((loss >= bound) & (labels != IGNORE)).to(loss.dtype)
