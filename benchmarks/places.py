"""Where can attention be told something? An oracle says which part of a picture is of the target.

    python -m benchmarks.places --checkpoint PATH --rows none "all 2" "all 2 inside" --steps 0
    python -m benchmarks.places --checkpoint PATH [--labels true] [--images 60] [--seeds 0 1]

PATH: a vision transformer (vit.ViT) that train_uda.py has trained on CamVid by day, such as the
source model of benchmarks/grids/camvid_dusk_vit_t.yaml. Source: its training images. Target: the
same images, in each of which one box, half as high and wide, is dark, blue and noisy. The network
learns from both for some steps, from labels of an averaged teacher or from true ones. An oracle
tells the attention where the box is: keys in it gain so many nats in the last blocks, in training
and at test. Printed: mIoU inside and outside of the boxes of unseen images, before and after.

    python -m benchmarks.places --write runs/planted

writes such targets as a data set in CamVid's layout, for train_uda.py: splits train (the images of
train_day), and inside and outside (those of test_day, labels of the other side ignored; choose
settings on val_inside and val_outside).

    python -m benchmarks.places --moved CHECKPOINT [--images 20]

prints which share of its attention a query moves where TMT guides it, and of the attention that a
key gets, how much it changes: half the sum of absolute differences, and their mean relative to what
was there; mean over heads, guided blocks, and pictures of test_dusk.

    python -m benchmarks.places --doubt CHECKPOINT... [--rows none "all 2" "all -2" "all 2 control"]

lets the network's own doubt take the oracle's place, without training: the entropy of a first look
at a picture of test_dusk, mean over 9 x 9 cells and ranked, says which keys gain. Printed: mIoU.

A row is "none", or "<blocks> <nats>", such as "all 2" or "4 -2"; with " inside" only the queries in
the box are guided, with " control" the oracle sees the box of another image.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.kernels import arguments
from datasets.camvid import CamVid
from engine import schedule
from engine.ema import Teacher
from engine.metrics import ConfusionMatrix
from engine.statistics import IGNORE, resize_logits
from models.blocks import Guide
from models.build import restore
from models.heads._transferability import ranks, uncertainty
from models.heads.base import Head

CROP, BATCH = (144, 192), 4
OPTIMIZER = SimpleNamespace(
    name="AdamW",
    lr=5e-5,
    head_lr_factor=5.0,
    layer_decay=1.0,
    weight_decay=0.01,
    betas=(0.9, 0.999),
)
SCHEDULE = SimpleNamespace(warmup=25, warmup_ratio=0.0, power=0.9, min_ratio=0.0, min_lr=0.0)
SPLITS = {
    "train_day": ["train"],
    "val_day": ["val_inside", "val_outside"],
    "test_day": ["inside", "outside"],
}
ROWS = ["none", "all 2", "all -2", "4 2", "4 4", "4 -2", "1 4", "all 2 inside", "all -2 inside"]


class Oracle(Head):
    """Keys in the box gain so many nats in the last blocks, relative to the mean key."""

    at_test = True

    def __init__(self, depth, row):
        super().__init__()
        blocks, nats, *self.options = (row if row != "none" else "all 0").split()
        self.first = 0 if blocks == "all" else depth - int(blocks)
        self.nats, self.box = float(nats), None

    def bias(self, output, step):
        def before(stage, block, x, keys):
            if self.box is None or block < self.first or not self.nats:
                return None
            box = self.box.roll(1, 0) if "control" in self.options else self.box
            small = F.adaptive_avg_pool2d(box[:, None].float(), keys).flatten(1)
            bias = self.nats * (small - small.mean(1, keepdim=True))[:, None, None]
            return Guide(bias * small[:, None, :, None] if "inside" in self.options else bias)

        return before


def planted(images, generator):
    """Images (B, 3, H, W), each with a box of another look -> them, and the boxes (B, H, W)."""
    boxes = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    for box in boxes:
        h, w = box.shape
        top, left = (int(torch.randint(n // 2 + 1, (), generator=generator)) for n in (h, w))
        box[top : top + h // 2, left : left + w // 2] = True
    tint = torch.tensor([0.4, 0.45, 0.55]).view(3, 1, 1)
    noise = 0.03 * torch.randn(images.shape, generator=generator)
    dark = (images**1.2 * tint + noise).clamp(0, 1)
    return torch.where(boxes[:, None], dark, images), boxes


def crops(images, labels, generator):
    """BATCH random crops, half of them mirrored."""
    picked = []
    for n in torch.randint(len(images), (BATCH,), generator=generator).tolist():
        top, left = (
            int(torch.randint(whole - side + 1, (), generator=generator))
            for whole, side in zip(labels[n].shape, CROP)
        )
        window = (..., slice(top, top + CROP[0]), slice(left, left + CROP[1]))
        pair = images[n][window], labels[n][window]
        mirrored = torch.rand((), generator=generator) < 0.5
        picked.append([part.flip(-1) if mirrored else part for part in pair])
    image, label = (torch.stack(column) for column in zip(*picked))
    return image.float() / 255, label.long()


def look(network, images, boxes):
    """Logits (B, K, H, W), the oracle knowing the boxes (None: it says nothing)."""
    network.oracle.box = boxes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network.segment(images).logits
    return resize_logits(logits.float(), images.shape[2:])


@torch.no_grad()
def score(network, images, labels, classes):
    """mIoU inside and outside of the boxes of the images."""
    generator = torch.Generator().manual_seed(9)
    matrices = [ConfusionMatrix(classes), ConfusionMatrix(classes)]
    for some, label in zip(images.split(2), labels.split(2)):
        shown, boxes = planted(some.float() / 255, generator)
        found = look(network, shown, boxes).argmax(1)
        for matrix, part in zip(matrices, (boxes, ~boxes)):
            matrix.update(found, torch.where(part, label.long(), IGNORE))
    return [matrix.summary()["mIoU"] for matrix in matrices]


def with_oracle(path, row):
    """A checkpoint's network with the oracle of a row -> it, names of the classes."""
    network, _, saved = restore(path)
    network.oracle = Oracle(network.backbone.depths[0], row)
    network.head_names.append("oracle")
    return network, saved["classes"]


