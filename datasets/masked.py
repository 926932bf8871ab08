"""Masked image consistency: the student sees the target with most of its patches hidden and must
say what the labelers say of the whole (MIC, Hoyer et al., CVPR 2023).

    uda: {mixer: {name: masked.Masked, block: 32, mixer: {name: mixers.ClassMix}}}
    losses: [..., {name: cross_entropy.CrossEntropy, view: masked}]
"""

from typing import Annotated

import torch

from datasets.mixers import Color, ColorBlur, Mixer
from engine.build import build
from engine.errors import UserError
from engine.ranges import Share
from engine.statistics import pixel_hash
from engine.step import View


class Masked(Mixer):
    """The views of another mixer, and "masked": the target image, changed in colour and blurred,
    square patches of it replaced by its mean colour. Its labels and weights are those of the
    target, of the hidden pixels too.

    Blocks, ratio, colours and blur are those of MIC's released configurations for crops of 512x512;
    there a hidden pixel has the mean colour of ImageNet. Which patches are hidden depends on the
    sample's number alone.

    Args:
        mixer: the other one, which goes with the labelers that the configuration has.
        block: side of a patch in pixels; an eighth of the crop in MIC.
        ratio: share of the patches that are hidden, on average.
        color, color_p, blur_p: as in ColorBlur.
    Raises UserError, from `after`: nothing has labelled the target.
    """

    def __init__(
        self,
        *,
        mixer: dict,
        seed=0,
        block: Annotated[int, "[1, 4096]"] = 64,
        ratio: Share = 0.7,
        color: Color = (0.2, 0.2, 0.2, 0.2),
        color_p: Share = 0.8,
        blur_p: Share = 0.5,
    ):
        self.mixer = build("datasets", mixer, "Mixer", seed=seed)
        self.views = (*self.mixer.views, "masked")
        # One number further than the other mixer, whose pictures have colours of their own.
        self.seed, self.block, self.ratio = seed + 1, block, ratio
        self.augment = ColorBlur(seed=self.seed, color=color, color_p=color_p, blur_p=blur_p)

    def __call__(self, step):
        self.mixer(step)
        target = step.target
        image = self.augment(target.image, target.numbers)
        hidden = self.hidden(target.sample, image.shape[-2:])[:, None]
        image = torch.where(hidden, image.mean((2, 3), keepdim=True), image)
        step.views["masked"] = View(image, "target")

    def after(self, step):
        self.mixer.after(step)
        if "target" not in step.labels:
            raise UserError(
                "masked.Masked needs labels of the target: a labeler is needed, see uda.labelers"
            )
        step.labels["masked"] = step.labels["target"]
        if "target" in step.weights:
            step.weights["masked"] = step.weights["target"]

    def hidden(self, samples, size):
        """Pixels (B, H, W) of the hidden patches, for the numbers (B) of the samples."""
        rows, columns = (-(-length // self.block) for length in size)
        lots = pixel_hash(self.seed, samples, rows * columns).view(-1, rows, columns)
        blocks = lots < self.ratio * 2**32
        blocks = blocks.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        return blocks[:, : size[0], : size[1]]
