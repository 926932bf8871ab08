"""What a classifier's class vectors are like, and whom they serve: the diagnostics of "Frozen is
better than learning" (Chen et al., PR 2024).

    python eval.py CHECKPOINT diagnostics=true pairs='[[Car, Truck], [Fence, Pole]]'

writes diagnostics.json, cosines.png and <set>_F1.png beside the other results, and the pictures to
TensorBoard where the run has its curves there. With class vectors w, K classes and the pixels n of
each in the training set:

    CS            1/2 sum_{i != j} cos(w_i, w_j), equation 8: 0 for orthogonal vectors,
                  K (K - 1) / 2 for equal ones. Of random ones in D channels it scatters around 0
                  by sqrt(K (K - 1) / 2 / D)
    CS_abs        the same of |cos|, which does not cancel; max_cos: the largest |cos|
    norm_pixels   Pearson's correlation of |w| and n: 0.27 for the learned classifier of the paper
    groups        mean F1 of classes that are about as frequent: classes sorted by n, rarest first,
                  and split by np.array_split into min(15, K // 2) groups (at least one); the paper
                  has 15 of 10 classes
    pairs         sum of the IoU of two similar classes; PAIRS, where the data set has both, or
                  those that are named
"""

import json
import logging

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

from engine import distributed, pictures
from engine.drawing import similarity
from engine.errors import UserError
from engine.files import write, write_picture

logger = logging.getLogger("engine")

PAIRS = (
    # ADE20K: those of the paper
    ("sofa", "chair"),
    ("stairs", "stairway"),
    ("bicycle", "minibike"),
    ("oven", "microwave"),
    # streets: a choice of this project
    ("person", "rider"),
    ("motorcycle", "bicycle"),
    ("truck", "bus"),
    ("road", "sidewalk"),
    ("wall", "fence"),
    ("Pedestrian", "Bicyclist"),
    ("Road", "Pavement"),
    ("Pole", "SignSymbol"),
)


MEANING = {
    "CS": "sum of the cosines of pairs of class vectors; 0 where all are orthogonal",
    "CS_abs": "the same of absolute cosines, which do not cancel",
    "max_cos": "largest absolute cosine of a pair; 1: two classes share a direction",
    "norm_pixels": "correlation of a class vector's length with the class's pixels in training; "
    "near 1: frequent classes are preferred",
}


