"""MiT against a plain forward pass and Hugging Face's: sizes, files of weights, attention bias."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.build import build
from engine.config import ConfigError
from engine.weights import WeightsError
from models.backbones.mit import MiT
from models.classifiers.linear import Linear
from models.decoders.segformer_mlp import SegFormerMLP
from tests.models.networks import mmsegmentation, saved, scrambled, translate


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def randomized(module):
    """Also norms and biases differ from layer to layer, so that a swap shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return module.eval()


STAGES = {  # depths; published millions of parameters of SegFormer for ADE20K, 256 channels in B0 and B1, else 768
    "b0": ((2, 2, 2, 2), 3.8),
    "b1": ((2, 2, 2, 2), 13.7),
    "b2": ((3, 4, 6, 3), 27.5),
    "b3": ((3, 4, 18, 3), 47.3),
    "b4": ((3, 8, 27, 3), 64.1),
    "b5": ((3, 6, 40, 3), 84.7),
}
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)


@pytest.fixture(scope="module")
def mit():
    torch.manual_seed(1)
    return randomized(MiT(size="b0", weights="none"))


def segformer(size, width, num_classes=150):
    """On the meta device: encoder, decoder, classifier."""
    with torch.device("meta"):
        encoder = MiT(size=size, weights="none")
        decoder = SegFormerMLP(in_channels=encoder.channels, width=width)
        return encoder, decoder, Linear(in_channels=width, num_classes=num_classes)


@pytest.mark.parametrize("size", STAGES)
def test_segformer_has_its_published_size(size):
    parts = segformer(size, 256 if size in ("b0", "b1") else 768)
    assert round(count(*parts) / 1e6, 1) == STAGES[size][1]
    assert parts[0].depths == STAGES[size][0]


@pytest.mark.parametrize(
    "size, encoder, total", [("b0", 3_319_392, 3_752_694), ("b5", 81_443_008, 82_007_382)]
)
def test_segformer_with_256_channels_has_exactly_these_parameters(size, encoder, total):
    parts = segformer(size, 256)
    assert (count(parts[0]), count(*parts)) == (encoder, total)


def expected_names(depths):
    """NVIDIA's tensor names, spelled out."""
    names = set()
    for s, (depth, reduction) in enumerate(zip(depths, REDUCTIONS), 1):
        layers = [f"patch_embed{s}.proj", f"patch_embed{s}.norm", f"norm{s}"]
        inner = [
            "norm1",
            "norm2",
            "attn.q",
            "attn.kv",
            "attn.proj",
            "mlp.fc1",
            "mlp.dwconv.dwconv",
            "mlp.fc2",
        ]
        inner += ["attn.sr", "attn.norm"] if reduction > 1 else []
        layers += [f"block{s}.{i}.{layer}" for i in range(depth) for layer in inner]
        names |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    return names


@pytest.mark.parametrize("size", ["b0", "b3"])
def test_mit_has_the_names_of_the_release(size):
    with torch.device("meta"):
        assert {*MiT(size=size, weights="none").state_dict()} == expected_names(STAGES[size][0])


def test_mit_starts_as_the_release_does():
    state = MiT(size="b0", weights="none").state_dict()
    assert all((value == 0).all() for key, value in state.items() if key.endswith("bias"))
    assert state["block4.1.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["block4.1.mlp.dwconv.dwconv.weight"].std().item() == pytest.approx(
        math.sqrt(2 / 9), rel=0.05
    )
    assert state["patch_embed4.proj.weight"].std().item() == pytest.approx(
        math.sqrt(2 / (9 * 256)), rel=0.05
    )


