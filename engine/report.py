"""Evaluate a network on named data sets and write what a reader wants to see of it.

<folder>/<set>.json   summary, per class, confusion matrix, and what the number depends on
<folder>/<set>.csv    per class
<folder>/<set>_confusion.png, <set>_<index>.png    image | truth | prediction
"""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import torch

from engine import distributed, pictures
from engine.errors import UserError
from engine.files import inside, replacing, write, write_picture
from engine.inference import NonFiniteScores, evaluate, predict
from engine.metrics import ConfusionMatrix
from engine.prepare import images
from engine.statistics import IGNORE, resize_logits

logger = logging.getLogger("engine")

SMALLEST = 192  # pixels: smaller images are enlarged, so that they can be looked at


def similarity(vectors):
    """Cosines (K, K) between class vectors (K, D), for `pictures.heatmap`."""
    rows = torch.nn.functional.normalize(vectors.detach().float().cpu(), dim=1, eps=1e-6)
    return (rows @ rows.T).numpy().round(2) + 0.0  # + 0.0: no cell reads "-0.00"


def side_by_side(image, palette, **maps):
    """Image (3, H, W) in [0, 1] and maps (H, W) -> one picture. Class ids are laid over the image, weights are grey."""
    rgb = (image.detach().float().cpu().clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    panels = [("image", rgb)]
    for caption, values in maps.items():
        values = values.detach().cpu()
        if values.is_floating_point():
            grey = (values.float().clamp(0, 1) * 255).byte().numpy()
            panels.append(
                (f"{caption}, mean {float(values.mean()):.2f}", grey[..., None].repeat(3, 2))
            )
        else:
            panels.append((caption, pictures.overlay(rgb, values.numpy(), palette)))
    return pictures.strip(panels, height=max(SMALLEST, len(rgb)))


def confusion_picture(matrix, title):
    """Row-normalised confusion matrix as a picture."""
    counts = matrix.matrix.double().cpu().numpy()
    rows = counts.sum(1, keepdims=True)
    shares = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    return pictures.heatmap(shares, matrix.classes, matrix.classes, title=title, text="{:.0%}")


def draw_step(log, step, views, labels, weights, outputs, vectors, dataset):
    """TensorBoard: what a training step saw and where the prototypes are."""
    draw_views(log, step, views, labels, weights, outputs, dataset)
    draw_prototypes(log, step, vectors, dataset)
    if "target" in labels:
        log_label_shares(log, step, labels["target"], dataset)


def draw_views(log, step, views, labels, weights, outputs, dataset, count=2):
    """TensorBoard: the first images of every view of a training step, its labels, weights and the prediction."""
    for name, view in views.items():
        maps = {"labels": labels[name]} if name in labels else {}
        maps |= {"weights": weights[name]} if name in weights else {}
        logits = outputs[name].logits.detach()[:count].float()
        maps["prediction"] = resize_logits(logits, view.image.shape[-2:]).argmax(1)
        rows = [
            side_by_side(
                image, dataset.PALETTE, **{caption: values[i] for caption, values in maps.items()}
            )
            for i, image in enumerate(view.image[:count])
        ]
        rows.append(pictures.legend(dataset.CLASSES, dataset.PALETTE, rows[0].shape[1]))
        log.picture(f"images/{name}", pictures.stack(rows), step)


def draw_prototypes(log, step, vectors, dataset):
    """TensorBoard: cosines between the class vectors of the classifier and of each prototype member; of mixtures also
    the likelihood quantiles of what they were fitted to and the mean responsibility of each component."""
    names = dataset.CLASSES
    for name, member in vectors.items():
        picture = pictures.heatmap(
            similarity(member.means()), names, names, low=-1.0, diverging=True, title=name
        )
        log.picture(f"prototypes/{name}", picture, step)
        if not hasattr(member, "quantiles") or not member.seen.any():
            continue
        unseen = ~member.seen[:, None].cpu()
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        table = torch.stack([member.quantiles(level) for level in levels], 1).double().cpu()
        known = table[~unseen[:, 0]]
        low, high, heads = (
            float(known.min()),
            float(known.max()) + 1e-6,
            [f"{level:.0%}" for level in levels],
        )
        table = table.masked_fill(unseen, torch.nan).numpy()
        title = "quantiles of the log-likelihood, nats"
        picture = pictures.heatmap(
            table, names, heads, low=low, high=high, title=title, text="{:.0f}"
        )
        log.picture(f"prototypes/{name}_likelihood", picture, step)
        shares = member.component_weights.double().cpu().masked_fill(unseen, torch.nan).numpy()
        heads = [str(number + 1) for number in range(shares.shape[1])]
        picture = pictures.heatmap(
            shares, names, heads, title="mean responsibility of each component", text="{:.0%}"
        )
        log.picture(f"prototypes/{name}_components", picture, step)


@torch.no_grad()
def draw_regions(log, step, network, image):
    """TensorBoard: TMT's regions on one image (1, 3, H, W): their borders, transferability, uncertainty, priority, and
    on a transformer the attention that the tokens get in the last guided block without and with it."""
    from models.blocks import received
    from models.region import labels_of

    region, mode, inputs = network.region, network.training, []
    if region.stage > 0:
        blocks = getattr(network.backbone, f"block{region.stage}", None) or network.backbone.blocks
        attention = blocks[region.last].attn
        hook = attention.register_forward_pre_hook(
            lambda module, arguments: inputs.append(arguments)
        )
    aux = network.eval().segment(image, step=step).aux
    network.train(mode)
    shown = {
        name: aux[name] for name in ("transferability", "uncertainty", "priority") if name in aux
    }
    if inputs:
        hook.remove()
        x, guide = inputs[0]
        q, k, _ = attention.project(x)
        for name, given in (("attention before", None), ("attention after", guide)):
            keys = aux["keys"]
            values = received(q.float(), k.float(), given)[:, -keys[0] * keys[1] :].view(1, *keys)
            shown[name] = values / values.amax()
    size = image.shape[-2:]
    shown = {
        name: resize_logits(values[:, None].float(), size)[0, 0] for name, values in shown.items()
    }
    regions = labels_of(aux["assignment"], region.cell, aux["transferability"].shape[-2:])
    regions = torch.nn.functional.interpolate(regions[None].double(), size)[0, 0]
    border = torch.zeros(size, dtype=torch.bool, device=image.device)
    border[:-1] |= regions.diff(dim=0) != 0
    border[:, :-1] |= regions.diff(dim=1) != 0
    log.picture(
        "regions", side_by_side(torch.where(border, 1.0, image[0].float()), (), **shown), step
    )


def log_label_shares(log, step, labels, dataset):
    """TensorBoard: per cent of the pixels of a view's labels (B, H, W) that each class has."""
    counts = torch.bincount(labels.flatten(), minlength=256)[: len(dataset.CLASSES)]
    shares = (100 * counts / labels.numel()).tolist()
    log.scalars(
        {f"pseudo/pixels_{name}": share for name, share in zip(dataset.CLASSES, shares)}, step
    )


def drawn(dataset, options):
    """Indices of the images that a report shows, evenly spaced."""
    return (
        np.linspace(0, len(dataset) - 1, min(options.pictures, len(dataset))).astype(int).tolist()
    )


def report(network, datasets, options, device, autocast, folder, about, known=None):
    """Evaluate and write.

    Args:
        network: Segmentor.
        datasets: {name: labelled data set}.
        options: the `eval` section.
        folder: where the files go.
        about: dict of facts that are written with the numbers (checkpoint, step, commit ...).
        known: {data set: ConfusionMatrix} of this network, of sets that need no second evaluation.
    Returns:
        {name: ConfusionMatrix}, the same on every process.
    Raises:
        UserError: scores that are not finite, the name of a set that leads out of the folder, a full disk.
    """
    folder, matrices = Path(folder), {}
    for name in datasets:
        inside(folder, name)
    for name, dataset in datasets.items():
        matrix = (known or {}).get(dataset) or evaluate(
            network, dataset, options, device, autocast, title=name
        )
        matrices[name] = matrix
        protocol = describe(options)
        logger.info(
            f"\n{name}: {len(dataset)} images, {protocol}, {options.weights}\n{matrix.table()}"
        )
        if not distributed.is_main():
            continue
        content = {
            "dataset": name,
            "images": len(dataset),
            "protocol": protocol,
            "weights": options.weights,
            **about,
        }
        write_result(folder / f"{name}.json", content | matrix.as_dict())
        with replacing(folder / f"{name}.csv") as path, open(path, "w", newline="") as file:
            columns = matrix.per_class()
            writer = csv.writer(file)
            writer.writerow(["class", *columns])
            for i, row in enumerate(zip(*(values.tolist() for values in columns.values()))):
                writer.writerow([matrix.classes[i], *(f"{100 * value:.2f}" for value in row)])
        picture = confusion_picture(matrix, f"{name}: rows truth, columns prediction")
        write_picture(folder / f"{name}_confusion.png", picture)
        for index in drawn(dataset, options):
            picture = draw(network, dataset, index, options, device, autocast)
            write_picture(folder / f"{name}_{index:04d}.png", picture)
    return matrices


def write_result(path, content):
    """Write a result as JSON. One that differs from the file in nothing but the command leaves the file alone."""

    def lines(text):
        return [line for line in text.splitlines() if not line.startswith(' "command": ')]

    text = json.dumps(content, indent=1)
    if not path.is_file() or lines(text) != lines(path.read_text("utf-8")):
        write(path, text)


def validate(network, dataset, options, device, autocast, log, step, known=None):
    """Evaluate during training and log the table -> mIoU, which chooses best.pt; nan where scores are not finite.

    `known`: dict that takes {data set: ConfusionMatrix}, for a `final_report` on the same weights.
    """
    try:
        matrix = evaluate(network, dataset, options, device, autocast, title="val")
    except NonFiniteScores as error:
        logger.warning(f"step {step}: {error}")
        return float("nan")
    if known is not None:
        known[dataset] = matrix
    score = matrix.summary()
    ious = zip(matrix.classes, matrix.per_class()["IoU"].tolist())
    per_class = {f"val/IoU_{name}": 100 * iou for name, iou in ious if iou == iou}
    log.scalars({f"val/{name}": value for name, value in score.items()} | per_class, step)
    log.picture(
        "val/confusion", confusion_picture(matrix, "val: rows truth, columns prediction"), step
    )
    logger.info(f"step {step}: val mIoU {score['mIoU']:.2f}")
    return score["mIoU"]


def domain_table(rows, seen=None):
    """{run: {test set: mIoU}} -> text: rows runs, columns domains and a mean, unknown where a domain is missing.

    `seen`, of runs of train_dg.py: names of the sets of the training domain; the mean, called unseen, is over the
    others. None, of other runs: the mean is over all sets.
    """
    domains = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    title = "mean" if seen is None else "unseen"
    averaged = [name for name in domains if name not in (seen or ())]
    heads = [f"{name}*" if name not in averaged else name for name in domains] + [title]
    width, cell = max(map(len, ["mIoU", *rows])), max(7, *map(len, heads))
    lines = [f"{'mIoU':<{width}} " + " ".join(f"{head:>{cell}}" for head in heads)]
    for run, scores in rows.items():
        values = [scores.get(name) for name in domains]
        known = [scores[name] for name in averaged if scores.get(name) is not None]
        values.append(sum(known) / len(known) if known and len(known) == len(averaged) else None)
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
    if len(parts) < 3 or parts[0] != "runs":
        return str(folder)
    return f"{'/'.join(parts[1:-1])} {parts[-1]}"


def selected_on_target(cfg, val_set, test_sets):
    """Whether best.pt is chosen on a domain that the run claims not to have seen; warns. The last checkpoint, which is
    what a run reports, is free of it.

    A validation set is one of the source if it differs from a training set in nothing but its part of it (split,
    length, size), and shares no image with an unseen test set.
    """
    if unknown := set(cfg.data.seen) - set(cfg.data.test):
        raise UserError(
            f"data.seen names {', '.join(sorted(unknown))}; the test sets are {', '.join(cfg.data.test)}"
        )
    if not val_set:
        return False
    part = ("split", "length", "size", "labels", "ignore", "root")
    trains = cfg.data.train if isinstance(cfg.data.train, list) else [cfg.data.train]
    own, *known = [
        {k: v for k, v in spec.items() if k not in part} for spec in (cfg.data.val, *trains)
    ]
    shown = {str(image) for image, _ in val_set.samples}
    unseen = [name for name in test_sets if name not in cfg.data.seen]
    shared = [
        name for name in unseen if shown & {str(image) for image, _ in test_sets[name].samples}
    ]
    if own in known and not shared:
        return False
    what = (
        f"shares images with the test domain {shared[0]}"
        if shared
        else "is not of the training domain"
    )
    logger.warning(
        f"data.val {what}: best.pt is then chosen on a target, and no number of it is domain generalisation. Take a "
        "part of the source, or data.val={name: none}. This run is marked selected_on_target"
    )
    return True


def final_report(
    network, datasets, options, device, autocast, folder, about, before=None, seen=None, known=None
):
    """The end of a run: the last weights on its test sets, in eval/ and results.json; best.pt is left to eval.py.

    With `before`, the network that adaptation started from, both are compared class by class and in pictures. With
    `seen`, names of test sets from the training domain, a table over all domains comes last. `known`, of `validate`
    after the last step: a test set that is the validation set is not evaluated again.
    """
    matrices = report(network, datasets, options, device, autocast, folder / "eval", about, known)
    results = {"results": {name: matrix.as_dict()["summary"] for name, matrix in matrices.items()}}
    results["IoU"] = {
        name: dict(zip(matrix.classes, matrix.as_dict()["IoU"]))
        for name, matrix in matrices.items()
    }
    if before is not None:
        old = compare(
            before, network, matrices, datasets, options, device, autocast, folder / "eval"
        )
        results["before"] = {name: matrix.as_dict()["summary"] for name, matrix in old.items()}
    scores = {name: summary["mIoU"] for name, summary in results["results"].items()}
    unseen = [
        score for name, score in scores.items() if name not in (seen or ()) and score is not None
    ]
    if seen is not None and unseen:
        results |= {"seen": list(seen), "unseen_mIoU": sum(unseen) / len(unseen)}
    if distributed.is_main():
        write(folder / "results.json", json.dumps(about | results, indent=1))
    logger.info(f"\nwritten to {folder}; curves and pictures: tensorboard --logdir {folder}")
    if "seen" in results:
        logger.info("\n" + domain_table({run_title(folder): scores}, seen))


def compare(before, after, matrices, datasets, options, device, autocast, folder):
    """Tables and pictures of a network before and after adaptation.

    Args:
        matrices: {name: ConfusionMatrix} of `after`.
    Returns:
        the same of `before`.
    """
    old = {
        name: evaluate(before, data, options, device, autocast, title="before")
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
            strips = []
            for index in drawn(dataset, options):
                sample = dataset[index]
                labels = [
                    label(network, sample["image"], options, device, autocast)
                    for network in (before, after)
                ]
                shown = dict(zip(("before", "after", "truth"), (*labels, sample["label"].long())))
                strips.append(side_by_side(sample["image"] / 255, dataset.PALETTE, **shown))
            strips.append(pictures.legend(dataset.CLASSES, dataset.PALETTE, strips[0].shape[1]))
            write_picture(folder / f"{name}_before_after.png", pictures.stack(strips))
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
        scores = predict(network, image[None].to(device, torch.get_default_dtype()) / 255, options)
    network.train(mode)
    return scores.argmax(1)[0]


def draw(network, dataset, index, options, device, autocast):
    """Image, truth and prediction of one image of a data set, with the legend below."""
    sample = dataset[index]
    prediction = label(network, sample["image"], options, device, autocast)
    maps = {"truth": sample["label"].long(), "prediction": prediction}
    row = side_by_side(sample["image"] / 255, dataset.PALETTE, **maps)
    return pictures.stack([row, pictures.legend(dataset.CLASSES, dataset.PALETTE, row.shape[1])])


@torch.no_grad()
def pseudo_label_quality(network, labeler, prototypes, dataset, device, autocast):
    """Pseudo labels of a labelled set against its truth.

    Returns:
        ConfusionMatrix (rows truth, columns pseudo labels) over the labelled pixels, and pixels of each class in the
        truth (K); the same on every process. Its column-wise precision is the accuracy of the labels.
    """
    mode = network.training
    network.eval()
    matrix = ConfusionMatrix(dataset.CLASSES, {}, device)
    truth = torch.zeros(len(dataset.CLASSES), dtype=torch.int64, device=device)
    for _, image, real in images(dataset, device):
        with autocast:
            pseudo = labeler.label(network, image, prototypes)
        truth += torch.bincount(real.flatten(), minlength=256)[: len(truth)]
        matrix.update(pseudo.where(pseudo != IGNORE, 0), real.where(pseudo != IGNORE, IGNORE))
    network.train(mode)
    return matrix.all_reduce(), distributed.all_reduce(truth)


def log_pseudo_labels(network, labeler, prototypes, dataset, device, autocast, log, step):
    """TensorBoard: share and accuracy of the pseudo labels of each class on a labelled set of the target domain."""
    matrix, truth = pseudo_label_quality(network, labeler, prototypes, dataset, device, autocast)
    values = label_scalars(matrix, truth)
    log.scalars(values, step)
    share, right = (values.get(f"pseudo/{kind}") for kind in ("share", "accuracy"))
    share, right = ("-" if value is None else f"{value:.1f} %" for value in (share, right))
    logger.info(f"pseudo labels: {share} labelled, {right} right")


def label_scalars(matrix, truth):
    """{tag: percent}: how much of each class has a pseudo label, and how many of the labels of each class are right."""
    counts, values = matrix.matrix.double(), {}
    columns = (counts.sum(1) / truth, counts.diagonal() / counts.sum(0))
    for kind, column in zip(("share", "accuracy"), columns):
        named = zip(matrix.classes, column.tolist())
        values |= {f"pseudo/{kind}_{name}": 100 * value for name, value in named if value == value}
    total = {
        "share": counts.sum() / truth.sum(),
        "accuracy": counts.diagonal().sum() / counts.sum(),
    }
    return values | {
        f"pseudo/{kind}": 100 * float(value) for kind, value in total.items() if value == value
    }


def describe(options):
    """The test protocol in words, printed next to every number."""
    words = [
        "whole image" if options.mode == "whole" else f"sliding {options.crop} / {options.stride}"
    ]
    words += [f"short side {options.short_side}"] if options.short_side else []
    words += [f"scales {list(options.scales)}"] if list(options.scales) != [1.0] else []
    words += ["flip"] if options.flip else []
    return ", ".join(words)
