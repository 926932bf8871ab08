"""Running the training scripts in tests: in this process, in processes of their own, and comparing what they leave."""

import functools
import json
import multiprocessing
import os
import runpy
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing

import losses
import train_dg
import train_supervised
import train_uda
from datasets import toy
from engine import checkpoint, distributed

ROOT = Path(__file__).parent.parent
TINY, TINY_UDA, TINY_DG = (
    str(ROOT / "tests" / f"{name}.yaml") for name in ("tiny", "tiny_uda", "tiny_dg")
)
SCRIPTS = {TINY: train_supervised, TINY_UDA: train_uda, TINY_DG: train_dg}
SERVER = multiprocessing.get_context(
    "forkserver"
)  # has loaded PyTorch once, and no thread or run has touched it
SERVER.set_forkserver_preload(["tests.runs", "tests.scenes"])


@functools.cache
def drawn(*arguments, draw=toy.draw):
    return draw(*arguments)


def main(config, arguments):
    """A script, in this process. It takes longer to draw a toy scene than to train on it, and most
    runs of the tests show the same few."""
    with mock.patch.object(toy, "draw", lambda *a: tuple(part.copy() for part in drawn(*a))):
        SCRIPTS[config].main(arguments)


def train(folder, *overrides, config=TINY):
    """Run a script in this process -> its scalars, one dict per step."""
    main(config, [config, f"folder={folder}", *overrides])
    return scalars(folder)


def scalars(folder):
    lines = [json.loads(line) for line in (Path(folder) / "scalars.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


def command(folder, *overrides, processes=1, config=TINY):
    """The command line of a run."""
    python = [sys.executable]
    if processes > 1:
        python = [
            *python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    return [*python, SCRIPTS[config].__file__, config, f"folder={folder}", *overrides]


def work(rank, processes, port, double, config, arguments, output, before):
    """One process of `run`."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if processes > 1:
        addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
        }
        os.environ.update({name: str(value) for name, value in (addresses | ranks).items()})
    if double:
        torch.set_default_dtype(torch.float64)
    if before:
        before(rank)
    main(config, arguments)


def run(folder, *overrides, processes=1, double=False, config=TINY, before=None):
    """A run in fresh processes, what torchrun would start, without loading PyTorch in each -> (exit code, output).

    `double`: in float64. `before(rank)` is called in each process first.
    """
    os.environ["PYTHONPATH"] = str(ROOT)  # for the server
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    output = Path(folder).parent / f"{Path(folder).name}.output.txt"
    output.unlink(missing_ok=True)
    arguments = [config, f"folder={folder}", *overrides]
    started = [
        SERVER.Process(
            target=work,
            args=(rank, processes, port, double, config, arguments, str(output), before),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    codes = [process.exitcode for process in started]
    return next((code for code in codes if code != 0), 0), output.read_text()


class Forked:
    """`python SCRIPT ...` with the face of subprocess.Popen, as a process of the server."""

    def __init__(self, arguments, *, stdout, env=os.environ, cwd=ROOT, **_):
        os.environ["PYTHONPATH"] = str(ROOT)  # for the server
        own = {name: value for name, value in env.items() if os.environ.get(name) != value}
        given = ([*map(str, arguments[1:])], stdout.name, own, str(cwd))
        self.process = SERVER.Process(target=script, args=given)
        self.process.start()
        self.pid, self.wait, self.kill = self.process.pid, self.process.join, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode


def script(arguments, output, variables, folder):
    """What a Forked is: a session of its own, parts of `folder` beside those of this repository."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(variables)
    os.chdir(folder)
    losses.__path__.append(f"{folder}/losses")
    if method := variables.get("SOAK_RUN_START"):
        multiprocessing.set_start_method(method, force=True)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def on_two_processes(function, folder):
    """Call function(rank, str(folder)) in two processes that have loaded PyTorch already."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the server
    torch.multiprocessing.start_processes(
        function, (str(folder),), nprocs=2, start_method="forkserver"
    )


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
    return {
        name: leaf for key, item in items for name, leaf in leaves(item, f"{prefix}.{key}").items()
    }


def assert_same_state(
    a, b, tolerance=None, keys=("model", "teacher", "prototypes", "optimizer", "scaler")
):
    """Equal tensors, bitwise or up to a tolerance, and equal everything else."""
    for key in keys:
        first, second = leaves(a[key]), leaves(b[key])
        assert first.keys() == second.keys() and (
            first or key in ("scaler", "labelers", "prototypes")
        )  # may be empty
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

    fakes = {
        "rank": lambda: me.rank,
        "world_size": lambda: 2,
        "barrier": meet.wait,
        "gather": gather,
    }
    fakes |= {
        "all_reduce": lambda tensor: sum(gather(tensor.detach().clone())),
        "all_gather": lambda tensor: torch.stack(gather(tensor.detach().clone())),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(distributed, name, fake)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))
