"""Evaluate a network on named data sets and write what a reader wants to see of it.

<folder>/<set>.json   summary, per class, confusion matrix, and what the number depends on
<folder>/<set>.csv    per class
<folder>/<set>_confusion.png, <set>_<index>.png    image | truth | prediction
"""

import csv
import json
import logging
import re
from pathlib import Path

import numpy as np
import torch

from engine import checkpoint, distributed, pictures
from engine.files import inside, replacing, tidy, write, write_picture
from engine.inference import NonFiniteScores, classify, evaluate
from engine.metrics import ConfusionMatrix
from engine.prepare import images
from engine.process import signals
from engine.statistics import IGNORE, resize_labels

logger = logging.getLogger("engine")


def confusion_picture(matrix, title):
    """Row-normalised confusion matrix as a picture."""
    counts = matrix.matrix.double().cpu().numpy()
    rows = counts.sum(1, keepdims=True)
    shares = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    return pictures.heatmap(shares, matrix.classes, matrix.classes, title=title, text="{:.0%}")


def drawn(dataset, options):
    """Indices of the images that a report shows, evenly spaced."""
    return (
        np.linspace(0, len(dataset) - 1, min(options.pictures, len(dataset))).astype(int).tolist()
    )


def report(network, datasets, options, device, autocast, folder, about, known=None, workers=0):
    """Evaluate and write.

    Args:
        network: Segmentor.
        datasets: {name: labelled data set}.
        options: the `eval` section.
        folder: where the files go.
        about: dict of facts that are written with the numbers (checkpoint, step, commit ...).
        known: {data set: ConfusionMatrix} of this network, of sets that need no second evaluation.
        workers: loader processes.
    Returns:
        {name: ConfusionMatrix}, the same on every process.
    Raises:
        UserError: scores that are not finite, the name of a set that leads out of the folder, a
            full disk.
    """
    folder, matrices = Path(folder), {}
    for name in datasets:
        inside(folder, name)
    if distributed.is_main():
        tidy(folder)
    for name, dataset in datasets.items():
        matrices[name] = matrix = (known or {}).get(dataset) or evaluate(
            network, dataset, options, device, autocast, name, workers
        )
        protocol = describe(options)
        logger.info(
            f"\n{name}: {len(dataset)} images, {protocol}, {options.weights}\n{matrix.table()}"
        )
        if not distributed.is_main():
            continue
        sizes = {"dataset": name, "images": len(dataset), "protocol": protocol}
        content = {**sizes, "weights": options.weights, **about, **matrix.as_dict()}
        write_result(folder / f"{name}.json", content)
        with replacing(folder / f"{name}.csv") as path, open(path, "w", newline="") as file:
            columns = matrix.per_class()
            writer = csv.writer(file)
            writer.writerow(["class", *columns])
            for i, row in enumerate(zip(*(values.tolist() for values in columns.values()))):
                writer.writerow([matrix.classes[i], *(f"{100 * value:.2f}" for value in row)])
        title = f"{name}: rows truth, columns prediction"
        write_picture(folder / f"{name}_confusion.png", confusion_picture(matrix, title))
        for index in drawn(dataset, options):
            picture = draw({"prediction": network}, dataset, [index], options, device, autocast)
            write_picture(folder / f"{name}_{index:04d}.png", picture)
    return matrices


def write_result(path, content):
    """Write a result as JSON. One that differs from the file in nothing but the command leaves the
    file alone."""

    def lines(text):
        return [line for line in text.splitlines() if not line.startswith(' "command": ')]

    text = json.dumps(content, indent=1)
    if not path.is_file() or lines(text) != lines(path.read_text("utf-8")):
        write(path, text)


