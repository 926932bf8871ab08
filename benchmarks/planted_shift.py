"""Does TMT's transferability find a shift that lies in one part of the picture only?

    python -m benchmarks.planted_shift [--steps 500] [--scenes 1024] [--seeds 0 1 2]
    python -m benchmarks.planted_shift [--shift night] [--out FOLDER]

Source: drawn scenes (datasets/toy.py, domain real) of 96x128. Target: other such scenes, in each of
which one box, half as high and wide as the picture and somewhere in it, has the look of another
domain. MiT-B0 from random weights learns to segment the source while the region discriminator, on
the tokens of its second stage, learns to tell the domains, as a probe (its gradient stops) or
behind the reversal. Then the area under the curve of 1 - T against the box, over 32 unseen target
pictures. 0.5 is chance; the control is the same pictures without the box, scored against it.
"""

import functools
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.kernels import arguments, record
from datasets.toy import draw
from engine import pictures
from engine.config import load
from losses.cross_entropy import CrossEntropy
from losses.tmt import RegionAdversarial
from models.build import build_segmentor

SIZE, K = (96, 128), 11


def scene(seed, index, shift=None):
    """One picture and the box in it that has the look of `shift`.

    Returns:
        (3, H, W) in [0, 1]; its labels (H, W); the box (H, W) bool.
    """
    image, label = draw(seed, index, "real", SIZE)
    box = np.zeros(SIZE, bool)
    top, left = np.random.default_rng((seed, index, 99)).integers(
        0, (SIZE[0] // 2 + 1, SIZE[1] // 2 + 1)
    )
    box[top : top + SIZE[0] // 2, left : left + SIZE[1] // 2] = True
    if shift:
        image = np.where(box[..., None], draw(seed, index, shift, SIZE)[0], image)
    return (
        torch.from_numpy(image).permute(2, 0, 1) / 255,
        torch.from_numpy(label).long(),
        torch.from_numpy(box),
    )


@functools.cache
def scenes(seed, count, shift=None):
    """Pictures, labels and boxes of so many scenes, drawn once."""
    return [torch.stack(column) for column in zip(*(scene(seed, n, shift) for n in range(count)))]


def area_under_curve(scores, positive):
    """Probability that a pixel of the box scores higher than one outside (ties by order)."""
    hits = positive.flatten()[scores.flatten().argsort(descending=True)].double()
    return float((hits.cumsum(0) * (1 - hits)).sum() / (hits.sum() * (1 - hits).sum()))


def train(seed, reverse, options):
    """A network in eval mode whose discriminator has learned.

    Args:
        options: `steps`, batches of 8 + 8 that it sees; `scenes`, pictures that they are out of.
    """
    torch.manual_seed(seed)
    turned = str(reverse).lower()
    texts = [
        "model.bn_views=[]",
        "model.heads.region={name: region.Region, stage: 2, ramp: 0, cell: 2, "
        f"reverse: {turned}}}",
    ]
    cfg = load("configs/toy/uda_tmt.yaml", texts)
    model = build_segmentor(cfg.model, range(K)).train()
    groups = [
        {"params": model.region.discriminator.parameters(), "lr": 1e-2}
    ]  # ten times the rate, as a head
    groups += [
        {
            "params": [
                p
                for name, p in model.named_parameters()
                if not name.startswith("region.discriminator")
            ]
        }
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, options.steps
    )  # else the last steps decide
    scored, adversarial = CrossEntropy(), RegionAdversarial()
    for number in range(options.steps):
        some, others = torch.randint(options.scenes, (2, 8))
        image, label, _ = (column[some] for column in scenes(1000, options.scenes))
        other = scenes(2000, options.scenes, options.shift)[0][others]
        step = record({"source": image, "target": other}, {"source": label})
        step.outputs = model(step.views, number)
        (scored(step) + adversarial(step)).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measure(model, shift):
    """Area under the curve over 32 unseen pictures, and these with 1 - T and box for the eye."""
    images, _, boxes = scenes(3000, 32, shift)
    regions = [model.segment(image[None]).regions for image in images]
    found = torch.cat([1 - part.transferability for part in regions])
    inside = F.interpolate(boxes[:, None].float(), found.shape[1:], mode="area")[:, 0] > 0.5
    return area_under_curve(found, inside), (images, found, boxes)


def picture(images, found, boxes, count=4):
    """Rows of picture, box and 1 - T, which goes from its least to its greatest of all pictures."""
    high = F.interpolate(found[:, None], SIZE)[:, 0]
    high = (high - high.amin()) / (high.amax() - high.amin())
    columns = list(zip(images, boxes.float(), high))[:count]
    return pictures.stack(
        [pictures.side_by_side(image, (), box=box, found=values) for image, box, values in columns]
    )


def main():
    defaults = {"steps": 500, "scenes": 1024, "seeds": [0, 1, 2], "shift": "night"}
    options = arguments("planted_shift", **defaults, out=Path("runs/planted_shift"))
    options.out.mkdir(parents=True, exist_ok=True)
    print("| discriminator | area under the curve, by seed | without the box | median |")
    print("|---|---|---|---|")
    for name, reverse in (("probe", False), ("adversarial", True)):
        areas, controls = [], []
        for seed in options.seeds:
            model = train(seed, reverse, options)
            area, shown = measure(model, options.shift)
            areas.append(area)
            controls.append(measure(model, None)[0])
            Image.fromarray(picture(*shown)).save(options.out / f"{name}_{seed}.png")
        areas_text, controls_text = (
            ", ".join(f"{value:.3f}" for value in values) for values in (areas, controls)
        )
        print(
            f"| {name} | {areas_text} | {controls_text} | {statistics.median(areas):.3f} |",
            flush=True,
        )
    print(f"pictures: {options.out}")


if __name__ == "__main__":
    main()
