"""Which samples make up which step: a pure function of (seed, step, process), so there is no state to save.

The stream of samples is one random permutation of the data set after the other. Step s takes the samples s B .. (s + 1)
B - 1 of the stream for a batch of B over all processes and micro-batches; with another number of processes the same
step holds the same samples.
"""

import torch
from torch.utils.data import DataLoader

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

    def __init__(self, length, *, batch_size, accumulate=1, start=0, stop, seed=0, rank=0, world_size=1):
        if batch_size % (accumulate * world_size):
            raise UserError(
                f"train.batch_size {batch_size} does not divide into {world_size} processes x {accumulate} "
                "micro-batches"
            )
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.start, self.stop, self.seed, self.rank, self.world_size = start, stop, seed, rank, world_size

    def index(self, sample):
        """Data set index of a sample of the stream."""
        epoch, position = divmod(sample, self.length)
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator).tolist()
        return self._order[position]

    def __len__(self):
        return (self.stop - self.start) * self.accumulate

    def __iter__(self):
        size = self.batch_size // (self.accumulate * self.world_size)
        for micro in range(self.start * self.accumulate, self.stop * self.accumulate):
            first = (micro * self.world_size + self.rank) * size
            yield [(self.index(sample), sample) for sample in range(first, first + size)]


def make_loader(dataset, sampler, workers=0, pin_memory=False):
    """DataLoader over the sampler's batches. Its own generator keeps it from drawing from the global one."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        generator=torch.Generator(),
    )
