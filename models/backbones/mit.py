"""Mix Transformer MiT-B0 to B5, the encoder of SegFormer (Xie et al., NeurIPS 2021, section 3.1).

    model.backbone: {name: mit.MiT, size: b5, weights: PATH}

Four stages of overlapping patches; keys and values of the attention come from a map that a strided
convolution made smaller. No position embeddings: any image of at least 29x29 pixels works. Tensors
have the names of NVIDIA's release; the initialisation is the release's by general knowledge.
"""

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from engine.ranges import Momentum
from engine.weights import WeightsError, load_pretrained, rename
from models.backbones.base import Backbone
from models.blocks import Normalize, guided, run

Size = Literal["b0", "b1", "b2", "b3", "b4", "b5"]
DEPTHS = dict(
    b0=(2, 2, 2, 2),
    b1=(2, 2, 2, 2),
    b2=(3, 4, 6, 3),
    b3=(3, 4, 18, 3),
    b4=(3, 8, 27, 3),
    b5=(3, 6, 40, 3),
)
HEADS, REDUCTIONS = (
    (1, 2, 5, 8),
    (8, 4, 2, 1),
)  # per stage; a reduction is the stride of keys and values

HUGGING_FACE = {  # names inside a stage in the files of the Hugging Face hub: NVIDIA's
    ".attention.output.dense.": ".attn.proj.",
    ".attention.self.": ".attn.",
    ".query.": ".q.",
    ".key.": ".kv.",
    ".value.": ".kv.",
    ".layer_norm_": ".norm",
    ".layer_norm.": ".norm.",
    ".mlp.dense": ".mlp.fc",
}


# Its layers.0 to layers.3, each of patches, blocks and norm: names as in the files of the hub.
MMSEGMENTATION = {
    r"^layers\.(\d)\.0\.projection\.": r"patch_embeddings.\1.proj.",
    r"^layers\.(\d)\.0\.norm\.": r"patch_embeddings.\1.norm.",
    r"^layers\.(\d)\.1\.": r"block.\1.",
    r"^layers\.(\d)\.2\.": r"norm.\1.",
    r"\.attn\.attn\.out_proj\.": ".attn.proj.",
    r"\.ffn\.layers\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.dwconv.dwconv.",
    r"\.ffn\.layers\.4\.": ".mlp.fc2.",
}
# What the package calls them in memory from its version 5 on: names as in the files of the hub.
TRANSFORMERS = {
    r"^stages\.(\d)\.patch_embeddings\.": r"patch_embeddings.\1.",
    r"^stages\.(\d)\.blocks\.": r"block.\1.",
    r"^stages\.(\d)\.layer_norm\.": r"layer_norm.\1.",
    r"\.layernorm_before\.": ".layer_norm_1.",
    r"\.layernorm_after\.": ".layer_norm_2.",
    r"\.attention\.q_proj\.": ".attention.self.query.",
    r"\.attention\.k_proj\.": ".attention.self.key.",
    r"\.attention\.v_proj\.": ".attention.self.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.attention\.sequence_reduction\.sequence_reduction\.": ".attention.self.sr.",
    r"\.attention\.sequence_reduction\.layer_norm\.": ".attention.self.layer_norm.",
}


def nvidia_names(state, module):
    """A state dict with the names of NVIDIA, Hugging Face or MMSegmentation -> with NVIDIA's."""
    state = rename(state, {r"^((segformer|encoder)\.)+": "", **MMSEGMENTATION, **TRANSFORMERS})
    for key in [
        key for key in state if ".attn.attn.in_proj_" in key
    ]:  # rows of queries, keys and values
        value, key = state.pop(key), key.replace(".attn.attn.in_proj_", ".attn.{}.")
        state[key.format("q")], state[key.format("kv")] = value.split(
            [len(value) // 3, len(value) - len(value) // 3]
        )
    renamed = {}
    for key, value in sorted(state.items()):
        value = (
            value[..., 0, 0] if ".mlp.fc" in key and value.ndim == 4 else value
        )  # 1x1 convolutions
        key = re.sub(
            r"^(?:layer_)?(patch_embed|block|norm)(?:dings)?\.(\d)",
            lambda m: f"{m[1]}{int(m[2]) + 1}",
            key,
        )
        for old, new in HUGGING_FACE.items():
            key = key.replace(old, new)
        renamed[key] = (
            torch.cat([renamed[key], value]) if key in renamed else value
        )  # kv: sorted, keys first
    return renamed


def conv(x, layer):
    """A convolution of a map with channels last: (B, h, w, C) -> (B, h', w', C')."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Overlapping patches: (B, C, h, w) -> (B, h / stride, w / stride, C'), rounded up."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(
            channels
        )  # eps 1e-5 here and in Attention, 1e-6 elsewhere, as in the release

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Attention of N = h w queries to M = (h / reduction) (w / reduction) keys, rounded down."""

    def __init__(self, channels, heads, reduction):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels)

    def project(self, x):
        """(B, h, w, C) -> queries (B, heads, N, C / heads), keys and values
        (B, heads, M, C / heads)."""
        images, channels = x.shape[0], x.shape[3] // self.heads
        # Rows of pixels: a linear layer would make them of a map, and a map of its result.
        rows = x.flatten(0, 2)
        small = self.norm(conv(x, self.sr)).flatten(0, 2) if self.reduction > 1 else rows
        q = self.q(rows).view(images, -1, self.heads, channels).transpose(1, 2)
        kv = self.kv(small).view(images, -1, 2, self.heads, channels)
        return q, *kv.permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x, bias=None):
        """(B, h, w, C) -> the same; `bias` broadcasts to the attention logits (B, heads, N, M)."""
        q, k, v = self.project(x)
        bias, v = guided(bias, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, N, C / heads)
        return self.proj(y.transpose(1, 2).reshape(-1, x.shape[3])).view(x.shape)


