"""The data sets of a configuration, and the stream of batches of a training set."""

import logging
import time
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, default_collate

from datasets.base import DataError, check_scored
from datasets.sampler import RareClassSampler, StreamSampler, make_loader
from datasets.several import Several
from datasets.statistics import class_counts
from engine import distributed
from engine.build import build, build_any, present
from engine.config import TARGET, ConfigError, derived_seed
from engine.metrics import ConfusionMatrix, count_pixels, warnings_about

logger = logging.getLogger("engine")

SET = "SegmentationData"


class Data(NamedTuple):
    """Data sets that share their classes; None for those that the configuration does not name."""

    train: Dataset
    val: Dataset | None  # chooses best.pt
    test: dict  # {name: data set}
    target: Dataset | None  # without labels
    monitor: (
        Dataset | None
    )  # labelled images of the target domain, on which pseudo labels are measured


def build_set(where, specs, **context):
    """The data set of a key of the configuration, or several as one (datasets/several.py) where a
    list is given.

    Raises:
        ConfigError, DataError: a wrong option, or files that cannot be read; the message begins
            with the key.
    """
    if not isinstance(specs, list):
        with named(where):
            return build("datasets", specs, SET, **context)
    sets = [build_set(f"{where}.{i}", spec, **context) for i, spec in enumerate(specs)]
    with named(where):
        return sets[0] if len(sets) == 1 else Several(sets)


@contextmanager
def named(where):
    """Within it, the message of an error begins with a key of the configuration."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{where}: {error}") from None


def build_data(cfg):
    """The data sets of a configuration -> Data.

    Raises:
        ConfigError: they do not share their classes, or there is nothing to evaluate on.
        UserError: eval.subsets names another class.
    """
    if not isinstance(cfg.data.train, list) and cfg.data.train["name"] == "none":
        raise ConfigError("data.train names no data set: docs/data.md has them all")
    context = {"root": cfg.data.root, "seed": cfg.seed}
    with named("data.augment"):
        augment = build("datasets", cfg.data.augment, "Augment")
    if cfg.model.cache != "none" and not augment.repeats:
        raise ConfigError(
            f"model.cache stores the maps of every picture, and {cfg.data.augment.name} draws ever "
            "new ones: take data.augment={name: transforms.Whole, size: [HEIGHT, WIDTH]}, or "
            "model.cache=none"
        )
    train = build_set("data.train", cfg.data.train, augment=augment, **context)
    val, monitor = (
        None
        if cfg.data[name]["name"] == "none"
        else build_set(f"data.{name}", cfg.data[name], **context)
        for name in ("val", "monitor")
    )
    # A test set that is the validation set is the same object: it needs no second evaluation.
    test = {
        name: val if spec == cfg.data.val else build_set(f"data.test.{name}", spec, **context)
        for name, spec in present(cfg.data.test).items()
    }
    target, spec = None, cfg.data.target
    if isinstance(spec, list) or spec["name"] != "none":
        with named("data.target_augment"):
            augment = build_any("datasets", cfg.data.target_augment, "Augment")
        augment = augment or build("datasets", cfg.data.augment)
        # A target set for training gets no label path at all; its samples are drawn independently
        # of the source's.
        several = isinstance(spec, list)
        specs = [{**one, "labels": False} for one in (spec if several else [spec])]
        target = build_set(
            "data.target",
            specs if several else specs[0],
            augment=augment,
            **context | {"seed": derived_seed(cfg.seed, TARGET)},
        )
    scored = {"train": train, "val": val, "monitor": monitor}
    scored |= {f"test.{name}": dataset for name, dataset in test.items()}
    for name, dataset in scored.items():
        if dataset:
            check_scored(name, dataset)
    for name, dataset in (scored | {"target": target}).items():
        if dataset and tuple(dataset.CLASSES) != tuple(train.CLASSES):
            raise ConfigError(
                f"data.{name} has {len(dataset.CLASSES)} classes ({', '.join(dataset.CLASSES)}) "
                f"and data.train has "
                f"{len(train.CLASSES)} ({', '.join(train.CLASSES)}): they must be the same"
            )
    if not test and val is None:
        raise ConfigError("nothing to evaluate on: set data.val or data.test")
    ConfusionMatrix(train.CLASSES, cfg.eval.subsets)  # before the training, not after it
    return Data(train, val, test, target, monitor)


def count_classes(dataset, cfg):
    """Pixels of each class in each label of a data set, (n, K): see datasets/statistics.py."""
    return class_counts(dataset, cfg.data.cache, workers=cfg.data.workers)


class Stream:
    """The micro-batches of a training set for one process, one after the other: an iterator of
    collated batches.

    Args:
        dataset: training set.
        cfg: configuration of the stage.
        seed: of the order.
        start: first step.
        device: where the batches go.
    """

    def __init__(self, dataset, cfg, seed, start, device):
        self.dataset, self.unseen = dataset, len(dataset)
        self.pixels = torch.zeros(len(dataset.CLASSES) + 1, dtype=torch.int64)
        options = {"batch_size": cfg.train.batch_size, "accumulate": cfg.train.accumulate}
        options |= {"start": start, "stop": cfg.train.iters, "seed": seed}
        options |= {"rank": distributed.rank(), "world_size": distributed.world_size()}
        if cfg.data.rare_classes.temperature and dataset.labels:
            counts = count_classes(dataset, cfg)
            self.sampler = RareClassSampler(counts, **cfg.data.rare_classes, **options)
        else:
            self.sampler = StreamSampler(len(dataset), **options)
        loader = make_loader(dataset, self.sampler, cfg.data.workers, device.type == "cuda")
        self.batches, self.waits = iter(loader), 0.0

    def __next__(self):
        began = time.monotonic()
        batch = next(self.batches)
        self.waits += time.monotonic() - began
        if self.unseen > 0 and self.dataset.labels:
            self.pixels += count_pixels(batch["label"], len(self.dataset.CLASSES))
            self.unseen -= len(batch["label"])
            if self.unseen <= 0:
                self.warn()
        return batch

    def waited(self):
        """Seconds that training has waited for batches since the last call."""
        seconds, self.waits = self.waits, 0.0
        return seconds

    def warn(self):
        """Say what is suspicious about the labels, after as many samples as there are images."""
        where, classes = f"the training set {type(self.dataset).__name__}", self.dataset.CLASSES
        for sentence in warnings_about(self.pixels, classes, where, self.dataset.expected):
            logger.warning(sentence)

    def whole(self, step):
        """The batch of a step over all processes and micro-batches."""
        return default_collate([self.dataset[item] for item in self.sampler.samples(step)])
