"""OCCL against its equations: naive loops in float64, limits in closed form, its other readings."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine.errors import UserError
from engine.statistics import IGNORE, class_sums, pixel_hash, resize_labels
from losses._views import components, halve
from losses.ceco import CeCo, simplex
from losses.occl import OCCL
from models.classifiers.cbp import CBP
from models.classifiers.linear import Linear
from models.prototypes.basis import orthogonal_rows
from tests.losses.maps import logits_and_labels, patches, pixel_loss
from tests.records import a_step, an_output
from tests.runs import on_two_processes

TAU = 0.07


# --- OCCL: the two views ---------------------------------------------------------------------------------------------


SPLITS = pytest.mark.parametrize("split", ["objects", "image", "random"])


def naive_components(label):
    """First cell, in raster order, of the 8-connected region of each cell, breadth first."""
    height, width = label.shape
    found = np.full((height, width), -1)
    for start in np.ndindex(height, width):
        if found[start] < 0:
            queue = [start]
            found[start] = start[0] * width + start[1]
            while queue:
                y, x = queue.pop(0)
                for v in range(max(0, y - 1), min(height, y + 2)):
                    for u in range(max(0, x - 1), min(width, x + 2)):
                        if found[v, u] < 0 and label[v, u] == label[y, x]:
                            found[v, u] = found[start]
                            queue.append((v, u))
    return torch.from_numpy(found)


def spiral(size):
    """A path of ones, one cell wide, from the corner to the centre; walls of zeros between."""
    label, y, x, dy, dx = np.zeros((size + 2, size + 2), np.int64), 1, 1, 0, 1
    label[1, 1] = 1

    def free(y, x):
        return 1 <= y <= size and 1 <= x <= size and not label[y, x]

    for _ in range(4 * size):
        while (
            free(y + dy, x + dx) and not (label[y + 2 * dy : y + 2 * dy + 1, x + 2 * dx] == 1).any()
        ):
            y, x = y + dy, x + dx
            label[y, x] = 1
            if not (0 <= y + 2 * dy < size + 2 and 0 <= x + 2 * dx < size + 2):
                break
        dy, dx = dx, -dy
    return torch.from_numpy(label[1:-1, 1:-1])


def zigzag(height, width):
    """A path of ones that meets each column twice: as many turns as a map has room for."""
    label = torch.zeros(height, width, dtype=torch.long)
    label[:, ::2] = 1
    label[0, 1::4] = 1
    label[-1, 3::4] = 1
    return label


def weave(size):
    """Diagonals of single cells: every link is a diagonal one, and every run is one cell long."""
    y, x = np.mgrid[:size, :size]
    return torch.from_numpy(np.where((y + x) % 2, 2 + (y // 2 + x // 3) % 2, (y // 5) % 2))


SHAPES = {
    "spiral": lambda: spiral(33),
    "zigzag": lambda: zigzag(24, 31),
    "turned zigzag": lambda: zigzag(31, 24).T.contiguous(),
    "mirrored zigzag": lambda: zigzag(24, 31).flip(0, 1),
    "weave": lambda: weave(26),
    "checkerboard": lambda: (torch.arange(20)[:, None] + torch.arange(23)) % 2,
    "two classes": lambda: torch.randint(2, (30, 30)),
    "five classes": lambda: torch.randint(5, (30, 30)),
    # At this share of ones clusters are ragged and as large as the map.
    "percolation": lambda: (torch.rand(48, 48) < 0.41).long(),
    "one cell": lambda: torch.zeros(1, 1, dtype=torch.long),
    "one row": lambda: torch.randint(2, (1, 40)),
    "one column": lambda: torch.randint(2, (40, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_components_are_those_of_a_breadth_first_search(shape):
    labels = torch.stack([SHAPES[shape](), SHAPES[shape]().flip(1)])
    expected = torch.stack([naive_components(label.numpy()) for label in labels])
    assert torch.equal(components(labels).view_as(labels), expected)


def test_the_winding_shapes_are_single_components():
    for shape in ("spiral", "zigzag", "turned zigzag"):
        label = SHAPES[shape]()
        assert label.any() and len(components(label[None])[0][label.flatten() == 1].unique()) == 1


def unit_of(labels, split):
    """(B, h, w): a number for the object, image or cell that each cell belongs to."""
    first = len(labels[0].flatten()) * torch.arange(len(labels))[:, None, None]
    if split == "objects":
        return first + torch.stack([naive_components(label.numpy()) for label in labels])
    if split == "image":
        return first.expand_as(labels)
    return torch.arange(labels.numel()).view_as(labels)


@SPLITS
def test_views_halve_the_units_of_every_class_and_share_none(split):
    labels, k = patches(5, 21, 18, range(6)), 6
    samples = torch.tensor([0, 7, 12345678, 3, 8])
    views, found = halve(labels, samples, k, 0, split), unit_of(labels, split)
    for c in range(k):
        first, second = ({*found[views == view].tolist()} for view in (c, k + c))
        assert not first & second and abs(len(first) - len(second)) <= 1
        assert torch.equal((views == c) | (views == k + c), labels == c)
    assert (views[labels == IGNORE] >= 2 * k).all()


@SPLITS
def test_either_view_may_be_the_larger(split):
    labels, more = torch.full((3, 5, 5), IGNORE), set()
    labels[:, 2, 2] = 0
    for sample in range(0, 300, 3):
        views = halve(labels, sample + torch.arange(3), 1, 0, split)
        more.add(int((views == 1).sum()))
    assert more == {1, 2}


@SPLITS
def test_single_cells_of_several_images_are_shared(split):
    labels = torch.full((8, 4, 4), IGNORE)
    labels[:, 1, 2] = 3
    views = halve(labels, torch.arange(8), 5, 0, split)
    assert (views == 3).sum() == (views == 8).sum() == 4


@pytest.mark.parametrize("split", ["objects", "image"])
def test_the_cells_of_a_class_of_one_unit_are_dealt_out(split):
    labels = torch.full((3, 6, 6), IGNORE)
    labels[1, 2:5, 1:4] = 0  # one object of nine cells
    labels[2, 0, 0] = 1  # one cell in all
    views = halve(labels, torch.tensor([4, 9, 2]), 2, 0, split)
    counts = [int((views == view).sum()) for view in range(4)]
    assert sorted(counts[::2]) == [4, 5] and sorted(counts[1::2]) == [0, 1]


def test_equal_hashes_of_two_samples_are_told_apart():
    """The hash of a cell of one sample is that of the cell before it of another."""
    apart = 0x85EBCA77 * pow(0x9E3779B1, -1, 2**32) % 2**32
    samples, labels = torch.tensor([7 + apart, 7]), torch.zeros(2, 24, 24, dtype=torch.long)
    first, second = pixel_hash(0, samples, 576)
    assert torch.equal(first[:-1], second[1:])
    assert (halve(labels, samples, 1, 0) == 0).sum() == 576


def test_images_of_one_parity_are_contrasted_too():
    features, labels = torch.randn(2, 8, 12, 12), patches(2, 12, 12, range(4))
    classifier = CBP(num_classes=4, in_channels=8)
    for samples in (torch.tensor([2, 4]), torch.tensor([3])):
        few = slice(len(samples))
        assert occl(features[few], labels[few], classifier, samples, split="image") > 0


@pytest.mark.parametrize("split", ["objects", "image", "random", "checkerboard"])
def test_views_of_ignored_labels_are_a_zero_with_a_graph(split):
    features = torch.randn(2, 8, 6, 6, requires_grad=True)
    labels = torch.full((2, 6, 6), IGNORE, dtype=torch.uint8)
    value = occl(features, labels, CBP(num_classes=5, in_channels=8), split=split)
    value.backward()
    assert value == 0 and (features.grad == 0).all()


@pytest.mark.parametrize("split", ["objects", "image", "random", "checkerboard"])
def test_views_need_no_look_at_the_values(split):
    """A meta tensor has no values: what waits for a GPU fails on it."""
    labels, samples = torch.zeros(2, 9, 7, dtype=torch.long, device="meta"), torch.arange(2)
    views = halve(labels, samples.to("meta"), 3, 0, split)
    assert views.shape == labels.shape


def occl_of_a_half(rank, folder):
    """Loss and gradient of one of two processes: every other sample."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([occl_of_samples(slice(rank, None, 2), split) for split in ALL], f"{folder}/{rank}")
    dist.destroy_process_group()


