"""LabelMeFacade in its layout, and as published."""

import pytest

from datasets.base import DataError
from datasets.camvid import CamVid
from datasets.labelmefacade import LabelMeFacade
from datasets.statistics import class_counts
from tests.datasets.files import REAL, column, picture, rows, save

FACADES = REAL.parent / "labelmefacade"


def facade(root, *ids, split="test"):
    save(root / "images" / split / "a.jpg", picture())
    save(root / "labels" / split / "a.png", rows(*ids))
    return root


def test_labelmefacade_has_six_of_the_classes_of_camvid(tmp_path):
    data = LabelMeFacade(root=facade(tmp_path, 0, 1, 3, 4, 5, 8, 255), split="test")
    assert column(data[0]["label"])[:7] == [0, 1, 3, 4, 5, 8, 255]
    assert (data.CLASSES, data.PALETTE) == (CamVid.CLASSES, CamVid.PALETTE)
    assert [data.CLASSES.index(name) for name in data.SCORED] == [0, 1, 3, 4, 5, 8]
    save(tmp_path / "labels" / "test" / "a.png", rows(0, 2, 11))
    with pytest.raises(DataError, match=r"a.png holds the ids \[2, 11\], which LabelMeFacade"):
        data[0]


def test_labelmefacade_missing_labels_and_splits_are_named(tmp_path):
    facade(tmp_path, 0)
    with pytest.raises(
        DataError, match=r"LabelMeFacade has no split 'val': the folders in .*images are test$"
    ):
        LabelMeFacade(root=tmp_path, split="val")
    (tmp_path / "labels" / "test" / "a.png").unlink()
    with pytest.raises(
        DataError, match=r"LabelMeFacade test: 1 of 1 labels do not exist, such as .*test/a.png"
    ):
        LabelMeFacade(root=tmp_path, split="test")
    assert LabelMeFacade(root=tmp_path, split="test", labels=False).samples[0][1] is None


@pytest.mark.skipif(not FACADES.is_dir(), reason="the images of LabelMeFacade are not here")
def test_labelmefacade_real_data_has_the_published_shares(tmp_path):
    train, test = (LabelMeFacade(root=FACADES, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (60, 320) and max(test[0]["label"].shape) == 480
    counts = class_counts(train, tmp_path).sum(0)
    pixels = sum(train.load_label(i).size for i in range(60))
    assert (100 * counts / pixels).round(2).tolist() == [
        13.09,
        41.54,
        0,
        22.21,
        4.57,
        8.73,
        0,
        0,
        5.5,
        0,
        0,
    ]
