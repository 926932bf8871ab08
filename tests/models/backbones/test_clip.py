"""CLIP's image towers against open_clip's own operations; random weights, small sizes."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import weights
from engine.build import build
from engine.config import Config, ConfigError
from engine.errors import UserError
from engine.weights import WeightsError
from models.backbones.clip import MEAN, STD, ResNet, ViT, positions_at
from models.build import build_segmentor

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
RN = {"image_size": 64, "layers": [1, 2, 2, 3], "width": 16, "head_width": 64, "patch_size": None}
VIT = {"image_size": 64, "layers": 6, "width": 32, "head_width": 16, "patch_size": 16}
MODELS = {
    "tiny-RN": {"embed_dim": 24, "vision_cfg": RN},
    "tiny-RN-32": {"embed_dim": 24, "vision_cfg": RN | {"image_size": 32}},
    "tiny-ViT": {"embed_dim": 24, "vision_cfg": VIT},
    "tiny-ViT-quickgelu": {"embed_dim": 24, "vision_cfg": VIT, "quick_gelu": True},
    "tiny-ViT-14": {"embed_dim": 24, "vision_cfg": VIT | {"patch_size": 14, "image_size": 56}},
    "tiny-ViT-scale": {"embed_dim": 24, "vision_cfg": VIT | {"ls_init_value": 0.3}},
    "tiny-ViT-pooler": {"embed_dim": 24, "vision_cfg": VIT | {"attentional_pool": True}},
}


@pytest.fixture(autouse=True, scope="module")
def tiny_models(tmp_path_factory):
    """Small models that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config | {"text_cfg": TEXT}))
    open_clip.add_model_config(folder)


def reference(name, tmp_path, **options):
    """open_clip's whole CLIP with random weights that differ everywhere, in eval mode, and a file of them."""
    torch.manual_seed(1)
    model = open_clip.create_model(name, **options).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif key.endswith("bn3.weight"):
                tensor.fill_(0.5)
    path = tmp_path / "clip.pt"
    torch.save(model.state_dict(), path)
    return model, str(path)


def normalized(image):
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def intermediates(model, image, indices):
    return model.visual.forward_intermediates(
        normalized(image), indices=indices, intermediates_only=True
    )["image_intermediates"]


# --- maps ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_resnet_maps_are_those_of_open_clip(size, tmp_path):
    model, path = reference("tiny-RN", tmp_path)
    backbone = ResNet(model="tiny-RN", weights=path).eval()
    image = torch.rand(2, 3, *size)
    for actual, expected in zip(
        backbone(image), intermediates(model, image, [1, 2, 3, 4]), strict=True
    ):
        close(actual, expected)
    assert backbone.channels == [64, 128, 256, 512] and backbone.joint == 24


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["tiny-ViT", "tiny-ViT-quickgelu", "tiny-ViT-14", "tiny-ViT-scale"]
)
def test_vit_maps_are_those_of_open_clip_at_the_native_size(name, tmp_path):
    model, path = reference(name, tmp_path)
    backbone = ViT(model=name, weights=path).eval()
    image = torch.rand(2, 3, *model.visual.image_size)
    assert backbone.taps == [1, 2, 3, 5]
    for actual, expected in zip(
        backbone(image), intermediates(model, image, [1, 2, 3, 5]), strict=True
    ):
        close(actual, expected)
    assert backbone.strides == [14 if name.endswith("14") else 16] * 4


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 160), (32, 48), (128, 64)])
def test_vit_maps_are_those_of_open_clip_at_other_sizes(size, tmp_path):
    """open_clip interpolates position embeddings when it loads weights into a model of another size."""
    _, path = reference("tiny-ViT", tmp_path)
    model = open_clip.create_model("tiny-ViT", pretrained=path, force_image_size=size).eval()
    backbone = ViT(model="tiny-ViT", weights=path).eval()
    image = torch.rand(2, 3, *size)
    for actual, expected in zip(
        backbone(image), intermediates(model, image, [1, 2, 3, 5]), strict=True
    ):
        close(actual, expected)


