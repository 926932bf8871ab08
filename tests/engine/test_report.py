"""What a run says at its end: tables with nothing unknown in them, no set evaluated twice, files written whole."""

import contextlib
import json
import logging
import math
import re
import signal
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from datasets.build import build_data
from datasets.toy import Toy
from engine import report
from engine.config import Config, load
from engine.errors import UserError
from engine.inference import NonFiniteScores
from engine.metrics import ConfusionMatrix
from tests.runs import TINY

CPU, PLAIN = torch.device("cpu"), contextlib.nullcontext()


@pytest.fixture
def said(caplog):
    """Everything that was logged, as one text."""
    logger = logging.getLogger("engine")
    logger.propagate = True
    caplog.set_level(logging.INFO, "engine")
    yield lambda: caplog.text
    logger.propagate = False


@pytest.mark.parametrize(
    ("train", "val", "target"),
    [
        ({"split": "train_day"}, {"split": "val_day"}, False),
        ({"split": "train_day"}, {"split": "train_dusk"}, True),
        ({"split": "train"}, {"split": "val_day"}, False),
        ({"root": "/a"}, {"root": "/b"}, True),
        ({"root": "/a"}, {}, False),  # which is data.root
    ],
)
def test_a_validation_set_is_of_the_source_by_its_root_and_its_light(train, val, target):
    data = {"root": "/a", "seen": [], "train": {"name": "camvid.CamVid", **train}}
    cfg = Config(data=Config(data | {"val": {"name": "camvid.CamVid", **val}}))
    shown = types.SimpleNamespace(samples=[("a.png", None)])
    assert report.selected_on_target(cfg, shown, {}) == target


def test_a_mean_over_unseen_domains_is_unknown_where_one_is():
    assert report.mean_of({"a": 1.0, "b": 3.0}, ["a", "b"]) == 2.0
    assert report.mean_of({"a": 1.0, "b": None}, ["a", "b"]) is report.mean_of({}, []) is None


class Constant(torch.nn.Module):
    """A network that sees one class everywhere, or nothing but NaN."""

    def __init__(self, score=1.0, number=3):
        super().__init__()
        self.score, self.number, self.seen = score, number, 0

    def segment(self, image):
        self.seen += 1
        logits = torch.zeros(len(image), 11, 4, 6)
        logits[:, self.number] = self.score
        return types.SimpleNamespace(logits=logits)


def options(**changes):
    return load(TINY, [f"eval.{key}={value}" for key, value in changes.items()]).eval


def toys(**more):
    return Toy(domain="real", split="test", length=2, size=[32, 48], **more)


def matrix(classes, counts):
    filled = ConfusionMatrix(classes)
    filled.matrix += torch.tensor(counts)
    return filled


def a_run(folder):
    """What the reports ask of an engine.run.Run."""
    log = types.SimpleNamespace(**dict.fromkeys(("scalars", "picture", "text"), lambda *_: None))
    standing = {"done": 5, "offset": 2, "total": 7, "best": 0.0, "known": {}, "about": {}}
    stage = types.SimpleNamespace(eval=options(), data=types.SimpleNamespace(workers=0))
    return types.SimpleNamespace(
        writer=log,
        device=CPU,
        autocast=PLAIN,
        folder=folder,
        seconds=lambda: 1.0,
        exhausted=lambda: False,
        stage=stage,
        **standing,
    )


def test_before_and_after_is_about_the_classes_that_both_have(monkeypatch, said):
    names = ["Sky", "Road", "Car"]
    # Neither the truth nor the network before has a car, the network after sees some: its IoU is 0 there.
    before, after = ([[2, 2, 0], [0, 4, 0], [0, 0, 0]], [[4, 0, 0], [0, 2, 2], [0, 0, 0]])
    monkeypatch.setattr(report, "evaluate", lambda *_, **__: matrix(names, before))
    data = {"real": types.SimpleNamespace(CLASSES=names)}
    report.compare(
        None, None, {"real": matrix(names, after)}, data, options(pictures=0), CPU, PLAIN, Path()
    )
    rows = {line.split()[0]: line.split()[-3:] for line in said().splitlines() if line.strip()}
    assert rows["Sky"] == ["50.00", "100.00", "+50.00"] and rows["Car"] == ["-", "0.00", "-"]
    assert rows["mIoU"] == ["58.33", "75.00", "+16.67"]
    assert "mIoU of the 2 classes that both have" in said() and "nan" not in said()
    report.compare(
        None, None, {"real": matrix(names, before)}, data, options(pictures=0), CPU, PLAIN, Path()
    )
    assert said().splitlines()[-1].split() == ["mIoU", "58.33", "58.33", "+0.00"]


