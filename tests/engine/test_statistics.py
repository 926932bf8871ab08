"""Class sums against a loop over pixels, labels and logits at other sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.statistics import (
    IGNORE,
    class_sums,
    contrast,
    cosine,
    pure_labels,
    resize_labels,
    resize_logits,
)
from tests.losses.maps import patches

K = 6  # class 4 never occurs


def batch(shape=(2, 3, 5, 7), dtype=torch.float64):
    """Features, labels with ignored and out-of-range pixels, weights."""
    b, _, h, w = shape
    labels = torch.tensor([0, 1, 2, 3, 5, IGNORE, -1, K])[torch.randint(0, 8, (b, h, w))]
    return torch.randn(shape, dtype=dtype), labels, torch.rand(b, h, w, dtype=dtype)


def loop_sums(features, labels, weights=None):
    """The definition: one mask per class."""
    weights = torch.ones_like(labels, dtype=features.dtype) if weights is None else weights
    sums = [(features * (weights * (labels == k))[:, None]).sum((0, 2, 3)) for k in range(K)]
    return torch.stack(sums), torch.stack([weights[labels == k].sum() for k in range(K)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 1, 1), (3, 1, 9, 2)])
def test_class_sums_and_their_gradients_equal_a_loop_over_classes(weighted, shape):
    features, labels, weights = batch(shape)
    weights = weights if weighted else None
    results, gradients = [], []
    for function in (lambda *a: class_sums(a[0], a[1], K, a[2]), loop_sums):
        leaf = features.clone().requires_grad_()
        sums, counts = function(leaf, labels, weights)
        (sums.sin().sum() + sums.square().sum()).backward()
        results.append((sums.detach(), counts))
        gradients.append(leaf.grad)
    assert results[0][0].dtype == torch.float64 and results[0][0].shape == (K, shape[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)
    assert (results[0][0][4] == 0).all() and results[0][1][4] == 0


def test_the_gradient_of_class_sums_is_the_numerical_one():
    features, labels, weights = batch((1, 2, 3, 2))
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: class_sums(x, labels, K, weights), features)


def test_labels_that_belong_to_no_class_add_nothing():
    features = torch.randn(1, 4, 3, 3)
    for label in (IGNORE, -1, K):
        sums, counts = class_sums(features, torch.full((1, 3, 3), label), K)
        assert (sums == 0).all() and (counts == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_float32_also_under_autocast(dtype):
    features = torch.full(
        (1, 1, 50, 100), 1.0, dtype=dtype
    )  # 5000 ones: bfloat16 and float16 cannot count so far exactly
    labels = torch.zeros(1, 50, 100, dtype=torch.int64)
    labels[0, 0, 0] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, counts = class_sums(features, labels, 2, weights=torch.ones(1, 50, 100, dtype=dtype))
    assert sums.dtype == counts.dtype == torch.float32
    assert sums[:, 0].tolist() == counts.tolist() == [4999, 1]


def test_synced_class_sums_on_one_process_are_the_same_and_keep_the_graph():
    features, labels, weights = batch()
    features.requires_grad_()
    synced, local = (class_sums(features, labels, K, weights, sync=sync) for sync in (True, False))
    assert torch.equal(synced[0], local[0]) and torch.equal(synced[1], local[1])
    gradient = torch.autograd.grad(synced[0].sum(), features)[0]
    assert (
        torch.equal(gradient, torch.autograd.grad(local[0].sum(), features)[0]) and gradient.any()
    )


def loop_resize(labels, size):
    """The pixel at the centre of each cell; a centre between two pixels belongs to the second."""
    (height, width), (h, w) = labels.shape[-2:], size
    rows = [(2 * i + 1) * height // (2 * h) for i in range(h)]
    columns = [(2 * j + 1) * width // (2 * w) for j in range(w)]
    return torch.stack([torch.stack([labels[:, r, c] for c in columns], -1) for r in rows], -2)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_labels_shrunk_by_an_integer_factor_come_from_the_cell_centres(factor):
    labels = torch.arange(2 * 24 * 40).view(2, 24, 40)
    small = resize_labels(labels, (24 // factor, 40 // factor))
    assert torch.equal(small, labels[:, factor // 2 :: factor, factor // 2 :: factor])
    assert torch.equal(small, loop_resize(labels, (24 // factor, 40 // factor)))


@pytest.mark.parametrize(
    "size, smaller",
    [
        ((13, 7), (5, 3)),
        ((65, 129), (9, 17)),
        ((7, 7), (1, 1)),
        ((3, 5), (7, 11)),
        ((1, 1), (4, 3)),
        ((1023, 769), (33, 97)),
    ],
)
def test_labels_of_odd_sizes_come_from_inside_each_cell(size, smaller):
    height, width = size
    labels = torch.arange(height * width).view(1, height, width)
    result = resize_labels(labels, smaller)
    assert result.shape == (1, *smaller) and torch.equal(result, loop_resize(labels, smaller))


def test_labels_of_the_same_size_are_the_same_tensor_and_the_type_stays():
    labels = torch.randint(0, 255, (1, 6, 5), dtype=torch.uint8)
    assert resize_labels(labels, (6, 5)) is labels
    assert resize_labels(labels, (3, 3)).dtype == torch.uint8


@pytest.mark.parametrize("large", [*range(1, 70), 360, 480, 713, 1024, 2048])
def test_resized_labels_are_never_read_out_of_range(large):
    for small in (1, 2, 3, large // 4 + 1, large, 2 * large + 1):
        positions = resize_labels(torch.arange(large).view(1, 1, large), (1, small))[0, 0]
        assert positions.min() >= 0 and positions.max() < large and (positions.diff() >= 0).all()


def test_logits_are_resized_without_a_shift():
    logits = torch.arange(4.0).view(1, 1, 1, 4)
    assert resize_logits(logits, (2, 4))[0, 0].tolist() == [[0, 1, 2, 3]] * 2
    assert resize_logits(logits, (1, 8))[0, 0, 0].tolist() == [
        0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.25,
        2.75,
        3,
    ]


# --- class sums ------------------------------------------------------------------------------------------------------


def naive_sums(features, labels, num_classes, weights):
    """Pixel by pixel in float64."""
    sums, counts = (
        torch.zeros(num_classes, features.shape[1]).double(),
        torch.zeros(num_classes).double(),
    )
    for b, y, x in np.ndindex(*labels.shape):
        if 0 <= labels[b, y, x] < num_classes:
            sums[labels[b, y, x]] += weights[b, y, x] * features[b, :, y, x]
            counts[labels[b, y, x]] += weights[b, y, x]
    return sums, counts


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@LAYOUTS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_classes, channels", [(4, 5), (90, 5), (4, 64)])
def test_class_sums_and_their_gradient_equal_a_loop_over_pixels(
    num_classes, channels, weighted, layout
):
    features = (
        torch.randn(2, channels, 9, 6, dtype=torch.float64)
        .contiguous(memory_format=layout)
        .requires_grad_()
    )
    labels = torch.randint(num_classes, (2, 9, 6))
    labels[0, :2], labels[1, 3], labels[1, 4] = IGNORE, -1, num_classes
    weights = torch.rand(2, 9, 6, dtype=torch.float64) if weighted else None
    sums, counts = class_sums(features, labels, num_classes, weights)
    factors = weights if weighted else torch.ones(2, 9, 6)
    expected, expected_counts = naive_sums(features, labels, num_classes, factors)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(counts, expected_counts)
    direction = torch.randn_like(sums)
    actual, wanted = (
        torch.autograd.grad((s * direction).sum(), features)[0] for s in (sums, expected)
    )
    torch.testing.assert_close(actual, wanted)
    assert actual.is_contiguous(memory_format=layout)  # no copy is needed on the way back
    each = class_sums(features, labels, num_classes, weights, per_image=True)
    assert each[0].shape == (2, num_classes, channels) and each[1].shape == (2, num_classes)
    for i in range(2):
        one = class_sums(features[i : i + 1], labels[i : i + 1], num_classes, factors[i : i + 1])
        torch.testing.assert_close((each[0][i], each[1][i]), one)


def test_labels_of_bytes_belong_to_classes_above_255():
    labels = torch.tensor([[[3, 254, IGNORE]]], dtype=torch.uint8)
    sums, counts = class_sums(torch.ones(1, 2, 1, 3), labels, 300)
    assert counts.nonzero().flatten().tolist() == [3, 254, 255] and sums[254].tolist() == [1, 1]


@LAYOUTS
def test_class_sums_of_half_precision_features_are_float32(layout):
    features, labels = torch.randn(2, 8, 16, 16).bfloat16(), patches(2, 16, 16, range(6))
    sums, counts = class_sums(features.contiguous(memory_format=layout), labels, 6)
    assert sums.dtype == counts.dtype == torch.float32
    torch.testing.assert_close(sums, class_sums(features.float(), labels, 6)[0])


def test_a_cell_has_a_pure_label_where_enough_of_it_carries_it():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, :4, :2] = 1  # half of the first cell
    labels[0, 4, 4:6] = 2  # an eighth of the last
    cells = pure_labels(labels, (2, 2))
    assert cells[0, 0, 0] == IGNORE and cells[0, 1, 1] == 0 and cells[0, 0, 1] == 0
    assert pure_labels(labels, (2, 2), share=0.5)[0, 0, 0] != IGNORE


# --- contrast ----------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("per_image", [False, True])
def test_contrast_is_cross_entropy_of_cosines_with_its_numerical_gradient(per_image, layout):
    features = torch.randn(2, 6, 3, 4, dtype=torch.float64).contiguous(memory_format=layout)
    vectors = torch.randn(*[2] * per_image, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 1, IGNORE])[torch.randint(4, (2, 3, 4))]
    labels[0, 0, 0], features[1, :, 2, 3] = IGNORE, 0  # a pixel without direction
    features.requires_grad_()
    losses, scores = contrast(features, vectors, labels, 0.3)
    expected = cosine(features, vectors)
    torch.testing.assert_close(scores, expected.detach())
    usual = F.cross_entropy(expected / 0.3, labels, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses, usual)
    weights = torch.rand(2, 3, 4, dtype=torch.float64)
    actual, wanted = (
        torch.autograd.grad((each * weights).sum(), (features, vectors)) for each in (losses, usual)
    )
    torch.testing.assert_close(actual, wanted)
    assert actual[0].is_contiguous(memory_format=layout)
    moved = (features.detach() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *both: contrast(*both, labels, 0.3)[0], (moved, vectors))


def test_contrast_without_a_label_is_zero_and_half_precision_is_scored_in_float32():
    features = torch.randn(1, 4, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    losses, scores = contrast(features, torch.randn(3, 4), torch.full((1, 2, 2), IGNORE), 0.1)
    losses.sum().backward()
    assert losses.dtype == scores.dtype == torch.float32 and not scores.requires_grad
    assert (losses == 0).all() and (features.grad == 0).all()
