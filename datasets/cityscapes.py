"""Cityscapes with 19 classes (Cordts et al., 2016): 2975 train, 500 val, 1525 test frames of
2048x1024 from 50 cities.

    data:
      root: PATH
      train: {name: cityscapes.Cityscapes, split: train}
      val: {name: cityscapes.Cityscapes, split: val}

    leftImg8bit/<split>/<city>/*_leftImg8bit.png
    gtFine/<split>/<city>/*_gtFine_labelIds.png         official: ids 0-33, mapped to train ids here
    gtFine/<split>/<city>/*_gtFine_labelTrainIds.png    converted by its scripts; read where
                                                        labelIds is missing

The labels of test are dummies; the benchmark server wants predictions as ids again:
`TRAIN_IDS[train id]`. SYNTHIA -> Cityscapes has two conventions (datasets/synthia.py): by default
all 19 classes are labels (A); with `ignore: [terrain, truck, train]` the pixels of the classes that
SYNTHIA lacks are not scored (B).
"""

from datasets.base import IGNORE, SegmentationData
from datasets.reading import files_below

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
TRAIN_IDS = dict(
    enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))
)
# The other ids are void; 255 is -1, license plate, in 8 bits.
ID_MAP = {raw: IGNORE for raw in (*range(34), 255)} | {
    raw: train_id for train_id, raw in TRAIN_IDS.items()
}


def existing(*paths):
    """The first of the paths that is a file; else the first, which the data set then reports as
    missing."""
    return next((path for path in paths if path.is_file()), paths[0])


def has_train_ids(path):
    return path.name.endswith("_labelTrainIds.png")


class Cityscapes(SegmentationData):
    """Args: split: train | val | test, or another folder of `leftImg8bit`."""

    CLASSES, PALETTE, ID_MAP = CLASSES, PALETTE, ID_MAP

    def images(self):
        folder = self.split_folder(self.root / "leftImg8bit")
        return files_below(folder, ["_leftImg8bit.png"], depth=2)

    def label_of(self, image):
        folder = self.root / "gtFine" / self.split / image.parent.name
        stem = image.name.removesuffix("_leftImg8bit.png")
        return existing(
            *(folder / f"{stem}_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds"))
        )

    def is_mapped(self, path, ids):
        return has_train_ids(path)
