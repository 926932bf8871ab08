"""The record of a training step: what losses, labelers, mixers and prototypes read and write.

This file is the one thing to learn before you change a loss. B images, C = 3 channels of an image, D feature channels,
K classes, M components of a class, H W image size, h w feature size. A misspelt field is an error that lists the fields.

    class Focal(Loss):
        def forward(self, step):
            logits, labels = step.outputs["source"].logits, step.labels["source"]       # (B, K, h, w), (B, H, W)
            ...
            return loss.sum() / step.pixels("source")
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import distributed
from engine.errors import UserError
from engine.statistics import IGNORE, resize_labels


class Record:
    """A dataclass without room for typing errors."""

    def __getattr__(self, name):
        listed = ", ".join(entry.name for entry in fields(self))
        raise AttributeError(f"{type(self).__name__} has no field '{name}'; it has {listed}")

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__:
            self.__getattr__(name)
        super().__setattr__(name, value)


@dataclass(eq=False)
class Batch(Record):
    """Images of one domain as they come from the loader, on the device."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B, H, W) int64, 255 = ignore; only 255 in a target batch
    sample: (
        Tensor  # (B) int64: numbers in the stream of samples, the seeds of what is drawn at random
    )
    numbers: list[int]  # the same on the host: reading them from a GPU would wait for it
    extra: dict[str, Tensor] = field(default_factory=dict)  # stored maps (B, H, W) uint8, by name

    @classmethod
    def load(cls, batch, device):
        """A collated batch of a data set on the device. Bytes travel; floats are made there."""

        def move(value):
            return value.to(device, non_blocking=True)

        return cls(
            image=move(batch["image"]).to(torch.get_default_dtype()) / 255,
            label=move(batch["label"]).long(),
            sample=move(batch["sample"]),
            numbers=batch["sample"].tolist(),
            extra={name: move(maps) for name, maps in batch["extra"].items()},
        )


