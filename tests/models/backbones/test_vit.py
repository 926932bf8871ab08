"""Plain vision transformers against torchvision's and timm's, weights of both releases, and the attention bias."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import ViT_B_16_Weights, ViT_L_16_Weights

from engine.build import build
from engine.config import ConfigError
from engine.weights import WeightsError
from models.backbones import vit
from models.backbones.vit import ViT

C, DEPTH, HEADS = 32, 6, 2
TINY = {"size": "s", "positions": 32, "weights": "none"}  # of patches of 16: a grid of 2 x 2


@pytest.fixture
def tiny(monkeypatch):
    """ViT-S is small: 32 channels, 6 blocks, 2 heads."""
    monkeypatch.setitem(vit.SIZES, "s", (C, DEPTH, HEADS))


def randomized(module):
    """Also norms, biases and factors differ from layer to layer, so that a swap shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.shape[0] == 1:  # tokens and positions
                parameter.normal_()
            else:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return module.eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- sizes and names -------------------------------------------------------------------------------------------------

PUBLISHED = {  # with a head of 1000 classes: torchvision's; DeiT's tiny and small (Touvron et al., 2021) as timm counts
    "t": 5_717_416,
    "s": 22_050_664,
    "b": 86_567_656,
    "l": 304_326_632,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_vit_has_its_published_size(size):
    with torch.device("meta"):
        backbone = ViT(size=size, weights="none")
        head = nn.Linear(backbone.channels[-1], 1000)
    assert count(backbone) + count(head) == PUBLISHED[size]
    for letter, weights in {"b": ViT_B_16_Weights, "l": ViT_L_16_Weights}.items():
        assert weights.IMAGENET1K_V1.meta["num_params"] == PUBLISHED[letter]
        assert weights.IMAGENET1K_V1.url == vit.URLS[letter, 16]


@pytest.mark.parametrize("size, name", [("s", "small"), ("b", "base"), ("l", "large")])
def test_dinov2_has_the_size_that_timm_gives_it(size, name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"size": size, "patch": 14, "positions": 518, "layer_scale": True, "weights": "none"}
    with torch.device("meta"):
        expected = count(timm.create_model(f"vit_{name}_patch14_dinov2", pretrained=False))
        with_registers = count(
            timm.create_model(f"vit_{name}_patch14_reg4_dinov2", pretrained=False)
        )
        plain, registers = ViT(**options), ViT(**options, registers=4)
    assert count(plain) == expected
    assert (
        count(registers) == with_registers + plain.channels[0]
    )  # timm adds the position to the class token there


def test_names_and_shapes_are_those_of_torchvision():
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16().state_dict()
        ours = ViT(size="b", weights="none")
    old = {
        k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
        for k, v in theirs.items()
    }
    assert old.keys() != theirs.keys()
    for state in (theirs, old):
        state = {
            k: v.shape for k, v in vit.our_names(state, ours).items() if not k.startswith("heads.")
        }
        assert state == {k: v.shape for k, v in ours.state_dict().items()}


def dinov2_names(depth, registers):
    """The keys of a file of DINOv2, spelled out."""
    names = {"cls_token", "pos_embed", "mask_token"} | ({"register_tokens"} if registers else set())
    layers = ["patch_embed.proj", "norm"]
    for i in range(depth):
        layers += [
            f"blocks.{i}.{n}"
            for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        ]
        names |= {f"blocks.{i}.ls1.gamma", f"blocks.{i}.ls2.gamma"}
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("registers", [0, 4])
def test_names_are_those_of_dinov2(registers):
    with torch.device("meta"):
        state = ViT(
            patch=14, positions=518, layer_scale=True, registers=registers, weights="none"
        ).state_dict()
    assert {*state, "mask_token"} == dinov2_names(12, registers)
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 768)


def torchvision_tiny(image_size=32):
    model = torchvision.models.VisionTransformer(
        image_size, 16, DEPTH, HEADS, C, 4 * C, num_classes=7
    )
    return randomized(model)


