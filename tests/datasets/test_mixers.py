"""Mixers: which views the student sees, and that labels and weights fit them."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.base import drawing
from datasets.mixers import OPERATIONS, ClassMix, ColorBlur, Source, SourceTarget, Strong, sharpness
from engine.build import build
from engine.errors import UserError
from engine.step import View
from losses import bcl, bismap, proda, self_training
from models.prototypes.centroids import Centroids
from tests.records import a_batch, a_step, an_output

SIZE = (20, 30)


def batch(samples=(4, 9), size=SIZE, dtype=torch.float32):
    """Source and target images, labels 0 to 4 of the source, the first row ignored."""
    generator, count = torch.Generator().manual_seed(0), len(samples)
    label = torch.randint(0, 5, (count, *size), generator=generator)
    label[:, 0] = 255
    source, target = (
        torch.rand(count, 3, *size, generator=generator, dtype=dtype) for _ in range(2)
    )
    return a_batch(source, label), a_batch(target, samples=list(samples))


def mixed(mixer, weights=(), **options):
    """The step after a mixer, whose target is labelled 7 throughout."""
    source, target = batch(**options)
    labels = {"source": source.label, "target": torch.full_like(source.label, 7)}
    step = a_step(None, labels, dict(weights), source=source, target=target)
    assert mixer(step) is None and mixer.after(step) is None
    return step


def constant(value):
    return torch.full((2, *SIZE), value)


# --- views, labels, weights ------------------------------------------------------------------------------------------


MIXERS = {"Source": {}, "SourceTarget": {}, "ClassMix": {"target": True}, "Strong": {"cutout": 0.3}}


@pytest.mark.parametrize("name", MIXERS)
def test_what_a_mixer_is_given_passes_through_and_plain_views_are_the_images(name):
    mixer = build(
        "datasets", {"name": f"mixers.{name}", **MIXERS[name]}, seed=3, num_classes=5, in_channels=8
    )
    weights = {"source": torch.rand(2, *SIZE), "target": torch.rand(2, *SIZE)}
    step = mixed(mixer, weights)
    views, labels, trust = step.views, step.labels, step.weights
    assert all(trust[view] is weights[view] for view in weights)
    assert labels["source"] is step.source.label and (labels["target"] == 7).all()
    for view, given in (("source", step.source), ("target", step.target)):
        assert view not in views or views[view].image is given.image
    assert (
        set(views) - {"source"}
        == {
            "Source": set(),
            "SourceTarget": {"target"},
            "ClassMix": {"mixed", "target"},
            "Strong": {"target", "strong"},
        }[name]
    )
    new = {"ClassMix": {"mixed"}, "Strong": {"strong"}}.get(name, set())
    assert set(trust) == {"source", "target"} | new
    assert set(labels) == {"source", "target"} | ({"mixed"} if name == "ClassMix" else set())
    for view, shown in views.items():
        assert shown == View(shown.image, "source" if view == "source" else "target")


@pytest.mark.parametrize("mixer", [Source(), SourceTarget(), Strong()])
def test_without_a_labeler_the_labels_are_those_of_the_source(mixer):
    source, target = batch()
    step = a_step(labels=source.label, source=source, target=target)
    mixer(step)
    assert [*step.labels] == ["source"] and "source" in step.views
    assert "source" not in step.weights


def test_class_mix_without_a_labeler_says_that_it_needs_one():
    source, target = batch()
    mixer, step = ClassMix(), a_step(labels=source.label, source=source, target=target)
    mixer(step)
    with pytest.raises(UserError, match=r"a labeler is needed, see uda\.labelers"):
        mixer.after(step)


@pytest.mark.parametrize(
    "name, pasted, rest", [("source", 0.5, 1.0), ("target", 1.0, 0.5), ("neither", 1.0, 1.0)]
)
def test_class_mix_weights_what_it_pastes_as_the_source_and_the_rest_as_the_target(
    name, pasted, rest
):
    step = mixed(ClassMix(), {} if name == "neither" else {name: constant(0.5)})
    kept, weights = step.labels["mixed"] == 7, step.weights["mixed"]
    assert 0.2 < kept.float().mean() < 0.8
    assert (weights[~kept] == pasted).all() and (weights[kept] == rest).all()
    assert set(step.views) == {"source", "mixed"}


def test_images_of_two_sizes_are_not_pasted():
    source, target = batch()
    target.image = target.image[..., 1:]
    with pytest.raises(UserError, match=r"the source, \d+x\d+, onto the target, .*data.target_augment"):
        ClassMix()(a_step(source=source, target=target))


@pytest.mark.parametrize("mixer", [ClassMix(color_p=1.0, blur_p=1.0), Strong(operations=8, p=1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_not_coarsen_the_images(mixer, dtype):
    plain = mixed(mixer, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        step = mixed(mixer, dtype=dtype)
    for name, view in step.views.items():
        assert view.image.dtype == dtype and torch.equal(view.image, plain.views[name].image)
    assert all(value.dtype == dtype for value in step.weights.values())


@pytest.mark.parametrize("mixer", [ClassMix(color_p=1.0, blur_p=1.0), Strong(operations=8, p=1.0)])
def test_mixers_leave_the_global_generators_alone(mixer, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded")
    )
    before = torch.get_rng_state()
    mixed(mixer)
    assert torch.equal(before, torch.get_rng_state())


# --- Strong ----------------------------------------------------------------------------------------------------------


def strong(samples=(4, 9), **options):
    """Target images, their strong versions, weights."""
    step = mixed(Strong(**options), samples=samples)
    return step.target.image, step.views["strong"].image, step.weights["strong"]


def test_strong_depends_on_seed_and_sample_alone():
    options = {"operations": 6, "p": 1.0}
    target, image, kept = strong(**options)
    one = Strong(**options).augment(target[1], 9)
    assert torch.equal(one[0], image[1]) and torch.equal(one[1], kept[1])
    assert not torch.equal(Strong(**options).augment(target[1], 10)[0], image[1])
    assert not torch.equal(Strong(seed=1, **options).augment(target[1], 9)[0], image[1])


@pytest.mark.parametrize("cutout, side", [(0.2, 6), (0.5, 15), (0.0, 0), (1.0, 20)])
def test_the_cut_out_is_a_black_square_of_weight_0_inside_the_image(cutout, side):
    target, image, kept = strong(range(60), cutout=cutout, p=0.0)
    assert torch.equal(image, target * kept[:, None]) and ((kept == 0) | (kept == 1)).all()
    corners = set()
    for mask in kept == 0:
        rows, columns = (
            mask.any(1).nonzero().flatten().tolist(),
            mask.any(0).nonzero().flatten().tolist(),
        )
        assert (
            len(rows) == len(columns) == side and mask.sum() == side**2
        )  # a full square, not cut by the border
        corners.add((rows[0], columns[0]) if side else ())
    if 0 < side < 20:
        tops, lefts = (set(values) for values in zip(*corners))
        assert (
            {min(tops), max(tops)} == {0, 20 - side} and min(lefts) <= 1 and max(lefts) >= 29 - side
        )


def test_outside_the_cut_out_only_colours_change():
    """Flat halves stay flat, and the edge between them stays where it is."""
    image = torch.tensor([0.2, 0.4, 0.3]).view(3, 1, 1).repeat(1, 16, 40)
    image[:, :, 17:] = torch.tensor([0.7, 0.5, 0.8]).view(3, 1, 1)
    changed = 0
    for sample in range(40):
        result, kept = Strong(operations=4, p=1.0, cutout=0.0).augment(image, sample)
        assert (kept == 1).all() and result.shape == image.shape and result.isfinite().all()
        for part in (
            result[..., :14],
            result[..., 20:],
        ):  # sharpness mixes 3 x 3 pixels, at most four times
            assert (part[..., 1:-1, :] - part[..., 8:9, 7:8]).abs().max() < 1e-6
        edge = (result[..., 8, 1:] - result[..., 8, :-1]).abs().sum(0)
        assert edge.max() == 0 or edge.argmax() == 16
        changed += not torch.equal(result, image)
    assert changed > 30


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_change_images_within_range_and_in_place_never(name, dtype):
    image = 0.05 + 0.9 * torch.rand(3, 12, 16, dtype=dtype)
    before = image.clone()
    for tenths in range(1, 10):
        result = OPERATIONS[name](image, tenths / 10)
        assert result.shape == image.shape and result.dtype == dtype
        assert result.min() >= 0 and result.max() <= 1 and torch.equal(image, before)
        assert torch.equal(result, image) == (name == "identity")


def test_operations_have_the_ranges_of_fix_match():
    image = torch.rand(3, 12, 16)
    assert torch.allclose(OPERATIONS["brightness"](image, 0.1), 0.14 * image)
    assert torch.allclose(OPERATIONS["brightness"](image, 0.9), 0.86 * image)
    for tenths, levels in ((1, 16), (4, 32), (9, 128)):
        result = OPERATIONS["posterise"](image, tenths / 10)
        assert torch.equal(result, (image * levels).floor() / levels)
    assert torch.equal(
        OPERATIONS["solarise"](image, 0.9), torch.where(image >= 0.1, 1 - image, image)
    )
    grey = OPERATIONS["colour"](image, 0.1).std(0)
    assert torch.allclose(grey, 0.14 * image.std(0), atol=1e-6)


@pytest.mark.parametrize("factor", [0.14, 0.5, 0.86])
def test_sharpness_is_that_of_torchvision(factor):
    image = torch.rand(3, 12, 16)
    torch.testing.assert_close(sharpness(image, factor), F.adjust_sharpness(image, factor))


@pytest.mark.parametrize("operations, p", [(1, 0.5), (2, 0.5), (1, 1.0), (3, 0.0), (0, 1.0)])
def test_operations_are_applied_with_their_probability(operations, p):
    image, mixer = 0.05 + 0.9 * torch.rand(3, 8, 8), Strong(operations=operations, p=p, cutout=0.0)
    same = sum(torch.equal(mixer.augment(image, sample)[0], image) for sample in range(600)) / 600
    assert same == pytest.approx(
        (1 - p + p / 9) ** operations, abs=0.06
    )  # one of the nine is the identity


@pytest.mark.parametrize(
    "options", [{"operations": -1}, {"p": 1.5}, {"cutout": -0.1}, {"cutout": 2.0}]
)
def test_impossible_options_of_strong_are_named(options):
    ((key, value),) = options.items()
    with pytest.raises(UserError, match=f"Strong: option '{key}' must be .*, not {value}$"):
        build("datasets", {"name": "mixers.Strong", **options}, seed=0)


# --- parts ---------------------------------------------------------------------------------------------------------


def mix(samples=(0, 1), **options):
    """A step after ClassMix of a source in classes 0 to 4 and a target of class 7."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (2, 6, 6), generator=generator)
    label[:, 0] = 255
    source, target = (torch.rand(2, 3, 6, 6, generator=generator) for _ in range(2))
    labels = {"source": label, "target": torch.full((2, 6, 6), 7)}
    weights = {"target": torch.full((2, 6, 6), 0.25)}
    step = a_step(labels=labels, weights=weights, source=source, target=target, samples=samples)
    mixer = ClassMix(color_p=0.0, blur_p=0.0, **options)
    mixer(step)
    mixer.after(step)
    return step