ALL = ["objects", "image", "random", "checkerboard"]


def occl_of_samples(chosen, split):
    """(loss, gradient, views) of some of six images.

    Class 3 is in one image, 4 is one object, 5 one cell, 6 in none.
    """
    torch.manual_seed(0)
    features = torch.randn(6, 10, 12, 11, dtype=torch.float64)[chosen].requires_grad_()
    labels = patches(6, 12, 11, [0, 1, 2])
    labels[3, 7:, 5:] = 3
    labels[3, 9] = 0
    labels[4, :3, :4] = 4
    labels[5, 5, 5] = 5
    labels, samples = labels[chosen], torch.tensor([3, 8, 4, 100, 7, 5])[chosen]
    torch.manual_seed(1)
    classifier = CBP(num_classes=7, in_channels=10).double()
    value = occl(features, labels, classifier, samples, split=split, centroid=0.7, seed=2)
    value.backward()
    return value.detach(), features.grad, halve(labels, samples, 7, 2, split, sync=True)


def test_two_processes_draw_the_views_of_one(tmp_path):
    on_two_processes(occl_of_a_half, tmp_path)
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for i, split in enumerate(ALL):
        value, gradient, views = occl_of_samples(slice(None), split)
        for rank in range(2):
            mine, slope, drawn = parts[rank][i]
            assert torch.equal(drawn, views[rank::2]), split
            torch.testing.assert_close(mine, value, atol=1e-12, rtol=1e-12)
            # DDP takes the mean over processes.
            torch.testing.assert_close(slope / 2, gradient[rank::2], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("outside", [-1, 6, 254, IGNORE])
def test_views_leave_out_what_is_no_class(outside):
    labels = torch.full((1, 4, 4), outside)
    labels[0, 0, :2] = 5
    views = halve(labels, torch.tensor([0]), 6, seed=0)
    assert sorted(views[0, 0, :2].tolist()) == [5, 11]
    assert (views.flatten()[2:] >= 12).all()


@SPLITS
def test_views_depend_on_seed_and_samples_alone(split):
    labels, samples = patches(4, 20, 20, range(3)), torch.tensor([5, 1, 40, 2])
    views, order = halve(labels, samples, 3, 0, split), torch.tensor([2, 0, 3, 1])
    assert torch.equal(halve(labels[order], samples[order], 3, 0, split), views[order])
    assert not torch.equal(halve(labels, samples + 1, 3, 0, split), views)
    assert not torch.equal(halve(labels, samples, 3, 1, split), views)


def test_random_views_of_two_samples_differ_in_half_of_the_cells():
    labels = patches(1, 20, 20, range(3))
    known, a = labels[0] != IGNORE, halve(labels, torch.tensor([5]), 3, seed=0)[0]
    for sample, seed in ((6, 0), (5, 1)):
        b = halve(labels, torch.tensor([sample]), 3, seed=seed)[0]
        assert 0.3 < (a != b)[known].float().mean() < 0.7


@pytest.mark.parametrize("sample", [0, 1, 1000, 10**9])
def test_views_are_mixed_in_space(sample):
    view = halve(torch.zeros(1, 64, 64, dtype=torch.long), torch.tensor([sample]), 1, seed=0)[
        0
    ].double()
    assert view.mean() == 0.5
    blocks = view.view(8, 8, 8, 8).mean((1, 3))  # of 64 pixels each: standard deviation 0.0625
    assert (blocks - 0.5).abs().max() < 0.3
    for neighbour in (view[1:] == view[:-1], view[:, 1:] == view[:, :-1]):
        assert abs(neighbour.double().mean() - 0.5) < 0.05


# --- OCCL: the loss --------------------------------------------------------------------------------------------------


def naive_occl(features, labels, views, w, centroid=0.3, category=0.5, tau=TAU):
    """The equations of losses/occl.py, term by term."""
    k = len(w)

    def unit(v):
        return v / v.norm()

    def mean_of(view_id):
        return features.permute(0, 2, 3, 1)[views == view_id].mean(0)

    present = [c for c in range(k) if (labels == c).sum() >= 2 and (views == c).any()]
    total = 0.0
    for x in (0, 1):
        for c in present:
            v1, v2 = unit(mean_of(c)), unit(mean_of(k + c))
            v = (v1, v2)[x]
            positive, others = torch.exp(v1 @ v2 / tau), 0.0
            for j in present:
                if j != c:
                    s = unit((mean_of(j) + mean_of(k + j)) / 2).detach()
                    others = others + torch.exp(v @ s / tau)
            own, every = (
                torch.exp(v @ unit(w[c]) / tau),
                sum(torch.exp(v @ unit(w[j]) / tau) for j in range(k)),
            )
            loss = centroid * -torch.log(positive / (positive + others)) + category * -torch.log(
                own / every
            )
            total = total + loss / len(present)
    return total / 2


def occl(features, labels, classifier, samples=None, **options):
    """The loss term on one view."""
    term = OCCL(num_classes=len(classifier.means()), **options)
    return term(a_step(an_output(None, features), labels, None, classifier, samples=samples))


def contrast_of(means, present=None, w=None, **options):
    """The loss of given view centroids (2, K, D)."""
    k = means.shape[1]
    w = torch.eye(k, means.shape[2], dtype=means.dtype) if w is None else w
    present = torch.ones(k, dtype=torch.bool) if present is None else present
    return OCCL(num_classes=k, **options).contrast(means, present, w)


@pytest.mark.parametrize(
    "weights",
    [{"centroid": 1.0, "category": 0.1}, {"centroid": 0.4, "category": 0.0, "temperature": 0.2}],
)
@pytest.mark.parametrize("classifier", [CBP, Linear])
def test_occl_and_its_gradients_equal_the_equations(classifier, weights):
    classifier = classifier(num_classes=6, in_channels=10).double()
    features = torch.randn(3, 10, 12, 11, dtype=torch.float64, requires_grad=True)
    labels, samples = patches(3, 24, 22, [0, 1, 3, 4]), torch.tensor([3, 9, 4])
    actual = occl(features, labels, classifier, samples, seed=5, **weights)
    small = resize_labels(labels, (12, 11))
    views = halve(small, samples, 6, 5, "objects")
    renamed = {"tau" if key == "temperature" else key: value for key, value in weights.items()}
    expected = naive_occl(features, small, views, classifier.means(), **renamed)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    leaves = [features, *classifier.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (actual, expected))
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_learned_class_vectors_get_a_gradient_from_the_category_loss_only():
    classifier = Linear(num_classes=4, in_channels=8)
    features, labels = torch.randn(2, 8, 12, 12), patches(2, 12, 12, range(4))
    for category, reached in ((0.1, True), (0.0, False)):
        classifier.zero_grad()
        occl(features.requires_grad_(), labels, classifier, category=category).backward()
        assert bool(classifier.conv.weight.grad.any()) == reached
        assert classifier.conv.bias.grad is None


def test_centroids_are_the_class_means_of_each_view():
    features, labels = torch.randn(2, 5, 8, 8, dtype=torch.float64), patches(2, 8, 8, range(3))
    views = halve(labels, torch.tensor([1, 2]), 3, seed=0)
    sums, counts = class_sums(features, views, 6)
    for view in range(6):
        expected = features.permute(0, 2, 3, 1)[views == view].mean(0)
        torch.testing.assert_close(sums[view] / counts[view], expected)


@pytest.mark.parametrize("k", [2, 7])
def test_centroid_loss_of_orthonormal_classes_is_its_lower_limit(k):
    means = torch.eye(k, 9, dtype=torch.float64).expand(2, -1, -1)
    expected = math.log(1 + (k - 1) * math.exp(-1 / TAU))
    assert contrast_of(means, centroid=1.0, category=0.0).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("k", [2, 7])
def test_centroid_loss_of_equal_centroids_is_the_logarithm_of_the_classes(k):
    means = torch.ones(2, k, 9, dtype=torch.float64)
    assert contrast_of(means, centroid=1.0, category=0.0).item() == pytest.approx(math.log(k))


@pytest.mark.parametrize("k", [2, 7])
def test_category_loss_on_the_prototypes_is_its_lower_limit(k):
    w = orthogonal_rows(k, 9, 2.0)
    expected = math.log(1 + (k - 1) * math.exp(-1 / TAU))
    assert contrast_of(
        w.expand(2, -1, -1), w=w, centroid=0.0, category=1.0
    ).item() == pytest.approx(expected, rel=1e-6)


def test_centroid_loss_of_one_class_is_exactly_zero():
    features = torch.randn(2, 8, 6, 6, requires_grad=True)
    value = occl(
        features,
        torch.full((2, 6, 6), 2),
        CBP(num_classes=5, in_channels=8),
        centroid=1.0,
        category=0.0,
    )
    value.backward()
    assert value == 0 and features.grad.isfinite().all()
    value = occl(features, torch.full((2, 6, 6), 2), CBP(num_classes=5, in_channels=8))
    assert value > 0 and value.isfinite()


@pytest.mark.parametrize("ids", [[IGNORE], [IGNORE, 0]])
def test_occl_without_two_cells_of_a_class_is_zero_with_finite_gradients(ids):
    labels = torch.full((1, 6, 6), IGNORE)
    labels[0, 0, : len(ids)] = torch.tensor(ids)
    features = torch.zeros(1, 8, 6, 6, requires_grad=True)
    value = occl(features, labels, CBP(num_classes=5, in_channels=8))
    value.backward()
    assert value == 0 and (features.grad == 0).all()


def test_features_of_zero_give_finite_gradients():
    features = torch.zeros(1, 8, 6, 6, requires_grad=True)
    value = occl(features, patches(1, 6, 6, range(3)), CBP(num_classes=5, in_channels=8))
    value.backward()
    assert value.isfinite() and features.grad.isfinite().all()


def test_classes_below_min_pixels_are_left_out():
    features, labels = torch.randn(1, 8, 6, 6), torch.zeros(1, 6, 6, dtype=torch.long)
    labels[0, 3:] = 1
    labels[0, 0, :3] = 2  # three cells
    classifier = CBP(num_classes=3, in_channels=8)
    without = torch.where(labels == 2, IGNORE, labels)
    assert occl(features, labels, classifier, min_pixels=4) == occl(features, without, classifier)
    assert occl(features, labels, classifier, min_pixels=3) != occl(features, without, classifier)


def test_absent_classes_do_not_change_the_centroid_loss():
    features, labels = torch.randn(2, 16, 12, 12), patches(2, 12, 12, range(3))
    values = [
        occl(features, labels, CBP(num_classes=k, in_channels=16), centroid=1.0, category=0.0)
        for k in (3, 4, 15)
    ]
    torch.testing.assert_close(values[1:], values[:1] * 2)


def test_occl_does_not_depend_on_the_order_of_the_batch():
    classifier = CBP(num_classes=4, in_channels=8).double()
    features, labels = torch.randn(3, 8, 12, 12, dtype=torch.float64), patches(3, 12, 12, range(4))
    samples, order = torch.tensor([8, 2, 5]), torch.tensor([1, 2, 0])
    value = occl(features, labels, classifier, samples)
    torch.testing.assert_close(
        occl(features[order], labels[order], classifier, samples[order]), value
    )
    assert not torch.isclose(occl(features, labels, classifier, samples + 1), value)


# --- CeCo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, dim", [(2, 1), (3, 2), (11, 10), (19, 64), (150, 256)])
def test_corners_of_the_simplex_are_unit_vectors_with_equal_cosines(k, dim):
    corners = simplex(k, dim, 0, torch.device("cpu"))
    expected = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(corners @ corners.T, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(corners, simplex(k, dim, 1, torch.device("cpu"))) or dim == 1


def test_a_simplex_needs_channels_and_two_classes():
    with pytest.raises(UserError, match=r"at least 4 channels for 5 classes, and there are 3"):
        simplex(5, 3, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="at least two classes"):
        CeCo(num_classes=1)
    with pytest.raises(ValueError, match="prior needs the labels"):
        CeCo(num_classes=2, prior=True)


def ceco(features, labels, k=6, seed=3, **options):
    return CeCo(num_classes=k, seed=seed, **options)(a_step(an_output(None, features), labels))


def naive_ceco(features, labels, k=6, seed=3, scale=5.0, prior=None):
    """The equation of losses/ceco.py, class by class and pixel by pixel."""
    corners, terms = simplex(k, features.shape[1], seed, torch.device("cpu")), []
    for c in range(k):
        cells = [
            features[b, :, y, x] for b, y, x in np.ndindex(*labels.shape) if labels[b, y, x] == c
        ]
        if cells:
            z = sum(cells) / len(cells)
            z = z / z.norm()
            logits = [
                scale * (z @ m) + (math.log(prior[j]) if prior else 0)
                for j, m in enumerate(corners)
            ]
            terms.append(-torch.log(torch.exp(logits[c]) / sum(torch.exp(l) for l in logits)))
    return sum(terms) / len(terms)


COUNTS = np.array([[5, 0, 9, 0, 1, 0], [2, 0, 0, 0, 4, 0], [1, 3, 0, 0, 0, 0]])


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("classes", [range(6), [0, 2, 5]])
def test_ceco_and_its_gradient_equal_the_equation(classes, prior):
    features = torch.randn(2, 9, 8, 7, dtype=torch.float64, requires_grad=True)
    labels = patches(2, 8, 7, classes)
    shares = [3 / 9, 1 / 9, 1 / 9, 1 / 9, 2 / 9, 1 / 9] if prior else None  # a class unseen is one
    value = ceco(features, labels, scale=4.0, prior=prior, counts=lambda: COUNTS)
    expected = naive_ceco(features, labels, scale=4.0, prior=shares)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, features)[0] for loss in (value, expected)),
        atol=1e-12,
        rtol=1e-9,
    )