def run(path, row, seed, options, data, test):
    """One row -> mIoU inside and outside of the boxes before and after the steps."""
    torch.manual_seed(seed)
    network, classes = with_oracle(path, row)
    before = score(network, *test, classes)
    teacher, optimizer = Teacher(network, 0.99), schedule.make_optimizer(network, OPTIMIZER)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for number in range(options.steps):
        schedule.set_rates(optimizer, number, options.steps, SCHEDULE)
        source, label = crops(*data, generator)
        target, truth = crops(*data, generator)
        target, boxes = planted(target, generator)
        labels, weight = truth, 1.0
        if options.labels == "teacher":
            with torch.no_grad():
                found = look(teacher.network, target, boxes).softmax(1).max(1)
            labels, weight = found.indices, (found.values > 0.968).float().mean()
        loss = F.cross_entropy(look(network, source, None), label, ignore_index=IGNORE)
        loss += weight * F.cross_entropy(look(network, target, boxes), labels, ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(network, torch.tensor(False))
    return before + score(network.eval(), *test, classes)


def pictures(split, count=0):
    """All images (N, 3, H, W) uint8 and labels of a split of CamVid, or `count` evenly spaced."""
    dataset = CamVid(root="data/camvid", split=split)
    step = max(len(dataset) // count, 1) if count else 1
    samples = [dataset[n] for n in range(0, len(dataset), step)]
    return [torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in ("image", "label")]


@torch.no_grad()
def doubt(path, row, data):
    """mIoU of a network on pictures where its own doubt guides the second of two looks."""
    network, classes = with_oracle(path, row)
    network.eval()
    matrix = ConfusionMatrix(classes)
    for images, labels in zip(*(part.split(2) for part in data)):
        images, network.oracle.box = images.float() / 255, None
        entropy = uncertainty(network.segment(images).logits)[:, None]
        mean = F.avg_pool2d(entropy, 9, stride=1, padding=4, count_include_pad=False)
        matrix.update(look(network, images, ranks(mean[:, 0])).argmax(1), labels.long())
    return matrix.summary()["mIoU"]


@torch.no_grad()
def moved(path, images):
    """Which share of a query's attention the guidance of a checkpoint's network moves, and by which
    share it changes what a key gets."""
    network, shares = restore(path)[0].eval(), []

    def compare(attention, given):
        x, guide = given
        q, k, _ = attention.project(x)
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if guide is not None:
            before, after = logits.softmax(3), (logits + guide.bias).softmax(3)
            share, gets = (after - before).abs().sum(3).mean() / 2, before.mean(2)
            shares.append(torch.stack([share, (after.mean(2) / gets - 1).abs().mean()]))

    for block in network.backbone.stage_blocks(network.region.stage):
        block.attn.register_forward_pre_hook(compare)
    for image in images:
        network.segment(image[None].float() / 255)
    return torch.stack(shares).mean(0).tolist()


def write(folder):
    """Write the planted targets of three splits of CamVid."""
    generator = torch.Generator().manual_seed(9)
    for split, names in SPLITS.items():
        dataset = CamVid(root="data/camvid", split=split)
        for index in range(len(dataset)):
            sample, stem = dataset[index], Path(dataset.stem(index)).name
            image, label = (torch.as_tensor(sample[key]) for key in ("image", "label"))
            shown, boxes = planted(image[None].float() / 255, generator)
            shown = (255 * shown[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()
            for name, kept in zip(names, (boxes[0], ~boxes[0]) if len(names) > 1 else (True,)):
                label_there = torch.where(torch.as_tensor(kept), label, IGNORE).numpy()
                for part, values in ((name, shown), (f"{name}annot", label_there)):
                    path = Path(folder, part, f"{stem}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(values).save(path)


def main():
    options = arguments(
        "places",
        checkpoint="",
        steps=250,
        images=60,
        seeds=[0],
        labels="teacher",
        rows=ROWS,
        write="",
        moved="",
        doubt=[""],
    )
    if any(options.doubt):
        dusk = pictures("test_dusk")
        for path in options.doubt:
            found = {row: f"{doubt(path, row, dusk):.2f}" for row in options.rows}
            print(path, found, flush=True)
        return
    if options.moved:
        found = moved(options.moved, pictures("test_dusk", options.images)[0])
        print("{:.3f} of a query's attention, {:.3f} of what a key gets".format(*found))
        return
    if options.write:
        return write(options.write)
    data, test = pictures("train_day"), pictures("test_day", options.images)
    print("| row | seed | inside, before | outside | inside, after | outside |")
    print("|---|---|---|---|---|---|")
    for row in options.rows:
        for seed in options.seeds:
            values = run(options.checkpoint, row, seed, options, data, test)
            print(
                f"| {row} | {seed} | " + " | ".join(f"{v:.2f}" for v in values) + " |", flush=True
            )


if __name__ == "__main__":
    main()
