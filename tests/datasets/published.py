"""Tiny files in the official formats of published data sets."""

import cv2
import numpy as np
from PIL import Image

from tests.datasets.files import save
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


def grey(path, ids):
    """8-bit grey PNG with four rows of these ids."""
    return save(path, [ids] * 4)


def row(data, index=0):
    """The labels of one row, all rows being equal."""
    label = data[index]["label"].numpy()
    assert (label == label[0]).all()
    return label[0].tolist()


def city_frame(root, frame, ids=RAW, kind="labelIds", split="train"):
    city = frame.split("_")[0]
    picture(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", len(ids))
    if kind:
        grey(root / "gtFine" / split / city / f"{frame}_gtFine_{kind}.png", ids)
    return root


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


def drawn_frame(root, stem, ids=range(23)):
    """16-bit RGB: the class in red, the instance in green, and ids of other classes in blue."""
    red = np.array([list(ids)] * 4, np.uint16)
    picture(root / "RGB" / f"{stem}.png", red.shape[1])
    (root / "GT" / "LABELS").mkdir(parents=True, exist_ok=True)
    bgr = np.dstack([22 - red, 300 + red, red])
    assert cv2.imwrite(str(root / "GT" / "LABELS" / f"{stem}.png"), bgr)
    return root


def weather_frame(root, condition, frame, ids=CONVERTED, kind="labelTrainIds", split="val"):
    sequence = frame.split("_")[0]
    ref = "_ref" if split.endswith("_ref") else ""
    picture(
        root / "rgb_anon" / condition / split / sequence / f"{frame}_rgb{ref}_anon.png", len(ids)
    )
    if kind and not ref:
        grey(root / "gt" / condition / split / sequence / f"{frame}_gt_{kind}.png", ids)
    return root


def drive_frame(root, name, newer, ids=CONVERTED, split="val"):
    images, labels, suffix = (
        ("images/10k", "labels/sem_seg/masks", "") if newer else ("images", "labels", "_train_id")
    )
    picture(root / images / split / f"{name}.jpg", len(ids))
    grey(root / labels / split / f"{name}{suffix}.png", ids)
    return root


VISTAS_IDS = [*range(66)]


def vista(root, name="_1Gn_xkw7sa_i9GU4mkxxQ", ids=VISTAS_IDS, labels="labels", split="validation"):
    picture(root / split / "images" / f"{name}.jpg", len(ids))
    if labels:
        palette_png(root / split / labels / f"{name}.png", ids)
    return root


def zurich_frame(root, split, time, frame="GOPR0356_frame_000321", ids=CONVERTED, kind=None):
    sequence = frame.split("_")[0] + ("_ref" if split.endswith("_ref") else "")
    picture(root / "rgb_anon" / split / time / sequence / f"{frame}_rgb_anon.png", len(ids))
    if kind:
        grey(root / "gt" / split / time / sequence / f"{frame}_gt_{kind}.png", ids)
    return root


def scene(root, name="ADE_train_00000001", ids=range(151), split="training", labels=True):
    picture(root / "images" / split / f"{name}.jpg", len(ids))
    if labels:
        grey(root / "annotations" / split / f"{name}.png", [*ids])
    return root


NEVER = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]  # of COCO's ids 1 to 182
COCO_IDS = [i for i in range(182) if i + 1 not in NEVER]  # in the maps


def photo(root, name, split, ids, folder="annotations", suffix="", images="images/"):
    picture(root / f"{images}{split}" / f"{name}.jpg", len(ids))
    if folder:
        grey(root / folder / split / f"{name}{suffix}.png", [*ids])
    return root


def voc_image(home, name, ids=(*range(21), 255), folder="SegmentationClass"):
    picture(home / "JPEGImages" / f"{name}.jpg", len(ids))
    if folder:
        palette_png(home / folder / f"{name}.png", [*ids])


def voc_list(home, split, *lines):
    (home / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(lines) + "\n")


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