def test_class_mix_pastes_whole_classes_with_their_labels_and_weights():
    step = mix()
    image, domain = step.views["mixed"][:2]
    labels, weights, truth = step.labels["mixed"], step.weights["mixed"], step.labels["source"]
    for i in range(2):
        pasted = labels[i] != 7
        kept = set(truth[i][pasted].tolist())
        present = set(truth[i].unique().tolist()) - {255}
        assert kept < present and len(kept) == (len(present) + 1) // 2
        assert torch.equal(pasted, torch.isin(truth[i], torch.tensor(sorted(kept))))
        own, other = step.source.image[i], step.target.image[i]
        assert torch.equal(image[i], torch.where(pasted, own, other))
        assert (weights[i][pasted] == 1).all() and (weights[i][~pasted] == 0.25).all()
    assert domain == "target" and step.views["source"].domain == "source"
    assert (labels != 255).all()


def centroids():
    """Seen for two of five classes."""
    member = Centroids(num_classes=5, in_channels=4)
    member.vectors.normal_(generator=torch.Generator().manual_seed(3))
    member.seen[:2] = True
    return member


STORED = [
    bcl.StaticLabels(num_classes=5),
    bismap.LikelihoodLabels(num_classes=5, agree=0.9),
    self_training.StoredConfidence(),
]
TRANSFER = bcl.LabelTransfer(num_classes=5, in_channels=4, confidence=0.0)
LABELERS = {
    **{type(labeler).__name__: [labeler] for labeler in STORED},
    "TeacherConfidence": [self_training.TeacherConfidence(threshold=0.3, ignore_top=2)],
    "hybrid": [STORED[0], TRANSFER],
    "LabelTransfer": [TRANSFER],
    "Denoise": [proda.Denoise(prototypes="centroids")],
}


