"""ACDC on tiny files in its official format."""

import pytest

from datasets.acdc import ACDC
from datasets.base import DataError
from engine.build import build
from engine.config import ConfigError
from tests.datasets.published import CONVERTED, RAW, TRAIN_ID, row, weather_frame


def weather(root):
    for number, condition in enumerate(("snow", "fog", "rain", "night")):
        weather_frame(root, condition, f"GP{number}_frame_000001")
        weather_frame(root, condition, f"GP{number}_frame_000002", split="val_ref")
    weather_frame(root, "night", "GP0_frame_000009")
    return root


def test_acdc_single_conditions_and_all(tmp_path):
    weather(tmp_path)

    def conditions(**options):
        samples = ACDC(root=tmp_path, split="val", **options).samples
        found = [image.relative_to(tmp_path / "rgb_anon").parts[0] for image, _ in samples]
        assert found == [label.relative_to(tmp_path / "gt").parts[0] for _, label in samples]
        return found

    for condition in ("fog", "rain", "snow"):
        assert conditions(condition=condition) == [condition]
    assert conditions(condition="night") == ["night"] * 2
    assert conditions() == conditions(condition="all") == ["fog", "night", "night", "rain", "snow"]


def test_acdc_reads_train_ids_and_maps_ids(tmp_path):
    weather_frame(tmp_path, "fog", "GP1_frame_000001")
    weather_frame(tmp_path, "fog", "GP1_frame_000001", [7] * 20, "labelIds")
    weather_frame(tmp_path, "fog", "GP2_frame_000001", [*RAW, 255], "labelIds")
    data = ACDC(root=tmp_path, split="val", condition="fog")
    assert row(data, 0) == CONVERTED
    assert row(data, 1) == [*(TRAIN_ID[raw] for raw in RAW), 255]


def test_acdc_reference_images_have_no_labels(tmp_path):
    weather(tmp_path)
    with pytest.raises(
        DataError, match=r"ACDC val_ref holds reference images, .*; set labels: false"
    ):
        ACDC(root=tmp_path, split="val_ref")
    data = ACDC(root=tmp_path, split="val_ref", labels=False)
    assert len(data) == 4 and all(
        image.name.endswith("_rgb_ref_anon.png") for image, _ in data.samples
    )
    assert {*row(data)} == {255}


def test_acdc_unknown_conditions_splits_and_missing_labels_are_named(tmp_path):
    weather(tmp_path)
    with pytest.raises(ConfigError, match="must be fog, night, rain, snow or all, not 'dusk'"):
        build("datasets", {"name": "acdc.ACDC", "condition": "dusk"}, root=tmp_path)
    with pytest.raises(
        DataError, match=r"ACDC has no split 'train': the folders in .*/fog are val, val_ref"
    ):
        ACDC(root=tmp_path)
    weather_frame(tmp_path, "rain", "GP7_frame_000001", kind=None)
    with pytest.raises(
        DataError, match=r"1 of 6 labels .*/rain/val/GP7/GP7_frame_000001_gt_labelTrainIds.png"
    ):
        ACDC(root=tmp_path, split="val")
