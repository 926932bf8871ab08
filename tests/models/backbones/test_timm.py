"""timm's networks against timm."""

import sys

import pytest
import torch

from engine.build import build
from engine.config import ConfigError
from engine.errors import UserError
from engine.weights import WeightsError


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def timm_backbone(model, **options):
    pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return build(
        "models.backbones", {"name": "timm.Timm", "model": model, "weights": "none", **options}
    ).eval()


def timm_normalized(image):
    return (image - 0.5) / 0.5  # of timm's test networks


@torch.no_grad()
@pytest.mark.parametrize(
    "model, indices", [("test_resnet", [1, 2, 3, 4]), ("test_convnext", []), ("test_vit", [1, 5])]
)
def test_timm_maps_are_timms_own(model, indices):
    backbone = timm_backbone(model, out_indices=indices)
    import timm

    torch.manual_seed(0)
    extra = {"dynamic_img_size": True} if model == "test_vit" else {}
    net = timm.create_model(
        model, features_only=True, out_indices=indices or (0, 1, 2, 3), **extra
    ).eval()
    net.load_state_dict(backbone.net.state_dict())
    image = torch.rand(2, 3, 96, 64)
    maps = backbone(image)
    for actual, expected in zip(maps, net(timm_normalized(image)), strict=True):
        close(actual, expected)
    for x, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert x.shape == (2, channels, 96 // stride, 64 // stride)
    assert backbone.strides == ([16, 16] if model == "test_vit" else [4, 8, 16, 32])


@torch.no_grad()
def test_timm_networks_take_any_size():
    assert [x.shape[-2:] for x in timm_backbone("test_vit")(torch.rand(1, 3, 97, 65))] == [
        (7, 5)
    ] * 4
    assert [x.shape[-1] for x in timm_backbone("test_resnet")(torch.rand(1, 3, 97, 65))] == [
        17,
        9,
        5,
        3,
    ]


@torch.no_grad()
@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_weights_of_a_file_load_strictly(model, suffix, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    whole = timm.create_model(
        model, num_classes=7, **({"dynamic_img_size": True} if model == "test_vit" else {})
    )
    path = str(tmp_path / f"weights{suffix}")
    save = torch.save if suffix == ".pth" else save_file
    save(whole.state_dict(), path)
    backbone = timm_backbone(model, weights=path)
    image = torch.rand(1, 3, 160, 160)
    expected = whole.eval().forward_intermediates(timm_normalized(image), intermediates_only=True)[
        -1
    ]
    close(backbone(image)[-1], expected)
    assert not any(
        "state_dict" in getattr(module, "pretrained_cfg", {}) for module in backbone.modules()
    )
    state = whole.state_dict()
    gone = next(key for key in state if "head" not in key and key.endswith("weight"))
    save({key: value for key, value in state.items() if key != gone}, path)
    with pytest.raises(WeightsError, match=f"1 missing \\({gone}"):
        timm_backbone(model, weights=path)
    save(state | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="1 unexpected"):
        timm_backbone(model, weights=path)


def test_timm_says_what_is_wrong(monkeypatch):
    with pytest.raises(ConfigError, match=r"timm has no model 'convnext_tinny'; similar: convnext"):
        timm_backbone("convnext_tinny")
    with pytest.raises(
        ConfigError, match=r"cannot make test_resnet.*Invalid pretrained tag \(nonsense\)"
    ):
        timm_backbone("test_resnet.nonsense")
    for model in ("test_resnet", "test_vit"):
        with pytest.raises(ConfigError, match=rf"cannot make {model}.*no_such_option"):
            timm_backbone(model, options={"no_such_option": 3})
    with pytest.raises(ConfigError, match=r"no model 'resnet-18'; similar: .*resnet18"):
        timm_backbone("resnet-18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build("models.backbones", {"name": "timm.Timm", "model": "test_resnet", "weights": "none"})


def test_every_part_of_a_timm_network_is_trained():
    for model in ("test_resnet", "test_vit"):
        backbone = timm_backbone(model).train()
        sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
        assert all(p.grad is not None for p in backbone.parameters())
