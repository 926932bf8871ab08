"""ResNet-18 to ResNet-152 (He et al., CVPR 2016) as torchvision builds them, with a choice of
output stride and stages.

    model.backbone: {name: resnet.ResNet, depth: 101, output_stride: 16, weights: imagenet}
    model.backbone: {name: resnet.ResNet, depth: 101, deep_stem: true, weights: PATH}    # ResNetV1c

Tensors have torchvision's names, which those of MMSegmentation agree with; its files of whole
networks fit too.
"""

import copy
from typing import Literal

import torch
from torch import nn
from torchvision.models import get_model, get_model_weights

from engine.weights import WeightsError, load_pretrained
from models.backbones.base import Backbone
from models.blocks import Normalize, conv_bn_relu, dilate, run


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the others (Pan et al.,
    IBN-Net, ECCV 2018)."""

    def __init__(self, channels):
        super().__init__()
        self.half = channels // 2
        self.IN, self.BN = (
            nn.InstanceNorm2d(self.half, affine=True),
            nn.BatchNorm2d(channels - self.half),
        )

    def forward(self, x):
        first, second = x.split([self.half, x.shape[1] - self.half], 1)
        return torch.cat([self.IN(first), self.BN(second)], 1)


def split_norms(state, module):
    """The state dict of a plain ResNet as one of a ResNet with IBN: each norm's values go to its
    two halves."""
    norms = {name: part.half for name, part in module.named_modules() if isinstance(part, IBN)}
    for name, half in norms.items():
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if (value := state.pop(f"{name}.{kind}", None)) is not None:
                if kind in ("weight", "bias"):
                    state[f"{name}.IN.{kind}"] = value[:half]
                state[f"{name}.BN.{kind}"] = value[half:] if value.dim() else value
    return state


def deep_stem_of(width=64):
    """Three 3x3 convolutions, the first of stride 2, in place of the 7x7 one (ResNetV1c: He et al.,
    Bag of tricks for image classification, CVPR 2019)."""
    half = width // 2
    stem = nn.Sequential(
        *conv_bn_relu(3, half), *conv_bn_relu(half, half), *conv_bn_relu(half, width)
    )
    stem[0].stride = (2, 2)
    for layer in stem[::3]:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return stem


def adapt(state, module):
    """A state dict for this ResNet's norms, if it has the same stem."""
    stems = {"stem.0.weight", "conv1.weight"} & {*state}
    if stems and module.deep_stem != ("stem.0.weight" in state):
        theirs = "one 7x7 convolution" if module.deep_stem else "a deep stem"
        ours = "three of 3x3" if module.deep_stem else "one of 7x7"
        raise WeightsError(
            f"the weights are of a ResNet whose stem is {theirs}, and this one has {ours}: set "
            f"model.backbone.deep_stem={str(not module.deep_stem).lower()}, or take weights of the "
            "other kind (torchvision's have 7x7, MMSegmentation's resnet50_v1c and resnet101_v1c "
            "are deep)"
        )
    return split_norms(state, module)


class ResNet(Backbone):
    """Maps of stages 1 to `stages`, at strides 4, 8, 16, 32 or as far as `output_stride` allows.

    Args:
        depth: 18, 34, 50, 101 or 152.
        output_stride: 8, 16 or 32; later stages are dilated instead of strided.
        stages: 4, or fewer to stop before layer4 or layer3.
        deep_stem: three 3x3 convolutions of 32, 32 and 64 channels in place of the 7x7 one
            (ResNetV1c), named as in MMSegmentation: torchvision has no weights of it.
        stem: "shared", or "per_domain" for a second stem and layer1 that images of the domain
            "source" take (Lee et al., "Bi-directional Contrastive Learning", ECCV 2022); both
            copies start from the same weights. A step then needs both views, or the unused copy has
            no gradient and DistributedDataParallel waits for it.
        ibn: "a" for IBN in place of the first norm of each block of layer1 to layer3, against
            differences of style; weights may be those of IBN-Net's release or of a plain ResNet,
            whose values go to both halves [R].
        normalize: "imagenet" for its mean and deviation, or "none" for weights trained on [0, 1],
            such as SimCLR's.
        checkpointing: less memory in training, more time: the backward pass computes every block
            again.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a path of a state dict with
            torchvision's keys.
        allow_missing: patterns of keys that the file may lack, such as ["layer4.*"].
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        output_stride: Literal[8, 16, 32] = 32,
        stages: Literal[2, 3, 4] = 4,
        deep_stem: bool = False,
        stem: Literal["shared", "per_domain"] = "shared",
        ibn: Literal["none", "a"] = "none",
        normalize: Literal["imagenet", "none"] = "imagenet",
        checkpointing: bool = False,
        weights: str = "imagenet",
        allow_missing: list[str] = (),
    ):
        super().__init__()
        if deep_stem and weights == "imagenet":
            raise WeightsError(
                "torchvision has no ImageNet weights of a ResNet with deep_stem: give "
                "model.backbone.weights=PATH, a file of MMSegmentation (resnet50_v1c, "
                "resnet101_v1c), or none"
            )
        self.deep_stem, self.checkpointing = deep_stem, checkpointing
        net = get_model(f"resnet{depth}", weights=None)
        self.normalize = Normalize() if normalize == "imagenet" else nn.Identity()
        if deep_stem:
            self.stem = deep_stem_of()
        else:
            self.conv1, self.bn1 = net.conv1, net.bn1
        self.relu, self.maxpool = net.relu, net.maxpool
        self.stage_names = [f"layer{i}" for i in range(1, stages + 1)]
        width = 64 if depth < 50 else 256
        self.channels = [width * 2**i for i in range(stages)]
        self.strides = [min(4 * 2**i, output_stride) for i in range(stages)]
        for i, name in enumerate(self.stage_names):
            stage = getattr(net, name)
            if 4 * 2**i > output_stride:
                dilation = 4 * 2**i // output_stride
                dilate(stage, dilation, first=dilation // 2)
            for block in stage if ibn == "a" and name != "layer4" else ():
                block.bn1 = IBN(block.bn1.num_features)
            setattr(self, name, stage)
        url = get_model_weights(f"resnet{depth}").IMAGENET1K_V1.url
        unused = ["fc.*", *(f"layer{i}.*" for i in range(stages + 1, 5))]
        load_pretrained(self, weights, url, allow_missing=allow_missing, drop=unused, adapt=adapt)
        self.source, self.per_domain = None, stem == "per_domain"
        if self.per_domain:
            names = ("stem", "layer1") if deep_stem else ("conv1", "bn1", "layer1")
            self.source = copy.deepcopy(
                nn.ModuleDict({name: getattr(self, name) for name in names})
            )

    def forward(self, image, domain="target"):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)], rounded up.

        `domain` has an effect only with per_domain stems.

        Raises:
            ValueError: per_domain stems and a domain that is neither "source" nor "target".
        """
        if self.per_domain and domain not in ("source", "target"):
            raise ValueError(
                f"per_domain stems are for the domains source and target, not '{domain}'"
            )
        first = self.source if self.per_domain and domain == "source" else self
        x = self.normalize(image)
        x = self.maxpool(first.stem(x) if self.deep_stem else self.relu(first.bn1(first.conv1(x))))
        maps = []
        for name in self.stage_names:
            for block in getattr(first if name == "layer1" else self, name):
                x = run(block, self.checkpointing, x)
            maps.append(x)
        return maps
