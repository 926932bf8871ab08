"""Augmentation: geometry replayed on image, label and stored maps alike, colour on the image alone.

    data:
      augment:
        name: transforms.Augment
        crop: [256, 320]
        scale: [0.5, 2.0]
        color: [0.3, 0.3, 0.3, 0.05]

The window is cut out of the original and then resized; resizing the whole image first costs five
times as much.

What ADE20K, COCO-Stuff and VOC are trained with, as MMSegmentation does it:

    augment:
      name: transforms.Augment
      crop: [512, 512]
      short_side: 512
      cat_max_ratio: 0.75
      photometric: true
"""

from typing import Annotated

import cv2
import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from engine.ranges import NonNegative, OptionalWidth, Share, Size

IGNORE = 255
FILL = [124, 116, 104]  # ImageNet's mean colour: padding is zero once the network has normalised it
Scale = Annotated[float, "[0.01, 100]"]
TRIES = 10  # crops that are drawn anew for `cat_max_ratio`
GREY = np.array([0.2989, 0.587, 0.114])  # torchvision's weights of the channels
BRIGHTNESS, FACTORS, HUE = 32 / 255, (0.5, 1.5), 36.0  # of `photometric`; hue in degrees


def uniform(low, high):
    """One number from PyTorch's generator, which the data set has seeded for this sample."""
    return low + (high - low) * float(torch.rand(()))


def distort(pixels):
    """Photometric distortion of SSD (Liu et al., ECCV 2016), in the strength that is usual in
    segmentation.

    Each with probability one half, one after the other, the result of each cut to the range:
    brightness shifted by up to 32 of 255, contrast and saturation multiplied by 0.5 to 1.5, hue
    turned by up to 36 degrees; contrast as the second or as the last. [R] from general knowledge:
    hue is 18 in SSD's degrees, and 18 in MMSegmentation's, which are those of OpenCV's 8 bits, of
    two degrees each; the models compared with here were trained with the latter.

    Args:
        pixels: (H, W, 3) uint8.
    Returns:
        The same.
    """
    bright, contrast, saturation, hue, late = (torch.rand(5) < 0.5).tolist()
    shift, factor = uniform(-BRIGHTNESS, BRIGHTNESS), uniform(*FACTORS)
    color_factor, turn = uniform(*FACTORS), uniform(-HUE, HUE)
    x = pixels.astype(np.float32) / 255
    if bright:
        x = (x + np.float32(shift)).clip(0, 1)
    if contrast and not late:
        x = (x * np.float32(factor)).clip(0, 1)
    if saturation or hue:
        h, s, v = cv2.split(cv2.cvtColor(x, cv2.COLOR_RGB2HSV))  # 0..360, 0..1, 0..1
        s = (s * np.float32(color_factor)).clip(0, 1) if saturation else s
        h = (h + np.float32(turn)) % 360 if hue else h
        x = cv2.cvtColor(cv2.merge([h, s, v]), cv2.COLOR_HSV2RGB)
    if contrast and late:
        x = (x * np.float32(factor)).clip(0, 1)
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def jitter(pixels, order, brightness, contrast, saturation, hue):
    """v2.ColorJitter, rounded and cut to the range before and after hue alone, where it rounds down
    after each of its four changes: those between are one matrix, in a fraction of the time.

    Args:
        pixels: (H, W, 3) uint8.
        order: 0 to 3 in the order of the changes: brightness, contrast, saturation, hue.
        brightness, contrast, saturation: factors.
        hue: in turns; None for a change that is not made.
    Returns:
        The same.
    """
    matrix, mean = np.eye(3, 4), np.array(cv2.mean(pixels)[:3])
    for change in order:
        step, offset = np.eye(3), 0.0
        if change == 0 and brightness is not None:
            step *= brightness
        elif change == 1 and contrast is not None:
            step *= contrast
            offset = (1 - contrast) * (GREY @ (matrix[:, :3] @ mean + matrix[:, 3]))
        elif change == 2 and saturation is not None:
            step = saturation * step + (1 - saturation) * GREY
        elif change == 3 and hue is not None:
            hsv = cv2.cvtColor(np.float32(cv2.transform(pixels, matrix)), cv2.COLOR_RGB2HSV)
            hsv[..., 0] += 360 * hue  # OpenCV takes any angle
            pixels = cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
            matrix, mean = np.eye(3, 4), np.array(cv2.mean(pixels)[:3])
        matrix = step @ matrix
        matrix[:, 3] += offset
    return cv2.transform(pixels, matrix)


def cut(values, start, window, fill):
    """A window of values (H, W, ...), which may reach beyond them: there is `fill`."""
    ends = [a + w for a, w in zip(start, window)]
    before = [max(0, -a) for a in start]
    after = [max(0, end - side) for end, side in zip(ends, values.shape)]
    inner = values[max(0, start[0]) : ends[0], max(0, start[1]) : ends[1]]
    if not any(before + after):
        return inner
    borders = before[0], after[0], before[1], after[1]
    return cv2.copyMakeBorder(inner, *borders, cv2.BORDER_CONSTANT, value=fill)


