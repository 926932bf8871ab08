"""ADE20K on tiny files in its official format."""

import pytest

from datasets.ade20k import ADE20K
from datasets.base import DataError
from tests.datasets.published import MAPS, row, scene


def test_ade20k_ids_are_shifted_and_other_is_ignored(tmp_path):
    scene(scene(tmp_path), "ADE_val_00000001", [0, 150, 7], "validation")
    assert row(ADE20K(root=tmp_path, split="training")) == [255, *range(150)]
    assert row(ADE20K(root=tmp_path, split="validation")) == [255, 149, 6]
    assert {i: i - 1 for i in range(1, 151)} | {0: 255} == ADE20K.ID_MAP


def test_ade20k_names_and_colours_are_those_of_the_field():
    first = "wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person earth door table"
    assert (
        len(ADE20K.CLASSES) == len({*ADE20K.CLASSES}) == 150
        and " ".join(ADE20K.CLASSES[:16]) == first
    )
    known = {
        "wall": "787878",
        "building": "b47878",
        "sky": "06e6e6",
        "tree": "04c803",
        "road": "8c8c8c",
        "person": "96053d",
        "car": "0066c8",
        "sea": "0907e6",
        "lamp": "e0ff08",
        "railing": "ff3d06",
        "skyscraper": "8c8c8c",
        "fireplace": "fa0a0f",
        "stairs": "ffe000",
        "river": "0bc8c8",
        "toilet": "00ff85",
        "bus": "ff00f5",
        "airplane": "00ff52",
        "bottle": "00ff0a",
        "van": "a3ff00",
        "microwave": "ff00eb",
        "bicycle": "fff500",
        "traffic light": "2900ff",
        "clock": "66ff00",
        "flag": "5c00ff",
    }
    found = {name: bytes(ADE20K.PALETTE[ADE20K.CLASSES.index(name)]).hex() for name in known}
    assert found == known
    assert (
        len(ADE20K.PALETTE) == 150 and len({*ADE20K.PALETTE}) == 149
    )  # road and skyscraper share theirs


@pytest.mark.skipif(not MAPS.is_dir(), reason="the list of names is not here")
def test_ade20k_names_are_those_of_the_list():
    listed = (MAPS.parent / "clip" / "ade20k_classes.txt").read_text().splitlines()
    assert list(ADE20K.CLASSES) == [name.strip() for name in listed]


def test_ade20k_converted_labels_missing_ones_and_unknown_ids_and_splits_are_named(tmp_path):
    with pytest.raises(
        DataError,
        match=r"ADE_train_00000001.png holds the ids \[151, 200\].*ADE20K \(150 classes\)",
    ):
        ADE20K(root=scene(tmp_path, ids=[1, 151, 200]), split="training")[0]
    with pytest.raises(
        DataError, match=r"ADE_train_00000001.png holds the id 255: it was converted"
    ):
        ADE20K(root=scene(tmp_path, ids=[0, 149, 255]), split="training")[0]
    with pytest.raises(
        DataError, match=r"ADE20K has no split 'val': the folders in .*images are training$"
    ):
        ADE20K(root=tmp_path, split="val")
    scene(tmp_path, "ADE_train_00000002", labels=False)
    with pytest.raises(
        DataError, match=r"1 of 2 labels .*annotations/training/ADE_train_00000002.png"
    ):
        ADE20K(root=tmp_path, split="training")
