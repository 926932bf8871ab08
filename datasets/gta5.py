"""GTA5 (Richter et al., 2016): 24,966 frames of a game, about 1914x1052, with the 19 classes of
Cityscapes.

    data: {root: PATH, train: {name: gta5.GTA5}}

    images/00001.png ... 24966.png      sizes differ by a few rows: crop before stacking
    labels/00001.png ... 24966.png      official: palette PNGs, the indices are Cityscapes' ids, 34 is license plate
    labels/00001_labelTrainIds.png      converted to train ids; read where the official label is missing
    lists/<split>.txt                   optional: one stem such as 00001 per line

Papers on domain adaptation and generalisation train on all images, which is the default. In two of
them image and label have different sizes; they are left out.
"""

from datasets.base import IGNORE, SegmentationData
from datasets.cityscapes import CLASSES, ID_MAP, PALETTE, existing, has_train_ids
from datasets.reading import DataError, files_below, read_list


def stems_of(data, images):
    """Names without suffix: all PNGs of a folder, or those in `lists/<split>.txt`."""
    if data.split == "all":
        return [path.stem for path in files_below(images, [".png"], depth=1)]
    listing = data.root / "lists" / f"{data.split}.txt"
    if not listing.is_file():
        splits = ", ".join(["all", *sorted(path.stem for path in listing.parent.glob("*.txt"))])
        raise DataError(
            f"{type(data).__name__} has no split '{data.split}' and no list {listing}; there are: "
            f"{splits}"
        )
    return read_list(listing)


def listed_pairs(data, images, labels):
    """The pairs of `data.split`, of two folders with the same names in both: all, or those that a
    list names."""
    pairs = []
    for stem in stems_of(data, images):
        official, converted = labels / f"{stem}.png", labels / f"{stem}_labelTrainIds.png"
        pairs.append(
            (images / f"{stem}.png", existing(official, converted) if data.labels else None)
        )
    return pairs


class GTA5(SegmentationData):
    """Args: split: all, or the stem of a file in `lists/`."""

    CLASSES, PALETTE, ID_MAP = CLASSES, PALETTE, ID_MAP | {34: IGNORE}
    KNOWN_BAD = dict.fromkeys(("15188", "17705"), "image and label have different sizes")

    def __init__(
        self,
        *,
        root,
        split: str = "all",
        labels: bool = True,
        ignore: list = (),
        augment=None,
        seed=0,
        stylised: str | None = None,
        label_space: dict | None = None,
    ):
        options = {
            "labels": labels,
            "ignore": ignore,
            "augment": augment,
            "seed": seed,
            "stylised": stylised,
        }
        super().__init__(root=root, split=split, label_space=label_space, **options)

    def pairs(self):
        return listed_pairs(self, self.root / "images", self.root / "labels")

    def is_mapped(self, path, ids):
        return has_train_ids(path)
