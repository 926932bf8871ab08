"""timm's networks against timm."""

import sys

import pytest
import torch

from engine.build import build
from engine.config import ConfigError
from engine.errors import UserError
from engine.weights import WeightsError
from models.backbones.timm import timm_names


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


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"out_indices": [3, 1]}, r"out_indices=\[3, 1\] must ascend"),
        ({"out_indices": [1, 1]}, "must ascend"),
        ({"out_indices": [-1, 0]}, "must ascend from 0"),
        ({"options": {"features_only": True}}, "options may not hold features_only"),
        ({"options": {"out_indices": [1]}}, "options may not hold out_indices"),
    ],
)
def test_options_that_would_cross_maps_or_repeat_others_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        timm_backbone("test_resnet", **options)


@torch.no_grad()
def test_channels_come_first_where_timm_has_them_last():
    backbone = timm_backbone("swin_tiny_patch4_window7_224", out_indices=[0, 1])
    maps = backbone(torch.rand(1, 3, 224, 224))
    assert [x.shape for x in maps] == [(1, 96, 56, 56), (1, 192, 28, 28)]


def test_every_part_of_a_timm_network_is_trained():
    for model in ("test_resnet", "test_vit"):
        backbone = timm_backbone(model).train()
        sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
        assert all(p.grad is not None for p in backbone.parameters())


def dinov3(state, hub):
    """A state dict of timm's DINOv3 with the names of the hub, or of the release, where keys have no bias."""
    found = {"storage_tokens": state["reg_token"], "mask_token": state["cls_token"][0]}
    table = {".gamma_": ".ls"}
    if hub:
        table = {".gamma_": ".layer_scale", "patch_embed.proj": "embeddings.patch_embeddings"}
        table |= {
            "blocks.": "layer.",
            ".attn.proj": ".attention.o_proj",
            "fc1": "up_proj",
            "fc2": "down_proj",
        }
        found = {f"embeddings.{key}": value for key, value in found.items()}
        found["embeddings.register_tokens"] = found.pop("embeddings.storage_tokens")
        table["cls_token"] = "embeddings.cls_token"
    for key, value in state.items():
        name = key
        for old, new in table.items():
            name = name.replace(old, new)
        if ".gamma_" in key:
            found[f"{name}.{'lambda1' if hub else 'gamma'}"] = value
        elif ".qkv." in key and hub:
            for letter, rows in zip("qkv", value.chunk(3)):
                found[name.replace("attn.qkv", f"attention.{letter}_proj")] = rows.clone()
        elif key != "reg_token" and not key.endswith("_bias"):
            found[name] = value
    for key in [key for key in state if key.endswith("q_bias")]:
        queries, values = state[key], state[key.replace("q_bias", "v_bias")]
        if hub:
            place = key.replace("blocks", "layer").replace("attn.q_bias", "attention.{}_proj.bias")
            found |= {place.format("q"): queries, place.format("v"): values}
        else:
            parts = [queries, torch.zeros_like(queries), values]
            found[key.replace("q_bias", "qkv.bias")] = torch.cat(parts)
            found[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(len(queries) * 3)
    return found


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
def test_dinov3_has_the_names_of_its_release_and_of_the_hub(model, hub, tmp_path):
    timm = pytest.importorskip("timm")
    whole = timm.create_model(model, num_classes=0, depth=1, img_size=32)
    state = {key: torch.rand_like(value) for key, value in whole.state_dict().items()}
    foreign = dinov3(state, hub)
    found = timm_names(dict(foreign), whole)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    if hub and "qkvb" not in model:  # the file has biases that this network of timm leaves out
        biases = [f"layer.0.attention.{letter}_proj.bias" for letter in "qv"]
        torch.save(foreign | dict.fromkeys(biases, torch.zeros(384)), tmp_path / "a.pth")
        options = {"depth": 1, "img_size": 32}
        given = {"weights": str(tmp_path / "a.pth"), "out_indices": [0], "options": options}
        backbone = timm_backbone(model, **given)
        assert torch.equal(backbone.state_dict()["net.model.reg_token"], state["reg_token"])
        other = backbone.own_names(foreign)
        assert other.keys() == backbone.state_dict().keys()
