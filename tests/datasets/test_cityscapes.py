"""Cityscapes on tiny files in its official format, also in the classes of CamVid."""

import pytest

from datasets import camvid, cityscapes
from datasets.acdc import ACDC
from datasets.base import DataError
from datasets.bdd100k import BDD100K
from datasets.cityscapes import Cityscapes
from datasets.dark_zurich import DarkZurich
from datasets.gta5 import GTA5
from datasets.mapillary import Mapillary
from datasets.synthia import Synthia
from tests.datasets.published import (
    AS_CAMVID,
    CONVERTED,
    IN_CAMVID,
    LINES,
    MAPS,
    NAMES,
    RAW,
    SYNTHIA,
    TRAIN_ID,
    city_frame,
    grey,
    row,
)

COLORS = [tuple(map(int, color)) for _, _, _, *color in LINES]


# --- Cityscapes ------------------------------------------------------------------------------------------------------


def test_cityscapes_tables_are_the_official_ones():
    for data in (Cityscapes, GTA5, Synthia, ACDC, BDD100K, Mapillary, DarkZurich):
        assert list(data.CLASSES) == NAMES and list(data.PALETTE) == COLORS
    assert len(TRAIN_ID) == 34
    assert Cityscapes.ID_MAP == ACDC.ID_MAP == DarkZurich.ID_MAP == TRAIN_ID | {255: 255}
    assert GTA5.ID_MAP == TRAIN_ID | {34: 255, 255: 255}
    assert dict(enumerate(SYNTHIA)) == Synthia.ID_MAP
    assert {int(train_id): int(raw) for train_id, _, raw, *_ in LINES} == cityscapes.TRAIN_IDS


def test_cityscapes_ids_become_train_ids(tmp_path):
    data = Cityscapes(root=city_frame(tmp_path, "ulm_000000_000019", [*RAW, 255]))
    assert row(data) == [*(TRAIN_ID[raw] for raw in RAW), 255]
    back = [cityscapes.TRAIN_IDS[i] for i in row(data) if i != 255]
    assert back == [raw for raw in RAW if TRAIN_ID[raw] != 255]


def test_cityscapes_splits_hold_the_frames_of_all_cities_in_order(tmp_path):
    train, val = (
        ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"],
        ["munster_000000_000019"],
    )
    for split, frames in (("train", train), ("val", val)):
        for frame in frames[::-1]:
            city_frame(tmp_path, frame, split=split)
    grey(tmp_path / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_instanceIds.png", RAW)
    for split, frames in (("train", train), ("val", val)):
        samples = Cityscapes(root=tmp_path, split=split).samples
        assert [image.name for image, _ in samples] == [
            f"{frame}_leftImg8bit.png" for frame in frames
        ]
        assert [label.name for _, label in samples] == [
            f"{frame}_gtFine_labelIds.png" for frame in frames
        ]
        assert all(
            image.parent.name == label.parent.name == image.name.split("_")[0]
            for image, label in samples
        )
        assert all(
            image.parent.parent.name == label.parent.parent.name == split
            for image, label in samples
        )


def test_cityscapes_converted_labels_are_read_only_where_official_ones_are_missing(tmp_path):
    city_frame(tmp_path, "bochum_000000_000019", CONVERTED, "labelTrainIds")
    city_frame(tmp_path, "ulm_000000_000019", CONVERTED, "labelTrainIds")
    city_frame(tmp_path, "ulm_000000_000019", RAW[:20])
    data = Cityscapes(root=tmp_path)
    assert row(data, 0) == CONVERTED
    assert row(data, 1) == [TRAIN_ID[raw] for raw in RAW[:20]]


def test_cityscapes_ids_that_no_table_knows_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"labelIds.png holds the ids \[34\].*ID_MAP"):
        Cityscapes(root=city_frame(tmp_path, "ulm_000000_000019", [0, 34]))[0]
    city_frame(tmp_path, "bochum_000000_000019", [18, 19, 33], "labelTrainIds")
    with pytest.raises(
        DataError, match=r"labelTrainIds.png holds the ids \[19, 33\].*converted to class ids"
    ):
        Cityscapes(root=tmp_path)[0]


def test_cityscapes_missing_label_is_named_by_its_official_name(tmp_path):
    city_frame(tmp_path, "ulm_000000_000019")
    city_frame(tmp_path, "ulm_000001_000019", kind=None)
    with pytest.raises(
        DataError, match=r"1 of 2 labels .*train/ulm/ulm_000001_000019_gtFine_labelIds.png"
    ):
        Cityscapes(root=tmp_path)


def test_cityscapes_unknown_split_names_the_folders(tmp_path):
    city_frame(tmp_path, "ulm_000000_000019")
    city_frame(tmp_path, "munster_000000_000019", split="val")
    with pytest.raises(
        DataError, match=r"no split 'test': the folders in .*leftImg8bit are train, val"
    ):
        Cityscapes(root=tmp_path, split="test")
    with pytest.raises(DataError, match=r"no split 'train': the folders in .*leftImg8bit are none"):
        Cityscapes(root=tmp_path / "gtFine")


# --- the classes of another label space ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, ids", [("labelIds", RAW), ("labelTrainIds", CONVERTED)])
def test_cityscapes_can_be_read_in_the_classes_of_camvid(tmp_path, kind, ids):
    root = city_frame(tmp_path, "ulm_000000_000019", ids, kind)
    data, expected = Cityscapes(root=root, label_space=AS_CAMVID), [*IN_CAMVID, *[255] * 237]
    assert row(data) == [expected[i] for i in row(Cityscapes(root=root))]
    assert data.CLASSES == camvid.CLASSES and data.SCORED == ()
    assert data.PALETTE[6] == (250, 170, 30) and data.PALETTE[0] == (
        70,
        130,
        180,
    )  # traffic light, sky


@pytest.mark.skipif(not MAPS.is_dir(), reason="the maps between label spaces are not here")
def test_the_map_from_cityscapes_to_camvid_is_the_one_in_the_file(tmp_path):
    lines = [
        line.split()
        for line in (MAPS / "cityscapes19_to_camvid11.txt").read_text().splitlines()[1:]
    ]
    assert [name.replace("_", " ") for _, name, _ in lines] == NAMES
    written = {
        name: [n.replace("_", " ") for _, n, i in lines if int(i) == c]
        for c, name in enumerate(camvid.CLASSES)
    }
    assert written == AS_CAMVID
    root = city_frame(tmp_path, "ulm_000000_000019", CONVERTED, "labelTrainIds")
    assert row(Cityscapes(root=root, label_space=written)) == [*(int(i) for *_, i in lines), 255]
