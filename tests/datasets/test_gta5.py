"""GTA5 on tiny files in its official format."""

import pytest
from PIL import Image

from datasets.base import DataError
from datasets.gta5 import GTA5
from tests.datasets.published import CONVERTED, RAW, TRAIN_ID, game_frame, grey, picture, row, stems


def test_gta5_palette_indices_are_ids_and_34_is_ignored(tmp_path):
    data = GTA5(root=game_frame(tmp_path, "00001"))
    assert row(data) == [*(TRAIN_ID[raw] for raw in RAW), 255]


def test_gta5_leaves_the_two_bad_files_out_and_reports_them(tmp_path):
    for stem in ("15187", "15188", "15189", "17705"):
        game_frame(tmp_path, stem)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "half.txt").write_text("17705\n15187\n")
    data, half = GTA5(root=tmp_path), GTA5(root=tmp_path, split="half")
    assert stems(data) == ["15187", "15189"] and stems(half) == ["15187"]
    assert [image.stem for image in data.left_out] == ["15188", "17705"]
    assert [image.stem for image in half.left_out] == ["17705"]
    assert {*GTA5.KNOWN_BAD} == {"15188", "17705"}


def test_gta5_converted_labels_are_read_only_where_official_ones_are_missing(tmp_path):
    picture(tmp_path / "images" / "00001.png", len(CONVERTED))
    grey(tmp_path / "labels" / "00001_labelTrainIds.png", CONVERTED)
    game_frame(tmp_path, "00002", RAW[:20])
    grey(tmp_path / "labels" / "00002_labelTrainIds.png", CONVERTED)
    data = GTA5(root=tmp_path)
    assert stems(data) == ["00001", "00002"]
    assert row(data, 0) == CONVERTED
    assert row(data, 1) == [TRAIN_ID[raw] for raw in RAW[:20]]


def test_gta5_colour_labels_are_refused(tmp_path):
    game_frame(tmp_path, "00001")
    with Image.open(tmp_path / "labels" / "00001.png") as image:
        image.convert("RGB").save(tmp_path / "labels" / "00001.png")
    with pytest.raises(DataError, match=r"labels/00001.png is a colour picture \(3 channels\)"):
        GTA5(root=tmp_path)[0]
