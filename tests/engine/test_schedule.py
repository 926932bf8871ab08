"""Learning rates, parameter groups and optimisers."""

import itertools

import pytest
import torch
from torch import nn

from engine import schedule
from engine.config import Config, load
from engine.errors import UserError
from models.backbones.base import Backbone
from models.backbones.convnext import ConvNeXt
from models.backbones.mit import MiT
from models.backbones.resnet import ResNet
from models.backbones.vit import ViT
from tests.engine.net import Net, options
from tests.runs import ROOT


def plan(**changes):
    return Config({"warmup": 10, "warmup_ratio": 0.1, "power": 0.9, "min_ratio": 0.0} | changes)


def test_the_warm_up_is_linear_from_its_ratio_to_one():
    values = [schedule.factor(step, 100, plan()) for step in range(11)]
    assert values == pytest.approx([0.1 + 0.9 * step / 10 for step in range(11)])
    assert schedule.factor(0, 100, plan(warmup=0)) == 1


def test_the_decay_is_polynomial_monotone_and_ends_at_the_minimum():
    values = [schedule.factor(step, 100, plan()) for step in range(10, 101)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[0] == 1 and values[-1] == 0
    assert values[45] == pytest.approx(0.5**0.9)  # half of the 90 steps after the warm-up
    assert schedule.factor(45, 90, plan(warmup=0, power=2.0)) == 0.25
    assert schedule.factor(250, 200, plan()) == 0


def test_the_decay_stops_at_min_ratio():
    values = [schedule.factor(step, 100, plan(min_ratio=0.2, power=1.0)) for step in range(10, 101)]
    assert min(values) == values[-1] == 0.2 and values[45] == pytest.approx(0.5)


def test_the_cosine_starts_at_one_and_ends_at_the_minimum():
    cosine = plan(power="cosine", min_ratio=0.2)
    values = [schedule.factor(step, 100, cosine) for step in range(10, 101)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert (values[0], values[45], values[90]) == pytest.approx((1, 0.6, 0.2))
    assert values[30] == pytest.approx(0.2 + 0.8 * 0.75)  # cos(60 degrees) = 1/2
    flat = [schedule.factor(step, 100, plan(power="cosine", min_ratio=1.0)) for step in (10, 55)]
    assert flat == [1, 1]


def test_a_run_that_is_all_warm_up_is_no_division_by_zero():
    assert schedule.factor(10, 10, plan()) == 1


def test_every_trainable_parameter_is_in_one_group_with_its_rate_and_decay():
    net = Net()
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = schedule.parameter_groups(net, options())
    placed = {
        names[p]: (g["label"], g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(placed)
    assert placed == {
        "backbone.conv.weight": ("backbone", 0.01, 0.5),
        "backbone.conv.bias": ("backbone", 0.01, 0.0),
        "backbone.norm.weight": ("backbone", 0.01, 0.0),
        "backbone.norm.bias": ("backbone", 0.01, 0.0),
        "backbone.pos_embed": ("backbone", 0.01, 0.0),
        "classifier.weight": ("head", 0.1, 0.5),
        "classifier.bias": ("head", 0.1, 0.0),
    }


def test_a_probe_has_a_group_of_its_own():
    net = Net()
    net.head = nn.ModuleDict({"probe": nn.Linear(2, 3)})
    for lr, rate in ((0.01, 0.1), (1e-6, 5e-3)):  # of a head, and one at which it learns
        groups = schedule.parameter_groups(net, options(lr=lr))
        groups = [g for g in groups if g["label"] == "probe"]
        assert [(g["base_lr"], g["weight_decay"]) for g in groups] == [(rate, 0)]
        assert len(groups[0]["params"]) == 2


def test_set_lr_scales_every_group_from_its_base_and_reports_it():
    optimizer = schedule.make_optimizer(Net(), options())
    for scale in (0.5, 0.25):
        assert schedule.set_lr(optimizer, scale) == pytest.approx(
            {"backbone": 0.01 * scale, "head": 0.1 * scale}
        )
    assert {group["lr"] for group in optimizer.param_groups} == {0.01 * 0.25, 0.1 * 0.25}


def test_no_rate_falls_below_the_least_one_and_none_rises_to_it():
    optimizer = schedule.make_optimizer(Net(), options())
    for scale, low, expected in ((0.5, 0.01, (0.01, 0.05)), (0.0, 0.05, (0.01, 0.05))):
        rates = schedule.set_lr(optimizer, scale, low)
        assert rates == pytest.approx({"backbone": expected[0], "head": expected[1]})


def test_foundation_models_have_the_rates_of_tqdms_released_configurations():
    cfg = load(ROOT / "configs" / "dg" / "gta5_ppar_clip_vit_b16.yaml", [])
    assert (cfg.optimizer.name, cfg.optimizer.weight_decay, cfg.train.iters) == (
        "AdamW",
        1e-4,
        20000,
    )
    assert cfg.schedule.warmup == 1500 and cfg.optimizer.layer_decay == 1
    optimizer = schedule.make_optimizer(Net(), cfg.optimizer)
    expected = {0: (1e-12, 1e-11), 1500: (1e-6, 1e-5), 19999: (1e-6, 1e-6)}
    for step, (backbone, head) in expected.items():
        rates = schedule.set_rates(optimizer, step, cfg.train.iters, cfg.schedule)
        assert rates == pytest.approx({"backbone": backbone, "head": head})


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("AdamW", torch.optim.AdamW, {"betas": (0.7, 0.9)}),
        ("SGD", torch.optim.SGD, {"momentum": 0.8}),
    ],
)
def test_optimisers_get_their_options(name, kind, expected):
    optimizer = schedule.make_optimizer(Net(), options(name=name))
    assert type(optimizer) is kind
    assert all(
        group[key] == value for group in optimizer.param_groups for key, value in expected.items()
    )
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}


def test_a_beta_may_be_a_whole_number():
    optimizer = schedule.make_optimizer(Net(), options(name="AdamW", betas=[0, 0.9]))
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.9)


def rates(backbone, decay=0.5, head=None):
    """{parameter: rate} with lr 1 and heads at 10."""
    model = torch.nn.Module()
    model.backbone, model.classifier = backbone, head or torch.nn.Linear(2, 2)
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


def test_layers_are_counted_among_those_that_are_trained_and_of_the_backbone():
    found = rates(ViT(size="t", taps=[1, 3], weights="none"))
    assert found["backbone.blocks.3.attn.qkv.weight"] == 0.5
    assert found["backbone.patch_embed.proj.weight"] == 0.5**5
    mit, head = MiT(weights="none"), torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})
    head["layers"].extend(torch.nn.Linear(2, 2) for _ in range(9))
    found = rates(mit, head=head)
    assert found["backbone.block1.0.norm1.weight"] == found["backbone.norm1.weight"] == 0.5**4
    assert found["backbone.norm3.weight"] == 0.5**2 and found["backbone.norm4.weight"] == 1


def test_a_backbone_without_numbered_layers_has_no_layer_decay():
    backbone = Backbone()
    backbone.conv = nn.Conv2d(3, 4, 1)
    with pytest.raises(UserError, match=r"set optimizer\.layer_decay=1"):
        rates(backbone)


def test_a_model_of_which_nothing_is_trained_is_one_sentence():
    net = Net().requires_grad_(False)
    with pytest.raises(UserError, match=r"nothing is left to train: .*model\.frozen"):
        schedule.make_optimizer(net, options())


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
