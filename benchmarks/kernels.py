"""What the kernels cost, beside the usual ways: class sums, balanced assignment, confusion matrix,
contrast of pixels with prototypes; OCCL, its parts, and within a step.

    python -m benchmarks.kernels [--threads 1] [--rounds 7]

Every round runs all variants of a case, in turned order every other time; a time is the median over
rounds, a ratio the median of ratios within a round. One thread is timed by its processor time, so
other load hardly matters. Milliseconds are those of one machine, the ratios are the result. Each
way of summing is first checked against float64.
"""

import argparse
import contextlib
import statistics
import time

import torch
import torch.nn.functional as F

from engine.metrics import ConfusionMatrix
from engine.statistics import IGNORE, class_sums, contrast, cosine
from engine.step import Batch, Output, Step, View
from losses._views import halve
from losses.bcl import StaticLabels
from losses.cross_entropy import CrossEntropy
from losses.occl import OCCL
from models.backbones.resnet import ResNet
from models.classifiers.cbp import CBP
from models.classifiers.linear import Linear
from models.decoders.deeplabv3plus import DeepLabV3Plus
from models.prototypes._sinkhorn import balanced
from models.segmentor import Segmentor

SUMS = [
    (2, 256, 64, 64, 19),
    (8, 128, 64, 80, 11),
    (8, 128, 64, 80, 22),
    (2, 256, 64, 64, 150),
    (2, 256, 64, 64, 342),
    (2, 256, 64, 64, 1000),
    (2, 19, 128, 128, 19),
]
SHARED = [(33_000, 10, 19), (16_000, 10, 150)]  # N, M, K
CONTRAST = [(2, 256, 64, 64, 19), (8, 128, 64, 80, 11), (2, 256, 64, 64, 150)]  # B, D, h, w, K


def masked_loop(features, labels, num_classes):
    """The usual way: pixels to rows, and a mask per class."""
    rows, ids = features.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
    return torch.stack([rows[ids == c].sum(0) for c in range(num_classes)])


def index_add(features, labels, num_classes):
    """Pixels to rows, one scatter; the last row takes the ignored pixels."""
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    ids = torch.where(labels < num_classes, labels, num_classes).flatten()
    return rows.new_zeros(num_classes + 1, rows.shape[1]).index_add(0, ids, rows)[:num_classes]


def scatter(features, labels, num_classes):
    """One scatter along the maps; the last column takes the ignored pixels."""
    maps, ids = features.flatten(2), torch.where(labels < num_classes, labels, num_classes)
    sums = maps.new_zeros(*maps.shape[:2], num_classes + 1)
    sums = sums.scatter_add(2, ids.flatten(1)[:, None].expand_as(maps), maps)
    return sums[..., :num_classes].sum(0).T


def arguments(name, **defaults):
    """Command line of a benchmark: `--key value` for the defaults, lists from several values. Seeds
    PyTorch and sets its threads."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    for key, value in ({"threads": 1} | defaults).items():
        several = isinstance(value, list)
        kind = type(value[0] if several else value)
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=kind, default=value, nargs="+" if several else None
        )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def compare(variants, rounds):
    """Interleaved timing of {name: function} -> {name: (ms, ratio to the first)}."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name in list(variants)[:: 1 if round_ % 2 else -1]:
            start = clock()
            variants[name]()
            times[name].append(1e3 * (clock() - start))
    times = {name: values[1:] for name, values in times.items()}  # the first round warms up
    first, middle = next(iter(times.values())), statistics.median
    return {
        name: (middle(values), middle(b / a for a, b in zip(first, values)))
        for name, values in times.items()
    }