class View(NamedTuple):
    """What the network sees of a batch."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    domain: str = "target"  # whose stem it takes, where a backbone has one per domain
    text: Tensor | None = None  # text rows (K, D') for heads.text_attention
    dense: Tensor | None = None  # (B, D', h, w) of a frozen image tower; None: the network's own


@dataclass(eq=False)
class Regions(Record):
    """What heads.region finds on one view (models/heads/region.py): R x C regions of a map (h, w)."""

    assignment: (
        Tensor  # (B, R, C, 9, c c): how much each pixel of a cell belongs to the 3 x 3 cells around
    )
    domain: Tensor  # (B, R, C): logits of "source" behind the gradient reversal
    transferability: Tensor  # (B, h, w) in 0..1
    logits: Tensor | None = None  # (B, K, h, w) of the region's own classifier
    uncertainty: Tensor | None = None  # (B, h, w) in 0..1
    priority: Tensor | None = None  # (B, h, w) in 0..1: (1 - transferability) uncertainty
    keys: tuple | None = None  # grid of the keys of the guided attention
    opens: Callable | None = (
        None  # logits (B, K, h, w) -> pixels (B, h, w) bool that all queries may see
    )


@dataclass(eq=False)
class Output(Record):
    """What the network makes of one view. The fields after `features` are None where no part makes them."""

    logits: Tensor | None = None  # (B, K, h, w); losses and evaluation resize them
    features: Tensor | None = None  # (B, D, h, w), which enter the classifier
    embedding: Tensor | None = (
        None  # (B, D', h, w) in the joint space of text and images, of any length
    )
    text: Tensor | None = None  # (B, K, D'): unit text rows as heads.text_attention changes them
    auxiliary: Tensor | None = None  # (B, K, h', w'): logits of heads.auxiliary; in training
    layers: tuple = ()  # logits (B, K, h, w) before each layer of a query decoder; in training
    components: Tensor | None = (
        None  # (B, K, M, h, w): scores of several components a class; in training
    )
    regions: Regions | None = None  # of heads.region

    def scores(self, head):
        """Class scores (B, K, h, w): "logits", "auxiliary", "region", "query0", "query1" ...

        Raises:
            UserError: the network has no such head.
        """
        found = {"logits": self.logits, "auxiliary": self.auxiliary}
        found |= {"region": self.regions and self.regions.logits}
        found |= {f"query{i}": logits for i, logits in enumerate(self.layers)}
        if found.get(head) is None:
            present = ", ".join(name for name, logits in found.items() if logits is not None)
            raise UserError(
                f"the network has no head '{head}'; it has {present}. 'auxiliary' needs model.heads.auxiliary, "
                "'region' model.heads.region, 'query0' the classifier queries.Queries"
            )
        return found[head]


@dataclass(eq=False)
class Step(Record):
    """One micro-batch of one training step. Parts read what was filled before them and write what they make.

    Order: views, labels and weights of what is known before the student looks; outputs; labels and weights that need
    the student's features; losses.
    """

    number: int  # of the step in its stage, from 0
    total: int  # steps of the stage
    source: Batch
    target: Batch | None = None  # train_uda.py
    prototypes: dict[str, nn.Module] = field(
        default_factory=dict
    )  # models/prototypes/base.py, and "classifier"
    teacher: Output | None = None  # on target.image (train_uda.py), where a part needs_teacher
    tower: Tensor | None = (
        None  # (B, D', h, w) of the frozen image tower (train_dg.py), where a part needs_tower
    )
    views: dict[str, View] = field(
        default_factory=dict
    )  # what the student sees: "source", "target", "mixed" ...
    labels: dict[str, Tensor] = field(
        default_factory=dict
    )  # of a view, (B, H, W) int64, 255 = ignore
    weights: dict[str, Tensor] = field(
        default_factory=dict
    )  # of the pixels of a view, (B, H, W); absent: 1
    outputs: dict[str, Output] = field(default_factory=dict)  # of a view
    counts: dict[str, Tensor] = field(default_factory=dict)  # what `pixels` returns
    skipped: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.bool)
    )  # 0-dim: not finite, not taken

    def pixels(self, view):
        """Labelled pixels of a view, 0-dim, averaged over processes: what sums over pixels are divided by.

        Of the source they are averaged over the micro-batches of the step too, so that every pixel of the step weighs
        the same. Pseudo labels exist only micro-batch by micro-batch.
        """
        if view not in self.counts:
            self.counts[view] = distributed.mean((self.labels[view] != IGNORE).sum().double())
        return self.counts[view]

    def samples(self, view):
        """Numbers (B) of the samples behind a view; every view but "source" shows the target, if there is one."""
        return (self.source if view == "source" or not self.target else self.target).sample

    def summary(self, prefix):
        """Scalars for the log: mean weight of each view's pixels, labelled share of each view but the source."""
        values = {f"{prefix}/weight_{name}": w.mean() for name, w in self.weights.items()}
        pseudo = {name: labels for name, labels in self.labels.items() if name != "source"}
        return values | {
            f"{prefix}/labelled_{name}": (labels != IGNORE).double().mean()
            for name, labels in pseudo.items()
        }

    @property
    def progress(self):
        """Share of the stage that is done, from 0 to below 1."""
        return self.number / self.total


def withheld(step, features, labels):
    """Features (B, D, h, w) and labels of a step as prototypes may learn from them: of a skipped step nothing is left."""
    features = torch.where(step.skipped, 0, features.detach())
    labels = resize_labels(labels, features.shape[-2:])
    return features, torch.where(step.skipped, IGNORE, labels), None


def evidence(steps, view):
    """What updates a member of the prototype family: (features, labels, None) of one view of every micro-batch.

    Raises:
        UserError: no such view has labels.
    """
    for step in steps:
        if view not in step.outputs or view not in step.labels:
            raise UserError(
                f"prototypes: no view '{view}' has labels; there are {', '.join(step.labels)}"
            )
        yield withheld(steps[-1], step.outputs[view].features, step.labels[view])
