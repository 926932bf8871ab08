"""CLIP's image towers (Radford et al., ICML 2021), ResNets and vision transformers, as open_clip
builds them.

    model.backbone: {name: clip.ResNet, model: RN50, output_stride: 16, weights: openai}
    model.backbone: {name: clip.ViT, model: ViT-B-16-quickgelu, weights: openai}
    dg.tower: {name: clip.ViT, model: ViT-B-16-quickgelu, weights: openai}    # frozen, for `dense`

`dense` features lie in the joint space of images and texts: the last attention without attending,
so that every cell keeps its own value (MaskCLIP, Zhou et al., ECCV 2022). models/prototypes/text.py
does the text side.

`weights` is a tag of open_clip, downloaded once, a path of a state dict or safetensors file (a
whole CLIP or its image tower), or "none". A transformer's activation is part of the model's name:
weights of OpenAI, MetaCLIP and DFN need one that ends in -quickgelu. A tag or a file of OpenAI that
needs another name is an error; other files do not say it.
"""

import difflib
import logging
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError
from engine.ranges import Natural
from engine.statistics import unit
from engine.weights import WeightsError, check_hub, load_into, read, reason, unwrap
from models.backbones.base import Backbone
from models.blocks import Normalize, exporting, run

logger = logging.getLogger("engine")

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI = {
    "input_resolution",
    "context_length",
    "vocab_size",
}  # numbers that only OpenAI's files hold


def library():
    try:
        import open_clip.pretrained
    except ImportError as error:
        raise UserError(
            f"CLIP needs the package open_clip: pip install open_clip_torch ({error})"
        ) from None
    return open_clip


def build_trunk(model, wanted):
    """open_clip's image tower with random weights, D of the joint space, and the activation of a
    transformer."""
    open_clip = library()
    config = open_clip.get_model_config(model)
    if config is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
        raise ValueError(
            f"open_clip has no model '{model}'; did you mean {' or '.join(near) or 'RN50'}?"
        )
    vision, quick = config["vision_cfg"], config.get("quick_gelu", False)
    kind = "ViT" if isinstance(vision.get("layers", 12), int) else "ResNet"
    if vision.get("timm_model_name") or vision.get("attentional_pool") or kind != wanted:
        raise ValueError(
            f"{model} is not a plain clip.{wanted}; there are clip.ResNet, clip.ViT and timm.Timm"
        )
    trunk = open_clip.model._build_vision_tower(config["embed_dim"], vision, quick)
    return trunk, config["embed_dim"], "QuickGELU" if quick else "GELU"


def load(tower, weights, model, activation=None, drop=()):
    """The option `weights`, into `tower.visual`. `activation`: the tower's, None where it makes no
    difference."""
    if weights == "none":
        return
    pretrained, path = library().pretrained, weights
    if tag := pretrained.get_pretrained_cfg(model, weights):
        if tuple(tag["mean"]) != MEAN:
            raise WeightsError(
                f"{weights} of {model} needs images of mean {tag['mean']}, not CLIP's {MEAN}"
            )
        check_hub()
        try:
            path = pretrained.download_pretrained(tag)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"could not download {weights} ({reason(error)}); give a copy by weights=PATH"
            ) from None
    elif not Path(path).is_file():
        tags = ", ".join(pretrained.list_pretrained_tags_by_model(model))
        raise WeightsError(
            f"there is no file {path}, and the weights that open_clip has of {model} are: {tags}"
        )
    state = unwrap(read(path), path)
    trained = (
        "QuickGELU" if tag.get("quick_gelu") or OPENAI & state.keys() else "GELU" if tag else None
    )
    if activation and not trained:
        logger.info(
            f"{weights} does not say if it was trained with GELU or QuickGELU; {model} has "
            f"{activation}"
        )
    elif activation and trained != activation:
        needed = model.removesuffix("-quickgelu") + "-quickgelu" * (trained == "QuickGELU")
        raise WeightsError(
            f"{weights} was trained with {trained}, and {model} has {activation}: take model: "
            f"{needed}"
        )
    whole = any(key.startswith("visual.") for key in state)
    state = {
        key if whole else f"visual.{key}": value
        for key, value in state.items()
        if key not in OPENAI
    }
    load_into(
        tower,
        {k: v for k, v in state.items() if k.startswith("visual.")},
        source=weights,
        drop=drop,
    )


