"""COCO-Stuff on tiny files in its official format."""

import pytest
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from datasets import cocostuff
from datasets.base import DataError
from datasets.cocostuff import CocoStuff10k, CocoStuff164k
from tests.datasets.published import COCO_IDS, NEVER, grey, photo, row


def test_cocostuff_names_are_those_of_coco_and_then_the_stuff_by_the_alphabet():
    coco = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # by id, 0 is the background
    assert [i for i in range(1, 91) if coco[i] == "N/A"] == NEVER[:-1]
    things, stuff = cocostuff.CLASSES[:80], cocostuff.CLASSES[80:]
    assert list(things) == [name for name in coco[1:] if name != "N/A"]
    assert len(stuff) == 91 and list(stuff) == sorted(stuff) and len({*things, *stuff}) == 171
    ids = dict(zip(cocostuff.IDS, cocostuff.CLASSES, strict=True))
    assert {i: ids[i] for i in range(1, 91) if i in ids} == {
        i: coco[i] for i in range(1, 91) if coco[i] != "N/A"
    }
    known = {
        92: "banner",
        95: "bridge",
        106: "clouds",
        124: "grass",
        149: "road",
        157: "sky-other",
        169: "tree",
    }
    assert {i: ids[i] for i in (92, 95, 106, 124, 149, 157, 169, 182)} == known | {182: "wood"}
    assert len({*cocostuff.PALETTE}) == 171


def test_cocostuff10k_converted_ids_are_shifted(tmp_path):
    photo(tmp_path, "COCO_train2014_1", "train2014", range(172), suffix="_labelTrainIds")
    photo(tmp_path, "COCO_train2014_2", "test2014", [0, 171, 255], suffix="_labelTrainIds")
    assert row(CocoStuff10k(root=tmp_path, split="train2014")) == [255, *range(171)]
    assert row(CocoStuff10k(root=tmp_path, split="test2014")) == [255, 170, 255]


def test_cocostuff10k_labels_of_matlab_missing_ones_and_unknown_ids_and_splits_are_named(tmp_path):
    photo(tmp_path, "a", "train2014", [0, 1], folder=None)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.mat").touch()
    with pytest.raises(
        DataError, match=r"annotations/a.mat is MATLAB's; convert .*train2014/\*_labelTrainIds.png"
    ):
        CocoStuff10k(root=tmp_path, split="train2014")
    assert len(CocoStuff10k(root=tmp_path, split="train2014", labels=False)) == 1
    photo(tmp_path, "b", "train2014", [172, 182], suffix="_labelTrainIds")
    with pytest.raises(
        DataError, match=r"1 of 2 labels .*annotations/train2014/a_labelTrainIds.png"
    ):
        CocoStuff10k(root=tmp_path, split="train2014")
    photo(tmp_path, "a", "train2014", [0, 1], suffix="_labelTrainIds")
    with pytest.raises(
        DataError, match=r"b_labelTrainIds.png holds the ids \[172, 182\].*CocoStuff10k"
    ):
        CocoStuff10k(root=tmp_path, split="train2014")[1]
    with pytest.raises(DataError, match=r"CocoStuff10k has no split 'train': .* are train2014$"):
        CocoStuff10k(root=tmp_path)


@pytest.mark.parametrize(
    "folder, images",
    [("stuffthingmaps", "images/"), ("annotations", "images/"), ("stuffthingmaps", "")],
)
def test_cocostuff164k_ids_have_gaps_and_become_171_classes(tmp_path, folder, images):
    photo(tmp_path, "000000000139", "val2017", [*COCO_IDS, 255], folder, images=images)
    data = CocoStuff164k(root=tmp_path, split="val2017")
    assert row(data) == [*range(171), 255] and len(data.CLASSES) == 171
    assert {coco: row(data)[i] for i, coco in enumerate(COCO_IDS)} | {
        255: 255
    } == CocoStuff164k.ID_MAP
    for missing in (11, 90):
        grey(tmp_path / folder / "val2017" / "000000000139.png", [missing] * 172)
        with pytest.raises(
            DataError, match=rf"000000000139.png holds the ids \[{missing}\].*CocoStuff164k \(171"
        ):
            data[0]


def test_cocostuff164k_converted_labels_are_read_only_where_official_ones_are_missing(tmp_path):
    photo(tmp_path, "a", "train2017", [*range(171), 255], suffix="_labelTrainIds")
    photo(tmp_path, "b", "train2017", [0, 170], suffix="_labelTrainIds")
    photo(tmp_path, "b", "train2017", [12, 181], "stuffthingmaps")
    data = CocoStuff164k(root=tmp_path, split="train2017")
    assert row(data, 0) == [*range(171), 255] and row(data, 1) == [11, 170]
    photo(tmp_path, "c", "train2017", [0], folder=None)
    with pytest.raises(
        DataError, match=r"1 of 3 labels do not exist, such as .*stuffthingmaps/train2017/c.png"
    ):
        CocoStuff164k(root=tmp_path, split="train2017")
    with pytest.raises(DataError, match=r"CocoStuff164k has no split 'val2017': .* are train2017$"):
        CocoStuff164k(root=tmp_path, split="val2017")
