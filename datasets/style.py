"""Style: source images that look like the target, made anew in every step from the pair of images
in the batch.

    uda: {style: {name: style.ColorStats}}      uda: {style: {name: style.FDA, beta: 0.01}}

    style(source (B, 3, H, W), target (B, 3, h, w)) -> (B, 3, H, W) in [0, 1]

The i-th source image takes the style of the i-th target image. Nothing is learned and nothing
drawn; labels stay true, since no pixel moves. Images translated by a network are files: `stylised`
of the data set (datasets/base.py).
"""

import math

import numpy as np
import torch
from torch.nn.functional import interpolate

from engine.ranges import NonNegative
from engine.statistics import precise

# Linear RGB of sRGB's primaries -> CIE XYZ, each row divided by its sum: white is (1, 1, 1).
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
XYZ /= XYZ.sum(1, keepdims=True)
# The cube roots of X, Y, Z -> (L + 16) / 100, a / 500, b / 200.
LAB = np.array([[0, 1.16, 0], [1, -1, 0], [0, 1, -1]])
DELTA = 6 / 29  # below the cube of it the cube root is replaced by its tangent
# Standard deviation of a channel that is constant but for rounding; that of 8 bits is larger.
FLAT = 1e-4


def mix_channels(matrix, image):
    """A matrix (3, 3) times the colours of images (B, 3, H, W); its numbers need not travel to a
    GPU."""
    channels = image.unbind(1)
    return torch.stack(
        [sum(f * channel for f, channel in zip(row, channels)) for row in matrix.tolist()], 1
    )


def rgb_to_lab(image):
    """sRGB in [0, 1], (B, 3, H, W), -> CIE Lab under D65 as (L + 16) / 100, a / 500, b / 200."""
    linear = torch.where(
        image > 0.04045, ((image + 0.055) / 1.055).clamp_min(0) ** 2.4, image / 12.92
    )
    xyz = mix_channels(XYZ, linear)
    roots = torch.where(xyz > DELTA**3, xyz.clamp_min(0) ** (1 / 3), xyz / (3 * DELTA**2) + 4 / 29)
    return mix_channels(LAB, roots)


def lab_to_rgb(lab):
    """The inverse of `rgb_to_lab`, also for colours outside of sRGB, whose values lie outside [0,
    1]."""
    roots = mix_channels(np.linalg.inv(LAB), lab)
    xyz = torch.where(roots > DELTA, roots**3, 3 * DELTA**2 * (roots - 4 / 29))
    linear = mix_channels(np.linalg.inv(XYZ), xyz)
    return torch.where(
        linear > 0.0031308, 1.055 * linear.clamp_min(0) ** (1 / 2.4) - 0.055, 12.92 * linear
    )


class Style:
    """The face of a style."""

    def __call__(self, source, target):
        """Source (B, 3, H, W) and target (B, 3, h, w) in [0, 1] -> the source in the target's
        style."""
        raise NotImplementedError


class ColorStats(Style):
    """Give each source image the mean and the standard deviation of its target image in every
    channel of Lab (Reinhard et al., Color transfer between images, IEEE CG&A 2001).

    The channels must be nearly decorrelated, or to match each by itself would tint the image. The
    paper uses the logarithmic l-alpha-beta space; CIE Lab serves the same purpose and, unlike a
    logarithm, is defined for black [R].
    """

    def __call__(self, source, target):
        with torch.autocast(source.device.type, enabled=False):
            matched = lab_to_rgb(
                self.match(rgb_to_lab(precise(source)), rgb_to_lab(precise(target)))
            )
            return matched.clamp(0, 1).to(source.dtype)

    def match(self, source, target):
        """Lab images -> the source with the target's statistics, before it is cut to the colours of
        sRGB."""
        (mean, deviation), (wanted_mean, wanted_deviation) = (
            (x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)) for x in (source, target)
        )
        flat = deviation < FLAT  # nothing but rounding errors would be magnified
        gain = torch.where(flat, 1.0, wanted_deviation / deviation.clamp_min(FLAT))
        return (source - mean) * gain + wanted_mean


class FDA(Style):
    """Give the low frequencies of each source image the amplitudes of its target image; phases,
    which carry the structure, stay (Yang and Soatto, FDA: Fourier domain adaptation for semantic
    segmentation, CVPR 2020).

    Replaced are the frequencies of at most b = floor(beta min(H, W)) cycles per image in both
    directions, a square as in the released code; the mask of the paper is a rectangle, beta H by
    beta W. Where b = 0 (beta < 1 / min(H, W)) the mean colour alone is replaced.

    Args:
        beta: 0 changes nothing; 1 replaces all amplitudes unless one side is more than twice the
            other. The paper uses 0.01, 0.05 and 0.09.
    """

    def __init__(self, *, beta: NonNegative = 0.01):
        self.beta = beta

    def __call__(self, source, target):
        if not self.beta:
            return source
        with torch.autocast(source.device.type, enabled=False):
            return self.transfer(precise(source), precise(target)).clamp(0, 1).to(source.dtype)

    def transfer(self, source, target):
        """Images -> the source with the target's low amplitudes, before it is cut to [0, 1]."""
        height, width = source.shape[-2:]
        if target.shape[-2:] != source.shape[-2:]:
            target = interpolate(target, (height, width), mode="bilinear", antialias=True)
        reach = math.floor(self.beta * min(height, width))
        spectrum, other = torch.fft.rfft2(source), torch.fft.rfft2(target)  # (B, 3, H, W // 2 + 1)
        rows = (
            torch.fft.fftfreq(height, 1 / height, device=source.device).abs() < reach + 0.5
        )  # cycles per image
        columns = torch.arange(width // 2 + 1, device=source.device) <= reach
        replaced = torch.polar(other.abs(), spectrum.angle())
        return torch.fft.irfft2(
            torch.where(rows[:, None] & columns, replaced, spectrum), s=(height, width)
        )
