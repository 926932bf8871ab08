"""Mixers: from a source and a target batch to the views that the student sees.

    uda: {mixer: {name: mixers.ClassMix}}

A mixer is called with the record of the micro-batch (engine/step.py) and fills `step.views`. Once
the student has seen them and the last labeler has run, `after` adds labels and weights of the views
that it made; `step.labels["source"]` is the truth. What is drawn depends on the sample's number
alone, so it is the same on any number of processes.
"""

import itertools
from contextlib import contextmanager
from typing import Annotated

import torch
from torch.nn.functional import avg_pool2d, conv2d, pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.base import drawing
from engine.errors import UserError
from engine.ranges import NonNegative, Share
from engine.statistics import pixel_hash
from engine.step import View

Color = Annotated[list[NonNegative], "[4, 4]"]
BLUR = 9  # pixels


@contextmanager
def changing(image, seed, sample):
    """Within it the random changes of an image are those of its sample, and are made in its own
    precision.

    Under autocast the convolution of a blur would round the image to half precision.
    """
    with drawing(seed * 1_000_003 + sample), torch.autocast(image.device.type, enabled=False):
        yield


class Mixer:
    """The face of a mixer.

    Attributes:
        views: names of those that it makes.
    """

    views = ("source",)

    def __call__(self, step):
        """Fill `step.views`, and weights that need no labels."""
        raise NotImplementedError

    def after(self, step):
        """After the forward pass and the labelers: labels and weights of the views."""


class Source(Mixer):
    """The source alone: the lower bound of every comparison."""

    def __call__(self, step):
        step.views["source"] = View(step.source.image, "source")


class SourceTarget(Mixer):
    """Views "source" and "target", the images as they come."""

    views = ("source", "target")

    def __call__(self, step):
        step.views["source"] = View(step.source.image, "source")
        step.views["target"] = View(step.target.image, "target")


def blend(images, own, grey, mean):
    """Images (B, 3, H, W) times `own`, plus their grey times `grey`, plus its mean times `mean`;
    each factor (B, 1, 1, 1). Brightness, contrast and saturation are such sums."""
    shades = F.rgb_to_grayscale(images)
    average = shades.mean((1, 2, 3), keepdim=True)
    return (images * own).addcmul_(shades, grey).add_(average * mean).clamp_(0, 1)


def turn(images, shift):
    """Images (B, 3, H, W) in [0, 1] with their hue shifted by so much of the circle (B, 1, 1, 1).

    As `adjust_hue` of torchvision, in less than half of its operations.
    """
    top, place = images.max(1, keepdim=True)
    chroma = top - images.amin(1, keepdim=True)
    ahead = images.roll(-1, 1) - images.roll(1, 1)  # green - blue, blue - red, red - green
    smallest = torch.finfo(images.dtype).tiny
    hue = ahead.gather(1, place) / chroma.clamp_min(smallest) + (2 * place + 6 * shift)
    channels = torch.arange(-1, -6, -2, device=images.device).view(3, 1, 1)
    far = (hue + channels) % 6
    return top - chroma * torch.minimum(far, 4 - far).clamp_(0, 1)


