"""ResNet: strides, frozen batch norm, stems per domain, deep stem, IBN; its files of weights."""

import pytest
import torch
from torch import nn
from torchvision.models import get_model, resnet18, resnet50

from engine.build import build
from engine.config import load
from engine.schedule import make_optimizer
from engine.step import View
from engine.weights import WeightsError
from models.backbones.resnet import IBN, ResNet
from models.classifiers.branch_sum import BranchSum
from models.classifiers.linear import Linear
from models.decoders.deeplabv2 import DeepLabV2
from models.decoders.fcn import FCN
from models.segmentor import Segmentor
from tests.engine.net import options
from tests.models.networks import equal, mmsegmentation, saved, scrambled
from tests.runs import TINY

ADAMW = options(lr=0.1, head_lr_factor=1.0, betas=[0.9, 0.999], momentum=0.9)


@pytest.mark.parametrize(
    "output_stride, dilated", [(32, (0, 0, 0)), (16, (0, 0, 1)), (8, (0, 1, 1))]
)
def test_output_stride_is_that_of_torchvision(output_stride, dilated):
    reference = resnet50(weights=None, replace_stride_with_dilation=dilated).eval()
    backbone = ResNet(depth=50, output_stride=output_stride, weights="none").eval()
    backbone.load_state_dict(
        {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    )
    image = torch.rand(1, 3, 65, 49)
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(backbone.normalize(image)))))
    assert backbone.strides == [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    with torch.no_grad():
        maps = backbone(image)
        for i, actual in enumerate(maps):
            x = getattr(reference, f"layer{i + 1}")(x)
            torch.testing.assert_close(actual, x, atol=1e-5, rtol=1e-5)
            assert actual.shape[2:] == (
                -(-65 // backbone.strides[i]),
                -(-49 // backbone.strides[i]),
            )


def test_three_stages_leave_layer4_out():
    backbone = ResNet(depth=18, stages=3, weights="none")
    assert not [name for name, _ in backbone.named_parameters() if name.startswith("layer4")]
    assert backbone.channels == [64, 128, 256] and len(backbone(torch.rand(1, 3, 64, 64))) == 3


def test_the_mean_colour_is_no_part_of_the_weights():
    backbone = ResNet(depth=18, weights="none")
    assert not [key for key in backbone.state_dict() if key.startswith("normalize")]
    color = backbone.normalize.mean.expand(1, 3, 2, 2)
    torch.testing.assert_close(backbone.normalize(color), torch.zeros(1, 3, 2, 2))
    torch.testing.assert_close(
        backbone.normalize(color + backbone.normalize.std), torch.ones(1, 3, 2, 2)
    )


@pytest.mark.parametrize("frozen", [[], ["backbone"], ["backbone", "decoder"]])
def test_frozen_batch_norm_keeps_statistics_and_affine_parameters(frozen):
    backbone = ResNet(depth=18, stages=3, weights="none")
    decoder = FCN(in_channels=backbone.channels, width=16)
    model = Segmentor(backbone, decoder, Linear(in_channels=16, num_classes=3), frozen_bn=frozen)
    model.eval()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = make_optimizer(model, ADAMW)
    for _ in range(2):
        model.segment(torch.rand(2, 3, 32, 32)).logits.square().mean().backward()
        optimizer.step()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            kept = all(
                torch.equal(value, before[f"{name}.{key}"])
                for key, value in module.state_dict().items()
            )
            assert kept == (name.split(".")[0] in frozen), name
    assert not torch.equal(model.backbone.conv1.weight, before["backbone.conv1.weight"])


def test_frozen_batch_norm_of_an_unknown_part_is_an_error():
    with pytest.raises(ValueError, match=r"frozen_bn\.0 must be backbone, .*, not 'head'"):
        load(TINY, ["model.frozen_bn=[head]"])


@pytest.fixture(scope="module")
def torchvision_weights(tmp_path_factory):
    """A file like torchvision's of ResNet-18, with random values."""
    from torchvision.models import resnet18

    state = resnet18(weights=None).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(state, path)
    return path, state


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_weights_of_a_file_are_loaded_and_reported(torchvision_weights, stages, caplog):
    path, state = torchvision_weights
    with caplog.at_level("INFO", "engine"):
        backbone = ResNet(depth=18, stages=stages, weights=str(path))
    own = backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    assert f"{len(own)} keys loaded, 0 keep" in caplog.text


@pytest.mark.parametrize(
    "wrap", [lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_wrapped_weights_are_unwrapped(torchvision_weights, wrap, tmp_path):
    torch.save(wrap(torchvision_weights[1]), tmp_path / "wrapped.pth")
    backbone = ResNet(depth=18, weights=str(tmp_path / "wrapped.pth"))
    assert torch.equal(backbone.conv1.weight, torchvision_weights[1]["conv1.weight"])


def test_weights_that_do_not_fit_are_an_error_unless_allowed(torchvision_weights, tmp_path, caplog):
    state = {k: v for k, v in torchvision_weights[1].items() if not k.startswith("layer4")}
    path = str(tmp_path / "short.pth")
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"missing \(layer4\.0\.conv1\.weight.*allow_missing"):
        ResNet(depth=18, weights=path)
    with caplog.at_level("INFO", "engine"):
        ResNet(depth=18, weights=path, allow_missing=["layer4.*"])
    assert "keep their initial values (layer4.0.conv1.weight" in caplog.text
    torch.save(state | {"layer9.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"1 unexpected \(layer9\.weight\)"):
        ResNet(depth=18, weights=path, allow_missing=["layer4.*"])
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    with pytest.raises(
        WeightsError,
        match=r"1 of another shape \(conv1\.weight \(64, 1, 7, 7\) -> \(64, 3, 7, 7\)\)",
    ):
        ResNet(depth=18, stages=3, weights=path)


# --- ResNet with a stem per domain -----------------------------------------------------------------------------------


STEM = ("conv1.", "bn1.", "layer1.")


def resnet(stem="per_domain", weights="none", **options):
    return ResNet(depth=18, output_stride=8, stem=stem, weights=weights, **options)


def test_shared_stem_has_the_keys_of_torchvision():
    expected = {key for key in resnet18(weights=None).state_dict() if not key.startswith("fc.")}
    assert {*resnet("shared").state_dict()} == expected
    own = {*resnet().state_dict()}
    assert own == expected | {f"source.{key}" for key in expected if key.startswith(STEM)}


def test_stems_start_equal_from_a_file_and_share_no_tensor(tmp_path):
    state = resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    backbone = resnet(weights=str(tmp_path / "resnet18.pth")).eval()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key.removeprefix("source.")]), key
    pointers = [parameter.data_ptr() for parameter in backbone.parameters()]
    assert len(pointers) == len({*pointers})
    image = torch.rand(1, 3, 65, 49)
    shared = resnet("shared", str(tmp_path / "resnet18.pth")).eval()
    for domain in ("source", "target"):
        assert all(
            torch.equal(x, y)
            for x, y in zip(backbone(image, domain), shared(image, domain), strict=True)
        )


def test_domain_chooses_the_stem_and_its_statistics():
    backbone, image = resnet(), torch.rand(2, 3, 64, 48)
    backbone.eval()
    with torch.no_grad():
        expected = backbone(image, "target")
        for parameter in backbone.source.parameters():
            parameter.add_(0.1)
        assert all(
            torch.equal(x, y) for x, y in zip(backbone(image), expected)
        )  # target is the default
        assert not any(torch.equal(x, y) for x, y in zip(backbone(image, "source"), expected))
        backbone.train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        backbone(image, "source")
    moved = {
        key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])
    }
    assert "source.bn1.running_mean" in moved and "source.layer1.0.bn1.running_var" in moved
    assert "layer2.0.bn1.running_mean" in moved and not [
        key for key in moved if key.startswith(STEM)
    ]


def test_unknown_domain_is_an_error_where_stems_differ():
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="source and target, not 'fog'"):
        resnet()(image, "fog")
    resnet("shared")(image, "fog")


def test_a_step_with_both_views_reaches_every_parameter_and_each_stem_only_by_its_own():
    backbone = resnet()
    decoder = DeepLabV2(in_channels=backbone.channels, width=5)
    model = Segmentor(backbone, decoder, BranchSum(in_channels=decoder.channels, num_classes=5))
    images = torch.rand(2, 2, 3, 48, 64)
    views = {"source": View(images[0], "source"), "target": View(images[1], "target")}
    outputs = model(views)
    without = {}
    for domain, other in (("source", "backbone."), ("target", "backbone.source.")):
        model.zero_grad()
        outputs[domain].logits.square().sum().backward(retain_graph=True)
        without[domain] = {name for name, p in model.named_parameters() if p.grad is None}
        names = {
            name
            for name, _ in model.named_parameters()
            if name.startswith(tuple(other + s for s in STEM))
        }
        assert without[domain] == names
    assert not without["source"] & without["target"]


def test_a_resnet_for_weights_of_plain_pixels_does_not_normalise():
    state = resnet18().state_dict()
    nets = [
        ResNet(depth=18, weights="none", normalize=kind).eval() for kind in ("none", "imagenet")
    ]
    for net in nets:
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc")})
    image = torch.rand(1, 3, 32, 32)
    plain, normal = (net(image)[0] for net in nets)
    undone = nets[1](image * nets[1].normalize.std + nets[1].normalize.mean)[0]
    torch.testing.assert_close(plain, undone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, normal, atol=1e-3)


def test_ibn_takes_plain_weights_and_its_own(tmp_path):
    plain = resnet18(weights=None)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in plain.state_dict().items()}},
        tmp_path / "a.pt",
    )
    network = ResNet(depth=18, ibn="a", weights=str(tmp_path / "a.pt"))
    norm = network.layer2[0].bn1
    assert isinstance(norm, IBN) and not isinstance(network.layer4[0].bn1, IBN)
    expected = plain.layer2[0].bn1
    assert torch.equal(norm.IN.weight, expected.weight[:64]) and torch.equal(
        norm.BN.bias, expected.bias[64:]
    )
    assert torch.equal(norm.BN.running_var, expected.running_var[64:])
    x = torch.randn(2, 128, 5, 6)
    found = norm.eval()(x)
    torch.testing.assert_close(found[:, 64:], expected.eval()(x)[:, 64:])
    mean, deviation = (
        x[:, :64].mean((2, 3), keepdim=True),
        x[:, :64].std((2, 3), keepdim=True, correction=0),
    )
    scaled = (x[:, :64] - mean) / (deviation**2 + 1e-5).sqrt() * norm.IN.weight[:, None, None]
    torch.testing.assert_close(found[:, :64], scaled + norm.IN.bias[:, None, None])
    torch.save(network.state_dict(), tmp_path / "b.pt")
    again = ResNet(depth=18, ibn="a", weights=str(tmp_path / "b.pt"))
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items()
    )


