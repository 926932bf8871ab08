"""The class means of a pair of images."""

import pytest
import torch

from engine.statistics import class_sums
from models.prototypes.centroids import Centroids
from models.prototypes.pair import Pair

K, M, D = 3, 4, 6


def images(dtype=torch.float64):
    """Features (3, D, 5, 4) and labels; class 4 never occurs, class 0 only in the first image, the last is ignored."""
    labels = torch.randint(1, 4, (3, 5, 4))
    labels[0, 0], labels[:, 1, 0], labels[2] = 0, 255, 255
    return torch.randn(3, D, 5, 4, dtype=dtype), labels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pair_means_are_one_hot_products_divided_by_counts(layout):
    features, labels = images()
    pair = Pair(num_classes=5, in_channels=D)
    means, present = pair.pair_means(features.contiguous(memory_format=layout), labels)
    assert means.shape == (3, 5, D) and present.shape == (3, 5)
    one_hot = torch.eye(256).double()[labels.flatten(1)][..., :5]  # (B, N, K)
    counts = one_hot.sum(1)
    expected = (
        one_hot.transpose(1, 2)
        @ features.flatten(2).transpose(1, 2)
        / counts.clamp_min(1)[..., None]
    )
    torch.testing.assert_close(means, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(present, counts > 0)
    assert (
        not means[~present].any()
        and not present[:, 4].any()
        and not present[2].any()
        and present[0, 0]
    )
    sums, numbers = class_sums(features, labels, 5)
    each, number = class_sums(features, labels, 5, per_image=True)
    torch.testing.assert_close((each.sum(0), number.sum(0)), (sums, numbers))


def test_pair_means_of_a_constant_map_are_that_constant():
    _, labels = images()
    constant = torch.randn(D).double()
    means, present = Pair(num_classes=5, in_channels=D).pair_means(
        constant.view(1, D, 1, 1).expand(3, D, 5, 4), labels
    )
    torch.testing.assert_close(
        means[present], constant.expand(int(present.sum()), D), rtol=1e-14, atol=1e-14
    )


def test_pair_means_keep_the_graph_and_the_images_apart():
    features, labels = images()
    pair = Pair(num_classes=5, in_channels=D)
    state = {key: value.clone() for key, value in pair.state_dict().items()}
    assert torch.autograd.gradcheck(
        lambda x: pair.pair_means(x, labels)[0], features.requires_grad_()
    )
    means, _ = pair.pair_means(features, labels)
    (gradient,) = torch.autograd.grad(means[0].sum(), features)
    assert not gradient[1:].any() and (gradient[0][:, labels[0] != 255] > 0).all()
    for i in range(3):
        alone, _ = pair.pair_means(features[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone[0], means[i], rtol=1e-14, atol=1e-14)
    assert all(torch.equal(value, state[key]) for key, value in pair.state_dict().items())


def test_pair_means_of_half_precision_are_float32_also_under_autocast():
    features, labels = images(torch.float16)
    pair = Pair(num_classes=5, in_channels=D)
    with torch.autocast("cpu", torch.bfloat16):
        means, _ = pair.pair_means(features, labels)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, pair.pair_means(features.float(), labels)[0])


def test_outside_of_a_pair_it_holds_the_class_means_of_the_last_step():
    pair, exact = Pair(num_classes=5, in_channels=D), Centroids(num_classes=5, in_channels=D)
    for seed in range(2):
        torch.manual_seed(seed)
        features, labels = images(torch.float32)
        pair.update([(features, labels, None)])
    exact.fit(lambda: [(features, labels, None)])
    torch.testing.assert_close(pair.means(), exact.means())
    torch.testing.assert_close(pair.score(features), exact.score(features))
