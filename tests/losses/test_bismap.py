"""BiSMAP: labels by likelihood, transferability of the source, and its losses, against equations and planted data.

The mixtures themselves: test_mixtures.py.
"""

import contextlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from datasets.toy import Toy
from engine import distributed
from engine.build import build
from engine.config import ConfigError
from engine.errors import UserError
from engine.prepare import Preparation
from losses import bismap
from losses.bismap import (
    ENTROPY,
    Consistency,
    Distillation,
    LikelihoodLabels,
    SymmetricCrossEntropy,
    Transferability,
    class_offsets,
    nearest_distances,
    pixel_weights,
    region_weights,
)
from losses.cross_entropy import CrossEntropy
from models.backbones.resnet import ResNet
from models.classifiers.linear import Linear
from models.decoders.deeplabv3plus import DeepLabV3Plus
from models.prototypes.basis import OrthogonalBasis
from models.prototypes.centroids import Centroids
from models.prototypes.mixtures import Mixtures
from models.prototypes.pair import Pair
from models.segmentor import Segmentor
from tests.records import a_batch, a_step, an_output
from tests.runs import as_two_processes

IGNORE = 255
K, D = 5, 8
ABSENT = 3  # a class that the planted source does not have


# --- planted features ------------------------------------------------------------------------------------------------


class Planted:
    """What LikelihoodLabels needs of a Preparation, and of a network: image number i has the i-th maps."""

    def __init__(self, features, labels, prototypes, factor=1, logits=None):
        self.features, self.prototypes, self.source, self.target = (
            features,
            prototypes,
            "source",
            "target",
        )
        self.logits = features[:, :K] if logits is None else logits
        self.labels = labels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        self.network = self

    def images(self, dataset):
        for i, label in enumerate(self.labels):
            label = label if dataset == "source" else torch.full_like(label, IGNORE)
            yield i, torch.full((1, 3, *label.shape), float(i)), label[None]

    def segment(self, image, domain="target"):
        index = image[:, 0, 0, 0].long()
        return an_output(self.logits[index], self.features[index])

    def store(self, name, dataset, make, settings, palette=False):
        assert name == "pseudo_labels" and dataset == "target" and palette
        self.settings = json.loads(json.dumps(settings))
        self.stored = torch.stack([make(*item) for item in self.images(dataset)])


