"""Pixel cross-entropy, normalised by the global number of labelled pixels, optionally on hard
pixels only.

    losses: [{name: cross_entropy.CrossEntropy, weight: 1}]

OHEM (online hard example mining; Shrivastava et al., CVPR 2016; per pixel) keeps the pixels whose
true class has a probability below `ohem`, and at least `ohem_min` pixels per image. How many these
are is known only after the forward pass, so each micro-batch is then normalised by its own number
and the step is the mean of its micro-batches.

Class weights multiply the weights of pixels. `class_weights: auto` is median frequency balancing
(Eigen & Fergus, ICCV 2015; SegNet used it on CamVid):

    w_c = a median_j(f_j) / f_c,    f_c = pixels of c / labelled pixels of the images that show c

over the training set, each image once. The factor a makes the mean weight of its labelled pixels 1,
so that the loss keeps its scale [R]. Weights do not change the divisor, the number of labelled
pixels of the step. With `by_weights` they do, as in PyTorch's weighted cross-entropy.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from engine import distributed
from engine.ranges import Count, Natural, NonNegative, Share, brief
from engine.statistics import IGNORE, precise, resize_labels, resize_logits
from losses.base import Loss


def median_frequency(counts):
    """Pixels (n, K) of each class in each image -> weights (K), float64; 1 where none shows it.

    Raises:
        ValueError: no image has a labelled pixel.
    """
    pixels = counts.sum(0)
    if not pixels.any():
        raise ValueError("class_weights=auto needs a training set with labelled pixels")
    around = ((counts > 0) * counts.sum(1, keepdims=True)).sum(0)
    frequencies = pixels / np.maximum(around, 1)
    shown = pixels > 0
    weights = np.median(frequencies[shown]) / np.where(shown, frequencies, 1)
    return np.where(shown, weights * pixels.sum() / (weights @ pixels), 1.0)


def label_weights(class_weights, classes, counts):
    """The option `class_weights` -> weight of each label 0 to 255, float64; None for none.

    Raises:
        ValueError: a name that is no class; nothing to count.
    """
    if class_weights == "none":
        return None
    if class_weights != "auto":
        for name in class_weights:
            if name not in classes:
                known = brief(", ".join(classes), 300)
                raise ValueError(f"class_weights names '{name}', which is no class of {known}")
        weights = [class_weights.get(name, 1.0) for name in classes]
    elif counts is None:
        raise ValueError(
            "class_weights=auto needs the labels of a training set, none is known here"
        )
    else:
        weights = median_frequency(counts())
    table = torch.ones(IGNORE + 1, dtype=torch.float64)
    table[: len(weights)] = torch.as_tensor(weights)
    return table


class CrossEntropy(Loss):
    """sum_p w(p) CE(p) / number of labelled pixels.

    Args:
        classes: names, for `class_weights`.
        counts: returns (n, K) pixels of each class in each training image, for `auto`.
        view: the view whose logits are scored.
        head: "logits", or other class scores of the output: "auxiliary" and "region" of
            model.heads, "query0" ... of the layers of queries.Queries.
        ohem: probability of the true class below which a pixel is hard; 0 keeps all pixels.
        ohem_min: pixels per image that are kept at least.
        stride: only every n-th row and column of the label is scored, which divides the cost by n^2
            where features are coarse and classes many; each micro-batch is then normalised by its
            own number of pixels.
        by_weights: divide by the sum of the weights, over all processes, instead of the number of
            pixels (PPAR); each micro-batch by its own.
        class_weights: none; auto, see above; or {name: weight} as they are, 1 for other classes.
            OHEM chooses pixels by their unweighted loss.
    """

    def __init__(
        self,
        *,
        classes=(),
        counts=None,
        view: str = "source",
        head: str = "logits",
        ohem: Share = 0.0,
        ohem_min: Natural = 10000,
        stride: Count = 1,
        by_weights: bool = False,
        class_weights: Literal["none", "auto"] | dict[str, NonNegative] = "none",
    ):
        super().__init__()
        self.view, self.head, self.by_weights = view, head, by_weights
        self.trains = (head,)
        self.ohem, self.ohem_min, self.stride = ohem, ohem_min, stride
        self.class_weights = label_weights(class_weights, classes, counts)

    def forward(self, step):
        logits, labels = step.outputs[self.view].scores(self.head), step.labels[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            if self.stride == 1:
                count = step.pixels(self.view)
            else:
                labels = resize_labels(labels, [-(-n // self.stride) for n in labels.shape[-2:]])
                count = distributed.mean((labels != IGNORE).sum().double())
            logits = resize_logits(precise(logits), labels.shape[-2:])
            # (B, H, W), 0 where ignored
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            if self.ohem:
                kept = self.hard(loss.detach(), labels)
                loss, count = loss * kept, distributed.mean(kept.sum())
            weights = step.weights.get(self.view)
            if weights is not None:
                weights = resize_labels(weights, labels.shape[-2:])
            if self.class_weights is not None:
                self.class_weights = self.class_weights.to(loss)  # copied to a GPU once
                by_class = self.class_weights[labels]
                weights = by_class if weights is None else weights * by_class
            if weights is not None:
                loss = loss * weights
                if self.by_weights:
                    counted = weights * (labels != IGNORE) * (kept if self.ohem else 1)
                    count = distributed.mean(counted.sum())
            return loss.sum() / torch.where(count > 0, count, 1).to(loss.dtype)

    def hard(self, loss, labels):
        """Mask (B, H, W) of the pixels that OHEM keeps; image by image, so that it does not depend
        on the batch."""
        bound = -math.log(self.ohem)
        if k := min(self.ohem_min, loss[0].numel()):
            # the k-th largest loss of each image
            bound = loss.flatten(1).topk(k, 1).values[:, -1, None, None].clamp_max(bound)
        return ((loss >= bound) & (labels != IGNORE)).to(loss.dtype)
