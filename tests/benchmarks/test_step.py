"""benchmarks/step.py: a step of any script is counted by part, and nothing stays patched."""

import pytest
import torch

from benchmarks import step
from engine.run import Run
from losses.base import Loss
from tests.runs import ROOT

PARTS = {
    "uda_self_training": {"student", "teacher", "mixer", "labelers", "losses", "optimiser", "rest"},
}
SMALL = ["--crop", "32", "48", "--batch", "2", "--steps", "1", "threads=1"]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_a_step_is_counted_and_nothing_stays_patched(name, capsys):
    before = Run.steps, Run.add, torch.Tensor.backward, vars(Loss).get("__call__")
    result = step.main([str(ROOT / "configs" / "toy" / f"{name}.yaml"), *SMALL])
    assert before == (Run.steps, Run.add, torch.Tensor.backward, vars(Loss).get("__call__"))
    counted = {part for part, count in result["operators"].items() if count}
    assert counted == PARTS[name] and result["operators"]["student"] > 200
    assert all(result["host, ms"][part] > 0 for part in counted)
    assert 0 < result["loss"] < 20 and result["memory"] > 0.1
    assert f"| student | {result['operators']['student']:.1f} | " in capsys.readouterr().out
