"""MobileNet: its output stride, widths, real weights, frozen batch norm."""

import pytest
import torch
from torch import nn
from torchvision.models import get_model, mobilenet_v2

from engine.build import build
from engine.step import View
from engine.weights import WeightsError
from models.backbones.mobilenet import MobileNet
from models.classifiers.linear import Linear
from models.decoders.upernet import UPerNet
from models.segmentor import Segmentor
from tests.models.networks import intermediate, scrambled
from tests.runs import ROOT

REAL = ROOT.parent / "shared" / "data" / "weights" / "mobilenet_v2-imagenet-dequantised.pth"


@torch.no_grad()
def test_real_mobilenet_v2_weights_give_torchvisions_features(caplog):
    if not REAL.is_file():
        pytest.skip(f"the weights {REAL.name} are not beside the checkout")
    network = mobilenet_v2(weights=None).eval()
    network.load_state_dict(torch.load(REAL, weights_only=True))
    with caplog.at_level("INFO", "engine"):
        backbones = [
            MobileNet(weights=str(REAL), output_stride=stride).eval() for stride in (32, 8)
        ]
    assert "306 keys loaded, 0 keep" in caplog.text
    image = torch.rand(1, 3, 64, 96)
    expected = intermediate(network, (3, 6, 13, 17), backbones[0].normalize(image))
    for x, y, z in zip(backbones[0](image), expected, backbones[1](image), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        step = z.shape[-1] // x.shape[-1]
        torch.testing.assert_close(z[..., ::step, ::step], y, rtol=1e-3, atol=1e-3)


# --- output stride ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("version", ["v2", "v3_large", "v3_small"])
@torch.no_grad()
def test_output_stride_gives_the_stride_and_keeps_the_weights(version, stride):
    """Every n-th cell of a dilated map is the cell of the strided one; squeeze-and-excitation averages other cells."""
    strided = scrambled(MobileNet(version=version, width=0.5, weights="none")).double()
    dilated = (
        MobileNet(version=version, width=0.5, output_stride=stride, weights="none").double().eval()
    )
    dilated.load_state_dict(strided.state_dict())
    image = torch.rand(1, 3, 97, 70).double()
    expected, maps = strided(image), dilated(image)
    assert dilated.strides == [min(s, stride) for s in (4, 8, 16, 32)] and strided.strides == [
        4,
        8,
        16,
        32,
    ]
    for x, y, s, own in zip(maps, expected, strided.strides, dilated.strides, strict=True):
        assert x.shape[-2:] == (-(-97 // own), -(-70 // own))
        if version == "v2" or s <= stride:
            torch.testing.assert_close(x[..., :: s // own, :: s // own], y, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("version", ["v3_large", "v3_small"])
def test_the_dilated_v3_is_torchvisions(version):
    network = scrambled(get_model(f"mobilenet_{version}", weights=None, dilated=True))
    ours = MobileNet(version=version, output_stride=16, weights="none").eval()
    ours.features.load_state_dict(network.features.state_dict())
    image = torch.rand(1, 3, 65, 96)
    expected = network.features(ours.normalize(image))
    torch.testing.assert_close(ours(image)[-1], expected)


def test_a_narrow_mobilenet_has_no_weights_of_imagenet():
    with pytest.raises(WeightsError, match=r"width 1\.0, not 0\.5"):
        build("models.backbones", {"name": "mobilenet.MobileNet", "width": 0.5})
    assert [round(c) for c in MobileNet(width=0.5, weights="none").channels] == [16, 16, 48, 160]


def test_frozen_batch_norm_of_a_mobilenet_keeps_everything():
    backbone = MobileNet(width=0.25, weights="none", checkpointing=True)
    decoder = UPerNet(in_channels=backbone.channels, width=8)
    network = Segmentor(
        backbone, decoder, Linear(in_channels=8, num_classes=3), frozen_bn=["backbone"]
    ).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network({"source": View(torch.rand(2, 3, 64, 64))})["source"].logits.square().mean().backward()
    moved = {
        key for key, value in network.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved and all(key.startswith("decoder.") for key in moved)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.weight.grad is None and norm.bias.grad is None for norm in norms)
    assert backbone.features[0][0].weight.grad.abs().sum() > 0
