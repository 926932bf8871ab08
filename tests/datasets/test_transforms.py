"""Augmentation: image, label and maps keep telling the same story, sizes are exact, padding is marked."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from datasets import transforms
from datasets.transforms import FILL, distort, jitter
from engine.build import build

COLORS = torch.tensor([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=torch.uint8)


def with_tensors(augment):
    """Tensors (3, H, W) and (H, W) through an augmentation of arrays (H, W, 3) and (H, W)."""

    def call(image, *rest):
        arrays = [part.numpy() if torch.is_tensor(part) else part for part in rest]
        result = augment(image.permute(1, 2, 0).numpy(), *arrays)
        image, *maps = result if isinstance(result, tuple) else (result,)
        assert all(type(values) is np.ndarray for values in (image, *maps))
        image, *maps = (torch.from_numpy(np.ascontiguousarray(values)) for values in (image, *maps))
        return image.permute(2, 0, 1), *maps

    return call


def Augment(**options):
    return with_tensors(transforms.Augment(**options))


def Whole(**options):
    return with_tensors(transforms.Whole(**options))


def blocks(height, width, side=24):
    """Image (3, H, W) of coloured squares and label (H, W): the colour of a pixel is COLORS[its label]."""
    rows, columns = torch.meshgrid(
        torch.arange(height) // side, torch.arange(width) // side, indexing="ij"
    )
    label = ((rows * 5 + columns * 3 + rows * columns) % 4).to(torch.uint8)
    return COLORS[label.long()].permute(2, 0, 1), label


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 200, (height, width), generator=generator, dtype=torch.uint8)
    image = torch.stack([label, 200 - label, label // 2])  # each pixel of the image names its label
    return image, label


def inside(label):
    """Pixels whose 5 x 5 neighbourhood holds one class: there the image is one colour, however it was resized."""
    near = torch.nn.functional.max_pool2d
    x = label[None, None].float()
    return (near(x, 5, 1, 2) == -near(-x, 5, 1, 2))[0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_image_and_label_agree_after_scale_crop_and_flip(seed):
    torch.manual_seed(seed)
    image, label = Augment(crop=[96, 128], scale=[0.6, 2.5], flip=0.5)(*blocks(120, 200))
    drawn = torch.cat([COLORS, COLORS.new_zeros(252 - len(COLORS) + 4, 3)])
    drawn[255] = torch.tensor(FILL, dtype=torch.uint8)
    where = inside(label)
    assert where.float().mean() > 0.3  # or the comparison would be empty
    difference = (image.permute(1, 2, 0)[where].int() - drawn[label[where].long()].int()).abs()
    assert difference.max() <= 3


@pytest.mark.parametrize("scale", [0.4, 0.5, 0.7, 1.4, 2.0])
def test_borders_of_image_and_label_do_not_shift_when_resized(scale):
    crop = [round(30 * scale)] * 2
    for edge in range(8, 23):
        if edge * scale % 1 == 0.5:
            continue  # the edge runs through the middle of a pixel: either side is right
        image, label = (
            torch.zeros(3, 30, 30, dtype=torch.uint8),
            torch.zeros(30, 30, dtype=torch.uint8),
        )
        image[..., edge:], label[:, edge:] = 250, 1
        augment = Augment(crop=crop, scale=[scale, scale], flip=0.0)
        resized, ids = augment(image, label)
        assert torch.equal(resized[0] > 125, ids == 1), edge


@pytest.mark.parametrize("size", [(20, 30), (20, 300), (300, 20), (64, 48), (150, 170), (1, 1)])
@pytest.mark.parametrize("scale", [[0.5, 0.5], [1.0, 1.0], [2.3, 2.3], [0.5, 2.0]])
def test_result_has_the_size_of_the_crop_whatever_the_image(size, scale):
    torch.manual_seed(0)
    image, label = Augment(crop=[64, 48], scale=scale, color=[0.3, 0.3, 0.3, 0.05])(*blocks(*size))
    assert image.shape == (3, 64, 48) and label.shape == (64, 48)
    assert image.dtype == label.dtype == torch.uint8


def test_padding_is_ignored_and_filled_with_the_mean_colour():
    torch.manual_seed(0)
    image, label = noise(20, 30)
    padded, ids = Augment(crop=[50, 40], scale=[1, 1], flip=0.0)(image, label)
    outside = ids == 255
    assert outside.sum() == 50 * 40 - 20 * 30
    assert (padded[:, outside] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
    assert torch.equal(ids[~outside].reshape(20, 30), label)
    assert torch.equal(padded[:, ~outside].reshape(3, 20, 30), image)


def test_without_scale_and_flip_the_result_is_an_exact_window_that_moves():
    image, label = noise(40, 60)
    augment, windows = Augment(crop=[16, 24], scale=[1, 1], flip=0.0), set()
    for seed in range(20):
        torch.manual_seed(seed)
        part, ids = augment(image, label)
        candidates = (
            (label.unfold(0, 16, 1).unfold(1, 24, 1) == ids).all(-1).all(-1).nonzero().tolist()
        )
        assert len(candidates) == 1
        top, left = candidates[0]
        assert torch.equal(part, image[:, top : top + 16, left : left + 24])
        windows.add((top, left))
    assert len(windows) > 10


def test_flip_one_mirrors_both_and_flip_zero_never():
    image, label = noise(16, 24)
    mirrored, ids = Augment(crop=[16, 24], scale=[1, 1], flip=1.0)(image, label)
    assert torch.equal(mirrored, image.flip(-1)) and torch.equal(ids, label.flip(-1))
    same, ids = Augment(crop=[16, 24], scale=[1, 1], flip=0.0)(image, label)
    assert torch.equal(same, image) and torch.equal(ids, label)


@pytest.mark.parametrize("seed", range(8))
def test_all_maps_get_the_treatment_of_the_label_and_change_nothing_about_it(seed):
    image, label = noise(40, 60)
    other = 200 - label
    augment = Augment(crop=[33, 47], scale=[0.4, 2.5], color=[0.3, 0.3, 0.3, 0.05])
    torch.manual_seed(seed)
    alone = augment(image, label)
    torch.manual_seed(seed)
    drawn = augment(image, label, other, label)
    assert len(drawn) == 4 and torch.equal(drawn[0], alone[0])
    assert torch.equal(drawn[1], alone[1]) and torch.equal(drawn[3], alone[1])
    padding = drawn[1] == 255
    assert (drawn[2][padding] == 255).all() and torch.equal(
        drawn[2][~padding], 200 - drawn[1][~padding]
    )
    torch.manual_seed(seed)
    (bare,) = augment(image)
    assert torch.equal(bare, alone[0])


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_jitter_is_that_of_torchvision_but_for_rounding(order):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(90, 150, (3, 20, 30), generator=generator, dtype=torch.uint8)
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    amounts, expected = [1.1, 0.8, 1.2, 0.03], image
    for change in order:
        expected = changes[change](expected, amounts[change])
    (result,) = with_tensors(jitter)(image, order, *amounts)
    assert result.dtype == torch.uint8
    assert (result.int() - expected.int()).abs().max() <= 6
    assert (result.int() - expected.int()).abs().float().mean() < 2.5  # torchvision rounds down
    (same,) = with_tensors(jitter)(image, order, None, None, None, None)
    assert torch.equal(same, image)


def test_colour_leaves_the_label_alone():
    image, label = noise(16, 24)
    changed, ids = Augment(crop=[16, 24], scale=[1, 1], flip=0.0, color=[0.5, 0.5, 0.5, 0.1])(
        image, label
    )
    assert torch.equal(ids, label) and not torch.equal(changed, image)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"cat_max_ratio": 0.0}, r"'cat_max_ratio' must be a float in \(0, 1\]"),
        ({"cat_max_ratio": 1.5}, "'cat_max_ratio' must be a float"),
        ({"crop": [64]}, "'crop' must be a list of length 2"),
        ({"crop": [0, 64]}, "'crop.0' must be an int in"),
        ({"scale": [1.0]}, "'scale' must be a list of length 2"),
        ({"scale": [0.0, 1.0]}, "'scale.0' must be a float in"),
        ({"scale": [2.0, 0.5]}, r"scale must be \[low, high\], not \[2.0, 0.5\]"),
        ({"color": [0.3, 0.3]}, "'color' must be a list of length 4"),
        ({"short_side": -1}, "'short_side' must be an int in"),
        ({"crop": ["64", 64]}, "'crop.0' must be an int"),
        ({"crop": [64.5, 64]}, "'crop.0' must be an int"),
        ({"color": [None] * 4}, "'color' must be"),
        ({"scale": [1.0, float("nan")]}, "'scale.1' must be a float"),
        ({"flip": 1.5}, "'flip' must be a float in"),
        (
            {"photometric": True, "color": [0.3, 0.3, 0.3, 0.05]},
            "photometric and color both change colours",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        build("datasets", {"name": "transforms.Augment", "crop": [64, 64], **options})


# --- what is off draws nothing ---------------------------------------------------------------------------------------


def rand(count):
    return [float(torch.rand(())) for _ in range(count)]


def drew(count, seed):
    """Whether so many numbers have been drawn since the seed."""
    now = torch.get_rng_state()
    torch.manual_seed(seed)
    rand(count)
    return torch.equal(now, torch.get_rng_state())


@pytest.mark.parametrize(
    "options", [{}, {"cat_max_ratio": 1.0, "photometric": False, "short_side": 0}]
)
@pytest.mark.parametrize("seed", range(5))
def test_without_the_options_scale_two_starts_and_flip_are_drawn_in_this_order(seed, options):
    image, label = noise(40, 60)
    torch.manual_seed(seed)
    part, ids = Augment(crop=[16, 24], scale=[1.0, 1.0], flip=0.5, **options)(image, label)
    assert drew(4, seed)
    torch.manual_seed(seed)
    _, rows, columns, flip = rand(4)
    top, left = round(24 * rows), round(36 * columns)
    window, expected = (
        image[:, top : top + 16, left : left + 24],
        label[top : top + 16, left : left + 24],
    )
    assert torch.equal(part, window.flip(-1) if flip < 0.5 else window)
    assert torch.equal(ids, expected.flip(-1) if flip < 0.5 else expected)


# --- crops in which no class has too large a share -------------------------------------------------------------------


def stripe(width=200, border=160):
    """Class 0 on the left, class 1 right of the border; each column of the image has its own colour."""
    label = (torch.arange(width) >= border).to(torch.uint8).repeat(40, 1)
    image = torch.stack([torch.arange(width).to(torch.uint8).repeat(40, 1)] * 3)
    return image, label


def share(label):
    counts = torch.bincount(label.flatten(), minlength=256)[:255]
    return float(counts.max() / counts.sum().clamp_min(1))


def test_crops_are_drawn_again_until_the_share_is_small_enough():
    image, label = stripe()
    found = {}
    for ratio in (1.0, 0.6):
        augment, shares = Augment(crop=[40, 40], scale=[1, 1], flip=0.0, cat_max_ratio=ratio), []
        for seed in range(300):
            torch.manual_seed(seed)
            part, ids = augment(image, label)
            assert torch.equal(
                ids, (part[0] >= 160).to(torch.uint8)
            )  # the label belongs to the image still
            shares.append(share(ids))
        found[ratio] = sum(value <= 0.6 for value in shares) / 300
    chance = 9 / 161  # 9 of the 161 places have a share of at most 0.6
    assert abs(found[1.0] - chance) < 0.04 and abs(found[0.6] - (1 - (1 - chance) ** 11)) < 0.09


@pytest.mark.parametrize("ratio, draws", [(1.0, 4), (0.75, 4 + 2 * 10)])
def test_a_crop_is_drawn_again_ten_times_at_most(ratio, draws):
    image, label = noise(40, 60)
    torch.manual_seed(3)
    Augment(crop=[16, 24], cat_max_ratio=ratio)(image, torch.zeros_like(label))
    assert drew(draws, 3)


def test_a_good_crop_and_an_image_without_labels_are_cropped_as_without_the_option():
    image, label = noise(40, 60)
    for ids in (label, torch.full_like(label, 255)):
        torch.manual_seed(3)
        plain = Augment(crop=[16, 24])(image, ids, label)
        torch.manual_seed(3)
        drawn = Augment(crop=[16, 24], cat_max_ratio=0.75)(image, ids, label)
        assert drew(4, 3) and all(torch.equal(*pair) for pair in zip(plain, drawn, strict=True))
    torch.manual_seed(3)
    Augment(crop=[16, 24], cat_max_ratio=0.75)(image)
    assert drew(4, 3)


def test_ignored_pixels_have_no_share_and_crops_without_labelled_ones_are_drawn_again():
    image, _ = stripe()
    label = torch.full((40, 200), 255, dtype=torch.uint8)
    label[:, 100:103], label[:, 103:106] = 0, 1  # 3 % of the image, half and half
    empty = {}
    for ratio in (1.0, 0.75):
        augment = Augment(crop=[40, 40], scale=[1, 1], flip=0.0, cat_max_ratio=ratio)
        crops = []
        for seed in range(100):
            torch.manual_seed(seed)
            crops.append(augment(image, label)[1])
        empty[ratio] = sum(bool((crop == 255).all()) for crop in crops)
    assert empty[1.0] > 60 and empty[0.75] < 20


def test_windows_that_are_longer_than_the_image_count_what_the_image_has():
    image, label = blocks(30, 200)
    for seed in range(5):
        torch.manual_seed(seed)
        _, ids = Augment(crop=[64, 64], scale=[1, 1], cat_max_ratio=0.7)(image, label)
        assert ids.shape == (64, 64) and (ids == 255).any() and share(ids) <= 0.7


# --- scale relative to the short side --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_the_short_side_decides_what_scale_one_is(size):
    results = []
    for options in ({"scale": [2.0, 2.0]}, {"scale": [1.0, 1.0], "short_side": 80}):
        torch.manual_seed(0)
        results.append(Augment(crop=[50, 70], **options)(*noise(*size)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    image, label = noise(*size)
    whole, ids = Augment(crop=list(size), scale=[1, 1], short_side=40, flip=0.0)(image, label)
    assert torch.equal(whole, image) and torch.equal(ids, label)


# --- photometric distortion ------------------------------------------------------------------------------------------


def distorted(pixel, seed):
    """The definition for one pixel of three bytes, in Python's own HSV, from the same draws."""
    torch.manual_seed(seed)
    bright, contrast, saturation, hue, late = [number < 0.5 for number in torch.rand(5).tolist()]
    shift, factor, color, turn = (
        low + (high - low) * u
        for u, (low, high) in zip(
            rand(4),
            ((-32 / 255, 32 / 255), (0.5, 1.5), (0.5, 1.5), (-36 / 360, 36 / 360)),
            strict=True,
        )
    )
    x = [value / 255 for value in pixel]
    x = [min(max(value + shift * bright, 0), 1) for value in x]
    x = [min(value * factor, 1) for value in x] if contrast and not late else x
    h, s, v = colorsys.rgb_to_hsv(*x)
    x = colorsys.hsv_to_rgb((h + turn * hue) % 1, min(s * color, 1) if saturation else s, v)
    x = [min(value * factor, 1) for value in x] if contrast and late else x
    return [255 * value for value in x], (bright, contrast, saturation, hue, late)


