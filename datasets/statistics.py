"""Pixels of every class in every label of a data set: what rare class sampling draws by.

    counts = class_counts(dataset, cache="runs/statistics", workers=4)        (n, K) int64

Only labels are read, once: the counts are kept in a file whose name is a hash of what they depend
on, so that other labels, or other options of the reader, are counted anew.
"""

import hashlib
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.base import DataError
from engine import distributed, process
from engine.errors import UserError
from engine.files import replacing

logger = logging.getLogger("engine")


def encoded(counts, key):
    """The content of a cache file: an array of NumPy, and a hash of it and of what the counts
    depend on."""
    file = io.BytesIO()
    np.save(file, counts)
    return file.getvalue() + hashlib.sha256(file.getvalue() + key.encode()).digest()


def read_counts(path, key, shape):
    """Stored counts, or None where there is no file or, with a warning, another one than
    `write_counts` wrote."""
    if not path.is_file():
        return None
    empty = encoded(np.zeros(shape, np.int64), key)
    try:
        if path.stat().st_size == len(empty):
            data, start = path.read_bytes(), len(empty) - 32 - 8 * shape[0] * shape[1]
            counts = np.frombuffer(data[start:-32], np.int64).reshape(shape)
            if encoded(counts, key) == data:
                return counts
    except OSError as error:
        logger.warning(f"cannot read {path} ({error.strerror})")
    logger.warning(f"{path} is damaged or of another data set: the classes are counted again")
    return None


def write_counts(path, key, counts):
    """Write counts; the file appears as a whole or not at all. A failure is a warning."""
    try:
        with replacing(path) as partial:
            partial.write_bytes(encoded(counts, key))
    except UserError as error:
        logger.warning(f"{error}: the next run counts again")


def class_counts(dataset, cache, workers=0):
    """Count the pixels of each class in each label, or find them counted.

    Args:
        dataset: SegmentationData with labels; its augmentation plays no part.
        cache: folder, made where it is missing.
        workers: threads that read; 0 reads in this one.
    Returns:
        (n, K) int64, equal on every process; each counts its share, and the main process alone uses
        the cache.
    Raises:
        DataError: the data set has no labels, or one of them cannot be used.
    """
    if not dataset.labels:
        raise DataError(
            f"the classes of {type(dataset).__name__} {dataset.split} cannot be counted: it has no "
            "labels"
        )
    stored, shape = None, (len(dataset), len(dataset.CLASSES))
    if distributed.is_main():
        key = dataset.label_key()
        path = Path(cache) / f"class_counts_{hashlib.sha1(key.encode()).hexdigest()}.npy"
        stored = read_counts(path, key, shape)
    if (stored := distributed.gather(stored)[0]) is not None:
        return stored

    def count(index):
        return np.bincount(dataset.load_label(index).ravel(), minlength=256)[: len(dataset.CLASSES)]

    rank, world, main = distributed.rank(), distributed.world_size(), distributed.is_main()
    mine = range(rank, len(dataset), world)
    with ThreadPoolExecutor(max(1, process.loaders(workers))) as pool:
        bar = tqdm(
            pool.map(count, mine),
            "count classes",
            len(mine),
            leave=False,
            disable=not main,
            mininterval=1.0,
        )
        share = np.array(list(bar), np.int64).reshape(len(mine), len(dataset.CLASSES))
    counts = np.empty(shape, np.int64)
    for start, part in enumerate(distributed.gather(share)):
        counts[start::world] = part
    if main:
        write_counts(path, key, counts)
    return counts
