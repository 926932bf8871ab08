"""Every experiment in configs/ is read, and all that it names is built: no configuration can rot."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import reproduce
from datasets.base import DataError
from engine.accepted import check_sections
from engine.build import build, build_any
from engine.config import load, stages
from engine.schedule import make_optimizer
from losses.build import build_adaptation, build_losses
from models.build import build_prototypes, build_segmentor, build_tower, joint_channels
from tests.runs import ROOT

EXPERIMENTS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("base", "configs")
)
SCRIPTS = {"uda": "train_uda.py", "dg": "train_dg.py"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Random numbers on the meta device need no time, but two calls have no form for it."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)


def script_of(path):
    words = (path.parent.name, path.name.split("_")[0])
    return next((name for word, name in SCRIPTS.items() if word in words), "train_supervised.py")


def classes_of(spec):
    """Class names of the data set that a component names; folder.Folder has them as an option."""
    module, name = spec["name"].split(".")
    return getattr(importlib.import_module(f"datasets.{module}"), name).CLASSES or spec["classes"]


TEXTS = ("text.Text", "mapped.Mapped")


@pytest.mark.parametrize(
    "path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "configs"))
)
def test_an_experiment_builds_what_it_names(path, tmp_path):
    different = {str({**cfg, "stage": 0, "optimizer": 0}): cfg for cfg in stages(load(path))}
    for cfg in different.values():
        train = cfg.data.train if isinstance(cfg.data.train, list) else [cfg.data.train]
        for spec in (
            *train,
            cfg.data.val,
            cfg.data.target,
            cfg.data.monitor,
            *cfg.data.test.values(),
        ):
            if spec["name"] not in ("none", "toy.Toy"):
                with pytest.raises(DataError, match="there is no folder"):
                    build("datasets", {**spec, "root": "/nowhere"}, seed=0)
        for spec in (cfg.data.augment, cfg.data.target_augment):
            if spec["name"] != "none":
                build("datasets", spec)
        classes = classes_of(train[0])
        context = {"num_classes": len(classes), "classes": classes, "seed": 0}
        joint = joint_channels(cfg.model)
        specs = dict(cfg.prototypes)
        if specs.get("text", {}).get("name") in TEXTS:  # made by a command, not shipped
            torch.save(
                {"vectors": torch.randn(len(classes), joint), "classes": list(classes)},
                tmp_path / "text.pt",
            )
            specs["text"] = {**specs["text"], "file": str(tmp_path / "text.pt"), "rows": None}
        if cfg.dg.tower["name"] != "none":
            cfg.dg.tower["weights"] = "none"
        context["in_channels"] = 1
        text = {name: spec for name, spec in specs.items() if spec["name"] in TEXTS}
        build_prototypes(text, joint, **context)
        with torch.device("meta"):
            network = build_segmentor(cfg.model, classes, pretrained=False)
            context["in_channels"] = network.decoder.channels
            others = {name: spec for name, spec in specs.items() if name not in text}
            members, *_ = build_prototypes(others, joint, **context)
            build_tower(cfg.dg.tower, joint)
        build_any("losses", cfg.dg.reweight, **context)
        for key in ("style", "strong"):
            build_any("datasets", cfg.dg[key], **context)
        members = {*members, *text}
        terms, _ = build_losses(cfg.losses, **context)
        labelers, *_ = build_adaptation(cfg.uda, **context)
        make_optimizer(network, cfg.optimizer)
        for part in (*labelers, *terms.values()):
            wanted = {getattr(part, name, None) for name in ("prototypes", "easy", "hard")}
            wanted = {name for name in wanted if isinstance(name, str)}
            wanted |= set(getattr(part, "members", ()))
            assert wanted - {"pair", "classifier"} <= members, (
                f"{type(part).__name__} wants {wanted}"
            )


@pytest.mark.parametrize(
    "path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "configs"))
)
def test_an_experiment_says_how_to_run_it_and_what_was_measured(path):
    header = [line for line in Path(path).read_text().splitlines() if line.startswith("#")]
    assert header and f"{script_of(path)} {path.relative_to(ROOT)}" in header[0]
    assert any("easured" in line or "not yet run" in line for line in header)


@pytest.mark.parametrize(
    "path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "configs"))
)
def test_an_experiment_sets_nothing_that_its_script_ignores(path):
    check_sections(load(path), script_of(path).removesuffix(".py"))


GRIDS = sorted((ROOT / "benchmarks" / "grids").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_a_grid_starts_only_what_can_be_configured(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = reproduce.load_grid(path, [])
    for row, _, _, (_, script, config, *settings) in reproduce.jobs(grid):
        assert Path(script).is_file() and stages(load(config, settings))
        assert grid["rows"][row].get("after", row) in grid["rows"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_a_grid_and_its_table_say_the_command_that_runs_it(path):
    command = f"python -m benchmarks.reproduce {path.relative_to(ROOT)}"
    assert path.read_text("utf-8").startswith(f"# {command}")
    table = ROOT / "benchmarks" / "results" / f"{path.stem}.md"
    assert not table.exists() or f"`{command}" in table.read_text("utf-8")