def separability(vectors):
    """Class vectors (K, D) -> {"CS", "CS_abs", "max_cos"}."""
    unit = F.normalize(vectors.detach().double().cpu(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    return {
        "CS": float(cosines.sum() / 2),
        "CS_abs": float(cosines.abs().sum() / 2),
        "max_cos": float(cosines.abs().max()),
    }


def norm_pixels(vectors, pixels):
    """Pearson's correlation of the norms of class vectors (K, D) and the pixels (K); None where one
    of them is alike for all classes."""
    norms = vectors.detach().double().cpu().norm(dim=1).numpy()
    values = np.stack([norms, np.asarray(pixels, np.float64)])
    if (values.std(1) <= 1e-6 * abs(values.mean(1))).any():
        return None
    return float(np.corrcoef(values)[0, 1])


def frequency_groups(f1, pixels):
    """F1 (K) in [0, 1] with nan for classes that have none, and pixels (K) -> [{"classes"
    (numbers), "pixels" (mean), "F1" (per cent, None where no class has one)}], rarest first."""
    f1 = np.asarray(f1, np.float64)
    groups = []
    for members in np.array_split(np.argsort(pixels, kind="stable"), max(1, min(15, len(f1) // 2))):
        known = f1[members][np.isfinite(f1[members])]
        mean = 100 * float(known.mean()) if len(known) else None
        groups.append(
            {"classes": members.tolist(), "pixels": float(np.mean(pixels[members])), "F1": mean}
        )
    return groups


def checked_pairs(pairs, classes):
    """Pairs [[class, class]] of these classes as they are; None: those of PAIRS that there are."""
    if pairs is None:
        return [[*pair] for pair in PAIRS if {*pair} <= {*classes}]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise UserError(
            f"pairs must be a list of pairs of classes, such as [[Car, Truck]], not {pairs!r}"
        )
    if unknown := [name for pair in pairs for name in pair if name not in classes]:
        raise UserError(
            f"pairs names the class '{unknown[0]}'; the data set has {', '.join(classes)}"
        )
    return pairs


def pair_sums(matrix, pairs):
    """ConfusionMatrix -> {"a + b": sum of two IoUs in per cent, None where one of them has
    none}."""
    iou = dict(zip(matrix.classes, matrix.per_class()["IoU"].tolist()))
    sums = {f"{a} + {b}": 100 * (iou[a] + iou[b]) for a, b in pairs}
    return {pair: value if value == value else None for pair, value in sums.items()}


def told(value):
    """A number of a table, "-" where there is none."""
    return "-" if value is None else f"{value:.1f}"


def bars(values, captions, title):
    """Per cents, None for none, as bars below each other with a caption and the number: a picture
    (H, W, 3) uint8."""
    font = ImageFont.load_default(size=pictures.FONT)
    line, width = pictures.FONT + 2 * pictures.GAP, 400
    left = pictures.GAP * 2 + int(max(map(font.getlength, captions)))
    right = max(left + width + 60, int(font.getlength(title)) + 2 * pictures.GAP)
    page = Image.new("RGB", (right, line * (len(values) + 1)), pictures.WHITE)
    draw = ImageDraw.Draw(page)
    draw.text((pictures.GAP, line / 2), title, pictures.INK, font, anchor="lm")
    for i, (value, caption) in enumerate(zip(values, captions)):
        middle, length = line * (i + 1.5), width * (value or 0) / 100
        draw.text((left - pictures.GAP, middle), caption, pictures.INK, font, anchor="rm")
        draw.rectangle(
            (left, middle - line / 3, left + width, middle + line / 3), None, pictures.GREY
        )
        if length:
            draw.rectangle(
                (left, middle - line / 3, left + length, middle + line / 3), pictures.SEQUENTIAL[2]
            )
        text = told(value)
        draw.text((left + width + pictures.GAP, middle), text, pictures.INK, font, anchor="lm")
    return np.array(page)


def diagnose(classifier, matrices, counts, folder, step, pairs):
    """Write the diagnostics of a classifier and log them.

    Args:
        classifier: with `means()`.
        matrices: {set: ConfusionMatrix} of the network.
        counts: (K) pixels of each class in the training set.
        folder: of the other results, in the run's folder.
        step: of the checkpoint.
        pairs: of `checked_pairs`.
    """
    vectors, names = classifier.means().detach(), next(iter(matrices.values())).classes
    content = separability(vectors) | {"norm_pixels": norm_pixels(vectors, counts), "sets": {}}
    lines = [""]
    lines += [
        f"{key} {content[key]:.3f}: {meaning}"
        for key, meaning in MEANING.items()
        if content[key] is not None
    ]
    shown = {
        "cosines": pictures.heatmap(
            similarity(vectors),
            names,
            names,
            low=-1,
            diverging=True,
            title="cosines of the class vectors: 0 orthogonal, 1 one direction",
        )
    }
    for name, matrix in matrices.items():
        groups = frequency_groups(matrix.per_class()["F1"].numpy(), counts)
        groups = [group | {"classes": [names[i] for i in group["classes"]]} for group in groups]
        sums = pair_sums(matrix, pairs)
        content["sets"][name] = {"groups": groups, "pairs": sums}
        captions = [
            f"{', '.join(group['classes'][:3])}{' ...' * (len(group['classes']) > 3)}"
            for group in groups
        ]
        title = f"{name}: mean F1 of groups of classes, rarest in training first"
        shown[f"{name}_F1"] = bars([group["F1"] for group in groups], captions, title)
        scores = " ".join(told(group["F1"]) for group in groups)
        pair_scores = "".join(f"; {pair} {told(value)}" for pair, value in sums.items())
        lines.append(
            f"{name}: F1 of groups of classes, rarest first: {scores}"
            + (pair_scores and "; sums of IoU" + pair_scores)
        )
    logger.info("\n".join(lines))
    if not distributed.is_main():
        return
    write(folder / "diagnostics.json", json.dumps(content | {"pixels": counts.tolist()}, indent=1))
    for name, picture in shown.items():
        write_picture(folder / f"{name}.png", picture)
    if any(folder.parent.glob("events.out.tfevents.*")):
        with SummaryWriter(str(folder)) as writer:
            for name, picture in shown.items():
                writer.add_image(f"diagnostics/{name}", picture, step, dataformats="HWC")