def dinov2_file(path, registers):
    """Random weights with the names of DINOv2: patch 14, images of 56 pixels."""
    options = {**TINY, "patch": 14, "positions": 56, "layer_scale": True, "registers": registers}
    state = {**randomized(ViT(**options)).state_dict(), "mask_token": torch.zeros(1, C)}
    assert state.keys() == dinov2_names(DEPTH, registers)
    torch.save(state, path)
    return {**options, "weights": str(path)}, state


def test_every_key_of_a_file_is_explained(tiny, tmp_path, caplog):
    path = tmp_path / "weights.pth"
    model = torchvision_tiny()
    with caplog.at_level("INFO", "engine"):
        torch.save(model.state_dict(), path)
        ViT(**{**TINY, "weights": str(path)})
        options, state = dinov2_file(path, registers=4)
        other = ViT(**options)
    keys = [record.message.partition("weights.pth: ")[2] for record in caplog.records]
    assert keys == [
        f"{n} keys loaded, 0 keep their initial values"
        for n in (4 + 12 * DEPTH + 2, 5 + 14 * DEPTH + 2)
    ]
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    with pytest.raises(WeightsError, match=r"12 missing \(blocks\.0\.ls1\.gamma"):
        torch.save(model.state_dict(), path)
        ViT(**{**TINY, "weights": str(path), "layer_scale": True})
    with pytest.raises(WeightsError, match=r"1 unexpected \(register_tokens\)"):
        torch.save(state, path)
        ViT(**{**options, "registers": 0})
    with pytest.raises(WeightsError, match=r"pos_embed \(1, 17, 32\) -> \(1, 26, 32\)"):
        ViT(**{**options, "positions": 70})
    with pytest.raises(WeightsError, match=r"1 unexpected \(dist_token\)"):
        torch.save({**state, "dist_token": torch.zeros(1)}, path)
        ViT(**options)


def test_what_cannot_be_built_is_an_error_that_says_why(tiny):
    with pytest.raises(
        WeightsError, match=r"not of ViT-S/16: give model\.backbone\.weights=PATH.*DeiT"
    ):
        ViT(size="s")
    with pytest.raises(WeightsError, match=r"not of ViT-B/14"):
        ViT(size="b", patch=14)
    with pytest.raises(ValueError, match=r"positions=500 are not whole patches of 14"):
        ViT(**{**TINY, "patch": 14, "positions": 500})
    for taps in [[3, 2], [6], [1, 1], [-1]]:
        with pytest.raises(ValueError, match=r"taps must ascend, from 0 to 5"):
            ViT(**TINY, taps=taps)
    with pytest.raises(ConfigError, match="patch"):
        build("models.backbones", {"name": "vit.ViT", "patch": 8, "weights": "none"})


# --- against torchvision and timm ------------------------------------------------------------------------------------


@torch.no_grad()
def torchvision_outputs(model, image):
    """Of every block, (B, 1 + N, C)."""
    x = model._process_input(image)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
    return [x := layer(x) for layer in model.encoder.layers]


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_maps_are_those_of_torchvision(tiny, norm, tmp_path):
    model = torchvision_tiny()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = ViT(**{**TINY, "weights": str(tmp_path / "weights.pth")}, norm=norm).eval()
    image = torch.rand(2, 3, 32, 32)
    outputs = torchvision_outputs(model, backbone.normalize(image))
    assert backbone.taps == [1, 2, 3, 5]
    maps = backbone(image)
    for x, i in zip(maps, backbone.taps, strict=True):
        y = model.encoder.ln(outputs[i]) if norm else outputs[i]
        close(x, y[:, 1:].mT.reshape(2, C, 2, 2))
    if norm:  # and their own forward pass gives the class token of the same sequence
        close(model.heads(model.encoder.ln(outputs[-1])[:, 0]), model(backbone.normalize(image)))


