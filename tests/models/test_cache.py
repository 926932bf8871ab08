"""Pretrained backbones: parts that are frozen, maps that are computed once, rates that fall with the depth."""

import pytest
import torch

from datasets import transforms
from engine import schedule
from engine.config import Config, ConfigError
from engine.errors import UserError
from models.backbones.convnext import ConvNeXt
from models.backbones.mit import MiT
from models.backbones.resnet import ResNet
from models.backbones.vit import ViT
from models.cache import FeatureCache
from models.segmentor import Segmentor
from tests.runs import TINY, run, scalars, train

WHOLE = "data.augment={name: transforms.Whole, size: [48, 64], flip: 0.5}"
FROZEN = ("model.frozen=[backbone]", WHOLE)


def saved(folder, step=6):
    return torch.load(folder / f"step_{step:07d}.pt", weights_only=False)


# --- frozen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["backbone", "decoder"])
def test_a_frozen_part_is_bitwise_what_it_was_and_the_rest_trains(tmp_path, part):
    # The first step has a learning rate of nearly 0, so the network of step 1 stands for the start.
    train(tmp_path / "a", f"model.frozen=[{part}]", "checkpoint.every=1", "schedule.warmup_ratio=0")
    first, last = saved(tmp_path / "a", 1), saved(tmp_path / "a")
    moved = {
        name.split(".")[0]
        for name, value in first["model"].items()
        if not torch.equal(value, last["model"][name])
    }
    assert moved == {"backbone", "decoder"} - {part}
    states = sum(len(group["params"]) for group in last["optimizer"]["param_groups"])
    network = [name for name in last["model"] if name.startswith(("backbone.", "decoder."))]
    assert states < len(network)


def test_frozen_parts_are_in_evaluation_mode_without_gradients():
    backbone = ResNet(depth=18, stages=3, weights="none")
    model = Segmentor(backbone, torch.nn.Dropout(), torch.nn.Identity(), frozen=["backbone"])
    model.train()
    assert not any(module.training for module in backbone.modules())
    assert model.decoder.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_a_frozen_name_that_is_no_part_is_refused():
    parts = [torch.nn.Identity() for _ in range(3)]
    with pytest.raises(UserError, match="may name backbone, decoder, not head"):
        Segmentor(*parts, frozen=["head"])


# --- maps that are computed once ------------------------------------------------------------------


class Counting(torch.nn.Module):
    """A backbone of two maps that counts the pictures it sees."""

    channels = [3, 6]  # noqa: RUF012

    def __init__(self, factor=1.0):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))
        self.pictures = 0

    def forward(self, image):
        self.pictures += len(image)
        small = self.factor * image[..., ::4, ::4]
        return [small, torch.cat([small, -small], 1)[..., ::2, ::2]]


def test_a_picture_is_computed_once_and_read_in_half_precision_ever_after(tmp_path):
    backbone, images = Counting(), torch.rand(3, 3, 16, 24)
    cache = FeatureCache(tmp_path, {"name": "a.B"})
    first = cache.maps(backbone, images)
    assert backbone.pictures == 3
    expected = [maps.half().float() for maps in backbone(images)]
    again = FeatureCache(tmp_path, {"name": "a.B"}).maps(backbone, images.flip(0))
    assert backbone.pictures == 6  # those of `expected`
    for a, b, c in zip(first, again, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b.flip(0), c) and a.dtype == torch.float32
    changed = images.clone()
    changed[1, 0, 0, 0] += 1 / 255
    mixed = cache.maps(backbone, changed)
    assert backbone.pictures == 7
    assert torch.equal(mixed[0][0], first[0][0]) and not torch.equal(mixed[0][1], first[0][1])


def test_other_weights_options_and_precision_have_files_of_their_own(tmp_path):
    image = torch.rand(1, 3, 16, 24)

    def maps(spec=None, factor=1.0):
        backbone = Counting(factor)
        maps = FeatureCache(tmp_path, {"name": "a.B", **(spec or {})}).maps(backbone, image)
        return maps[0], backbone.pictures

    assert maps()[1] == 1 and maps()[1] == 0
    other, computed = maps(factor=2.0)
    assert computed == 1 and torch.equal(other, (2 * image[..., ::4, ::4]).half().float())
    assert maps({"size": "b"})[1] == 1
    assert maps({"weights": "elsewhere.pth"})[1] == 0  # the weights count by their content
    with torch.autocast("cpu", torch.bfloat16):
        assert maps()[1] == 1


def test_training_on_stored_maps_is_training_on_the_frozen_backbone(tmp_path):
    cached = (*FROZEN, f"model.cache={tmp_path / 'maps'}")
    plain = train(tmp_path / "plain", *FROZEN)
    first = train(tmp_path / "first", *cached)
    count = len([*(tmp_path / "maps").rglob("*.npy")])
    again = train(tmp_path / "again", *cached)
    assert count and len([*(tmp_path / "maps").rglob("*.npy")]) == count
    for step, line in plain.items():
        rounding = 2e-3 if step == 1 else 5e-2  # later steps are of networks that grow apart
        assert first[step]["train/loss"] == pytest.approx(line["train/loss"], rel=rounding)
        assert again[step]["train/loss"] == first[step]["train/loss"]
    assert first != plain  # it did read: float16 shows


