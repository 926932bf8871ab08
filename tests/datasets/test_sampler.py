"""Which samples make up a step: the same for every number of processes, and after every restart."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import DataError, SegmentationData
from datasets.build import Stream
from datasets.folder import Folder
from datasets.sampler import RareClassSampler, StreamSampler, make_loader
from datasets.statistics import class_counts
from datasets.toy import Toy
from engine import distributed
from engine.config import load
from tests.datasets.files import Files
from tests.runs import TINY, as_two_processes


def micro_batches(length, make=StreamSampler, **options):
    return list(make(length, **options))


def steps(length, *, accumulate=1, world_size=1, **options):
    """Samples of each step, over all processes and micro-batches, in the order of the stream."""
    ranks = [
        micro_batches(length, accumulate=accumulate, world_size=world_size, rank=rank, **options)
        for rank in range(world_size)
    ]
    count = len(ranks[0]) // accumulate
    return [
        [
            pair
            for m in range(s * accumulate, (s + 1) * accumulate)
            for rank in ranks
            for pair in rank[m]
        ]
        for s in range(count)
    ]


@pytest.mark.parametrize("make", [StreamSampler, lambda _, **o: RareClassSampler(ALONE, **o)])
def test_the_samples_of_a_step_are_those_of_all_processes(make):
    options = {"batch_size": 8, "stop": 3, "make": make}
    sampler = make(11, batch_size=8, accumulate=2, world_size=2, rank=1, start=1, stop=3)
    expected = steps(11, accumulate=2, world_size=2, **options)
    assert [sampler.samples(step) for step in range(3)] == expected


def test_a_stream_goes_on_at_its_step_and_knows_the_whole_of_one(monkeypatch):
    cfg = load(TINY, ["train={iters: 3, batch_size: 4, accumulate: 2}"])
    data, device = Toy(length=5, size=[16, 24]), torch.device("cpu")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    batches = {}
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        stream = Stream(data, cfg, 3, 1, device)
        batches |= {(part, rank): next(stream) for part in range(2)}
        assert next(stream)["sample"].tolist() == [8 + rank]  # the first of the next step
    whole, parts = stream.whole(1), [batches[key] for key in sorted(batches)]
    assert whole["sample"].tolist() == [4, 5, 6, 7]
    for key in ("image", "label", "index", "sample"):
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))


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
    assert steps(11, world_size=world_size, accumulate=accumulate, **options) == steps(
        11, **options
    )


def test_a_data_set_smaller_than_the_batch_repeats():
    (batch,) = micro_batches(3, batch_size=8, stop=1)
    indices = [index for index, _ in batch]
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
    assert (
        len({sample for _, sample in batch}) == 8
    )  # so that repeated images are augmented differently


def test_length_is_the_number_of_micro_batches():
    sampler = StreamSampler(10, batch_size=4, accumulate=2, start=3, stop=8)
    assert len(sampler) == len(list(sampler)) == 10


def test_a_batch_that_does_not_divide_names_the_numbers():
    with pytest.raises(
        ValueError, match=r"batch_size 6 does not divide into 2 processes x 2 micro-batches"
    ):
        StreamSampler(10, batch_size=6, accumulate=2, world_size=2, stop=1)


class Echo(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return {"index": item[0], "sample": item[1]}


def test_the_loader_yields_the_samples_and_leaves_the_global_generator_alone():
    sampler, before = StreamSampler(10, batch_size=4, stop=3), torch.get_rng_state()
    batches = [
        list(zip(b["index"].tolist(), b["sample"].tolist())) for b in make_loader(Echo(), sampler)
    ]
    assert batches == list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


# --- rare classes ----------------------------------------------------------------------------------------------------

# Image i holds class i alone, so that the index drawn tells the class; class 3 does not occur, image 3 has no labels.
SHARES = np.array([0.7, 0.2, 0.1])
ALONE = np.pad(np.diag((10_000 * SHARES).astype(np.int64)), (0, 1))


def drawn(counts, samples=4000, **options):
    """How often each image is drawn."""
    sampler = RareClassSampler(counts, batch_size=1, stop=1, **options)
    indices = np.array([sampler.index(sample) for sample in range(samples)])
    return np.bincount(indices, minlength=len(counts)) / samples


@pytest.mark.parametrize("temperature", [0.2, 0.5, 5.0])
def test_classes_are_drawn_with_the_chance_that_their_rarity_gives(temperature):
    expected = np.exp((1 - SHARES) / temperature)
    frequency = drawn(ALONE, temperature=temperature, min_pixels=0)
    assert (
        np.abs(frequency[:3] - expected / expected.sum()).max() < 0.025
    )  # three standard deviations
    assert frequency[3] == 0


def test_a_low_temperature_draws_the_rarest_class_alone_and_a_high_one_all_alike():
    assert drawn(ALONE, 500, temperature=1e-4).tolist() == [0, 0, 1, 0]
    assert np.abs(drawn(ALONE, temperature=1e6)[:3] - 1 / 3).max() < 0.025


def test_images_need_more_pixels_of_the_class_than_asked_for():
    counts = np.array([[0, 3000], [0, 3001], [0, 9000], [90_000, 10], [90_000, 0]])
    frequency = drawn(counts, temperature=0.01, min_pixels=3000)
    assert frequency[[0, 3, 4]].tolist() == [0, 0, 0] and np.abs(frequency[1:3] - 0.5).max() < 0.03


def test_a_class_that_no_image_shows_enough_of_is_drawn_from_all_that_hold_it():
    counts = np.array([[90_000, 0], [90_000, 1], [90_000, 2999], [90_000, 0]])
    frequency = drawn(counts, temperature=0.01, min_pixels=3000)
    assert frequency[[0, 3]].tolist() == [0, 0] and np.abs(frequency[1:3] - 0.5).max() < 0.03


@pytest.mark.parametrize("world_size, accumulate", [(2, 1), (1, 2), (2, 2)])
def test_rare_class_draws_are_the_same_after_a_restart_and_for_any_number_of_processes(
    world_size, accumulate
):
    options = {"make": RareClassSampler, "batch_size": 8, "seed": 3, "temperature": 0.5}
    one = steps(ALONE, stop=7, **options)
    assert steps(ALONE, stop=7, world_size=world_size, accumulate=accumulate, **options) == one
    assert steps(ALONE, start=4, stop=7, **options) == one[4:]
    assert [sample for step in one for _, sample in step] == list(range(56))
    assert steps(ALONE, stop=7, **{**options, "seed": 4}) != one
    sampler = RareClassSampler(ALONE, batch_size=8, stop=7, seed=3, temperature=0.5)
    assert [sampler.index(s) for s in reversed(range(56))] == [i for step in one for i, _ in step][
        ::-1
    ]


@pytest.mark.parametrize(
    ("counts", "options", "says"),
    [
        (0 * ALONE, {}, "no pixel of the data set is labelled"),
        (
            ALONE,
            {"batch_size": 6, "world_size": 4},
            "batch_size 6 does not divide into 4 processes",
        ),
    ],
)
def test_rare_class_sampling_that_cannot_be_is_named(counts, options, says):
    with pytest.raises(ValueError, match=says):
        RareClassSampler(counts, **{"batch_size": 4, "stop": 1, **options})


# --- pixels of each class --------------------------------------------------------------------------------------------


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def label(index):
    """A label of 6 x 8 pixels with ids 0, 2 and ignore, and its counts."""
    ids = np.full((6, 8), 255)
    ids[:2], ids[2, : index + 1] = 0, 2
    return ids, [16, 0, index + 1]


def files(root, count=5):
    for i in range(count):
        save(root / "images" / f"{i}.png", np.zeros((6, 8, 3)))
        save(root / "labels" / f"{i}.png", label(i)[0])
    return root


TRUE = [label(i)[1] for i in range(5)]


def unread(monkeypatch):
    """From now on no label may be read."""
    monkeypatch.setattr(
        SegmentationData, "load_label", lambda self, index: pytest.fail("a label was read")
    )


@pytest.mark.parametrize("workers", [0, 3])
def test_counts_are_those_of_the_labels_and_are_counted_once(tmp_path, monkeypatch, workers):
    dataset = Files(root=files(tmp_path / "data"))
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"never read")
    counts = class_counts(dataset, tmp_path / "new" / "cache", workers)
    assert counts.tolist() == TRUE and counts.dtype == np.int64
    unread(monkeypatch)
    for again in (dataset, Files(root=tmp_path / "data", seed=7), dataset.without_augmentation()):
        assert class_counts(again, tmp_path / "new" / "cache").tolist() == TRUE
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".npy"]


def test_counts_follow_labels_and_options(tmp_path):
    def count(**options):
        return class_counts(Files(root=tmp_path / "data", **options), tmp_path / "cache").tolist()

    files(tmp_path / "data")
    assert count() == TRUE
    assert count(ignore=["a"]) == [[0, 0, i + 1] for i in range(5)]
    path = tmp_path / "data" / "labels" / "1.png"
    save(path, np.ones((6, 8)))
    assert count()[1] == [0, 48, 0]
    os.utime(
        path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000)
    )  # as if written again: the content may differ
    count()
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_counts_tell_ids_from_colours_in_one_file(tmp_path):
    """A palette PNG can be read as indices and as colours."""
    save(tmp_path / "images" / "train" / "a.jpg", np.zeros((6, 8, 3)))
    (tmp_path / "labels" / "train").mkdir(parents=True)
    image = Image.fromarray(np.zeros((6, 8), np.uint8))
    image.putpalette([0, 9, 0, 9, 0, 0])  # index 0 has the colour of class 1
    image.save(tmp_path / "labels" / "train" / "a.png")
    options = {"root": tmp_path, "classes": ["x", "y"], "palette": [[9, 0, 0], [0, 9, 0]]}
    counts = [
        class_counts(Folder(color_labels=c, **options), tmp_path / "cache") for c in (False, True)
    ]
    assert [c.tolist() for c in counts] == [[[48, 0]], [[0, 48]]]


def test_toy_counts_are_those_of_its_pictures(tmp_path, monkeypatch):
    data = Toy(domain="real", length=4, size=[24, 32])
    counts = class_counts(data, tmp_path, workers=2)
    expected = [np.bincount(data.load(i)[1].ravel(), minlength=11).tolist() for i in range(4)]
    assert counts.tolist() == expected and counts.shape == (4, 11)
    assert (
        class_counts(Toy(domain="real", length=3, size=[24, 32]), tmp_path).tolist() == expected[:3]
    )
    assert class_counts(Toy(domain="fog", length=4, size=[24, 32]), tmp_path).tolist() != expected
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_counted_anew(tmp_path):
    dataset = Files(root=files(tmp_path / "data"))
    class_counts(dataset, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    for content in (path.read_bytes()[:100], b"", b"no array"):
        path.write_bytes(content)
        assert (
            class_counts(dataset, tmp_path / "cache").tolist() == TRUE
            and np.load(path).tolist() == TRUE
        )


def test_labels_that_cannot_be_counted_are_named_and_leave_no_cache(tmp_path):
    dataset = Files(root=files(tmp_path / "data"))
    save(tmp_path / "data" / "labels" / "3.png", np.full((6, 8), 9))
    with pytest.raises(DataError, match=r"labels/3.png holds the ids \[9\]"):
        class_counts(dataset, tmp_path / "cache", workers=2)
    with pytest.raises(
        DataError, match="classes of Files train cannot be counted: it has no labels"
    ):
        class_counts(Files(root=tmp_path / "data", labels=False), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_two_processes_share_the_labels_and_the_main_one_writes(tmp_path, monkeypatch):
    """Two threads that take themselves for processes; five labels, so that their shares differ."""
    read = ([], [])

    def process(rank):
        dataset = Files(root=tmp_path / "data")
        original = dataset.load_label
        dataset.load_label = lambda index: read[rank].append(index) or original(index)
        return [class_counts(dataset, tmp_path / f"cache{rank}").tolist() for _ in range(2)]

    files(tmp_path / "data")
    assert as_two_processes(monkeypatch, process) == [[TRUE, TRUE], [TRUE, TRUE]]
    assert read == ([0, 2, 4], [1, 3])  # the second time nothing
    assert len(list((tmp_path / "cache0").iterdir())) == 1 and not (tmp_path / "cache1").exists()
