"""Your own data, from YAML alone. A complete `data` section, for images/train/*.jpg,
labels/train/*.png and so on:

    data:
      root: my_data                   # everything below is relative to this folder
      train:
        name: folder.Folder
        split: train
        image_dir: images/{split}     # sub folders are searched too: images/train/berlin/0001.jpg
        label_dir: labels/{split}     # the same sub folder and name, with the label's suffix
        image_suffix: [.jpg, .jpeg]   # one or several, also such as _leftImg8bit.png
        label_suffix: .png
        classes: &classes [road, building, car]
        palette: &palette [[128, 64, 128], [70, 70, 70], [0, 0, 142]]
        id_map: &ids {0: ignore, 7: road, 11: building, 26: car, 27: car}
      val: {name: folder.Folder, split: val, classes: *classes, palette: *palette, id_map: *ids}
      augment: {name: transforms.Augment, crop: [256, 256], scale: [0.5, 2.0], flip: 0.5}

`python -m datasets.check CONFIG` counts, finds what is wrong and draws overlays: run it before
training.
"""

import os
from typing import Annotated

import cv2
import numpy as np

from datasets.base import IGNORE, SegmentationData
from datasets.reading import DataError, names_below, read_colors, read_list
from engine.ranges import Text


def distinct_colors(count):
    """The first colours of a fixed sequence: each differs most, in CIELAB, from black, white and
    those before it."""
    grid = np.stack(np.meshgrid(*[np.arange(40, 241, 20)] * 3), -1).reshape(-1, 3)
    every = np.concatenate(
        [[[0] * 3, [255] * 3], grid]
    )  # black is ignore, white the borders in overlays
    lab = cv2.cvtColor(every[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    chosen, nearest = [0, 1], np.linalg.norm(lab - lab[0], axis=1)
    for _ in range(count):
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(nearest.argmax()))
    return tuple(map(tuple, every[chosen[2:]].tolist()))


def class_ids(id_map, classes):
    """The option `id_map` with names -> {id on disk: class id}; 255 stays ignore unless the map
    says something else."""
    known = {"ignore": IGNORE, IGNORE: IGNORE} | {
        key: i for i, name in enumerate(classes) for key in (i, name)
    }
    for raw, target in id_map.items():
        ids = type(raw) is int and 0 <= raw < 65536 and type(target) in (int, str)  # True is 1
        if not ids or target not in known:
            raise DataError(
                f"Folder: id_map cannot make {raw!r} {target!r}; classes: {', '.join(classes)}, "
                "ignore"
            )
    return {IGNORE: IGNORE} | {raw: known[target] for raw, target in id_map.items()}


def find(folder, suffixes, others):
    """Files below a folder -> {name: file}; the longest suffix counts, so a.png and a_mask.png may
    lie side by side."""
    if not folder.is_dir():
        raise DataError(
            f"Folder: there is no folder {folder}; see data.root, split, image_dir and label_dir"
        )
    every = sorted({*suffixes, *others}, key=len, reverse=True)
    lower, found, start = [s.lower() for s in every], {}, os.path.join(folder, "")
    for path in names_below(folder, every):
        name = path.lower()
        longest = every[next(i for i, suffix in enumerate(lower) if name.endswith(suffix))]
        if longest in suffixes:
            name = path[: -len(longest)]
            if name in found:
                raise DataError(
                    f"Folder: {found[name]} and {start}{path} share the name '{name}'; remove one "
                    "of them"
                )
            found[name] = start + path
    return found


def demand(names, files, what):
    if missing := [name for name in names if name not in files]:
        raise DataError(f"Folder: {len(missing)} of {len(names)} {what}: {', '.join(missing[:5])}")


Palette = Annotated[list[Annotated[list[Annotated[int, "[0, 255]"]], "[3, 3]"]], "[1, 253]"]


class Folder(SegmentationData):
    """Args:
        classes: names of the K classes, in the order of their ids.
        image_dir, label_dir: folders below the root; `{split}` becomes the split.
        image_suffix, label_suffix: how the names end. The rest of the path must agree between image
            and label.
        list: text file below the root with the names (sub folder, no suffix) to use, one per line,
            such as "lists/{split}.txt". Without it all images are used, and each label must have
            its image.
        palette: K colours [r, g, b]; without it `distinct_colors`.
        id_map: {id on disk: class name, class id or ignore}. Ids that are not listed are errors,
            but for 255 (ignore).
        color_labels: labels hold the colours of the palette; black is ignored unless it is a class.
    Raises DataError: contradictory options, missing folders, images without labels, labels without
    images.
    """

    def __init__(
        self,
        *,
        classes: Annotated[list[Text], "[1, 253]"],  # 254 and 255 are taken
        image_dir: str = "images/{split}",
        label_dir: str = "labels/{split}",
        image_suffix: str | list[Text] = ".jpg",
        label_suffix: str = ".png",
        list: str | None = None,
        palette: Palette | None = None,
        id_map: dict | None = None,
        color_labels: bool = False,
        **options,
    ):
        names = tuple(classes)
        if blank := [name for name in names if not name.strip()]:
            raise DataError(f"Folder: the class {blank[0]!r} is no name: write one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"Folder: classes must have different names; {twice[0]!r} is repeated")
        colors = palette or distinct_colors(len(names))
        if len(colors) != len(names):
            raise DataError(f"Folder: palette must hold {len(names)} colours, not {len(colors)}")
        if color_labels and (not palette or id_map or len(set(map(tuple, colors))) < len(names)):
            raise DataError(
                "Folder: color_labels needs a palette of different colours, and no id_map"
            )
        self.CLASSES, self.PALETTE = names, tuple(map(tuple, colors))
        self.ID_MAP = class_ids(id_map, names) if id_map else None
        self.colors = (
            {(0, 0, 0): IGNORE} | {c: i for i, c in enumerate(self.PALETTE)}
            if color_labels
            else None
        )
        self.folders = (image_dir, label_dir, list)
        self.suffixes = (
            [image_suffix] if isinstance(image_suffix, str) else image_suffix,
            [label_suffix],
        )
        super().__init__(**options)

    def pairs(self):
        if self.split != "train" and not any(
            "{split}" in (text or "") for text in (self.folders[0], self.folders[2])
        ):
            raise DataError(
                f"Folder: split '{self.split}' has no effect; put {{split}} into image_dir or list"
            )
        image_dir, label_dir, listing = (
            text and text.replace("{split}", self.split) for text in self.folders
        )
        of_images, of_labels = self.suffixes
        images = names = find(self.root / image_dir, of_images, of_labels)
        labels = (
            find(self.root / label_dir, of_labels, of_images)
            if self.labels
            else dict.fromkeys(images)
        )
        asked, what = labels, "labels"
        if listing:
            if not (self.root / listing).is_file():
                raise DataError(f"Folder: there is no list {self.root / listing}")
            names = asked = read_list(self.root / listing)
            what = f"names in {listing}"
        demand(asked, images, f"{what} have no image *{' or *'.join(of_images)} in {image_dir}")
        demand(names, labels, f"images have no label *{of_labels[0]} in {label_dir}")
        return [(images[name], labels[name]) for name in names]

    def label_key(self):
        return f"{super().label_key()}{self.colors}"

    def read_label(self, path):
        return read_colors(path, self.colors) if self.colors else super().read_label(path)