def planted(images=3, size=(16, 20), deviation=0.5, dtype=torch.float64):
    """Features (N, D, h, w) about 4 times the unit vector of their class, labels (N, h, w) without the class ABSENT."""
    labels = torch.tensor([0, 1, 2, 4])[torch.randint(4, (images, size[0] // 2, size[1] // 2))]
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    noise = deviation * torch.randn(images, *size, D, dtype=dtype)
    return (4 * torch.eye(K, D, dtype=dtype)[labels] + noise).permute(0, 3, 1, 2), labels


def basis():
    member = OrthogonalBasis(num_classes=K, in_channels=D)
    member.vectors.copy_(torch.eye(K, D))
    return member


MEMBERS = {
    "mixtures": lambda: Mixtures(num_classes=K, in_channels=D, components=2),
    "centroids": lambda: Centroids(num_classes=K, in_channels=D),
    "pair": lambda: Pair(num_classes=K, in_channels=D),
    "basis": basis,
}
NAMES = pytest.mark.parametrize("name", [*MEMBERS, "classifier"])


def members():
    return {name: make().double() for name, make in MEMBERS.items()}


def labelled(features, labels, name="mixtures", factor=1, logits=None, **options):
    """(labeler, its labels (N, H, W)) of a target that is the source."""
    torch.manual_seed(0)
    preparation = Planted(features, labels, members(), factor, logits)
    labeler = LikelihoodLabels(num_classes=K, prototypes=name, **options).double()
    labeler.prepare(preparation)
    return labeler, preparation.stored, preparation


@pytest.mark.parametrize("nats", [-20.0, -12.0])
def test_labels_are_the_arg_max_of_upsampled_log_densities_above_the_threshold(nats):
    features, labels = planted()
    labeler, found, preparation = labelled(features, labels, factor=4, threshold={"nats": nats})
    member = preparation.prototypes["mixtures"]
    scores = member.score(features)
    best, classes = F.interpolate(scores, scale_factor=4, mode="bilinear").max(1)
    assert torch.equal(found, torch.where(best >= nats, classes, IGNORE))
    assert 0.1 < (found == IGNORE).double().mean() < 0.95
    assert (labeler.threshold[member.seen] == nats).all()


@NAMES
@pytest.mark.parametrize("key", ["nats", "source_quantile"])
def test_raising_the_threshold_only_removes_labels(name, key):
    features, labels = planted()
    values = (-math.inf, -20.0, 0.5, 2.0, math.inf) if key == "nats" else (0.0, 0.05, 0.3, 0.9, 1.0)
    results = [labelled(features, labels, name, 2, threshold={key: value})[1] for value in values]
    for more, less in itertools.pairwise(results):
        assert torch.equal(less[less != IGNORE], more[less != IGNORE])
    counts = [int((found != IGNORE).sum()) for found in results]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
    if key == "nats":
        assert counts[0] == results[0].numel() and counts[-1] == 0


@NAMES
def test_labels_may_need_a_classifier_that_agrees(name):
    features, labels = planted()
    logits = 3 * torch.randn(*features[:, :K].shape, dtype=features.dtype)
    options = {"threshold": {"nats": -1e6}, "prototypes": name}
    fitted = labelled(features, labels, name, threshold=options["threshold"])[2].prototypes
    results = {}
    for agree in (0.0, 1e-9, 0.6, 0.9):
        labeler = LikelihoodLabels(num_classes=K, agree=agree, fit=False, **options)
        shown = Planted(features, labels, fitted, 2, logits)
        labeler.double().prepare(shown)
        assert shown.settings["agree"] == agree
        results[agree] = shown.stored
    sure, classes = F.interpolate(logits, scale_factor=2, mode="bilinear").softmax(1).max(1)
    plain = results.pop(0.0)
    for agree, found in results.items():
        assert torch.equal(found, torch.where((classes == plain) & (sure >= agree), plain, IGNORE))
    counts = [int((found != IGNORE).sum()) for found in (plain, *results.values())]
    assert counts[-1] > 0 and counts[1] > counts[2] > counts[3]
    assert counts[0] > counts[1] or name == "classifier"


@NAMES
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_source_quantile_leaves_its_share_of_the_source_without_a_label(name, share):
    features, labels = planted(4, (30, 40))
    labeler, found, _ = labelled(features, labels, name, threshold={"source_quantile": share})
    for c in (0, 1, 2, 4):
        assert abs((found[labels == c] == c).double().mean() - (1 - share)) < 0.01
    assert labeler.threshold.isinf().tolist() == [c == ABSENT for c in range(K)]


@pytest.mark.parametrize("name", ["mixtures", "centroids", "pair"])
def test_absent_classes_never_appear_and_leave_no_holes(name):
    """Their cosine of 0 is the largest where all others are negative; their infinite score would be NaN if resized."""
    features, labels = planted()
    fitted = labelled(features, labels, name)[2].prototypes
    for nats, factor in itertools.product(
        (-math.inf, -0.8 if name != "mixtures" else -130.0), (1, 3)
    ):
        opposite = Planted(-features, labels, fitted, factor)
        LikelihoodLabels(
            num_classes=K, prototypes=name, threshold={"nats": nats}, fit=False
        ).prepare(opposite)
        assert not (opposite.stored == ABSENT).any()
        assert (opposite.stored != IGNORE).double().mean() > (
            0.1 if math.isfinite(nats) else 0.9999
        )


def test_only_correctly_classified_pixels_shape_the_prototypes():
    features, labels = planted()
    wrong = torch.rand(labels.shape) < 0.3
    logits = torch.where(wrong[:, None], features[:, :K].roll(1, 1), features[:, :K])
    features = torch.where(wrong[:, None], features + 10, features)
    options = {"threshold": {"source_quantile": 0.2}, "logits": logits}
    for name in ("mixtures", "centroids"):
        one = labelled(features, labels, name, **options)[0]
        two = labelled(torch.where(wrong[:, None], 77.0, features), labels, name, **options)[0]
        clean = labelled(features, torch.where(wrong, IGNORE, labels), name, **options)[0]
        assert torch.equal(one.threshold, two.threshold) and torch.equal(
            one.threshold, clean.threshold
        )
    means = labelled(features, labels, **options)[2].prototypes["mixtures"].means()
    assert (means[[0, 1, 2, 4]] - 4 * torch.eye(K, D).double()[[0, 1, 2, 4]]).abs().max() < 0.3


def test_labels_are_compared_with_the_prediction_at_feature_size():
    features, labels = planted(1, (6, 8))
    preparation = Planted(features, labels, members(), factor=4)
    preparation.labels[:, 0::4] = preparation.labels[:, :, 0::4] = (
        ABSENT  # not at the centres of the cells
    )
    labeler = LikelihoodLabels(num_classes=K, threshold={"source_quantile": 0.5}).double()
    labeler.prepare(preparation)
    assert torch.equal(
        labeler.threshold,
        labelled(features, labels, threshold={"source_quantile": 0.5})[0].threshold,
    )


@pytest.mark.parametrize("level", [0.01, 0.25, 0.5])
@pytest.mark.parametrize("size", [50, 10**5])
def test_measured_quantiles_are_those_of_a_uniform_sample(monkeypatch, size, level):
    monkeypatch.setattr(bismap, "SAMPLE", size)
    features, labels = planted(6, (30, 40))
    features[5] += 2  # another distribution, of one sixth of the pixels
    labeler = labelled(features, labels, "basis", threshold={"source_quantile": level})[0]
    correct = torch.where(features[:, :K].argmax(1) == labels, labels, IGNORE)
    for c in (0, 1, 2, 4):
        own = features[:, c][correct == c]
        value = labeler.threshold[c]
        assert (own == value).any()  # a quantile is one of the scores
        share = (own < value).double().mean()
        assert level - 1.001 / len(own) <= share < level if size > 50 else abs(share - level) < 0.2


def test_without_fit_a_member_stays_as_it_is_and_is_measured():
    """Mixtures that were only updated have no quantiles of their own."""
    features, labels = planted()
    mixtures = MEMBERS["mixtures"]().double()
    mixtures.update([(features + 1, labels, None)], a_step())
    state = {key: value.clone() for key, value in mixtures.state_dict().items()}
    preparation = Planted(features, labels, {"mixtures": mixtures})
    labeler = LikelihoodLabels(
        num_classes=K, threshold={"source_quantile": 0.1}, fit=False
    ).double()
    labeler.prepare(preparation)
    assert all(torch.equal(value, mixtures.state_dict()[key]) for key, value in state.items())
    scores, correct = mixtures.score(features), features[:, :K].argmax(1) == labels
    for c in (0, 1, 2, 4):
        own = scores[:, c][correct & (labels == c)]
        assert abs((own < labeler.threshold[c]).double().mean() - 0.1) <= 1.001 / len(own)


def test_pixels_at_the_threshold_have_a_label_and_scores_that_are_not_finite_do_not_count():
    features, labels = planted()
    one, found, _ = labelled(features, labels, "basis", threshold={"source_quantile": 1.0})
    assert ((found != IGNORE).sum(), one.threshold.isfinite().sum()) == (
        4,
        4,
    )  # the largest of each class
    spoilt = torch.rand(labels.shape) < 0.2
    logits = features[:, :K].clone()
    for value in (math.nan, math.inf):
        changed = torch.where(spoilt[:, None], value, features)
        both = [(changed, labels), (features, torch.where(spoilt, IGNORE, labels))]
        options = {"logits": logits, "threshold": {"source_quantile": 0.3}}
        first, second = (labelled(*data, "basis", **options)[0].state_dict() for data in both)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_label_gives_the_stored_labels_also_from_a_saved_state_and_before_reads_them():
    features, labels = planted()
    labeler, found, preparation = labelled(
        features, labels, factor=2, threshold={"source_quantile": 0.3}
    )
    again = LikelihoodLabels(num_classes=K).double()
    again.load_state_dict(labeler.state_dict())
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 32, 40)
    assert torch.equal(again.label(preparation, images, preparation.prototypes), found)
    alone = [again.label(preparation, image[None], preparation.prototypes) for image in images]
    assert torch.equal(torch.cat(alone), found)
    step = a_step(target=a_batch(images, pseudo_labels=found.to(torch.uint8)))
    labeler.before(step)
    assert step.labels["target"].dtype == torch.int64 and not step.weights
    assert [*step.labels] == ["target"] and torch.equal(step.labels["target"], found)
    expected = [None if t.isinf() else pytest.approx(float(t)) for t in labeler.threshold]
    assert (
        preparation.settings["rule"] == {"source_quantile": 0.3}
        and preparation.settings["threshold"] == expected
    )


def test_labels_of_half_precision_features_are_scored_in_float32():
    features, labels = planted(dtype=torch.float32)
    for name in [*MEMBERS, "classifier"]:
        half = Planted(features.bfloat16(), labels, members())
        single = Planted(features.bfloat16().float(), labels, members())
        for preparation in (half, single):
            preparation.prototypes = {
                key: member.float() for key, member in preparation.prototypes.items()
            }
            with torch.autocast("cpu", torch.bfloat16, enabled=preparation is half):
                labeler = LikelihoodLabels(
                    num_classes=K, prototypes=name, threshold={"source_quantile": 0.2}
                )
                labeler.prepare(preparation)
                output = preparation.segment(torch.zeros(1, 3, 1, 1))
                assert labeler.scores(output, preparation.prototypes)[0].dtype == torch.float32
        same = (half.stored == single.stored).double().mean()
        assert (
            same == 1 if name in ("mixtures", "centroids") else same > 0.99
        )  # those multiply under autocast


@pytest.mark.parametrize("threshold", [{"nats": -1e6}, {"source_quantile": 0.0}])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_source_without_labels_leaves_the_target_without(name, threshold):
    features, labels = planted()
    labeler, found, _ = labelled(
        features, torch.full_like(labels, IGNORE), name, threshold=threshold
    )
    frozen = (
        name == "basis" and "nats" in threshold
    )  # it has a vector for every class from the start
    assert frozen or (labeler.threshold.isinf().all() and (found == IGNORE).all())


def test_a_source_of_one_class_labels_nothing_else():
    features, labels = planted()
    _, found, _ = labelled(
        features, torch.where(labels == 2, labels, IGNORE), threshold={"nats": -math.inf}
    )
    assert (found == 2).all()


def test_a_missing_member_is_named_with_the_line_to_add():
    features, labels = planted()
    labeler = LikelihoodLabels(num_classes=K, prototypes="mixture")
    with pytest.raises(
        UserError, match=r"'mixture'; there are mixtures, .*\{name: mixtures.Mixtures, view: none\}"
    ):
        labeler.prepare(Planted(features, labels, members()))


@pytest.mark.parametrize(
    "threshold",
    [
        {},
        {"nats": 1.0, "source_quantile": 0.1},
        {"nat": 1.0},
        {"nats": "100"},
        {"nats": math.nan},
        {"source_quantile": 1.5},
        {"source_quantile": -0.1},
    ],
)
def test_a_threshold_that_is_none_is_an_error(threshold):
    with pytest.raises(
        ValueError, match=r"threshold must be one of|source_quantile=-?[0-9.]+ is no share"
    ):
        LikelihoodLabels(num_classes=K, threshold=threshold)


# --- transferability: the equations ----------------------------------------------------------------------------------


def test_region_weights_are_one_on_a_centre_and_a_half_at_the_mean_distance():
    mean = torch.tensor(3.0).double()
    found = region_weights(mean * torch.tensor([0, 0.5, 1, 2, 1e3]).double(), mean)
    expected = torch.tensor([1, 2**-0.25, 0.5, 0.0625, 0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    far = region_weights(torch.linspace(0, 50, 1000), mean.float())
    assert (far.diff() <= 0).all() and far.min() >= 0 and far.max() == 1
    assert torch.equal(region_weights(torch.zeros(4), torch.tensor(0.0)), torch.ones(4))
    assert torch.equal(
        region_weights(torch.full((4,), 7.0), torch.tensor(7.0)), torch.full((4,), 0.5)
    )


def test_region_weights_do_not_depend_on_the_scale_of_the_features():
    regions, centres = torch.randn(50, 9).double(), torch.randn(6, 9).double()
    weights = []
    for scale in (1.0, 0.01, 3e5):
        distances = nearest_distances(scale * regions, scale * centres)
        weights.append(region_weights(distances, distances.mean()))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-12, atol=0)
    naive = [min(float((r - c).norm()) for c in centres) for r in regions]
    torch.testing.assert_close(nearest_distances(regions, centres), torch.tensor(naive).double())


PUBLISHED = {
    "gta5": ".131 .371 .108 .622 .615 .347 .405 .399 .058 .414 0 .275 .675 .045 .494 .570 .687 .824 1",
    "synthia": ".203 .261 .188 .845 .908 .547 .781 .680 .281 0 .202 .500 .797 .273 0 .684 0 1 .863",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_offsets_of_the_released_constants(name):
    expected = torch.tensor([float(x) for x in PUBLISHED[name].split()])
    torch.testing.assert_close(
        class_offsets(torch.tensor(ENTROPY[name])), expected, rtol=0, atol=6e-4
    )


def test_offsets_of_equal_or_unknown_entropies_are_zero():
    nan = math.nan
    for entropies, expected in (
        ([0.3, 0.3, 0.3], [0, 0, 0]),
        ([nan, nan], [0, 0]),
        ([nan, 0.2], [0, 0]),
        ([0.2, nan, 0.6, 0.3], [0, 0, 1, 0.25]),
    ):
        torch.testing.assert_close(
            class_offsets(torch.tensor(entropies)), torch.tensor(expected).float()
        )


def test_pixel_weights_add_the_offset_of_the_class_and_are_clipped():
    regions, labels = torch.rand(2, 4, 4).double(), torch.randint(3, (2, 20, 28))
    labels[:, 0] = IGNORE
    offset = torch.tensor([0.0, 0.4, 1.0]).double()
    found = pixel_weights(regions, labels, offset)
    for b, y, x in np.ndindex(*labels.shape):
        own = offset[labels[b, y, x]] if labels[b, y, x] != IGNORE else 0
        assert found[b, y, x] == (regions[b, y // 5, x // 7] + own).clamp(0, 1)
    assert (found[labels == 2] == 1).all() and found.min() >= 0 and found.max() <= 1


def test_a_map_of_ones_is_the_ordinary_cross_entropy_and_the_divisor_is_the_number_of_pixels():
    logits, labels = torch.randn(2, K, 16, 20).double(), torch.randint(K, (2, 16, 20))
    labels[:, :4] = IGNORE
    transferability = Transferability(num_classes=K, entropy="none")
    values = []
    for level in (255, 51):
        stored = torch.full((2, 16, 20), level, dtype=torch.uint8)
        source = a_batch(torch.zeros(2, 3, 16, 20), labels, transferability=stored)
        step = a_step(an_output(logits), labels, source=source)
        transferability.before(step)
        weights = step.weights["source"]
        assert weights.dtype == torch.get_default_dtype() and weights.shape == stored.shape
        step.weights["source"] = weights.double()
        values.append(CrossEntropy()(step))
    mean = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    torch.testing.assert_close(values[0], mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(values[1], mean * 0.2, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy": "gta5"}, "has 19 classes, the data 5"),
        ({"clusters": 0}, "'clusters' must be an int of at least 1"),
        ({"size": [128]}, "'size' must be a list of length 2"),
        ({"grid": [4, 0.5]}, "'grid.1' must be an int"),
    ],
)
def test_options_of_the_map_that_are_none_are_errors(options, message):
    spec = {"name": "bismap.Transferability", **options}
    with pytest.raises(ValueError, match=message):
        build("losses", spec, num_classes=K)


# --- transferability: prepared ---------------------------------------------------------------------------------------

SMALL = {"size": [32, 64], "grid": [2, 2], "clusters": 6}


class Mixed(Toy):
    """The target's images at even places, their negatives at odd ones: one half of the source looks like the target."""

    def load(self, index):
        image, label = super().load(index)
        return image if index % 2 == 0 else 255 - image, label


def network(classes=11):
    backbone = ResNet(depth=18, stages=3, weights="none")
    decoder = DeepLabV3Plus(
        in_channels=backbone.channels, strides=backbone.strides, width=8, low_width=4
    )
    return Segmentor(backbone, decoder, Linear(in_channels=8, num_classes=classes))


def toy(folder, source=Mixed, **prototypes):
    """The preparation of a run on drawn scenes with a small network, and one on which everything depends on seed 0."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    sets = [kind(domain="real", length=4, size=[32, 48]) for kind in (source, Toy)]
    model = network().to(dtype)
    return Preparation(
        model, *sets, prototypes, folder, torch.device("cpu"), contextlib.nullcontext()
    )


def maps(preparation, name="transferability", kind="source"):
    """The stored maps (N, H, W), as training reads them."""
    return torch.stack(
        [sample["extra"][name] for sample in map(preparation.training[kind].__getitem__, range(4))]
    )


@pytest.mark.parametrize(
    "encoder", [{"name": "none"}, {"name": "resnet.ResNet", "depth": 18, "weights": "none"}]
)
def test_source_images_that_look_like_the_target_keep_more_of_their_weight(tmp_path, encoder):
    preparation = toy(tmp_path)
    Transferability(
        num_classes=11, entropy="none", encoder=encoder, **SMALL | {"clusters": 16}
    ).prepare(preparation)
    found = maps(preparation)
    assert found.dtype == torch.uint8 and found.shape == (4, 32, 48)
    assert (found[0::2] == 255).all()  # every region of the target is a centre
    assert 0 < found[1::2].double().mean() / 255 < 0.5
    assert all(
        torch.equal(block, block[:1, :1].expand(16, 24))
        for image in found
        for half in image.split(16)
        for block in half.split(24, 1)
    )
    settings = json.loads(next(tmp_path.rglob("settings.json")).read_text())
    assert (
        settings["clusters"] == 16
        and settings["mean_distance"] > 0
        and settings["offsets"] == [0] * 11
    )


def test_the_map_is_that_of_a_naive_loop(tmp_path):
    preparation = toy(tmp_path, source=Toy)
    part = Transferability(
        num_classes=11, entropy="none", **SMALL | {"grid": [2, 3], "clusters": 3}
    )
    part.prepare(preparation)
    regions = {}
    for kind in ("source", "target"):
        for index, image, _ in preparation.images(getattr(preparation, kind)):
            small = F.interpolate(image, (32, 64), mode="bilinear", antialias=True)
            with torch.no_grad():
                regions[kind, index] = F.adaptive_avg_pool2d(
                    preparation.network.backbone(small)[-1], (2, 3)
                )[0]
    centres = part.centres({i: regions["target", i].flatten(1).T.numpy() for i in range(4)})
    distances = {i: torch.zeros(2, 3) for i in range(4)}
    for i, y, x in itertools.product(range(4), range(2), range(3)):
        distances[i][y, x] = min(
            (regions["source", i][:, y, x] - centre).norm() for centre in centres
        )
    mean = sum(d.sum() for d in distances.values()) / 24
    expected = [2 ** -((distances[i] / mean) ** 2) for i in range(4)]
    expected = torch.stack(
        [255 * w.repeat_interleave(16, 0).repeat_interleave(16, 1) for w in expected]
    )
    assert (maps(preparation).double() - expected).abs().max() < 0.51 and len(
        maps(preparation).unique()
    ) > 8


def test_pixels_of_the_class_that_is_hardest_to_predict_keep_their_weight(tmp_path):
    class Sure(nn.Module):
        """A network that is uncertain about every third class, half certain about the next, sure of the others."""

        backbone = ResNet(depth=18, stages=3, weights="none")

        def segment(self, image, domain="target"):
            label = labels[float(image.sum())]
            sharpness = torch.tensor([0.0, 2.0, 30.0])[label % 3] * (label != IGNORE)
            return an_output(sharpness[:, None] * F.one_hot(label % 11, 11).movedim(3, 1))

    preparation = toy(tmp_path)
    preparation.network = Sure().eval()
    labels = {
        float(image.sum()): label for _, image, label in preparation.images(preparation.source)
    }
    truth, offsets = torch.cat([*labels.values()]), []
    for entropy in ("none", "measured"):
        Transferability(num_classes=11, entropy=entropy, **SMALL).prepare(preparation)
        offsets.append((entropy, maps(preparation).double() / 255))
        settings = json.loads(next(tmp_path.rglob("settings.json")).read_text())
    plain, found = (value for _, value in offsets)
    p = math.exp(2) / (math.exp(2) + 10)
    half = -(p * math.log(p) + (1 - p) * math.log((1 - p) / 10)) / math.log(11)
    for c in truth.unique():
        e = (1, half, 0)[c % 3] if c != IGNORE else 0
        torch.testing.assert_close(
            found[truth == c], (plain[truth == c] + e).clamp(0, 1), rtol=0, atol=4.1e-3
        )
        assert c == IGNORE or settings["offsets"][c] == pytest.approx(e, abs=1e-5)
    assert (found[truth % 3 == 0] == 1).all() and (plain < 0.9).any()


ENCODER = {"name": "resnet.ResNet", "depth": 18, "weights": "none"}


def test_maps_that_no_trained_network_enters_are_made_once(tmp_path, monkeypatch):
    made, centres = [], Transferability.centres
    monkeypatch.setattr(
        Transferability, "centres", lambda *given: made.append(1) or centres(*given)
    )

    def stage(folder, **options):
        preparation = toy(tmp_path / folder)
        options = {"entropy": "none", "encoder": ENCODER} | SMALL | options
        Transferability(num_classes=11, **options).prepare(preparation)
        return preparation.stored()

    assert stage("1_warmup") == stage("2_next") == ["1_warmup/source/transferability"]
    assert len(made) == 1
    own, measured = {"encoder": {"name": "none"}}, {"entropy": "measured"}
    for number, options in enumerate(({"clusters": 5}, own, own, measured, measured)):
        folder = f"{3 + number}_other"  # where the network is a part they are renewed
        assert stage(folder, **options) == [f"{folder}/source/transferability"]


def test_the_map_does_not_depend_on_the_scale_of_the_features(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, backbone, scale):
            super().__init__()
            self.backbone, self.scale = backbone, scale

        def forward(self, image):
            return [self.scale * x for x in self.backbone(image)]

    results = []
    for scale in (1.0, 2.0**-12, 2.0**14):
        preparation = toy(tmp_path / str(scale), source=Toy)
        preparation.network.backbone = Scaled(preparation.network.backbone, scale)
        Transferability(num_classes=11, entropy="none", **SMALL).prepare(preparation)
        results.append(maps(preparation))
    assert len(results[0].unique()) > 5
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_centres_depend_on_neither_the_order_nor_the_scale_of_the_regions():
    """Dead channels, and vectors without clusters, whose centres depend on where k-means starts."""
    rows = np.random.default_rng(0).random((64, 6), np.float32) * ([0] * 2 + [1] * 4)
    part = Transferability(num_classes=K, entropy="none", clusters=5)
    centres = part.centres({index: row[None] for index, row in enumerate(rows)})
    assert centres.shape == (5, 6) and centres.dtype == torch.float32
    order = [*range(0, 64, 2), *range(1, 64, 2)]
    assert torch.equal(part.centres({index: rows[index][None] for index in order}), centres)
    for scale in (2.0**-14, 2.0**10):
        assert torch.equal(
            part.centres({i: scale * row[None] for i, row in enumerate(rows)}), scale * centres
        )
    other = Transferability(num_classes=K, entropy="none", clusters=5, seed=1)
    assert not torch.equal(
        other.centres({index: row[None] for index, row in enumerate(rows)}), centres
    )


def test_a_target_of_one_colour_and_more_clusters_than_regions(tmp_path):
    class Constant(Toy):
        def load(self, index):
            image, label = super().load(index)
            return np.full_like(image, 90), label

    preparation = toy(tmp_path, source=Constant)
    preparation.target = Constant(domain="real", length=4, size=[32, 48])
    Transferability(num_classes=11, entropy="none", **SMALL | {"clusters": 40}).prepare(preparation)
    assert (maps(preparation) == 255).all()  # all distances are 0


# --- both, on drawn scenes -------------------------------------------------------------------------------------------


def fresh(folder):
    """A preparation with two members, and the parts to prepare; before any thread starts, for they draw at random."""
    torch.manual_seed(0)
    mixtures = Mixtures(num_classes=11, in_channels=8, components=2, iterations=3)
    preparation = toy(folder, mixtures=mixtures, centroids=Centroids(num_classes=11, in_channels=8))
    quantiles = {"mixtures": {"source_quantile": 0.3}, "centroids": {"source_quantile": 0.5}}
    parts = {
        n: LikelihoodLabels(num_classes=11, prototypes=n, threshold=q) for n, q in quantiles.items()
    }
    return preparation, parts | {"weights": Transferability(num_classes=11, **SMALL)}


def prepare_all(preparation, parts):
    """What the parts hold after they prepared, and the maps as training reads them."""
    state = {}
    for name, part in parts.items():
        part.prepare(preparation)
        state |= {f"{name}.{key}": value.clone() for key, value in part.state_dict().items()}
        stored = ("transferability", "source") if name == "weights" else ("pseudo_labels", "target")
        state[f"{name}.maps"] = maps(preparation, *stored)
        distributed.barrier()
    return state


def parts_of_consistency(rank=None):
    """Loss of four images with very different cut-outs, or of two of them."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, K, 4, 5, generator=generator, dtype=torch.float64)
    kept = torch.zeros(4, 8, 10, dtype=torch.float64)
    for i in range(4):
        kept[i, : 8 * i // 3] = 1
    part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return consistent(student[part], teacher[part], kept[part], number=5000)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_preparing_again_is_bitwise_the_same_and_two_processes_equal_one(
    tmp_path, monkeypatch, double
):
    one, again = (prepare_all(*fresh(tmp_path / name)) for name in ("one", "again"))
    both = [fresh(tmp_path / "two") for _ in range(2)]
    first, second = as_two_processes(monkeypatch, lambda rank: prepare_all(*both[rank]))
    assert one.keys() == first.keys()
    for key, value in one.items():
        assert torch.equal(value, again[key]) and torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-9)
    for name in ("mixtures", "centroids"):
        assert one[f"{name}.threshold"].isfinite().any()
        labels = one[f"{name}.maps"]
        assert {*labels.unique().tolist()} <= {*range(11), IGNORE} and 0.01 < (
            labels != IGNORE
        ).double().mean() < 0.99
    assert len(one["weights.maps"].unique()) > 8
    for kind, mode in (("pseudo_labels", "P"), ("transferability", "L")):
        with Image.open(next((tmp_path / "one").rglob(f"{kind}/**/*.png"))) as picture:
            assert picture.mode == mode


def test_consistency_is_normalised_by_the_kept_pixels_of_all_processes(monkeypatch):
    expected = parts_of_consistency()
    found = as_two_processes(monkeypatch, parts_of_consistency)
    torch.testing.assert_close(sum(found) / 2, expected, rtol=1e-12, atol=0)
    assert abs(found[0] - found[1]) > 0.1 * expected  # the cut-outs of the two differ


# --- symmetric cross-entropy -----------------------------------------------------------------------------------------


def symmetric(logits, labels, weights=None, **options):
    step = a_step({"target": an_output(logits)}, {"target": labels}, weights)
    return SymmetricCrossEntropy(**options)(step)


def certain(probability, size=(1, 2)):
    """Logits (1, 2, h, w) that give the first class this probability."""
    logit = (
        math.log(probability / (1 - probability))
        if 0 < probability < 1
        else 1e4 * (2 * probability - 1)
    )
    return torch.tensor([logit, 0.0]).double().view(1, 2, 1, 1).repeat(1, 1, *size)


@pytest.mark.parametrize(
    ("probability", "expected"), [(1.0, 0.0), (0.0, 9.2103), (0.5, 4.6052), (0.9, 0.92103)]
)
def test_reverse_cross_entropy_is_bounded(probability, expected):
    logits = certain(probability).requires_grad_()
    value = symmetric(logits, torch.zeros(1, 1, 2, dtype=torch.long), ce=0.0)
    assert abs(value.item() - expected) < 1e-4
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.abs().sum() <= 9.2104 / 2  # p (1 - p) times two logits


def test_symmetric_cross_entropy_is_the_clamped_form_of_the_released_code():
    logits, labels = 5 * torch.randn(2, 19, 8, 10).double(), torch.randint(19, (2, 16, 20))
    labels[:, :3] = IGNORE
    large = F.interpolate(logits, (16, 20), mode="bilinear")
    p = large.softmax(1).clamp(1e-7, 1).movedim(1, 3)[labels != IGNORE]
    q = F.one_hot(labels[labels != IGNORE], 19).double().clamp(1e-4, 1)
    reverse = -(p * q.log()).sum(1).mean()
    forward = F.cross_entropy(large, labels, ignore_index=IGNORE)
    torch.testing.assert_close(
        symmetric(logits, labels), 0.1 * forward + reverse, rtol=0, atol=19e-6
    )
    torch.testing.assert_close(
        symmetric(logits, labels, rce=0.0), 0.1 * forward, rtol=1e-14, atol=0
    )


def test_symmetric_cross_entropy_divides_by_the_labelled_pixels_and_takes_weights():
    logits, labels = torch.randn(1, K, 6, 6).double(), torch.randint(K, (1, 6, 6))
    weights = torch.rand(1, 6, 6).double()
    each = [
        symmetric(logits[:, :, y : y + 1, x : x + 1], labels[:, y : y + 1, x : x + 1])
        for y, x in np.ndindex(6, 6)
    ]
    expected = (torch.stack(each) * weights.flatten()).mean()
    torch.testing.assert_close(symmetric(logits, labels, {"target": weights}), expected)
    step = a_step({"target": an_output(logits)}, {"target": labels})
    step.counts["target"] = torch.tensor(72.0)
    torch.testing.assert_close(SymmetricCrossEntropy()(step), symmetric(logits, labels) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_symmetric_cross_entropy_without_labels_is_zero_with_a_graph(dtype):
    logits = torch.randn(1, K, 4, 4, dtype=dtype).requires_grad_()
    value = symmetric(logits, torch.full((1, 8, 8), IGNORE))
    value.backward()
    assert value == 0 and value.dtype == torch.float32 and not logits.grad.any()


# --- consistency -----------------------------------------------------------------------------------------------------


def consistent(student, teacher, kept, number=4000, **options):
    outputs, weights = {"strong": an_output(student)}, {"strong": kept}
    step = a_step(outputs, None, weights, number=number, total=10000, teacher=an_output(teacher))
    return Consistency(**options)(step)


def test_consistency_is_the_mean_divergence_over_kept_pixels_and_classes():
    student, teacher = torch.randn(2, 2, K, 4, 5).double()
    kept = (torch.rand(2, 8, 10) > 0.3).double()
    s, t = (
        F.interpolate(x, (8, 10), mode="bilinear").softmax(1).movedim(1, 3)[kept > 0]
        for x in (student, teacher)
    )
    expected = (t * (t.log() - s.log())).mean()
    torch.testing.assert_close(consistent(student, teacher, kept), expected)
    torch.testing.assert_close(
        consistent(student, teacher, kept, number=2000), expected * math.exp(-1.25)
    )


def test_consistency_is_zero_where_the_student_is_the_teacher():
    logits, kept = torch.randn(1, K, 4, 5).double().requires_grad_(), torch.ones(1, 16, 20).double()
    value = consistent(logits, logits.detach().clone(), kept)
    (gradient,) = torch.autograd.grad(value, logits)
    assert abs(value) < 1e-15 and gradient.abs().max() < 1e-15
    assert consistent(logits, torch.randn(1, K, 4, 5).double(), kept) > 0.01


def test_consistency_teaches_the_student_alone_and_not_in_the_cut_out():
    student, teacher = (torch.randn(1, K, 8, 8).double().requires_grad_() for _ in range(2))
    kept = torch.ones(1, 16, 16).double()
    kept[:, 4:12, 6:14] = 0
    value = consistent(student, teacher, kept)
    ours, theirs = torch.autograd.grad(value, [student, teacher], allow_unused=True)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[3:5, 4:6] = True  # cells that no pixel outside is interpolated from
    assert theirs is None and not ours[..., inside].any() and (ours[..., [0, 7], :] != 0).all()
    changed = torch.where(inside, 9.0, student)
    torch.testing.assert_close(consistent(changed, teacher, kept), value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_consistency_of_images_that_are_cut_out_as_a_whole_is_zero(dtype):
    student, teacher = torch.randn(2, 1, K, 4, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = consistent(student.requires_grad_(), teacher, torch.zeros(1, 16, 16))
    value.backward()
    assert value == 0 and value.dtype == torch.float32 and not student.grad.any()


def test_consistency_rises_over_the_ramp():
    factors = [Consistency().factor(step) for step in (0, 1000, 2000, 3000, 4000, 9000)]
    assert factors == pytest.approx([0.0067, 0.060, 0.287, 0.732, 1, 1], abs=5e-4)
    assert Consistency(ramp=0).factor(0) == 1
    with pytest.raises(ValueError, match="option 'ramp' must be an int of at least 0, not -1"):
        build("losses", {"name": "bismap.Consistency", "ramp": -1})


def test_consistency_without_a_strong_view_names_the_mixer():
    output = an_output(torch.randn(1, K, 4, 4))
    with pytest.raises(UserError, match=r"view 'strong': set uda.mixer=\{name: mixers.Strong\}"):
        Consistency()(a_step({"target": output}, teacher=output))


# --- distillation ----------------------------------------------------------------------------------------------------


def distilled(student, teacher, **options):
    step = a_step({"target": an_output(student)}, teacher=an_output(teacher))
    return Distillation(**options)(step)


@pytest.mark.parametrize("view", ["source", "mixed"])
def test_distillation_of_a_view_that_the_teacher_does_not_see_is_refused(view):
    with pytest.raises(ConfigError, match="option 'view' must be target or strong"):
        build("losses", {"name": "bismap.Distillation", "view": view})
    with pytest.raises(UserError, match=r"bismap\.Distillation"):
        Distillation()(a_step({"source": an_output(torch.zeros(1, K, 2, 2))}))


def test_linear_distillation_has_the_gradient_of_minus_the_inner_product():
    student, teacher = (torch.randn(2, K, 6, 7).double().requires_grad_() for _ in range(2))
    s, t = student.softmax(1), teacher.softmax(1)
    value = distilled(student, teacher)
    torch.testing.assert_close(value, (t * (t.log() - s)).sum() / (2 * 6 * 7 * K))
    ours, theirs = torch.autograd.grad(
        value, [student, teacher], allow_unused=True, retain_graph=True
    )
    (expected,) = torch.autograd.grad(-(t.detach() * s).sum() / (2 * 6 * 7 * K), student)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-16)
    assert theirs is None


def test_kl_distillation_is_the_divergence():
    student, teacher = (torch.randn(1, K, 6, 7).double().requires_grad_() for _ in range(2))
    value = distilled(student, teacher, kd="kl")
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x.movedim(1, 3)) for x in (teacher, student))
    )
    torch.testing.assert_close(value, divergence.mean() / K)
    assert value > 0 and abs(distilled(teacher, teacher, kd="kl")) < 1e-16
    (gradient,) = torch.autograd.grad(distilled(teacher, teacher, kd="kl"), teacher)
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("kd", ["linear", "kl"])
def test_distillation_of_half_precision_is_float32(kd):
    student, teacher = torch.randn(2, 1, K, 6, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = distilled(student, teacher, kd=kd)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, distilled(student.float(), teacher.float(), kd=kd))
