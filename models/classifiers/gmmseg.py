"""GMMSeg: "Gaussian Mixture based Generative Semantic Segmentation Models" (Liang et al., NeurIPS
2022).

    model.classifier: {name: gmmseg.GMMSeg}
    losses: [{name: cross_entropy.CrossEntropy}, {name: gmmseg.Contrast, weight: 0.01}]

A class has M Gaussians of equal weight with diagonal covariance. The score of a class is the
log-density of the one that a pixel fits best (the maximum, as in the released code, not the
mixture's sum), and logits are its LayerNorm over classes. The square is expanded: two matrix
products, of z and of z^2, as in models/prototypes/mixtures.py.

    E step   pixels of a class shared out among its components in equal parts, by log-density / its
             largest in the class
    M step   of the correctly classified pixels q of a component, f = norm(mean q):
             mu <- norm(0.999 mu + 0.001 f)      sigma^2 <- mean (q - f)^2 + 0.01

The M step needs sums of q and q^2 alone. The paper takes them over a queue of 32,000 pixels per
component (ADE20K with 8 components: 9.8 GB). The default keeps the sums themselves and lets old
steps fade, S <- decay S + S_step, a step with the weight that the queue would give it, at most
`pixels` [R]: no more than twice the memory of the means.

What differs from the released code: the arg max of the shares, not a draw; one assignment over all
processes; classes move that have a correctly classified pixel at the step of the M step, not any
pixel.
"""

from typing import Annotated

import torch
import torch.nn.functional as F

from engine import distributed
from engine.ranges import Count, Few, Positive, Share, Width
from models.blocks import conv_bn_relu
from models.classifiers._components import Components, Ring
from models.prototypes._em import log_joint

CHUNK = 1024  # places of the queue whose squares are made at a time


class GMMSeg(Components):
    """Features (B, D, h, w) -> logits (B, K, h, w); in training `output.components`
    (B, K, M, h, w), log-densities in nats.

    Args:
        components: M: 5, and 8 on ADE20K.
        width: E, channels of the embedding.
        momentum: of the means.
        sharpness: kappa of the assignment (models/prototypes/_sinkhorn.py).
        rounds: of the assignment.
        update_every: steps from one M step to the next.
        floor: added to the variances.
        decay: of the running sums, 0.999 for an age of 1,000 steps that a component was in (queue:
            800).
        queue: pixels of each component that a queue keeps instead of the running sums, 32000 in the
            paper; 0: none. It takes K x M x queue x E floats, also in checkpoints, and as often
            again in a teacher.
        pixels: most pixels of a component that enter the queue at a step, evenly spaced; without a
            queue all do, but weigh as many.
    Raises:
        ValueError: a queue that does not hold the pixels of a step.

    State: vectors (K, M, E), the means; variances (K, M, E); of the running sums mass (K, M, 1) and
    first, second (K, M, E).
    """

    densities = True

    def __init__(
        self,
        *,
        in_channels,
        num_classes,
        components: Few = 5,
        width: Width = 64,
        momentum: Share = 0.999,
        sharpness: Positive = 0.05,
        rounds: Few = 3,
        update_every: Count = 5,
        floor: Positive = 0.01,
        decay: Share = 0.999,
        queue: Annotated[int, "[0, 10000000]"] = 0,
        pixels: Count = 20,
    ):
        super().__init__(num_classes, components, width, sharpness, rounds)
        if queue and queue < pixels:
            raise ValueError(f"queue={queue} must be 0, or hold the pixels={pixels} of a step")
        self.momentum, self.update_every, self.floor = momentum, update_every, floor
        self.decay, self.pixels = decay, pixels
        self.project = conv_bn_relu(in_channels, width, 1)
        self.register_buffer("variances", torch.ones_like(self.vectors))
        self.queue = Ring(num_classes * components, queue, width, pixels) if queue else None
        if not queue:
            self.keep(
                mass=torch.zeros(num_classes, components, 1),
                first=torch.zeros_like(self.vectors),
                second=torch.zeros_like(self.vectors),
            )

    def compare(self, rows):
        """Log-densities: rows (N, E) -> (K, M, N)."""
        means, variances = (part.flatten(0, 1).double() for part in (self.vectors, self.variances))
        weights = torch.ones_like(means[:, 0])  # equal within a class, and no prior
        joint = log_joint(rows.T, rows.T.square(), weights, means, variances)
        return joint.unflatten(0, self.vectors.shape[:2])

    def scaled(self, scores, classes):
        """Divided by the largest |log-density| of the class, over all processes."""
        largest = scores.new_zeros(len(self.vectors) + 1).scatter_reduce_(
            0, classes, scores.abs().amax(1), "amax"
        )
        return scores / distributed.all_gather(largest).amax(0).clamp_min(1e-30)[classes, None]

    def sums(self):
        """Of the pixels that the M step takes: number (K, M, 1), sums (K, M, E) of q and of q^2."""
        if self.queue is None:
            return self.mass, self.first, self.second
        shape, rows = self.vectors.shape, self.queue.rows
        second = sum(part.square().sum(1) for part in rows.split(CHUNK, 1))
        count = self.queue.count.clamp_max(rows.shape[1]).to(second)
        return count.view(*shape[:2], 1), rows.sum(1).view(shape), second.view(shape)

    @torch.no_grad()
    def update(self, batches, step):
        """E step at every step, M step where it is due, for the classes that occur; the others stay
        as they are."""
        rows, classes, scores, right = self.observe(batches)
        k, m, width = shape = self.vectors.shape
        groups = torch.where(right, m * classes + self.share_out(scores, classes), k * m)
        if self.queue is not None:
            number = self.queue.push(rows, groups).view(k, m, 1)
        else:
            both = torch.cat([torch.ones_like(rows[:, :1]), rows, rows.square()], 1).double()
            step_sums = both.new_zeros(k * m + 1, 1 + 2 * width).index_add_(0, groups, both)
            number, first, second = (
                distributed.all_reduce(step_sums)[:-1].view(k, m, -1).split([1, width, width], 2)
            )
            weight = number.clamp_max(self.pixels) / number.clamp_min(1)
            for buffer, fresh in ((self.mass, number), (self.first, first), (self.second, second)):
                buffer.copy_(torch.where(number > 0, self.decay * buffer + weight * fresh, buffer))
        if (step.number + 1) % self.update_every == 0:
            self.maximise((number > 0).any(1, keepdim=True).expand(shape))

    def maximise(self, occurs):
        """M step where `occurs` (K, M, E) is set and there are pixels."""
        count, first, second = (part.double() for part in self.sums())
        filled = count.clamp_min(1e-30)
        mean, target = first / filled, F.normalize(first, dim=2)
        moved = F.normalize(torch.lerp(target, self.vectors.double(), self.momentum), dim=2)
        spread = (second / filled - 2 * target * mean + target.square()).clamp_min(0) + self.floor
        fits = occurs & (count > 0) & moved.isfinite() & spread.isfinite()
        self.vectors.copy_(torch.where(fits, moved, self.vectors))
        self.variances.copy_(torch.where(fits, spread, self.variances))
