"""SYNTHIA-RAND-CITYSCAPES (Ros et al., 2016): 9,400 drawn street scenes of 1280x760, with 16 of
Cityscapes' 19 classes.

    data: {root: PATH, train: {name: synthia.Synthia}}

    RGB/0000000.png ... 0009399.png
    GT/LABELS/0000000.png ...           official: 16 bits, 3 channels: the class in the first,
                                        instances in the second
    GT/LABELS/*_labelTrainIds.png       converted to train ids; read where the official label is
                                        missing
    lists/<split>.txt                   optional: one stem per line

Labels of 8 bits and one channel, under either name, are train ids already and are not mapped again.

Terrain, truck and train do not occur. Scores on Cityscapes follow one of two conventions; say
which:

    A   labels of 19 classes, the mean over a subset of the IoUs: `eval.subsets` = SUBSETS
        (BiSMAP, BCL, DAFormer)
    B   also, pixels of the three classes are ignored: Cityscapes with
        `ignore: [terrain, truck, train]` (ProDA)
"""

import cv2
import numpy as np

from datasets.base import IGNORE
from datasets.cityscapes import CLASSES
from datasets.gta5 import GTA5
from datasets.reading import DataError, depths, opened

ABSENT = ("terrain", "truck", "train")
SUBSETS = {
    "mIoU16": [name for name in CLASSES if name not in ABSENT],
    "mIoU13": [name for name in CLASSES if name not in (*ABSENT, "wall", "fence", "pole")],
}
ID_MAP = {
    0: IGNORE,  # void
    1: 10,  # sky
    2: 2,  # building
    3: 0,  # road
    4: 1,  # sidewalk
    5: 4,  # fence
    6: 8,  # vegetation
    7: 5,  # pole
    8: 13,  # car
    9: 7,  # traffic sign
    10: 11,  # pedestrian
    11: 18,  # bicycle
    12: 17,  # motorcycle
    13: IGNORE,  # parking slot
    14: IGNORE,  # road work
    15: 6,  # traffic light
    16: 9,  # terrain
    17: 12,  # rider
    18: 14,  # truck
    19: 15,  # bus
    20: 16,  # train
    21: 3,  # wall
    22: IGNORE,  # lane marking
}


class Synthia(GTA5):
    """Args: split: all, or the stem of a file in `lists/`."""

    ID_MAP = ID_MAP
    SCORED = tuple(SUBSETS["mIoU16"])
    KNOWN_BAD = {}  # noqa: RUF012
    FOLDERS = ("RGB", "GT/LABELS")

    def read_label(self, path):
        with opened(path, "label") as picture:
            official = picture.mode == "RGB" and depths(picture)[1] == 65535
            if official:
                picture.verify()  # OpenCV returns damaged files half filled
        if official:  # Pillow keeps the high bytes, OpenCV both
            pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if pixels is None:
                raise DataError(f"cannot read the label {path}: OpenCV does not decode it")
            return pixels[..., -1]  # (H, W): its order is BGR
        ids = super().read_label(path)
        if ids.dtype != np.uint8:
            raise DataError(
                f"{path} is no label of SYNTHIA: 16 bits with 3 channels, or 8 bits with one and "
                "train ids"
            )
        return ids

    def is_mapped(self, path, ids):
        return ids.dtype == np.uint8