def blur(images, sigma):
    """Images (B, 3, H, W), each with a Gaussian of its own sigma (B, 1, 1, 1) in pixels, over
    BLUR x BLUR pixels. As `gaussian_blur` of torchvision."""
    reach = (BLUR - 1) / 8**0.5
    places = torch.linspace(-reach, reach, BLUR, dtype=images.dtype, device=images.device)
    rows = (places / sigma).pow(2).neg().softmax(3)  # (B, 1, 1, BLUR)
    padded = pad(images, [BLUR // 2] * 4, "reflect")
    # Images in the place of channels, each of which has its kernel.
    return conv2d(padded.transpose(0, 1), rows.mT * rows, groups=len(images)).transpose(0, 1)


class ColorBlur:
    """Colour jitter and Gaussian blur of a batch, each image by its number: what makes strong views
    of an image that others (a teacher, an image tower) see as it is.

    The changes are those of torchvision's ColorJitter and GaussianBlur, for all images at once.

    Args:
        color: largest change of brightness, contrast, saturation, and shift of hue.
        color_p, blur_p: probability of jitter and of blur (sigma 0.15 to 1.15 pixels) for each
            image.
    """

    def __init__(
        self,
        *,
        seed=0,
        color: Color = (0.5, 0.5, 0.5, 0.3),
        color_p: Share = 0.8,
        blur_p: Share = 0.5,
    ):
        self.seed, self.color_p, self.blur_p = seed, color_p, blur_p
        jitter = v2.ColorJitter(*color)
        self.spans = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]

    def draw(self, sample):
        """How an image changes, by its number.

        Returns:
            factors of `blend` before the shift of hue, and after it: lists of (own, grey, mean);
            shift of hue, 0 for none; sigma of the blur, 0 for none.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sample)
        shares = torch.tensor([self.color_p, self.blur_p])
        jitters, blurs = (torch.rand(2, generator=generator) < shares).tolist()
        sides, factors = ([], []), [None] * 4
        order = torch.randperm(4, generator=generator).tolist() if jitters else []
        if jitters:
            count = 4 - self.spans.count(None)
            lots = iter(torch.rand(count, generator=generator).tolist())
            factors = [span and span[0] + (span[1] - span[0]) * next(lots) for span in self.spans]
        for place, kind in enumerate(order):
            if kind < 3 and (factor := factors[kind]) is not None:
                rows = (factor, 0, 0), (factor, 0, 1 - factor), (factor, 1 - factor, 0)
                sides[place > order.index(3)].append(rows[kind])
        sigma = 0.15 + torch.rand(1, generator=generator).item() if blurs else 0
        return *sides, factors[3] or 0, sigma

    def __call__(self, images, numbers):
        """Images (B, 3, H, W) in [0, 1] and the number of each sample -> the changed images."""
        before, after, shifts, sigmas = zip(*map(self.draw, numbers))
        first, second = (
            [*itertools.zip_longest(*side, fillvalue=(1, 0, 0))] for side in (before, after)
        )
        others = [(shift, sigma or 1, bool(sigma)) for shift, sigma in zip(shifts, sigmas)]
        # All numbers in one transfer: (rounds, B, 3).
        table = torch.tensor([*first, *second, others], dtype=images.dtype)
        table = table.to(images.device, non_blocking=True)[..., None, None, None]
        *blends, (shift, sigma, blurs) = zip(*(part.unbind() for part in table.unbind(2)))
        with torch.autocast(images.device.type, enabled=False):
            for factors in blends[: len(first)]:
                images = blend(images, *factors)
            if any(shifts):
                images = torch.where(shift != 0, turn(images, shift), images)
            for factors in blends[len(first) :]:
                images = blend(images, *factors)
            if any(sigmas):
                images = torch.where(blurs > 0, blur(images, sigma), images)
        return images.contiguous()


class ClassMix(Mixer):
    """Paste half of the classes of each source image onto the target image, then colour jitter and
    blur (Olsson et al., WACV 2021, between domains as in DACS; constants as in DAFormer).

    Views: "source" and "mixed". Pasted pixels have the true label and the weight of the source, 1
    where it has none; the others what the labelers gave them, before the forward pass or after it.

    Args:
        target: also the view "target", the image as it comes: BCL's contrast and label transfer
            need it, and ProDA's denoising.
        color: largest change of brightness, contrast, saturation, and shift of hue.
        color_p, blur_p: probability of jitter and of blur (sigma 0.15 to 1.15 pixels) for each
            image.
    Raises UserError: images of two sizes; from `after`: nothing has labelled the target.
    """

    def __init__(
        self,
        *,
        seed=0,
        target: bool = False,
        color: Color = (0.2, 0.2, 0.2, 0.2),
        color_p: Share = 0.8,
        blur_p: Share = 0.5,
    ):
        self.seed, self.target = seed, target
        self.views = ("source", "mixed", *["target"] * target)
        self.augment = ColorBlur(seed=seed, color=color, color_p=color_p, blur_p=blur_p)

    def __call__(self, step):
        source, target = step.source, step.target
        sizes = ["x".join(map(str, batch.image.shape[2:])) for batch in (source, target)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"mixers.ClassMix pastes the source, {sizes[0]}, onto the target, {sizes[1]}: "
                "data.augment and data.target_augment must make crops of one size"
            )
        self.pasted = self.choose(source.label, target.sample)  # (B, H, W)
        mixed = torch.where(self.pasted[:, None], source.image, target.image)
        mixed = self.augment(mixed, target.numbers)
        step.views["source"] = View(source.image, "source")
        step.views["mixed"] = View(mixed, "target")
        if self.target:
            step.views["target"] = View(target.image, "target")

    def after(self, step):
        if "target" not in step.labels:
            raise UserError(
                "mixers.ClassMix needs labels of the target: a labeler is needed, see uda.labelers"
            )
        truth, pseudo = step.source.label, step.labels["target"]
        step.labels["mixed"] = torch.where(self.pasted, truth, pseudo)
        ones = torch.ones_like(step.target.image[:, 0])
        of_source, of_target = (step.weights.get(name, ones) for name in ("source", "target"))
        step.weights["mixed"] = torch.where(self.pasted, of_source, of_target)

    def choose(self, label, samples, num_classes=256):
        """Pixels (B, H, W) of half of the classes, rounded up, that occur in each label
        (B, H, W)."""
        ids = label.flatten(1)  # (B, N)
        present = torch.zeros(len(ids), num_classes, dtype=torch.bool, device=ids.device)
        present = present.scatter_(1, ids, True)
        present[:, 255] = False
        lots = pixel_hash(self.seed, samples, num_classes).masked_fill(~present, 2**33)
        place = lots.argsort(1).argsort(1)  # (B, K): absent classes come last
        chosen = present & (place < (present.sum(1, keepdim=True) + 1) // 2)
        return chosen.gather(1, ids).view_as(label)


def sharpness(image, factor):
    """Blend of an image (3, H, W) with its smoothed version, whose share is 1 - factor; the border
    stays.

    As `adjust_sharpness` of torchvision, which sends its kernel to the GPU at every call and waits
    for it.
    """
    inside = image[..., 1:-1, 1:-1]
    smooth = (
        9 * avg_pool2d(image, 3, stride=1) + 4 * inside
    ) / 13  # the middle of the 3 x 3 kernel counts five times
    changed = image.clone()
    changed[..., 1:-1, 1:-1] = torch.lerp(smooth, inside, factor)
    return changed


# name: function (image (3, H, W) in [0, 1], magnitude in 0..1) -> image. The ranges are those of
# FixMatch's RandAugment (Sohn et al., NeurIPS 2020, table of transformations), from general
# knowledge [R].
OPERATIONS = {
    "autocontrast": lambda image, magnitude: F.autocontrast(image),
    "brightness": lambda image, magnitude: F.adjust_brightness(image, 0.05 + 0.9 * magnitude),
    "colour": lambda image, magnitude: F.adjust_saturation(image, 0.05 + 0.9 * magnitude),
    "contrast": lambda image, magnitude: F.adjust_contrast(image, 0.05 + 0.9 * magnitude),
    "equalise": lambda image, magnitude: F.equalize(image),  # on 256 levels
    "identity": lambda image, magnitude: image,
    "posterise": lambda image, magnitude: F.posterize(image, 4 + int(4 * magnitude)),
    "sharpness": lambda image, magnitude: sharpness(image, 0.05 + 0.9 * magnitude),
    "solarise": lambda image, magnitude: F.solarize(image, 1 - magnitude),
}


class Strong(Mixer):
    """A strongly changed copy of the target image with the same geometry, for consistency with a
    teacher that sees the plain one (BiSMAP, Lu et al., ACM MM 2022, after ProDA; constants as in
    the released code).

    Views: "source", "target", and "strong": operations drawn from OPERATIONS, each applied with
    probability `p` and a magnitude of 1 to 9 tenths, then a square that is set to 0, black:
    weights["strong"] is 0 in it and 1 outside. There are no labels of "strong"; those of the target
    fit it.

    Args:
        operations: how many are drawn for an image, with replacement.
        p: probability that a drawn operation is applied.
        cutout: side of the square as a share of the width of the image; it lies inside the image.
    """

    views = ("source", "target", "strong")

    def __init__(
        self,
        *,
        seed=0,
        operations: Annotated[int, "[0, 100]"] = 2,
        p: Share = 0.5,
        cutout: Share = 0.2,
    ):
        self.seed, self.operations, self.p, self.cutout = seed, operations, p, cutout

    def __call__(self, step):
        target = step.target
        changed = [self.augment(*pair) for pair in zip(target.image, target.numbers)]
        strong, kept = (torch.stack(part) for part in zip(*changed))
        step.views["source"] = View(step.source.image, "source")
        step.views["target"] = View(target.image, "target")
        step.views["strong"] = View(strong, "target")
        step.weights["strong"] = kept

    def augment(self, image, sample):
        """Image (3, H, W) and its number -> the changed image, and (H, W): 1, and 0 in the
        square."""
        kept, (height, width) = torch.ones_like(image[0]), image.shape[-2:]
        with changing(image, self.seed, sample):
            for _ in range(self.operations):
                chosen, tenths = (
                    int(torch.randint(len(OPERATIONS), ())),
                    int(torch.randint(1, 10, ())),
                )
                if torch.rand(()) < self.p:
                    image = list(OPERATIONS.values())[chosen](image, tenths / 10)
            side = min(round(self.cutout * width), height)
            top, left = (int(torch.randint(length - side + 1, ())) for length in (height, width))
        kept[top : top + side, left : left + side] = 0
        return image * kept, kept