def plain_mit(state, image, depths=(2, 2, 2, 2)):
    """Maps of MiT from NVIDIA-named tensors, on token sequences and with the attention written out."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean.to(image).view(3, 1, 1)) / std.to(image).view(3, 1, 1)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        y = x - x.mean(-1, keepdim=True)
        return (
            y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    def attention(name, x, h, w, heads, reduction):
        b, _, c = x.shape
        q, small = linear(f"{name}.q", x), x
        if reduction > 1:
            small = conv(f"{name}.sr", x.transpose(1, 2).reshape(b, c, h, w), stride=reduction)
            small = norm(f"{name}.norm", tokens(small), 1e-5)
        kv = linear(f"{name}.kv", small)
        k, v = kv[..., :c], kv[..., c:]
        parts = []
        for head in torch.arange(c).chunk(heads):
            logits = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(c // heads)
            parts.append(logits.softmax(-1) @ v[..., head])
        return linear(f"{name}.proj", torch.cat(parts, -1))

    def mlp(name, x, h, w):
        y = linear(f"{name}.fc1", x)
        b, _, c = y.shape
        y = tokens(
            conv(
                f"{name}.dwconv.dwconv", y.transpose(1, 2).reshape(b, c, h, w), padding=1, groups=c
            )
        )
        return linear(f"{name}.fc2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))

    maps = []
    for s in range(1, 5):
        kernel, stride = (7, 4) if s == 1 else (3, 2)
        x = conv(f"patch_embed{s}.proj", x, stride=stride, padding=kernel // 2)
        b, c, h, w = x.shape
        x = norm(f"patch_embed{s}.norm", tokens(x), 1e-5)
        for name in (f"block{s}.{i}" for i in range(depths[s - 1])):
            x = x + attention(
                f"{name}.attn",
                norm(f"{name}.norm1", x, 1e-6),
                h,
                w,
                HEADS[s - 1],
                REDUCTIONS[s - 1],
            )
            x = x + mlp(f"{name}.mlp", norm(f"{name}.norm2", x, 1e-6), h, w)
        x = norm(f"norm{s}", x, 1e-6).transpose(1, 2).reshape(b, c, h, w)
        maps.append(x)
    return maps


@pytest.mark.parametrize("size", [(97, 65), (64, 96), (29, 29)])
def test_mit_is_the_plain_forward_pass(size):
    backbone = randomized(MiT(size="b0", weights="none")).double()
    image = torch.rand(2, 3, *size).double()
    with torch.no_grad():
        maps, expected = backbone(image), plain_mit(backbone.state_dict(), image)
    for x, y, channels, stride in zip(
        maps, expected, (32, 64, 160, 256), (4, 8, 16, 32), strict=True
    ):
        assert x.shape == (2, channels, *(math.ceil(n / stride) for n in size))
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def test_mit_norms_have_the_eps_of_the_release():
    backbone = MiT(size="b0", weights="none")
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if "patch_embed" in name or "attn.norm" in name else 1e-6), (
                name
            )


def nvidia_file(state):
    """The encoder's file: with the classifier of ImageNet."""
    return state | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}


def nvidia_segmentor_file(state):
    """A whole SegFormer, wrapped."""
    names = ("linear_c1.proj.weight", "linear_fuse.conv.weight", "linear_pred.weight")
    head = {f"decode_head.{name}": torch.zeros(1) for name in names}
    return {
        "meta": {"epoch": 3},
        "state_dict": {f"backbone.{k}": v for k, v in state.items()} | head,
    }


def hugging_face(state, prefix):
    """The table of names, from NVIDIA's tensors to those in a file of the hub, by going through the network."""
    inner = {
        "norm1": "layer_norm_1",
        "norm2": "layer_norm_2",
        "attn.q": "attention.self.query",
        "attn.proj": "attention.output.dense",
        "attn.sr": "attention.self.sr",
        "attn.norm": "attention.self.layer_norm",
        "mlp.fc1": "mlp.dense1",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
        "mlp.fc2": "mlp.dense2",
    }
    renamed = {}
    for s, (depth, reduction) in enumerate(zip((2, 2, 2, 2), REDUCTIONS)):
        for kind in ("bias", "weight"):
            renamed[f"patch_embeddings.{s}.proj.{kind}"] = state[f"patch_embed{s + 1}.proj.{kind}"]
            renamed[f"patch_embeddings.{s}.layer_norm.{kind}"] = state[
                f"patch_embed{s + 1}.norm.{kind}"
            ]
            renamed[f"layer_norm.{s}.{kind}"] = state[f"norm{s + 1}.{kind}"]
            for i in range(depth):
                old, new = f"block{s + 1}.{i}", f"block.{s}.{i}"
                for name, other in inner.items():
                    if reduction > 1 or name not in ("attn.sr", "attn.norm"):
                        renamed[f"{new}.{other}.{kind}"] = state[f"{old}.{name}.{kind}"]
                key, value = state[f"{old}.attn.kv.{kind}"].chunk(2)
                # Values before keys: the order in a file means nothing.
                renamed[f"{new}.attention.self.value.{kind}"] = value.clone()
                renamed[f"{new}.attention.self.key.{kind}"] = key.clone()
    return {prefix + name: tensor for name, tensor in renamed.items()}