def test_a_resumed_run_on_stored_maps_ends_bit_for_bit_equal(tmp_path):
    cached = (*FROZEN, f"model.cache={tmp_path / 'maps'}")
    train(tmp_path / "whole", *cached)
    train(tmp_path / "part", *cached, "train.iters=3", "schedule.warmup=2")
    (tmp_path / "part" / "results.json").unlink(missing_ok=True)
    whole = saved(tmp_path / "whole")["model"]
    train(tmp_path / "part2", *cached, f"resume={tmp_path / 'whole' / 'step_0000003.pt'}")
    resumed = saved(tmp_path / "part2")["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_two_processes_share_the_stored_maps(tmp_path):
    cached = (*FROZEN, f"model.cache={tmp_path / 'maps'}", "model.frozen_bn=[decoder]")
    cached += ("model.decoder={name: fcn.FCN, width: 16, dropout: 0.0}",)
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        code, output = run(folder, *cached, processes=processes, double=True, config=TINY)
        assert code == 0, output
        losses.append([line["train/loss"] for line in scalars(folder).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ((WHOLE,), r"model\.cache .* model\.frozen=\[backbone\]"),
        (("model.frozen=[backbone]",), "transforms.Augment draws ever new ones"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_training(tmp_path, overrides, sentence):
    with pytest.raises((ConfigError, UserError), match=sentence):
        train(tmp_path / "a", f"model.cache={tmp_path / 'maps'}", *overrides)
    assert not (tmp_path / "maps").exists()


# --- the whole picture ----------------------------------------------------------------------------


def test_whole_fits_the_picture_in_and_ignores_what_is_left():
    image = torch.full((3, 40, 20), 200, dtype=torch.uint8)
    label = torch.arange(40, dtype=torch.uint8)[:, None].expand(40, 20)
    image, label = transforms.tv_tensors.Image(image), transforms.tv_tensors.Mask(label)
    picture, mask = transforms.Whole(size=[80, 60], flip=0.0)(image, label)
    assert picture.shape == (3, 80, 60) and mask.shape == (80, 60)
    assert (picture[:, :, :40] == 200).all() and (mask[:, 40:] == 255).all()
    assert torch.equal(mask[:, 0], torch.arange(40, dtype=torch.uint8).repeat_interleave(2))
    mirrored, flipped = transforms.Whole(size=[80, 60], flip=1.0)(image, label)
    assert torch.equal(mirrored, picture.flip(-1)) and torch.equal(flipped, mask.flip(-1))


# --- rates by depth -------------------------------------------------------------------------------


def rates(backbone, decay=0.5):
    """{parameter: rate} with lr 1 and heads at 10."""
    model = torch.nn.Module()
    model.backbone, model.classifier = backbone, torch.nn.Linear(2, 2)
    options = Config(lr=1.0, head_lr_factor=10.0, weight_decay=0.1, layer_decay=decay)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = schedule.parameter_groups(model, options)
    found = {names[p]: g["base_lr"] for g in groups for p in g["params"]}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return found


def test_rates_of_a_vision_transformer_fall_block_by_block():
    found = rates(ViT(size="t", weights="none"))
    assert found["backbone.norm.weight"] == 1
    assert found["backbone.blocks.11.attn.qkv.weight"] == 0.5
    assert found["backbone.blocks.0.mlp.fc1.bias"] == 0.5**12
    assert found["backbone.pos_embed"] == found["backbone.patch_embed.proj.weight"] == 0.5**13
    assert found["classifier.weight"] == 10
    assert set(rates(ViT(size="t", weights="none"), 1.0).values()) == {1, 10}


@pytest.mark.parametrize(
    "backbone, expected",
    [
        # MMSegmentation's stage_wise with num_layers 6
        (
            ConvNeXt,
            {"features.0.0.weight": 7, "features.2.1.weight": 7, "features.1.0.layer_scale": 6}
            | {"features.7.2.layer_scale": 3, "norm3.weight": 0},
        ),
        (MiT, {"patch_embed1.proj.weight": 4, "block2.0.norm1.weight": 3, "norm4.weight": 0}),
        (ResNet, {"conv1.weight": 5, "layer1.0.conv1.weight": 4, "layer4.0.conv1.weight": 1}),
    ],
)
def test_rates_of_other_backbones_fall_stage_by_stage(backbone, expected):
    found = rates(backbone(weights="none"))
    assert {name: found[f"backbone.{name}"] for name in expected} == {
        name: 0.5**above for name, above in expected.items()
    }
