"""Running the training scripts in tests: in this process, in processes of their own, and comparing what they leave."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import train_dg
import train_supervised
import train_uda
from engine import checkpoint, distributed

ROOT = Path(__file__).parent.parent
TINY, TINY_UDA, TINY_DG = (str(ROOT / "tests" / f"{name}.yaml") for name in ("tiny", "tiny_uda", "tiny_dg"))
SCRIPTS = {TINY: train_supervised, TINY_UDA: train_uda, TINY_DG: train_dg}
DOUBLE = """
import sys, torch
torch.set_default_dtype(torch.float64)
import {script}
{script}.main(sys.argv[1:])
"""


def train(folder, *overrides, config=TINY):
    """Run a script in this process -> its scalars, one dict per step."""
    SCRIPTS[config].main([config, f"folder={folder}", *overrides])
    return scalars(folder)


def scalars(folder):
    lines = [json.loads(line) for line in (Path(folder) / "scalars.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


def command(folder, *overrides, processes=1, double=False, config=TINY):
    """The command line of a run in processes of its own; `double` runs it in float64."""
    python = [sys.executable]
    if processes > 1:
        python = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(SCRIPTS[config].__file__)
    if double:
        name, script = script.stem, Path(folder).parent / "double.py"
        script.write_text(DOUBLE.format(script=name))
    return [*python, str(script), config, f"folder={folder}", *overrides]


def run(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command(*arguments, **options), env=environment, capture_output=True, text=True, cwd=ROOT)
    return result.returncode, result.stdout + result.stderr


def last(folder):
    return checkpoint.load(checkpoint.list_steps(folder)[0])


def leaves(value, prefix=""):
    """Every leaf of a nested state -> {dotted name: value}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in leaves(item, f"{prefix}.{key}").items()}


def assert_same_state(a, b, tolerance=None, keys=("model", "teacher", "prototypes", "optimizer", "scaler")):
    """Equal tensors, bitwise or up to a tolerance, and equal everything else."""
    for key in keys:
        first, second = leaves(a[key]), leaves(b[key])
        assert first.keys() == second.keys() and (first or key in ("scaler", "labelers", "prototypes"))  # may be empty
        for name, value in first.items():
            other = second[name]
            if not torch.is_tensor(value):
                assert value == other, f"{key}{name}"
            elif tolerance is None or not value.is_floating_point():
                assert torch.equal(value, other), f"{key}{name}"
            else:
                torch.testing.assert_close(value, other, rtol=0, atol=tolerance, msg=f"{key}{name}")


def as_two_processes(monkeypatch, function):
    """Results of function(rank) in two threads that take themselves for processes."""
    me, values, meet = threading.local(), {}, threading.Barrier(2, timeout=60)

    def gather(value):
        values[me.rank] = value
        meet.wait()
        everything = [values[0], values[1]]
        meet.wait()
        return everything

    def process(rank):
        me.rank = rank
        try:
            return function(rank)
        except BaseException:
            meet.abort()
            raise

    fakes = {"rank": lambda: me.rank, "world_size": lambda: 2, "barrier": meet.wait, "gather": gather}
    for name, fake in (fakes | {"all_reduce": lambda tensor: sum(gather(tensor.detach().clone()))}).items():
        monkeypatch.setattr(distributed, name, fake)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))