def patches(batch, height, width, num_classes):
    """Random squares of 8 x 8 cells, with an ignored border."""
    labels = torch.randint(num_classes, (batch, height // 8, width // 8))
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :2] = num_classes + IGNORE
    return labels


def record(views, labels, **fields):
    """The Step of a micro-batch of {view: images} and {view: labels}; the first is the source."""
    views = {name: View(image, name) for name, image in views.items()}
    (name, view), *_ = views.items()
    numbers = list(range(len(view.image)))
    samples = torch.tensor(numbers, device=view.image.device)
    source = Batch(view.image, labels[name], samples, numbers)
    return Step(0, 1, source, views=views, labels=labels, **fields)


def time_class_sums(shape, layout, rounds):
    """Forward and backward of every way of summing; gradients have the features' layout."""
    *size, num_classes = shape
    features = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
    labels, direction = patches(size[0], *size[2:], num_classes), torch.randn(num_classes, size[1])

    def gradient(function, x):
        sums = function(x, labels, num_classes)
        return sums, torch.autograd.grad(sums, x, direction.to(x.dtype))[0].contiguous(
            memory_format=layout
        )

    ways = {
        "class_sums": lambda *x: class_sums(*x)[0],
        "index_add on rows": index_add,
        "scatter_add on maps": scatter,
        "masked loop": masked_loop,
    }
    if num_classes >= 1000:
        del ways["masked loop"]  # it takes seconds
    truth = gradient(index_add, features.double())
    for way in ways.values():
        for actual, expected in zip(gradient(way, features), truth):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)
    return compare(
        {name: lambda way=way: gradient(way, features) for name, way in ways.items()}, rounds
    )


def sinkhorn_loop(scores, classes, num_classes, sharpness, rounds):
    """The usual way: a float32 transport of each class by itself."""
    found = torch.zeros_like(classes)
    for c in range(num_classes):
        own = classes == c
        shares = (scores[own] / sharpness).exp().T
        for _ in range(rounds):
            shares = shares / shares.sum(1, keepdim=True)
            shares = shares / shares.sum(0, keepdim=True)
        found[own] = shares.argmax(0)
    return found


