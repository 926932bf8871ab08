"""How processes end: real processes, real signals."""

import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from engine import process
from engine.errors import UserError
from engine.process import loader, run, signals
from tests.runs import SERVER


class Slow(Dataset):
    """Numbers, one every 50 ms; `broken` has one that cannot be read."""

    def __init__(self, broken=False):
        self.broken = broken

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if self.broken and index == 3:
            raise UserError("cannot read the image 3.png: it is broken")
        time.sleep(0.05)
        return index


class Mapping(Dataset):
    """Every loader is in the middle of a batch's shared memory: named, not yet mapped."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        Path(f"/dev/shm/torch_{os.getpid()}_1_1").write_bytes(b"pixels")
        print(f"named {os.getpid()}", flush=True)
        time.sleep(1000)


def loading(context="fork", broken=False):
    options = {"worker_init_fn": loader, "multiprocessing_context": context}
    return iter(DataLoader(Slow(broken), num_workers=2, **options))


# --- what the processes do -------------------------------------------------------------------------------------------


def read_a_broken_image(context):
    for _ in loading(context, broken=True):
        pass


def fail(statement):
    items = loading()
    next(items)
    globals()["kept"] = items  # as a traceback keeps it
    if statement == "return 129":
        return 129
    exec(statement)


def load_for_ever(context):
    for _ in loading(context):
        print("busy", flush=True)


def map_for_ever(context):
    options = {"worker_init_fn": loader, "multiprocessing_context": context}
    next(iter(DataLoader(Mapping(), num_workers=2, **options)))


def train_for_ever(_):
    signals.gentle = True
    for _ in loading():
        print("requested" if signals.requested() else "busy", flush=True)


def ignore_a_hang_up(_):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signals.install()
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.2)
    print("still here")


def hang_in_a_library(_):
    process.GRACE, signals.gentle = 1.0, True
    print("busy", flush=True)
    sleep = ctypes.PyDLL(
        None
    ).sleep  # holds the interpreter: no handler runs, as for a GPU that hangs
    libc = ctypes.CDLL(None)
    for _ in range(30):
        libc.usleep(900_000)
    sleep(0)


def save_for_long(_):
    process.GRACE, signals.gentle = 0.5, True
    print("busy", flush=True)
    signals.writing = True
    deadline = time.monotonic() + 5.0  # longer than GRACE and what `leave` waits
    while time.monotonic() < deadline:
        time.sleep(0.1)
    signals.writing = False
    print("saved", flush=True)


def child(write, function, argument):
    os.setsid()
    for stream in (1, 2):
        os.dup2(write.fileno(), stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["script.py", "x"]
    run(lambda arguments: function(argument), "usage")


# --- watching them ---------------------------------------------------------------------------------------------------


class Started:
    """A process with a group of its own, and what it writes."""

    def __init__(self, function, argument=None):
        read, write = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=child, args=(write, function, argument))
        self.process.start()
        write.close()
        self.pid, self.output, self.fd = self.process.pid, "", os.dup(read.fileno())
        os.set_blocking(self.fd, False)

    def read(self):
        try:
            text = os.read(self.fd, 65536).decode()
        except BlockingIOError:
            return
        self.output += text

    def wait_for(self, text, within=120):
        deadline = time.time() + within
        while text not in self.output:
            assert time.time() < deadline and self.process.is_alive(), self.output
            self.read()
            time.sleep(0.01)

    def ends(self, within=120):
        """-> code and output; nothing of its process group is left."""
        self.process.join(within)
        deadline = time.time() + 60  # the server of a forkserver takes its time
        while (left := alive(self.pid)) and time.time() < deadline:
            time.sleep(0.02)
        self.read()
        os.close(self.fd)
        if left:
            os.killpg(self.pid, signal.SIGKILL)
        assert self.process.exitcode is not None and not left, self.output
        return self.process.exitcode, self.output


def alive(group):
    """Processes of a group that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, IndexError):
            continue
        if int(process_group) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_an_error_of_a_loader_is_one_sentence_and_nothing_is_left(context):
    expected = (1, "error: cannot read the image 3.png: it is broken\n")
    assert Started(read_a_broken_image, context).ends() == expected


