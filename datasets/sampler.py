"""Which samples make up which step: a pure function of (seed, step, process), so there is no state
to save.

The stream of samples is one random permutation of the data set after the other, or draws images by
their rare classes. Step s takes the samples s B .. (s + 1) B - 1 of the stream for a batch of B
over all processes and micro-batches; with another number of processes the same step holds the same
samples.

    data: {rare_classes: {temperature: 0.01, min_pixels: 3000}}
"""

import numpy as np
import torch
from torch.utils.data import DataLoader

from engine import process
from engine.errors import UserError


class StreamSampler:
    """Batches of (index, sample number) for one process, from one step to another.

    Args:
        length: size of the data set; it may be smaller than a batch, samples then repeat.
        batch_size: B, of all processes and micro-batches together.
        accumulate: micro-batches per step; the sampler yields each on its own.
        start, stop: steps.
        rank, world_size: of this process.
    Raises:
        UserError: B does not divide into processes x micro-batches.
    """

    def __init__(
        self, length, *, batch_size, accumulate=1, start=0, stop, seed=0, rank=0, world_size=1
    ):
        if batch_size % (accumulate * world_size):
            raise UserError(
                f"train.batch_size {batch_size} does not divide into {world_size} processes x "
                f"{accumulate} micro-batches"
            )
        self._epoch = None
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.start, self.stop, self.seed = start, stop, seed
        self.rank, self.world_size = rank, world_size

    def index(self, sample):
        """Data set index of a sample of the stream."""
        epoch, position = divmod(sample, self.length)
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = (
                epoch,
                torch.randperm(self.length, generator=generator).tolist(),
            )
        return self._order[position]

    def samples(self, step):
        """(index, sample number) of all samples of a step, on all processes."""
        first = step * self.batch_size
        return [(self.index(sample), sample) for sample in range(first, first + self.batch_size)]

    def __len__(self):
        return (self.stop - self.start) * self.accumulate

    def __iter__(self):
        size = self.batch_size // (self.accumulate * self.world_size)
        for micro in range(self.start * self.accumulate, self.stop * self.accumulate):
            first = (micro * self.world_size + self.rank) * size
            yield [(self.index(sample), sample) for sample in range(first, first + size)]


class RareClassSampler(StreamSampler):
    """Draw a class, a rare one more often, then one of the images that show it (Hoyer et al.,
    DAFormer, CVPR 2022).

        P(c) ~ exp((1 - f_c) / T),      f_c = share of the class in the labelled pixels of the data
                                        set

    over the classes that occur, then uniformly one of the images with more than `min_pixels` pixels
    of c; of a class that has none, one of all images that hold it [R]. Samples are independent of
    each other: there are no epochs.

    Not done: DAFormer cuts an image anew, up to ten times, until the class has 1500 pixels in the
    crop [C].

    Args:
        counts: (n, K) pixels of each class in each image (statistics.class_counts).
        temperature: T; the lower, the more often rare classes are drawn.
        min_pixels: in the whole image; 3000 are meant for 2048 x 1024 pixels.
        options: of StreamSampler.
    Raises:
        UserError: no labelled pixel; as StreamSampler.
    """

    def __init__(
        self,
        counts,
        *,
        temperature: float = 0.01,
        min_pixels: int = 3000,
        **options,
    ):
        super().__init__(len(counts), **options)
        counts = np.asarray(counts)
        if not counts.any():
            raise UserError("rare class sampling: no pixel of the data set is labelled")
        self.classes = counts.sum(0).nonzero()[0]  # (C) ids of those that occur
        common = counts.sum(0)[self.classes] / counts.sum()
        chance = np.exp(
            (common.min() - common) / temperature
        )  # divided by that of the rarest: no overflow
        self.chance = chance / chance.sum()
        shows = np.where((counts > min_pixels).any(0), counts > min_pixels, counts > 0)  # (n, K)
        self.images = [shows[:, c].nonzero()[0] for c in self.classes]

    def index(self, sample):
        """Data set index of a sample of the stream."""
        rng = np.random.default_rng((self.seed, sample))
        return int(rng.choice(self.images[rng.choice(len(self.classes), p=self.chance)]))


def make_loader(dataset, sampler, workers=0, pin_memory=False):
    """DataLoader over the sampler's batches. Its own generator keeps it from drawing from the
    global one."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=process.loaders(workers),
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=process.loader,
        generator=torch.Generator(),
    )
