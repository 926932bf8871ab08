"""One int64 confusion matrix over the whole data set, and what is read from it.

Rows are the truth, columns the prediction. Classes that occur neither in the labels nor in the
predictions have no IoU (nan, shown as "-") and do not enter the means; the table says how many
classes did. A data set that lacks classes names those that it has (SCORED): the others have no IoU
either, and a pixel that is taken for one of them is an error of the class that it has.
"""

import torch

from engine import distributed
from engine.errors import UserError
from engine.statistics import IGNORE

MEANS = ("mIoU", "mAcc", "aAcc", "mF1")


class ConfusionMatrix:
    """Counts (K, K) of label pixels by predicted class, and the number of ignored ones, which
    enters no value.

    Args:
        classes: K names.
        subsets: {name: [class names]} further means, such as SYNTHIA's mIoU16 and mIoU13.
        scored: names of the classes that have values and enter means; empty: all.
    """

    def __init__(self, classes, subsets=None, device="cpu", scored=()):
        self.classes = list(classes)
        if taken := {*MEANS} & {*(subsets or {})}:
            raise UserError(f"eval.subsets: {min(taken)} is the mean over all classes; rename it")
        self.subsets = {
            name: [self._position(c, f"eval.subsets.{name}") for c in members]
            for name, members in (subsets or {}).items()
        }
        scored = [self._position(c, "SCORED") for c in scored or self.classes]
        self.unscored = torch.ones(len(classes), dtype=torch.bool).index_fill(
            0, torch.tensor(scored), False
        )
        self.matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        self.ignored = torch.zeros((), dtype=torch.int64, device=device)

    def _position(self, name, where):
        if name not in self.classes:
            raise UserError(
                f"{where} names the class '{name}'; the data set has {', '.join(self.classes)}"
            )
        return self.classes.index(name)

    def update(self, predictions, labels):
        """Add predictions and labels, integers of the same shape, labels best as bytes; those
        outside 0..K-1 (255) are ignored."""
        k = len(self.classes)
        # Memory is what it costs, and masks cost more than what they stand for.
        small = torch.int16 if (k + 2) * k < 2**15 else torch.int32
        labels = labels.to(small) if labels.dtype == torch.uint8 else labels
        rows = labels.clamp(-1, k).to(small).add_(1)  # ignored ones are the first and the last
        places = rows.mul_(k).add_(predictions.to(small))
        counts = torch.bincount(places.flatten(), minlength=(k + 2) * k).view(k + 2, k)
        self.matrix += counts[1:-1]
        self.ignored += counts[0].sum() + counts[-1].sum()

    def all_reduce(self):
        """Add the counts of all processes, once, after the last image."""
        self.matrix = distributed.all_reduce(self.matrix)
        self.ignored = distributed.all_reduce(self.ignored)
        return self

    def pixels(self):
        """(K + 1) int64: label pixels of each class, and last the ignored ones."""
        return torch.cat([self.matrix.sum(1), self.ignored[None]])

    def per_class(self):
        """{"IoU", "Acc", "F1"}: (K) float64 tensors in [0, 1], nan where a class does not occur or
        is not scored."""
        matrix = self.matrix.double().cpu()
        hit, truth, prediction = matrix.diag(), matrix.sum(1), matrix.sum(0)
        values = {
            "IoU": hit / (truth + prediction - hit),
            "Acc": hit / truth,
            "F1": 2 * hit / (truth + prediction),
        }
        return {name: value.masked_fill(self.unscored, torch.nan) for name, value in values.items()}

    def summary(self):
        """{"mIoU", "mAcc", "aAcc", "mF1", one per subset}: floats in per cent."""
        values = self.per_class()
        total = self.matrix.sum().double()  # nan of none
        result = {
            "mIoU": values["IoU"].nanmean(),
            "mAcc": values["Acc"].nanmean(),
            "aAcc": self.matrix.diag().sum() / total,
            "mF1": values["F1"].nanmean(),
        }
        result |= {name: values["IoU"][members].nanmean() for name, members in self.subsets.items()}
        return {name: 100 * float(value) for name, value in result.items()}

    def table(self):
        """Text for the console: one line per class, then the means."""
        values = self.per_class()
        width = max(len("class"), *(len(name) for name in self.classes))
        share = self.matrix.sum(1) / self.matrix.sum().clamp_min(1)
        lines = [f"{'class':<{width}}     IoU     Acc      F1   pixels"]
        for i, name in enumerate(self.classes):
            cells = [
                f"{100 * float(v[i]):7.2f}" if v[i] == v[i] else "      -" for v in values.values()
            ]
            lines.append(f"{name:<{width}} {' '.join(cells)} {100 * float(share[i]):7.2f}%")
        means = "   ".join(f"{name} {value:.2f}" for name, value in self.summary().items())
        counted = int(values["IoU"].isfinite().sum())
        return "\n".join(
            [*lines, f"{means}   (mean over {counted} of {len(self.classes)} classes)"]
        )

    def as_dict(self):
        """Plain values for JSON."""
        values = {
            name: [round(100 * x, 4) if x == x else None for x in v.tolist()]
            for name, v in self.per_class().items()
        }
        return {
            "summary": {
                name: round(x, 4) if x == x else None for name, x in self.summary().items()
            },
            "classes": self.classes,
            **values,
            "matrix": self.matrix.tolist(),
        }


def count_pixels(label, classes):
    """Pixels of each class, and last of those that are ignored, in labels (...) uint8 -> (classes +
    1) int64."""
    counts = torch.bincount(label.flatten(), minlength=IGNORE + 1)
    return torch.cat([counts[:classes], counts[classes:].sum(0, keepdim=True)])


def warnings_about(pixels, classes, where, expected=None):
    """What is suspicious about the labels of a data set.

    Args:
        pixels: (K + 1) counts, as `count_pixels` returns.
        classes: K names.
        where: what the sentences call the data set.
        expected: the classes that ought to occur (`SegmentationData.expected`); None: all.
    Returns:
        Sentences: classes without a pixel, most of the pixels ignored.
    """
    *counts, ignored = (int(count) for count in pixels)
    present = [name for name, count in zip(classes, counts) if count]
    expected = classes if expected is None else expected
    absent, sentences = [name for name in expected if name not in present], []
    total = sum(counts) + ignored
    if absent and total:
        some = ", ".join(absent[:5]) + ", ..." * (len(absent) > 5)
        sentences.append(
            f"{where}: classes that never occur: {some} ({len(absent)} of {len(expected)})"
        )
    if 2 * ignored > total:
        sentences.append(f"{where}: {ignored / total:.1%} of the pixels are ignored (id 255)")
    if sentences and ignored and present == [classes[0]]:  # of two classes the first alone
        names = f"0: {classes[0]}, 255: {classes[1]}" if len(classes) > 1 else "0: ..., 255: ..."
        sentences[-1] += f"; masks of 0 and 255 need folder.Folder with id_map: {{{names}}}"
    return sentences
