"""ProtoSeg: "Rethinking Semantic Segmentation: A Prototype View" (Zhou et al., CVPR 2022), and with
a memory DNC: "Visual Recognition with Deep Nearest Centroids" (Wang et al., ICLR 2023).

    model.classifier: {name: protoseg.ProtoSeg}
    losses:
      - {name: cross_entropy.CrossEntropy}
      - {name: protoseg.Contrast, weight: 0.01}
      - {name: protoseg.Distance, weight: 0.001}

    # DNC, with cross-entropy alone
    model.classifier: {name: protoseg.ProtoSeg, memory: 300, update_every: 300}

A class has M prototypes, unit vectors that nothing learns: the pixels of a class are shared out
among them in equal parts, and each moves to the mean direction of those of its pixels that are
classified correctly,

    p <- norm(gamma p + (1 - gamma) norm(sum of z)).

The logits are LayerNorm_K(max_m <z, p_cm>), whose learned scale and shift per class take the place
of a temperature. The embedding is 1x1 convolution, ReLU, 1x1 convolution, unit length, LayerNorm,
unit length. The 3x3 convolution and the dropout before it in the released code are the decoder's
business here.

What differs from the released code: the component of a pixel is the arg max of its shares, as for
the contrast, where the code draws one for the update (Gumbel, temperature 0.5); sums are added over
processes and then move the prototypes once, where the code shares out the pixels of each process by
themselves and averages the prototypes that each of them has moved; pixels are embedded and
classified as the optimiser step leaves the network, not as it finds it.

DNC shares out the pixels of a memory: of each class some of each of the last steps, evenly spaced,
with a note whether they were classified correctly when they came. Reconstructed for segmentation
[R]: the released code is for classification, with an optimal transport solver of its own, for which
Sinkhorn-Knopp stands here. No centroid is replaced by a real pixel.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from engine import distributed
from engine.ranges import Count, Few, OptionalWidth, Positive, Share
from engine.statistics import unit
from models.classifiers._components import Components, Ring


class Unit(nn.Module):
    """Maps (B, E, h, w) to unit length, in at least float32."""

    def forward(self, maps):
        with torch.autocast(maps.device.type, enabled=False):
            return unit(maps)


class ProtoSeg(Components):
    """Features (B, D, h, w) -> logits (B, K, h, w); in training `output.components`
    (B, K, M, h, w), cosines.

    Args:
        per_class: M, prototypes of a class.
        width: E, channels of the embedding; 0: D.
        momentum: gamma.
        sharpness: kappa of the assignment (models/prototypes/_sinkhorn.py).
        rounds: of the assignment.
        memory: steps of which DNC's memory keeps pixels; 0: the prototypes follow the pixels of the
            step. It takes K x memory x pixels x (E + 1) floats, also in checkpoints, and as often
            again in a teacher.
        pixels: of each class that enter the memory at a step; where a class has fewer, its memory
            reaches further back.
        update_every: steps from one move of the prototypes to the next; DNC moves them once per
            filled memory.
    """

    def __init__(
        self,
        *,
        in_channels,
        num_classes,
        per_class: Few = 10,
        width: OptionalWidth = 0,
        momentum: Share = 0.999,
        sharpness: Positive = 0.05,
        rounds: Few = 3,
        memory: Annotated[int, "[0, 100000]"] = 0,
        pixels: Annotated[int, "[1, 100000]"] = 20,
        update_every: Count = 1,
    ):
        width = width or in_channels
        super().__init__(num_classes, per_class, width, sharpness, rounds)
        self.momentum, self.update_every = momentum, update_every
        convs = nn.Conv2d(in_channels, in_channels, 1), nn.Conv2d(in_channels, width, 1)
        self.project = nn.Sequential(convs[0], nn.ReLU(inplace=True), convs[1], Unit())
        self.memory = Ring(num_classes, memory * pixels, width + 1, pixels) if memory else None

    def compare(self, rows):
        """Cosines: rows (N, E) -> (K, M, N)."""
        return (self.vectors.flatten(0, 1).to(rows.dtype) @ rows.T).unflatten(
            0, self.vectors.shape[:2]
        )

    def remembered(self):
        """Sums (K, M, E) of the memory's pixels that were classified correctly."""
        rows, right = self.memory.rows.split([self.vectors.shape[2], 1], 2)  # (K, L, E), (K, L, 1)
        classes = torch.arange(len(rows), device=rows.device)[:, None]
        classes = torch.where(self.memory.held(), classes, len(rows)).flatten()
        with torch.autocast(rows.device.type, enabled=False):
            scores = (rows @ self.vectors.mT).flatten(0, 1)
            # All processes hold the same memory: they count it as often as there are of them, which
            # cancels.
            parts = self.share_out(scores, classes).view(len(rows), -1, 1)
            members = parts == torch.arange(self.vectors.shape[1], device=rows.device)
            return (members * right).mT @ rows

    @torch.no_grad()
    def update(self, batches, step):
        """Move the prototypes to which pixels of the step, or of the memory, belong; the others
        stay as they are."""
        due = (step.number + 1) % self.update_every == 0
        if not due and self.memory is None:
            return
        rows, classes, scores, right = self.observe(batches)
        k, m, width = self.vectors.shape
        if self.memory is not None:
            self.memory.push(torch.cat([rows, right[:, None].to(rows.dtype)], 1), classes)
            if not due:
                return
            sums = self.remembered()
        else:
            groups = torch.where(right, m * classes + self.share_out(scores, classes), k * m)
            sums = rows.new_zeros(k * m + 1, width).index_add_(0, groups, rows)
            sums = distributed.all_reduce(sums)[:-1].view(k, m, width)
        sums = sums.to(self.vectors)
        length = sums.norm(dim=2, keepdim=True)
        moved = F.normalize(
            torch.lerp(F.normalize(sums, dim=2), self.vectors, self.momentum), dim=2
        )
        fits = (length > 0) & length.isfinite() & ~step.skipped  # a memory is full without a step
        self.vectors.copy_(torch.where(fits, moved, self.vectors))
