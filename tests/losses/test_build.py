"""Losses are built with names and weights, and one that cannot be is named."""

import pytest
import torch
from torch import nn

from engine.config import ConfigError, load
from losses import entropy
from losses.base import Loss
from losses.build import build_losses


def test_losses_are_named_after_their_modules():
    pixel = {"name": "cross_entropy.CrossEntropy"}
    specs = [
        pixel | {"weight": 0.5},
        pixel | {"view": "target"},
        {"name": "occl.OCCL", "weight": 2},
    ]
    terms, weights = build_losses(specs, num_classes=3)
    assert weights == {"cross_entropy": 0.5, "cross_entropy_2": 1.0, "occl": 2}
    assert terms["cross_entropy_2"].view == "target" and terms["occl"].num_classes == 3


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            {"name": "cross_entropy.CrossEntropy", "weight": "heavy"},
            "weight must be a float, not 'heavy'",
        ),
        ({"weight": 1.0}, "a component needs 'name: module.Class'"),
    ],
)
def test_a_loss_that_is_not_understood_is_an_error(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_losses([spec], num_classes=3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["parameter", "buffer", "layer"])
def test_a_loss_that_has_a_state_is_refused(state, monkeypatch):
    class Stateful(Loss):
        def __init__(self):
            super().__init__()
            if state == "parameter":
                self.scale = nn.Parameter(torch.ones(1))
            elif state == "buffer":
                self.register_buffer("mean", torch.zeros(1), persistent=False)
            else:
                self.head = nn.Linear(2, 2)

    Stateful.__module__ = entropy.__name__
    monkeypatch.setattr(entropy, "Stateful", Stateful, raising=False)
    with pytest.raises(ConfigError, match=r"entropy\.Stateful has parameters or buffers.*models/h"):
        build_losses([{"name": "entropy.Stateful"}])


def test_no_loss_at_all_is_refused():
    for text, message in (
        ("losses=[]", "losses must be a list of length 1 or more"),
        ("losses=[cross_entropy.CrossEntropy]", r"losses\.0 must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            load("configs/toy/supervised.yaml", [text])