def whole_patches(image, patch):
    """Images enlarged, by less than a patch, to whole patches: every cell is then the same share of
    the image."""
    size = [-(-n // patch) * patch for n in image.shape[-2:]]
    # An export is for any size: there nothing is asked of it.
    return (
        image
        if not exporting() and size == [*image.shape[-2:]]
        else F.interpolate(image, size, mode="bilinear", align_corners=False)
    )


def blocks_tapped(taps, depth, model):
    """The option `taps`, or after a third, a half, two thirds and all of the blocks."""
    chosen = list(taps) or sorted({max(depth * n // 6, 1) - 1 for n in (2, 3, 4, 6)})
    if chosen != sorted({*chosen} & {*range(depth)}):
        raise ValueError(
            f"taps must ascend, from 0 to {depth - 1} at most in {model}, not {chosen}"
        )
    return chosen


def positions_at(table, native, grid):
    """A table of positions (1, 1 + N, C), that of the class token and those of a grid `native`, row
    by row -> of a grid (h, w), (1, 1 + h w, C)."""
    if grid == native:
        return table
    rows = table[:, 1:].mT.unflatten(2, native)  # (1, C, h, w)
    rows = F.interpolate(rows, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :1], rows.flatten(2).mT], 1)


class ResNet(Backbone):
    """Maps of stages 1 to 4, at strides 4, 8, 16, 32 or as far as `output_stride` allows.

    Args:
        model: RN50, RN101, RN50x4 ...
        output_stride: 16 or 32. CLIP's ResNets halve a map by 2x2 means. At 16 layer4 takes these
            means at every cell and dilates its later convolutions: every second cell is the map of
            stride 32, exactly.

    `joint` is D of `dense`. Of the attention pool only what dense needs is kept, and not trained.
    """

    def __init__(
        self, *, model: str = "RN50", output_stride: Literal[16, 32] = 32, weights: str = "openai"
    ):
        super().__init__()
        self.normalize = Normalize(MEAN, STD)
        self.visual, self.joint, _ = build_trunk(model, "ResNet")
        self.strides = [4, 8, 16, output_stride]
        self.channels = [self.visual.layer1[-1].conv3.out_channels * 2**i for i in range(4)]
        for module in self.visual.modules():
            if isinstance(module, nn.AvgPool2d):
                module.ceil_mode = True  # any size; nothing changes for multiples of 32
        if output_stride == 16:
            first, *later = self.visual.layer4
            first.avgpool = nn.Sequential(
                nn.ReplicationPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, stride=1)
            )
            first.downsample[0] = first.avgpool
            for block in later:
                block.conv2.dilation = block.conv2.padding = (2, 2)
        pool = self.visual.attnpool.requires_grad_(False)
        del pool.q_proj, pool.k_proj, pool.positional_embedding
        load(self, weights, model, drop=["visual.attnpool.[qkp]*"])

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)], rounded up."""
        x, maps = self.visual.stem(self.normalize(image)), []
        for i in range(1, 5):
            x = run(getattr(self.visual, f"layer{i}"), False, x)
            maps.append(x)
        return maps

    def dense(self, image):
        """(B, 3, H, W) in [0, 1] -> unit features (B, joint, h, w) at the output stride."""
        pool, cells = self.visual.attnpool, self.forward(image)[-1].movedim(1, -1)  # (B, h, w, C)
        return unit(pool.c_proj(pool.v_proj(cells)).movedim(-1, 1))


class ViT(Backbone):
    """Maps of some blocks, all at the stride of the patches, from images of any size.

    Args:
        model: ViT-B-16-quickgelu, ViT-L-14-quickgelu ...
        taps: blocks whose outputs are the maps, ascending from 0; []: after a third, a half, two
            thirds and all of the blocks, which is 3, 5, 7, 11 of twelve.

    `joint` is D of `dense`; what dense alone needs is not trained. Images are enlarged to whole
    patches, and position embeddings interpolated to their grid as open_clip does.
    """

    joins = True

    def __init__(
        self,
        *,
        model: str = "ViT-B-16-quickgelu",
        taps: list[Natural] = (),
        weights: str = "openai",
    ):
        super().__init__()
        self.normalize = Normalize(MEAN, STD)
        self.visual, self.joint, activation = build_trunk(model, "ViT")
        blocks, self.patch = self.visual.transformer.resblocks, self.visual.patch_size[0]
        self.taps = blocks_tapped(taps, len(blocks), model)
        self.channels, self.strides = (
            [self.visual.transformer.width] * len(self.taps),
            [self.patch] * len(self.taps),
        )
        for part in (self.visual.proj, self.visual.ln_post, *blocks[self.taps[-1] + 1 :]):
            part.requires_grad_(False)
        load(self, weights, model, activation)

    def _outputs(self, image, blocks):
        """(B, 3, H, W) -> outputs (B, 1 + h w, C) of these blocks, the class token first, and the
        grid (h, w)."""
        x, outputs = self.visual.conv1(self.normalize(whole_patches(image, self.patch))), []
        grid = tuple(x.shape[-2:])
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).mT], 1)
        table = self.visual.positional_embedding[None]
        x = self.visual.ln_pre(x + positions_at(table, self.visual.grid_size, grid))
        for i, block in enumerate(self.visual.transformer.resblocks[: blocks[-1] + 1]):
            x = run(block, False, x)
            if i in blocks:
                outputs.append(x)
        return outputs, grid

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C, H / patch, W / patch)], rounded up."""
        outputs, grid = self._outputs(image, self.taps)
        return [x[:, 1:].mT.unflatten(2, grid) for x in outputs]

    def dense(self, image):
        """(B, 3, H, W) in [0, 1] -> unit features (B, joint, h, w) at the stride of the patches."""
        blocks = self.visual.transformer.resblocks
        (x,), grid = self._outputs(image, [len(blocks) - 2])
        last, x = blocks[-1], blocks[-1].ln_1(x[:, 1:])  # the patches alone
        weight, bias = (p.chunk(3)[2] for p in (last.attn.in_proj_weight, last.attn.in_proj_bias))
        x = last.ls_1(last.attn.out_proj(F.linear(x, weight, bias)))  # no residual, no MLP
        return unit((self.visual.ln_post(x) @ self.visual.proj).mT.unflatten(2, grid))
