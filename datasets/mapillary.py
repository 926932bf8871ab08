"""Mapillary Vistas v1.2 (Neuhold et al., 2017): street images of many sizes, with the 19 classes of
Cityscapes.

    data: {root: PATH, test: {mapillary: {name: mapillary.Mapillary, ids: wide, long_side: 2048}}}

    {training,validation,testing}/images/*.jpg
    {training,validation}/v1.2/labels/*.png      the release of 2021, which has v2.0 beside v1.2
    {training,validation}/labels/*.png           the original release

Labels are palette PNGs whose indices are the ids 0 to 65. Those of v2.0 have other ids, for 124
classes: a set that has only `v2.0` is an error, and so is a file with an id above 65.

Two maps from the 66 ids to the 19 classes are in use, and their numbers are not comparable; say
which:

    ids: strict     RobustNet and its descendants, the line of CNNs [C]
    ids: wide       openseg and Rein, the line of foundation models [C]: also bike lane, crosswalk,
                    parking, service
                    lane, curb cut, pedestrian area, street light, frame and back of signs, but no
                    manhole

Images have up to 20 megapixels and more. `long_side: 2048` makes evaluation affordable: images AND
LABELS are resized, so the score is not that at the labels' own resolution; say so too. RobustNet
resizes to a height of 1536 instead.

From general knowledge: 18,000 training, 2000 validation and 5000 testing images; the last have no
labels.
"""

from typing import Literal

import numpy as np
from PIL import Image

from datasets.base import IGNORE, SegmentationData
from datasets.cityscapes import CLASSES, PALETTE
from datasets.reading import DataError, files_below
from engine.ranges import Natural

STRICT = {
    "road": (13, 24, 41),  # road, lane marking, manhole
    "sidewalk": (2, 15),  # curb, sidewalk
    "building": (17,),
    "wall": (6,),
    "fence": (3,),
    "pole": (45, 47),  # pole, utility pole
    "traffic light": (48,),
    "traffic sign": (50,),  # front
    "vegetation": (30,),
    "terrain": (29,),
    "sky": (27,),
    "person": (19,),
    "rider": (20, 21, 22),  # bicyclist, motorcyclist, other rider
    "car": (55,),
    "truck": (61,),
    "bus": (54,),
    "train": (58,),  # on rails
    "motorcycle": (57,),
    "bicycle": (52,),
}
WIDE = STRICT | {
    "road": (
        7,
        8,
        10,
        13,
        14,
        23,
        24,
    ),  # bike lane, crosswalk, parking, road, service lane, both kinds of lane marking
    "sidewalk": (2, 9, 11, 15),  # curb, curb cut, pedestrian area, sidewalk
    "pole": (44, 45, 47),  # street light, pole, utility pole
    "traffic sign": (46, 49, 50),  # frame, back, front
}
ID_MAPS = {
    name: dict.fromkeys(range(66), IGNORE)
    | {raw: CLASSES.index(c) for c, ids in groups.items() for raw in ids}
    for name, groups in (("strict", STRICT), ("wide", WIDE))
}


class Mapillary(SegmentationData):
    """Args:
        split: training | validation | testing.
        ids: which map to the 19 classes.
        long_side: pixels of the longer side that larger images are reduced to, with antialiasing,
            and their labels, by nearest neighbours; 0 leaves them as they are. Maps that belong to
            the images have the reduced size.
        train_ids: folder, relative to the root, of labels that others converted to the 19 ids,
            under the images' names; `{split}` becomes the split. They are read in place of the
            official ones, and `ids` plays no part.
    Raises DataError: labels of v2.0.
    """

    CLASSES, PALETTE = CLASSES, PALETTE
    SPLIT = "training"

    def __init__(
        self,
        *,
        ids: Literal["strict", "wide"] = "strict",
        long_side: Natural = 0,
        train_ids: str | None = None,
        **options,
    ):
        self.ID_MAP, self.long_side, self.train_ids = ID_MAPS[ids], long_side, train_ids
        super().__init__(**options)

    def pairs(self):
        images = files_below(self.split_folder(self.root) / "images", [".jpg"], depth=1)
        labels = self.label_folder() if self.labels else None
        return [(image, labels and labels / f"{image.stem}.png") for image in images]

    def label_folder(self):
        if self.train_ids is not None:
            return self.root / self.train_ids.replace("{split}", self.split)
        split = self.root / self.split
        official = next(
            (path for path in (split / "v1.2" / "labels", split / "labels") if path.is_dir()), None
        )
        if official is None and (split / "v2.0").is_dir():
            raise DataError(
                f"{split} has labels of v2.0 alone, whose ids differ; those of v1.2 are read: "
                "v1.2/labels"
            )
        return official or split / "labels"

    def read_image(self, path):
        image = super().read_image(path)
        size = self.reduced(image.shape[:2])
        if size == image.shape[:2]:
            return image
        return np.array(
            Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        )  # Pillow antialiases

    def read_label(self, path):
        ids = super().read_label(path)
        if self.train_ids is None and ids.max() > 65:
            raise DataError(
                f"{path} holds the id {ids.max()}, but v1.2 has 0 to 65: labels of v2.0 have other "
                "ids and are not read; for labels that were converted to train ids set train_ids "
                "to their folder"
            )
        size = self.reduced(ids.shape)
        if size == ids.shape:
            return ids
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(ids.shape, size)
        )
        return ids[rows[:, None], columns]

    def reduced(self, size):
        """(H, W) on disk -> (H, W) as it is read."""
        if not 0 < self.long_side < max(size):
            return size
        return tuple(max(1, round(side * self.long_side / max(size))) for side in size)

    def is_mapped(self, path, ids):
        return self.train_ids is not None

    def label_key(self):
        return f"{super().label_key()}{self.long_side, self.train_ids}"