@pytest.mark.parametrize("name", LABELERS)
def test_class_mix_pastes_true_pixels_among_the_labels_of_any_labeler(name):
    """Also among those that need the student's features, and with weights of both domains."""
    draw = torch.Generator().manual_seed(1)
    source, target = batch()
    stored = torch.randint(0, 5, source.label.shape, generator=draw)
    stored[torch.rand(stored.shape, generator=draw) < 0.5] = 255
    target.extra["pseudo_labels"] = stored.byte()
    source_weights = torch.rand(stored.shape, generator=draw)

    def output():
        features = torch.randn(2, 4, 6, 8, generator=draw)
        return an_output(torch.randn(2, 5, 6, 8, generator=draw), features)

    step = a_step(None, source.label, source_weights, source=source, target=target)
    step.prototypes["centroids"], step.teacher = centroids(), output()
    mixer, labelers = ClassMix(target=True), LABELERS[name]
    for labeler in labelers:
        labeler.before(step)
    mixer(step)
    step.outputs = {view: output() for view in step.views}
    for labeler in labelers:
        labeler.after(step)
    mixer.after(step)

    pasted = mixer.choose(source.label, target.sample)
    labels, weights, pseudo = step.labels["mixed"], step.weights["mixed"], step.labels["target"]
    assert 0.2 < pasted.float().mean() < 0.8 and len(pseudo.unique()) > 1
    assert torch.equal(labels[pasted], source.label[pasted])
    assert torch.equal(labels[~pasted], pseudo[~pasted])
    assert torch.equal(weights[pasted], source_weights[pasted])
    trust = step.weights.get("target", torch.ones_like(weights))
    assert torch.equal(weights[~pasted], trust[~pasted])
    if name in ("hybrid", "LabelTransfer", "Denoise"):
        assert (labels != 255).float().mean() > 0.9  # no holes: not the stored labels alone
    elif name != "TeacherConfidence":
        assert torch.equal(pseudo, stored)
    else:
        assert (trust[:, :2] == 0).all() and 0 < trust[:, 2:].max() < 1