def test_position_embeddings_are_interpolated_row_by_row():
    """A pattern that varies along the width alone still does, on a wide grid and on a high one."""
    backbone = ViT(model="tiny-ViT", weights="none")
    ramp = torch.arange(4.0).repeat(4)[:, None].expand(16, 32)
    backbone.visual.positional_embedding.data[1:] = ramp
    for grid in [(3, 9), (9, 3)]:
        table = backbone.visual.positional_embedding[None]
        rows = positions_at(table, backbone.visual.grid_size, grid)[0, 1:].unflatten(0, grid)[
            ..., 0
        ]
        close(rows, rows[:1].expand_as(rows))
        assert (rows.diff(dim=1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(97, 65), (33, 50), (64, 96), (31, 17)])
@pytest.mark.parametrize("name", ["tiny-RN", "tiny-ViT", "tiny-ViT-14"])
def test_towers_take_any_size_and_round_up(name, size):
    backbone = (ResNet if "RN" in name else ViT)(model=name, weights="none").eval()
    maps, dense = backbone(torch.rand(2, 3, *size)), backbone.dense(torch.rand(2, 3, *size))
    for x, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert x.shape == (2, channels, *(-(-n // stride) for n in size)) and x.isfinite().all()
    assert dense.shape == (2, 24, *maps[-1].shape[-2:])
    close(dense.norm(dim=1), torch.ones_like(dense[:, 0]))


@torch.no_grad()
def test_vit_of_an_image_between_two_sizes_is_that_of_the_enlarged_image():
    backbone = ViT(model="tiny-ViT", weights="none").eval()
    image = torch.rand(1, 3, 70, 49)
    larger = F.interpolate(image, (80, 64), mode="bilinear", align_corners=False)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), backbone(larger), strict=True))


def test_vit_taps_name_blocks():
    backbone = ViT(model="tiny-ViT", taps=[0, 4], weights="none")
    assert (
        len(backbone(torch.rand(1, 3, 32, 32)))
        == len(backbone.channels)
        == len(backbone.strides)
        == 2
    )
    for taps in ([4, 1], [2, 2], [3, 6], [-1]):
        with pytest.raises(ValueError, match="from 0 to 5"):
            ViT(model="tiny-ViT", taps=taps, weights="none")
    with torch.device("meta"):
        assert ViT(weights="none").taps == [3, 5, 7, 11]
        assert ViT(model="ViT-L-14-quickgelu", weights="none").taps == [7, 11, 15, 23]


# --- output stride ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (97, 65), (130, 33)])
def test_every_second_cell_at_output_stride_16_is_that_of_stride_32(size, tmp_path):
    _, path = reference("tiny-RN", tmp_path)
    fine, coarse = (ResNet(model="tiny-RN", output_stride=s, weights=path).eval() for s in (16, 32))
    image = torch.rand(2, 3, *size)
    a, b = fine(image), coarse(image)
    assert fine.strides == [4, 8, 16, 16] and a[3].shape[-2:] == a[2].shape[-2:]
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    close(a[3][..., ::2, ::2], b[3])
    close(fine.dense(image)[..., ::2, ::2], coarse.dense(image))
    assert a[3][..., 1::2, :].std() > 0.5 * b[3].std()
    assert {*fine.state_dict()} == {*coarse.state_dict()}


# --- dense features --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dense_of_a_single_cell_is_encode_image_of_the_resnet(tmp_path):
    """One cell attends to itself and its own mean alone; without position embeddings nothing else is left."""
    model, _ = reference("tiny-RN-32", tmp_path)
    model.visual.attnpool.positional_embedding.zero_()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    backbone = ResNet(model="tiny-RN-32", weights=str(tmp_path / "clip.pt")).eval()
    image = torch.rand(3, 3, 32, 32)
    close(backbone.dense(image)[..., 0, 0], model.encode_image(normalized(image), normalize=True))


