"""Pixels of every class in every label of a data set: what rare class sampling draws by.

    counts = class_counts(dataset, cache="runs/cache", workers=4)        (n, K) int64

Only labels are read, once: the counts are kept in a file whose name is a hash of what they depend on, so that other
labels, or other options of the reader, are counted anew.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.base import DataError
from engine import distributed


def read_counts(path):
    """Stored counts, or None where there is no file or it is damaged."""
    try:
        return np.load(path)
    except (OSError, EOFError, ValueError):
        return None


def write_counts(path, counts):
    """Write counts; the file appears as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, counts)
    os.replace(partial, path)


def class_counts(dataset, cache, workers=0):
    """Count the pixels of each class in each label, or find them counted.

    Args:
        dataset: SegmentationData with labels; its augmentation plays no part.
        cache: folder, made where it is missing.
        workers: threads that read; 0 reads in this one.
    Returns:
        (n, K) int64, equal on every process; each counts its share, and the main process alone uses the cache.
    Raises:
        DataError: the data set has no labels, or one of them cannot be used.
    """
    if not dataset.labels:
        raise DataError(
            f"the classes of {type(dataset).__name__} {dataset.split} cannot be counted: it has no labels"
        )
    path, stored = None, None
    if distributed.is_main():
        path = (
            Path(cache)
            / f"class_counts_{hashlib.sha1(dataset.label_key().encode()).hexdigest()}.npy"
        )
        stored = read_counts(path)
    if (stored := distributed.gather(stored)[0]) is not None:
        return stored

    def count(index):
        return np.bincount(dataset.load_label(index).ravel(), minlength=256)[: len(dataset.CLASSES)]

    rank, world, main = distributed.rank(), distributed.world_size(), distributed.is_main()
    mine = range(rank, len(dataset), world)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        bar = tqdm(
            pool.map(count, mine),
            "count classes",
            len(mine),
            leave=False,
            disable=not main,
            mininterval=1.0,
        )
        share = np.array(list(bar), np.int64).reshape(len(mine), len(dataset.CLASSES))
    counts = np.empty((len(dataset), len(dataset.CLASSES)), np.int64)
    for start, part in enumerate(distributed.gather(share)):
        counts[start::world] = part
    if main:
        write_counts(path, counts)
    return counts
