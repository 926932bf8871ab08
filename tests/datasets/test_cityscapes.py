"""Cityscapes, GTA5, SYNTHIA, ACDC, BDD100K, Mapillary Vistas, Dark Zurich, ADE20K, COCO-Stuff and Pascal VOC on tiny
files in their official formats."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from datasets import (
    acdc,
    bdd100k,
    camvid,
    check,
    cityscapes,
    cocostuff,
    dark_zurich,
    gta5,
    synthia,
)
from datasets.acdc import ACDC
from datasets.ade20k import ADE20K
from datasets.base import DataError
from datasets.bdd100k import BDD100K
from datasets.cityscapes import Cityscapes
from datasets.cocostuff import CocoStuff10k, CocoStuff164k
from datasets.dark_zurich import DarkZurich
from datasets.gta5 import GTA5
from datasets.mapillary import Mapillary
from datasets.statistics import class_counts
from datasets.synthia import Synthia
from datasets.voc import VOC
from engine.build import build
from engine.config import ConfigError, load
from engine.metrics import ConfusionMatrix
from tests.runs import ROOT

MAPS = ROOT.parent / "shared" / "data" / "maps"

# The official tables, copied out once more: train id, class, id on disk, colour.
OFFICIAL = """
0  road           7  128  64 128
1  sidewalk       8  244  35 232
2  building      11   70  70  70
3  wall          12  102 102 156
4  fence         13  190 153 153
5  pole          17  153 153 153
6  traffic_light 19  250 170  30
7  traffic_sign  20  220 220   0
8  vegetation    21  107 142  35
9  terrain       22  152 251 152
10 sky           23   70 130 180
11 person        24  220  20  60
12 rider         25  255   0   0
13 car           26    0   0 142
14 truck         27    0   0  70
15 bus           28    0  60 100
16 train         31    0  80 100
17 motorcycle    32    0   0 230
18 bicycle       33  119  11  32
"""
LINES = [line.split() for line in OFFICIAL.strip().splitlines()]
NAMES = [name.replace("_", " ") for _, name, *_ in LINES]
COLORS = [tuple(map(int, color)) for _, _, _, *color in LINES]
VOID = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]
TRAIN_ID = dict.fromkeys(VOID, 255) | {int(raw): int(train_id) for train_id, _, raw, *_ in LINES}
# SYNTHIA: train ids of the ids 0 to 22.
SYNTHIA = [255, 10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17, 255, 255, 6, 9, 12, 14, 15, 16, 3, 255]
RAW, CONVERTED = (
    [*range(34)],
    [*range(19), 255],
)  # ids in one row of a label: as released, as train ids


def picture(path, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, width, 3), dtype=np.uint8)
    return save(path, pixels)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def grey(path, ids):
    """8-bit grey PNG with four rows of these ids."""
    return save(path, [ids] * 4)


def row(data, index=0):
    """The labels of one row, all rows being equal."""
    label = data[index]["label"].numpy()
    assert (label == label[0]).all()
    return label[0].tolist()


# --- Cityscapes ------------------------------------------------------------------------------------------------------


def city_frame(root, frame, ids=RAW, kind="labelIds", split="train"):
    city = frame.split("_")[0]
    picture(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", len(ids))
    if kind:
        grey(root / "gtFine" / split / city / f"{frame}_gtFine_{kind}.png", ids)
    return root


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


# --- the two conventions of SYNTHIA -> Cityscapes --------------------------------------------------------------------

WITHOUT_ABSENT = [n for n in NAMES if n not in ("terrain", "truck", "train")]
THIRTEEN = [n for n in WITHOUT_ABSENT if n not in ("wall", "fence", "pole")]


def test_synthia_subsets_are_those_of_the_papers():
    assert synthia.SUBSETS == {"mIoU16": WITHOUT_ABSENT, "mIoU13": THIRTEEN}
    assert len(WITHOUT_ABSENT) == 16 and len(THIRTEEN) == 13


@pytest.mark.parametrize("kind, ids", [("labelIds", RAW), ("labelTrainIds", CONVERTED)])
def test_ignored_classes_are_255_and_the_others_keep_their_ids(tmp_path, kind, ids):
    root = city_frame(tmp_path, "ulm_000000_000019", ids, kind)
    plain = row(Cityscapes(root=root))
    assert {*plain} == {*range(19), 255}
    data = Cityscapes(root=root, ignore=list(synthia.ABSENT))
    assert row(data) == [255 if i in (9, 14, 16) else i for i in plain]
    assert list(data.CLASSES) == NAMES


def test_convention_a_counts_false_positives_on_absent_classes_and_b_does_not(tmp_path):
    root = city_frame(tmp_path, "ulm_000000_000019", [7, 7, 27, 26])  # road, road, truck, car
    predicted = np.array([[0, 0, 13, 13]] * 4)  # the truck is taken for a car
    scores = {}
    for name, ignore in (("A", []), ("B", ["terrain", "truck", "train"])):
        data = Cityscapes(root=root, ignore=ignore)
        matrix = ConfusionMatrix(data.CLASSES, synthia.SUBSETS)
        sample = data[0]["label"][None].long()
        matrix.update(sample.new_tensor(predicted)[None], sample)
        scores[name] = {
            key: value for key, value in matrix.summary().items() if key in synthia.SUBSETS
        }
    assert scores["A"] == pytest.approx({"mIoU16": 75.0, "mIoU13": 75.0})  # road 100, car 50
    assert scores["B"] == pytest.approx({"mIoU16": 100.0, "mIoU13": 100.0})


def test_unknown_names_to_ignore_are_errors(tmp_path):
    root = city_frame(tmp_path, "ulm_000000_000019")
    with pytest.raises(
        DataError,
        match=r"Cityscapes: ignore names \['lorry'\]; there are road, sidewalk, .*bicycle",
    ):
        Cityscapes(root=root, ignore=["truck", "lorry"])


# --- GTA5 ------------------------------------------------------------------------------------------------------------


def palette_png(path, ids):
    """Mode P, as released: indices are ids, and a palette in which several ids share a colour."""
    image = Image.fromarray(np.array([ids] * 4, np.uint8))
    image.putpalette(
        [value for i in range(256) for value in ((0, 0, 0) if i < 4 else (i, 255 - i, i // 2))]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    with Image.open(path) as written:
        assert written.mode == "P"


def game_frame(root, stem, ids=(*RAW, 34)):
    picture(root / "images" / f"{stem}.png", len(ids))
    palette_png(root / "labels" / f"{stem}.png", ids)
    return root


def stems(data):
    return [image.stem for image, _ in data.samples]


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


# --- SYNTHIA ---------------------------------------------------------------------------------------------------------


def drawn_frame(root, stem, ids=range(23)):
    """16-bit RGB: the class in red, the instance in green, and ids of other classes in blue."""
    red = np.array([list(ids)] * 4, np.uint16)
    picture(root / "RGB" / f"{stem}.png", red.shape[1])
    (root / "GT" / "LABELS").mkdir(parents=True, exist_ok=True)
    bgr = np.dstack([22 - red, 300 + red, red])
    assert cv2.imwrite(str(root / "GT" / "LABELS" / f"{stem}.png"), bgr)
    return root


def png_48_bits(pixels):
    """(H, W, 3) uint16 RGB -> the bytes of a PNG, written out by the format's definition (no filter, big-endian)."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
        for kind, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_synthia_class_lies_in_the_first_of_three_16_bit_channels(tmp_path):
    data = Synthia(root=drawn_frame(tmp_path, "0000000"))
    assert row(data) == SYNTHIA
    red = np.array([range(23)] * 4)
    path = tmp_path / "GT" / "LABELS" / "0000000.png"
    path.write_bytes(png_48_bits(np.dstack([red, 1000 + red, 22 - red])))
    assert row(data) == SYNTHIA
    path.write_bytes(png_48_bits(np.dstack([red + 256, 0 * red, 0 * red])))  # both bytes count
    with pytest.raises(DataError, match=r"0000000.png holds the ids \[256, 257,"):
        data[0]


