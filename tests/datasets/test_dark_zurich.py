"""Dark Zurich on tiny files in its official format."""

import pytest

from datasets import dark_zurich
from datasets.base import DataError
from datasets.dark_zurich import DarkZurich
from engine.build import build
from engine.config import ConfigError
from tests.datasets.published import CONVERTED, RAW, TRAIN_ID, row, stems, zurich_frame


def test_dark_zurich_trains_without_labels_at_one_time_of_day_or_at_all(tmp_path):
    for time in dark_zurich.TIMES:
        zurich_frame(tmp_path, "train", time)
        found = DarkZurich(root=tmp_path, time=time, labels=False)
        assert [image.relative_to(tmp_path).parts[2] for image, _ in found.samples] == [time]
        assert {*row(found)} == {255}
    assert (
        stems(DarkZurich(root=tmp_path, time="all", labels=False))
        == ["GOPR0356_frame_000321_rgb_anon"] * 3
    )
    assert DarkZurich(root=tmp_path, labels=False).samples[0][0].parts[-3] == "night"
    for split in ("train", "val_ref"):
        with pytest.raises(DataError, match=f"DarkZurich {split} has no labels; set labels: false"):
            DarkZurich(root=tmp_path, split=split)


def test_dark_zurich_val_has_train_ids_or_ids_and_references_have_none(tmp_path):
    zurich_frame(tmp_path, "val", "night", kind="labelTrainIds")
    zurich_frame(tmp_path, "val", "night", ids=[7] * 20, kind="labelIds")
    zurich_frame(tmp_path, "val", "night", "GOPR0356_frame_000324", [*RAW, 255], "labelIds")
    zurich_frame(tmp_path, "val_ref", "day")
    for time in ("night", "all"):
        data = DarkZurich(root=tmp_path, split="val", time=time)
        assert row(data, 0) == CONVERTED and row(data, 1) == [*(TRAIN_ID[raw] for raw in RAW), 255]
    assert len(DarkZurich(root=tmp_path, split="val_ref", time="day", labels=False)) == 1
    with pytest.raises(
        DataError, match=r"val_ref has no images by night: the folders in .*val_ref are day$"
    ):
        DarkZurich(root=tmp_path, split="val_ref", labels=False)


def test_dark_zurich_unknown_splits_times_ids_and_missing_labels_are_named(tmp_path):
    zurich_frame(tmp_path, "val", "night", ids=[0, 19], kind="labelTrainIds")
    with pytest.raises(
        DataError, match=r"labelTrainIds.png holds the ids \[19\].*converted to class ids"
    ):
        DarkZurich(root=tmp_path, split="val")[0]
    with pytest.raises(
        DataError, match=r"DarkZurich has no split 'test': the folders in .*rgb_anon are val$"
    ):
        DarkZurich(root=tmp_path, split="test", labels=False)
    with pytest.raises(ConfigError, match="must be day, twilight, night or all, not 'dusk'"):
        build("datasets", {"name": "dark_zurich.DarkZurich", "time": "dusk"}, root=tmp_path)
    zurich_frame(tmp_path, "val", "night", "GOPR0356_frame_000400")
    with pytest.raises(
        DataError, match=r"1 of 2 labels .*gt/val/night/GOPR0356/.*_000400_gt_labelTrainIds.png"
    ):
        DarkZurich(root=tmp_path, split="val")
