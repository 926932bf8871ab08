"""Pictures: exact colours, ignored pixels, sizes, readable errors. How good they look is for the eye."""

import numpy as np
import pytest
import torch

from engine.pictures import (
    FONT,
    GAP,
    GREY,
    SMALLEST,
    WHITE,
    colorize,
    heatmap,
    legend,
    overlay,
    side_by_side,
    stack,
    strip,
)

PALETTE = np.array([[128, 128, 128], [128, 0, 0], [0, 128, 192]])
NAMES = ["Sky", "Building", "Bicyclist"]


def has(picture, color):
    return (picture == np.array(color)).all(axis=-1).any()


def random_picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_colorize_is_exact_and_ignored_ids_are_black():
    picture = colorize(np.array([[0, 1, 2], [255, -1, 3]]), PALETTE)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [PALETTE.tolist(), [[0, 0, 0]] * 3]
    many = np.full((171, 3), 9)  # more classes than an int8 can count
    assert colorize(np.array([[-1, 100]], np.int8), many).tolist() == [[[0] * 3, [9] * 3]]


def test_overlay_blends_classes_and_leaves_ignored_pixels_alone():
    image, labels = random_picture(6, 8), np.ones((6, 8), np.uint8)
    labels[:, 4:] = 255
    before = image.copy()
    picture = overlay(image, labels, PALETTE, alpha=0.25)
    assert np.array_equal(picture[:, 4:], image[:, 4:])
    assert np.array_equal(picture[:, :4], np.rint(0.25 * PALETTE[1] + 0.75 * image[:, :4]))
    assert np.array_equal(image, before)


def test_overlay_draws_a_border_between_classes_only():
    labels = np.repeat([[0, 0, 1, 1]], 3, axis=0)
    picture = overlay(np.zeros((3, 4, 3), np.uint8), labels, PALETTE, alpha=1.0)
    assert np.array_equal(picture[:, [0, 1, 3]], PALETTE[labels[:, [0, 1, 3]]])
    assert (picture[:, 2] > PALETTE[1]).all()


def test_strip_brings_panels_to_one_height_without_new_colours():
    small = colorize(np.array([[0, 1], [2, 0]]), PALETTE)
    picture = strip([("image", random_picture(40, 60)), ("prediction", small)])
    bar = picture.shape[0] - 40
    assert bar > 0 and picture.shape[1] > 60 + 40
    assert np.array_equal(picture[bar:, :60], random_picture(40, 60))
    assert {tuple(color) for color in picture[bar:, -40:].reshape(-1, 3)} == set(
        map(tuple, PALETTE)
    )
    assert strip([("image", random_picture(40, 60))], height=20).shape == (bar + 20, 30, 3)


def test_stack_pads_with_white():
    picture = stack([random_picture(5, 30), np.zeros((4, 10, 3), np.uint8)])
    assert picture.shape[1] == 30 and picture.shape[0] >= 9
    assert np.array_equal(picture[:5], random_picture(5, 30))
    assert (picture[-4:, :10] == 0).all() and (picture[-4:, 10:] == 255).all()


def test_legend_wraps_and_shows_every_colour():
    wide, narrow = legend(NAMES, PALETTE, 560), legend(NAMES, PALETTE, 110)
    assert wide.shape[1] == 560 and narrow.shape[1] == 110
    assert narrow.shape[0] == 3 * wide.shape[0]
    assert all(has(picture, color) for picture in (wide, narrow) for color in PALETTE)


def test_text_grows_with_the_picture():
    """TensorBoard shows wide and narrow pictures equally wide."""
    narrow, wide, widest = (
        strip([("image", np.zeros((100, width, 3), np.uint8))]).shape[0] - 100 - GAP
        for width in (560, 1120, 5000)
    )
    assert (narrow, wide, widest) == (FONT, 2 * FONT, 2 * FONT)
    assert legend(NAMES, PALETTE, 1120).shape[0] == 2 * FONT + GAP


def test_heatmap_shows_low_high_and_missing_values():
    def middle_of_cell(value, **options):
        one = heatmap([[value]], [""], [""], text=None, **options)
        other = heatmap([[0.5]], [""], [""], text=None, **options)
        changed = np.argwhere(
            (one != other).any(axis=-1)
        )  # the two pictures differ in their only cell
        return one[tuple(changed.min(axis=0))]

    assert middle_of_cell(1.0).mean() > middle_of_cell(0.0).mean() + 50
    assert np.array_equal(middle_of_cell(7.0), middle_of_cell(1.0))
    assert np.array_equal(middle_of_cell(np.nan), GREY)
    blue, red = (
        middle_of_cell(value, low=-1.0, diverging=True).astype(int) for value in (-1.0, 1.0)
    )
    assert blue[2] > blue[0] + 50 and red[0] > red[2] + 50


def test_heatmap_writes_numbers_where_they_fit():
    plain = heatmap(np.full((3, 3), np.nan), NAMES, NAMES, text=None)
    assert plain.dtype == np.uint8 and has(plain, GREY) and has(plain, WHITE)
    zeros = np.zeros((2, 3))
    assert (
        heatmap(zeros, NAMES[:2], NAMES).shape[1]
        < heatmap(zeros, NAMES[:2], NAMES, text="{:.6f}").shape[1]
    )


@pytest.mark.parametrize("rows, columns", [(171, 171), (1, 5), (11, 330)])
def test_heatmap_of_any_size_stays_a_sensible_picture(rows, columns):
    matrix = np.random.default_rng(0).random((rows, columns))
    names = [
        f"a rather long name of a class, number {i}, with its synonyms"
        for i in range(max(rows, columns))
    ]
    picture = heatmap(
        matrix,
        names[:rows],
        names[:columns],
        title="rows: truth, columns: prediction",
        text="{:.0%}",
    )
    assert max(picture.shape) < 1600


def test_maps_stand_beside_their_image_and_small_ones_are_enlarged():
    image = torch.zeros(3, 10, 12)
    labels, weights = torch.ones(10, 12, dtype=torch.long), torch.full((10, 12), 2.0)
    picture = side_by_side(image, PALETTE, labels=labels, weights=weights)
    assert picture.dtype == np.uint8 and picture.shape[0] >= SMALLEST
    third = picture.shape[1] // 3
    middle = [picture[-SMALLEST // 2, third // 2 + i * third] for i in range(3)]
    assert middle[0].tolist() == [0, 0, 0] and middle[2].tolist() == [255, 255, 255]  # 2 is clipped
    assert middle[1][0] > 0 and middle[1][1:].tolist() == [0, 0]
    assert side_by_side(image, PALETTE, labels=labels).shape[1] < picture.shape[1]