def time_sinkhorn(shape, _, rounds):
    """Cosines as a classifier leaves them, (M, N) in memory; classes in runs."""
    n, m, k = shape
    pixels, prototypes = (F.normalize(torch.randn(count, 64), dim=1) for count in (n, m))
    classes = torch.randint(k, (n // 64 + 1,)).repeat_interleave(64)[:n]
    case = ((prototypes @ pixels.T).T, classes, k, 0.05, 3)
    assert torch.equal(balanced(*case), sinkhorn_loop(*case))
    ways = {"balanced": balanced, "loop over classes": sinkhorn_loop}
    return compare({name: lambda way=way: way(*case) for name, way in ways.items()}, rounds)


def time_confusion(num_classes, _, rounds):
    """A picture of 1024 x 2048 pixels, as `evaluate` counts it, and one histogram of two maps of
    bytes without ignored pixels."""
    labels = patches(1, 1024, 2048, num_classes).clamp_max(IGNORE)[0].byte()
    predictions = torch.where(torch.rand(labels.shape) < 0.9, labels, 0).long() % num_classes
    matrix = ConfusionMatrix(["class"] * num_classes)
    first, second = labels % num_classes, predictions.byte()

    def histogram():
        joined = first.to(torch.int32) * num_classes + second
        return torch.bincount(joined.flatten(), minlength=num_classes**2)

    ways = {"ConfusionMatrix": lambda: matrix.update(predictions, labels)}
    return compare(ways | {"one histogram of bytes": histogram}, rounds)


def sorted_labels(sure, classes, theta, share):
    """The usual way: all pixels in order."""
    chosen = sure >= theta[classes]
    ranks = sure.flatten(1).argsort(dim=1, descending=True, stable=True)
    best = ranks[:, : max(1, round(share * ranks.shape[1]))]
    chosen |= torch.zeros_like(chosen.flatten(1)).scatter_(1, best, True).view_as(chosen)
    return torch.where(chosen, classes, IGNORE)


def time_selection(shape, _, rounds):
    """BCL's static labels of log-odds (B, H, W) of which many are equal."""
    sure, classes = (torch.randn(shape) * 1000).round() / 100, torch.randint(19, shape)
    labeler = StaticLabels(num_classes=19, share=0.1)
    labeler.theta.fill_(40)
    case = (sure, classes, labeler.theta, labeler.share)
    assert torch.equal(labeler.select(sure, classes), sorted_labels(*case))
    ways = {"StaticLabels.select": lambda: labeler.select(sure, classes)}
    return compare(ways | {"stable sort": lambda: sorted_labels(*case)}, rounds)


def time_contrast(shape, layout, rounds):
    """Cross-entropy of the cosines of all pixels with K vectors, forward and backward."""
    *size, k = shape
    features = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
    vectors, labels = torch.randn(k, size[1]), patches(size[0], *size[2:], k).clamp_max(IGNORE)

    def usual():
        return F.cross_entropy(cosine(features, vectors) / 0.1, labels, ignore_index=IGNORE)

    def fused():
        losses, _ = contrast(features, vectors, labels, 0.1)
        return losses.sum() / (labels != IGNORE).sum()

    ways = {"contrast": fused, "cosine, cross-entropy": usual}
    gradients = {
        name: lambda way=way: torch.autograd.grad(way(), features)[0] for name, way in ways.items()
    }
    torch.testing.assert_close(*(gradient() for gradient in gradients.values()))
    return compare(gradients, rounds)


def time_occl(shape, layout, rounds):
    """The loss on a detached feature leaf, forward and backward, and its two parts."""
    *size, k = shape
    features = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
    labels, samples = patches(size[0], *size[2:], k).clamp_max(IGNORE), torch.arange(size[0])
    classifier, term = (
        Linear(in_channels=size[1], num_classes=k),
        OCCL(num_classes=k, split="random"),
    )
    views, direction = halve(labels, samples, k, 0), torch.randn(2 * k, size[1])
    step = record({"source": features}, {"source": labels}, prototypes={"classifier": classifier})
    step.outputs["source"] = Output(features=features)

    def whole():
        torch.autograd.grad(term(step), features)

    parts = {"OCCL": whole}
    parts["of it class_sums"] = lambda: torch.autograd.grad(
        class_sums(features, views, 2 * k)[0], features, direction
    )
    parts["of it halve"] = lambda: halve(labels, samples, k, 0)
    return compare(parts, rounds)


def time_step(_, precision, rounds, num_classes=11):
    """A step on 8 crops of 256 x 320 with and without OCCL, and both losses on detached leaves."""
    backbone = ResNet(depth=18, stages=3, output_stride=16, weights="none")
    decoder = DeepLabV3Plus(in_channels=backbone.channels, strides=backbone.strides, width=128)
    model = Segmentor(
        backbone, decoder, CBP(in_channels=128, num_classes=num_classes), frozen_bn=["backbone"]
    )
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    views = {"source": torch.rand(8, 3, 256, 320)}
    labels = {"source": patches(8, 256, 320, num_classes).clamp_max(IGNORE)}
    members = {"classifier": model.classifier}
    pixel, occl = CrossEntropy(), OCCL(num_classes=num_classes, split="random")
    autocast = (
        torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    )

    def forward():
        step = record(views, labels, prototypes=members)
        with autocast:
            step.outputs = model(step.views)
        return step

    def train(*terms):
        step = forward()
        sum(term(step) for term in terms).backward()
        optimizer.step()
        optimizer.zero_grad()

    leaves = forward()
    output = leaves.outputs["source"]
    output.logits, output.features = (
        x.detach().requires_grad_() for x in (output.logits, output.features)
    )
    variants = {"step without OCCL": lambda: train(pixel)}
    variants["step with OCCL"] = lambda: train(pixel, occl)
    variants["of it cross-entropy"] = lambda: pixel(leaves).backward()
    variants["of it OCCL"] = lambda: occl(leaves).backward()
    return compare(variants, rounds)


def main():
    options = arguments("kernels", rounds=7)
    print("| case: (B, D, h, w, K), layout | way | ms | ratio to the first |")
    print("|---|---|---|---|", flush=True)
    layouts = (torch.contiguous_format, torch.channels_last)
    cases = [(time_class_sums, shape, layout) for shape in SUMS for layout in layouts]
    cases += [(time_sinkhorn, shape, "N, M, K") for shape in SHARED]
    cases += [(time_confusion, k, "classes") for k in (19, 150)]
    cases += [(time_selection, (1, 1024, 2048), "log-odds")]
    cases += [(time_contrast, shape, layout) for shape in CONTRAST for layout in layouts]
    cases += [(time_occl, shape, layout) for shape in CONTRAST for layout in layouts]
    cases += [(time_step, "ResNet-18 step", precision) for precision in ("fp32", "bf16")]
    for function, case, variant in cases:
        for name, (ms, ratio) in function(case, variant, options.rounds).items():
            what = f"{case}, {str(variant).removeprefix('torch.')}"
            print(f"| {what} | {name} | {ms:.2f} | {ratio:.3g} |", flush=True)


if __name__ == "__main__":
    main()