@torch.no_grad()
def test_dense_of_the_resnet_is_the_attention_pool_of_every_cell(tmp_path):
    model, path = reference("tiny-RN", tmp_path)
    backbone = ResNet(model="tiny-RN", weights=path).eval()
    image = torch.rand(2, 3, 64, 96)
    cells = intermediates(model, image, [4])[0]  # (B, 512, 2, 3)
    pool = model.visual.attnpool
    pool.positional_embedding = nn.Parameter(torch.zeros(2, 512))
    single = pool(cells.movedim(1, -1).reshape(-1, 512, 1, 1))  # every cell as a map of its own
    close(backbone.dense(image), F.normalize(single, dim=-1).view(2, 2, 3, 24).movedim(-1, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-ViT-quickgelu", "tiny-ViT-scale"])
def test_dense_of_the_vit_is_the_last_attention_of_every_token_to_itself(name, tmp_path):
    """With a mask that leaves every token only itself, open_clip's own attention returns its projected values."""
    model, path = reference(name, tmp_path)
    backbone = ViT(model=name, weights=path).eval()
    image = torch.rand(2, 3, 64, 64)
    trunk = model.visual
    out = trunk.forward_intermediates(
        normalized(image),
        indices=[4],
        intermediates_only=True,
        output_extra_tokens=True,
        output_fmt="NLC",
    )
    tokens = torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], 1)
    last = trunk.transformer.resblocks[-1]
    close(
        trunk._pool(last(tokens))[0] @ trunk.proj, model.encode_image(normalized(image))
    )  # these are its tokens
    alone = torch.full((17, 17), -torch.inf).fill_diagonal_(0)
    values = last.ls_1(last.attention(last.ln_1(tokens), attn_mask=alone))
    expected = (
        F.normalize(trunk.ln_post(values) @ trunk.proj, dim=-1)[:, 1:]
        .view(2, 4, 4, 24)
        .movedim(-1, 1)
    )
    close(backbone.dense(image), expected)


@torch.no_grad()
def test_dense_is_normalised_in_float32_under_autocast(tmp_path):
    for backbone in (
        ResNet(model="tiny-RN", weights="none").eval(),
        ViT(model="tiny-ViT", weights="none").eval(),
    ):
        image = torch.rand(1, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            low = backbone.dense(image)
        assert low.dtype == torch.float32
        assert (low * backbone.dense(image)).sum(1).min() > 0.99


# --- weights ---------------------------------------------------------------------------------------------------------


def half(state):
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


FORMS = {
    "whole": dict,
    "visual alone": lambda s: {k: v for k, v in s.items() if k.startswith("visual.")},
    "visual without prefix": lambda s: {k[7:]: v for k, v in s.items() if k.startswith("visual.")},
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "module": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "openai": lambda s: (
        half(s) | {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(64)}
    ),
}


@pytest.mark.parametrize("name", ["tiny-RN", "tiny-ViT-quickgelu"])
@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_weights_of_each_form_load_completely(name, form, tmp_path, caplog):
    model, _ = reference(name, tmp_path)
    state = model.state_dict()
    path = tmp_path / "form.safetensors"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(FORMS[form](state), path := tmp_path / "form.pt")
    with caplog.at_level("INFO", "engine"):
        backbone = build(
            "models.backbones",
            {"name": f"clip.{name[5:8].strip('-').replace('RN', 'ResNet')}"}
            | {"model": name, "weights": str(path)},
        )
    assert "0 keep their initial values" in caplog.text
    tolerance = 1e-3 if form == "openai" else 0
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["tiny-RN", "tiny-ViT"])
def test_no_text_tower_is_kept_and_nothing_but_the_visual_trunk(name):
    backbone = (ResNet if "RN" in name else ViT)(model=name, weights="none")
    whole = {key for key in open_clip.create_model(name).state_dict() if key.startswith("visual.")}
    dropped = {
        k for k in whole if k.split(".")[2:3] in (["q_proj"], ["k_proj"]) or "attnpool.pos" in k
    }
    assert {*backbone.state_dict()} == whole - dropped and (len(dropped) == 5) == ("RN" in name)