@torch.no_grad()
def test_maps_of_another_size_are_those_of_torchvision_where_positions_need_no_interpolation(
    tiny, tmp_path
):
    """torchvision has a fixed size and resizes tables of positions with aligned corners; ours are sampled as timm's."""
    small, large = torchvision_tiny(), torchvision_tiny(48)
    table = small.encoder.pos_embedding
    table[:, 1:] = table[:, 1:2]  # the same for all patches
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    state = small.state_dict() | {
        "encoder.pos_embedding": torch.cat([table, table[:, 1:2].expand(1, 5, C)], 1)
    }
    large.load_state_dict(state)
    backbone = ViT(**{**TINY, "weights": str(tmp_path / "weights.pth")}, norm=False).eval()
    image = torch.rand(2, 3, 48, 48)
    outputs = torchvision_outputs(large, backbone.normalize(image))
    for x, i in zip(backbone(image), backbone.taps, strict=True):
        close(x, outputs[i][:, 1:].mT.reshape(2, C, 3, 3))


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_maps_are_those_of_timms_dinov2_at_any_size(tiny, registers, tmp_path):
    transformers = pytest.importorskip(
        "timm.models.vision_transformer", reason="timm is not installed"
    )
    options, state = dinov2_file(tmp_path / "weights.pth", registers)
    model = transformers.VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=C,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        init_values=1.0,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        dynamic_img_size=True,
    ).eval()
    model.load_state_dict(transformers.checkpoint_filter_fn(dict(state), model))
    backbone = ViT(**options).eval()
    for size in [(56, 56), (28, 98), (112, 70)]:
        image = torch.rand(2, 3, *size)
        expected = model.forward_intermediates(
            backbone.normalize(image), indices=backbone.taps, norm=True, intermediates_only=True
        )
        for x, y in zip(backbone(image), expected, strict=True):
            assert x.shape == (2, C, size[0] // 14, size[1] // 14)
            close(x, y)


@torch.no_grad()
def test_any_size_is_enlarged_to_whole_patches(tiny):
    backbone = randomized(ViT(**TINY, registers=2))
    image = torch.rand(2, 3, 35, 50)
    whole = F.interpolate(image, (48, 64), mode="bilinear", align_corners=False)
    for x, y in zip(backbone(image), backbone(whole), strict=True):
        assert x.shape == (2, C, 3, 4) and torch.equal(x, y)
    assert [x.shape for x in backbone(torch.rand(1, 3, 1, 1))] == [(1, C, 1, 1)] * 4
    assert backbone.channels == [C] * 4 and backbone.strides == [16] * 4
    assert (backbone.depths, backbone.heads, backbone.reductions) == ([DEPTH], [HEADS], [1])
    double = backbone.double()(image.double())
    for x, y in zip(backbone.float()(image), double, strict=True):
        assert y.dtype == torch.float64
        close(x.double(), y, 1e-4)


def test_drop_path_grows_over_the_depth_and_is_inactive_in_eval(tiny):
    backbone = randomized(ViT(**TINY, drop_path=1.0))
    assert [block.drop_path.p for block in backbone.blocks] == pytest.approx(
        [i / 5 for i in range(6)]
    )
    still = ViT(**TINY, drop_path=0.0).train()
    still.load_state_dict(backbone.state_dict())
    image = torch.rand(2, 3, 32, 48)
    assert all(torch.equal(x, y) for x, y in zip(backbone(image), still(image)))
    x = torch.randn(2, 5, C)
    backbone.train()
    assert torch.equal(backbone.blocks[5](x), x) and not torch.equal(backbone.blocks[0](x), x)


@pytest.mark.parametrize("norm", [True, False])
def test_what_the_maps_do_not_need_is_not_trained(tiny, norm):
    backbone = ViT(**TINY, registers=2, layer_scale=True, taps=[0, 3], norm=norm)
    assert backbone.depths == [4] and len(backbone.blocks) == DEPTH
    maps = backbone(torch.rand(1, 3, 40, 40))
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * 14 + (0 if norm else 2)
    assert all(name.startswith(("blocks.4.", "blocks.5.", "norm.")) for name in frozen)


# --- attention bias --------------------------------------------------------------------------------------------------

GRID, PREFIX = (3, 4), 3  # a class token and two registers
N = math.prod(GRID)


@pytest.fixture
def backbone(tiny):
    return randomized(ViT(**TINY, registers=2, layer_scale=True)).double()


@pytest.fixture
def image():
    return torch.rand(2, 3, 48, 64).double()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def captured(module, image, **options):
    """Inputs and outputs (B, 3 + N, C) of every block, beside the maps."""
    tokens, handles = [], []
    for block in module.blocks:
        handles.append(
            block.register_forward_hook(lambda m, a, output: tokens.append((a[0], output)))
        )
    maps = module(image, **options)
    for handle in handles:
        handle.remove()
    return maps, tokens


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (2, HEADS, 1), (1, 1, N), (2, HEADS, N)])
def test_bias_of_zero_changes_nothing(backbone, image, shape):
    maps = backbone(image, bias=lambda stage, block, x, keys: torch.zeros(*shape, N))
    for x, y in zip(maps, backbone(image), strict=True):
        close(x, y, 1e-6)


