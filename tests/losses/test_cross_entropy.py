"""Cross-entropy and OHEM against PyTorch and a naive loop."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.build import build
from engine.config import ConfigError
from engine.statistics import IGNORE
from losses.cross_entropy import CrossEntropy, median_frequency
from tests.losses.maps import logits_and_labels, patches, pixel_loss
from tests.runs import on_two_processes


def upsampled(logits, size=(24, 20)):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def test_cross_entropy_is_that_of_pytorch_at_the_size_of_the_labels():
    logits, labels = logits_and_labels()
    value, expected = (
        pixel_loss(logits, labels),
        F.cross_entropy(upsampled(logits), labels, ignore_index=IGNORE),
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits)[0] for loss in (value, expected))
    )


def test_cross_entropy_divides_by_the_pixels_of_the_whole_step():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(
        pixel_loss(logits, labels, pixels=1000) * 1000, pixel_loss(logits, labels, pixels=1)
    )


def test_cross_entropy_weights_pixels():
    logits, labels = logits_and_labels()
    weights = torch.rand(labels.shape)
    loss = F.cross_entropy(upsampled(logits), labels, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(
        pixel_loss(logits, labels, weights=weights),
        (loss * weights).sum() / (labels != IGNORE).sum(),
    )


@pytest.mark.parametrize("size", [(24, 20), (23, 19)])
def test_a_stride_scores_the_centres_of_its_squares_alone(size):
    logits, labels = logits_and_labels()
    labels = labels[:, : size[0], : size[1]].contiguous()
    weights = torch.rand(labels.shape)
    few = (12, 10)  # half as many, rounded up
    rows, columns = ((2 * torch.arange(n) + 1) * m // (2 * n) for n, m in zip(few, size))
    chosen = labels[:, rows][..., columns]
    loss = F.cross_entropy(upsampled(logits, few), chosen, ignore_index=IGNORE, reduction="none")
    loss = loss * weights[:, rows][..., columns]
    # `pixels` of the whole step are of all labels: this loss divides by its own.
    value = pixel_loss(logits, labels, pixels=7, weights=weights, stride=2)
    torch.testing.assert_close(value, loss.sum() / (chosen != IGNORE).sum())
    nothing = pixel_loss(logits, torch.full_like(labels, IGNORE), stride=2)
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def naive_ohem(loss, labels, ohem, ohem_min):
    """Mean over the pixels kept, image by image."""
    kept = []
    for image_loss, label in zip(loss, labels):
        values = sorted(image_loss[label != IGNORE].tolist(), reverse=True)
        hard = [v for v in values if math.exp(-v) <= ohem]
        kept += hard if len(hard) >= ohem_min else values[:ohem_min]
    return sum(kept) / len(kept), len(kept)


@pytest.mark.parametrize("ohem_min", [0, 1, 200, 10**6])
@pytest.mark.parametrize("ohem", [0.05, 0.3, 0.999999])
def test_ohem_keeps_hard_pixels_and_a_least_number_per_image(ohem, ohem_min):
    logits, labels = torch.randn(3, 5, 24, 20).double(), patches(3, 24, 20, range(5))
    labels[1, 2:], labels[2] = IGNORE, IGNORE
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    value, kept = naive_ohem(loss, labels, ohem, ohem_min)
    mask = CrossEntropy(ohem=ohem, ohem_min=ohem_min).hard(loss, labels)
    assert mask.sum() == kept and not mask[labels == IGNORE].any()
    assert pixel_loss(logits, labels, ohem=ohem, ohem_min=ohem_min).item() == pytest.approx(value)


def test_ohem_of_zero_is_the_plain_loss():
    logits, labels = logits_and_labels()
    assert pixel_loss(logits, labels, ohem=0.0, ohem_min=1) == pixel_loss(logits, labels)


CLASSES = ("sky", "road", "car", "pole", "sign")


def naive_frequencies(counts):
    """Median frequency balancing, image by image; classes that no image shows weigh 1."""
    n, k = counts.shape
    frequencies = {}
    for c in range(k):
        shows = [i for i in range(n) if counts[i, c]]
        if shows:
            around = sum(counts[i, j] for i in shows for j in range(k))
            frequencies[c] = sum(counts[i, c] for i in shows) / around
    median = float(np.median([*frequencies.values()]))
    weights = {c: median / f for c, f in frequencies.items()}
    mean = sum(weights[c] * counts[:, c].sum() for c in weights) / counts.sum()
    return [weights[c] / mean if c in weights else 1.0 for c in range(k)]


@pytest.mark.parametrize("seed", range(3))
def test_median_frequency_balancing_equals_a_loop_over_images(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1000, (7, 5)) * rng.integers(0, 2, (7, 5))
    counts[:, 3] = 0
    weights = median_frequency(counts)
    assert weights == pytest.approx(naive_frequencies(counts), rel=1e-12)
    assert (weights * counts).sum() == pytest.approx(counts.sum())  # their mean over pixels is 1


def test_rarer_classes_weigh_more_and_equal_ones_the_same():
    assert median_frequency(np.array([[10, 10, 10]])) == pytest.approx([1, 1, 1])
    weights = median_frequency(np.array([[100, 10, 1]]))
    assert weights[1] == pytest.approx(10 * weights[0]) == pytest.approx(weights[2] / 10)


@pytest.mark.parametrize("by_weights", [False, True])
@pytest.mark.parametrize("pixel_weights", [False, True])
def test_class_weights_equal_a_loop_over_pixels(by_weights, pixel_weights):
    logits, labels = torch.randn(2, 5, 9, 8).double().requires_grad_(), patches(2, 9, 8, range(5))
    named = {"car": 3.0, "sky": 0.25, "sign": 0}
    own = torch.rand(labels.shape).double() if pixel_weights else None
    value = pixel_loss(
        logits, labels, weights=own, class_weights=named, classes=CLASSES, by_weights=by_weights
    )
    total, mass, pixels = 0.0, 0.0, 0
    for b, y, x in np.ndindex(*labels.shape):
        if labels[b, y, x] != IGNORE:
            weight = named.get(CLASSES[labels[b, y, x]], 1.0) * (
                own[b, y, x] if pixel_weights else 1
            )
            total = total - weight * logits[b, :, y, x].log_softmax(0)[labels[b, y, x]]
            mass, pixels = mass + weight, pixels + 1
    expected = total / (mass if by_weights else pixels)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits)[0] for loss in (value, expected))
    )
    if by_weights and not pixel_weights:
        vector = torch.tensor([named.get(name, 1.0) for name in CLASSES]).double()
        theirs = F.cross_entropy(logits, labels, vector, ignore_index=IGNORE)
        torch.testing.assert_close(value, theirs)


def test_automatic_class_weights_are_those_of_the_counted_labels():
    logits, labels = logits_and_labels()
    counts = np.array([[5, 90, 0, 3, 1], [0, 40, 9, 0, 1]])
    auto, named = (
        pixel_loss(logits, labels, class_weights=weights, classes=CLASSES, counts=lambda: counts)
        for weights in ("auto", dict(zip(CLASSES, naive_frequencies(counts))))
    )
    torch.testing.assert_close(auto, named)
    assert not torch.isclose(auto, pixel_loss(logits, labels))


def test_class_weights_that_cannot_be_had_are_a_sentence():
    spec = {"name": "cross_entropy.CrossEntropy", "class_weights": {"carr": 2.0}}
    with pytest.raises(
        ConfigError, match=r"names 'carr', which is no class of sky, road, car, pole"
    ):
        build("losses", spec, "Loss", classes=CLASSES)
    with pytest.raises(ConfigError, match="each value a float of at least 0"):
        build("losses", spec | {"class_weights": {"car": -1}}, "Loss", classes=CLASSES)
    with pytest.raises(ConfigError, match="auto needs the labels of a training set"):
        build("losses", spec | {"class_weights": "auto"}, "Loss", classes=CLASSES)
    with pytest.raises(ConfigError, match="with labelled pixels"):
        empty = {"classes": CLASSES, "counts": lambda: np.zeros((2, 5), np.int64)}
        build("losses", spec | {"class_weights": "auto"}, "Loss", **empty)


@pytest.mark.parametrize("by_weights", [False, True])
def test_ohem_chooses_by_the_plain_loss_and_class_weights_weigh_what_is_left(by_weights):
    logits, labels = torch.randn(3, 5, 24, 20).double(), patches(3, 24, 20, range(5))
    named, options = {"car": 50.0, "road": 0.01}, {"ohem": 0.1, "ohem_min": 30}
    value = pixel_loss(
        logits, labels, class_weights=named, classes=CLASSES, by_weights=by_weights, **options
    )
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    kept, total, mass, number = CrossEntropy(**options).hard(loss, labels), 0.0, 0.0, 0
    for b, y, x in np.ndindex(*labels.shape):
        if kept[b, y, x]:
            weight = named.get(CLASSES[labels[b, y, x]], 1.0)
            total, mass, number = total + weight * loss[b, y, x], mass + weight, number + 1
    assert number == naive_ohem(loss, labels, *options.values())[1]
    torch.testing.assert_close(value, total / (mass if by_weights else number))


def weighted_loss(chosen, **options):
    """(loss, gradient) on some of four images with unequal numbers of labelled pixels."""
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 12, 8).double()[chosen].requires_grad_()
    labels = patches(4, 12, 8, range(5))
    labels[1, :9], labels[3, 2:] = IGNORE, IGNORE
    options |= {"class_weights": {"car": 3.0, "sky": 0.2}, "classes": CLASSES}
    value = pixel_loss(logits, labels[chosen], **options)
    value.backward()
    return value.detach(), logits.grad


WEIGHTED = [{}, {"by_weights": True}, {"ohem": 0.2, "ohem_min": 9}]

WEIGHTED += [WEIGHTED[1] | WEIGHTED[2], {"stride": 2}]


def weighted_loss_of_a_half(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([weighted_loss(slice(rank, None, 2), **o) for o in WEIGHTED], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_class_weights_and_ohem_of_two_processes_are_those_of_one(tmp_path):
    on_two_processes(weighted_loss_of_a_half, tmp_path)
    halves = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for i, options in enumerate(WEIGHTED):
        value, gradient = weighted_loss(slice(None), **options)
        # The loss of a step is the mean over processes.
        torch.testing.assert_close((halves[0][i][0] + halves[1][i][0]) / 2, value)
        for rank in range(2):
            torch.testing.assert_close(halves[rank][i][1] / 2, gradient[rank::2])
