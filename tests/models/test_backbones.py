"""Backbones against torchvision, published sizes and foreign files; checkpointing of every one of
them. Shapes and contracts of all parts: test_parts.py.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import convnext, get_model, get_model_weights, swin_transformer

from engine.build import build
from engine.config import ConfigError, load
from engine.step import View
from engine.weights import WeightsError
from models.backbones.convnext import ConvNeXt
from models.backbones.mit import MiT
from models.backbones.mobilenet import MobileNet
from models.backbones.resnet import ResNet
from models.backbones.swin import Swin
from models.backbones.vit import ViT
from models.blocks import Guide
from models.build import build_segmentor
from models.classifiers.linear import Linear
from models.decoders.fcn import FCN
from models.decoders.upernet import UPerNet
from models.heads.auxiliary import Auxiliary
from models.segmentor import Segmentor
from tests.models.networks import (
    SMALL,
    equal,
    intermediate,
    mmsegmentation,
    saved,
    scrambled,
    swin_mmsegmentation,
    swin_release,
    translate,
)
from tests.runs import ROOT


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# --- published sizes -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Random numbers on the meta device need no time, but this call has no form for it."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)


PUBLISHED = [  # millions of parameters with 150 classes and an auxiliary head of 256 channels on the third map
    (lambda: Swin(size="t", weights="none"), UPerNet, 60),
    (lambda: Swin(size="s", weights="none"), UPerNet, 81),
    (lambda: Swin(size="b", weights="none"), UPerNet, 121),
    (lambda: ConvNeXt(size="t", weights="none"), UPerNet, 60),
    (lambda: ConvNeXt(size="s", weights="none"), UPerNet, 82),
    (lambda: ConvNeXt(size="b", weights="none"), UPerNet, 122),
    (lambda: ResNet(depth=101, deep_stem=True, weights="none"), FCN, 68.6),
]


@pytest.mark.parametrize("backbone, decoder, millions", PUBLISHED)
def test_networks_of_ade20k_have_their_published_size(backbone, decoder, millions, quick):
    with torch.device("meta"):
        backbone = backbone()
        decoder = decoder(in_channels=backbone.channels)
        classifier = Linear(in_channels=decoder.channels, num_classes=150)
        auxiliary = Auxiliary(map_channels=backbone.channels, num_classes=150, stage=3)
    assert decoder.channels == 512
    total = count(backbone, decoder, classifier, auxiliary) / 1e6
    assert round(total, 1 if isinstance(millions, float) else None) == millions


def test_base_networks_have_their_published_size(quick):
    sizes = {
        "upernet_swin_b": 121.3,
        "upernet_convnext_b": 122.1,
        "deeplabv3plus_mobilenet_v2": 5.8,
    }
    for name, millions in sizes.items():
        model = load(ROOT / "configs" / "base" / f"{name}.yaml").model
        with torch.device("meta"):
            classes = [str(k) for k in range(19 if "mobilenet" in name else 150)]
            network = build_segmentor(model, classes, pretrained=False)
        assert round(count(network) / 1e6, 1) == millions


TORCHVISION = [  # its name, ours, what of it is not here
    ("mobilenet_v2", lambda: MobileNet(weights="none"), ("features.18.", "classifier.")),
    ("mobilenet_v3_large", lambda: MobileNet(version="v3_large", weights="none"), ("classifier.",)),
    ("mobilenet_v3_small", lambda: MobileNet(version="v3_small", weights="none"), ("classifier.",)),
    *(
        (f"convnext_{name}", lambda s=name[0]: ConvNeXt(size=s, weights="none"), ("classifier.",))
        for name in ("tiny", "small", "base")
    ),
    *((f"swin_{s}", lambda s=s: Swin(size=s, weights="none"), ("norm.", "head.")) for s in "tsb"),
]


@pytest.mark.parametrize("name, ours, unused", TORCHVISION, ids=[name for name, *_ in TORCHVISION])
def test_tensors_are_those_of_torchvision_of_the_published_number(name, ours, unused, quick):
    with torch.device("meta"):
        theirs, ours = get_model(name, weights=None), ours()
    expected = {
        k: v.shape
        for k, v in theirs.state_dict().items()
        if not k.startswith(unused) and "index" not in k
    }
    found = {
        k: v.shape
        for k, v in ours.state_dict().items()
        if not k.startswith(("norm0", "norm1", "norm2", "norm3"))
    }
    assert found == expected
    assert count(theirs) == get_model_weights(name).IMAGENET1K_V1.meta["num_params"]


# --- equal to torchvision's forward pass -----------------------------------------------------------------------------


def small_torchvision(kind):
    """Torchvision's network of SMALL and the layers after which its stages end."""
    if kind == "swin":
        options = {"num_heads": [1, 2, 4, 8], "window_size": [7, 7], "num_classes": 3}
        return swin_transformer.SwinTransformer(
            [4, 4], SMALL["width"], SMALL["depths"], **options
        ), (1, 3, 5, 7)
    if kind == "convnext":
        widths = [32, 64, 128, 256]
        settings = [
            convnext.CNBlockConfig(c, d, n)
            for c, d, n in zip(widths, [*widths[1:], None], SMALL["depths"])
        ]
        return convnext.ConvNeXt(settings, num_classes=3), (1, 3, 5, 7)
    taps = {
        "mobilenet_v2": (3, 6, 13, 17),
        "mobilenet_v3_large": (3, 6, 12, 16),
        "mobilenet_v3_small": (1, 3, 8, 12),
    }
    return get_model(kind, weights=None, num_classes=3), taps[kind]