def test_ceco_is_least_at_the_corners():
    labels = torch.arange(6).view(1, 2, 3)
    corners = simplex(6, 9, 3, torch.device("cpu"))
    features = corners.T.reshape(1, 9, 2, 3).clone().requires_grad_()
    value = ceco(7 * features, labels)
    assert value.item() == pytest.approx(math.log(1 + 5 * math.exp(-5 * 6 / 5)))
    value.backward()
    assert features.grad.abs().max() < 1e-6


def test_ceco_of_the_embedding_reads_no_features():
    embedding, labels = torch.randn(2, 9, 8, 7), patches(2, 8, 7, range(6))
    term = CeCo(num_classes=6, space="joint")
    assert term(a_step(an_output(embedding=embedding), labels)) > 0
    with pytest.raises(UserError, match=r"space=joint needs model\.heads\.projector"):
        term(a_step(an_output(features=embedding), labels))


def test_ceco_of_ignored_labels_is_a_zero_with_a_graph():
    features = torch.randn(1, 9, 4, 4, requires_grad=True)
    value = ceco(features, torch.full((1, 4, 4), IGNORE))
    value.backward()
    assert value == 0 and (features.grad == 0).all()


def ceco_of_samples(chosen):
    """(loss, gradient) on some of six images; class 4 in one image alone."""
    torch.manual_seed(0)
    features = torch.randn(6, 9, 8, 7, dtype=torch.float64)[chosen].requires_grad_()
    labels = patches(6, 8, 7, [0, 1, 2])
    labels[3, 5:] = 4
    value = ceco(features, labels[chosen])
    value.backward()
    return value.detach(), features.grad