def test_photometric_distortion_is_that_of_its_definition():
    generator, seen = torch.Generator().manual_seed(0), set()
    image = torch.randint(0, 256, (3, 4, 6), generator=generator, dtype=torch.uint8)
    for seed in range(120):
        torch.manual_seed(seed)
        (result,) = with_tensors(distort)(image)
        assert result.dtype == torch.uint8 and result.shape == image.shape
        for y, x in ((0, 0), (1, 3), (3, 5)):
            expected, applied = distorted(image[:, y, x].tolist(), seed)
            assert np.abs(result[:, y, x].numpy() - np.array(expected)).max() < 0.51 + 0.1
            seen.add(applied)
    assert len(seen) > 25  # of the 32 combinations


def test_each_photometric_change_is_made_half_of_the_time():
    applied = np.array([distorted([90, 120, 200], seed)[1] for seed in range(600)])
    assert np.abs(applied.mean(0) - 0.5).max() < 0.07


def test_photometric_distortion_leaves_label_and_window_alone_and_depends_on_the_seed_alone():
    image, label = noise(40, 60)
    results, changed = [], 0
    for seed in range(12):
        for noise_seed, photometric in ((0, False), (1, True), (2, True)):
            np.random.seed(noise_seed)
            torch.manual_seed(seed)
            results.append(Augment(crop=[16, 24], photometric=photometric)(image, label))
        (plain, ids), (first, one), (second, two) = results[-3:]
        assert torch.equal(ids, one) and torch.equal(ids, two) and torch.equal(first, second)
        changed += not torch.equal(plain, first)
    assert changed > 8


def test_whole_fits_the_picture_in_and_ignores_what_is_left():
    image = torch.full((3, 40, 20), 200, dtype=torch.uint8)
    label = torch.arange(40, dtype=torch.uint8)[:, None].expand(40, 20)
    picture, mask = Whole(size=[80, 60], flip=0.0)(image, label)
    assert picture.shape == (3, 80, 60) and mask.shape == (80, 60)
    assert (picture[:, :, :40] == 200).all() and (mask[:, 40:] == 255).all()
    assert torch.equal(mask[:, 0], torch.arange(40, dtype=torch.uint8).repeat_interleave(2))
    thin, _ = Whole(size=[64, 64])(image[:, :1], label[:1].repeat(1, 10))
    assert thin.shape == (3, 64, 64)
    mirrored, flipped = Whole(size=[80, 60], flip=1.0)(image, label)
    assert torch.equal(mirrored, picture.flip(-1)) and torch.equal(flipped, mask.flip(-1))
