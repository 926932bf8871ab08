"""What a configuration says of its data sets."""

import pytest

from datasets.base import DataError
from datasets.build import build_data
from engine.config import load
from tests.runs import TINY

LOST = "{name: gta5.GTA5, root: nowhere}"


@pytest.mark.parametrize("key", ["train", "val", "target", "monitor", "test.real"])
def test_a_folder_that_is_missing_names_the_key_of_its_data_set(key):
    with pytest.raises(
        DataError, match=rf"^data\.{key}: GTA5: there is no folder nowhere; set the"
    ):
        build_data(load(TINY, [f"data.{key}={LOST}"]))
