"""Plain vision transformers ViT-Ti, S, B and L (Dosovitskiy et al., ICLR 2021), also as DINOv2
trained them.

    model.backbone: {name: vit.ViT, size: b, weights: imagenet}
    model.backbone: {name: vit.ViT, size: s, weights: PATH}                       DeiT's, MAE's
    model.backbone: {name: vit.ViT, size: b, patch: 14, positions: 518, layer_scale: true,
                     registers: 4, weights: PATH}

The last line is DINOv2 (Oquab et al., TMLR 2024) with registers (Darcet et al., ICLR 2024); without
them, registers: 0. Tensors have the names of DINOv2's release, which DeiT and MAE share; those of
torchvision and Hugging Face are translated. There are more such networks in clip.ViT and timm.Timm;
this one takes an attention bias.
"""

from collections import OrderedDict
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from engine.ranges import Few, Momentum, Natural
from engine.statistics import unit
from engine.weights import WeightsError, join_qkv, load_pretrained, rename
from models.backbones.base import Backbone
from models.backbones.clip import blocks_tapped, positions_at, whole_patches
from models.blocks import Guide, Normalize, guided, run

SIZES = dict(
    t=(192, 12, 3), s=(384, 12, 6), b=(768, 12, 12), l=(1024, 24, 16)
)  # channels, blocks, heads
URLS = {  # torchvision's IMAGENET1K_V1
    ("b", 16): "https://download.pytorch.org/models/vit_b_16-c867db91.pth",
    ("l", 16): "https://download.pytorch.org/models/vit_l_16-852ce7e3.pth",
}
OTHERS = {  # names of Hugging Face (ViT, DeiT, DINOv2) and torchvision, in this order -> ours
    r"^(vit|deit|dinov2(_with_registers)?)\.": "",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.": "",
    r"^encoder\.layer\.(\d+)\.": r"blocks.\1.",
    r"\.attention\.attention\.(query|key|value)\.": lambda m: f".attn.{m[1][0]}.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"^layernorm\.": "norm.",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^class_token$": "cls_token",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",  # linear_1 in older files
    r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
}


def our_names(state, module):
    """A state dict with the names of OTHERS or ours -> with ours."""
    return join_qkv(rename(state, OTHERS))


