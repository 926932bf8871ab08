"""Tiny data sets of tests: pictures, labels, and a reader of them."""

import numpy as np
from PIL import Image

from datasets.base import SegmentationData
from tests.runs import ROOT

REAL = ROOT.parent / "shared" / "data" / "camvid"

SIZE = (8, 12)  # height, width


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def picture(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def rows(*values):
    """A label whose rows repeat the values: ids, or colours."""
    columns = np.array(values, np.uint8)[np.arange(SIZE[0]) % len(values)]
    return np.repeat(columns[:, None], SIZE[1], axis=1)


def column(label):
    return label[:, 0].tolist()


class Files(SegmentationData):
    """Three classes, `images/*` beside `labels/*.png`."""

    CLASSES, PALETTE = ("a", "b", "c"), ((1, 0, 0), (2, 0, 0), (3, 0, 0))

    def pairs(self):
        return [
            (p, self.root / "labels" / f"{p.stem}.png")
            for p in sorted((self.root / "images").glob("*"))
        ]


def files(root, count=3, ids=(0, 1, 2, 255)):
    for i in range(count):
        save(root / "images" / f"{i}.png", picture(i))
        save(root / "labels" / f"{i}.png", rows(*ids))
    return root


def spaced(root, space, **options):
    return Files(root=root, label_space=space, **options)


def with_maps(dataset, folder, maps, name="map"):
    """Store a map of every sample under its stem and hand the folder to the data set."""
    for index, values in enumerate(maps):
        save(folder / f"{dataset.stem(index)}.png", values)
    dataset.extra[name] = folder
    return dataset


SPARE = 50  # seeds of the pictures that stand for stylised ones


def styled(root, names, size=SIZE):
    for i, name in enumerate(names):
        save(root / name, picture(SPARE + i, size))
    return str(root)


def shows(dataset, index, seed):
    return np.array_equal(dataset[index]["image"].permute(1, 2, 0), picture(seed))


LAYOUTS = {
    "acdc.ACDC": "rgb_anon/fog/train/GP1/1_rgb_anon.png",
    "ade20k.ADE20K": "images/train/1.jpg",
    "bdd100k.BDD100K": "images/10k/train/1.jpg",
    "camvid.CamVid": "images/train/1.png",
    "cityscapes.Cityscapes": "leftImg8bit/train/ulm/1_leftImg8bit.png",
    "cocostuff.CocoStuff10k": "images/train/1.jpg",
    "cocostuff.CocoStuff164k": "images/train/1.jpg",
    "dark_zurich.DarkZurich": "rgb_anon/train/night/GOPR1/1_rgb_anon.png",
    "folder.Folder": "images/train/1.jpg",
    "gta5.GTA5": "images/1.png",
    "labelmefacade.LabelMeFacade": "images/train/1.jpg",
    "mapillary.Mapillary": "training/images/1.jpg",
    "synthia.Synthia": "RGB/1.png",
    "voc.VOC": "JPEGImages/1.jpg",
}


def laid_out(root, name):
    """One picture in the layout of a data set, and the list that VOC needs."""
    save(root / LAYOUTS[name], picture())
    if name == "voc.VOC":
        (root / "ImageSets" / "Segmentation").mkdir(parents=True)
        (root / "ImageSets" / "Segmentation" / "train.txt").write_text("1")


def with_lists(root):
    for split, stem in (
        ("train", "0001TP_006690"),
        ("train", "0006R0_f00930"),
        ("test", "Seq05VD_f00000"),
    ):
        save(root / "images" / split / f"{stem}.jpg", picture())
        save(root / "labels" / split / f"{stem}.png", rows(0, 10, 255))
    (root / "lists").mkdir()
    (root / "lists" / "train_dusk.txt").write_text("train/0001TP_006690\n")
    return root


CLASSES = ["road", "building", "car"]


def mine(root, split="train", names=("a", "b"), ids=(0, 1, 2)):
    for i, name in enumerate(names):
        save(root / "images" / split / f"{name}.jpg", picture(i))
        save(root / "labels" / split / f"{name}.png", rows(*ids))
    return root
