"""What the YAML names of a network is built, runs, and has a name of its own."""

import pytest
import torch

from engine.config import ConfigError, load
from models.build import build_prototypes, build_segmentor
from tests.runs import ROOT, TINY


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