def validate(network, dataset, options, autocast, run):
    """Evaluate during training and log the table -> mIoU, which chooses best.pt.

    nan where scores are not finite, None where a signal cut it short.
    """
    log, step, run.known = run.writer, run.offset + run.done, {}
    try:
        matrix = evaluate(
            network, dataset, options, run.device, autocast, "val", run.stage.data.workers
        )
    except NonFiniteScores as error:
        logger.warning(f"step {step}: {error}")
        return float("nan")
    if matrix is None:
        return None
    run.known = {dataset: matrix}  # a test set that is this one needs no second evaluation
    score = matrix.summary()
    ious = zip(matrix.classes, matrix.per_class()["IoU"].tolist())
    per_class = {f"val/IoU_{name}": 100 * iou for name, iou in ious if iou == iou}
    log.scalars({f"val/{name}": value for name, value in score.items()} | per_class, step)
    log.picture(
        "val/confusion", confusion_picture(matrix, "val: rows truth, columns prediction"), step
    )
    logger.info(f"step {step}: val mIoU {score['mIoU']:.2f}")
    return score["mIoU"]


def unseen_of(domains, seen):
    """The domains that are not of the training domain; all of them where `seen` is None."""
    return [name for name in domains if name not in (seen or ())]


def mean_of(scores, names):
    """Mean of {test set: mIoU} over these sets; None where there is none or one is unknown."""
    known = [scores.get(name) for name in names]
    return sum(known) / len(known) if known and None not in known else None


def domain_table(rows, seen=None):
    """{run: {test set: mIoU}} -> text: rows runs, columns domains and a mean, unknown where a
    domain is missing.

    `seen`, of runs of train_dg.py: names of the sets of the training domain; the mean, called
    unseen, is over the others. None, of other runs: the mean is over all sets.
    """
    domains = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    title = "mean" if seen is None else "unseen"
    averaged = unseen_of(domains, seen)
    heads = [f"{name}*" if name not in averaged else name for name in domains] + [title]
    width, cell = max(map(len, ["mIoU", *rows])), max(7, *map(len, heads))
    lines = [f"{'mIoU':<{width}} " + " ".join(f"{head:>{cell}}" for head in heads)]
    for run, scores in rows.items():
        values = [scores.get(name) for name in domains]
        values.append(mean_of(scores, averaged))
        cells = (
            f"{value:>{cell}.2f}" if value is not None else f"{'-':>{cell}}" for value in values
        )
        lines.append(f"{run:<{width}} " + " ".join(cells))
    if seen is not None:
        lines.append(f"unseen: mean of {', '.join(averaged) or 'none'}")
        lines[-1] += ";  * of the training domain" if seen else ""
    return "\n".join(lines)


def run_title(folder):
    """runs/toy/dg_ppar/seed0 -> "toy/dg_ppar seed0", another folder as it is."""
    parts = Path(folder).parts
    ours = len(parts) > 2 and parts[0] == "runs"
    return f"{'/'.join(parts[1:-1])} {parts[-1]}" if ours else str(folder)


def selected_on_target(cfg, val_set, test_sets):
    """Whether best.pt is chosen on a domain that the run claims not to have seen; warns. The last
    checkpoint, which is what a run reports, is free of it.

    A validation set is one of the source if it differs from a training set in nothing but its part
    of it (split, length, size), and shares no image with an unseen test set. CamVid's splits name
    a domain, the light after the underscore.
    """
    if not val_set:
        return False
    part = ("split", "length", "size", "labels", "ignore")
    trains = cfg.data.train if isinstance(cfg.data.train, list) else [cfg.data.train]
    (own, light), *sources = [
        (
            {"root": cfg.data.root} | {k: v for k, v in spec.items() if k not in part},
            re.findall("_(day|dusk)$", str(spec.get("split", ""))),
        )
        for spec in (cfg.data.val, *trains)
    ]
    known = any(own == source and of in ([], light) for source, of in sources)
    shown = {str(image) for image, _ in val_set.samples}
    unseen = [name for name in test_sets if name not in cfg.data.seen]
    shared = [
        name for name in unseen if shown & {str(image) for image, _ in test_sets[name].samples}
    ]
    if known and not shared:
        return False
    what = (
        f"shares images with the test domain {shared[0]}"
        if shared
        else "is not of the training domain"
    )
    logger.warning(
        f"data.val {what}: best.pt is then chosen on a target, and no number of it is domain "
        f"generalisation. Take a "
        "part of the source, or data.val={name: none}. This run is marked selected_on_target"
    )
    return True


