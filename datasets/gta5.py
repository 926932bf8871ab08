"""GTA5 (Richter et al., 2016): 24,966 frames of a game, about 1914x1052, with the 19 classes of
Cityscapes.

    data: {root: PATH, train: {name: gta5.GTA5}}

    images/00001.png ... 24966.png      sizes differ by a few rows: crop before stacking
    labels/00001.png ... 24966.png      official: palette PNGs, the indices are Cityscapes' ids, 34
                                        is license plate
    labels/00001_labelTrainIds.png      converted to train ids; read where the official label is
                                        missing
    lists/<split>.txt                   optional: one stem such as 00001 per line

Papers on domain adaptation and generalisation train on all images, which is the default. In two of
them image and label have different sizes; they are left out.
"""

from datasets.base import IGNORE
from datasets.cityscapes import ID_MAP, Cityscapes, existing
from datasets.reading import DataError, files_below, read_list


class GTA5(Cityscapes):
    """Args: split: all, or the stem of a file in `lists/`."""

    ID_MAP = ID_MAP | {34: IGNORE}
    KNOWN_BAD = dict.fromkeys(("15188", "17705"), "image and label have different sizes")
    SPLIT = "all"
    FOLDERS = ("images", "labels")

    def images(self):
        """All PNGs, or those whose names without suffix are in `lists/<split>.txt`."""
        folder = self.root / self.FOLDERS[0]
        if self.split == "all":
            return files_below(folder, [".png"], depth=1)
        listing = self.root / "lists" / f"{self.split}.txt"
        if not listing.is_file():
            splits = ", ".join(["all", *sorted(path.stem for path in listing.parent.glob("*.txt"))])
            raise DataError(
                f"{type(self).__name__} has no split '{self.split}' and no list {listing}; there "
                f"are: {splits}"
            )
        return [folder / f"{stem}.png" for stem in read_list(listing)]

    def label_of(self, image):
        folder = self.root / self.FOLDERS[1]
        return existing(folder / image.name, folder / f"{image.stem}_labelTrainIds.png")
