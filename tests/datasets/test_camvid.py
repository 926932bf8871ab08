"""CamVid in both of its layouts, and as published."""

import pytest

from datasets.base import DataError
from datasets.camvid import CamVid
from tests.datasets.files import REAL, column, picture, rows, save, with_lists


def test_camvid_segnet_layout_maps_eleven_to_ignore(tmp_path):
    save(tmp_path / "train" / "0006R0_f00930.png", picture())
    save(tmp_path / "trainannot" / "0006R0_f00930.png", rows(0, 10, 11))
    dataset = CamVid(root=tmp_path)
    assert len(dataset) == 1 and column(dataset[0]["label"])[:3] == [0, 10, 255]


def original(root, stem, *colors):
    save(root / "701_StillsRaw_full" / f"{stem}.png", picture())
    save(root / "LabeledApproved_full" / f"{stem}_L.png", rows(*colors))


def test_camvid_original_layout_groups_colours(tmp_path):
    road, markings, sidewalk, bus, void = (
        (128, 64, 128),
        (128, 0, 192),
        (0, 0, 192),
        (192, 128, 192),
        (0, 0, 0),
    )
    original(tmp_path, "0006R0_f00930", road, markings, sidewalk, bus, void)
    assert column(CamVid(root=tmp_path)[0]["label"])[:5] == [3, 3, 4, 8, 255]


def test_camvid_original_layout_splits_by_sequence_and_frame(tmp_path):
    splits = {
        "train": [
            "0001TP_008520",
            "0006R0_f00930",
            "0016E5_00390",
            "0016E5_07920",
            "0016E5_08000",
            "0016E5_08190",
        ],
        "val": ["0016E5_07959", "0016E5_07961", "0016E5_08159"],
        "test": ["0001TP_008550", "Seq05VD_f00000"],
    }
    for stem in (stem for stems in splits.values() for stem in stems):
        original(tmp_path, stem, (0, 0, 0))
    for split, stems in splits.items():
        assert [image.stem for image, _ in CamVid(root=tmp_path, split=split).samples] == stems


def test_camvid_names_what_is_no_frame_and_what_shares_a_label(tmp_path):
    original(tmp_path / "a", "sheet", (0, 0, 0))
    with pytest.raises(DataError, match=r"701_StillsRaw_full/sheet.png is no frame of CamVid"):
        CamVid(root=tmp_path / "a")
    for name in ("1.png", "2.jpg", "2.png"):
        save(tmp_path / "b" / "images" / "train" / name, picture())
    (tmp_path / "b" / "images" / "train" / "Thumbs.db").write_bytes(b"")
    with pytest.raises(DataError, match=r"2.jpg and .*2.png share the name 'train/2', under"):
        CamVid(root=tmp_path / "b", labels=False)
    (tmp_path / "b" / "images" / "train" / "2.jpg").unlink()
    found = CamVid(root=tmp_path / "b", labels=False)
    assert [image.name for image, _ in found.samples] == ["1.png", "2.png"]


def test_camvid_unknown_colour_names_colour_and_file(tmp_path):
    original(tmp_path, "0006R0_f00930", (128, 64, 128), (1, 2, 3))
    with pytest.raises(
        DataError, match=r"0006R0_f00930_L.png holds 1 colours .* such as \(1, 2, 3\)"
    ):
        CamVid(root=tmp_path)[0]


def test_camvid_lists_are_splits(tmp_path):
    with_lists(tmp_path)
    assert [i.stem for i, _ in CamVid(root=tmp_path, split="train").samples] == [
        "0001TP_006690",
        "0006R0_f00930",
    ]
    dusk = CamVid(root=tmp_path, split="train_dusk")
    assert [i.stem for i, _ in dusk.samples] == ["0001TP_006690"]
    assert column(dusk[0]["label"])[:3] == [0, 10, 255]


@pytest.mark.parametrize("layout", ["images/train", "train", "701_StillsRaw_full"])
def test_camvid_knows_the_frames_of_each_light_without_lists(layout, tmp_path):
    frames = ("0001TP_006690", "0006R0_f00930", "0016E5_00390")
    for stem in frames:
        save(tmp_path / layout / f"{stem}.png", picture())
        place = {"images/train": "labels/train", "train": "trainannot"}.get(layout)
        label = f"{place}/{stem}.png" if place else f"LabeledApproved_full/{stem}_L.png"
        save(tmp_path / label, rows(0) if place else rows((0, 0, 0)))
    for split, stems in (("train_dusk", frames[:1]), ("train_day", frames[1:]), ("train", frames)):
        assert [i.stem for i, _ in CamVid(root=tmp_path, split=split).samples] == [*stems]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train_dusk.txt").write_text(f"train/{frames[2]}")
    (image, _), = CamVid(root=tmp_path, split="train_dusk", labels=False).samples
    assert image.stem == frames[2 if layout == "images/train" else 0]  # there a list goes first


def test_camvid_unknown_split_names_those_that_there_are(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no split 'dusk'; there are .*_dusk, and the lists \['train_dusk'\]",
    ):
        CamVid(root=with_lists(tmp_path), split="dusk")


@pytest.mark.skipif(not REAL.is_dir(), reason="the CamVid images are not here")
def test_camvid_real_data_has_the_published_numbers():
    counts = {"train": 367, "val": 101, "test": 233, "train_day": 305, "train_dusk": 62}
    assert {split: len(CamVid(root=REAL, split=split)) for split in counts} == counts
    sample = CamVid(root=REAL, split="val")[0]
    assert sample["image"].shape == (3, 360, 480) and set(sample["label"].unique().tolist()) <= {
        *range(11),
        255,
    }
    target = CamVid(root=REAL, split="train_dusk", labels=False)
    assert all(path is None for _, path in target.samples) and (target[0]["label"] == 255).all()


def test_camvid_can_be_read_in_another_label_space(tmp_path):
    road, bus, child, void = (128, 64, 128), (192, 128, 192), (192, 128, 64), (0, 0, 0)
    original(tmp_path, "0006R0_f00930", road, bus, child, void)
    space = {"thing": ["Car", "Pedestrian"], "animal": [], "ground": ["Road", "Pavement"]}
    data = CamVid(root=tmp_path, label_space=space)
    assert column(data[0]["label"])[:4] == [2, 0, 0, 255] and data.SCORED == ("thing", "ground")
