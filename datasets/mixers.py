"""Mixers: from a source and a target batch to the views that the student sees.

    uda: {mixer: {name: mixers.ClassMix}}

A mixer is called with the record of the micro-batch (engine/step.py) and fills `step.views`. Once
the student has seen them and the last labeler has run, `after` adds labels and weights of the views
that it made; `step.labels["source"]` is the truth. What is drawn depends on the sample's number
alone, so it is the same on any number of processes.
"""

from contextlib import contextmanager
from typing import Annotated

import torch
from torch.nn.functional import avg_pool2d
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.base import drawing
from engine.errors import UserError
from engine.ranges import NonNegative, Share
from engine.statistics import pixel_hash
from engine.step import View

Color = Annotated[list[NonNegative], "[4, 4]"]


@contextmanager
def changing(image, seed, sample):
    """Within it the random changes of an image are those of its sample, and are made in its own
    precision.

    Under autocast the convolution of a blur would round the image to half precision.
    """
    with drawing(seed * 1_000_003 + sample), torch.autocast(image.device.type, enabled=False):
        yield


class Mixer:
    """The face of a mixer."""

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

    def __call__(self, step):
        step.views["source"] = View(step.source.image, "source")
        step.views["target"] = View(step.target.image, "target")


class ColorBlur:
    """Colour jitter and Gaussian blur of a batch, each image by its number: what makes strong views
    of an image that others (a teacher, an image tower) see as it is.

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
        self.color, self.blur = v2.ColorJitter(*color), v2.GaussianBlur(9, (0.15, 1.15))

    def __call__(self, images, numbers):
        """Images (B, 3, H, W) in [0, 1] and the number of each sample -> the changed images."""
        return torch.stack([self.change(image, number) for image, number in zip(images, numbers)])

    def change(self, image, sample):
        with changing(image, self.seed, sample):
            jitter, blur = torch.rand(2) < torch.tensor([self.color_p, self.blur_p])
            image = self.color(image) if jitter else image
            return self.blur(image) if blur else image


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
    Raises UserError, from `after`: nothing has labelled the target.
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
        self.augment = ColorBlur(seed=seed, color=color, color_p=color_p, blur_p=blur_p)

    def __call__(self, step):
        source, target = step.source, step.target
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
