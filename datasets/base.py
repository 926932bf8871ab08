"""What all data sets share: reading, id mapping, checks whose messages name the file, and
reproducible augmentation.

Every data set of files takes style-transferred copies of its images, whose labels are those of the
originals, and a map of its classes to those of another label space:

    {name: gta5.GTA5, stylised: PATH, label_space: {Road: [road], Vehicle: [car, truck], Kerb: []}}
"""

import copy
import os
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.reading import (
    PICTURES,
    DataError,
    files_below,
    files_in,
    folders_in,
    read_ids,
    read_image,
    read_map,
    was_turned,
)

IGNORE = 255
UNKNOWN = 254  # marks ids that the map does not know; no data set here has that many classes
GREY = (160, 160, 160)  # of a class that no class of the data set is mapped to


def lookup_table(id_map, classes):
    """{id on disk: own id}, {own id: class id} -> (65536) uint8: id on disk -> class id, IGNORE or
    UNKNOWN."""
    table = np.full(65536, UNKNOWN, np.uint8)
    for raw, own in id_map.items():
        table[raw] = classes.get(own, IGNORE)
    return table


def check_label_space(title, space, own):
    """Raise DataError unless {class: [own classes]} names own classes, and none twice."""
    if wrong := [name for name, members in space.items() if not isinstance(members, (list, tuple))]:
        raise DataError(
            f"{title}: label_space.{wrong[0]} must be a list of class names, not "
            f"{space[wrong[0]]!r}"
        )
    named = [name for members in space.values() for name in members]
    if unknown := [name for name in named if name not in own]:
        raise DataError(f"{title}: label_space names {unknown}; there are {', '.join(own)}")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise DataError(f"{title}: label_space names {twice} more than once; a class has one place")


def check_sizes(image_path, image, path, values):
    """Raise DataError unless an image (H, W, 3) and the (H, W) of another file have one size."""
    if values.shape != image.shape[:2]:
        (height, width), (h, w) = image.shape[:2], values.shape
        turned = ", turned upright by its EXIF tag" if was_turned(image_path) else ""
        raise DataError(
            f"sizes differ: {image_path} is {width}x{height}{turned}, {path} is {w}x{h}"
        )


def check_different(names, problem):
    """Raise DataError where two images of {image: name} have one name."""
    owners = {}
    for image, name in names.items():
        if (owner := owners.setdefault(name, image)) != image:
            raise DataError(f"{owner} and {image} share {problem.format(name)}")