@pytest.mark.parametrize("name", ["0000000.png", "0000000_labelTrainIds.png"])
def test_synthia_mapped_labels_are_not_mapped_twice(tmp_path, name):
    picture(tmp_path / "RGB" / "0000000.png", len(CONVERTED))
    path = grey(tmp_path / "GT" / "LABELS" / name, CONVERTED)
    data = Synthia(root=tmp_path)
    assert row(data) == CONVERTED
    palette_png(path, CONVERTED)
    assert row(data) == CONVERTED
    grey(path, [*range(3, 23)])
    with pytest.raises(
        DataError, match=rf"{name} holds the ids \[19, 20, 21, 22\].*converted to class ids"
    ):
        data[0]


def test_synthia_prefers_the_official_label(tmp_path):
    drawn_frame(tmp_path, "0000000")
    grey(tmp_path / "GT" / "LABELS" / "0000000_labelTrainIds.png", [0] * 23)
    assert row(Synthia(root=tmp_path)) == SYNTHIA


def test_synthia_labels_in_other_formats_are_refused_by_name(tmp_path):
    data, path = (
        Synthia(root=drawn_frame(tmp_path, "0000000")),
        tmp_path / "GT" / "LABELS" / "0000000.png",
    )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read the label .*GT/LABELS/0000000.png"):
            data[0]
    picture(path, 23)  # GT/COLOR, for instance
    with pytest.raises(DataError, match=r"GT/LABELS/0000000.png is a colour picture"):
        data[0]
    Image.fromarray(np.zeros((4, 23), np.uint16)).save(path)
    with pytest.raises(
        DataError, match=r"GT/LABELS/0000000.png is no label of SYNTHIA: 16 bits with 3 channels"
    ):
        data[0]
    cv2.imwrite(str(path), np.zeros((4, 23, 4), np.uint16))
    with pytest.raises(DataError, match=r"GT/LABELS/0000000.png"):
        data[0]


