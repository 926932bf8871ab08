"""Which samples make up a step: the same for every number of processes, and after every restart."""

import pytest
import torch

from datasets.sampler import StreamSampler, make_loader


def micro_batches(length, **options):
    return list(StreamSampler(length, **options))


def steps(length, *, accumulate=1, world_size=1, **options):
    """Samples of each step, over all processes and micro-batches, in the order of the stream."""
    ranks = [
        micro_batches(length, accumulate=accumulate, world_size=world_size, rank=rank, **options)
        for rank in range(world_size)
    ]
    count = len(ranks[0]) // accumulate
    return [
        [pair for m in range(s * accumulate, (s + 1) * accumulate) for rank in ranks for pair in rank[m]]
        for s in range(count)
    ]


def test_each_epoch_is_another_permutation():
    indices = [index for batch in micro_batches(12, batch_size=4, stop=6) for index, _ in batch]
    first, second = indices[:12], indices[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second and first != list(range(12))


def test_seeds_give_different_orders_and_one_seed_always_the_same():
    a, b, c = (micro_batches(50, batch_size=10, stop=5, seed=seed) for seed in (0, 0, 1))
    assert a == b != c


def test_samples_are_numbered_through_over_epochs():
    numbers = [sample for batch in micro_batches(5, batch_size=4, stop=6) for _, sample in batch]
    assert numbers == list(range(24))


@pytest.mark.parametrize("start", [1, 3, 7])
def test_resuming_goes_on_where_the_stream_was(start):
    options = {"batch_size": 4, "accumulate": 2, "stop": 9, "seed": 5}
    assert micro_batches(10, start=start, **options) == micro_batches(10, **options)[start * 2 :]


@pytest.mark.parametrize("world_size, accumulate", [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_processes_and_micro_batches_share_the_steps_of_one_process(world_size, accumulate):
    options = {"batch_size": 8, "stop": 7, "seed": 3}
    assert steps(11, world_size=world_size, accumulate=accumulate, **options) == steps(11, **options)


def test_a_data_set_smaller_than_the_batch_repeats():
    (batch,) = micro_batches(3, batch_size=8, stop=1)
    indices = [index for index, _ in batch]
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
    assert len({sample for _, sample in batch}) == 8  # so that repeated images are augmented differently


def test_length_is_the_number_of_micro_batches():
    sampler = StreamSampler(10, batch_size=4, accumulate=2, start=3, stop=8)
    assert len(sampler) == len(list(sampler)) == 10


def test_a_batch_that_does_not_divide_names_the_numbers():
    with pytest.raises(ValueError, match=r"batch_size 6 does not divide into 2 processes x 2 micro-batches"):
        StreamSampler(10, batch_size=6, accumulate=2, world_size=2, stop=1)


class Echo(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return {"index": item[0], "sample": item[1]}


def test_the_loader_yields_the_samples_and_leaves_the_global_generator_alone():
    sampler, before = StreamSampler(10, batch_size=4, stop=3), torch.get_rng_state()
    batches = [list(zip(b["index"].tolist(), b["sample"].tolist())) for b in make_loader(Echo(), sampler)]
    assert batches == list(sampler)
    assert torch.equal(torch.get_rng_state(), before)