def hugging_face_file(state):
    """An image classifier, as nvidia/mit-b0 is."""
    head = {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}
    return hugging_face(state, "segformer.encoder.") | head


def hugging_face_segmentor_file(state):
    head = {
        "decode_head.linear_c.0.proj.weight": torch.zeros(1),
        "decode_head.batch_norm.running_var": torch.zeros(1),
    }
    return {"model": hugging_face(state, "module.segformer.encoder.") | head}


FILES = [
    dict,
    nvidia_file,
    nvidia_segmentor_file,
    hugging_face_file,
    hugging_face_segmentor_file,
    lambda state: hugging_face(state, "encoder."),
    lambda state: hugging_face(state, ""),
]
NAMES = [
    "own",
    "nvidia",
    "nvidia, whole",
    "hugging face",
    "hugging face, whole",
    "encoder.",
    "no prefix",
]


@pytest.mark.parametrize("write", FILES, ids=NAMES)
def test_mit_reads_weights_with_the_names_of_nvidia_and_hugging_face(mit, write, tmp_path, caplog):
    state = mit.state_dict()
    torch.save(write(state), tmp_path / "weights.pth")
    with caplog.at_level("INFO", "engine"):
        other = MiT(size="b0", weights=str(tmp_path / "weights.pth")).eval()
    assert f"{len(state)} keys loaded, 0 keep" in caplog.text
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    image = torch.rand(1, 3, 49, 70)
    assert all(torch.equal(x, y) for x, y in zip(other(image), mit(image), strict=True))


def test_mit_weights_that_do_not_fit_are_an_error(mit, tmp_path):
    path = str(tmp_path / "weights.pth")
    state = mit.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("block4.1.attn.q")}, path)
    with pytest.raises(WeightsError, match=r"2 missing \(block4\.1\.attn\.q\."):
        MiT(size="b0", weights=path)
    torch.save(
        hugging_face(state, "") | {"encoder.block.4.0.mlp.dense1.weight": torch.zeros(1)}, path
    )
    with pytest.raises(WeightsError, match=r"1 unexpected \(block5\.0\.mlp\.fc1\.weight\)"):
        MiT(size="b0", weights=path)
    torch.save(
        {
            k: v
            for k, v in hugging_face(state, "").items()
            if k != "block.0.0.attention.self.key.bias"
        },
        path,
    )
    with pytest.raises(WeightsError, match=r"block1\.0\.attn\.kv\.bias \(32,\) -> \(64,\)"):
        MiT(size="b0", weights=path)
    torch.save(state, path)
    with pytest.raises(WeightsError, match="of another shape"):
        MiT(size="b1", weights=path)


def test_mit_of_imagenet_says_where_to_get_a_file():
    with pytest.raises(WeightsError, match=r"model\.backbone\.weights=PATH.*non-commercial"):
        build("models.backbones", {"name": "mit.MiT", "size": "b0"})
    with pytest.raises(ConfigError, match="size"):
        build("models.backbones", {"name": "mit.MiT", "size": "b6", "weights": "none"})