def our_small(kind, weights, **options):
    if kind.startswith("mobilenet"):
        return MobileNet(version=kind.removeprefix("mobilenet_"), weights=weights, **options)
    return {"swin": Swin, "convnext": ConvNeXt}[kind](weights=weights, **SMALL, **options)


KINDS = ["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "convnext", "swin"]


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
    """Kind, torchvision's network of random weights, its taps, ours with the same weights from a file."""
    torch.manual_seed(0)
    network, taps = small_torchvision(request.param)
    scrambled(network)
    path = saved(
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}},
        tmp_path_factory.mktemp("w"),
    )
    return request.param, network, taps, our_small(request.param, path).eval()


def before_norms(backbone, image):
    """Maps as they are before norm0 to norm3, (B, C, h, w)."""
    norms = [getattr(backbone, f"norm{i}") for i in range(4) if hasattr(backbone, f"norm{i}")]
    entered = []
    hooks = [norm.register_forward_pre_hook(lambda m, a: entered.append(a[0])) for norm in norms]
    maps = backbone(image)
    for hook in hooks:
        hook.remove()
    return entered or maps


@torch.no_grad()
def test_maps_are_torchvisions_own_features(reference):
    kind, network, taps, backbone = reference
    image = torch.rand(2, 3, 64, 96)
    expected = intermediate(network, taps, backbone.normalize(image))
    found = before_norms(backbone, image)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    shapes = [(2, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32))]
    assert [x.shape for x in backbone(image)] == shapes
    if kind in ("swin", "convnext"):  # the norm of each map, on its channels
        maps, eps = backbone(image), 1e-5 if kind == "swin" else 1e-6
        for i, (x, y) in enumerate(zip(maps, expected)):
            y = y if kind == "swin" else y.permute(0, 2, 3, 1)
            norm = getattr(backbone, f"norm{i}")
            y = F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, eps).permute(0, 3, 1, 2)
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_odd_sizes_round_up_and_fill_with_zeros(reference):
    kind, network, taps, backbone = reference
    for size in [(33, 47), (61, 66), (5, 9)]:
        image = torch.rand(1, 3, *size)
        maps = backbone(image)
        assert [x.shape[-2:] for x in maps] == [
            tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)
        ]
        assert all(x.isfinite().all() for x in maps)
        if kind == "swin":  # torchvision itself fills up windows and pairs, but not patches
            x = F.pad(backbone.normalize(image), (0, -size[1] % 4, 0, -size[0] % 4))
            expected = intermediate(network, taps, x)
            for x, y in zip(before_norms(backbone, image), expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        if kind == "convnext":
            x = network.features[0](
                F.pad(backbone.normalize(image), (0, -size[1] % 4, 0, -size[0] % 4))
            )
            x = network.features[2][0](network.features[1](x))
            x = network.features[2][1](F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
            torch.testing.assert_close(
                before_norms(backbone, image)[1], network.features[3](x), rtol=1e-4, atol=1e-4
            )


# --- drop path -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, default", [(ConvNeXt, 0.4), (Swin, 0.3)])
def test_drop_path_grows_over_the_depth_from_its_published_default(cls, default, quick):
    with torch.device("meta"):
        for options, last in (({}, default), ({"drop_path": 0.1}, 0.1)):
            network = cls(weights="none", **options)
            rates = [
                module.stochastic_depth.p
                for module in network.modules()
                if hasattr(module, "stochastic_depth")
            ]
            blocks = len(rates)
            assert blocks == (18 if cls is ConvNeXt else 12)
            assert rates == pytest.approx([last * i / (blocks - 1) for i in range(blocks)])
        assert ConvNeXt(size="s", weights="none").features[7][
            -1
        ].stochastic_depth.p == pytest.approx(0.3)


WRONG = [
    (cls, {key: value})
    for cls in (ConvNeXt, Swin)
    for key, value in (
        ("depths", [2, 2]),
        ("depths", [2, 2, 0, 2]),
        ("depths", [1] * 5),
        ("width", -32),
    )
]


@pytest.mark.parametrize("cls, wrong", [*WRONG, (Swin, {"width": 48})])
def test_wrong_widths_and_depths_are_an_error(cls, wrong):
    with pytest.raises(ConfigError, match=r"a list of length 4|must be an int in|multiple of 32"):
        build(
            "models.backbones",
            {"name": f"{cls.__name__.lower()}.{cls.__name__}", "weights": "none", **wrong},
        )


# --- files of others -------------------------------------------------------------------------------------------------


def convnext_release(state):
    table = {"features.0.": "downsample_layers.0."}
    for s in range(4):
        table |= {
            f"features.{2 * s + 1}.": f"stages.{s}.",
            f"features.{2 * s}.": f"downsample_layers.{s}.",
        }
    table |= {
        ".block.0.": ".dwconv.",
        ".block.2.": ".norm.",
        ".block.3.": ".pwconv1.",
        ".block.5.": ".pwconv2.",
    }
    state = translate(state, table | {"layer_scale": "gamma"})
    state = {
        key: value.flatten() if key.endswith("gamma") else value for key, value in state.items()
    }
    extra = {"norm.weight": torch.ones(3), "head.weight": torch.ones(3)}
    return {"model": state | extra}


def convnext_mmsegmentation(state):
    state = translate(
        convnext_release(state)["model"], {"dwconv": "depthwise_conv", "pwconv": "pointwise_conv"}
    )
    norms = {f"norm{i}.weight": torch.full((32 * 2**i,), 2.0 + i) for i in range(4)}
    norms |= {f"norm{i}.bias": torch.full((32 * 2**i,), 3.0 + i) for i in range(4)}
    return mmsegmentation(
        {k: v for k, v in state.items() if not k.startswith(("norm.", "head."))} | norms
    )


def convnext_mmpretrain(state):
    """Pointwise layers as 1x1 convolutions."""
    state = convnext_mmsegmentation(state)["state_dict"]
    return {
        k: v[..., None, None] if "pointwise_conv" in k and v.ndim == 2 else v
        for k, v in state.items()
    }


FOREIGN = [
    (ConvNeXt, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}, 8),
    (ConvNeXt, convnext_release, 8),
    (ConvNeXt, convnext_mmsegmentation, 0),
    (ConvNeXt, convnext_mmpretrain, 0),
    (Swin, lambda state: state | {"norm.weight": torch.ones(3), "head.weight": torch.ones(3)}, 8),
    (Swin, swin_release, 8),
    (Swin, swin_mmsegmentation, 8),
]


@pytest.mark.parametrize("cls, write, initial", FOREIGN)
def test_files_of_others_load_with_nothing_missing(cls, write, initial, tmp_path, caplog):
    ours = scrambled(cls(weights="none", **SMALL))
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("norm")}
    path = saved(write(state), tmp_path)
    with caplog.at_level("INFO", "engine"):
        other = cls(weights=path, **SMALL)
    assert f"{len(ours.state_dict()) - initial} keys loaded, {initial} keep" in caplog.text
    assert ("3 keys of its heads are left out" in caplog.text) == write.__name__.startswith(
        ("convnext_mm", "swin_mm")
    )
    found = other.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    if not initial:
        assert (other.norm2.weight == 4.0).all() and (other.norm3.bias == 6.0).all()
    broken = write(
        {
            k: v
            for k, v in state.items()
            if k != "features.3.0.norm1.bias" and "features.3.0.block.0.b" not in k
        }
    )
    with pytest.raises(WeightsError, match=r"1 missing \(features\.3\.0\.(norm1|block\.0)\.bias"):
        cls(weights=saved(broken, tmp_path), **SMALL)


