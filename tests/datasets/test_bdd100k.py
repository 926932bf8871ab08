"""BDD100K on tiny files in its official format."""

import pytest

from datasets.base import DataError
from datasets.bdd100k import BDD100K
from tests.datasets.published import CONVERTED, drive_frame, picture, row


@pytest.mark.parametrize("newer", [False, True])
def test_bdd100k_both_layouts_hold_train_ids(tmp_path, newer):
    for name in ("b1d0a191-65deaeef", "7d128593-0ccfea4c"):
        drive_frame(tmp_path, name, newer)
    drive_frame(tmp_path, "0a0a0b1a-7c39d841", newer, split="train")
    data = BDD100K(root=tmp_path, split="val")
    assert [image.stem for image, _ in data.samples] == ["7d128593-0ccfea4c", "b1d0a191-65deaeef"]
    assert row(data) == row(data, 1) == CONVERTED and len(BDD100K(root=tmp_path)) == 1
    folder = "labels/sem_seg/masks/val" if newer else "labels/val"
    assert {label.parent.relative_to(tmp_path).as_posix() for _, label in data.samples} == {folder}


def test_bdd100k_newer_images_are_those_of_the_10k_folder(tmp_path):
    """The newer release has the 100,000 images of detection beside the 10,000 of segmentation."""
    picture(drive_frame(tmp_path, "a", True) / "images" / "100k" / "val" / "b.jpg", 20)
    assert [image.stem for image, _ in BDD100K(root=tmp_path, split="val").samples] == ["a"]


@pytest.mark.parametrize("newer, name", [(False, "masks.png"), (True, "masks_train_id.png")])
def test_bdd100k_either_name_of_a_label_is_found_in_either_layout(tmp_path, newer, name):
    drive_frame(tmp_path, "masks", newer)
    (official,) = tmp_path.rglob("labels/**/*.png")
    official.rename(official.with_name(name))
    assert row(BDD100K(root=tmp_path, split="val")) == CONVERTED


@pytest.mark.parametrize(
    "newer, name", [(False, "labels/val/b_train_id.png"), (True, "sem_seg/masks/val/b.png")]
)
def test_bdd100k_missing_labels_splits_and_unknown_ids_are_named(tmp_path, newer, name):
    drive_frame(tmp_path, "a", newer, [0, 18, 19])
    with pytest.raises(DataError, match=r"holds the ids \[19\], which BDD100K \(19 classes\)"):
        BDD100K(root=tmp_path, split="val")[0]
    picture(tmp_path / ("images/10k" if newer else "images") / "val" / "b.jpg", 3)
    with pytest.raises(
        DataError, match=f"BDD100K val: 1 of 2 labels do not exist, such as .*{name}"
    ):
        BDD100K(root=tmp_path, split="val")
    assert len(BDD100K(root=tmp_path, split="val", labels=False)) == 2
    with pytest.raises(
        DataError, match=r"BDD100K has no split 'test': the folders in .*images.* are val$"
    ):
        BDD100K(root=tmp_path, split="test", labels=False)