def grids(backbone, size):
    """(h, w) of the queries and of the keys, per stage."""
    queries = [tuple(math.ceil(n / stride) for n in size) for stride in backbone.strides]
    return [(q, tuple(n // r for n in q)) for q, r in zip(queries, backbone.reductions)]


def test_mit_bias_of_a_constant_changes_nothing_and_none_is_no_bias_at_all(mit):
    image = torch.rand(2, 3, 70, 49)
    expected = mit(image)

    def constant(stage, block, x, keys):
        full = (2, mit.heads[stage - 1], x[0, 0].numel(), math.prod(keys))
        return torch.full(full, 3.0) if block == 0 else torch.full((2, 1, 1, math.prod(keys)), -7.0)

    for x, y in zip(mit(image, bias=constant), expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(mit(image, bias=lambda *call: None), expected))


def test_mit_asks_for_the_bias_of_every_block_and_gives_it_to_that_one(mit):
    entered, got, calls, handles = [], [], [], []
    for s in range(1, 5):
        for block in mit.stage_blocks(s):
            handles.append(
                block.register_forward_pre_hook(
                    lambda m, a: entered.append(a[0].permute(0, 3, 1, 2))
                )
            )
            handles.append(block.attn.register_forward_pre_hook(lambda m, a: got.append(a[1])))
    given = {(3, 1): torch.zeros(1, 1, 1, 4), (4, 0): torch.ones(1, 1, 1, 6)}

    def bias(stage, block, x, keys):
        calls.append((stage, block, x, keys))
        return given.get((stage, block))

    mit(torch.rand(1, 3, 70, 49), bias=bias)
    for handle in handles:
        handle.remove()
    keys = [keys for _, keys in grids(mit, (70, 49))]
    assert [(s, i, k) for s, i, _, k in calls] == [
        (s, i, keys[s - 1]) for s in range(1, 5) for i in range(2)
    ]
    assert keys == [(2, 1), (2, 1), (2, 2), (3, 2)]
    assert all(torch.equal(x, y) for (_, _, x, _), y in zip(calls, entered, strict=True))
    assert all(value is given.get((s, i)) for (s, i, *_), value in zip(calls, got, strict=True))


@pytest.mark.parametrize("stage", [1, 3, 4])
def test_minus_infinity_hides_a_key(stage):
    """What a hidden key holds has no effect, and what the others hold has; row by row over the grid of keys."""
    attention = randomized(getattr(MiT(size="b0", weights="none"), f"block{stage}")[0]).attn
    heads, reduction = HEADS[stage - 1], REDUCTIONS[stage - 1]
    channels = attention.q.in_features
    h, w = (
        3 * reduction + reduction // 2,
        2 * reduction,
    )  # 3 x 2 keys; the rows at the bottom belong to none
    x = torch.randn(2, h, w, channels)
    bias = torch.zeros(2, 1, 1, 6)
    bias[0, ..., 3] = -torch.inf  # row 1, column 1, first image only
    changed = x.clone()
    changed[:, reduction : 2 * reduction, reduction : 2 * reduction] += 1.0
    free, masked = attention(changed) - attention(x), attention(changed, bias) - attention(x, bias)
    assert masked.isfinite().all()
    elsewhere = torch.ones(h, w, dtype=torch.bool)
    elsewhere[reduction : 2 * reduction, reduction : 2 * reduction] = False
    torch.testing.assert_close(
        masked[0][elsewhere], torch.zeros_like(masked[0][elsewhere]), atol=1e-5, rtol=0
    )
    assert (free[0][elsewhere].abs().amax(1) > 1e-3).float().mean() > 0.9
    torch.testing.assert_close(masked[1], free[1])
    # One head only: the channels of the other heads see the key.
    one = torch.zeros(1, heads, 1, 6)
    one[:, 0, :, 3] = -torch.inf
    if heads > 1:
        assert not torch.allclose(attention(x, one)[0], attention(x, bias)[0], atol=1e-4)
        assert not torch.allclose(attention(x, one), attention(x), atol=1e-4)


def test_bias_multiplies_attention_weights_and_has_a_gradient():
    """exp(bias) is a factor of the weights before they are normalised: the form that TMT needs."""
    attention = randomized(MiT(size="b0", weights="none").block4[0]).attn.double()
    x, factor = torch.randn(1, 3, 2, 256).double(), torch.rand(1, 1, 1, 6).double() + 0.5
    bias = factor.log().requires_grad_()
    actual = attention(x, bias)
    q, (k, v) = attention.q(x).flatten(1, 2), attention.kv(x).flatten(1, 2).split(256, -1)
    parts = []
    for head in torch.arange(256).chunk(8):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(32)).softmax(
            -1
        ) * factor[:, 0]
        parts.append(weights / weights.sum(-1, keepdim=True) @ v[..., head])
    torch.testing.assert_close(actual, attention.proj(torch.cat(parts, -1)).view_as(actual))
    single = attention.float()(x.float(), bias)  # a bias of another precision than the features
    torch.testing.assert_close(single.double(), actual, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(actual.square().sum(), bias)
    assert gradient.isfinite().all() and gradient.abs().min() > 0


def test_mit_bias_follows_the_precision_of_the_attention_and_gradients_flow_through_it(mit):
    image, value = torch.rand(1, 3, 64, 64), torch.randn(1, 1, 1, 4, requires_grad=True)
    entered = []

    def bias(stage, block, x, keys):
        if (stage, block) == (4, 1):
            entered.append(x)
            return value + x.mean(1).flatten(1)[:, None, None]

    def maps():
        return mit(image, bias=bias)

    expected = maps()[-1]
    gradients = torch.autograd.grad(expected.square().sum(), [value, entered[0]])
    assert all(g.isfinite().all() and g.abs().amax() > 0 for g in gradients)
    with torch.autocast("cpu", torch.bfloat16):
        low = maps()[-1]
    torch.testing.assert_close(low.float(), expected, rtol=0.2, atol=0.3)


def test_drop_path_grows_over_the_depth_and_is_inactive_in_eval():
    backbone = MiT(size="b2", drop_path=0.3, weights="none")
    rates = [
        module.drop_path.p
        for name, module in backbone.named_modules()
        if hasattr(module, "drop_path")
    ]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)])
    image = torch.rand(2, 3, 32, 32)
    backbone = randomized(MiT(size="b0", drop_path=1.0, weights="none"))
    still = MiT(size="b0", drop_path=0.0, weights="none").train()
    still.load_state_dict(backbone.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(backbone(image), still(image)))
    backbone.train()
    x = torch.randn(2, 4, 4, 256)
    assert torch.equal(backbone.block4[1](x), x)  # the last block is always left out
    assert not torch.equal(
        backbone.block1[0](y := torch.randn(2, 8, 8, 32)), y
    )  # the first one never