# --- lists of GTA5 and SYNTHIA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data, write", [(GTA5, game_frame), (Synthia, drawn_frame)])
def test_all_is_every_image_and_lists_are_splits(tmp_path, data, write):
    for stem in ("0003", "0001", "0002"):
        write(tmp_path, stem)
    assert (
        stems(data(root=tmp_path))
        == stems(data(root=tmp_path, split="all"))
        == ["0001", "0002", "0003"]
    )
    with pytest.raises(
        DataError, match=rf"{data.__name__} has no split 'train' and no list .*; there are: all$"
    ):
        data(root=tmp_path, split="train")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "few.txt").write_text("0003\n\n0001\n")
    few = data(root=tmp_path, split="few")
    assert stems(few) == ["0003", "0001"] and few.samples[0][1].name == "0003.png"
    with pytest.raises(DataError, match=r"no split 'train' and no list .*; there are: all, few$"):
        data(root=tmp_path, split="train")
    (tmp_path / "lists" / "few.txt").write_text("0003\n0009\n")
    with pytest.raises(DataError, match=r"1 of 2 images do not exist, such as .*0009.png"):
        data(root=tmp_path, split="few")
    for label in tmp_path.rglob("L*/0002.png" if data is Synthia else "labels/0002.png"):
        label.unlink()
    with pytest.raises(DataError, match=r"1 of 3 labels do not exist, such as .*/0002.png"):
        data(root=tmp_path)


# --- ACDC ------------------------------------------------------------------------------------------------------------


def weather_frame(root, condition, frame, ids=CONVERTED, kind="labelTrainIds", split="val"):
    sequence = frame.split("_")[0]
    ref = "_ref" if split.endswith("_ref") else ""
    picture(
        root / "rgb_anon" / condition / split / sequence / f"{frame}_rgb{ref}_anon.png", len(ids)
    )
    if kind and not ref:
        grey(root / "gt" / condition / split / sequence / f"{frame}_gt_{kind}.png", ids)
    return root


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


# --- BDD100K ---------------------------------------------------------------------------------------------------------


def drive_frame(root, name, newer, ids=CONVERTED, split="val"):
    images, labels, suffix = (
        ("images/10k", "labels/sem_seg/masks", "") if newer else ("images", "labels", "_train_id")
    )
    picture(root / images / split / f"{name}.jpg", len(ids))
    grey(root / labels / split / f"{name}{suffix}.png", ids)
    return root


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


# --- Mapillary Vistas ------------------------------------------------------------------------------------------------