def test_none_leaves_a_block_to_the_kernel_without_a_mask(backbone, image, monkeypatch):
    masks, fused = [], F.scaled_dot_product_attention

    def attend(q, k, v, **options):
        masks.append(options.pop("attn_mask"))
        assert not options
        return fused(q, k, v, attn_mask=masks[-1])

    expected = backbone(image)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert same(backbone(image, bias=lambda *call: None), expected) and masks == [None] * DEPTH
    masks.clear()
    backbone(
        image, bias=lambda stage, block, x, keys: torch.zeros(1, 1, 1, N) if block == 5 else None
    )
    assert masks[:5] == [None] * 5 and masks[5].shape == (1, 1, 1, PREFIX + N)


@torch.no_grad()
@pytest.mark.parametrize("taps, ran", [([], 6), ([1, 3], 4)])
def test_bias_is_asked_for_before_every_block_with_the_patches_that_enter_it(
    tiny, image, taps, ran
):
    backbone = randomized(ViT(**TINY, registers=2, taps=taps)).double()
    calls = []
    _, tokens = captured(backbone, image, bias=lambda *call: calls.append(call))
    assert [(stage, block, keys) for stage, block, _, keys in calls] == [
        (1, i, GRID) for i in range(ran)
    ]
    for (*_, x, _), (entered, _) in zip(calls, tokens, strict=True):
        assert x.shape == (2, C, *GRID) and torch.equal(x.flatten(2).mT, entered[:, PREFIX:])


@torch.no_grad()
def test_minus_infinity_is_as_if_the_patch_were_not_there(backbone, image):
    bias = torch.zeros(1, 1, 1, N)
    bias[..., 6] = -torch.inf  # row 1, column 2
    maps, ((x, _), *_) = captured(backbone, image, bias=lambda *call: bias)
    left = [i for i in range(PREFIX + N) if i != PREFIX + 6]
    x, expected = x[:, left], []
    for i, block in enumerate(backbone.blocks):
        x = block(x)
        expected += [backbone.norm(x)[:, PREFIX:].mT] if i in backbone.taps else []
    others = [i for i in range(N) if i != 6]
    for x, y, free in zip(maps, expected, backbone(image), strict=True):
        close(x.flatten(2)[..., others], y, 1e-9)
        assert (x - free).flatten(2)[..., others].abs().amax(1).min() > 1e-3
    # All patches hidden: the class token and the registers are left, and nothing is undefined.
    assert all(
        x.isfinite().all()
        for x in backbone(image, bias=lambda *call: torch.full((1, 1, 1, N), -torch.inf))
    )