def test_incomplete_or_foreign_weights_are_an_error(tmp_path):
    model, path = reference("tiny-ViT", tmp_path)
    state = model.state_dict()
    torch.save({k: v for k, v in state.items() if "resblocks.3.ln_1" not in k}, path)
    with pytest.raises(WeightsError, match=r"2 missing .*resblocks\.3\.ln_1"):
        ViT(model="tiny-ViT", weights=path)
    torch.save(state, path)
    with pytest.raises(WeightsError, match="of another shape"):
        ViT(model="tiny-ViT-14", weights=path)
    with pytest.raises(WeightsError, match=r"no file opnai.*openai, "):
        with torch.device("meta"):
            ViT(model="ViT-B-16-quickgelu", weights="opnai")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("cls, name", [(ResNet, "tiny-RN"), (ViT, "tiny-ViT")])
def test_torchscript_archives_are_refused_with_the_way_to_convert_them(cls, name, tmp_path):
    model, _ = reference(name, tmp_path)

    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = model.visual
            self.register_buffer("input_resolution", torch.tensor(64))

        def forward(self, x):
            return x * self.input_resolution

    torch.jit.save(torch.jit.trace(Archive(), torch.rand(2)), tmp_path / "RN50.pt")
    with pytest.raises(WeightsError, match=r"TorchScript.*trust.*torch\.save\(torch\.jit\.load\("):
        cls(model=name, weights=str(tmp_path / "RN50.pt"))
    # What the message says to do.
    state = torch.jit.load(tmp_path / "RN50.pt", map_location="cpu").state_dict()
    torch.save(state, tmp_path / "converted.pt")
    backbone = cls(
        model=f"{name}{'-quickgelu' * (cls is ViT)}", weights=str(tmp_path / "converted.pt")
    )
    assert torch.equal(backbone.visual.conv1.weight, model.visual.conv1.weight)


