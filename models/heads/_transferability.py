"""Transferability and priority of models/heads/region.py: the domain behind a gradient reversal,
its doubt, the doubt in classes, and ranks."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -factor (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


def reversal(step, ramp):
    """2 / (1 + exp(-10 step / ramp)) - 1: 0, 0.46, 0.99 after none, a tenth, half of the ramp; 1
    without one."""
    return 2 / (1 + math.exp(-10 * min(step / ramp, 1.0))) - 1 if ramp else 1.0


def doubt(logits):
    """Binary entropy H2(sigmoid(logits)) in bits: 1 where the domain cannot be told, 0 where it is
    certain."""
    return (F.softplus(logits) - logits * logits.sigmoid()).clamp_min(0) / math.log(2)


def uncertainty(logits):
    """Entropy of the classes over log K: (B, K, h, w) -> (B, h, w) in 0..1."""
    log_p = logits.log_softmax(1)
    return (-(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])).clamp(0, 1)


def ranks(values):
    """(B, h, w) -> each value's mean rank within its image, in 0..1; equal values share one, 0.5
    where all are equal."""
    flat = values.flatten(1)
    ordered = flat.sort(1).values
    places = [torch.searchsorted(ordered, flat, right=right) for right in (False, True)]
    return (sum(places) / (2 * flat.shape[1])).to(values.dtype).view_as(values)


def discriminator(channels, dropout):
    """Rows (..., D) -> logits (..., 1) of "source"."""
    width = max(channels // 4, 1)
    return nn.Sequential(
        nn.Linear(channels, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, 1),
    )