class MixFFN(nn.Module):
    """Feed-forward layer with a depthwise 3x3 convolution: (B, h, w, C) -> the same."""

    def __init__(self, channels):
        super().__init__()
        width = 4 * channels
        self.fc1 = nn.Linear(channels, width)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(width, width, 3, padding=1, groups=width)})
        self.fc2 = nn.Linear(width, channels)

    def forward(self, x):
        return self.fc2(F.gelu(conv(self.fc1(x), self.dwconv["dwconv"])))


class Block(nn.Module):
    """Attention and feed-forward layer, each a residual that drop path leaves out for some images
    of a batch."""

    def __init__(self, channels, heads, reduction, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.attn, self.mlp = Attention(channels, heads, reduction), MixFFN(channels)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x, bias=None):
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialize(module):
    """Linear layers: std 0.02; convolutions: sqrt(2 / fan out); biases: zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=(2 * module.groups / module.weight[:, 0].numel()) ** 0.5)
        nn.init.zeros_(module.bias)


class MiT(Backbone):
    """Maps of the four stages, at strides 4, 8, 16, 32.

    Args:
        size: b0 (3.3 million parameters) to b5 (81.4 million).
        drop_path: probability that an image skips a residual of the last block; linear over the
            depth, from 0.
        checkpointing: less memory in training, more time: the backward pass computes every block
            again.
        weights: path of a state dict with the names of NVIDIA, Hugging Face or MMSegmentation, of
            the encoder or of a whole network (whose head is dropped), or "none". "imagenet" is an
            error that says where to get a file.

    `depths`, `heads` and `reductions`, one number per stage, tell the shapes that an attention bias
    may have.
    """

    joins = True

    def __init__(
        self,
        *,
        size: Size = "b0",
        drop_path: Momentum = 0.1,
        checkpointing: bool = False,
        weights: str = "imagenet",
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.channels = [32, 64, 160, 256] if size == "b0" else [64, 128, 320, 512]
        self.strides, self.depths, self.heads, self.reductions = (
            [4, 8, 16, 32],
            DEPTHS[size],
            HEADS,
            REDUCTIONS,
        )
        self.normalize = Normalize()
        rates = iter([drop_path * i / (sum(self.depths) - 1) for i in range(sum(self.depths))])
        stages = zip([3, *self.channels], self.channels, self.depths, HEADS, REDUCTIONS)
        for s, (before, width, depth, heads, reduction) in enumerate(stages, 1):
            setattr(self, f"patch_embed{s}", PatchEmbed(before, width, stride=4 if s == 1 else 2))
            setattr(
                self,
                f"block{s}",
                nn.ModuleList(Block(width, heads, reduction, next(rates)) for _ in range(depth)),
            )
            setattr(self, f"norm{s}", nn.LayerNorm(width, eps=1e-6))
        self.apply(initialize)
        if weights == "imagenet":
            raise WeightsError(
                "ImageNet weights of MiT have no stable public address: give "
                "model.backbone.weights=PATH, a file of NVIDIA's SegFormer (mit_b0.pth) or Hugging "
                "Face (nvidia/mit-b0), non-commercial licence; or none"
            )
        load_pretrained(
            self,
            weights,
            None,
            drop=["head.*", "classifier.*", "decode_head.*"],
            adapt=nvidia_names,
        )

    def stage_blocks(self, stage):
        return getattr(self, f"block{stage}")

    def layers_above(self, names):
        """As elsewhere; the next stage reads what the norms of the first three make."""
        inner = [re.sub(r"^norm(?=[123]\.)", "block", name) for name in names]
        return dict(zip(names, super().layers_above(inner).values()))

    def forward(self, image, bias=None):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)], rounded up.

        Args:
            bias: a function (stage, block, x, keys) that is called before every block, with stage
                from 1, block from 0, the tokens x (B, C, h, w) that enter the block, and keys = (h
                // r, w // r), the grid of its keys, r the stage's reduction. It returns None, which
                leaves the block as it is, or floats (B or 1, heads or 1, N or 1, M) for the
                attention logits of N = h w queries and M keys, row by row, or a Guide of
                models/blocks.py. -inf hides a key; every query must keep one.
        """
        x, maps = self.normalize(image), []
        for s in range(1, 5):
            x = getattr(self, f"patch_embed{s}")(x)  # channels last, as in the blocks
            keys = tuple(n // self.reductions[s - 1] for n in x.shape[1:3])
            for i, block in enumerate(getattr(self, f"block{s}")):
                x = run(
                    block,
                    self.checkpointing,
                    x,
                    bias(s, i, x.permute(0, 3, 1, 2), keys) if bias else None,
                )
            x = getattr(self, f"norm{s}")(x).permute(0, 3, 1, 2)
            maps.append(x)
        return maps
