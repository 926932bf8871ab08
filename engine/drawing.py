"""What TensorBoard shows of a training step: views, labels, predictions, prototypes."""

import numpy as np
import torch

from engine import distributed, pictures
from engine.statistics import resize_logits


def draw_step(run, step, dataset, network=None):
    """TensorBoard: what a training step saw, where the prototypes are, and per cent of the target's
    labels that each class has; what the heads of a network show of its first target image. Where
    pictures are due, at the first step of the process and every log.images_every."""
    every, number = run.stage.log.images_every, run.offset + run.done
    due = every > 0 and (run.done == run.first + 1 or run.done % every == 0)
    if not (due and distributed.is_main()):
        return
    draw_views(run.writer, number, step, dataset)
    draw_prototypes(run.writer, number, step.prototypes, dataset)
    if "target" in step.labels:
        labels, names = step.labels["target"].flatten(), dataset.CLASSES
        shares = (100 * torch.bincount(labels, minlength=256) / len(labels)).tolist()
        shares = {f"pseudo/pixels_{name}": share for name, share in zip(names, shares)}
        run.writer.scalars(shares, number)
    for head in network.heads.values() if network else ():
        head.draw(run.writer, number, network, step.target.image[:1])


def draw_views(log, number, step, dataset, count=2):
    """TensorBoard: the first images of every view of a training step, its labels, weights and the
    prediction."""
    for name, view in step.views.items():
        maps = {"labels": step.labels[name]} if name in step.labels else {}
        maps |= {"weights": step.weights[name]} if name in step.weights else {}
        logits = step.outputs[name].logits.detach()[:count].float()
        maps["prediction"] = resize_logits(logits, view.image.shape[-2:]).argmax(1)
        rows = [
            pictures.side_by_side(
                image, dataset.PALETTE, **{caption: values[i] for caption, values in maps.items()}
            )
            for i, image in enumerate(view.image[:count])
        ]
        rows.append(pictures.legend(dataset.CLASSES, dataset.PALETTE, rows[0].shape[1]))
        log.picture(f"images/{name}", pictures.stack(rows), number)


def draw_prototypes(log, number, prototypes, dataset):
    """TensorBoard: cosines between the class vectors of each member of the family, and its
    tables."""
    names = dataset.CLASSES
    for name, member in prototypes.items():
        picture = pictures.heatmap(
            similarity(member.means()), names, names, low=-1.0, diverging=True, title=name
        )
        log.picture(f"prototypes/{name}", picture, number)
        for kind, (values, heads, title, text) in (
            member.tables().items() if member.seen.any() else ()
        ):
            values = values.cpu().numpy()
            low, high = min(0.0, np.nanmin(values)), max(1.0, np.nanmax(values) + 1e-6)
            picture = pictures.heatmap(
                values, names, heads, low=low, high=high, title=title, text=text
            )
            log.picture(f"prototypes/{name}_{kind}", picture, number)


def similarity(vectors):
    """Cosines (K, K) between class vectors (K, D), for `pictures.heatmap`."""
    rows = torch.nn.functional.normalize(vectors.detach().float().cpu(), dim=1, eps=1e-6)
    return (rows @ rows.T).numpy().round(2) + 0.0  # + 0.0: no cell reads "-0.00"
