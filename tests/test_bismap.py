"""BiSMAP: labels by likelihood, weights of source pixels, and its three losses, held to the numbers of the paper."""

import contextlib
import itertools
import json
import math
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.toy import Toy
from engine import distributed
from engine.errors import UserError
from engine.prepare import Preparation
from engine.statistics import resize_labels
from losses import bismap
from losses.bismap import (
    Consistency,
    Distillation,
    LikelihoodLabels,
    SymmetricCrossEntropy,
    Transferability,
    class_offsets,
    region_weights,
)
from losses.cross_entropy import CrossEntropy
from models.backbones.resnet import ResNet
from models.classifiers.linear import Linear
from models.decoders.fcn import FCN
from models.prototypes.basis import OrthogonalBasis
from models.prototypes.centroids import Centroids
from models.prototypes.mixtures import Mixtures
from models.segmentor import Output, Segmentor

K, D = 11, 16


def preparation(folder, members=None, target="real", length=4):
    torch.manual_seed(0)
    backbone = ResNet(depth=18, stages=3, output_stride=8, weights="none")
    decoder = FCN(in_channels=backbone.channels, width=D)
    network = Segmentor(backbone, decoder, Linear(in_channels=decoder.channels, num_classes=K))
    source = Toy(domain="synthetic", length=length, size=[48, 64])
    target = Toy(domain=target, length=length, size=[48, 64], labels=False)
    made = Preparation(network, source, target, members or {}, folder, torch.device("cpu"), contextlib.nullcontext())
    # A network that is right about most source pixels: a linear map from its own features to the labels.
    features, labels = [], []
    for _, image, label in made.images(made.source):
        output = made.segment(image)
        features.append(output.features[0].flatten(1).T)
        labels.append(resize_labels(label, output.features.shape[-2:]).flatten())
    features, labels = torch.cat(features), torch.cat(labels)
    solution = torch.linalg.lstsq(
        torch.cat([features, torch.ones_like(features[:, :1])], 1), 8 * torch.eye(256)[labels][:, :K]
    ).solution
    network.classifier.load_state_dict(
        {key: value.view_as(network.classifier.state_dict()[key])
         for key, value in zip(network.classifier.state_dict(), (solution[:-1].T.contiguous(), solution[-1]))}
    )  # fmt: skip
    return made


def mixtures(**options):
    return Mixtures(num_classes=K, in_channels=D, components=2, pool=2000, relative_floor=1e-3, **options)