@torch.no_grad()
@pytest.mark.parametrize("cls", [ConvNeXt, Swin])
def test_maps_are_those_of_hugging_face(cls, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if cls is Swin:
        config = transformers.SwinConfig(
            embed_dim=32, depths=SMALL["depths"], num_heads=[1, 2, 4, 8]
        )
        reference = scrambled(transformers.SwinForImageClassification(config))
    else:
        config = transformers.ConvNextConfig(
            hidden_sizes=[32, 64, 128, 256], depths=SMALL["depths"]
        )
        reference = scrambled(transformers.ConvNextForImageClassification(config))
    reference.save_pretrained(tmp_path)  # the names of a file are not those in memory
    backbone = cls(weights=str(tmp_path / "model.safetensors"), **SMALL).eval()
    image = torch.rand(2, 3, 224, 224)
    states = reference(backbone.normalize(image), output_hidden_states=True)
    found = before_norms(backbone, image)
    if (
        cls is Swin
    ):  # hidden states come after the merging: those of stages 1 to 3 are inputs of the next stage
        expected = states.reshaped_hidden_states
        merged = [backbone.features[2 * i + 2](found[i]).permute(0, 3, 1, 2) for i in range(3)]
        pairs = zip([*merged, found[3].permute(0, 3, 1, 2)], expected[1:], strict=True)
    else:
        pairs = zip(found, states.hidden_states[1:], strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


# --- checkpointing ---------------------------------------------------------------------------------------------------


def guide(stage, block, x, keys):
    """A bias of attention that depends on what enters a block: gradients flow through it too."""
    small = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), keys).flatten(2)[:, None, 0]  # (B, 1, M)
    return (
        Guide(bias=small[:, :, None], values=1 + small[..., None].tanh())
        if block == 1
        else small[:, :, None]
    )