def test_the_wrong_activation_is_not_silent(tmp_path, caplog, monkeypatch):
    model, path = reference("tiny-ViT", tmp_path)
    with (
        torch.device("meta"),
        pytest.raises(WeightsError, match=r"QuickGELU.*take model: ViT-B-16-quickgelu"),
    ):
        monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda tag: path)
        ViT(model="ViT-B-16", weights="openai")
    with (
        torch.device("meta"),
        pytest.raises(WeightsError, match="does not fit"),
    ):  # the right one gets further
        ViT(model="ViT-B-16-quickgelu", weights="openai")
    with caplog.at_level("INFO", "engine"):
        ViT(model="tiny-ViT", weights=path)
    assert "does not say if it was trained with GELU or QuickGELU; tiny-ViT has GELU" in caplog.text
    torch.save(model.state_dict() | {"input_resolution": torch.tensor(64)}, path)
    with pytest.raises(
        WeightsError, match=r"trained with QuickGELU.*take model: tiny-ViT-quickgelu"
    ):
        ViT(model="tiny-ViT", weights=path)
    ViT(model="tiny-ViT-quickgelu", weights=path)
    assert (
        sum(
            isinstance(m, open_clip.transformer.QuickGELU)
            for m in ViT(model="tiny-ViT-quickgelu", weights="none").modules()
        )
        == 6
    )


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def offline(tag):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", offline)
    with (
        torch.device("meta"),
        pytest.raises(WeightsError, match=r"could not download openai \(.*no network\).*PATH"),
    ):
        ResNet(model="RN50", weights="openai")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("clip.ViT", {"model": "ViT-B16"}, "did you mean ViT-B-16"),
        ("clip.ViT", {"model": "RN50"}, "RN50 is not a plain clip.ViT"),
        ("clip.ResNet", {"model": "ViT-B-16"}, "not a plain clip.ResNet"),
        ("clip.ViT", {"model": "EVA02-L-14"}, "not a plain clip.ViT"),
        ("clip.ViT", {"model": "tiny-ViT-pooler"}, "not a plain clip.ViT"),
        ("clip.ResNet", {"output_stride": 8}, "output_stride"),
    ],
)
def test_wrong_models_and_options_give_one_clear_message(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build("models.backbones", {"name": name, "weights": "none", **options})


def test_without_open_clip_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.pretrained", None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        ResNet(weights="none")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, name", [(ResNet, "tiny-RN"), (ViT, "tiny-ViT")])
def test_gradients_reach_all_that_is_trained_and_only_that(cls, name):
    backbone = cls(model=name, weights="none")
    sum(x.square().sum() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
    trained = {key for key, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in backbone.named_parameters() if p.grad is not None}
    frozen = {key.split(".")[1] for key, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == ({"attnpool"} if cls is ResNet else {"proj", "ln_post"})


def test_blocks_after_the_last_tap_are_not_trained():
    backbone = ViT(model="tiny-ViT", taps=[1, 3], weights="none")
    backbone(torch.rand(1, 3, 32, 32))[-1].sum().backward()
    blocks = backbone.visual.transformer.resblocks
    assert [
        all(p.requires_grad and p.grad is not None for p in block.parameters()) for block in blocks
    ] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("cls, name", [(ResNet, "tiny-RN"), (ViT, "tiny-ViT")])
def test_a_frozen_tower_changes_nothing_and_statistics_move_only_in_training(cls, name):
    backbone = cls(model=name, weights="none")
    tower = cls(model=name, weights="none").requires_grad_(False).eval()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    assert not tower.dense(torch.rand(2, 3, 64, 64)).requires_grad
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())
    norms = {k: v.clone() for k, v in backbone.state_dict().items() if "running_mean" in k}
    backbone.train()(torch.rand(2, 3, 64, 64))
    assert all(not torch.equal(backbone.state_dict()[k], v) for k, v in norms.items())
    assert bool(norms) == (cls is ResNet)


def test_rn50_and_vit_b_have_their_published_sizes():
    with torch.device("meta"):
        resnet, vit = ResNet(weights="none"), ViT(weights="none")
    pool = 2 * (2048 * 2048 + 2048) + 50 * 2048  # queries, keys and positions, which are left out
    assert sum(p.numel() for p in resnet.parameters()) + pool == 38_316_896
    assert sum(p.numel() for p in vit.parameters()) == 86_192_640
    assert (resnet.joint, resnet.channels) == (1024, [256, 512, 1024, 2048])
    assert (vit.joint, vit.channels, vit.strides) == (512, [768] * 4, [16] * 4)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "clip.ResNet", "model": "tiny-RN", "output_stride": 16},
        {"name": "clip.ViT", "model": "tiny-ViT-quickgelu"},
        {"name": "timm.Timm", "model": "test_vit"},
    ],
)
def test_a_segmentor_comes_back_from_its_state_dict_alone(spec, tmp_path):
    """A checkpoint is restored with weights: none, so nothing else may depend on that option."""
    model = Config(
        init="none",
        backbone=spec | {"weights": "none"},
        decoder={"name": "deeplabv3plus.DeepLabV3Plus", "width": 8},
        classifier={"name": "linear.Linear"},
        frozen_bn=[],
        frozen=[],
        cache="none",
        lora=0,
        bn_views=[],
        channels_last=True,
        compile=False,
        heads=Config(),
    )
    first, second = (build_segmentor(model, "abc").eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    image = torch.rand(1, 3, 70, 49)
    assert torch.equal(first.segment(image).logits, second.segment(image).logits)


@pytest.mark.parametrize(
    "package, spec",
    [
        ("models.backbones", {"name": "timm.Timm", "model": "resnet10t.c3_in1k"}),
        ("models.backbones", {"name": "clip.ResNet", "model": "RN50", "weights": "openai"}),
    ],
)
def test_without_a_network_weights_fail_at_once_with_the_way_out(
    tmp_path, monkeypatch, package, spec
):
    from huggingface_hub import constants

    def unreachable(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "urlopen", unreachable)
    monkeypatch.setattr("time.sleep", pytest.fail)  # between retries
    with pytest.raises(UserError, match="weights=PATH"):
        build(package, spec)
    assert constants.HF_HUB_OFFLINE
