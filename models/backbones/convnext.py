"""ConvNeXt-T, S and B (Liu et al., CVPR 2022) as torchvision builds them, with a norm of its own on
each map.

    model.backbone: {name: convnext.ConvNeXt, size: t, weights: imagenet}

Files of torchvision, the release (facebookresearch/ConvNeXt), MMSegmentation and Hugging Face fit,
of the classifier or of a whole network; the norms norm0 to norm3 come with networks for
segmentation alone and else start fresh.
"""

import re
from typing import Literal

from torchvision.models import get_model_weights
from torchvision.models.convnext import CNBlockConfig, LayerNorm2d
from torchvision.models.convnext import ConvNeXt as Network

from engine.ranges import Depths, Momentum, OptionalWidth
from engine.weights import load_pretrained, rename
from models.backbones.base import Backbone
from models.blocks import Normalize, anchored, pad_to, run

SIZES = dict(
    t=("tiny", 96, (3, 3, 9, 3)), s=("small", 96, (3, 3, 27, 3)), b=("base", 128, (3, 3, 27, 3))
)
DROP_PATH = dict(t=0.4, s=0.3, b=0.4)  # with UPerNet on ADE20K

OTHERS = {  # names of the release, MMSegmentation and Hugging Face, in this order -> torchvision's
    r"^convnext\.": "",
    r"^encoder\.": "",
    r"^hidden_states_norms\.stage(\d)\.": lambda m: f"norm{int(m[1]) - 1}.",
    r"^embeddings\.patch_embeddings\.": "features.0.0.",
    r"^embeddings\.layernorm\.": "features.0.1.",
    r"^downsample_layers\.(\d)\.": lambda m: f"features.{2 * int(m[1])}.",
    r"^stages\.(\d)\.downsampling_layer\.": lambda m: f"features.{2 * int(m[1])}.",
    r"^stages\.(\d)\.(?:layers\.)?": lambda m: f"features.{2 * int(m[1]) + 1}.",
    r"\.(?:gamma|layer_scale_parameter)$": ".layer_scale",
    r"\.(?:dwconv|depthwise_conv)\.": ".block.0.",
    r"^(features\.\d\.\d+)\.(?:norm|layernorm)\.": r"\1.block.2.",
    r"\.(?:pwconv|pointwise_conv)1\.": ".block.3.",
    r"\.(?:pwconv|pointwise_conv)2\.": ".block.5.",
}


def torchvision_names(state, module):
    """A state dict with the names of OTHERS or torchvision's -> with torchvision's names and
    shapes."""
    state = rename(state, OTHERS)
    for key, value in state.items():
        if key.endswith(".layer_scale"):
            state[key] = value.reshape(-1, 1, 1)
        elif re.search(r"\.block\.[35]\.weight$", key) and value.ndim == 4:  # 1x1 convolutions
            state[key] = value[..., 0, 0]
    return state


class ConvNeXt(Backbone):
    """Maps of the four stages, at strides 4, 8, 16, 32.

    Args:
        size: t, s or b: 27.8, 49.5 or 87.6 million parameters.
        width, depths: channels of the first stage and blocks of the four; 0 and []: those of the
            size.
        drop_path: probability that an image skips the last block; linear over the depth, from 0.
            null: as with UPerNet on ADE20K, 0.4 for t and b and 0.3 for s.
        checkpointing: less memory in training, more time: the backward pass computes every block
            again.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a path of a state dict, see
            above.

    Sides that are no multiple of a stride are filled up with zeros, at the bottom and on the right.
    """

    joins = True

    def __init__(
        self,
        *,
        size: Literal["t", "s", "b"] = "t",
        width: OptionalWidth = 0,
        depths: Depths = (),
        drop_path: Momentum | None = None,
        checkpointing: bool = False,
        weights: str = "imagenet",
    ):
        super().__init__()
        name, base, blocks = SIZES[size]
        width, blocks = width or base, list(depths) or blocks
        self.normalize, self.checkpointing = Normalize(), checkpointing
        self.recipe_layers = 6 if size == "t" else 12
        self.channels, self.strides = [width * 2**i for i in range(4)], [4, 8, 16, 32]
        settings = [
            CNBlockConfig(c, after, n)
            for c, after, n in zip(self.channels, [*self.channels[1:], None], blocks)
        ]
        rate = DROP_PATH[size] if drop_path is None else drop_path
        self.features = Network(settings, stochastic_depth_prob=rate, num_classes=1).features
        for i, channels in enumerate(self.channels):
            setattr(self, f"norm{i}", LayerNorm2d(channels, eps=1e-6))
        load_pretrained(
            self,
            weights,
            get_model_weights(f"convnext_{name}").IMAGENET1K_V1.url,
            allow_missing=["norm[0-3].*"],
            drop=["classifier.*", "head.*", "norm.*", "layernorm.*"],
            adapt=torchvision_names,
        )

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)], rounded up."""
        x, maps = self.features[0](pad_to(self.normalize(image), 4)), []
        for i in range(4):
            if i:
                norm, conv = self.features[2 * i]
                x = conv(pad_to(norm(x), 2))
            for block in self.features[2 * i + 1]:
                x = run(block, self.checkpointing, x)
            maps.append(getattr(self, f"norm{i}")(x))
        return (
            anchored(maps, [getattr(self, f"norm{i}") for i in range(4)]) if self.training else maps
        )

    def layers_above(self, names):
        """As its recipe for segmentation has it (`stage_wise` of MMSegmentation).

        There are 6 (t) or 12 layers, and the stages are the first four. Below them are the stem and
        what halves the maps; the norms of the maps have none above.
        """
        above = {}
        for name in names:
            part = int(name.split(".")[1]) if name.startswith("features.") else None
            stage = part // 2 if part is not None and part % 2 else -1
            above[name] = 0 if part is None else self.recipe_layers - stage
        return above
