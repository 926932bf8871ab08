"""Mixers and styles: which views the student sees, that labels and weights fit them, and that styles are what they say.

What ClassMix pastes is tested in test_train_uda.py.
"""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from datasets.mixers import OPERATIONS, ClassMix, Source, SourceTarget, Strong, sharpness
from datasets.style import FDA, ColorStats, lab_to_rgb, rgb_to_lab
from datasets.toy import draw
from engine.build import build
from engine.errors import UserError
from engine.step import View
from tests.records import a_batch, a_step

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
    assert mixer(step) is None
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
    with pytest.raises(UserError, match=r"a labeler is needed, see uda\.labelers"):
        ClassMix()(a_step(labels=source.label, source=source, target=target))


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


# --- styles ----------------------------------------------------------------------------------------------------------

STYLES = [ColorStats(), ColorStats(strength=0.4), FDA(), FDA(beta=0.2)]


def scenes(domain, count=2, size=(24, 40), dtype=torch.float32):
    drawn = [torch.from_numpy(draw(3, i, domain, size)[0]).permute(2, 0, 1) for i in range(count)]
    return torch.stack(drawn).to(dtype) / 255


@pytest.mark.parametrize("style", [*STYLES, FDA(beta=1.0)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_own_style_changes_nothing(style, dtype, tolerance):
    images = torch.cat([scenes("real", dtype=dtype), torch.rand(1, 3, 24, 40, dtype=dtype)])
    result = style(images, images)
    assert result.dtype == dtype and (result - images).abs().max() < tolerance


@pytest.mark.parametrize("style", STYLES)
def test_styles_stay_in_range_and_treat_every_image_of_the_batch_by_itself(style):
    source, target = scenes("synthetic", 3), scenes("night", 3)
    result = style(source, target)
    assert result.shape == source.shape and result.min() >= 0 and result.max() <= 1
    assert (result - source).abs().max() > 0.05
    for i in range(3):
        torch.testing.assert_close(
            style(source[i : i + 1], target[i : i + 1])[0], result[i], rtol=0, atol=1e-6
        )
    swapped = style(source, target.flip(0))
    assert (swapped[1] - result[1]).abs().max() < 1e-6 and (
        swapped[0] - result[0]
    ).abs().max() > 0.01


@pytest.mark.parametrize("style", STYLES)
def test_styles_compute_in_float32_under_autocast_and_take_targets_of_another_size(style):
    source, target = scenes("synthetic"), scenes("night", size=(36, 30))
    expected = style(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(style(source, target), expected)
    assert style(source.to(torch.bfloat16), target).dtype == torch.bfloat16
    torch.testing.assert_close(
        style(source.double(), target.double()).float(), expected, rtol=0, atol=1e-5
    )


PUBLISHED = {  # sRGB: L, a, b
    (1, 0, 0): (53.24, 80.09, 67.20),
    (0, 1, 0): (87.73, -86.18, 83.18),
    (0, 0, 1): (32.30, 79.19, -107.86),
    (0, 0, 0): (0, 0, 0),
    (0.5, 0.5, 0.5): (53.39, 0, 0),
    (1, 1, 1): (100, 0, 0),
}


def test_lab_has_the_published_values():
    lab = rgb_to_lab(torch.tensor([*PUBLISHED]).T.reshape(1, 3, -1, 1))[0, :, :, 0].T
    lab = lab * torch.tensor([100, 500, 200]) - torch.tensor([16, 0, 0])
    torch.testing.assert_close(lab, torch.tensor([*PUBLISHED.values()]), rtol=0, atol=0.02)


def test_lab_is_inverted_also_beyond_the_colours_of_srgb():
    wide = torch.rand(1, 3, 30, 30, dtype=torch.float64) * 2 - 0.5
    torch.testing.assert_close(
        lab_to_rgb(rgb_to_lab(wide)), wide, rtol=0, atol=1e-3
    )  # sRGB's two pieces do not meet
    inside = torch.rand(1, 3, 30, 30, dtype=torch.float64)
    assert (lab_to_rgb(rgb_to_lab(inside)) - inside).abs().max() < 1e-6


def moments(lab):
    return lab.mean((2, 3)), lab.std((2, 3))


@pytest.mark.parametrize("target", ["night", "fog", "snow"])
def test_color_stats_gives_each_channel_of_lab_the_mean_and_deviation_of_the_target(target):
    source, target = rgb_to_lab(scenes("synthetic").double()), rgb_to_lab(scenes(target).double())
    for result, wanted in zip(moments(ColorStats().match(source, target)), moments(target)):
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12)


def test_color_stats_reaches_rgb_and_keeps_the_structure():
    source, target = (
        0.4 + 0.2 * scenes("real").double(),
        0.3 + 0.2 * scenes("snow").double(),
    )  # nothing is cut off
    result = ColorStats()(source, target)
    for found, wanted in zip(moments(rgb_to_lab(result)), moments(rgb_to_lab(target))):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    pairs = zip(rgb_to_lab(result)[:, 0].flatten(1), rgb_to_lab(source)[:, 0].flatten(1))
    assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.999 for pair in pairs)


def test_color_stats_goes_half_the_way_with_half_the_strength():
    source, target = rgb_to_lab(scenes("synthetic")), rgb_to_lab(scenes("night"))
    half = ColorStats(strength=0.5).match(source, target)
    torch.testing.assert_close(half, (source + ColorStats().match(source, target)) / 2)
    assert torch.equal(ColorStats(strength=0.0).match(source, target), source)


def test_color_stats_of_a_flat_image_is_the_mean_colour_of_the_target():
    flat, target = torch.full((2, 3, 24, 40), 0.3), scenes("real")
    result = rgb_to_lab(ColorStats()(flat, target))
    torch.testing.assert_close(
        result, rgb_to_lab(target).mean((2, 3), True).expand_as(result), rtol=0, atol=1e-3
    )


def noise(*size, seed=0):
    """Images of so little contrast that nothing is cut off."""
    return 0.5 + 0.02 * torch.randn(
        2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def by_hand(source, target, beta):
    """FDA with the full spectrum, the zero frequency in its middle."""
    spectra = [np.fft.fftshift(np.fft.fft2(x.numpy()), axes=(-2, -1)) for x in (source, target)]
    amplitude, wanted = (np.abs(s) for s in spectra)
    (height, width), (y, x) = source.shape[-2:], (n // 2 for n in source.shape[-2:])
    b = int(np.floor(beta * min(height, width)))
    box = slice(max(0, y - b), y + b + 1), slice(max(0, x - b), x + b + 1)
    amplitude[..., box[0], box[1]] = wanted[..., box[0], box[1]]
    mixed = amplitude * np.exp(1j * np.angle(spectra[0]))
    return torch.from_numpy(np.fft.ifft2(np.fft.ifftshift(mixed, axes=(-2, -1))).real)


@pytest.mark.parametrize("size", [(24, 40), (25, 41), (32, 18), (15, 24)])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.3, 0.5, 1.0])
def test_fda_replaces_the_amplitudes_of_a_square_of_low_frequencies(size, beta):
    source, target = noise(*size), 0.1 + noise(*size, seed=1)
    expected = by_hand(source, target, beta)
    torch.testing.assert_close(
        FDA(beta=beta).transfer(source, target), expected, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(FDA(beta=beta)(source, target), expected, rtol=0, atol=1e-12)


def test_fda_with_beta_0_is_the_identity_and_with_beta_1_has_all_amplitudes_of_the_target():
    source, target = noise(24, 40), noise(24, 40, seed=1)
    assert torch.equal(FDA(beta=0.0)(source, target), source)
    result, wanted, before = (
        torch.fft.fft2(x) for x in (FDA(beta=1.0)(source, target), target, source)
    )
    torch.testing.assert_close(result.abs(), wanted.abs(), rtol=0, atol=1e-10)
    turned = (result / before).angle().abs()
    assert (turned < 1e-6).all() and (wanted.abs() - before.abs()).abs().max() > 0.5


def test_a_beta_below_one_pixel_moves_the_mean_colour_alone():
    source, target = noise(24, 40), 0.2 + noise(24, 40, seed=1)
    moved = FDA(beta=0.01).transfer(source, target) - source
    difference = (target.mean((2, 3), True) - source.mean((2, 3), True)).expand_as(moved)
    torch.testing.assert_close(moved, difference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "spec, says",
    [
        ({"name": "style.ColorStats", "strength": 1.5}, "'strength' must be a float in"),
        ({"name": "style.FDA", "beta": -0.1}, "'beta' must be a float of at least 0, not -0.1"),
    ],
)
def test_impossible_options_of_styles_are_named(spec, says):
    with pytest.raises(UserError, match=says):
        build("datasets", spec, seed=0)
