"""Kinds of values in words."""

import pytest

from engine import ranges
from engine.ranges import describe, is_a


@pytest.mark.parametrize(
    "value, kind, words",
    [
        (3, ranges.Count, "an int of at least 1"),
        (0.5, ranges.Momentum, "a float in [0, 1)"),
        ([1, 2], ranges.Size, "a list of length 2, each an int in [1, 16384]"),
        ([0.5], ranges.Scales, "a list of length 1 to 100, each a float in (0, 16]"),
        (None, int | None, "an int or null"),
        (2, ranges.Literal["a", 2], "a or 2"),
        ({"a": {}}, dict[ranges.Name, dict], "a mapping, each value a mapping"),
    ],
)
def test_a_kind_in_words(value, kind, words):
    assert is_a(value, kind) and describe(kind) == words
