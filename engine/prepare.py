"""What a stage of domain adaptation makes before its first step: stored pseudo labels, weight maps,
fitted prototypes.

A part with a method `prepare(preparation)` is called once. What it stores are PNGs in the run
folder,

    <run>/maps/<number>_<stage>/<source|target>/<name>/<path of the image>.png, settings.json

which the training set then returns as `extra[name]`, cut and mirrored with the image. The maps
appear as a whole or not at all, and each process makes its share of them.

Maps that no trained network enters are made once per run: a later stage reads those of an earlier
one that were made of the same (`Preparation.reuse`). So each stage writes in its own folder alone,
and a checkpoint names the stages whose maps it reads.

Pictures are seen as training and evaluation show them, at `eval.short_side` (the source's at
`uda.source_short_side`) and the source's in the style of the stage. Maps have the size of the file.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset
from tqdm import tqdm

from engine import distributed
from engine.build import build
from engine.checkpoint import fingerprint
from engine.errors import UserError
from engine.files import inside, read_json, replacing, write
from engine.inference import read, scaled
from engine.log import interactive
from engine.statistics import resize_labels

logger = logging.getLogger("engine")
KINDS = ("source", "target")
SETTINGS = "settings.json"
MADE = "made_of"  # its key in the settings of maps that other stages may read
UNFINISHED = re.compile(r"\.settings\.\d+\.tmp\.json")  # what a kill before the first map leaves


def images(dataset, device, workers=0, count=None, short_side=0):
    """This process's share of a data set: (index, image (1, 3, h, w) in [0, 1], label (1, H, W)
    int64).

    Args:
        count: at most as many images of the whole set, evenly spaced.
        short_side: pixels of the image, not of its label; 0: those of the file.
    """
    chosen = (
        np.linspace(0, len(dataset) - 1, min(count or len(dataset), len(dataset)))
        .round()
        .astype(int)
        .tolist()
    )
    mine = chosen[distributed.rank() :: distributed.world_size()]
    samples = read(dataset, mine, workers)
    for sample in tqdm(
        samples,
        "prepare",
        leave=False,
        disable=not (distributed.is_main() and interactive()),
        mininterval=1.0,
    ):
        image = sample["image"][None].to(device, torch.get_default_dtype()) / 255
        label = sample["label"][None].to(device).long()
        yield sample["index"], scaled(image, short_side), label


def stage_of(folder):
    """The number of the stage that a folder of maps belongs to, from 1; 0 if it is none."""
    number = folder.name.partition("_")[0]
    return int(number) if number.isdecimal() else 0


class Preparation:
    """The network to label with, the data sets as the student sees them, and a place for maps.

    Args:
        network: Segmentor that the stage starts from or learns from; used in eval mode.
        source, target: the training sets; `store` adds maps to them.
        prototypes: {name: member}, which a part may fit.
        folder: of the stage's maps.
        autocast: context of forward passes.
        workers: loader processes.
        short_sides: pixels of the short side of source and target images; 0: those of the file.
        style: of the source images, which take it from target images that the seed draws; or None.
        seed: of the stage.
        shown: what decides how pictures look, as plain values: data sets, style, precision.
    """

    def __init__(
        self,
        network,
        source,
        target,
        prototypes,
        folder,
        device,
        autocast,
        workers=0,
        short_sides=(0, 0),
        style=None,
        seed=0,
        shown=None,
    ):
        self.network, self.prototypes = network.eval(), prototypes
        self.device, self.autocast, self.workers = device, autocast, workers
        self.folder, self.training = Path(folder), dict(zip(KINDS, (source, target)))
        self.source, self.target = source.without_augmentation(), target.without_augmentation()
        self.short_sides, self.style = short_sides, style
        self.shown = [shown, short_sides, fingerprint(source), fingerprint(target)]
        draw = torch.Generator().manual_seed(seed)
        self.partners = torch.randint(len(target), (len(source),), generator=draw).tolist()

    def images(self, dataset):
        """This process's share of a data set: (index, image (1, 3, h, w) in [0, 1], label (1, H, W)
        int64)."""

        def shown(part, short_side):
            return images(part, self.device, self.workers, short_side=short_side)

        if dataset is not self.source:
            return shown(dataset, self.short_sides[1])
        found = shown(dataset, self.short_sides[0])
        if self.style is None:
            return found
        partners = shown(Subset(self.target, self.partners), self.short_sides[1])
        return (
            (index, self.style(image, partner), label)
            for (index, image, label), (_, partner, _) in zip(found, partners)
        )

    @torch.no_grad()
    def segment(self, image, domain="target"):
        """Output of the network for images (B, 3, H, W) of a domain."""
        with self.autocast:
            return self.network.segment(image, domain)

    def backbone(self, spec):
        """A frozen backbone from its specification, in eval mode; it normalises pictures for
        itself."""
        return (
            build("models.backbones", spec, "Backbone").requires_grad_(False).eval().to(self.device)
        )

    def reuse(self, name, dataset, made_of):
        """Give the training set the maps of an earlier stage of the run that were made of the same.

        What was drawn for them stays drawn: centres of clusters, partners of styles.

        Args:
            name, dataset: as for `store`.
            made_of: plain values that the maps depend on besides the pictures; no trained network
                is among them.
        Returns:
            whether there are any.
        """
        inner, wanted = Path(self._kind(dataset), name), self._facts(made_of)
        found = [
            stage / inner
            for stage in sorted(self.folder.parent.glob("*_*"), key=stage_of)
            if 0 < stage_of(stage) < stage_of(self.folder) and (stage / inner / SETTINGS).is_file()
        ]
        found = [folder for folder in found if read_json(folder / SETTINGS).get(MADE) == wanted]
        found = distributed.gather(found)[0]  # the same on all processes
        if found:
            self._give(name, dataset, found[0])
        return bool(found)

    def _facts(self, made_of):
        """As they come back from a file."""
        return json.loads(json.dumps([made_of, self.shown]))

    def _kind(self, dataset):
        return KINDS[0] if dataset is self.source else KINDS[1]

    def _give(self, name, dataset, folder):
        kind = self._kind(dataset)
        self.training[kind].extra[name] = folder
        logger.info(f"{name}: maps of {len(dataset)} {kind} images in {folder}")

    def store(self, name, dataset, make, settings, palette=False, made_of=None):
        """Make a map of every image and give it to the training set as `extra[name]`.

        Args:
            dataset: `self.source` or `self.target`.
            make: function (index, image, label) -> (H, W) of 0..255; of another size than the
                label it is resized to it as labels are.
            settings: what the maps depend on, written beside them; plain values.
            palette: the maps hold class ids, 255 = none, and get the colours of the data set.
            made_of: as for `reuse`; None: a trained network enters, so no other stage reads them.
        """
        root, shown = self.folder / self._kind(dataset), self.images(dataset)
        if made_of is not None:
            settings = settings | {MADE: self._facts(made_of)}
        folder = write_maps(root, name, dataset, shown, make, settings, palette)
        self._give(name, dataset, folder)

    def stored(self):
        """Where the maps lie, such as "2_adapt/target/pseudo_labels", for the checkpoint."""
        folders = [folder for kind in KINDS for folder in self.training[kind].extra.values()]
        return [folder.relative_to(self.folder.parent).as_posix() for folder in folders]

    def attach(self, names):
        """Give the training sets the maps that an interrupted run has stored."""
        for item in names:
            *stage, kind, name = item.split("/")  # older checkpoints name no stage: the own one
            folder = (self.folder.parent if stage else self.folder) / item
            if not (folder / SETTINGS).is_file():
                raise UserError(
                    f"the maps {folder} of the interrupted stage are gone, and the "
                    f"network they were made "
                    "with is not that of the checkpoint: remove the checkpoints of this stage to "
                    "start it again"
                )
            self.training[kind].extra[name] = folder


@torch.no_grad()
def write_maps(root, name, dataset, images, make, settings, palette=False):
    """PNGs of the maps that `make` returns for this process's `images`, and settings.json; see
    `Preparation.store`.

    Returns:
        Path of their folder, `<root>/<name>`. Maps that are there already are replaced.
    Raises:
        UserError: the name leads out of `root`, or the folder holds something else than maps.
    """
    folder = inside(root, name)
    partial = folder.with_name(f"{folder.name}.partial")
    if distributed.is_main():
        for old in (folder, partial):
            if not os.path.lexists(old):
                continue
            ours = old.is_dir() and not old.is_symlink()
            inner = list(old.iterdir()) if ours else []
            unfinished = all(UNFINISHED.fullmatch(path.name) for path in inner)
            if not ours or not (unfinished or (old / SETTINGS).is_file()):
                raise UserError(
                    f"{old} holds no maps (there is no {SETTINGS} in it) and is not replaced: move "
                    f"it away"
                )
            # The settings last: a kill must leave a folder that says whose it is.
            for path in inner:
                if path.name != SETTINGS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(old)
        content = {"images": len(dataset), "classes": list(dataset.CLASSES), **settings}
        write(
            partial / SETTINGS, json.dumps(content, indent=1)
        )  # first: it says whose folder this is
    distributed.barrier()
    for index, image, label in images:
        values = resize_labels(make(index, image, label), label.shape[-2:])
        with replacing(partial / f"{dataset.stem(index)}.png") as path:
            save_map(path, values, dataset.PALETTE if palette else None)
    distributed.barrier()
    if distributed.is_main():
        os.replace(partial, folder)
    distributed.barrier()
    return folder


def save_map(path, values, palette=None):
    """Write a map (H, W) of 0..255 as an 8-bit PNG: grey, or class ids with their colours, 255
    black."""
    picture = Image.fromarray(values.to("cpu").numpy().astype(np.uint8))
    if palette is not None:
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(palette)] = palette
        picture.putpalette(colors.flatten().tolist())
    picture.save(path)
