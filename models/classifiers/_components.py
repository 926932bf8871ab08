"""What ProtoSeg, DNC and GMMSeg share: a class has M components, and the one that a pixel fits best
speaks for it.

    z = a unit embedding of the features     s_c = max_m score(z, component m of class c)
    logits = LayerNorm_K(s)

The components are buffers that no gradient reaches. `update` embeds the features of the step once
more, with the parameters that the step left, and moves the components of the classes that it finds;
everything that it adds up is added over all processes, so their number changes nothing but rounding
and the state is the same on all of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine import distributed
from engine.statistics import precise, unit
from models.blocks import still
from models.classifiers.base import Classifier
from models.prototypes._sinkhorn import balanced, numbered


def spread(groups, num_groups, count):
    """Choose at most `count` pixels of each group, evenly spaced over the batches of all processes,
    first rank first.

    Args:
        groups: (N) in 0..G; G is no group.
    Returns:
        (N) the number of a chosen pixel within its group, -1 for the others; (G) how many are
        chosen of each group.
    """
    ones = torch.ones_like(groups)
    counts = ones.new_zeros(num_groups + 1).index_add_(0, groups, ones)
    everywhere = distributed.all_gather(counts)
    total, before = everywhere.sum(0), everywhere[: distributed.rank()].sum(0)
    order = groups.argsort(stable=True)
    within = (
        torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts)[groups[order]]
    )
    place = torch.empty_like(within).scatter_(0, order, within) + before[groups]
    chosen, total = total.clamp_max(count), total.clamp_min(1)
    number, previous = (p * chosen[groups] // total[groups] for p in (place, place - 1))
    taken = (number != previous) & (
        groups < num_groups
    )  # the first of each run of equal numbers; -1 // n is -1
    return torch.where(taken, number, -1), chosen[:-1]


class Ring(nn.Module):
    """The last `length` vectors of each of G groups, first in, first out.

    Args:
        groups, length, width: G, L, E.
        pixels: most vectors of a group that enter at a time.

    State: rows (G, L, E), zeros where nothing lies yet; count (G), how many have entered in all:
    the next one goes to place count mod L.
    """

    def __init__(self, groups, length, width, pixels):
        super().__init__()
        self.pixels = pixels
        self.register_buffer("rows", torch.zeros(groups, length, width))
        self.register_buffer("count", torch.zeros(groups, dtype=torch.long))

    def push(self, rows, groups):
        """Enter some of the rows (N, E), whose groups (N) are in 0..G -> how many of each group
        (G)."""
        size, length, width = self.rows.shape
        numbers, entered = spread(groups, size, self.pixels)
        places = torch.where(numbers >= 0, groups * self.pixels + numbers, size * self.pixels)
        fresh = self.rows.new_zeros(size * self.pixels + 1, width).index_add_(
            0, places, rows.to(self.rows)
        )
        fresh = distributed.all_reduce(fresh)[:-1].view(size, self.pixels, width)
        number = torch.arange(self.pixels, device=groups.device)
        places = ((self.count[:, None] + number) % length)[..., None].expand_as(fresh)
        fresh = torch.where(
            (number < entered[:, None])[..., None], fresh, self.rows.gather(1, places)
        )
        self.rows.scatter_(1, places, fresh)
        self.count += entered
        return entered

    def held(self):
        """Which places are filled, (G, L)."""
        return torch.arange(self.rows.shape[1], device=self.count.device) < self.count[:, None]


class Components(Classifier):
    """Features (B, D, h, w) -> logits (B, K, h, w).

    A subclass gives `project`, the layers from features to (B, E, h, w), and `compare`.

    State: vectors (K, M, E), unit vectors, at first in random directions.
    """

    space = "embedding"  # that of means()

    def __init__(self, num_classes, components, width, sharpness, rounds):
        super().__init__()
        self.sharpness, self.rounds = sharpness, rounds
        self.norm, self.calibration = nn.LayerNorm(width), nn.LayerNorm(num_classes)
        self.register_buffer(
            "vectors", F.normalize(torch.randn(num_classes, components, width), dim=2)
        )

    def means(self):
        """Mean of the components of each class, (K, E), in the space of the embedding: not vectors
        to compare with `features`, even where E = D."""
        return self.vectors.mean(1)

    def embed(self, features):
        """Features (B, D, h, w) -> unit rows (B h w, E) of at least float32."""
        maps = self.project(features)
        with torch.autocast(features.device.type, enabled=False):
            return unit(self.norm(precise(maps.movedim(1, -1).flatten(0, 2))))

    def compare(self, rows):
        """Rows (N, E) -> scores (K, M, N) of every component."""
        raise NotImplementedError

    def classify(self, scores):
        """Scores (K, M, N) or (K, M, B, h, w) -> logits (N, K) or (B, K, h, w)."""
        return self.calibration(scores.amax(1).movedim(0, -1)).movedim(-1, 1)

    def forward(self, features, output=None):
        """In training `output.components` gets the scores (B, K, M, h, w) of all components."""
        rows = self.embed(features)
        with torch.autocast(features.device.type, enabled=False):
            scores = self.compare(rows).unflatten(2, (len(features), *features.shape[2:]))
            if output is not None and self.training:
                output.components = scores.movedim(2, 0)
            return self.classify(scores)

    def own(self, scores, classes):
        """Scores (K, M, N), classes (N) in 0..K -> scores (N, M) of the components of a pixel's own
        class."""
        index = classes.clamp_max(len(scores) - 1).expand(1, scores.shape[1], -1)
        return scores.gather(0, index)[0].T

    def scaled(self, scores, classes):
        """Scores (N, M) as they enter the assignment."""
        return scores

    def share_out(self, scores, classes):
        """Own scores (N, M), classes (N) in 0..K -> the component of each pixel (N); a
        collective."""
        return balanced(
            self.scaled(scores, classes), classes, len(self.vectors), self.sharpness, self.rounds
        )

    def assign(self, scores, labels):
        """The component that each pixel belongs to, by balanced assignment within its class; a
        collective.

        Scores (B, K, M, h, w), labels (B, h, w) -> (B, h, w) int64, M class + component, -1 for no
        class.
        """
        return numbered(scores, labels, self.share_out)

    def observe(self, batches):
        """The pixels of a step: rows (N, E), classes (N), K where there is none or the weight is 0,
        own scores (N, M), and whether the class is recognised, (N) bool."""
        seen, k = [], len(self.vectors)
        for features, labels, weights in batches:
            known = (labels >= 0) & (labels < k)
            known = known if weights is None else known & (weights > 0)
            classes = torch.where(known, labels, k).flatten()
            with torch.autocast(features.device.type, enabled=False), still(self):
                rows = self.embed(precise(features))
                scores = self.compare(rows)
                seen.append(
                    (
                        rows,
                        classes,
                        self.own(scores, classes),
                        self.classify(scores).argmax(1) == classes,
                    )
                )
        return tuple(torch.cat(parts) for parts in zip(*seen))