@pytest.mark.parametrize(
    "part, name",
    [
        (bcl.Contrast(num_classes=5), "bcl.Contrast"),
        (TRANSFER.after, "bcl.LabelTransfer"),
        (LABELERS["Denoise"][0].after, "proda.Denoise"),
    ],
)
def test_what_needs_the_pairs_as_they_come_names_itself_and_the_option(part, name):
    source, target = batch()
    outputs = {view: an_output(features=torch.randn(2, 4, 6, 8)) for view in ("source", "mixed")}
    step = a_step(outputs, source.label, source=source, target=target)
    step.labels["target"] = target.label
    with pytest.raises(
        UserError, match=rf"^{name} needs the view 'target'.*ClassMix with target: true"
    ):
        part(step)


def test_class_mix_depends_on_the_sample_alone():
    one, again, other = mix(), mix(), mix(samples=(2, 3))
    flipped = torch.flip(one.labels["source"], [0])
    swapped = ClassMix().choose(flipped, torch.tensor([1, 0]))
    one, again, other = (step.labels["mixed"] for step in (one, again, other))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(swapped.flip(0), one != 7)


def test_class_mix_of_a_source_without_labels_is_the_target():
    label = torch.full((1, 4, 4), 255)
    assert not ClassMix().choose(label, torch.tensor([3])).any()
    single = torch.where(torch.eye(4, dtype=torch.bool), 3, 255)[None]
    assert torch.equal(ClassMix().choose(single, torch.tensor([3])), single == 3)


def test_strong_augmentation_of_a_sample_is_repeatable_and_leaves_the_global_generator_alone():
    change, image = ClassMix(color_p=1.0, blur_p=1.0).augment, torch.rand(1, 3, 16, 16)
    before = torch.get_rng_state()
    assert torch.equal(change(image, [5]), change(image, [5]))
    assert not torch.equal(change(image, [5]), change(image, [6]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{}, {"color_p": 1.0, "blur_p": 1.0}, {"color": (0.5, 0, 0.4, 0)}, {"color": (0, 0, 0, 0.5)}],
)
def test_colours_and_blur_of_a_batch_are_those_of_torchvision_image_by_image(options):
    images, change = torch.rand(6, 3, 14, 18), ColorBlur(seed=2, **options)
    images[0, :, :4] = images[0, :1, :4]  # grey has no hue
    color, numbers = options.get("color", (0.5, 0.5, 0.5, 0.3)), [3, 40, 41, 7, 8, 9]
    jitter, blur = v2.ColorJitter(*color), v2.GaussianBlur(9, (0.15, 1.15))
    changed = change(images, numbers)
    for image, number, found in zip(images, numbers, changed):
        assert torch.equal(change(image[None], [number])[0], found)  # whoever is beside it
        with drawing(2 * 1_000_003 + number):
            chances = torch.tensor([options.get("color_p", 0.8), options.get("blur_p", 0.5)])
            jitters, blurs = torch.rand(2) < chances
            image = jitter(image) if jitters else image
            image = blur(image) if blurs else image
        torch.testing.assert_close(found, image, rtol=0, atol=2e-6)
