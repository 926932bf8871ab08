"""MobileNetV2 (Sandler et al., CVPR 2018) and MobileNetV3 (Howard et al., ICCV 2019) as torchvision
builds them.

    model.backbone: {name: mobilenet.MobileNet, version: v2, output_stride: 16, weights: imagenet}

MobileNetV2 ends with its 320 channels, as where DeepLabV3+ and MMSegmentation use it; MobileNetV3
with the 1x1 convolution that comes after its blocks, as in torchvision's own networks for
segmentation.
"""

from typing import Annotated, Literal

from torch import nn
from torchvision.models import get_model, get_model_weights

from engine.weights import WeightsError, load_pretrained, rename
from models.backbones.base import Backbone
from models.blocks import Normalize, dilate, run


def our_names(state, module):
    """A state dict in which torchvision's networks for segmentation have no `features.`."""
    return rename(state, {r"^(?=\d)": "features."})


def halves(block):
    """Whether a block halves its input."""
    return any(
        isinstance(module, nn.Conv2d) and module.stride == (2, 2) for module in block.modules()
    )


class MobileNet(Backbone):
    """The last maps at strides 4, 8, 16 and 32, or as far as `output_stride` allows: four maps in
    any case.

    Args:
        version: v2, v3_large or v3_small.
        width: factor of all channels; torchvision has weights of 1.0.
        output_stride: 8, 16 or 32; later blocks are dilated instead of strided.
        checkpointing: less memory in training, more time: the backward pass computes every block
            again.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a path of a state dict with
            torchvision's keys, whose classifier is dropped.
    """

    def __init__(
        self,
        *,
        version: Literal["v2", "v3_large", "v3_small"] = "v2",
        width: Annotated[float, "(0, 16]"] = 1.0,
        output_stride: Literal[8, 16, 32] = 32,
        checkpointing: bool = False,
        weights: str = "imagenet",
    ):
        super().__init__()
        if weights == "imagenet" and width != 1.0:
            raise WeightsError(
                f"torchvision has ImageNet weights of width 1.0, not {width}: give weights=PATH or "
                "none"
            )
        self.normalize, self.checkpointing = Normalize(), checkpointing
        name, drop = f"mobilenet_{version}", ["classifier.*"]
        self.features = get_model(name, weights=None, width_mult=width).features
        if version == "v2":
            drop.append(f"features.{len(self.features) - 1}.*")
            self.features = self.features[:-1]
        halved = [i for i, block in enumerate(self.features) if halves(block)]
        bounds = [*halved[2:], len(self.features)]  # of the blocks at strides 4, 8, 16, 32
        self.taps, self.strides = (
            [end - 1 for end in bounds],
            [min(s, output_stride) for s in (4, 8, 16, 32)],
        )
        for stride, start, end in zip((8, 16, 32), bounds, bounds[1:]):
            if stride > output_stride:
                dilation = stride // output_stride
                # torchvision's own dilated V3 dilates the first block too.
                first = dilation if version != "v2" else dilation // 2
                dilate(self.features[start:end], dilation, first)
        self.channels = []
        for tap in self.taps:
            *_, norm = (m for m in self.features[tap].modules() if isinstance(m, nn.BatchNorm2d))
            self.channels.append(norm.num_features)
        url = get_model_weights(name).IMAGENET1K_V1.url
        load_pretrained(self, weights, url, drop=drop, adapt=our_names)

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)], rounded up."""
        x, maps = self.normalize(image), []
        for i, block in enumerate(self.features):
            x = run(block, self.checkpointing, x)
            if i in self.taps:
                maps.append(x)
        return maps
