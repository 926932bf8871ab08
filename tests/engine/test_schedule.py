"""Learning rates, parameter groups and optimisers."""

import itertools

import pytest
import torch

from engine import schedule
from engine.config import Config
from tests.engine.net import Net, options


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


def test_set_lr_scales_every_group_from_its_base_and_reports_it():
    optimizer = schedule.make_optimizer(Net(), options())
    for scale in (0.5, 0.25):
        assert schedule.set_lr(optimizer, scale) == pytest.approx(
            {"backbone": 0.01 * scale, "head": 0.1 * scale}
        )
    assert {group["lr"] for group in optimizer.param_groups} == {0.01 * 0.25, 0.1 * 0.25}


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