def final_report(network, datasets, options, autocast, run, before=None, seen=None):
    """The end of a run: the last weights on its test sets, in eval/ and results.json; best.pt is
    left to eval.py, unless eval.patience ended the run, which then reports it.

    With `before`, the network that adaptation started from, both are compared class by class and in
    pictures. With `seen`, names of test sets from the training domain, a table over all domains
    comes last.
    """
    device, folder, workers = run.device, run.folder, run.stage.data.workers
    chosen = run.exhausted() and (folder / "best.pt").is_file()  # a full disk may have none
    step = take_best(run) if chosen else run.offset + run.done
    best = None if run.best < 0 else run.best  # not validated
    about = run.about | {"step": step, "seconds": round(run.seconds()), "best_val": best}
    matrices = report(
        network, datasets, options, device, autocast, folder / "eval", about, run.known, workers
    )
    told = {name: matrix.as_dict() for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        run.writer.text(f"test/{name}", f"{describe(options)}\n{matrix.table()}", step)
    results = {
        "results": {name: values["summary"] for name, values in told.items()},
        "IoU": {name: dict(zip(v["classes"], v["IoU"])) for name, v in told.items()},
    }
    if before is not None:
        old = compare(
            before, network, matrices, datasets, options, device, autocast, folder / "eval", workers
        )
        results["before"] = {name: matrix.as_dict()["summary"] for name, matrix in old.items()}
    scores = {name: summary["mIoU"] for name, summary in results["results"].items()}
    unseen = unseen_of(scores, seen)
    if seen is not None and unseen:
        results |= {"seen": list(seen), "unseen_mIoU": mean_of(scores, unseen)}
    if distributed.is_main():
        write(folder / "results.json", json.dumps(about | results, indent=1))
    logger.info(f"\nwritten to {folder}; curves and pictures: tensorboard --logdir {folder}")
    if "seen" in results:
        logger.info("\n" + domain_table({run_title(folder): scores}, seen))


def take_best(run):
    """Give the network of a run, and its average, the weights of best.pt.

    Returns:
        the step of best.pt.
    """
    path = run.folder / "best.pt"
    best, run.known = checkpoint.load(path), {}
    for name in run.parts.keys() & {"model", "teacher"}:
        checkpoint.restore(run.parts[name], name, best, path)
    logger.info(
        f"eval.patience: no better validation since step {best['step']}, whose network is reported"
    )
    return best["step"]


def compare(before, after, matrices, datasets, options, device, autocast, folder, workers=0):
    """Tables and pictures of a network before and after adaptation.

    Args:
        matrices: {name: ConfusionMatrix} of `after`.
    Returns:
        the same of `before`.
    """
    old = {
        name: evaluate(before, data, options, device, autocast, "before", workers)
        for name, data in datasets.items()
    }
    for name, dataset in datasets.items():
        ious = [100 * matrix.per_class()["IoU"] for matrix in (old[name], matrices[name])]
        both = ious[0].isfinite() & ious[1].isfinite()
        alike = all(torch.equal(both, values.isfinite()) for values in ious)
        title = "mIoU" if alike else f"mIoU of the {int(both.sum())} classes that both have"
        width = max(map(len, [*dataset.CLASSES, title]))
        rows = [
            f"{text:<{width}} {_number(a):>8} {_number(b):>8} {_number(b - a, '+'):>8}"
            for text, a, b in zip(
                [*dataset.CLASSES, title],
                *(torch.cat([values, values[both].mean()[None]]).tolist() for values in ious),
            )
        ]
        head = f"{'IoU':<{width}} {'before':>8} {'after':>8} {'change':>8}"
        logger.info("\n".join([f"\n{name}: before and after adaptation", head, *rows]))
        if distributed.is_main() and options.pictures:
            networks = {"before": before, "after": after}
            picture = draw(networks, dataset, drawn(dataset, options), options, device, autocast)
            write_picture(folder / f"{name}_before_after.png", picture)
    return old


def _number(value, sign=""):
    """A number for a table, "-" for nan."""
    return f"{value:{sign}.2f}" if value == value else "-"


@torch.no_grad()
def label(network, image, options, device, autocast):
    """Predicted ids (H, W) of an image (3, H, W) uint8."""
    mode = network.training
    network.eval()
    with autocast:
        image = image[None].to(device, torch.get_default_dtype()) / 255
        ids, _ = classify(network, image, options)
    network.train(mode)
    return ids


def draw(networks, dataset, indices, options, device, autocast):
    """Images of a data set with their truth and the predictions of {caption: network}, and a
    legend.

    The truth comes first beside one prediction, and last beside several.
    """
    rows = []
    for index in indices:
        sample = dataset[index]
        image, truth = sample["image"], {"truth": sample["label"].long()}
        made = {
            caption: label(network, image, options, device, autocast)
            for caption, network in networks.items()
        }
        maps = truth | made if len(made) == 1 else made | truth
        rows.append(pictures.side_by_side(image / 255, dataset.PALETTE, **maps))
    rows.append(pictures.legend(dataset.CLASSES, dataset.PALETTE, rows[0].shape[1]))
    return pictures.stack(rows)


@torch.no_grad()
def pseudo_label_quality(network, labeler, prototypes, dataset, device, autocast, short_side=0):
    """Pseudo labels of a labelled set, seen at this short side, against its truth.

    Returns:
        {tag: percent}, the same on every process: how much of each class, and of all, has a pseudo
        label, and how many of the labels of each class, and of all, are right. None if a signal has
        cut it short.
    """
    mode = network.training
    network.eval()
    matrix = ConfusionMatrix(dataset.CLASSES, {}, device)
    truth = torch.zeros(len(dataset.CLASSES), dtype=torch.int64, device=device)
    for _, image, real in images(dataset, device, short_side=short_side):
        if signals.received:
            break
        with autocast:
            pseudo = labeler.label(network, image, prototypes)
        pseudo = resize_labels(pseudo, real.shape[-2:])
        truth += torch.bincount(real.flatten(), minlength=256)[: len(truth)]
        matrix.update(pseudo.where(pseudo != IGNORE, 0), real.where(pseudo != IGNORE, IGNORE))
    network.train(mode)
    if signals.requested():
        return None
    counts, truth = matrix.all_reduce().matrix.double(), distributed.all_reduce(truth)
    right, values = counts.diagonal(), {}
    shares = {"share": (counts.sum(1), truth), "accuracy": (right, counts.sum(0))}
    for kind, (part, whole) in shares.items():
        column = [*(part / whole).tolist(), float(part.sum() / whole.sum())]
        tags = [*(f"pseudo/{kind}_{name}" for name in matrix.classes), f"pseudo/{kind}"]
        values |= {tag: 100 * value for tag, value in zip(tags, column) if value == value}
    return values


def log_pseudo_labels(network, labelers, prototypes, dataset, run, step, stored=False):
    """TensorBoard: share and accuracy of the pseudo labels of each class on a labelled set of the
    target domain.

    Args:
        labelers: of them those count whose labels are `stored`, or are not.
        dataset: None: nothing is measured.
    """
    for labeler in labelers if dataset else ():
        if not labeler.labels_images or labeler.stored != stored:
            continue
        values = pseudo_label_quality(
            network,
            labeler,
            prototypes,
            dataset,
            run.device,
            run.autocast,
            run.stage.eval.short_side,
        )
        if values is None:
            return
        run.writer.scalars(values, step)
        found = (values.get(f"pseudo/{kind}") for kind in ("share", "accuracy"))
        share, right = ("-" if value is None else f"{value:.1f} %" for value in found)
        logger.info(f"pseudo labels: {share} labelled, {right} right")


def describe(options):
    """The test protocol in words, printed next to every number."""
    words = [
        "whole image" if options.mode == "whole" else f"sliding {options.crop} / {options.stride}"
    ]
    words += [f"short side {options.short_side}"] if options.short_side else []
    words += [f"scales {list(options.scales)}"] if list(options.scales) != [1.0] else []
    words += ["flip"] if options.flip else []
    return ", ".join(words)
