"""Styles of domain adaptation are what they say."""

import numpy as np
import pytest
import torch

from datasets.style import FDA, ColorStats, lab_to_rgb, rgb_to_lab
from datasets.toy import draw
from engine.build import build
from engine.errors import UserError

STYLES = [ColorStats(), FDA(), FDA(beta=0.2)]


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
        ({"name": "style.FDA", "beta": -0.1}, "'beta' must be a float of at least 0, not -0.1"),
    ],
)
def test_impossible_options_of_styles_are_named(spec, says):
    with pytest.raises(UserError, match=says):
        build("datasets", spec, seed=0)