def resize(pixels, size):
    """(H, W, 3) uint8 -> `size`, smoothed where it shrinks: PyTorch's kernel is quick where
    channels lie side by side, as here."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return F.resize_image(image, size, antialias=True).permute(1, 2, 0).numpy()


def resize_map(values, size):
    """(H, W) uint8 -> `size`. Plain `nearest` would shift it by half a pixel."""
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def mirrored(parts):
    return (cv2.flip(values, 1) for values in parts)


class Augment:
    """Random scale and crop, mirror, colour jitter.

    Args:
        crop: [height, width] of the result in pixels.
        scale: [low, high]: the image is scaled by a uniform factor.
        short_side: the factor is relative to the image with its short side at this many pixels, as
            `eval.short_side`; 0: to the image as it is.
        cat_max_ratio: largest share of one class in the labelled pixels of a crop; where a class
            has more, or no pixel is labelled, the crop is drawn again at the same scale, at most
            ten times. 1: off. An image without labels is cropped once.
        flip: probability of mirroring.
        color: largest relative change of brightness, contrast and saturation, and largest shift of
            hue (0.5 = half circle); [] for none.
        photometric: `distort` in place of `color`.
    Attributes:
        repeats: a picture has a few versions that come again and again, which model.cache needs.
    """

    repeats = False

    def __init__(
        self,
        *,
        crop: Size,
        scale: Annotated[list[Scale], "[2, 2]"] = (0.5, 2.0),
        short_side: OptionalWidth = 0,
        cat_max_ratio: Annotated[float, "(0, 1]"] = 1.0,
        flip: Share = 0.5,
        color: Annotated[list[NonNegative], "[4, 4]"] | Annotated[list, "[0, 0]"] = (),
        photometric: bool = False,
    ):
        if scale[0] > scale[1]:
            raise ValueError(f"scale must be [low, high], not {scale}")
        if photometric and color:
            raise ValueError(
                f"photometric and color both change colours: choose one, not {photometric} and "
                f"{color}"
            )
        self.crop, self.scale, self.flip = list(crop), scale, flip
        self.short_side, self.cat_max_ratio, self.photometric = (
            short_side,
            cat_max_ratio,
            photometric,
        )
        self.color = v2.ColorJitter(*color) if color else None

    def __call__(self, image, *maps):
        """Image (H, W, 3) and maps (H, W), arrays of uint8 -> the same at the size of the crop.

        The label and whatever else belongs to the pixels get one treatment: no value is made up
        where they are scaled, and padding is 255, which is `ignore` in labels; in stored weights it
        is the full weight, which counts for nothing where the label is ignored.
        """
        image, *maps = self.scale_and_crop(image, *maps)
        if uniform(0, 1) < self.flip:
            image, *maps = mirrored([image, *maps])
        if self.color is not None:
            drawn = self.color.make_params([])
            names = ("brightness", "contrast", "saturation", "hue")
            image = jitter(image, drawn["fn_idx"], *(drawn[f"{name}_factor"] for name in names))
        if self.photometric:
            image = distort(image)
        return image, *maps

    def scale_and_crop(self, image, *maps):
        """Choose a window of crop / scale pixels; where it is larger than the image, pad."""
        scale, size = uniform(*self.scale), image.shape[:2]
        if self.short_side:
            scale *= self.short_side / min(size)
        window = [max(1, round(side / scale)) for side in self.crop]
        start = self.place(size, window)
        if self.cat_max_ratio < 1 and maps and (maps[0] != IGNORE).any():
            for _ in range(TRIES):
                if self.varied(maps[0], start, window):
                    break
                start = self.place(size, window)
        image, maps = cut(image, start, window, FILL), [cut(m, start, window, IGNORE) for m in maps]
        if window != self.crop:
            image, maps = resize(image, self.crop), [resize_map(m, self.crop) for m in maps]
        return image, *maps

    def place(self, size, window):
        """Draw the top left corner of a window; one that is longer than the image may lie anywhere
        that covers it."""
        return [round(uniform(min(0, s - w), max(0, s - w))) for s, w in zip(size, window)]

    def varied(self, label, start, window):
        """Whether a window of the label (H, W) holds labelled pixels, and no class more than its
        share of them."""
        rows, columns = (slice(max(0, a), a + w) for a, w in zip(start, window))
        counts = np.bincount(label[rows, columns].ravel(), minlength=IGNORE + 1)[:IGNORE]
        return bool(0 < counts.max() <= self.cat_max_ratio * counts.sum())


class Whole(Augment):
    """The whole picture at one size: one version of it, or two with its mirror image.

    It is what maps that are computed once per picture (model.cache) are trained on.

    Args:
        size: [height, width] of the result in pixels. The picture is scaled to fit in; what is left
            on the right or at the bottom is filled, and 255 in labels.
        flip: probability of mirroring.
    """

    repeats = True

    def __init__(self, *, size: Size, flip: Share = 0.5):
        self.size, self.flip = list(size), flip

    def __call__(self, image, *maps):
        """As Augment."""
        scale = min(new / old for new, old in zip(self.size, image.shape[:2]))
        inner = [max(1, round(side * scale)) for side in image.shape[:2]]
        image = cut(resize(image, inner), (0, 0), self.size, FILL)
        maps = [cut(resize_map(values, inner), (0, 0), self.size, IGNORE) for values in maps]
        if uniform(0, 1) < self.flip:
            image, *maps = mirrored([image, *maps])
        return image, *maps
