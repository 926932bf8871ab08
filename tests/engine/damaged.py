"""Damaged files of tests: one that is cut, an archive where none belongs, how one is refused."""

import io

import numpy as np
import pytest
from torch import nn

from engine import weights
from engine.errors import UserError


def truncate(path, size=None):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if size is None else size])


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))


def refused(path, data=None, read=weights.read):
    """The message of a file that is refused."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and "weights_only" not in text and len(text) < 700
    return text


def archive():
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()