# The train ids of the ids 0 to 65, ten to a line; a dot is ignore.
VISTAS = {
    "strict": """
        .  .  1  4  .  .  3  .  .  .
        .  .  .  0  .  1  .  2  .  11
        12 12 12 .  0  .  .  10 .  9
        8  .  .  .  .  .  .  .  .  .
        .  0  .  .  .  5  .  5  6  .
        7  .  18 .  15 13 .  17 16 .
        .  14 .  .  .  .
    """,
    "wide": """
        .  .  1  4  .  .  3  0  0  1
        0  1  .  0  0  1  .  2  .  11
        12 12 12 0  0  .  .  10 .  9
        8  .  .  .  .  .  .  .  .  .
        .  .  .  .  5  5  7  5  6  7
        7  .  18 .  15 13 .  17 16 .
        .  14 .  .  .  .
    """,
}
VISTAS = {
    name: [255 if cell == "." else int(cell) for cell in text.split()]
    for name, text in VISTAS.items()
}
VISTAS_IDS = [*range(66)]


def vista(root, name="_1Gn_xkw7sa_i9GU4mkxxQ", ids=VISTAS_IDS, labels="labels", split="validation"):
    picture(root / split / "images" / f"{name}.jpg", len(ids))
    if labels:
        palette_png(root / split / labels / f"{name}.png", ids)
    return root


@pytest.mark.parametrize("ids", VISTAS)
@pytest.mark.parametrize("labels", ["labels", "v1.2/labels"])
def test_mapillary_maps_all_66_ids_in_both_arrangements(tmp_path, ids, labels):
    assert len(VISTAS[ids]) == 66 and {*VISTAS[ids]} == {*range(19), 255}
    assert (
        row(Mapillary(root=vista(tmp_path, labels=labels), split="validation", ids=ids))
        == VISTAS[ids]
    )
    vista(tmp_path, labels=labels, split="training")
    assert row(Mapillary(root=tmp_path, ids=ids)) == VISTAS[ids]


def test_mapillary_reads_the_strict_ids_unless_told_otherwise(tmp_path):
    assert (
        row(Mapillary(root=vista(tmp_path), split="validation"))
        == VISTAS["strict"]
        != VISTAS["wide"]
    )
    with pytest.raises(ConfigError, match="option 'ids' must be strict or wide, not 'broad'"):
        build("datasets", {"name": "mapillary.Mapillary", "ids": "broad"}, root=tmp_path)


def test_mapillary_labels_of_version_2_are_never_read(tmp_path):
    vista(tmp_path, labels="v2.0/labels", ids=[21] * 66)
    with pytest.raises(
        DataError,
        match=r"validation has labels of v2.0 alone, whose ids differ; those of v1.2 are read",
    ):
        Mapillary(root=tmp_path, split="validation")
    assert len(Mapillary(root=tmp_path, split="validation", labels=False)) == 1
    vista(tmp_path, labels="v1.2/labels")
    assert row(Mapillary(root=tmp_path, split="validation")) == VISTAS["strict"]
    vista(tmp_path / "moved", ids=[0, 123])  # v2.0 in the place of the original release
    with pytest.raises(
        DataError, match=r"labels/_1Gn.*png holds the id 123, but v1.2 has 0 to 65: labels of v2.0"
    ):
        Mapillary(root=tmp_path / "moved", split="validation")[0]


def test_mapillary_missing_labels_and_splits_are_named(tmp_path):
    vista(vista(tmp_path, "b", labels="v1.2/labels"), "a", labels=None)
    with pytest.raises(
        DataError, match=r"Mapillary validation: 1 of 2 labels .*validation/v1.2/labels/a.png"
    ):
        Mapillary(root=tmp_path, split="validation")
    vista(tmp_path, labels=None, split="testing")
    with pytest.raises(
        DataError, match=r"1 of 1 labels do not exist, such as .*testing/labels/_1Gn.*png"
    ):
        Mapillary(root=tmp_path, split="testing")
    assert {*row(Mapillary(root=tmp_path, split="testing", labels=False))} == {255}
    with pytest.raises(
        DataError, match=r"Mapillary has no split 'val': the folders in .* are testing, validation$"
    ):
        Mapillary(root=tmp_path, split="val")


