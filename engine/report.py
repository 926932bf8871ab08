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
from PIL import Image

from engine import distributed, pictures
from engine.inference import evaluate, predict
from engine.statistics import IGNORE, resize_logits

logger = logging.getLogger("engine")

SMALLEST = 192  # pixels: smaller images are enlarged, so that they can be looked at


def similarity(vectors):
    """Cosines (K, K) between class vectors (K, D), for `pictures.heatmap`."""
    rows = torch.nn.functional.normalize(vectors.detach().float().cpu(), dim=1, eps=1e-6)
    return (rows @ rows.T).numpy().round(2) + 0.0  # + 0.0: no cell reads "-0.00"


def comparison(image, label, prediction, palette):
    """Image (3, H, W) in [0, 1], label and prediction (H, W) -> one picture, side by side."""
    rgb = (image.detach().float().cpu().clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    label, prediction = label.cpu().numpy(), prediction.cpu().numpy()
    panels = [("image", rgb), ("truth", pictures.overlay(rgb, label, palette))]
    panels.append(("prediction", pictures.overlay(rgb, prediction, palette)))
    return pictures.strip(panels, height=max(SMALLEST, len(rgb)))


def confusion_picture(matrix, title):
    """Row-normalised confusion matrix as a picture."""
    counts = matrix.matrix.double().cpu().numpy()
    rows = counts.sum(1, keepdims=True)
    shares = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    return pictures.heatmap(shares, matrix.classes, matrix.classes, title=title, text="{:.0%}")


def draw_views(log, step, views, labels, outputs, dataset, count=2):
    """TensorBoard: the first images of every view of a training step, its labels and the prediction."""
    for name, view in views.items():
        shown, truth = view.image[:count], labels.get(name, torch.full_like(view.image[:, 0], IGNORE).long())[:count]
        predictions = resize_logits(outputs[name].logits.detach()[:count].float(), truth.shape[-2:]).argmax(1)
        rows = [comparison(*triple, dataset.PALETTE) for triple in zip(shown, truth, predictions)]
        rows.append(pictures.legend(dataset.CLASSES, dataset.PALETTE, rows[0].shape[1]))
        log.picture(f"images/{name}", pictures.stack(rows), step)


def draw_similarity(log, step, vectors, dataset):
    """TensorBoard: cosines between the class vectors of the classifier and of each prototype member."""
    for name, member in vectors.items():
        matrix = similarity(member.means())
        names = dataset.CLASSES
        log.picture(
            f"prototypes/{name}", pictures.heatmap(matrix, names, names, low=-1.0, diverging=True, title=name), step
        )


def report(network, datasets, options, device, autocast, folder, about):
    """Evaluate and write.

    Args:
        network: Segmentor.
        datasets: {name: labelled data set}.
        options: the `eval` section.
        folder: where the files go.
        about: dict of facts that are written with the numbers (checkpoint, step, commit ...).
    Returns:
        {name: ConfusionMatrix}, the same on every process.
    """
    folder, matrices = Path(folder), {}
    for name, dataset in datasets.items():
        matrix = matrices[name] = evaluate(network, dataset, options, device, autocast, title=name)
        protocol = describe(options)
        logger.info(f"\n{name}: {len(dataset)} images, {protocol}, {options.weights}\n{matrix.table()}")
        if not distributed.is_main():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        content = {"dataset": name, "images": len(dataset), "protocol": protocol, "weights": options.weights, **about}
        (folder / f"{name}.json").write_text(json.dumps(content | matrix.as_dict(), indent=1))
        with open(folder / f"{name}.csv", "w", newline="") as file:
            columns = matrix.per_class()
            writer = csv.writer(file)
            writer.writerow(["class", *columns])
            for i, row in enumerate(zip(*(values.tolist() for values in columns.values()))):
                writer.writerow([matrix.classes[i], *(f"{100 * value:.2f}" for value in row)])
        picture = confusion_picture(matrix, f"{name}: rows truth, columns prediction")
        Image.fromarray(picture).save(folder / f"{name}_confusion.png")
        for index in np.linspace(0, len(dataset) - 1, min(options.pictures, len(dataset))).astype(int):
            Image.fromarray(draw(network, dataset, int(index), options, device, autocast)).save(
                folder / f"{name}_{index:04d}.png"
            )
    return matrices


def validate(network, dataset, options, device, autocast, log, step):
    """Evaluate during training and log the table -> mIoU, which chooses best.pt."""
    matrix = evaluate(network, dataset, options, device, autocast, title="val")
    score = matrix.summary()
    ious = zip(matrix.classes, matrix.per_class()["IoU"].tolist())
    per_class = {f"val/IoU_{name}": 100 * iou for name, iou in ious if iou == iou}
    log.scalars({f"val/{name}": value for name, value in score.items()} | per_class, step)
    log.picture("val/confusion", confusion_picture(matrix, "val: rows truth, columns prediction"), step)
    logger.info(f"step {step}: val mIoU {score['mIoU']:.2f}")
    return score["mIoU"]


def final_report(network, datasets, options, device, autocast, folder, about):
    """The end of a run: the last weights on its test sets, in eval/ and results.json; best.pt is left to eval.py."""
    matrices = report(network, datasets, options, device, autocast, folder / "eval", about)
    results = {name: matrix.as_dict()["summary"] for name, matrix in matrices.items()}
    if distributed.is_main():
        (folder / "results.json").write_text(json.dumps(about | {"results": results}, indent=1))
    logger.info(f"\nwritten to {folder}; curves and pictures: tensorboard --logdir {folder}")


@torch.no_grad()
def draw(network, dataset, index, options, device, autocast):
    """Comparison picture of one image of a data set, with the legend below."""
    sample, mode = dataset[index], network.training
    image = sample["image"].to(device, torch.get_default_dtype()) / 255
    network.eval()
    with autocast:
        prediction = predict(network, image[None], options).argmax(1)[0]
    network.train(mode)
    row = comparison(image, sample["label"], prediction, dataset.PALETTE)
    return pictures.stack([row, pictures.legend(dataset.CLASSES, dataset.PALETTE, row.shape[1])])


def describe(options):
    """The test protocol in words, printed next to every number."""
    words = ["whole image" if options.mode == "whole" else f"sliding {options.crop} / {options.stride}"]
    words += [f"short side {options.short_side}"] if options.short_side else []
    words += [f"scales {list(options.scales)}"] if list(options.scales) != [1.0] else []
    words += ["flip"] if options.flip else []
    return ", ".join(words)
