"""Several data sets as one: more than one source, or more than one target.

    data = Several([GTA5(root=..., augment=augment), Synthia(root=..., augment=augment)])

An image is drawn as often from each set as the set is large. The sets have the same classes; where
they do not, `label_space` of base.SegmentationData makes them so.
"""

import copy
from itertools import accumulate
from pathlib import Path

from torch.utils.data import Dataset

from datasets.base import DataError


class Several(Dataset):
    """Data sets one after the other, with what the rest of the project uses of a data set.

    Args:
        parts: data sets that share their classes and are all with or all without labels. Each
            augments for itself.
    Attributes:
        SCORED, expected: the classes that any of the parts scores, or ought to show; SCORED is
        empty for all. PALETTE, seed: of the first part; the others as in base.SegmentationData.
        extra: {name: folder} of maps; those of part i lie in `<folder>/<i>`, which is what `stem`
            says.
    Raises:
        DataError: no parts, parts with different classes, only some of them with labels.
    """

    def __init__(self, parts):
        self.parts, self.extra = list(parts), {}
        if not self.parts:
            raise DataError("several data sets: the list is empty")
        first, self.split = (
            self.parts[0],
            " + ".join(f"{type(part).__name__} {part.split}" for part in self.parts),
        )
        for part in self.parts:
            if tuple(part.CLASSES) != tuple(first.CLASSES):
                one, other = (
                    f"{type(p).__name__} has {', '.join(p.CLASSES)}" for p in (first, part)
                )
                raise DataError(
                    f"data sets that are used as one need the same classes: {one}; {other}"
                )
        if len({part.labels for part in self.parts}) > 1:
            raise DataError(
                "data sets that are used as one need labels in all of them or in none: "
                f"{self.split}"
            )
        self.CLASSES, self.PALETTE, self.labels, self.seed = (
            first.CLASSES,
            first.PALETTE,
            first.labels,
            first.seed,
        )
        scored = {name for part in self.parts for name in part.SCORED or part.CLASSES}
        self.SCORED = (
            tuple(name for name in self.CLASSES if name in scored)
            if len(scored) < len(self.CLASSES)
            else ()
        )
        expected = {name for part in self.parts for name in part.expected}
        self.expected = tuple(name for name in self.CLASSES if name in expected)
        self.samples = [sample for part in self.parts for sample in part.samples]
        self.left_out = [image for part in self.parts for image in part.left_out]
        self.stylised = {
            image: path for part in self.parts for image, path in part.stylised.items()
        }
        self.KNOWN_BAD = {
            stem: reason for part in self.parts for stem, reason in part.KNOWN_BAD.items()
        }
        self.stops = list(accumulate(map(len, self.parts)))  # index of each part's end

    def place(self, index):
        """Index of a sample -> (number of its part, index in it)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = next(i for i, stop in enumerate(self.stops) if index < stop)
        return number, index - self.stops[number] + len(self.parts[number])

    def stem(self, index):
        number, index = self.place(index)
        return f"{number}/{self.parts[number].stem(index)}"

    def label_key(self):
        return repr([type(self).__name__, *(part.label_key() for part in self.parts)])

    def load(self, index):
        number, index = self.place(index)
        return self.parts[number].load(index)

    def load_label(self, index):
        number, index = self.place(index)
        return self.parts[number].load_label(index)

    def without_augmentation(self):
        return type(self)([part.without_augmentation() for part in self.parts])

    def __len__(self):
        return self.stops[-1]

    def __getitem__(self, item):
        """item: an index, or (index, sample) from the sampler. `part` is the number of its part."""
        index, sample = item if isinstance(item, tuple) else (item, item)
        number, within = self.place(index)
        part = copy.copy(
            self.parts[number]
        )  # `extra` may have got maps since, and threads may share the part
        part.extra = {name: Path(folder) / str(number) for name, folder in self.extra.items()}
        return part[within, sample] | {"index": index, "part": number}
