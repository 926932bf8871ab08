"""Augmentation: geometry replayed on image, label and stored maps alike, colour on the image alone.

    data:
      augment: {name: transforms.Augment, crop: [256, 320], scale: [0.5, 2.0], flip: 0.5, color: [0.3, 0.3, 0.3, 0.05]}

The window is cut out of the original and then resized; resizing the whole image first costs five times as much.
"""

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORE = 255
FILL = [124, 116, 104]  # ImageNet's mean colour: padding is zero once the network has normalised it


def uniform(low, high):
    """One number from PyTorch's generator, which the data set has seeded for this sample."""
    return low + (high - low) * float(torch.rand(()))


class Augment:
    """Random scale and crop, mirror, colour jitter.

    Args:
        crop: [height, width] of the result in pixels.
        scale: [low, high]: the image is scaled by a uniform factor.
        flip: probability of mirroring.
        color: largest relative change of brightness, contrast and saturation, and largest shift of hue (0.5 = half
            circle); [] for none.
        blur: probability of a Gaussian blur with sigma between 0.15 and 1.15 pixels.
    """

    def __init__(self, *, crop: list, scale: list = (0.5, 2.0), flip: float = 0.5, color: list = (), blur: float = 0.0):
        if len(crop) != 2 or len(scale) != 2 or len(color) not in (0, 4):
            raise ValueError(f"crop and scale take two numbers and color four or none, not {crop}, {scale}, {color}")
        if min(crop) < 1 or min(scale) <= 0:
            raise ValueError(f"crop and scale must be positive, not {crop}, {scale}")
        self.crop, self.scale, self.flip, self.blur = list(crop), scale, flip, blur
        self.color = v2.ColorJitter(*color) if color else None
        self.gaussian = v2.GaussianBlur(5, (0.15, 1.15))

    def __call__(self, image, *maps):
        """Image (3, H, W) and maps (H, W) uint8 as tv_tensors -> the same at the size of the crop.

        The label and whatever else belongs to the pixels get one treatment: no value is made up where they are scaled,
        and padding is 255, which is `ignore` in labels; in stored weights it is the full weight, which counts for
        nothing where the label is ignored.
        """
        image, *maps = self.scale_and_crop(image, *maps)
        if uniform(0, 1) < self.flip:
            image, *maps = (F.horizontal_flip(values) for values in (image, *maps))
        if self.color is not None:
            image = self.color(image)
        if uniform(0, 1) < self.blur:
            image = self.gaussian(image)
        return image, *maps

    def scale_and_crop(self, image, *maps):
        """Choose a window of crop / scale pixels; where it is larger than the image, pad."""
        scale = uniform(*self.scale)
        size, window = image.shape[-2:], [max(1, round(side / scale)) for side in self.crop]
        # A window longer than the image may lie anywhere that covers it.
        start = [round(uniform(min(0, s - w), max(0, s - w))) for s, w in zip(size, window)]
        before = [max(0, -a) for a in start]
        after = [max(0, a + w - s) for a, w, s in zip(start, window, size)]
        if any(before + after):
            padding = [before[1], before[0], after[1], after[0]]  # left, top, right, bottom
            image, maps = F.pad(image, padding, fill=FILL), [F.pad(values, padding, fill=IGNORE) for values in maps]
        box = [a + b for a, b in zip(start, before)] + window  # top, left, height, width
        image, *maps = (F.crop(values, *box) for values in (image, *maps))
        if window != self.crop:
            image, maps = F.resize(image, self.crop, antialias=True), [self.resize_map(values) for values in maps]
        return image, *maps

    def resize_map(self, values):
        """(H, W) -> the size of the crop. v2 resizes masks by `nearest`, which shifts them by up to half a pixel."""
        exact = F.resize_image(values[None], self.crop, interpolation=v2.InterpolationMode.NEAREST_EXACT)
        return type(values)(exact[0])