@contextmanager
def drawing(seed):
    """Within it PyTorch draws on the CPU as from this seed; afterwards its generators are as they
    were before.

    `torch.manual_seed` would seed the generators of the GPUs as well, which nothing restores.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class SegmentationData(Dataset):
    """Images with labels.

    Args:
        root: folder of the data set.
        split: which part; the subclass says which there are, and SPLIT the usual one.
        labels: False for a target set that is trained on without labels: no label path is even
            made.
        ignore: names of classes whose pixels are ignored (255); the classes keep their ids.
        augment: callable (image, label, *maps) -> the same, for training; None for evaluation.
        seed: with the sample's number in the stream it decides the augmentation.
        stylised: folder, relative to the root, with a style-transferred copy of each image: the
            same path as the image has below the root, or directly in it a file of the same name;
            .png, .jpg or .jpeg whatever the image has. The copies are read in place of the images;
            label and `stem` are those of the image, and its size must be.
        label_space: {class: [own classes]}, the classes of another label space in the order of
            their ids. They replace CLASSES, PALETTE and SCORED, and `ignore` means them. Own
            classes that no entry names are ignored; a class with an empty list does not occur here
            and is not scored.
    Attributes:
        expected: names of the classes that ought to occur: those that are scored and not ignored.
        extra: {name: folder} of maps that belong to the images, such as stored pseudo labels; empty
            at first, set before the loaders start. A map is `<folder>/<stem>.png`, 8 bits, grey or
            a palette.
    Raises:
        DataError: missing folder, no images, images without labels or copies, two images with one
            stem, unknown names in `ignore`, unknown or repeated ones in `label_space`.
    """

    CLASSES = PALETTE = SCORED = ()
    ID_MAP = None
    KNOWN_BAD = {}  # noqa: RUF012
    SPLIT = "train"  # where no split is named

    def __init__(
        self,
        *,
        root,
        split: str | None = None,
        labels: bool = True,
        ignore: list[str] = (),
        augment=None,
        seed=0,
        stylised: str | None = None,
        label_space: dict | None = None,
    ):
        if root is None:
            raise DataError(f"{type(self).__name__} needs its folder: set data.root=PATH")
        self.root, self.split, self.labels = Path(root), split or self.SPLIT, labels
        self.augment, self.seed, self.extra = augment, seed, {}
        if not self.root.is_dir():
            raise DataError(
                f"{type(self).__name__}: there is no folder {self.root}; set the root of this "
                "data set, or data.root=PATH if it names none (layouts: docs/data.md)"
            )
        self.set_classes(ignore, label_space)
        found = self.pairs()
        bad = self.KNOWN_BAD
        self.left_out = [image for image, _ in found if bad and Path(image).stem in bad]
        self.samples = [
            (image, label if labels else None)
            for image, label in found
            if image not in self.left_out
        ]
        self._check()
        # {image: its copy}
        self.stylised = {} if stylised is None else self._find_stylised(self.root / stylised)

    def set_classes(self, ignore=(), label_space=None):
        """Make CLASSES, PALETTE and SCORED those of the label space, and the tables from ids on
        disk to its ids."""
        title, own = type(self).__name__, list(self.CLASSES)
        space = {
            str(name): members
            for name, members in (label_space or {name: [name] for name in own}).items()
        }
        check_label_space(title, space, own)
        scored = tuple(
            name for name, members in space.items() if {*members} & {*(self.SCORED or own)}
        )
        if not scored:
            raise DataError(
                f"{title}: label_space has no class that occurs in this data set: {space}"
            )
        self.own_classes, self.CLASSES, self.SCORED = (
            own,
            tuple(space),
            scored if len(scored) < len(space) else (),
        )
        self.PALETTE = tuple(self.PALETTE[own.index(m[0])] if m else GREY for m in space.values())
        if unknown := [name for name in ignore if name not in space]:
            raise DataError(f"{title}: ignore names {unknown}; there are {', '.join(space)}")
        ids = {
            own.index(m): i
            for i, (name, ms) in enumerate(space.items())
            if name not in ignore
            for m in ms
        }
        self.expected = tuple(
            name for i, name in enumerate(space) if name in scored and i in ids.values()
        )
        direct = {i: i for i in [*range(len(own)), IGNORE]}
        # The second table is for labels that others converted to own class ids.
        self.table, self.class_table = (
            lookup_table(id_map, ids) for id_map in (self.ID_MAP or direct, direct)
        )

    def split_folder(self, folder):
        """The folder of the split in a folder of splits."""
        if not (folder / self.split).is_dir():
            title = f"{type(self).__name__} has no split '{self.split}'"
            raise DataError(f"{title}: the folders in {folder} are {folders_in(folder)}")
        return folder / self.split

    def _check(self):
        name = f"{type(self).__name__} {self.split}"
        if not self.samples:
            raise DataError(f"{name}: no images under {self.root}; layouts: docs/data.md")
        for kind, paths in (
            ("images", [i for i, _ in self.samples]),
            ("labels", [p for _, p in self.samples if p]),
        ):
            there = {folder: files_in(folder) for folder in {*map(os.path.dirname, paths)}}
            unseen = (p for p in paths if os.path.basename(p) not in there[os.path.dirname(p)])
            if missing := [str(path) for path in unseen if not os.path.isfile(path)]:
                some = f"{name}: {len(missing)} of {len(paths)} {kind}"
                raise DataError(f"{some} do not exist, such as {', '.join(missing[:5])}")
        check_different(
            self._stems(),
            "the path '{}' but for the suffix, under which maps are stored; rename one",
        )

    def _stems(self):
        """{image: stem}; an image that a list names twice counts once."""
        return {image: self.stem(index) for index, (image, _) in enumerate(self.samples)}

    def _find_stylised(self, folder):
        if not folder.is_dir():
            raise DataError(
                f"{type(self).__name__}: there is no folder {folder} of stylised images"
            )
        names = {
            path: path.relative_to(folder).with_suffix("").as_posix()
            for path in files_below(folder, PICTURES)
        }
        check_different(names, "the name '{}' in the folder of stylised images; remove one")
        found = {name: path for path, name in names.items()}
        copies = {
            image: found.get(stem, found.get(Path(image).stem))
            for image, stem in self._stems().items()
        }
        if missing := [str(image) for image, path in copies.items() if path is None]:
            some = f"{type(self).__name__}: {len(missing)} of {len(copies)} images"
            raise DataError(
                f"{some} have no stylised copy in {folder}, such as {', '.join(missing[:5])}"
            )
        check_different(
            copies,
            "the stylised copy {}; give the copies the paths that the images have below the root",
        )
        return copies

    def pairs(self):
        """[(image, its label or None)]: a data set has these, or its `images` and `label_of`."""
        return [(image, self.label_of(image) if self.labels else None) for image in self.images()]

    def read_image(self, path):
        return read_image(path)

    def read_label(self, path):
        return read_ids(path)

    def is_mapped(self, path, ids):
        """Whether this label file, which holds these ids, was converted to class ids before: ID_MAP
        is not applied."""
        return False

    def stem(self, index):
        """The image's path below the root without suffix, with slashes: the name of the sample's
        maps.

        An image outside the root has its absolute path, without the first slash.
        """
        root, path = (
            os.path.join(os.path.abspath(self.root), ""),
            os.path.abspath(self.samples[index][0]),
        )
        return os.path.splitext(path.removeprefix(root).lstrip(os.sep))[0].replace(os.sep, "/")

    def label_key(self):
        """Text that changes with whatever the labels depend on, files and options: the key of what
        is made of them."""
        paths = [Path(os.path.abspath(label)) for _, label in self.samples if label is not None]
        files = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]
        tables = self.table.tobytes() + self.class_table.tobytes()
        return repr((type(self).__module__, type(self).__name__, self.CLASSES, tables, files))

    def load(self, index):
        """Image (H, W, 3) uint8 and class ids (H, W) uint8, checked; an unlabelled set has ignore
        everywhere."""
        original, label_path = self.samples[index]
        path = self.stylised.get(original, original)
        image, label = self.read_image(path), self.load_label(index)
        if label is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        check_sizes(path, image, label_path, label)
        return image, label

    def load_label(self, index):
        """Class ids (H, W) uint8 without their image, None in an unlabelled set."""
        label_path = self.samples[index][1]
        if label_path is None:
            return None
        ids = self.read_label(label_path)
        mapped = self.is_mapped(label_path, ids)
        table = self.class_table if mapped else self.table
        # One pass for bytes, in a tenth of the time that indexing takes.
        label = cv2.LUT(ids, table[:256]) if ids.dtype == np.uint8 else table[ids]
        if (label == UNKNOWN).any():
            bad = np.unique(ids[label == UNKNOWN]).tolist()
            remedy = "map them in ID_MAP (folder.Folder: id_map), to 255 if they are to be ignored"
            raise DataError(
                f"{label_path} holds the ids {bad[:10]}, which {type(self).__name__} "
                f"({len(self.own_classes)} classes) does not know: "
                f"{'it is read as converted to class ids, 255 = ignore' if mapped else remedy}"
            )
        return label

    def load_maps(self, index, image):
        """The maps of `extra`, each (H, W) uint8 and of the size of the image (H, W, 3)."""
        maps, original = [], self.samples[index][0]
        for name, folder in self.extra.items():
            path = Path(folder) / f"{self.stem(index)}.png"
            if not path.is_file():
                raise DataError(f"{original} has no map '{name}': there is no file {path}")
            maps.append(read_map(path))
            check_sizes(self.stylised.get(original, original), image, path, maps[-1])
        return maps

    def without_augmentation(self):
        """The same samples as they are read, without maps: what maps are made from."""
        plain = copy.copy(self)
        plain.augment, plain.extra = None, {}
        return plain

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        """item: an index, or (index, sample) from the sampler."""
        index, sample = item if isinstance(item, tuple) else (item, item)
        image, label = self.load(index)
        maps = self.load_maps(index, image)
        if self.augment is not None:
            # A pure function of (seed, sample): neither workers nor processes nor resuming change
            # what is drawn.
            state = np.random.SeedSequence((self.seed, sample)).generate_state(1, np.uint64)
            with drawing(int(state[0])):
                image, label, *maps = self.augment(image, label, *maps)
        if image.dtype != np.uint8 or image.shape != (*label.shape, 3):  # a set's own `load`
            raise DataError(
                f"sample {index}: the image is {image.shape} {image.dtype}, its label {label.shape}"
            )
        planes = np.empty((3, *label.shape), np.uint8)
        cv2.split(image, [*planes])  # NumPy takes five times as long
        label, *maps = (torch.from_numpy(np.ascontiguousarray(values)) for values in (label, *maps))
        extra = dict(zip(self.extra, maps, strict=True))
        item = {"image": torch.from_numpy(planes), "label": label, "extra": extra}
        return item | {"index": index, "sample": sample}


def check_scored(name, dataset):
    """Raise DataError unless a data set that is trained on with labels, or scored, has them."""
    if not dataset.labels:
        raise DataError(
            f"data.{name} has labels: false, but its labels are needed; to label pictures use "
            "predict.py"
        )
