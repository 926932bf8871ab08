"""What the YAML names of a network is built, runs, and has a name of its own."""

import pytest
import torch

from engine import checkpoint
from engine.config import ConfigError, load, plain, stages
from engine.errors import UserError
from engine.weights import WeightsError
from models.build import build_prototypes, build_segmentor, initial_network, restore
from tests.runs import ROOT, TINY, TINY_UDA


@pytest.mark.parametrize("name", ["classifier", "keys", "training"])
def test_a_member_cannot_have_a_name_that_is_taken(name):
    with pytest.raises(ConfigError, match=f"prototypes: the name {name} is taken"):
        build_prototypes({name: {"name": "centroids.Centroids"}}, num_classes=3, in_channels=4)


@pytest.mark.parametrize("view", ["source", "teacher", "none"])
def test_a_member_of_the_tower_with_another_view_would_never_be_fitted(view):
    spec = {"name": "visual_text.VisualText", "offline": 5, "view": view}
    with pytest.raises(ConfigError, match=rf"offline\): set view: tower .*, not view: {view}"):
        build_prototypes({"visual": spec}, num_classes=3, in_channels=4)
    build_prototypes({"visual": spec | {"view": "tower"}}, num_classes=3, in_channels=4)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("model.frozen=[head]", "may name backbone, decoder, not head"),
        ("model.cache=maps", r"frozen backbone: model\.frozen=\[backbone\]"),
        ("model={lora: 4, frozen: [backbone]}", r"take the backbone out of model\.frozen"),
        ("model.lora=4", "of which ResNet has none"),
        ("model.frozen_bn=[projector]", "model.frozen_bn may name backbone, decoder, not projector"),
        (
            "model={backbone: {name: mit.MiT, weights: none}, heads: {region: {name: region.Region, "
            "stage: 2}, other: {name: region.Region, stage: 3}}}",
            "region, other all look into the blocks",
        ),
    ],
)
def test_what_cannot_be_frozen_or_stored_is_one_sentence(override, sentence):
    cfg = load(TINY, [override])
    with pytest.raises(UserError, match=sentence):
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
    content |= {"format": 1, "step": 0, "palette": [[0, 0, 0]] * 3}
    return content | ({"teacher": {f"network.{k}": v for k, v in teacher.items()}})


@pytest.mark.parametrize(
    "kind, weights, expected",
    [("ema", "teacher", 2), ("ema", "student", 1), ("frozen", "teacher", 1)],
)
def test_a_checkpoint_stands_for_the_network_that_its_run_reports(
    monkeypatch, caplog, kind, weights, expected
):
    """For what starts from it, as in the next stage of the same run, and for eval.py."""
    monkeypatch.setattr(checkpoint.weights, "read", lambda path: saved_by(kind, weights))
    cfg = stages(load(TINY_UDA, ["stages=[{init: a.pt}]"]))[0]
    for network in (initial_network(cfg, [*"abc"], None), restore("a.pt")[0]):
        assert (network.decoder.state_dict()["join.1.running_mean"] == expected).all()
    assert "frozen" not in caplog.text
    network = restore("a.pt", ["eval.weights=teacher"])[0]
    assert (network.decoder.state_dict()["join.1.running_mean"] == 2).all()
    assert ("frozen, so this is the network of the stage before" in caplog.text) == (
        kind == "frozen"
    )


def test_a_single_stage_from_other_classes_cannot_be_compared_with_its_start(monkeypatch):
    monkeypatch.setattr(checkpoint.weights, "read", lambda path: saved_by("ema", "student"))
    cfg = load(TINY_UDA, ["stages=[{init: a.pt}]"])
    with pytest.raises(ConfigError, match=r"no checkpoint of these classes: set uda.compare=false"):
        initial_network(stages(cfg)[0], [*"abd"], None)
    cfg = load(TINY_UDA, ["stages=[{init: a.pt}]", "uda.compare=false"])
    network = initial_network(stages(cfg)[0], [*"abd"], None)
    assert (network.decoder.join[1].running_mean == 1).all()


# --- model.init ------------------------------------------------------------------------------------------------------


def started(tmp_path, classes, *overrides):
    """A network that starts from a checkpoint of the classes a, b and c in which all is 1."""
    torch.save(saved_by("ema", "student"), tmp_path / "a.pt")
    model = load(TINY, [f"model.init={tmp_path / 'a.pt'}", *overrides]).model
    return build_segmentor(model, [*classes])


def test_a_network_keeps_the_classifier_of_the_same_classes_alone(tmp_path, caplog):
    caplog.set_level("INFO", logger="engine")
    vectors = started(tmp_path, "abc").classifier.means()
    assert (vectors == 1).all() and "left out 0 keys of the file" in caplog.text
    assert "missing  0 keys, which keep their initial values" in caplog.text
    for classes in ("acb", "abcd", "ab"):
        caplog.clear()
        network = started(tmp_path, classes)
        assert not (network.classifier.means() == 1).any()
        assert all((p == 1).all() for p in network.decoder.parameters())
        assert "left out 2 keys: classifier.prototypes (2) of the file" in caplog.text
        here = ", ".join(classes)
        assert (
            f"Its classes are a, b, c, and here {here}: the classifier is left out." in caplog.text
        )


def test_what_has_another_shape_is_listed_and_the_backbone_must_fit(tmp_path, caplog):
    caplog.set_level("INFO", logger="engine")
    head = "model.heads.auxiliary={name: auxiliary.Auxiliary, stage: 2, width: 8}"
    network = started(tmp_path, "abc", "model.decoder.width=24", head)
    assert (network.backbone.conv1.weight == 1).all()
    assert not (network.decoder.convs[0][0].weight == 1).any()
    for part in ("auxiliary.convs (5)", "decoder.convs (10)", "decoder.join (5)"):
        assert part in caplog.text.split("missing")[1].split("left out")[0]
    with pytest.raises(WeightsError, match=r"a\.pt does not fit the backbone ResNet: .* missing"):
        started(tmp_path, "abc", "model.backbone.stages=4")
    deeper = saved_by("ema", "student")
    deeper["model"]["backbone.layer3.0.bn1.weight"] = torch.ones(256)
    torch.save(deeper, tmp_path / "deeper.pt")
    with pytest.raises(WeightsError, match=r"not fit the backbone .* 1 unexpected \(layer3"):
        build_segmentor(load(TINY, [f"model.init={tmp_path / 'deeper.pt'}"]).model, "abc")
    with pytest.raises(WeightsError, match="there is no file nowhere"):
        build_segmentor(load(TINY, ["model.init=nowhere.pth"]).model, "abc")


def test_a_checkpoint_of_such_a_run_needs_no_file(tmp_path):
    cfg = load(TINY, [f"model.init={tmp_path}/gone.pt"])
    build_segmentor(cfg.model, "abc", pretrained=False)