@pytest.mark.parametrize(
    ("labelled", "text"),
    [(False, r"0\.0 % labelled, - right"), (True, r"100\.0 % labelled, [1-9]\d\.\d % right")],
)
def test_of_no_pseudo_labels_none_is_right_or_wrong(said, labelled, text):
    class Labeler:
        labels_images, stored = True, False

        def label(self, network, image, prototypes):
            return torch.full((1, *image.shape[-2:]), 3 if labelled else 255)

    report.log_pseudo_labels(Constant(), [Labeler()], {}, toys(), a_run(Path()), 0)
    assert re.search(f"pseudo labels: {text}", said())


def test_a_signal_cuts_the_look_at_pseudo_labels_short(said, monkeypatch):
    class Labeler:
        labels_images, stored, seen = True, False, 0

        def label(self, network, image, prototypes):
            self.seen += 1
            monkeypatch.setattr(report.signals, "received", signal.SIGTERM)
            return torch.full((1, *image.shape[-2:]), 3)

    labelers = [Labeler(), Labeler()]
    report.log_pseudo_labels(Constant(), labelers, {}, toys(), a_run(Path()), 0)
    assert len(toys()) > 1 and [labeler.seen for labeler in labelers] == [1, 0]
    assert "pseudo labels" not in said()


def test_a_validation_that_is_not_finite_leaves_no_older_one(monkeypatch, tmp_path):
    data, run = toys(), a_run(tmp_path)
    report.validate(Constant(), data, options(), PLAIN, run)
    assert run.known
    monkeypatch.setattr(report, "evaluate", mock.Mock(side_effect=NonFiniteScores("val")))
    assert math.isnan(report.validate(Constant(), data, options(), PLAIN, run)) and not run.known


def test_a_row_is_named_by_its_run():
    assert report.run_title(Path("runs/toy/dg_ppar/seed0")) == "toy/dg_ppar seed0"
    assert report.run_title(Path("runs/mine/seed1")) == "mine seed1"
    assert report.run_title(Path("/scratch/mine")) == "/scratch/mine"
    assert report.run_title(Path("runs/mine")) == "runs/mine"


def test_a_table_of_other_runs_has_a_mean_and_nothing_unseen():
    lines = report.domain_table({"a": {"real": 60.0, "night": 30.0}}).splitlines()
    assert [line.split() for line in lines] == [
        ["mIoU", "real", "night", "mean"],
        ["a", "60.00", "30.00", "45.00"],
    ]


def test_a_test_set_that_is_the_validation_set_is_evaluated_once(tmp_path, monkeypatch):
    cfg = load(TINY, ["data.test.toy={split: val}", "data.test.night={name: toy.Toy, length: 2}"])
    _, val_set, test_sets, *_ = build_data(cfg)
    assert test_sets["toy"] is val_set and test_sets["night"] is not val_set
    network, data, run = Constant(), {"toy": val_set, "other": toys()}, a_run(tmp_path)
    score = report.validate(network, val_set, options(), PLAIN, run)
    assert network.seen == len(val_set)
    arguments = (network, data, options(pictures=0), PLAIN, run)
    report.final_report(*arguments)
    assert network.seen == len(val_set) + 2
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["toy"]["mIoU"] == pytest.approx(score, abs=1e-4)
    run.known = {}
    report.final_report(*arguments)
    assert network.seen == 2 * len(val_set) + 4
    assert results == json.loads((tmp_path / "results.json").read_text())["results"]


def test_scores_that_are_not_finite_choose_nothing_and_are_not_reported(tmp_path, said):
    network = Constant(float("nan"))
    run = a_run(tmp_path)
    score = report.validate(network, toys(), options(), PLAIN, run)
    assert (
        run.known == {}
        and score != score
        and "step 7: val, 2 of 2 images: the network's scores" in said()
    )
    with pytest.raises(NonFiniteScores, match="real, 2 of 2 images"):
        report.report(network, {"real": toys()}, options(), CPU, PLAIN, tmp_path, {}, run.known)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["../real", "/tmp/real", "..", "a/../.."])
def test_a_set_whose_name_leads_out_of_the_folder_is_not_reported(tmp_path, name):
    network = Constant()
    with pytest.raises(UserError, match=r"leads out of the folder .*: choose another name"):
        report.report(network, {name: toys()}, options(), CPU, PLAIN, tmp_path, {})
    assert network.seen == 0
