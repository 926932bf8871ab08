"""Diagnostics of class vectors against their definitions, and what eval.py writes of them."""

import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eval as evaluation
from engine.diagnostics import (
    bars,
    checked_pairs,
    frequency_groups,
    norm_pixels,
    pair_sums,
    separability,
)
from engine.errors import UserError
from engine.metrics import ConfusionMatrix
from models.classifiers.cbp import CBP
from tests.runs import train


def test_separability_of_orthogonal_equal_and_given_vectors():
    found = separability(CBP(num_classes=150, in_channels=256).means())
    assert all(abs(value) < 1e-3 for value in found.values()) and abs(found["CS"]) < 1e-4
    same = separability(torch.ones(7, 4) * torch.arange(1.0, 8)[:, None])
    assert same == {
        "CS": pytest.approx(21),
        "CS_abs": pytest.approx(21),
        "max_cos": pytest.approx(1),
    }
    assert separability(torch.tensor([[2.0, 0], [-3, 0], [0, 1]])) == {
        "CS": -1.0,
        "CS_abs": 1.0,
        "max_cos": 1.0,
    }


def test_separability_of_random_directions_scatters_as_it_should():
    values = [separability(torch.randn(30, 64))["CS"] for _ in range(200)]
    assert abs(np.mean(values)) < 0.8 and np.std(values) == pytest.approx(
        math.sqrt(30 * 29 / 2 / 64), rel=0.2
    )


def test_norms_correlate_with_pixels_only_where_they_differ():
    vectors = nn.functional.normalize(torch.randn(6, 8), dim=1)
    pixels = np.array([5, 1, 9, 30, 2, 2])
    scaled = vectors * torch.from_numpy(3 + 2.0 * pixels)[:, None]
    assert (
        norm_pixels(scaled, pixels) == pytest.approx(1)
        and norm_pixels(1 / scaled.norm(dim=1)[:, None], pixels) < 0
    )
    assert norm_pixels(CBP(num_classes=6, in_channels=8).means(), pixels) is None
    assert norm_pixels(scaled, np.ones(6)) is None


def test_groups_hold_classes_that_are_about_as_frequent_rarest_first():
    f1, pixels = np.array([0.1, 0.2, np.nan, 0.4, 0.5]), np.array([50, 10, 20, 40, 30])
    groups = frequency_groups(f1, pixels)
    assert [group["classes"] for group in groups] == [[1, 2, 4], [3, 0]]
    assert [group["F1"] for group in groups] == [
        pytest.approx(35),
        pytest.approx(25),
    ]  # without the class that has none
    assert [group["pixels"] for group in groups] == [20, 45]
    assert [len(frequency_groups(np.ones(k), np.arange(k))) for k in (1, 3, 11, 19, 150)] == [
        1,
        1,
        5,
        9,
        15,
    ]
    assert {len(group["classes"]) for group in frequency_groups(np.ones(150), np.arange(150))} == {
        10
    }
    assert frequency_groups(np.array([np.nan]), np.array([0]))[0]["F1"] is None


def test_pairs_add_up_and_name_classes_of_the_data_set():
    matrix = ConfusionMatrix(["sofa", "chair", "oven", "microwave"])
    matrix.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 2]))
    assert checked_pairs(None, matrix.classes) == [["sofa", "chair"], ["oven", "microwave"]]
    sums = pair_sums(matrix, checked_pairs(None, matrix.classes))
    assert sums == {"sofa + chair": pytest.approx(100 * (1 / 2 + 2 / 3)), "oven + microwave": None}
    assert checked_pairs([["chair", "oven"]], matrix.classes) == [["chair", "oven"]]
    with pytest.raises(UserError, match="pairs names the class 'bed'; the data set has sofa"):
        checked_pairs([["sofa", "bed"]], matrix.classes)
    for wrong in ("sofa", ["sofa", "chair"], [["sofa"]]):
        with pytest.raises(UserError, match="must be a list of pairs"):
            checked_pairs(wrong, matrix.classes)


def test_a_bar_is_as_long_as_its_number():
    picture = bars([25.0, 50.0, None, 100.0], ["a", "b", "c", "d"], "title")
    filled = (picture == (34, 124, 142)).all(2)
    rows = [int(band.sum(1).max()) for band in np.array_split(filled, 5)]
    assert rows[0] == rows[3] == 0 and [rows[i] for i in (1, 2, 4)] == [101, 201, 401]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folder of one step with a learned classifier."""
    folder = tmp_path_factory.mktemp("run")
    train(
        folder,
        "train.iters=1",
        "model.classifier={name: linear.Linear}",
        f"data.cache={folder}/cache",
    )
    return folder


def test_eval_writes_diagnostics_as_numbers_and_pictures(trained, capsys):
    path = trained / "step_0000001.pt"
    evaluation.main([str(path), "diagnostics=true", "pairs=[[Car, Road]]"])
    folder = trained / "eval_step_0000001"
    content = json.loads((folder / "diagnostics.json").read_text())
    vectors = (
        types.SimpleNamespace(**torch.load(path, weights_only=True))
        .model["classifier.conv.weight"]
        .flatten(1)
    )
    assert content["CS"] == pytest.approx(separability(vectors)["CS"])
    assert content["norm_pixels"] == pytest.approx(norm_pixels(vectors, content["pixels"]))
    assert sum(content["pixels"]) == 10 * 48 * 64 and len(content["sets"]["toy"]["groups"]) == 5
    table = json.loads((folder / "toy.json").read_text())
    iou = dict(zip(table["classes"], table["IoU"]))
    assert content["sets"]["toy"]["pairs"] == {
        "Car + Road": pytest.approx(iou["Car"] + iou["Road"], abs=1e-3)
    }
    names = [name for group in content["sets"]["toy"]["groups"] for name in group["classes"]]
    assert sorted(names) == sorted(table["classes"])
    assert content["pixels"][table["classes"].index(names[0])] == min(content["pixels"])
    assert (
        Image.open(folder / "cosines.png").size[0] > 200
        and Image.open(folder / "toy_F1.png").size[0] > 400
    )
    assert [*folder.glob("events.out.tfevents.*")]
    output = capsys.readouterr().out
    assert (
        "F1 of groups of classes, rarest first: " in output and "sums of IoU; Car + Road" in output
    )


def test_mistakes_are_found_before_anything_is_evaluated(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "report", None)
    path = str(trained / "step_0000001.pt")
    for arguments, message in (
        (["diagnostics=yes"], "diagnostics must be true, not yes"),
        (["pairs=[[Car, Road]]"], "pairs belongs to diagnostics=true"),
        (["diagnostics=true", "pairs=[[Car, Tram]]"], "the class 'Tram'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.main([path, *arguments])
