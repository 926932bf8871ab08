"""The face of a backbone."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> maps [(B, C_i, h_i, w_i)], from fine to coarse. It
    normalises for itself.

    Attributes:
        channels, strides: one number per map.
        depths: blocks of each stage of a transformer that takes a `bias`:
            `forward(image, bias=None)` then calls `bias(stage, block, x, keys)` before every block
            (mit.MiT, vit.ViT).
        per_domain: it has a stem per domain: `forward(image, domain="target")` (resnet.ResNet).
        joint: channels of `dense`, which only towers of image and text have (clip.ViT,
            clip.ResNet); 0: none.
    """

    channels: list[int]
    strides: list[int]
    depths: list[int] = ()
    per_domain = False
    joint = 0

    def forward(self, image: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def dense(self, image: Tensor) -> Tensor:
        """Unit features (B, joint, h, w) in the joint space of images and texts."""
        raise NotImplementedError

    def stage_blocks(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage, counted from 1; with `depths`."""
        raise NotImplementedError