def test_mapillary_converted_labels_are_train_ids(tmp_path):
    vista(tmp_path, "a", CONVERTED)
    grey(tmp_path / "train_ids" / "validation" / "a.png", CONVERTED)
    options = {"root": tmp_path, "split": "validation", "train_ids": "train_ids/{split}"}
    assert row(Mapillary(**options)) == row(Mapillary(ids="wide", **options)) == CONVERTED
    assert row(Mapillary(root=tmp_path, split="validation", labels=False)) == [255] * 20
    grey(tmp_path / "train_ids" / "validation" / "a.png", range(20))
    with pytest.raises(DataError, match=r"a.png holds the ids \[19\].*converted to class ids"):
        Mapillary(**options)[0]
    with pytest.raises(
        DataError, match=r"a.png holds the id 255, .* set train_ids to their folder"
    ):
        Mapillary(
            root=grey(tmp_path / "validation" / "labels" / "a.png", CONVERTED).parents[2],
            split="validation",
        )[0]


def big(root, width=60, height=40):
    """Stripes of one pixel, black and white; the label is road on the left half, sky on the right."""
    stripes = np.zeros((height, width, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(
        (vista(root, "a") / "validation" / "images" / "a.jpg"), quality=100, subsampling=0
    )
    save(
        root / "validation" / "labels" / "a.png",
        np.repeat([[13] * (width // 2) + [27] * (width // 2)], height, 0),
    )
    return {"root": root, "split": "validation"}


def test_mapillary_long_side_reduces_image_and_label_alike(tmp_path):
    options = big(tmp_path)
    for long_side, size in (
        (0, (40, 60)),
        (60, (40, 60)),
        (2048, (40, 60)),
        (30, (20, 30)),
        (20, (13, 20)),
    ):
        data = Mapillary(long_side=long_side, **options)
        image, label = data.load(0)
        assert (
            image.shape == (*size, 3)
            and label.shape == size
            and image.dtype == label.dtype == np.uint8
        )
        assert np.array_equal(data.load_label(0), label)
        assert (label[:, : size[1] // 2] == 0).all() and (label[:, size[1] // 2 :] == 10).all()
        if (
            size[1] < 60
        ):  # without antialiasing every second or third column would be black or white
            assert abs(image[:, 1:-1].astype(float) - 127.5).max() < 30
        else:
            assert image[:, ::2].min() > 200 and image[:, 1::2].max() < 50


def test_mapillary_reduced_portraits_keep_their_ratio_and_take_the_labels_in_the_middle(tmp_path):
    ids = np.full((60, 36), 65)
    ids[2::5] = np.arange(13, 25)[:, None]  # the middle row of each five
    save(tmp_path / "validation" / "images" / "a.jpg", np.zeros((60, 36, 3)))
    save(tmp_path / "validation" / "labels" / "a.png", ids)
    data = Mapillary(root=tmp_path, split="validation", long_side=12)
    image, label = data.load(0)
    assert image.shape == (12, 7, 3) and label[:, 3].tolist() == VISTAS["strict"][13:25]


def test_mapillary_maps_and_counts_have_the_reduced_size(tmp_path):
    options = big(tmp_path / "data")
    full, half = Mapillary(**options), Mapillary(long_side=30, **options)
    for size, data in (((40, 60), full), ((20, 30), half)):
        save(tmp_path / str(size[0]) / "validation" / "images" / "a.png", np.full(size, 7))
        data.extra["map"] = tmp_path / str(size[0])
        assert data[0]["extra"]["map"].shape == size
    half.extra["map"] = tmp_path / "40"
    with pytest.raises(DataError, match=r"sizes differ: .*a.jpg is 30x20, .*a.png is 60x40"):
        half[0]
    counts = [class_counts(data, tmp_path / "cache")[0].tolist() for data in (full, half, full)]
    assert [count[0] for count in counts] == [1200, 300, 1200] and len(
        {full.label_key(), half.label_key()}
    ) == 2


def test_mapillary_labels_of_another_shape_are_errors_at_any_size(tmp_path):
    options = big(tmp_path)
    save(tmp_path / "validation" / "labels" / "a.png", np.zeros((50, 60)))
    for long_side in (0, 30):
        with pytest.raises(DataError, match=r"sizes differ: .*images/a.jpg is .*labels/a.png is"):
            Mapillary(long_side=long_side, **options)[0]
    with pytest.raises(ConfigError, match="'long_side' must be an int of at least 0, not -1"):
        build("datasets", {"name": "mapillary.Mapillary", "long_side": -1}, root=tmp_path)


# --- Dark Zurich -----------------------------------------------------------------------------------------------------


def zurich_frame(root, split, time, frame="GOPR0356_frame_000321", ids=CONVERTED, kind=None):
    sequence = frame.split("_")[0] + ("_ref" if split.endswith("_ref") else "")
    picture(root / "rgb_anon" / split / time / sequence / f"{frame}_rgb_anon.png", len(ids))
    if kind:
        grey(root / "gt" / split / time / sequence / f"{frame}_gt_{kind}.png", ids)
    return root


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


# --- ADE20K ----------------------------------------------------------------------------------------------------------


def scene(root, name="ADE_train_00000001", ids=range(151), split="training", labels=True):
    picture(root / "images" / split / f"{name}.jpg", len(ids))
    if labels:
        grey(root / "annotations" / split / f"{name}.png", [*ids])
    return root


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


# --- COCO-Stuff ------------------------------------------------------------------------------------------------------

NEVER = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]  # of COCO's ids 1 to 182
COCO_IDS = [i for i in range(182) if i + 1 not in NEVER]  # in the maps


def photo(root, name, split, ids, folder="annotations", suffix="", images="images/"):
    picture(root / f"{images}{split}" / f"{name}.jpg", len(ids))
    if folder:
        grey(root / folder / split / f"{name}{suffix}.png", [*ids])
    return root


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


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def bit_rule(i):
    """Colour i of VOC's development kit: the bits of i go to red, green and blue in turn, from the highest down."""
    bits = [i >> b & 1 for b in range(24)]
    return tuple(sum(bits[3 * k + channel] << (7 - k) for k in range(8)) for channel in range(3))


def voc_image(home, name, ids=(*range(21), 255), folder="SegmentationClass"):
    picture(home / "JPEGImages" / f"{name}.jpg", len(ids))
    if folder:
        palette_png(home / folder / f"{name}.png", [*ids])


def voc_list(home, split, *lines):
    (home / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(lines) + "\n")


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


# --- what all of them share ------------------------------------------------------------------------------------------

WRITERS = {
    Cityscapes: lambda root: city_frame(root, "ulm_000000_000019"),
    GTA5: lambda root: game_frame(root, "00001"),
    Synthia: lambda root: drawn_frame(root, "0000001"),
    ACDC: lambda root: [
        weather_frame(root, c, "GP1_frame_000001", split="train") for c in acdc.CONDITIONS
    ],
    BDD100K: lambda root: drive_frame(root, "a", newer=True, split="train"),
    Mapillary: lambda root: vista(root, split="training"),
}


@pytest.mark.parametrize("data", WRITERS)
def test_unlabelled_targets_never_look_at_labels(tmp_path, data, monkeypatch):
    WRITERS[data](tmp_path)
    for path in [
        p for p in tmp_path.rglob("*.png") if {"gtFine", "labels", "GT", "gt"} & {*p.parts}
    ]:
        path.unlink()
    monkeypatch.setattr(cityscapes, "existing", None)  # a call would fail
    monkeypatch.setattr(gta5, "existing", None)
    monkeypatch.setattr(acdc, "existing", None)
    monkeypatch.setattr(bdd100k, "existing", None)
    unlabelled = data(root=tmp_path, labels=False)
    assert len(unlabelled) > 0 and all(label is None for _, label in unlabelled.samples)
    assert all(label is None for _, label in unlabelled.pairs())
    assert {*row(unlabelled)} == {255}


@pytest.mark.parametrize("data", WRITERS)
def test_all_of_them_can_ignore_classes(tmp_path, data):
    WRITERS[data](tmp_path)
    plain = row(data(root=tmp_path))
    assert (
        row(data(root=tmp_path, ignore=["road"])) == [255 if i == 0 else i for i in plain] != plain
    )


OTHERS = {
    ADE20K: ("training", scene),
    CocoStuff10k: (
        "train2014",
        lambda root: photo(root, "a", "train2014", range(172), suffix="_labelTrainIds"),
    ),
    CocoStuff164k: (
        "val2017",
        lambda root: photo(root, "a", "val2017", COCO_IDS, "stuffthingmaps"),
    ),
    VOC: ("train", lambda root: [voc_image(root, "a"), voc_list(root, "train", "a")]),
    DarkZurich: ("val", lambda root: zurich_frame(root, "val", "night", kind="labelTrainIds")),
}


@pytest.mark.parametrize("data", OTHERS)
def test_others_ignore_classes_and_never_look_at_labels_without_them(tmp_path, data):
    split, write = OTHERS[data]
    write(tmp_path)
    plain = row(data(root=tmp_path, split=split))
    assert row(data(root=tmp_path, split=split, ignore=[data.CLASSES[1]])) == [
        255 if i == 1 else i for i in plain
    ]
    assert 1 in plain and {*plain} >= {*range(len(data.CLASSES))}
    for path in tmp_path.rglob("*.png"):
        if "rgb_anon" not in path.parts:
            path.unlink()
    with pytest.raises(DataError, match="1 of 1 labels do not exist"):
        data(root=tmp_path, split=split)
    assert {*row(data(root=tmp_path, split=split, labels=False))} == {255}


# --- the classes of another label space ------------------------------------------------------------------------------

AS_CAMVID = {
    "Sky": ["sky"],
    "Building": ["building"],
    "Pole": ["pole"],
    "Road": ["road"],
    "Pavement": ["sidewalk"],
    "Tree": ["vegetation"],
    "SignSymbol": ["traffic light", "traffic sign"],
    "Fence": ["wall", "fence"],
    "Car": ["car", "truck", "bus"],
    "Pedestrian": ["person"],
    "Bicyclist": ["rider", "bicycle"],
}
IN_CAMVID = [3, 4, 1, 7, 7, 2, 6, 6, 5, 255, 0, 9, 10, 8, 8, 8, 255, 255, 10]  # of the train ids


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


def test_maps_to_another_label_space_compose_with_those_of_the_data_sets(tmp_path):
    for data in (BDD100K, Mapillary):
        WRITERS[data](tmp_path / data.__name__)
        own = row(data(root=tmp_path / data.__name__))
        assert row(data(root=tmp_path / data.__name__, label_space=AS_CAMVID)) == [
            255 if i == 255 else IN_CAMVID[i] for i in own
        ]


# --- configurations --------------------------------------------------------------------------------------------------


def configured(tmp_path, *bases):
    text = f"base: [{', '.join(str(ROOT / 'configs' / 'base' / f'{b}.yaml') for b in bases)}]\n"
    (tmp_path / "x.yaml").write_text(text)
    return load(tmp_path / "x.yaml", [])


def test_configurations_build_the_data_sets_that_they_name(tmp_path):
    for split in ("train", "val"):
        city_frame(tmp_path, "ulm_000000_000019", split=split)
    for condition in acdc.CONDITIONS:
        weather_frame(tmp_path, condition, "GP1_frame_000001")
    game_frame(tmp_path, "00001")
    drawn_frame(tmp_path, "0000001")
    found = {}
    for base in ("cityscapes", "gta5", "synthia", "acdc"):
        data = configured(tmp_path, base).data
        specs = {"train": data.train, "val": data.val, **data.test}
        for name, spec in specs.items():
            if spec["name"] != "none":
                assert spec["root"] == f"data/{base}"
                made = build("datasets", {**spec, "root": str(tmp_path)}, root=None, seed=0)
                found[base, name] = type(made), made.split, len(made)
    assert found == {
        ("cityscapes", "train"): (Cityscapes, "train", 1),
        ("cityscapes", "val"): (Cityscapes, "val", 1),
        ("cityscapes", "cityscapes"): (Cityscapes, "val", 1),
        ("gta5", "train"): (GTA5, "all", 1),
        ("synthia", "train"): (Synthia, "all", 1),
        **{("acdc", f"acdc_{condition}"): (ACDC, "val", 1) for condition in acdc.CONDITIONS},
    }
    conditions = {
        name: spec["condition"] for name, spec in configured(tmp_path, "acdc").data.test.items()
    }
    assert conditions == {f"acdc_{c}": c for c in acdc.CONDITIONS}


def test_configurations_can_be_joined(tmp_path):
    cfg = configured(tmp_path, "cityscapes", "synthia", "acdc")
    assert cfg.data.train == {"name": "synthia.Synthia", "split": "all", "root": "data/synthia"}
    assert cfg.data.val["name"] == "cityscapes.Cityscapes"
    assert {*cfg.data.test} == {"cityscapes", "acdc_fog", "acdc_night", "acdc_rain", "acdc_snow"}
    assert cfg.eval.subsets == synthia.SUBSETS
    assert configured(tmp_path, "cityscapes", "gta5").data.train == {
        "name": "gta5.GTA5",
        "split": "all",
        "root": "data/gta5",
    }


PHOTOGRAPHS = {
    "ade20k": lambda root: [scene(root), scene(root, "ADE_val_00000001", split="validation")],
    "cocostuff10k": lambda root: [
        photo(root, "a", split, range(172), suffix="_labelTrainIds")
        for split in ("train2014", "test2014")
    ],
    "voc": lambda root: [
        [voc_image(root, split), voc_list(root, split, split)] for split in ("train_aug", "val")
    ],
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_read_augmented_counted_and_drawn_as_configured(
    tmp_path, name, capsys, monkeypatch
):
    PHOTOGRAPHS[name](tmp_path / "data")
    monkeypatch.setattr(check, "tqdm", lambda items, **_: items)
    options = [f"data.root={tmp_path / 'data'}", f"folder={tmp_path / 'run'}", "data.workers=0"]
    check.main([str(ROOT / "configs" / "base" / f"{name}.yaml"), *options])
    printed, classes = (
        capsys.readouterr().out,
        {"ade20k": 150, "cocostuff10k": 171, "voc": 21}[name],
    )
    assert (
        printed.count("problems: 0") == 3
        and f" {classes - 1:3} " in printed
        and "never occur" not in printed
    )
    drawn = {path.name for path in (tmp_path / "run" / "check").iterdir()}
    assert drawn == {"train.png", "val.png", f"test.{name}.png", "augmented.png"}
    cfg = configured(tmp_path, name)
    sample = build(
        "datasets",
        cfg.data.train,
        root=str(tmp_path / "data"),
        augment=build("datasets", cfg.data.augment),
    )
    assert sample[0]["image"].shape == (3, 512, 512) and cfg.eval.short_side == 512


def test_counts_are_kept_apart_by_data_set_split_ids_and_label_space(tmp_path):
    """One folder that two readers can read, in two splits, with two meanings of its ids."""
    photo(tmp_path / "a", "x", "val2017", [1, 1, 12, 255])
    photo(tmp_path / "a", "y", "train2017", [1, 2, 12, 255])
    space = {"one": ["bicycle"], "others": [n for n in cocostuff.CLASSES if n != "bicycle"]}
    options = [
        (CocoStuff164k, {"split": "val2017"}, [0, 2]),
        (CocoStuff164k, {"split": "train2017"}, [0, 1, 1]),
        (CocoStuff164k, {"split": "val2017", "ignore": ["bicycle"]}, []),
        (CocoStuff164k, {"split": "val2017", "label_space": space}, [2, 1]),
        (BDD100K, {"split": "val"}, []),
    ]
    grey(tmp_path / "a" / "labels" / "val" / "x_train_id.png", [18, 255])
    picture(tmp_path / "a" / "images" / "val" / "x.jpg", 2)
    keys = set()
    for reader, keywords, starts in options * 2:
        data = reader(root=tmp_path / "a", **keywords)
        counts = class_counts(data, tmp_path / "cache")
        keys.add(data.label_key())
        assert (
            counts.shape == (1, len(data.CLASSES))
            and (counts[0, : len(starts)] == 4 * np.array(starts)).all()
        )
    assert len(keys) == len(options) == len([*(tmp_path / "cache").iterdir()])