def ceco_of_a_half(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(ceco_of_samples(slice(rank, None, 2)), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_ceco_of_two_processes_is_that_of_one(tmp_path):
    on_two_processes(ceco_of_a_half, tmp_path)
    value, gradient = ceco_of_samples(slice(None))
    for rank in range(2):
        mine, slope = torch.load(tmp_path / str(rank))
        torch.testing.assert_close(mine, value, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(slope / 2, gradient[rank::2], atol=1e-12, rtol=1e-12)


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def test_losses_of_bf16_outputs_are_those_of_the_same_values_in_float32():
    logits, labels = logits_and_labels(dtype=torch.bfloat16)
    features, classifier = torch.randn(2, 8, 6, 5).bfloat16(), CBP(num_classes=5, in_channels=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert pixel_loss(logits, labels) == pixel_loss(logits.float(), labels)
        assert occl(features, labels, classifier) == occl(features.float(), labels, classifier)


def test_a_small_network_with_cbp_and_occl_learns_one_image_by_heart():
    labels = torch.arange(4).view(1, 2, 2).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[0, 10:22, 10:22] = (labels[0, 10:22, 10:22] + 1) % 4
    colors = torch.rand(4, 3)
    image = (colors[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(1, 3, 32, 32)).clamp(0, 1)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    classifier = CBP(num_classes=4, in_channels=16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(150):
        features = network(image)
        contrastive = occl(features, labels, classifier)
        (pixel_loss(classifier(features), labels) + contrastive).backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (classifier(network(image)).argmax(1) == labels).float().mean()
    assert accuracy > 0.99


K, D = 5, 16


def cbp(k=K, d=D, seed=0, **options):
    torch.manual_seed(seed)
    return CBP(num_classes=k, in_channels=d, **options)


def batch(classes, seed=0, images=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (images, 6, 7), generator=generator)]
    return torch.randn(images, D, 6, 7, generator=generator) + 1, labels


# --- the readings of OCCL --------------------------------------------------------------------------------------------


def test_a_checkerboard_splits_by_row_and_column():
    labels, samples = torch.randint(3, (4, 6, 6)), torch.tensor([7, 8, 9, 10])
    labels[:, 0] = 255
    known, views = labels != 255, halve(labels, samples, 3, 0, "checkerboard")
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    assert torch.equal((views // 3)[known], ((y + x) % 2).expand(4, -1, -1)[known])
    assert torch.equal((views % 3)[known], labels[known]) and (views[~known] >= 6).all()


def contrast(means, w, **options):
    return OCCL(num_classes=len(w), **options).contrast(
        means, torch.tensor([True] * (len(w) - 1) + [False]), w
    )


def naive(means, w, negatives, against, normalize, reduction, tau=0.07):
    """Equations 4 to 6 term by term; the last class is absent."""

    def unit(v):
        return v / v.norm() if normalize else v

    total, present = 0.0, range(len(w) - 1)
    center = [unit(means[:, j].mean(0)) for j in present]
    for x in (0, 1):
        for l in present:
            v, other = unit(means[x, l]), unit(means[1 - x, l])
            wrong = [
                center[j] if negatives == "category" else unit(means[1 - x, j])
                for j in present
                if j != l
            ]
            logits = torch.stack([v @ other, *(v @ n for n in wrong)]) / tau
            total = total + logits.logsumexp(0) - logits[0]
            logits = (
                torch.stack(
                    [v @ unit(w[j]) for j in (range(len(w)) if against == "all" else present)]
                )
                / tau
            )
            total = total + 0.1 * (logits.logsumexp(0) - logits[l])
    return total / 2 / (len(present) if reduction == "mean" else 1)


@pytest.mark.parametrize(
    "changed",
    [{}, {"negatives": "view"}, {"against": "present"}, {"normalize": False}, {"reduction": "sum"}],
    ids=str,
)
def test_each_reading_of_occl_equals_its_equation(changed):
    means, w = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    options = {
        "negatives": "category",
        "against": "all",
        "normalize": True,
        "reduction": "mean",
    } | changed
    factors = {"centroid": 1.0, "category": 0.1}
    found = contrast(means, w, **factors, **changed)
    torch.testing.assert_close(found, naive(means, w, **options))
    if changed:
        assert not torch.isclose(found, contrast(means, w, **factors))


def test_without_partner_the_positive_pulls_one_view_at_a_time():
    means, w = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    gradients = []
    for partner in (True, False):
        x = means.clone().requires_grad_()
        value = contrast(x, w, partner=partner, category=0.0)
        gradients.append((value.detach(), torch.autograd.grad(value, x)[0]))
    (a, both), (b, one) = gradients
    assert a == b and not torch.isclose(both, one).all()


def test_occl_uses_the_mean_prototype_of_a_class_that_has_several():
    features, labels = batch([0, 1, 2])
    several = cbp(per_class=3)
    single = Linear(num_classes=K, in_channels=D)
    single.conv.weight.data.copy_(several.means()[:, :, None, None])
    a, b = (
        OCCL(num_classes=K)(a_step(an_output(features=features), labels, prototypes=c))
        for c in (several, single)
    )
    torch.testing.assert_close(a, b)
