"""What all data sets share: reading, id mapping, checks whose messages name the file, and reproducible augmentation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from engine.errors import UserError

IGNORE = 255
UNKNOWN = 254  # marks ids that the map does not know; no data set here has that many classes


class DataError(UserError):
    """Data that cannot be used as it is; the message names the file and what to do."""


def read_image(path):
    """Image file -> (H, W, 3) uint8 RGB. Pillow, because OpenCV returns truncated JPEGs half filled, silently."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from None


def read_ids(path):
    """Grey or palette PNG -> (H, W) ids. Pillow, because OpenCV turns palette indices into colours."""
    try:
        with Image.open(path) as image:
            ids = np.array(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"cannot read the label {path}: {error}") from None
    if ids.ndim != 2:
        raise DataError(
            f"{path} is a colour picture ({ids.shape[2]} channels), but ids are expected: one channel, or a palette. "
            "For labels stored as colours give the data set a colour table (folder.Folder: color_labels: true)"
        )
    return ids.astype(np.uint8) if ids.dtype == bool else ids  # a 1-bit PNG: two classes


def read_colors(path, colors):
    """Colour picture -> (H, W) uint8 ids by a table {(r, g, b): id}; a colour that is not in it is an error."""
    pixels = read_image(path).astype(np.int32)
    codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    table = sorted((r << 16 | g << 8 | b, value) for (r, g, b), value in colors.items())
    keys, values = (np.array(column) for column in zip(*table, strict=True))
    position = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    unknown = np.unique(codes[keys[position] != codes]).tolist()
    if unknown:
        named = ", ".join(str((c >> 16, c >> 8 & 255, c & 255)) for c in unknown[:5])
        raise DataError(f"{path} holds {len(unknown)} colours that are not in the colour table, such as {named}")
    return values[position].astype(np.uint8)


def lookup_table(id_map, num_classes, ignored=()):
    """(65536) uint8: id on disk -> class id, IGNORE (also for the class ids in `ignored`) or UNKNOWN."""
    table = np.full(65536, UNKNOWN, np.uint8)
    for raw, target in (id_map or {i: i for i in [*range(num_classes), IGNORE]}).items():
        table[raw] = IGNORE if target in ignored else target
    return table


class SegmentationData(Dataset):
    """Images with labels.

    Args:
        root: folder of the data set.
        split: which part; the subclass says which there are.
        labels: False for a target set that is trained on without labels: no label path is even made.
        ignore: names of classes whose pixels are ignored (255); the classes keep their ids.
        augment: callable (image, label) -> the same, for training; None for evaluation.
        seed: with the sample's number in the stream it decides the augmentation.
    Raises:
        DataError: missing folder, no images, images without labels, unknown names in `ignore`.
    """

    CLASSES = ()
    PALETTE = ()
    ID_MAP = None
    KNOWN_BAD = {}  # noqa: RUF012

    def __init__(self, *, root, split: str = "train", labels: bool = True, ignore: list = (), augment=None, seed=0):
        if root is None:
            raise DataError(f"{type(self).__name__} needs its folder: set data.root=PATH")
        self.root, self.split, self.labels = Path(root), split, labels
        self.augment, self.seed = augment, seed
        if not self.root.is_dir():
            raise DataError(
                f"{type(self).__name__}: there is no folder {self.root}; set data.root=PATH, or the root that "
                "this data set has of its own (layouts: README, Data)"
            )
        if unknown := [name for name in ignore if name not in self.CLASSES]:
            raise DataError(f"{type(self).__name__}: ignore names {unknown}; there are {', '.join(self.CLASSES)}")
        found = self.pairs()
        self.left_out = [image for image, _ in found if Path(image).stem in self.KNOWN_BAD]
        self.samples = [(image, label if labels else None) for image, label in found if image not in self.left_out]
        ignored = [self.CLASSES.index(name) for name in ignore]
        # The second table is for labels that others converted to class ids.
        self.table, self.class_table = (lookup_table(ids, len(self.CLASSES), ignored) for ids in (self.ID_MAP, None))
        self._check()

    def _check(self):
        name = f"{type(self).__name__} {self.split}"
        if not self.samples:
            raise DataError(f"{name}: no images under {self.root}; see the layouts in README, Data")
        for kind, paths in (("images", [i for i, _ in self.samples]), ("labels", [p for _, p in self.samples if p])):
            missing = [str(path) for path in paths if not Path(path).is_file()]
            if missing:
                raise DataError(
                    f"{name}: {len(missing)} of {len(paths)} {kind} do not exist, such as {', '.join(missing[:5])}"
                )

    def pairs(self):
        raise NotImplementedError

    def read_label(self, path):
        return read_ids(path)

    def is_mapped(self, path, ids):
        """Whether this label file, which holds these ids, was converted to class ids before: ID_MAP is not applied."""
        return False

    def load(self, index):
        """Image (H, W, 3) uint8 and class ids (H, W) uint8, checked; an unlabelled set has ignore everywhere."""
        image_path, label_path = self.samples[index]
        image = read_image(image_path)
        if label_path is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        ids = self.read_label(label_path)
        if ids.shape != image.shape[:2]:
            raise DataError(
                f"sizes differ: {image_path} is {image.shape[1]}x{image.shape[0]}, "
                f"{label_path} is {ids.shape[1]}x{ids.shape[0]}"
            )
        mapped = self.is_mapped(label_path, ids)
        label = (self.class_table if mapped else self.table)[ids]
        if (label == UNKNOWN).any():
            bad = np.unique(ids[label == UNKNOWN]).tolist()
            remedy = "map them in ID_MAP (folder.Folder: id_map), to 255 if they are to be ignored"
            raise DataError(
                f"{label_path} holds the ids {bad[:10]}, which {type(self).__name__} ({len(self.CLASSES)} classes) "
                f"does not know: {'it is read as converted to class ids, 255 = ignore' if mapped else remedy}"
            )
        return image, label

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        """item: an index, or (index, sample) from the sampler."""
        index, sample = item if isinstance(item, tuple) else (item, item)
        image, label = self.load(index)
        image = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        label = tv_tensors.Mask(torch.from_numpy(label))
        if self.augment is not None:
            # A pure function of (seed, sample): neither workers nor processes nor resuming change what is drawn.
            state = np.random.SeedSequence((self.seed, sample)).generate_state(1, np.uint64)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(state[0]))
                image, label = self.augment(image, label)
        return {
            "image": image.as_subclass(torch.Tensor).contiguous(),
            "label": label.as_subclass(torch.Tensor).contiguous(),
            "index": index,
            "sample": sample,
        }


def to_device(batch, device):
    """A collated batch on the device: images in [0, 1], labels int64. Bytes travel, floats are made there.

    `numbers` lists the samples once more, for what the host draws per image: reading them back would wait for the GPU.
    """
    numbers = batch["sample"].tolist()
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return batch | {
        "image": batch["image"].to(torch.get_default_dtype()) / 255,
        "label": batch["label"].long(),
        "numbers": numbers,
    }