def test_drop_path_is_drawn_for_each_image():
    block = randomized(MiT(size="b0", drop_path=0.5, weights="none").block4[1]).train()
    x = torch.randn(1, 4, 4, 256).expand(64, -1, -1, -1)
    left_out = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.05 < left_out < 0.5  # a quarter: both residuals, each of probability 1/2


def test_mit_is_that_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from safetensors.torch import load_file

    reference = transformers.SegformerModel(transformers.SegformerConfig()).eval()
    randomized(reference)
    reference.save_pretrained(tmp_path)  # the names of a file are not those in memory
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "weights.pth")
    backbone = MiT(size="b0", weights=str(tmp_path / "weights.pth")).eval()
    for size in [(64, 96), (97, 65), (224, 224)]:
        image = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected = reference(backbone.normalize(image), output_hidden_states=True).hidden_states
            maps = backbone(image)
        differences = [(x - y).abs().max().item() for x, y in zip(maps, expected, strict=True)]
        print(size, "largest differences", differences)
        assert max(differences) < 1e-4


# --- files of others -------------------------------------------------------------------------------------------------


def mit_mmsegmentation(state):
    table = {
        ".attn.proj.": ".attn.attn.out_proj.",
        ".mlp.fc1.": ".ffn.layers.0.",
        ".mlp.fc2.": ".ffn.layers.4.",
    }
    table[".mlp.dwconv.dwconv."] = ".ffn.layers.1."
    for s in range(1, 5):
        table |= {
            f"patch_embed{s}.proj.": f"layers.{s - 1}.0.projection.",
            f"patch_embed{s}.": f"layers.{s - 1}.0.",
        }
        table |= {f"block{s}.": f"layers.{s - 1}.1.", f"norm{s}.": f"layers.{s - 1}.2."}
    blocks = {
        key.replace("norm1.", "normA.").replace("norm2.", "normB."): v
        for key, v in state.items()
        if "block" in key
    }
    state = translate({k: v for k, v in state.items() if "block" not in k} | blocks, table)
    file = {}
    for key, value in state.items():
        key = key.replace("normA.", "norm1.").replace("normB.", "norm2.")
        if ".attn.q." in key:
            rows = torch.cat([value, state[key.replace(".q.", ".kv.")]])
            file[key.replace(".attn.q.", ".attn.attn.in_proj_")] = rows
        elif ".attn.kv." not in key:
            is_conv = key.endswith(("ffn.layers.0.weight", "ffn.layers.4.weight"))
            file[key] = value[..., None, None] if is_conv else value
    return file


