"""The record of a training step: what losses, labelers, mixers and prototypes read and write.

This file is the one thing to learn before you change a loss. A misspelt field is an error that
lists the fields. B images, D feature channels, K classes, M components of a class, H W image size,
h w feature size.

    class Focal(Loss):
        def forward(self, step):
            logits = step.outputs["source"].logits      # (B, K, h, w)
            labels = step.labels["source"]              # (B, H, W)
            ...
            return loss.sum() / step.pixels("source")
"""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from engine import distributed
from engine.errors import UserError
from engine.statistics import IGNORE, resize_labels


class Record:
    """A dataclass without room for typing errors."""

    def __getattr__(self, name):
        raise AttributeError(
            f"{type(self).__name__} has no field '{name}'; it has "
            + ", ".join(entry.name for entry in fields(self))
        )

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__:
            self.__getattr__(name)
        super().__setattr__(name, value)


class ByView(dict):
    """{view: value}, or {name: stored map}; what a step lacks is an error that lists what it
    has."""

    def __missing__(self, name):
        raise UserError(
            f"the step has no such thing for '{name}', only for {', '.join(self) or 'none'}: give "
            "the loss or the prototypes another view=..., or the step a mixer or labeler that "
            "makes it; maps are stored when a stage starts, so start it again if they are missing"
        )


@dataclass(eq=False)
class Batch(Record):
    """Images of one domain as they come from the loader, on the device."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B, H, W) int64, 255 = ignore; only 255 in a target batch
    sample: Tensor  # (B) int64: place in the stream of samples, the seed of what is drawn
    numbers: list[int]  # the same on the host: to read it from a GPU would wait
    extra: dict[str, Tensor] = field(default_factory=dict)  # stored maps by name, (B, H, W) uint8
    part: Tensor | None = None  # (B) int64: number of its data set in a list of them

    @classmethod
    def load(cls, batch, device):
        """A collated batch of a data set on the device. Bytes travel; floats are made there."""
        moved = {
            name: batch[name].to(device, non_blocking=True)
            for name in ("image", "label", "sample", "part")
            if name in batch
        }
        return cls(
            image=moved["image"].to(torch.get_default_dtype()) / 255,
            label=moved["label"].long(),
            sample=moved["sample"],
            numbers=batch["sample"].tolist(),
            part=moved.get("part"),
            extra=ByView(
                {k: maps.to(device, non_blocking=True) for k, maps in batch["extra"].items()}
            ),
        )


class View(NamedTuple):
    """What the network sees of a batch."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    domain: str = "target"  # whose stem it takes, where a backbone has one per domain
    text: Tensor | None = None  # text rows (K, D') for heads.text_attention
    dense: Tensor | None = None  # (B, D', h, w) of a frozen image tower; None: the network's own


@dataclass(eq=False)
class Output(Record):
    """What the network makes of one view; None where no part of it makes that."""

    logits: Tensor | None = None  # (B, K, h, w); losses and evaluation resize them
    features: Tensor | None = None  # (B, D, h, w), which enter the classifier
    embedding: Tensor | None = None  # (B, D', h, w) of heads.projector, of any length
    text: Tensor | None = None  # (B, K, D') unit text rows of heads.text_attention
    auxiliary: Tensor | None = None  # (B, K, h', w') logits of heads.auxiliary, in training
    layers: tuple = ()  # (B, K, h, w) logits before each layer of a query decoder, in training
    components: Tensor | None = None  # (B, K, M, h, w) scores of a class's components, in training
    regions: Record | None = None  # of heads.region (models/heads/region.py)
    first: "Output | None" = None  # of a first pass, for a head that looks twice
    maps: tuple = ()  # of the backbone, in a first pass

    def scores(self, head):
        """Class scores (B, K, h, w): "logits", "auxiliary", "region", "query0", "query1" ...

        Raises:
            UserError: the network has no such head.
        """
        found = {
            "logits": self.logits,
            "auxiliary": self.auxiliary,
            "region": self.regions and self.regions.logits,
            **{f"query{i}": logits for i, logits in enumerate(self.layers)},
        }
        if found.get(head) is None:
            raise UserError(
                f"the network has no head '{head}'; it has "
                f"{', '.join(name for name, logits in found.items() if logits is not None)}. "
                "'auxiliary' needs model.heads.auxiliary, 'region' model.heads.region, 'query0' "
                "queries.Queries"
            )
        return found[head]


@dataclass(eq=False)
class Step(Record):
    """One micro-batch of one training step. Parts read what was filled before and write their own.

    The order: labels and weights that need no student, views; outputs; labels and weights that need
    them; losses; after the optimiser step, prototypes. Mappings are by name of the view: "source",
    "target", "mixed", "strong".
    """

    number: int  # of the step in its stage, from 0
    total: int  # steps of the stage
    source: Batch
    target: Batch | None = None  # train_uda.py
    prototypes: dict = field(default_factory=dict)  # members by name, and "classifier"
    teacher: Output | None = None  # on target.image, if a part needs_teacher
    tower: Tensor | None = None  # (B, D', h, w) of the image tower, if a part needs_tower
    views: dict[str, View] = field(default_factory=ByView)
    labels: dict[str, Tensor] = field(default_factory=ByView)  # (B, H, W) int64, 255 = ignore
    weights: dict[str, Tensor] = field(default_factory=dict)  # of pixels (B, H, W); none: 1
    outputs: dict[str, Output] = field(default_factory=ByView)
    counts: dict[str, Tensor] = field(default_factory=dict)  # what `pixels` returns
    skipped: Tensor = field(default_factory=lambda: torch.tensor(False))  # 0-dim: was not taken

    def pixels(self, view):
        """Labelled pixels of a view, 0-dim, the mean over processes, 1 where there is none: divide
        sums over pixels by it.

        Of the source it is also the mean over the micro-batches of the step, so that every pixel of
        the step weighs the same. Pseudo labels exist only micro-batch by micro-batch: terms on them
        change with train.accumulate (tests/test_accumulation.py lists them).
        """
        if view not in self.counts:
            self.counts[view] = distributed.mean((self.labels[view] != IGNORE).sum().double())
        return torch.where(self.counts[view] > 0, self.counts[view], 1)

    def batch(self, view):
        """What a view shows; all but "source" show the target, if there is one."""
        return self.source if view == "source" or not self.target else self.target

    def summary(self, prefix):
        """For the log: the mean weight of each view, the labelled share of all but the source."""
        values = {f"{prefix}/weight_{name}": w.mean() for name, w in self.weights.items()}
        return values | {
            f"{prefix}/labelled_{name}": (labels != IGNORE).double().mean()
            for name, labels in self.labels.items()
            if name != "source"
        }

    @property
    def progress(self):
        """Share of the stage that is done, from 0 to below 1."""
        return self.number / self.total


def withheld(step, features, labels, weights=None):
    """Features (B, D, h, w), labels and weights (B, H, W) as prototypes may learn from them.

    Of a step that was `skipped` they learn nothing.
    """
    size = features.shape[-2:]
    labels = resize_labels(labels, size).where(~step.skipped, IGNORE)
    weights = None if weights is None else resize_labels(weights, size)
    return torch.where(step.skipped, 0, features.detach()), labels, weights


def evidence(steps, view):
    """What updates a prototype member: (features, labels, weights or None) of a view of every
    micro-batch."""
    for step in steps:
        features, labels = step.outputs[view].features, step.labels[view]
        yield withheld(steps[-1], features, labels, step.weights.get(view))