class Attention(nn.Module):
    """Attention of N tokens to one another."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def project(self, x):
        """(B, N, C) -> queries, keys and values (B, heads, N, C / heads)."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, bias=None):
        """(B, N, C) -> the same; `bias` broadcasts to the attention logits (B, heads, N, N)."""
        q, k, v = self.project(x)
        bias, v = guided(bias, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Attention and feed-forward layer, each a residual that drop path leaves out for some images
    of a batch."""

    def __init__(self, channels, heads, layer_scale, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        fc1, fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.attn, self.mlp = (
            Attention(channels, heads),
            nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2)),
        )
        self.ls1, self.ls2 = [
            LayerScale(channels) if layer_scale else nn.Identity() for _ in range(2)
        ]
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x, bias=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), bias)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ViT(Backbone):
    """Maps of some blocks, all at the stride of the patches, from images of any size.

    Args:
        size: t, s, b or l: 5.5, 21.7, 85.8 or 303.3 million parameters.
        patch: its side, in pixels.
        positions: side of the square images, in pixels, whose patches the table of positions
            counts: 224, DINOv2 518.
        registers: further tokens beside that of the class, without a position.
        layer_scale: whether a learned factor per channel follows attention and feed-forward layer.
        drop_path: probability that an image skips a residual of the last block; linear over the
            depth, from 0.
        taps: blocks whose outputs are the maps, ascending from 0; []: after a third, a half, two
            thirds and all of the blocks, which is 3, 5, 7, 11 of twelve.
        norm: whether all maps go through the final norm, as where DINOv2 is evaluated on dense
            tasks.
        checkpointing: less memory in training, more time: the backward pass computes every block
            again.
        weights: "imagenet" (torchvision's, of b and l with patches of 16), "none", or a path of a
            state dict with names of DINOv2 or of OTHERS, whose head is dropped. It must be of
            images normalised by ImageNet's mean.

    What the maps do not need is not trained. `depths` (the blocks that run), `heads` and
    `reductions`, of one stage, tell the shapes that an attention bias may have.

    Images are enlarged to whole patches. The table of positions is interpolated to their grid with
    bicubic filters that are widened where it shrinks, as timm, clip.ViT and DINOv2 with registers
    do it. DINOv2 without registers has other filters there, PyTorch's bicubic ones without
    antialiasing, and takes the grid for 0.1 patches larger.
    """

    joins = True

    def __init__(
        self,
        *,
        size: Literal["t", "s", "b", "l"] = "b",
        patch: Literal[14, 16] = 16,
        positions: Few = 224,
        registers: Annotated[int, "[0, 1024]"] = 0,
        layer_scale: bool = False,
        drop_path: Momentum = 0.1,
        taps: list[Natural] = (),
        norm: bool = True,
        checkpointing: bool = False,
        weights: str = "imagenet",
    ):
        super().__init__()
        self.checkpointing = checkpointing
        if weights == "imagenet" and (size, patch) not in URLS:
            raise WeightsError(
                "torchvision has ImageNet weights of ViT-B/16 and ViT-L/16, not of "
                f"ViT-{size.upper()}/{patch}: give "
                "model.backbone.weights=PATH, a file of DeiT (t, s or b, patch 16) or DINOv2 "
                "(patch 14); or none"
            )
        channels, depth, heads = SIZES[size]
        self.patch, self.table = patch, positions // patch
        if positions < patch or positions % patch:
            raise ValueError(
                f"positions={positions} are not whole patches of {patch}; 224 and DINOv2's 518 fit "
                "14"
            )
        self.taps = blocks_tapped(taps, depth, f"ViT-{size.upper()}")
        self.channels, self.strides = [channels] * len(self.taps), [patch] * len(self.taps)
        self.joint = channels
        self.depths, self.heads, self.reductions = [self.taps[-1] + 1], [heads], [1]
        self.normalize, self.prefix = Normalize(), 1 + registers  # tokens before the patches
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, channels, patch, patch)})
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, channels))
        self.pos_embed = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1 + self.table**2, channels), std=0.02)
        )
        self.register_tokens = (
            nn.Parameter(1e-6 * torch.randn(1, registers, channels)) if registers else None
        )
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(channels, heads, layer_scale, rate) for rate in rates)
        self.norm, self.normed = nn.LayerNorm(channels, eps=1e-6), norm
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for unused in [*self.blocks[self.taps[-1] + 1 :], *([] if norm else [self.norm])]:
            unused.requires_grad_(False)
        # The mask token is of DINOv2's own training.
        drop = ["head.*", "heads.*", "classifier.*", "pooler.*", "mask_token"]
        load_pretrained(self, weights, URLS.get((size, patch)), drop=drop, adapt=our_names)

    def _bias(self, bias):
        """A bias of patches (B, heads, N or 1, M) -> of all tokens: 0 for the other keys and,
        unless N = 1, queries.

        The other tokens' values keep the factor 1.
        """
        if isinstance(bias, Guide):
            values = (
                None
                if bias.values is None
                else F.pad(bias.values, (0, 0, self.prefix, 0), value=1.0)
            )
            return Guide(self._bias(bias.bias), values)
        return (
            None
            if bias is None
            else F.pad(bias, (self.prefix, 0, self.prefix * (bias.shape[-2] > 1), 0))
        )

    def stage_blocks(self, stage):
        return self.blocks

    def forward(self, image, bias=None):
        """(B, 3, H, W) in [0, 1] -> [(B, C, H / patch, W / patch)], rounded up.

        Args:
            bias: a function (stage, block, x, keys) that is called before every block, with stage
                1, block from 0, the patches x (B, C, h, w) that enter the block, and keys = (h, w).
                It returns None, which leaves the block as it is, floats (B or 1, heads or 1, N or
                1, M) for the attention logits of N = M = h w patches, row by row, or a Guide of
                models/blocks.py. -inf hides a key. The class token and registers have bias 0 as
                keys, so a constant c is -c for them; as queries they see that of all patches if
                N = 1, else 0.
        """
        x, maps = self.patch_embed["proj"](self.normalize(whole_patches(image, self.patch))), []
        grid = tuple(x.shape[-2:])
        table = positions_at(self.pos_embed, (self.table, self.table), grid)
        first, others = table.split([1, grid[0] * grid[1]], 1)
        prefix = [self.cls_token + first] + (
            [] if self.register_tokens is None else [self.register_tokens]
        )
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix]
        x = torch.cat([*prefix, x.flatten(2).mT + others], 1)  # (B, 1 + registers + h w, C)
        for i, block in enumerate(self.blocks[: self.taps[-1] + 1]):
            x = run(
                block,
                self.checkpointing,
                x,
                self._bias(bias(1, i, self._map(x, grid), grid)) if bias else None,
            )
            if i in self.taps:
                maps.append(self._map(self.norm(x) if self.normed else x, grid))
        return maps

    def dense(self, image):
        """The last map, of unit vectors: for a frozen tower of `train_dg.py`. No text lies in its
        space; mapped.Mapped brings some there."""
        return unit(self(image)[-1])

    def _map(self, x, grid):
        """Tokens (B, N, C) -> the patches as a map (B, C, h, w)."""
        return x[:, self.prefix :].mT.unflatten(2, grid)