@pytest.mark.parametrize("whole", [False, True])
def test_mit_reads_the_names_of_mmsegmentation(whole, tmp_path, caplog):
    ours = scrambled(MiT(size="b0", weights="none"))
    state = ours.state_dict()
    file = mit_mmsegmentation(state)
    assert {
        "layers.0.1.1.attn.attn.in_proj_weight",
        "layers.3.1.0.ffn.layers.4.bias",
        "layers.2.2.weight",
    } <= {*file}
    with caplog.at_level("INFO", "engine"):
        other = MiT(
            size="b0", weights=saved(mmsegmentation(file) if whole else file, tmp_path)
        ).state_dict()
    assert f"{len(state)} keys loaded, 0 keep" in caplog.text
    assert all(torch.equal(other[key], value) for key, value in state.items())


def mit_transformers(state):
    """The names that transformers 5.24 has in memory, and so torch.save(model.state_dict(), ...) in the file."""
    table = {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after."}
    for s in range(1, 5):
        table |= {
            f"patch_embed{s}.proj.": f"segformer.stages.{s - 1}.patch_embeddings.proj.",
            f"patch_embed{s}.norm.": f"segformer.stages.{s - 1}.patch_embeddings.layer_norm.",
            f"block{s}.": f"segformer.stages.{s - 1}.blocks.",
            f"norm{s}.": f"segformer.stages.{s - 1}.layer_norm.",
        }
    table |= {
        ".attn.proj.": ".attention.o_proj.",
        ".attn.sr.": ".attention.sequence_reduction.sequence_reduction.",
        ".attn.norm.": ".attention.sequence_reduction.layer_norm.",
        ".attn.q.": ".attention.q_proj.",
    }
    file = {}
    for key, value in translate(state, table).items():
        if ".attn.kv." in key:
            halves = value.chunk(2)
            for letter, half in zip("kv", halves):
                file[key.replace(".attn.kv.", f".attention.{letter}_proj.")] = half
        else:
            file[key] = value
    return file | {"decode_head.linear_fuse.weight": torch.zeros(1)}


def test_mit_reads_the_names_of_transformers_5(tmp_path, caplog):
    state = scrambled(MiT(size="b0", weights="none")).state_dict()
    file = mit_transformers(state)
    assert {
        "segformer.stages.0.blocks.0.attention.k_proj.weight",
        "segformer.stages.3.layer_norm.bias",
        "segformer.stages.1.blocks.1.layernorm_after.bias",
        "segformer.stages.2.blocks.0.attention.sequence_reduction.layer_norm.weight",
    } <= {*file}
    with caplog.at_level("INFO", "engine"):
        other = MiT(size="b0", weights=saved(file, tmp_path)).state_dict()
    assert f"{len(state)} keys loaded, 0 keep" in caplog.text
    assert all(torch.equal(other[key], value) for key, value in state.items())
