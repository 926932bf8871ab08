"""What the YAML names of a network is built, runs, and has a name of its own."""

import pytest
import torch

from engine import checkpoint
from engine.config import ConfigError, load, plain, stages
from models.build import build_prototypes, build_segmentor, initial_network, restore
from tests.runs import ROOT, TINY, TINY_UDA


@pytest.mark.parametrize("name", ["classifier", "keys", "training"])
def test_a_member_cannot_have_a_name_that_is_taken(name):
    with pytest.raises(ConfigError, match=f"prototypes: the name {name} is taken"):
        build_prototypes({name: {"name": "centroids.Centroids"}}, num_classes=3, in_channels=4)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("model.frozen=[head]", "may name backbone, decoder, not head"),
        ("model.cache=maps", r"frozen backbone: model\.frozen=\[backbone\]"),
    ],
)
def test_what_cannot_be_frozen_or_stored_is_one_sentence(override, sentence):
    cfg = load(TINY, [override])
    with pytest.raises(ConfigError, match=sentence):
        build_segmentor(cfg.model, ("a", "b"))


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


NETWORKS = [
    ("deeplabv2_r101", 19, 76, 8),
    ("mit_b5_daformer", 19, 256, 4),
    ("mit_b0_segformer", 150, 256, 4),
]


@pytest.mark.parametrize("name, num_classes, channels, stride", NETWORKS)
def test_base_networks_build_and_run(name, num_classes, channels, stride):
    model = load(ROOT / "configs" / "base" / f"{name}.yaml").model
    with torch.device("meta"):
        classes = [str(number) for number in range(num_classes)]
        network = build_segmentor(model, classes, pretrained=False).eval()
        output = network.segment(torch.rand(1, 3, 128, 96))
    assert output.features.shape == (1, channels, 128 // stride, 96 // stride)
    assert output.logits.shape == (1, num_classes, 128 // stride, 96 // stride)
    millions = {"deeplabv2_r101": 43.9, "mit_b5_daformer": 85.2, "mit_b0_segformer": 3.8}
    assert round(count(network) / 1e6, 1) == millions[name]


def saved_by(kind, weights):
    """A checkpoint of the second stage of a run whose networks hold 1 (student) and 2 (teacher)."""
    given = [f"eval.weights={weights}", f"stages=[{{}}, {{name: adapt, teacher: {kind}}}]"]
    cfg = load(TINY_UDA, given)
    state = build_segmentor(cfg.model, [*"abc"], False).state_dict()
    student, teacher = ({key: torch.full_like(v, n) for key, v in state.items()} for n in (1, 2))
    content = {"config": plain(cfg), "stage": 1, "classes": [*"abc"], "model": student}
    return content | ({"teacher": {f"network.{k}": v for k, v in teacher.items()}})


@pytest.mark.parametrize(
    "kind, weights, expected",
    [("ema", "teacher", 2), ("ema", "student", 1), ("frozen", "teacher", 1)],
)
def test_a_checkpoint_stands_for_the_network_that_its_run_reports(
    monkeypatch, caplog, kind, weights, expected
):
    """For what starts from it, as in the next stage of the same run, and for eval.py."""
    monkeypatch.setattr(checkpoint, "load", lambda path: saved_by(kind, weights))
    cfg = stages(load(TINY_UDA, ["stages=[{init: a.pt}]"]))[0]
    for network in (initial_network(cfg, [*"abc"], None), restore("a.pt")[0]):
        assert (network.decoder.state_dict()["join.1.running_mean"] == expected).all()
    assert "frozen" not in caplog.text
    network = restore("a.pt", ["eval.weights=teacher"])[0]
    assert (network.decoder.state_dict()["join.1.running_mean"] == 2).all()
    assert ("frozen, so this is the network of the stage before" in caplog.text) == (
        kind == "frozen"
    )