@torch.no_grad()
def test_class_token_and_registers_have_no_bias_as_keys_and_see_that_of_all_queries(
    backbone, image
):
    """Logits written out: one bias for all queries reaches the first tokens too, one for each query does not."""
    one, each = torch.randn(2, HEADS, 1, N).double(), torch.randn(2, HEADS, N, N).double()
    block = backbone.blocks[0]
    for bias in (one, each):
        _, ((x, y), *_) = captured(backbone, image, bias=lambda *call, bias=bias: bias)
        full = torch.zeros(2, HEADS, PREFIX + N, PREFIX + N).double()
        full[:, :, PREFIX:, PREFIX:] = bias
        if bias is one:
            full[:, :, :PREFIX, PREFIX:] = bias
        weight, constant = block.attn.qkv.weight, block.attn.qkv.bias
        q, k, v = (block.norm1(x) @ weight.T + constant).split(C, -1)
        heads = []
        for h, part in enumerate(torch.arange(C).chunk(HEADS)):
            logits = q[..., part] @ k[..., part].mT / math.sqrt(C // HEADS) + full[:, h]
            heads.append(logits.softmax(-1) @ v[..., part])
        x = x + block.ls1.gamma * block.attn.proj(torch.cat(heads, -1))
        close(y, x + block.ls2.gamma * block.mlp(block.norm2(x)), 1e-9)


@torch.no_grad()
def test_a_constant_bias_weighs_patches_against_the_other_tokens_alone(backbone, image):
    """Shares among the patches stay. In the limit the class token and the registers are hidden from everyone."""
    maps, ((x, _), *_) = captured(backbone, image, bias=lambda *call: torch.full((1, 1, 1, N), 1e4))
    x = x[:, PREFIX:]
    for block in backbone.blocks:
        x = block(x)
    close(maps[-1].flatten(2).mT, backbone.norm(x), 1e-9)
    assert (maps[-1] - backbone(image)[-1]).abs().amax() > 1e-2


@pytest.mark.parametrize("queries", [1, N])
def test_gradients_flow_through_the_bias(backbone, image, queries):
    value = torch.randn(2, 1, queries, N, dtype=torch.float64, requires_grad=True)
    entered = []

    def bias(stage, block, x, keys):
        if block == DEPTH - 1:
            entered.append(x)
            return value + x.mean(1).flatten(1)[:, None, None]

    def last():
        return (
            backbone(image, bias=bias)[-1].square().mul(torch.linspace(0, 1, C).view(C, 1, 1)).sum()
        )

    loss = last()
    gradients = torch.autograd.grad(
        loss, [value, entered[0]]
    )  # that of what entered comes through the bias alone
    assert all(g.isfinite().all() and g.abs().min() > 0 for g in gradients)
    step = torch.zeros_like(value)
    step[1, 0, -1, 5] = 1e-5
    with torch.no_grad():
        value += step
        above = last()
        value -= 2 * step
        below = last()
    close((above - below) / 2e-5, gradients[0][1, 0, -1, 5], 1e-6)


def test_bias_follows_the_precision_of_the_attention(tiny):
    backbone = randomized(ViT(**TINY, drop_path=0.0))
    image, value = (
        torch.rand(1, 3, 48, 64),
        torch.randn(1, 1, 1, N, dtype=torch.float64, requires_grad=True),
    )
    expected = backbone(image, bias=lambda *call: value)
    with torch.autocast("cpu", torch.bfloat16):
        low = backbone(image, bias=lambda *call: value)
    close(low[-1].float(), expected[-1], 0.3)
    (gradient,) = torch.autograd.grad(low[-1].float().square()[:, : C // 2].sum(), value)
    assert (
        gradient.dtype == torch.float64 and gradient.isfinite().all() and gradient.abs().amax() > 0
    )


def test_the_classifier_of_a_file_of_the_hub_is_left_out(tmp_path):
    state = ViT(size="t", weights="none").state_dict()
    head = {"classifier.weight": torch.zeros(1000, 192), "classifier.bias": torch.zeros(1000)}
    torch.save(state | head, tmp_path / "deit.pt")
    ViT(size="t", weights=str(tmp_path / "deit.pt"))
