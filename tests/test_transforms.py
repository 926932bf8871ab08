"""Augmentation: image, label and maps keep telling the same story, sizes are exact, padding is marked."""

import pytest
import torch
from torchvision import tv_tensors

from datasets.transforms import FILL, Augment

COLORS = torch.tensor([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=torch.uint8)


def blocks(height, width, side=24):
    """Image (3, H, W) of coloured squares and label (H, W): the colour of a pixel is COLORS[its label]."""
    rows, columns = torch.meshgrid(torch.arange(height) // side, torch.arange(width) // side, indexing="ij")
    label = ((rows * 5 + columns * 3 + rows * columns) % 4).to(torch.uint8)
    return tv_tensors.Image(COLORS[label.long()].permute(2, 0, 1)), tv_tensors.Mask(label)


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 200, (height, width), generator=generator, dtype=torch.uint8)
    image = torch.stack([label, 200 - label, label // 2])  # each pixel of the image names its label
    return tv_tensors.Image(image), tv_tensors.Mask(label)


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
        image, label = torch.zeros(3, 30, 30, dtype=torch.uint8), torch.zeros(30, 30, dtype=torch.uint8)
        image[..., edge:], label[:, edge:] = 250, 1
        augment = Augment(crop=crop, scale=[scale, scale], flip=0.0)
        resized, ids = augment(tv_tensors.Image(image), tv_tensors.Mask(label))
        assert torch.equal(resized[0] > 125, ids == 1), edge


@pytest.mark.parametrize("size", [(20, 30), (20, 300), (300, 20), (64, 48), (150, 170), (1, 1)])
@pytest.mark.parametrize("scale", [[0.5, 0.5], [1.0, 1.0], [2.3, 2.3], [0.5, 2.0]])
def test_result_has_the_size_of_the_crop_whatever_the_image(size, scale):
    torch.manual_seed(0)
    image, label = Augment(crop=[64, 48], scale=scale, color=[0.3, 0.3, 0.3, 0.05], blur=1.0)(*blocks(*size))
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
        candidates = (label.unfold(0, 16, 1).unfold(1, 24, 1) == ids).all(-1).all(-1).nonzero().tolist()
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
    other = tv_tensors.Mask(200 - label)
    augment = Augment(crop=[33, 47], scale=[0.4, 2.5], color=[0.3, 0.3, 0.3, 0.05], blur=0.5)
    torch.manual_seed(seed)
    alone = augment(image, label)
    torch.manual_seed(seed)
    drawn = augment(image, label, other, label)
    assert len(drawn) == 4 and torch.equal(drawn[0], alone[0])
    assert torch.equal(drawn[1], alone[1]) and torch.equal(drawn[3], alone[1])
    padding = drawn[1] == 255
    assert (drawn[2][padding] == 255).all() and torch.equal(drawn[2][~padding], 200 - drawn[1][~padding])
    torch.manual_seed(seed)
    (bare,) = augment(image)
    assert torch.equal(bare, alone[0])


def test_colour_and_blur_leave_the_label_alone():
    image, label = noise(16, 24)
    changed, ids = Augment(crop=[16, 24], scale=[1, 1], flip=0.0, color=[0.5, 0.5, 0.5, 0.1], blur=1.0)(image, label)
    assert torch.equal(ids, label) and not torch.equal(changed, image)


@pytest.mark.parametrize(
    "options",
    [
        {"crop": [64]},
        {"crop": [0, 64]},
        {"crop": [64, 64], "scale": [1.0]},
        {"crop": [64, 64], "scale": [0.0, 1.0]},
        {"crop": [64, 64], "color": [0.3, 0.3]},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=r"crop and scale .* not \["):
        Augment(**options)
