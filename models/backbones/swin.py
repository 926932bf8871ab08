"""Swin Transformer T, S and B (Liu et al., ICCV 2021) as torchvision builds them, with a norm of
its own on each map.

    model.backbone: {name: swin.Swin, size: b, weights: imagenet}

Files of torchvision, the release (microsoft/Swin-Transformer), MMSegmentation and Hugging Face fit,
of the classifier or of a whole network; the norms norm0 to norm3 come with networks for
segmentation alone and else start fresh.
"""

from typing import Literal

from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer

from engine.ranges import Depths, Few, Momentum, OptionalWidth
from engine.weights import join_qkv, load_pretrained, rename
from models.backbones.base import Backbone
from models.blocks import Normalize, anchored, pad_to, run

SIZES = dict(t=(96, (2, 2, 6, 2)), s=(96, (2, 2, 18, 2)), b=(128, (2, 2, 18, 2)))

OTHERS = {  # names of the release, MMSegmentation and Hugging Face, in this order -> torchvision's
    r"^swin\.": "",
    r"^encoder\.": "",
    r"^hidden_states_norms\.stage(\d)\.": lambda m: f"norm{int(m[1]) - 1}.",
    r"^patch_embed\.proj(?:ection)?\.": "features.0.0.",
    r"^embeddings\.patch_embeddings\.projection\.": "features.0.0.",
    r"^(?:patch_embed|embeddings)\.norm\.": "features.0.2.",
    r"^(?:layers|stages)\.(\d)\.blocks\.": lambda m: f"features.{2 * int(m[1]) + 1}.",
    r"^(?:layers|stages)\.(\d)\.downsample\.": lambda m: f"features.{2 * int(m[1]) + 2}.",
    r"\.attn\.w_msa\.": ".attn.",
    r"\.attention\.self\.(query|key|value)\.": lambda m: f".attn.{m[1][0]}.",
    r"\.attention\.self\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.(?:mlp\.fc1|ffn\.layers\.0\.0|intermediate\.dense)\.": ".mlp.0.",
    r"\.(?:mlp\.fc2|ffn\.layers\.1|output\.dense)\.": ".mlp.3.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
}


def unfolded(value):
    """Where patches are merged, MMSegmentation has for each channel its four neighbours (0, 0),
    (0, 1), (1, 0), (1, 1); the others have all channels of (0, 0), then of (1, 0), (0, 1) and
    (1, 1): (..., C 4) -> (..., 4 C)."""
    return value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].mT.flatten(-2)


def torchvision_names(state, module):
    """A state dict with the names of OTHERS or torchvision's -> with torchvision's names and
    shapes."""
    merged = unfolded if any(".w_msa." in key for key in state) else lambda value: value
    state = join_qkv(rename(state, OTHERS))
    places = ("features.2.", "features.4.", "features.6.")
    return {key: merged(value) if key.startswith(places) else value for key, value in state.items()}


class Swin(Backbone):
    """Maps of the four stages, at strides 4, 8, 16, 32.

    Args:
        size: t, s or b: 27.5, 48.8 or 86.7 million parameters.
        width, depths: channels of the first stage, 32 for each of its heads, and blocks of the
            four; 0 and []: those of the size.
        window: side of the windows of the attention, in tokens.
        drop_path: probability that an image skips a residual of the last block; linear over the
            depth, from 0.
        checkpointing: less memory in training, more time: the backward pass computes every block
            again.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a path of a state dict, see
            above.

    Sides that are no multiple of a stride or of a window are filled up with zeros, at the bottom
    and on the right.
    """

    joins, any_size = True, False

    def __init__(
        self,
        *,
        size: Literal["t", "s", "b"] = "t",
        width: OptionalWidth = 0,
        depths: Depths = (),
        window: Few = 7,
        drop_path: Momentum = 0.3,
        checkpointing: bool = False,
        weights: str = "imagenet",
    ):
        super().__init__()
        base, blocks = SIZES[size]
        width, blocks = width or base, list(depths) or blocks
        if width % 32:
            raise ValueError(f"width={width} must be a multiple of 32")
        self.normalize, self.checkpointing = Normalize(), checkpointing
        self.channels, self.strides = [width * 2**i for i in range(4)], [4, 8, 16, 32]
        heads = [channels // 32 for channels in self.channels]
        network = SwinTransformer(
            [4, 4],
            width,
            blocks,
            heads,
            [window, window],
            stochastic_depth_prob=drop_path,
            num_classes=1,
        )
        self.features = network.features
        for module in self.features.modules():
            if isinstance(
                module, ShiftedWindowAttention
            ):  # implied by the window, and not in all files
                module.register_buffer(
                    "relative_position_index", module.relative_position_index, persistent=False
                )
        for i, channels in enumerate(self.channels):
            setattr(self, f"norm{i}", nn.LayerNorm(channels))
        load_pretrained(
            self,
            weights,
            get_model_weights(f"swin_{size}").IMAGENET1K_V1.url,
            allow_missing=["norm[0-3].*"],
            drop=[
                "norm.*",
                "layernorm.*",
                "head.*",
                "classifier.*",
                "*.attn_mask",
                "*.relative_position_index",
            ],
            adapt=torchvision_names,
        )

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)], rounded up."""
        x, maps = self.features[0](pad_to(self.normalize(image), 4)), []  # channels last
        for i in range(4):
            x = self.features[2 * i](x) if i else x
            for block in self.features[2 * i + 1]:
                x = run(block, self.checkpointing, x)
            maps.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
        return (
            anchored(maps, [getattr(self, f"norm{i}") for i in range(4)]) if self.training else maps
        )