CHECKPOINTED = {
    "resnet": lambda **o: ResNet(
        depth=18, deep_stem=True, ibn="a", stem="per_domain", output_stride=8, weights="none", **o
    ),
    "mobilenet_v2": lambda **o: MobileNet(width=0.25, weights="none", **o),
    "mobilenet_v3": lambda **o: MobileNet(
        version="v3_small", width=0.5, output_stride=16, weights="none", **o
    ),
    "convnext": lambda **o: ConvNeXt(weights="none", drop_path=0.5, **SMALL, **o),
    "swin": lambda **o: Swin(weights="none", drop_path=0.5, **SMALL, **o),
    "mit": lambda **o: MiT(size="b0", drop_path=0.5, weights="none", **o),
    "vit": lambda **o: ViT(size="t", drop_path=0.5, weights="none", **o),
}


class Kept:
    """Bytes of the tensors that a forward pass keeps for the backward pass outside of checkpoints."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def pack(self, x):
        self.bytes += x.numel() * x.element_size()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def step(make, checkpointing, frozen, autocast):
    """Two views, one backward pass -> maps, gradients, state, the next random number, bytes kept."""
    torch.manual_seed(3)
    backbone = make(checkpointing=checkpointing).train()
    if not autocast:
        backbone.double()
    for parameter in backbone.parameters():
        if parameter.ndim == 3 and parameter.shape[1:] == (1, 1):
            nn.init.ones_(parameter)  # layer scale: 1e-6 would hide the blocks
    for norm in backbone.modules():
        if frozen and isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    given = {"bias": guide} if backbone.depths else {}
    domains = [{"domain": name} if backbone.per_domain else {} for name in ("source", "target")]
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(
        2, 2, 3, 48, 64, generator=generator, dtype=torch.float32 if autocast else torch.float64
    )
    with (
        Kept() as kept,
        torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext(),
    ):
        maps = [
            x for image, domain in zip(images, domains) for x in backbone(image, **domain, **given)
        ]
        loss = sum((x.float() if autocast else x).square().mean() for x in maps)
    loss.backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return maps, gradients, backbone.state_dict(), torch.rand(3), kept.bytes


@pytest.mark.parametrize(
    "name, frozen", [*((name, False) for name in CHECKPOINTED), ("mobilenet_v2", True)]
)
def test_checkpointing_changes_memory_alone(name, frozen):
    plain, less = (step(CHECKPOINTED[name], on, frozen, autocast=False) for on in (False, True))
    assert equal(plain[0], less[0])
    assert {*plain[1]} == {*less[1]} and any(g.abs().sum() > 0 for g in less[1].values())
    for key, value in plain[1].items():
        torch.testing.assert_close(less[1][key], value, rtol=1e-6, atol=1e-9)
    moved = [key for key in plain[2] if "running" in key or "tracked" in key]
    assert bool(moved) == (name in ("resnet", "mobilenet_v2", "mobilenet_v3"))
    assert all(torch.equal(less[2][key], value) for key, value in plain[2].items())
    assert torch.equal(plain[3], less[3])
    assert less[4] < 0.6 * plain[4], (less[4], plain[4])


def test_checkpointing_keeps_autocast():
    plain, less = (step(CHECKPOINTED["resnet"], on, False, autocast=True) for on in (False, True))
    assert equal(plain[0], less[0]) and all(
        torch.equal(less[1][key], value) for key, value in plain[1].items()
    )


def test_blocks_are_computed_twice_in_training_alone():
    calls = []
    backbone = CHECKPOINTED["mobilenet_v2"](checkpointing=True)
    backbone.features[4].register_forward_hook(lambda *_: calls.append(1))
    image = torch.rand(2, 3, 32, 32)
    backbone.train()(image)[-1].sum().backward()
    assert len(calls) in (
        1,
        2,
    )  # the second time it may stop as soon as the backward pass has what it needs
    trained = len(calls)
    backbone.eval()(image)[-1].sum().backward()
    assert len(calls) == trained + 1
    with torch.no_grad():
        backbone.train()(image)
    assert len(calls) == trained + 2


def test_views_that_move_no_statistics_move_none_when_blocks_are_computed_again():
    views = {"source": View(torch.rand(2, 3, 32, 32)), "target": View(torch.rand(2, 3, 32, 32))}
    states = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        backbone = MobileNet(width=0.25, weights="none", checkpointing=checkpointing)
        decoder = FCN(in_channels=backbone.channels, width=8, dropout=0.0)
        network = Segmentor(
            backbone, decoder, Linear(in_channels=8, num_classes=3), bn_views=["target"]
        ).train()
        sum(output.logits.square().mean() for output in network(views).values()).backward()
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 and norm.num_batches_tracked == 1 for norm in norms)
