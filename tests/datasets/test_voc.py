"""Pascal VOC on tiny files in its official format."""

import pytest
from torchvision.models.segmentation import FCN_ResNet50_Weights

from datasets.base import DataError
from datasets.voc import VOC
from tests.datasets.published import grey, picture, row, stems, voc_image, voc_list


def bit_rule(i):
    """Colour i of VOC's development kit: the bits of i go to red, green and blue in turn, from the highest down."""
    bits = [i >> b & 1 for b in range(24)]
    return tuple(sum(bits[3 * k + channel] << (7 - k) for k in range(8)) for channel in range(3))


def test_voc_names_and_colours_are_the_official_ones():
    assert ["__background__", *VOC.CLASSES[1:]] == FCN_ResNet50_Weights.DEFAULT.meta["categories"]
    assert VOC.CLASSES[0] == "background" and list(VOC.PALETTE) == [bit_rule(i) for i in range(21)]
    assert bit_rule(15) == (192, 128, 128) and bit_rule(255) == (
        224,
        224,
        192,
    )  # a person, the border


@pytest.mark.parametrize("home", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_lists_are_splits_and_indices_are_classes(tmp_path, home):
    for name in ("2007_000032", "2007_000033", "2008_000001"):
        voc_image(tmp_path / home, name)
    voc_list(tmp_path / home, "train", "2007_000032")
    voc_list(tmp_path / home, "val", "2007_000033", "", "2008_000001 ")
    voc_list(tmp_path / home, "trainval", "2007_000032", "2007_000033", "2008_000001")
    found = {
        split: stems(VOC(root=tmp_path, split=split)) for split in ("train", "val", "trainval")
    }
    assert found["train"] == ["2007_000032"] and found["val"] == ["2007_000033", "2008_000001"]
    assert found["trainval"] == found["train"] + found["val"]
    assert row(VOC(root=tmp_path)) == [*range(21), 255]


def test_voc_names_may_hold_dots_and_lists_paths(tmp_path):
    for name in ("a.1", "a.2", "b"):
        voc_image(tmp_path, name)
    voc_list(tmp_path, "train", "a.1", "a.2", "/JPEGImages/b.jpg /SegmentationClass/b.png")
    assert stems(VOC(root=tmp_path)) == ["a.1", "a.2", "b"]


@pytest.mark.parametrize(
    "lists", [["train_aug"], ["trainaug"], ["train", "aug"], ["train_aug", "train", "aug"]]
)
def test_voc_augmented_labels_in_the_arrangements_in_use(tmp_path, lists):
    voc_image(tmp_path, "a", [1, 255])
    voc_image(tmp_path, "b", [2, 2], folder="SegmentationClassAug")
    for name in lists:
        lines = {"train": ["a"], "aug": ["b", "a"]}.get(
            name, ["a", "/JPEGImages/b.jpg /SegmentationClassAug/b.png"]
        )
        voc_list(tmp_path, name, *lines)
    data = VOC(root=tmp_path, split="train_aug")
    assert stems(data) == ["a", "b"] and row(data, 0) == [1, 255] and row(data, 1) == [2, 2]
    grey(
        tmp_path / "SegmentationClassAug" / "a.png", [1, 1]
    )  # SBD's label is preferred, but not for the official lists
    assert row(VOC(root=tmp_path, split="train_aug")) == [1, 1]
    voc_list(tmp_path, "train", "a")
    assert row(VOC(root=tmp_path)) == [1, 255]


def test_voc_unknown_splits_ids_and_missing_images_and_labels_are_named(tmp_path):
    voc_image(tmp_path, "a", [20, 21])
    voc_list(tmp_path, "train", "a")
    with pytest.raises(
        DataError, match=r"SegmentationClass/a.png holds the ids \[21\], which VOC \(21 classes\)"
    ):
        VOC(root=tmp_path)[0]
    for split in ("val", "train_aug"):
        with pytest.raises(
            DataError, match=rf"VOC has no split '{split}': the lists in .*Segmentation are train$"
        ):
            VOC(root=tmp_path, split=split)
    voc_list(tmp_path, "train", "a", "b")
    with pytest.raises(DataError, match=r"1 of 2 images do not exist, such as .*JPEGImages/b.jpg"):
        VOC(root=tmp_path)
    voc_image(tmp_path, "b", folder=None)
    with pytest.raises(
        DataError, match=r"1 of 2 labels do not exist, such as .*SegmentationClass/b.png"
    ):
        VOC(root=tmp_path)
    picture(tmp_path / "SegmentationClass" / "b.png", 22)  # drawn in colours by someone
    with pytest.raises(DataError, match=r"SegmentationClass/b.png is a colour picture"):
        VOC(root=tmp_path)[1]