# --- ResNet with a deep stem -----------------------------------------------------------------------------------------


def test_deep_stem_has_the_names_of_mmsegmentation_and_reads_its_files(tmp_path, caplog):
    backbone = scrambled(ResNet(depth=18, deep_stem=True, weights="none"))
    state = backbone.state_dict()
    convs = {
        key: tuple(value.shape)
        for key, value in state.items()
        if key.startswith("stem.") and value.ndim == 4
    }
    assert convs == {
        "stem.0.weight": (32, 3, 3, 3),
        "stem.3.weight": (32, 32, 3, 3),
        "stem.6.weight": (64, 32, 3, 3),
    }
    assert {"stem.1.running_var", "stem.4.bias", "stem.7.weight"} <= {
        *state
    } and "conv1.weight" not in state
    path = saved(mmsegmentation(state), tmp_path)
    with caplog.at_level("INFO", "engine"):
        other = ResNet(
            depth=18, deep_stem=True, weights=path, stem="per_domain", ibn="a", output_stride=16
        ).eval()
    assert "3 keys of its heads are left out" in caplog.text and ", 0 keep" in caplog.text.replace(
        "values", ""
    )
    for name in ("stem.3.weight", "stem.7.running_mean"):
        assert torch.equal(
            other.get_parameter(name) if "weight" in name else other.get_buffer(name), state[name]
        )
    assert torch.equal(other.source.stem[6].weight, other.stem[6].weight)
    assert other.source.stem[6].weight is not other.stem[6].weight
    image = torch.rand(1, 3, 49, 64)
    maps = other(image, "source")
    assert equal(maps, other(image, "target")) and [x.shape[-1] for x in maps] == [16, 8, 4, 4]
    with torch.no_grad():
        other.source.stem[0].weight.add_(1.0)
    assert not torch.equal(other(image, "source")[0], maps[0]) and torch.equal(
        other(image, "target")[0], maps[0]
    )


def test_deep_stem_says_that_torchvisions_weights_do_not_fit(tmp_path):
    plain = get_model("resnet18", weights=None).state_dict()
    with pytest.raises(
        WeightsError, match="torchvision has no ImageNet weights of a ResNet with deep_stem"
    ):
        build("models.backbones", {"name": "resnet.ResNet", "deep_stem": True})
    with pytest.raises(WeightsError, match=r"stem is one 7x7 convolution.*deep_stem=false"):
        ResNet(depth=18, deep_stem=True, weights=saved(plain, tmp_path))
    deep = ResNet(depth=18, deep_stem=True, weights="none").state_dict()
    with pytest.raises(WeightsError, match=r"stem is a deep stem.*deep_stem=true"):
        ResNet(depth=18, weights=saved(deep, tmp_path))