def stored(made, name="target/pseudo_labels"):
    paths = sorted((made.folder / name).rglob("*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).long()


# --- labels by likelihood ------------------------------------------------------------------------------------------


def test_a_higher_threshold_only_removes_labels_and_none_leaves_no_hole(tmp_path):
    made = preparation(tmp_path, {"mixtures": mixtures()})
    kept = []
    quantiles = [{"source_quantile": level} for level in (0.1, 0.5, 0.9)]
    for threshold in ({"nats": -1e30}, *quantiles, {"nats": 1e30}):
        LikelihoodLabels(num_classes=K, threshold=threshold).prepare(made)
        kept.append(stored(made))
    assert (kept[0] != 255).all() and (kept[-1] == 255).all()
    for low, high in itertools.pairwise(kept):
        assert torch.equal(torch.where(high == 255, 255, low), high)
    assert len({int((labels != 255).sum()) for labels in kept}) == 5


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_a_source_quantile_keeps_that_share_of_the_source_where_the_network_is_right(tmp_path, level):
    made = preparation(tmp_path, {"mixtures": mixtures()}, length=24)
    labeler = LikelihoodLabels(num_classes=K, threshold={"source_quantile": level})
    labeler.prepare(made)
    above, total = torch.zeros(K), torch.zeros(K)
    for _, image, label in made.images(made.source):
        output = made.segment(image)
        label = resize_labels(label, output.features.shape[-2:])
        right = output.logits.argmax(1) == label
        own = made.prototypes["mixtures"].score(output.features).gather(1, label.clamp_max(K - 1)[:, None])[:, 0]
        chosen = right & (own >= labeler.threshold[label.clamp_max(K - 1)])
        above += torch.bincount(label[chosen], minlength=K)
        total += torch.bincount(label[right], minlength=K)
    common = total > 50
    assert common.sum() >= 2
    assert (above / total)[common].tolist() == pytest.approx([1 - level] * int(common.sum()), abs=0.04)


@pytest.mark.parametrize("member", [Centroids, OrthogonalBasis])
def test_any_member_of_the_family_can_label(tmp_path, member):
    made = preparation(tmp_path, {"other": member(num_classes=K, in_channels=D)})
    labeler = LikelihoodLabels(num_classes=K, prototypes="other", threshold={"source_quantile": 0.25})
    labeler.prepare(made)
    found = labeler.threshold[labeler.threshold.isfinite()]
    assert len(found) >= 4 and (found.abs() <= 1e3).all()
    share = (stored(made) != 255).double().mean()
    assert 0 < share < 1


def test_a_class_that_was_never_learned_is_never_a_label(tmp_path):
    made = preparation(tmp_path, {"mixtures": mixtures()})
    labeler = LikelihoodLabels(num_classes=K, threshold={"nats": -1e30})
    labeler.prepare(made)
    seen = made.prototypes["mixtures"].seen
    labels = stored(made)
    assert not seen.all() and seen.any()  # the drawn classes are not all among the pixels that it gets right
    assert set(labels.unique().tolist()) <= {c for c in range(K) if seen[c]}
    assert (labels != 255).all()
    assert labeler.threshold[~seen].isinf().all()


def test_only_correct_source_pixels_are_fitted(tmp_path):
    class Recorder(Centroids):
        def fit(self, batches):
            self.counted = sum((labels != 255).sum() for _, labels, _ in batches())
            super().fit(batches)

    made = preparation(tmp_path, {"mixtures": Recorder(num_classes=K, in_channels=D)})
    LikelihoodLabels(num_classes=K, threshold={"nats": 0.0}).prepare(made)
    right = everything = 0
    for _, image, label in made.images(made.source):
        output = made.segment(image)
        label = resize_labels(label, output.features.shape[-2:])
        right += (output.logits.argmax(1) == label).sum()
        everything += (label != 255).sum()
    assert made.prototypes["mixtures"].counted == right < everything


def test_stored_labels_come_back_in_training_and_equal_the_rule(tmp_path):
    made = preparation(tmp_path, {"mixtures": mixtures()})
    labeler = LikelihoodLabels(num_classes=K, threshold={"source_quantile": 0.1})
    labeler.prepare(made)
    sample = made.training["target"][2]
    batch = {"target": {"extra": {"pseudo_labels": sample["extra"]["pseudo_labels"][None]}}}
    labels, weights = labeler.before(batch)
    image = sample["image"][None].float() / 255
    assert torch.equal(labels["target"], labeler.label(made.network, image, made.prototypes)) and weights == {}


@pytest.mark.parametrize(
    "threshold", [{}, {"nats": 1.0, "source_quantile": 0.1}, {"quantile": 0.1}, {"source_quantile": 2}]
)
def test_a_threshold_is_nats_or_a_quantile(threshold):
    with pytest.raises(ValueError, match=r"nats|lie in 0\.\.1"):
        LikelihoodLabels(num_classes=K, threshold=threshold)


def test_a_missing_member_is_named(tmp_path):
    made = preparation(tmp_path, {"centroids": Centroids(num_classes=K, in_channels=D)})
    with pytest.raises(UserError, match=r"needs the prototypes 'mixtures'; there are centroids\. Add prototypes"):
        LikelihoodLabels(num_classes=K).prepare(made)


def two_halves(monkeypatch, function):
    """Run `function` in two threads that act as two processes and exchange what they would."""
    barrier, box, local = threading.Barrier(2), [None, None], threading.local()

    def gather(value):
        box[local.rank] = value
        barrier.wait()
        values = list(box)
        barrier.wait()
        return values

    monkeypatch.setattr(distributed, "rank", lambda: local.rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "is_main", lambda: local.rank == 0)
    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "barrier", lambda: gather(None))
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: sum(gather(tensor.detach().clone())))
    results = [None, None]

    def work(rank):
        local.rank = rank
        results[rank] = function(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def test_two_processes_store_what_one_stores(tmp_path, monkeypatch):
    def run(made):
        LikelihoodLabels(num_classes=K, threshold={"source_quantile": 0.2}).prepare(made)
        Transferability(num_classes=K, clusters=5, size=[32, 64], grid=[2, 2]).prepare(made)
        return made

    torch.set_default_dtype(torch.float64)
    try:
        one = run(preparation(tmp_path / "one", {"mixtures": mixtures()}))
        both = [preparation(tmp_path / "two", {"mixtures": mixtures()}) for _ in range(2)]
        results = two_halves(monkeypatch, lambda rank: run(both[rank]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(result is not None for result in results)
    for name in ("target/pseudo_labels", "source/transferability"):
        assert torch.equal(stored(one, name), stored(both[0], name))


# --- weights of the source -----------------------------------------------------------------------------------------


def test_the_region_weight_is_one_at_a_prototype_and_half_at_the_mean_distance():
    distances = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weights = region_weights(distances, distances.mean())
    assert weights[0] == 1 and weights[2] == 0.5 and (weights.diff() < 0).all() and (weights >= 0).all()
    torch.testing.assert_close(weights, torch.exp(-math.log(2) * distances**2 / 4))
    torch.testing.assert_close(weights, region_weights(7 * distances, 7 * distances.mean()))
    assert (region_weights(torch.zeros(3), torch.tensor(0.0)) == 1).all()


def test_the_published_class_offsets():
    """The second rows of the table, to the printed digits."""
    gta5 = class_offsets(torch.tensor(bismap.ENTROPY["gta5"], dtype=torch.float64))
    printed = "131 371 108 622 615 347 405 399 058 414 000 275 675 045 494 570 687 824 1000"
    assert gta5.tolist() == pytest.approx([int(digits) / 1000 for digits in printed.split()], abs=6e-4)
    synthia = class_offsets(torch.tensor(bismap.ENTROPY["synthia"], dtype=torch.float64))
    printed = "203 261 188 845 908 547 781 680 281 000 202 500 797 273 000 684 000 1000 863"
    assert synthia.tolist() == pytest.approx([int(digits) / 1000 for digits in printed.split()], abs=6e-4)
    assert (class_offsets(torch.full((4,), 0.3)) == 0).all()


def weights_of(tmp_path, **options):
    made = preparation(tmp_path, target=options.pop("target", "real"))
    part = Transferability(num_classes=K, size=[32, 64], grid=[2, 2], **{"clusters": 5, **options})
    part.prepare(made)
    maps = stored(made, "source/transferability")
    return made, part, maps


def test_weights_lie_in_the_unit_interval_and_average_a_half_region(tmp_path):
    made, part, maps = weights_of(tmp_path, entropy="none")
    assert maps.min() >= 0 and maps.max() <= 255 and len(maps.unique()) > 4
    sample = made.training["source"][1]
    weights = part({"source": {"extra": {"transferability": sample["extra"]["transferability"][None]}}})
    assert weights.shape == (1, 48, 64) and weights.dtype == torch.get_default_dtype()
    assert torch.equal((weights * 255).round().long()[0], maps[1])
    # No offset: one value per region, a quarter of the picture each.
    assert all(len(block.unique()) == 1 for row in maps[0].split(24) for block in row.split(32, 1))


def test_hard_classes_keep_their_weight(tmp_path):
    made, _, maps = weights_of(tmp_path)
    settings = json.loads((made.folder / "source" / "transferability" / "settings.json").read_text())
    offsets = torch.tensor(settings["offsets"])
    assert offsets.min() == 0 and offsets.max() == 1
    labels = torch.stack([label[0] for _, _, label in made.images(made.source)])
    hardest = int(offsets.argmax())
    assert (labels == hardest).any() and (maps[labels == hardest] == 255).all() and (maps < 255).any()


def test_source_regions_that_look_like_the_target_keep_their_weight(tmp_path):
    """A target made of one source image and of noise: its regions are prototypes themselves."""

    class Planted(Toy):
        def load(self, index):
            image, label = super().load(0) if index == 0 else super().load(index)
            return (
                image if index == 0 else np.random.default_rng(index).integers(0, 256, image.shape, np.uint8)
            ), label

    made = preparation(tmp_path)
    made.target = Planted(domain="synthetic", length=4, size=[48, 64], labels=False)
    Transferability(num_classes=K, size=[32, 64], grid=[2, 2], clusters=16, entropy="none").prepare(made)
    maps = stored(made, "source/transferability").double() / 255
    assert (maps[0] == 1).all() and maps[1:].mean() < 0.75


def test_weights_of_one_are_the_ordinary_cross_entropy():
    outputs = {"source": Output(torch.randn(2, K, 6, 8), torch.randn(2, D, 6, 8), {})}
    labels = {"source": torch.randint(0, K, (2, 24, 32))}
    valid = {"source": (labels["source"] != 255).sum()}
    plain = CrossEntropy()(outputs, labels, valid, {})
    ones = CrossEntropy()(outputs, labels, valid, {"source": torch.ones(2, 24, 32)})
    half = CrossEntropy()(outputs, labels, valid, {"source": torch.full((2, 24, 32), 0.5)})
    assert plain == ones and torch.isclose(half, plain / 2)  # the divisor is the count, not the sum of the weights


def test_published_entropies_are_for_nineteen_classes():
    with pytest.raises(ValueError, match="has 19 classes, the data 11"):
        Transferability(num_classes=11, entropy="gta5")


# --- losses --------------------------------------------------------------------------------------------------------


def symmetric(logits, label, weights=None, **options):
    labels = {"target": torch.full((1, *logits.shape[-2:]), label)}
    outputs = {"target": Output(logits, logits, {})}
    valid = {"target": (labels["target"] != 255).sum()}
    return SymmetricCrossEntropy(**options)(outputs, labels, valid, weights or {})


def pixel(p, k=5):
    """Logits (1, K, 1, 1) whose class 0 has probability p."""
    others = torch.full((k - 1,), (1 - p) / (k - 1), dtype=torch.float64)
    return torch.cat([torch.tensor([p], dtype=torch.float64), others]).clamp_min(1e-300).log().view(1, k, 1, 1)


def test_reverse_cross_entropy_is_bounded():
    assert symmetric(pixel(1.0), 0, ce=0.0) == pytest.approx(0, abs=1e-12)
    assert symmetric(pixel(0.0), 0, ce=0.0) == pytest.approx(9.2103, abs=1e-4)
    for p in (0.1, 0.5, 0.9):  # the definition, with the one-hot label clamped to [1e-4, 1]
        q = torch.full((5,), 1e-4, dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
        expected = -(pixel(p).flatten().exp() * q.log()).sum()
        assert symmetric(pixel(p), 0, ce=0.0) == pytest.approx(float(expected), abs=1e-10)
    for p in (1e-12, 0.3, 1 - 1e-9):
        logits = pixel(p).requires_grad_()
        (gradient,) = torch.autograd.grad(symmetric(logits, 0, ce=0.0), logits)
        assert gradient.isfinite().all() and gradient.abs().max() <= 9.2103 / 4 + 1e-9


def test_cross_entropy_has_a_tenth():
    p = pixel(0.3)
    both, reverse = symmetric(p, 0), symmetric(p, 0, ce=0.0)
    assert both - reverse == pytest.approx(-0.1 * math.log(0.3), abs=1e-12)


def test_symmetric_cross_entropy_skips_ignored_pixels_and_takes_weights():
    logits = pixel(0.3).requires_grad_()
    empty = symmetric(logits, 255)
    assert empty == 0 and torch.autograd.grad(empty, logits)[0].abs().sum() == 0
    assert symmetric(pixel(0.3), 0, {"target": torch.full((1, 1, 1), 0.25)}) == pytest.approx(
        float(symmetric(pixel(0.3), 0)) / 4
    )


def consistency(student, teacher, kept, step=4000, **options):
    outputs = {"strong": Output(student, student, {})}
    return Consistency(**options)(outputs, Output(teacher, teacher, {}), {"strong": kept}, step)


def test_consistency_is_zero_where_student_and_teacher_agree_and_the_divergence_elsewhere():
    logits, other = torch.randn(2, K, 6, 8, dtype=torch.float64), torch.randn(2, K, 6, 8, dtype=torch.float64)
    ones = torch.ones(2, 6, 8, dtype=torch.float64)
    assert consistency(logits, logits, ones) == pytest.approx(0, abs=1e-12)
    t, s = other.softmax(1), logits.softmax(1)
    expected = (t * (t.log() - s.log())).mean()  # over pixels and classes
    assert consistency(logits, other, ones) == pytest.approx(float(expected), abs=1e-12)


def test_consistency_sends_gradients_to_the_student_outside_the_cut_out_alone():
    student, teacher = (torch.randn(1, K, 6, 8, requires_grad=True) for _ in range(2))
    kept = torch.ones(1, 6, 8)
    kept[:, :, 3:] = 0
    loss = consistency(student, teacher, kept)
    gradients = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert gradients[1] is None and (gradients[0][..., 3:] == 0).all() and (gradients[0][..., :3] != 0).any()
    assert torch.isclose(loss, consistency(student[..., :3], teacher[..., :3], kept[..., :3]))
    empty = consistency(student, teacher, torch.zeros_like(kept))
    assert empty == 0 and torch.autograd.grad(empty, student)[0].abs().sum() == 0


def test_the_ramp_of_consistency():
    factors = [Consistency(ramp=4000).factor(t) for t in (0, 1000, 2000, 3000, 4000, 9000)]
    assert factors == pytest.approx([0.0067, 0.060, 0.287, 0.732, 1, 1], abs=5e-4)
    assert Consistency(ramp=0).factor(0) == 1


def test_distillation_in_both_forms():
    student = torch.randn(1, K, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, K, 4, 4, dtype=torch.float64)

    def loss(kd, s=student, t=teacher):
        return Distillation(kd=kd)({"target": Output(s, s, {})}, Output(t, t, {}))

    (linear,) = torch.autograd.grad(loss("linear"), student)
    (expected,) = torch.autograd.grad(-(teacher.softmax(1) * student.softmax(1)).mean(), student)
    torch.testing.assert_close(linear, expected)
    assert loss("kl") > 0 and loss("kl", teacher, teacher) == pytest.approx(0, abs=1e-12)
    smaller = Output(*(2 * [torch.randn(1, K, 2, 2)]), {})  # another output stride
    assert Distillation()({"target": Output(student, student, {})}, smaller).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32(dtype):
    student, teacher = (torch.randn(1, K, 6, 8).to(dtype) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = consistency(student, teacher, torch.ones(1, 6, 8))
        assert value.dtype == torch.float32 and value.isfinite() and value > 0
        assert symmetric(student, 3).dtype == torch.float32
        assert (
            Distillation()({"target": Output(student, student, {})}, Output(teacher, teacher, {})).dtype
            == torch.float32
        )


def test_mixtures_of_equal_isotropic_components_label_as_the_nearest_centroid():
    """With one component and one variance for all, likelihood is distance; with unequal variances it is not."""
    one = Mixtures(num_classes=2, in_channels=2, components=1)
    one.component_means.copy_(torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]]))
    one.seen.fill_(True)
    labeler = LikelihoodLabels(num_classes=2, threshold={"nats": 0.0})
    labeler.threshold.fill_(-torch.inf)
    x = torch.tensor([0.6, 0.0]).view(1, 2, 1, 1)
    network = types.SimpleNamespace(segment=lambda image: Output(image, x, {}))
    assert labeler.label(network, x[..., :1, :1], {"mixtures": one}).item() == 1
    one.component_variances[1] = 0.05
    torch.testing.assert_close(one.score(x).flatten(), torch.tensor([-2.018, -0.442]), atol=1e-3, rtol=0)
    x = torch.tensor([0.45, 0.0]).view(1, 2, 1, 1)
    assert labeler.label(network, x, {"mixtures": one}).item() == 1  # the first mean is nearer