@pytest.mark.parametrize(
    "statement, code, expected",
    [
        ("raise UserError('iters must be positive')", 1, "error: iters must be positive\n"),
        ("raise OSError(28, 'No space left')", 1, "error: [Errno 28] No space left\n"),
        ("raise torch.OutOfMemoryError('CUDA out of memory.')", 1, "lower train.batch_size"),
        ("1 / 0", 1, "Traceback"),
        ("open('/nowhere')", 1, "Traceback"),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('usage: this')", 1, "usage: this\n"),
        ("return 129", 129, ""),
        ("pass", 0, ""),
    ],
)
def test_every_end_has_its_code_and_loaders_end_too(statement, code, expected):
    found, output = Started(fail, statement).ends()
    assert found == code and expected in output and bool(output) == bool(expected), output
    assert "Traceback" in output or output.count("\n") <= 1, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_outside_of_the_loop_leaves_at_once_with_one_line(number, send):
    started = Started(load_for_ever, "fork")
    started.wait_for("busy")
    send(started.pid, number)
    code, output = started.ends(10)
    lines = [line for line in output.splitlines() if line != "busy"]
    assert code == 128 + number and len(lines) == 1, output
    assert lines[0].startswith(f"{number.name} received: left at once")


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_the_first_signal_lets_the_step_finish_and_the_second_leaves(send):
    started = Started(train_for_ever)
    started.wait_for("busy")
    send(started.pid, signal.SIGTERM)
    started.wait_for("SIGTERM received: finishing the step")
    started.wait_for("requested")
    send(started.pid, signal.SIGTERM)
    code, output = started.ends(10)
    assert code == 143 and "left at once" in output and "Traceback" not in output


def test_a_signal_that_is_ignored_stays_ignored():
    assert Started(ignore_a_hang_up).ends() == (0, "still here\n")


def test_a_process_that_does_not_get_to_the_end_of_its_step_is_ended():
    """As one that waits for a process that is gone."""
    started = Started(hang_in_a_library)
    started.wait_for("busy")
    os.kill(started.pid, signal.SIGTERM)
    code, output = started.ends(15)
    assert code == 143 and "nothing moved since" in output


def test_a_process_that_writes_a_checkpoint_for_long_is_let_alone():
    started = Started(save_for_long)
    started.wait_for("busy")
    os.kill(started.pid, signal.SIGTERM)
    code, output = started.ends(15)
    assert code == 0 and output.endswith("saved\n"), output


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_loaders_end_with_a_run_that_is_killed(context):
    started = Started(load_for_ever, context)
    started.wait_for("busy")
    started.process.kill()
    started.ends(10)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory with names")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_loader_that_ends_within_a_batch_leaves_no_shared_memory(context, number):
    """SIGTERM: the run ends its loaders; SIGKILL: they end themselves."""
    started = Started(map_for_ever, context)
    deadline = time.time() + 120
    while started.output.count("named") < 2:
        assert time.time() < deadline, started.output
        started.read()
        time.sleep(0.01)
    pids = re.findall(r"named (\d+)", started.output)
    assert len(pids) == 2, started.output
    os.kill(started.pid, number)
    started.ends()
    assert not [path for pid in pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")]


def test_an_error_keeps_its_sentence_through_a_loader():
    class DataError(UserError):
        pass

    text = "Caught DataError in worker.\nTraceback:\n  raise\nbase.DataError: a.png: 3.5 is no id"
    assert str(DataError(text)) == "a.png: 3.5 is no id"
    assert str(DataError("a sentence about b: c")) == "a sentence about b: c"
    assert torch is not None  # the statements above name it


def test_loaders_end_with_a_run_whose_message_names_a_file_that_is_no_text():
    code, output = Started(fail, r"raise UserError('cannot read \udcdf.png')").ends()
    assert code == 1 and output == "error: cannot read \\udcdf.png\n"
    code, output = Started(fail, r"print('\udcdf')").ends()
    assert (code, output) == (0, "\\udcdf\n")


@pytest.mark.parametrize(
    ("workers", "cpus", "ranks", "expected"),
    [(0, 16, 1, 0), (3, 16, 1, 3), ("auto", 16, 1, 8), ("auto", 16, 4, 3), ("auto", 2, 2, 1)],
)
def test_loaders_are_a_process_s_share_of_the_cpus(monkeypatch, workers, cpus, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cpus))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert process.loaders(workers) == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert process.loaders("auto") == min(8, max(1, cpus - 1))
