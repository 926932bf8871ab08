"""Augmentation: geometry replayed on image and label alike, colour on the image alone.

    data.augment: {name: transforms.Augment, crop: [256, 320], scale: [0.5, 2.0], flip: 0.5, color: [0.3, 0.3, 0.3,
    0.05]}

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
        circle);
            [] for none.
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

    def __call__(self, image, label):
        """Image (3, H, W) and label (H, W) as tv_tensors -> the same at the size of the crop."""
        image, label = self.scale_and_crop(image, label)
        if uniform(0, 1) < self.flip:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        if self.color is not None:
            image = self.color(image)
        if uniform(0, 1) < self.blur:
            image = self.gaussian(image)
        return image, label

    def scale_and_crop(self, image, label):
        """Choose a window of crop / scale pixels; where it is larger than the image, pad (label: ignore)."""
        scale = uniform(*self.scale)
        size, window = label.shape[-2:], [max(1, round(side / scale)) for side in self.crop]
        # A window longer than the image may lie anywhere that covers it.
        start = [round(uniform(min(0, s - w), max(0, s - w))) for s, w in zip(size, window)]
        before = [max(0, -a) for a in start]
        after = [max(0, a + w - s) for a, w, s in zip(start, window, size)]
        if any(before + after):
            padding = [before[1], before[0], after[1], after[0]]  # left, top, right, bottom
            image, label = F.pad(image, padding, fill=FILL), F.pad(label, padding, fill=IGNORE)
        box = [a + b for a, b in zip(start, before)] + window  # top, left, height, width
        image, label = F.crop(image, *box), F.crop(label, *box)
        if window != self.crop:
            image = F.resize(image, self.crop, antialias=True)
            # v2 resizes masks by `nearest`, which shifts them by up to half a pixel; `nearest-exact` does not.
            exact = F.resize_image(label[None], self.crop, interpolation=v2.InterpolationMode.NEAREST_EXACT)
            label = type(label)(exact[0])
        return image, label
