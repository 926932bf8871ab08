"""The face of a backbone."""

import re

from torch import Tensor, nn

from engine.errors import UserError
from engine.weights import same_names, without

# Where the number of a layer stands in the names of our networks, CLIP's and timm's.
LAYER = re.compile(r"(?:^|\.)(?:(?:res)?blocks?|layers?|stages?|features|patch_embed)[._]?(\d+)")
TOP = re.compile(r"^(?:net\.|visual\.)?(?:norm\d*|ln_post|attnpool|proj)(?:\.|$)")


class Backbone(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> maps [(B, C_i, h_i, w_i)], from fine to coarse. It
    normalises for itself.

    Attributes:
        channels, strides: one number per map.
        depths: blocks of each stage of a transformer that takes a `bias`:
            `forward(image, bias=None)` then calls `bias(stage, block, x, keys)` before every block
            (mit.MiT, vit.ViT).
        reductions: of each such stage, how many tokens a key has along each side.
        joins: no image of a batch changes the maps of another, so all views of a step may go
            through it as one batch. Batch norm forbids it.
        any_size: an export may be for pictures of any size (export.py).
        per_domain: it has a stem per domain: `forward(image, domain="target")` (resnet.ResNet).
        joint: channels of `dense`, which towers of `train_dg.py` have: of image and text (clip.ViT,
            clip.ResNet), or of images alone (vit.ViT); 0: none.
        foreign: how weights of others get its names, what of them is not wanted, what they may
            lack: `adapt`, `drop` and `allow_missing` of engine.weights.load_pretrained.
    """

    channels: list[int]
    strides: list[int]
    depths: list[int] = ()
    reductions: list[int] = ()
    joins = False
    any_size = True
    per_domain = False
    joint = 0
    foreign = same_names, (), ()

    def forward(self, image: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def dense(self, image: Tensor) -> Tensor:
        """Unit features (B, joint, h, w), of clip.* in the joint space of images and texts."""
        raise NotImplementedError

    def stage_blocks(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage, counted from 1; with `depths`."""
        raise NotImplementedError

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of such a network from another program, with the names of this one."""
        adapt, drop, _ = self.foreign
        return without(adapt(state, self), drop)

    def layers_above(self, names: list[str]) -> dict[str, int]:
        """{parameter: layers between it and the head}, for `optimizer.layer_decay`.

        Here a layer is a block of a plain vision transformer or of MobileNet, and a stage of the
        others (of Swin, the merging of patches too). Norms of the maps have none above them, the
        embedding or stem has all. BEiT and DINOv2 count the blocks so.

        Raises:
            UserError: names without numbers of layers.
        """
        found = {name: LAYER.search(name) for name in names if not TOP.search(name)}
        layers = sorted({int(match[1]) for match in found.values() if match})
        if names and not layers:
            raise UserError(
                f"optimizer.layer_decay: the layers of this {type(self).__name__} are not known by "
                "their names; set optimizer.layer_decay=1"
            )
        place = {name: layers.index(int(m[1])) if m else -1 for name, m in found.items()}
        return {name: len(layers) - place.get(name, len(layers)) for name in names}
