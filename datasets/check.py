"""Look at the data before training on it.

    python -m datasets.check configs/camvid/resnet18_linear.yaml data.root=PATH

Reads every sample of data.train, val, target, monitor and test, prints sizes, the share of each
class and problems, and draws four samples of each set, and four as training sees them, into <run
folder>/check/. A problem is exit code 1: a sample that cannot be used, a class that never occurs,
most of the pixels ignored.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.base import IGNORE, DataError, check_scored
from datasets.build import build_set
from engine.build import build
from engine.config import ConfigError, load
from engine.metrics import warnings_about
from engine.pictures import colorize, legend, overlay, stack, strip
from engine.process import loader, loaders, run

DRAWN, HEIGHT = 4, 240  # samples per picture, pixels of each


class Measured(Dataset):
    """Of each sample ((height, width), pixels of each of the 256 ids, None), or
    (None, None, problem)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            _, label = self.dataset.load(index)
        except DataError as error:
            return None, None, str(error)
        return label.shape, np.bincount(label.ravel(), minlength=256), None


def measure(dataset, name, workers):
    """Walk over a data set -> sizes [(height, width)], counts (number of readable samples, 256),
    problems [text]."""
    options = {"num_workers": loaders(workers), "worker_init_fn": loader}
    samples = DataLoader(Measured(dataset), batch_size=None, collate_fn=tuple, **options)
    measured = list(tqdm(samples, desc=name, unit=" images", disable=None, leave=False))
    sizes = [size for size, _, problem in measured if not problem]
    counts = np.array([count for _, count, problem in measured if not problem]).reshape(-1, 256)
    problems = [problem for *_, problem in measured if problem]
    if dataset.labels:
        pixels = [*counts.sum(0)[: len(dataset.CLASSES)], counts[:, IGNORE].sum()]
        problems = warnings_about(pixels, dataset.CLASSES, name, dataset.expected) + problems
    return sizes, counts, problems


def describe(dataset, name, sizes, counts, problems):
    """The report on one data set, as lines of text."""
    yield f"{name}: {type(dataset).__name__} {dataset.split}, {len(dataset)} images"
    for image in dataset.left_out:
        yield f"  left out: {image} ({dataset.KNOWN_BAD[Path(image).stem]})"
    if dataset.stylised:
        copies = [*dataset.stylised.values()]
        yield f"  read in place of the images: {len(copies)} stylised copies, such as {copies[0]}"
    if sizes:
        (low_h, low_w), (high_h, high_w) = min(sizes, key=np.prod), max(sizes, key=np.prod)
        yield f"  width x height: {low_w}x{low_h} to {high_w}x{high_h}, {len(set(sizes))} different"
    if sizes and dataset.labels:
        pixels, images = counts.sum(0), (counts > 0).sum(0)
        yield f"  {'id':>3} {'class':20} {'pixels':>9} {'images':>7}"
        for i, title in [*enumerate(dataset.CLASSES), (IGNORE, "ignore")]:
            yield f"  {i:3} {title:20} {pixels[i] / pixels.sum():9.3%} {images[i]:7}"
        if absent := [title for i, title in enumerate(dataset.CLASSES) if not images[i]]:
            yield f"  never occur: {', '.join(absent)}"
    yield f"  problems: {len(problems)}"
    yield from (f"    {problem}" for problem in problems[:5])


def draw(dataset, path):
    """Write evenly spaced samples of a data set as rows image | overlay | labels, as the set
    augments them."""
    rows, palette = [], dataset.PALETTE
    for index in np.unique(np.linspace(0, len(dataset) - 1, DRAWN).astype(int)).tolist():
        try:
            sample = dataset[index]
        except DataError:
            continue  # already among the problems
        image, label = sample["image"].permute(1, 2, 0).numpy(), sample["label"].numpy()
        panels = [
            (Path(dataset.samples[index][0]).stem, image),
            ("overlay", overlay(image, label, palette)),
        ]
        rows.append(strip([*panels, ("labels", colorize(label, palette))], height=HEIGHT))
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        key = legend(
            [*dataset.CLASSES, "ignore"], [*palette, (0, 0, 0)], max(row.shape[1] for row in rows)
        )
        Image.fromarray(stack([*rows, key])).save(path)
        print(f"  drawn: {path}")


def main(arguments):
    cfg = load(arguments[0], arguments[1:])
    specs = {name: cfg.data[name] for name in ("train", "val", "monitor", "target")}
    specs |= {f"test.{name}": spec for name, spec in cfg.data.test.items()}
    specs = {name: spec if isinstance(spec, list) else [spec] for name, spec in specs.items()}
    specs = {name: several for name, several in specs.items() if several[0].get("name") != "none"}
    if "target" in specs:  # as training reads it
        specs["target"] = [spec | {"labels": False} for spec in specs["target"]]
    if not specs:
        raise ConfigError(
            f"{arguments[0]} names no data set: data.train, val, target, monitor and test are empty"
        )
    # All of them first: a mistake should not show up only after minutes of reading.
    context = {"root": cfg.data.root, "seed": cfg.seed}
    sets = {name: build_set(f"data.{name}", several, **context) for name, several in specs.items()}
    for name, dataset in sets.items():
        if name != "target":
            check_scored(name, dataset)
    augment = build("datasets", cfg.data.augment) if "train" in sets else None
    folder, bad = Path(cfg.folder) / "check", 0
    for name, dataset in sets.items():
        sizes, counts, problems = measure(dataset, name, cfg.data.workers)
        print("\n".join(describe(dataset, name, sizes, counts, problems)))
        draw(dataset, folder / f"{name}.png")
        bad += len(problems)
    if "train" in sets:
        print("train, augmented:")
        draw(
            build_set("data.train", specs["train"], augment=augment, **context),
            folder / "augmented.png",
        )
    if bad:
        raise DataError(
            f"{bad} problem{'s' * (bad > 1)} in {sum(map(len, sets.values()))} samples; see above"
        )


if __name__ == "__main__":
    run(main, __doc__)
