"""Counts of classes: what belongs to them, and caches that are damaged or cannot be written."""

import io

import numpy as np
import pytest

from datasets.statistics import class_counts, read_counts, write_counts
from tests.datasets.files import files, spaced
from tests.engine.damaged import archive
from tests.fuzz.files import Run

COUNTS = np.arange(12).reshape(4, 3)


def other_file(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


BAD_CACHES = {
    "plain": lambda data: other_file(COUNTS),
    "negative": lambda data: other_file(-COUNTS),
    "float": lambda data: other_file(COUNTS * np.nan),
    "shape": lambda data: other_file(COUNTS.T),
    "objects": lambda data: other_file(np.array([Run("false")], object)),
    "zip": lambda data: archive(),
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "giant": lambda data: data.replace(b"(4, 3)", b"(4, 10**12)"),
    "flip": lambda data: data[:140] + bytes([data[140] ^ 1]) + data[141:],
}


@pytest.mark.parametrize("kind", [*BAD_CACHES])
def test_a_damaged_cache_of_counts_is_ignored_with_a_warning(tmp_path, caplog, kind):
    path = tmp_path / "new" / "a.npy"
    write_counts(path, "key", COUNTS)
    assert np.array_equal(read_counts(path, "key", (4, 3)), COUNTS)
    assert np.array_equal(np.load(path), COUNTS) and not caplog.text
    path.write_bytes(BAD_CACHES[kind](path.read_bytes()))
    assert read_counts(path, "key", (4, 3)) is None
    assert "damaged or of another data set" in caplog.text and "counted again" in caplog.text


def test_counts_of_another_data_set_are_not_taken(tmp_path, caplog):
    """A cache file that was copied over another."""
    write_counts(tmp_path / "a.npy", "one", COUNTS)
    assert read_counts(tmp_path / "a.npy", "other", (4, 3)) is None
    assert read_counts(tmp_path / "a.npy", "one", (3, 4)) is None
    assert caplog.text.count("of another data set") == 2
    assert read_counts(tmp_path / "none.npy", "one", (4, 3)) is None
    assert caplog.text.count("of another data set") == 2


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    from datasets.toy import Toy

    (tmp_path / "file").touch()
    data = Toy(domain="real", length=2, size=[24, 32])
    assert class_counts(data, tmp_path / "file" / "cache").sum() == 2 * 24 * 32
    assert "could not write" in caplog.text and "counts again" in caplog.text


def test_counts_of_classes_are_those_of_the_label_space(tmp_path):
    files(tmp_path / "data", count=1, ids=(0, 1, 2, 255))
    spaces = (
        {},
        {"x": ["a", "b"], "y": ["c"]},
        {"x": ["c"], "y": ["a", "b"]},
        {"x": ["a"], "y": ["b", "c"]},
    )
    counts = [
        class_counts(spaced(tmp_path / "data", space), tmp_path / "cache").tolist()
        for space in spaces * 2
    ]
    assert counts == [[[24, 24, 24]], [[48, 24]], [[24, 48]], [[24, 48]]] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 4
