"""Every experiment in configs/ is read, and all that it names is built: no configuration can rot."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import reproduce
from datasets.base import DataError
from engine.build import build, build_adaptation, build_losses, build_members, build_segmentor
from engine.config import load, stages
from engine.schedule import make_optimizer
from tests.runs import ROOT

EXPERIMENTS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("base", "configs"))
CLASSES = {"CamVid": 11, "Toy": 11}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Random numbers on the meta device need no time, but two calls have no form for it."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_an_experiment_builds_what_it_names(path):
    different = {str({**cfg, "stage": 0, "optimizer": 0}): cfg for cfg in stages(load(path))}
    for cfg in different.values():
        for spec in (cfg.data.train, cfg.data.val, cfg.data.target, cfg.data.monitor, *cfg.data.test.values()):
            if spec["name"] not in ("none", "toy.Toy"):
                with pytest.raises(DataError, match="there is no folder"):
                    build("datasets", {**spec, "root": "/nowhere"}, seed=0)
        for spec in (cfg.data.augment, cfg.data.target_augment):
            if spec["name"] != "none":
                build("datasets", spec)
        num_classes = CLASSES.get(cfg.data.train["name"].split(".")[1], 19)
        with torch.device("meta"):
            network = build_segmentor(cfg.model, num_classes, pretrained=False)
            context = {"num_classes": num_classes, "in_channels": network.decoder.channels, "seed": 0}
            members, _ = build_members(cfg.prototypes, **context)
        terms, _ = build_losses(cfg.losses, **context)
        labelers, *_ = build_adaptation(cfg.uda, **context)
        make_optimizer(network, cfg.optimizer)
        for part in (*labelers, *terms.values()):
            wanted = {getattr(part, "prototypes", None)} | set(getattr(part, "members", ()))
            assert wanted - {None, "pair", "classifier"} <= {*members}, f"{type(part).__name__} wants {wanted}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_an_experiment_says_how_to_run_it_and_what_was_measured(path):
    header = [line for line in Path(path).read_text().splitlines() if line.startswith("#")]
    script = "train_uda.py" if "uda" in str(path.relative_to(ROOT)) else "train_supervised.py"
    assert header and f"{script} {path.relative_to(ROOT)}" in header[0]
    assert any("easured" in line or "not yet run" in line for line in header)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda path: path.name)
def test_a_grid_starts_only_what_can_be_configured(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = reproduce.load_grid(path, [])
    for row, _, _, (_, script, config, *settings) in reproduce.jobs(grid):
        assert Path(script).is_file() and stages(load(config, settings))
        assert grid["rows"][row].get("after", row) in grid["rows"]
