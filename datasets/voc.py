"""Pascal VOC 2012 (Everingham et al., 2010) with 21 classes, background among them: 1464 train,
1449 val photographs.

    data:
      root: PATH                            # the folder VOC2012, VOCdevkit, or what holds it
      train: {name: voc.VOC, split: train_aug}
      val: {name: voc.VOC, split: val}

    JPEGImages/*.jpg
    SegmentationClass/*.png                 palette PNGs whose indices are the classes; 255 is the
                                            border and ignored
    SegmentationClassAug/*.png              labels of Hariharan et al. (SBD, ICCV 2011) in the same
                                            ids, grey or palette
    ImageSets/Segmentation/<split>.txt      train, val, trainval, test ... : a name per line, or
                                            image and label file

`train_aug`, 10,582 images, is the training set of most papers since DeepLab. Both arrangements in
use are read: `train_aug.txt` or `trainaug.txt` with all labels in SegmentationClassAug, and
`train.txt` with `aug.txt`, where SegmentationClassAug has those of the second list alone; a label
that is missing there is taken from SegmentationClass.

The layout of SBD beside VOC, train_aug's number and that test has 1456 images without public labels
(`labels: false`) are from general knowledge, as are names and palette, which follows the bit rule
of VOC's development kit.
"""

import re
from pathlib import Path

from datasets.base import SegmentationData
from datasets.cityscapes import existing
from datasets.reading import DataError, read_list

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PALETTE = (
    (0, 0, 0),
    (128, 0, 0),
    (0, 128, 0),
    (128, 128, 0),
    (0, 0, 128),
    (128, 0, 128),
    (0, 128, 128),
    (128, 128, 128),
    (64, 0, 0),
    (192, 0, 0),
    (64, 128, 0),
    (192, 128, 0),
    (64, 0, 128),
    (192, 0, 128),
    (64, 128, 128),
    (192, 128, 128),
    (0, 64, 0),
    (128, 64, 0),
    (0, 192, 0),
    (128, 192, 0),
    (0, 64, 128),
)
LISTS = {
    "train_aug": (("train_aug",), ("trainaug",), ("train", "aug"))
}  # the first whose files there are


class VOC(SegmentationData):
    """Args: split: train | val | trainval | train_aug, or the stem of another file in
    `ImageSets/Segmentation`."""

    CLASSES, PALETTE = CLASSES, PALETTE

    def pairs(self):
        places = [self.root, self.root / "VOC2012", self.root / "VOCdevkit" / "VOC2012"]
        home = next((place for place in places if (place / "JPEGImages").is_dir()), self.root)
        return [
            (
                home / "JPEGImages" / f"{name}.jpg",
                self.label_of(home, name) if self.labels else None,
            )
            for name in self.names(home / "ImageSets" / "Segmentation")
        ]

    def names(self, folder):
        """Names of the split's images, each once, in the order of the lists."""
        for choice in LISTS.get(self.split, ((self.split,),)):
            files = [folder / f"{name}.txt" for name in choice]
            if all(path.is_file() for path in files):
                lines = [line for path in files for line in read_list(path)]
                names = (Path(line.split()[0]).name for line in lines)
                return list(dict.fromkeys(re.sub(r"\.(jpg|png)$", "", name) for name in names))
        there = ", ".join(sorted(path.stem for path in folder.glob("*.txt"))) or "none"
        raise DataError(f"VOC has no split '{self.split}': the lists in {folder} are {there}")

    def label_of(self, home, name):
        augmented, official = (
            home / f"SegmentationClass{kind}" / f"{name}.png" for kind in ("Aug", "")
        )
        return existing(augmented, official) if self.split in LISTS else official
