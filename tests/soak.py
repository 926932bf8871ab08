"""Real faults in real runs, and a check of what they leave. Not part of the test suite; about 20 minutes on two cores.

    python -m tests.soak                          every fault once, and 20 random disturbances of each script
    python -m tests.soak --only "full disk" --runs 0
    python -m tests.soak --only random --runs 50 --seed 7

Two kinds of rules. A disturbed run (signal, kill, damaged file) is started again until it ends, and must then equal an
undisturbed one bit for bit. A run that cannot go on must end within 10 seconds of its message, with a code that is not
0, one clear sentence where the user can mend it, no process and no shared memory left.

Every fault is a function in FAULTS, {name: function(place)}; `cause(name, folder)` runs one, for tests. It raises
Wrong, an AssertionError, or Skip where the machine cannot do it.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
LIMIT = 10.0  # seconds from a message, or from a signal, to the end; see `limit`
PATIENCE = 300.0  # seconds that anything may take on a busy machine
MARK = "SOAK_RUN"  # variable of the environment by which the processes of a run are found

SMALL = (
    "data.augment.crop=[25, 37]",
    "data.train.size=[32, 48]",
    "data.val={name: toy.Toy, domain: synthetic, split: val, length: 2, size: [32, 48]}",
    "eval.pictures=1",
    "eval.every=4",
    "log.every=1",
    "checkpoint={every: 2, keep: 2}",
)
TEST = "data.test.toy={name: toy.Toy, domain: real, split: test, length: 2, size: [32, 48]}"
STORED = (  # two stages; the second stores labels of the target and has a labeler with a state
    "data.target={name: toy.Toy, domain: real, length: 9, size: [32, 48]}",
    "data.monitor={name: toy.Toy, domain: real, split: val, length: 2, size: [32, 48]}",
    "train.iters=6",
    "stages=[{name: source, teacher: none, train: {teacher: 0.0}}, {name: adapt, init: previous,"
    " uda: {mixer: {name: mixers.SourceTarget},"
    " labelers: [{name: bcl.StaticLabels}, {name: bcl.LabelTransfer, confidence: 0.8}]},"
    " losses: [{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, view: target},"
    " {name: bcl.Contrast}]}]",
)
SCRIPTS = {  # script: configuration, overrides
    "train_supervised": ("tiny", (*SMALL, TEST, "train.iters=12")),
    "train_uda": ("tiny_uda", (*SMALL, TEST, *STORED)),
    "train_dg": ("tiny_dg", (*SMALL, "data.test.fog={name: none}", "train.iters=12")),
}

# A component that the copy of the repository gets: it does what a loss must not do, once, at a step of one process.
COMPONENT = """
import time

import torch

from engine import distributed
from losses.base import Loss


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.nan)


class Fault(Loss):
    def __init__(self, *, kind: str, at: int, rank: int = 0):
        super().__init__()
        self.kind, self.at, self.rank = kind, at, rank

    def forward(self, step):
        mean = step.outputs["source"].logits.mean()
        if step.number != self.at or distributed.rank() != self.rank:
            return 0 * mean
        if self.kind == "error":
            raise RuntimeError("an injected error")
        if self.kind == "sleep":
            print("sleeping", flush=True)
            time.sleep(60)
        return Poison.apply(mean) if self.kind == "gradient" else 0 * mean
"""
# As Python 3.14 does by default: loaders come from a server and not from a fork.
SITE = f"""
import multiprocessing, os
if os.environ.get("{MARK}_START"):
    multiprocessing.set_start_method(os.environ["{MARK}_START"], force=True)
"""


class Wrong(AssertionError):
    """A run did what it must not."""


class Skip(Exception):
    """This machine cannot cause the fault."""


def limit():
    """LIMIT, longer where more than two processes want each core."""
    return LIMIT * max(1.0, os.getloadavg()[0] / (2 * os.cpu_count()))


def wait(condition, seconds, pause=0.02, pid=None):
    """What `condition()` returns once it is true; its last value, false, after some seconds.

    Time in which the process `pid` is stopped, as others do on a shared machine, does not count.
    """
    before = time.monotonic()
    while not (value := condition()) and seconds > 0:
        time.sleep(pause)
        now = time.monotonic()
        seconds -= 0 if pid and stopped(pid) else now - before
        before = now
    return value


def stopped(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


# --- runs and their processes --------------------------------------------------------------------------------------


sessions = {}  # of forked runs, whose environment cannot be read from outside: {pid: mark}


def processes(mark):
    """{pid: parent} of the living processes whose environment holds MARK=mark..., or whose session
    does, zombies left out."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                mine = sessions.get(int(stat[3]), "").startswith(mark) and stat[0] != "Z"
                if mine or wanted in (path / "environ").read_bytes():
                    found[int(path.name)] = int(stat[1])
    return found


class Run:
    """A command in a session of its own.

    Args:
        arguments: of the command.
        output: file for what it prints.
        environment: variables added to ours.
        mark: by which its processes are found.
        popen: what starts it, with the face of subprocess.Popen.
    """

    def __init__(self, arguments, output, environment, mark, cwd, popen=subprocess.Popen):
        self.mark, self.output, self.seen, self.looked = mark, output, set(), 0.0
        environment = os.environ | {"OMP_NUM_THREADS": "1", MARK: mark} | environment
        with open(output, "wb") as file:
            self.process = popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        sessions[self.process.pid] = mark

    @property
    def code(self):
        return self.process.poll()

    def text(self):
        """What it has printed; also looks which processes there are."""
        if time.monotonic() > self.looked + 0.3:
            self.alive()
        return self.output.read_text(errors="replace")

    def alive(self):
        """{pid: parent} of its processes; all pids ever seen stay in `seen`."""
        found = processes(self.mark)
        self.seen |= set(found)
        self.looked = time.monotonic()
        return found

    def until(self, condition, what, pause=0.02):
        """Wait for a condition while the run goes on."""
        wait(lambda: condition() or self.code is not None, PATIENCE, pause, self.process.pid)
        if not condition():
            state = "still" if self.code is None else f"ended with {self.code}"
            raise Wrong(f"{what} was waited for, but the run {state}: {self.end_of_text()}")
        self.alive()

    def end_of_text(self):
        return " | ".join(re.split(r"[\r\n]+", self.text().strip())[-3:])[-400:]

    def signal(self, number, everyone=False):
        """To the main process (of torchrun: the launcher), or to all, as schedulers and terminals do."""
        if everyone:
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        elif self.code is None:
            os.kill(self.process.pid, number)

    def end(self, after, seconds=None):
        """Wait for the end -> exit code."""
        self.alive()
        seconds = seconds or limit()
        if not wait(lambda: self.code is not None, seconds, pid=self.process.pid):
            raise Wrong(f"still runs {seconds:.0f} s after {after}: {self.end_of_text()}")
        return self.code

    def nothing_left(self, seconds=None):
        """No process and no shared memory."""
        wait(lambda: not self.alive(), seconds or limit(), 0.1)
        if left := self.alive():
            names = [Path(f"/proc/{pid}/cmdline").read_bytes()[-60:] for pid in left]
            raise Wrong(f"{len(left)} processes are left: {names}")
        if left := [p.name for p in Path("/dev/shm").glob("torch_*") if self.owns(p.name)]:
            raise Wrong(f"left in /dev/shm: {', '.join(left)}")

    def owns(self, name):
        found = re.match(r"torch_(\d+)_", name)
        return bool(found) and int(found[1]) in self.seen

    def fails(self, *said, plain=True, message=r"^(\[rank\d\]: ?)?(error|Traceback)"):
        """It prints a message, ends soon with a code that is not 0, and leaves nothing.

        Args:
            said: regular expressions that the output must match.
            plain: whether that is one sentence, without a traceback.
        """
        pattern = re.compile(message, re.MULTILINE)
        wait(lambda: self.code is not None or pattern.search(self.text()), PATIENCE)
        shown = time.monotonic()
        if not pattern.search(self.text()) and self.code is None:
            raise Wrong(f"no message and no end: {self.end_of_text()}")
        code = self.end("its message")
        self.nothing_left(max(0.5, shown + limit() - time.monotonic()))
        if code == 0:
            raise Wrong(f"ended with 0: {self.end_of_text()}")
        self.says(*said, plain=plain)

    def says(self, *said, plain=True):
        text = self.text()
        for expression in said:
            if not re.search(expression, text):
                raise Wrong(f"does not say {expression!r}: {self.end_of_text()}")
        if plain and ("Traceback" in text or len(re.findall(r"^error\b", text, re.MULTILINE)) != 1):
            raise Wrong(f"not one clear sentence: {self.end_of_text()}")


def copy(folder):
    """Copy this repository, so that nobody changes it meanwhile, and add what causes faults -> the folder."""
    names = (".*", "__pycache__", "runs", "data", "shared")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*names))
    (folder / "losses" / "soak.py").write_text(COMPONENT)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    return folder


class Place:
    """A folder for one fault, and the runs that were started in it.

    Args:
        repository: a copy of this one, by `copy`; made in the folder if none is given.
        popen: what starts a script by itself, as of Run.
    """

    def __init__(self, folder, repository=None, popen=subprocess.Popen):
        self.folder, self.runs, self.popen = Path(folder), [], popen
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark = f"{os.getpid()}-{abs(hash(self.folder))}-"
        self.repository = repository or copy(self.folder / "repository")

    def start(self, script, *overrides, run="run", ranks=1, restarts=0, method="", stdout=None):
        """Start a script.

        Args:
            run: name of the run folder.
            ranks: processes; 2 and more under torchrun, which starts them again `restarts` times.
            method: start method of multiprocessing; "": Python's default.
            stdout: file for its standard output, which `Run.text` then lacks.
        """
        config, small = SCRIPTS[script]
        launcher, popen = [], self.popen if ranks == 1 and not stdout else subprocess.Popen
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            launcher += [f"--max-restarts={restarts}"]
        arguments = [sys.executable, *launcher, f"{script}.py", f"tests/{config}.yaml"]
        arguments += [f"folder={self.folder / run}", *small, *overrides]
        if stdout:
            arguments = ["sh", "-c", f'exec "$@" >{stdout}', "sh", *arguments]
        number = len(self.runs)
        environment = {"PYTHONPATH": str(self.repository / "site"), f"{MARK}_START": method}
        output = self.folder / f"output_{number}.txt"
        self.runs.append(
            Run(arguments, output, environment, f"{self.mark}{number}.", self.repository, popen)
        )
        return self.runs[-1]

    def close(self):
        """Kill what is left."""
        for _ in range(3):
            for pid in processes(self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for run in self.runs:
            run.process.wait()


# --- what a run leaves ---------------------------------------------------------------------------------------------


def steps(folder):
    """Files step_<n>.pt, the oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+", p.stem))


def lines(folder):
    """Complete lines of scalars.jsonl that came from a training step."""
    path = folder / "scalars.jsonl"
    found = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in found if '"train/loss"' in line]


def leaves(value, name=""):
    """{dotted name: leaf} of nested dicts and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {key: leaf for k, item in items for key, leaf in leaves(item, f"{name}.{k}").items()}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def finite(folder):
    """No checkpoint holds a NaN or an infinity, and the newest ones can be read."""
    for path in [*steps(folder), *folder.glob("best.pt"), *folder.glob("stage_*.pt")]:
        content = load(path)
        for part in ("model", "teacher", "optimizer"):
            for name, leaf in leaves(content.get(part, {})).items():
                if torch.is_tensor(leaf) and not leaf.isfinite().all():
                    raise Wrong(f"{path.name} holds {part}{name} that is not finite")


def facts(folder):
    """{name: value} of everything that a disturbance must not change."""
    found = {}
    files = [*steps(folder)[-1:], *folder.glob("best.pt"), *sorted(folder.glob("stage_*.pt"))]
    for path in files:
        for name, leaf in leaves(load(path)).items():
            if name not in (".seconds", ".config.folder", ".config.data.workers"):
                found[path.name + name] = leaf
    results = json.loads((folder / "results.json").read_text())
    found |= {
        f"results.json{name}": leaf
        for name, leaf in leaves(results).items()
        if name not in (".seconds", ".command", ".commit")
    }
    for line in (folder / "scalars.jsonl").read_text().splitlines():
        values = json.loads(line)
        for tag, value in values.items():
            if tag not in ("train/images_per_sec", "train/max_mem_gb", "train/waiting", "seconds"):
                found[f"scalars.jsonl step {values['step']} {tag}"] = value
    for path in sorted(folder.glob("maps/**/*.png")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def compare(reference, folder):
    """Raises Wrong with the first of the things that differ from an undisturbed run."""
    try:
        found = facts(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise Wrong(f"cannot be read: {type(error).__name__}: {error}") from error
    differing = sorted(set(reference) ^ set(found))
    for name in set(reference) & set(found):
        one, two = reference[name], found[name]
        if not (torch.equal(one, two) if torch.is_tensor(one) else repr(one) == repr(two)):
            differing.append(name)
    if differing:
        raise Wrong(f"{len(differing)} things differ: {', '.join(sorted(differing)[:4])}")


# --- random disturbances: the end must be that of an undisturbed run -----------------------------------------------


class References:
    """Undisturbed runs, one for each script and number of processes."""

    def __init__(self, folder, repository):
        self.folder, self.repository = Path(folder), repository
        self.found, self.locks, self.guard = {}, {}, threading.Lock()

    def __call__(self, script, ranks):
        """(facts, seconds from the start to the run folder, and from there to the end)."""
        key = script, ranks
        with self.guard:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.found:
                folder = self.folder / f"reference_{script}_{ranks}"
                place = Place(folder, self.repository)
                try:
                    times = [time.monotonic()]
                    run = place.start(script, ranks=ranks)
                    run.until((folder / "run").exists, "the run folder")
                    times.append(time.monotonic())
                    if run.end("its start", PATIENCE) != 0:
                        raise Wrong(f"the undisturbed run failed: {run.end_of_text()}")
                    times.append(time.monotonic())
                    spent = [after - before for before, after in itertools.pairwise(times)]
                    self.found[key] = facts(folder / "run"), *spent
                finally:
                    place.close()
                    shutil.rmtree(folder)
            return self.found[key]


def sight(folder, *patterns):
    """A condition: a file that matches."""
    return lambda: any(next(folder.glob(pattern), None) for pattern in patterns)


def flip(path, rng):
    with open(path, "r+b") as file:
        file.seek(place := rng.randrange(path.stat().st_size))
        byte = file.read(1)[0] ^ 1 << rng.randrange(8)
        file.seek(place)
        file.write(bytes([byte]))


def cut(path, rng):
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def replace_by_folder(path, rng):
    path.unlink()
    path.mkdir()


def cut_line(path, rng):
    """What a kill in the middle of a line leaves. The lines before it are older than a checkpoint,
    or will be written again."""
    last = path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
    with open(path, "ab") as file:
        file.write(last[: rng.randint(1, len(last) - 1)])


def stale_lock(path, rng):
    path.write_text("4194000\n")
    os.utime(path, (0, 0))


DAMAGES = {  # kind: (file in the run folder, "": the newest checkpoint; what happens to it)
    "bit flipped in the newest checkpoint": ("", flip),
    "newest checkpoint cut": ("", cut),
    "newest checkpoint empty": ("", lambda path, rng: os.truncate(path, 0)),
    "folder in place of the newest checkpoint": ("", replace_by_folder),
    "a line of scalars.jsonl cut": ("scalars.jsonl", cut_line),
    "stale lock": (".lock", stale_lock),
}
SIGHTS = {  # kind: files, and the largest number of seconds from their sight to the kill
    "killed while saving": (("*.tmp.*",), 0.1),
    "killed while storing maps": (("maps/*/*/*.partial",), 0.3),
    "killed at the end of a stage": (("stage_*",), 0.0),
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
KINDS = ("killed at any time", *SIGHTS, *SIGNALS, *(f"{n} twice" for n in SIGNALS), *DAMAGES)


def kinds_of(script):
    """The kinds of disturbances that a script can meet; signals and kills, the frequent ones, more often."""
    two_stages = ("killed while storing maps", "killed at the end of a stage")
    kinds = [kind for kind in KINDS if script == "train_uda" or kind not in two_stages]
    return [*kinds, "killed at any time", "killed while saving", "killed at any time"]


def disturb(kind, start, folder, durations, rng, ranks, restarts):
    """Start the run and disturb it once, then it has ended -> whether it was still running when that came."""
    fresh, run, everyone = not folder.exists(), start(), rng.random() < 0.5

    def over():
        return run.code is not None

    if kind in DAMAGES:
        many = rng.randint(1, 6)
        wait(lambda: over() or len(lines(folder)) >= 2 * many + 1, PATIENCE)
    elif kind in SIGHTS:
        patterns, delay = SIGHTS[kind]
        many = rng.randint(0, 5) if kind == "killed while saving" else 0
        wait(lambda: over() or len(lines(folder)) >= 2 * many, PATIENCE)
        wait(lambda: over() or sight(folder, *patterns)(), PATIENCE, 0.0005)
        time.sleep(rng.uniform(0, delay))
    else:
        wait(lambda: over() or folder.exists(), PATIENCE)
        wait(over, rng.uniform(0, durations[1] if fresh else sum(durations)))
    hit = not over()
    if not hit:
        expect(run, {0}, "by itself")
    elif kind in DAMAGES or kind in SIGHTS or kind.startswith("killed"):
        kill(run, everyone or kind in DAMAGES, ranks, restarts)
    else:
        number = getattr(signal, kind.split()[0])
        for _ in range(1 + kind.endswith("twice")):
            run.signal(number, everyone)
            time.sleep(rng.uniform(0, 0.3))
        run.end(kind)
        allowed = {0, 128 + number, -number} if ranks == 1 else None
        expect(run, allowed, f"after {kind}")
        if run.code == 0 and not (steps(folder) or (folder / "results.json").exists()):
            raise Wrong(f"ended with 0 after {kind}, and saved nothing")
    if kind in DAMAGES:
        name, damage = DAMAGES[kind]
        path = folder / name if name else (steps(folder) or [None])[-1]
        hit = path is not None and path.exists()
        if hit:
            damage(path, rng)
    return hit


def kill(run, everyone, ranks, restarts):
    """SIGKILL to all processes, or to the main one. Of torchrun's that is a rank: it may start them again."""
    if ranks == 1 or everyone:
        run.signal(signal.SIGKILL, everyone)
        return run.end("SIGKILL")
    workers = [pid for pid, parent in run.alive().items() if parent == run.process.pid]
    if workers:
        os.kill(workers[-1], signal.SIGKILL)
    run.end("a rank was killed", PATIENCE if restarts else limit())
    expect(run, {0} if restarts and workers else None, "a rank was killed")


def expect(run, codes, when):
    """One of the exit codes; None: any."""
    if codes is not None and run.code not in codes:
        raise Wrong(f"ended with {run.code} {when}: {run.end_of_text()}")


def random_run(place, references, script, kind, rng, ranks, workers):
    """Disturb a run once or twice, finish it, and compare it with an undisturbed one."""
    reference, *durations = references(script, ranks)
    folder, restarts = place.folder / "run", rng.randint(0, 1)

    def start():
        return place.start(script, f"data.workers={workers}", ranks=ranks, restarts=restarts)

    for each in ["killed at any time"] * (rng.random() < 0.3) + [kind]:
        hit = disturb(each, start, folder, durations, rng, ranks, restarts)
    last = start()  # at once, as a supervisor does
    last.end("the last start", PATIENCE)
    expect(last, {0}, "when it was started again")
    for run in place.runs:
        run.nothing_left()
    compare(reference, folder)
    if not hit:
        raise Skip("equal, but complete before it could be disturbed")


# --- one fault of each kind ----------------------------------------------------------------------------------------

FAULTS = {}  # {name: function(place)}


def fault(name, **options):
    """Register a function, with options, under a name."""

    def register(function):
        FAULTS[name] = functools.partial(function, **options)
        return function

    return register


def cause(name, folder, **options):
    """Cause one fault in a new folder, with options of Place; raises Wrong or Skip."""
    place = Place(folder, **options)
    try:
        FAULTS[name](place)
    finally:
        place.close()


def injected(kind, at, rank=0):
    return (
        "losses=[{name: cross_entropy.CrossEntropy},"
        f" {{name: soak.Fault, kind: {kind}, at: {at}, rank: {rank}}}]"
    )


def pictures(folder, broken):
    """A data set of eight pictures, one of them cut in two -> its overrides."""
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            Image.effect_noise((48, 32), 60).convert("RGB").save(
                folder / "images" / split / f"{number}.png"
            )
            Image.new("L", (48, 32), number % 2).save(folder / "labels" / split / f"{number}.png")
    path = folder / "images" / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    spec = f"{{name: folder.Folder, root: {folder}, image_dir: 'images/{{split}}', label_dir: 'labels/{{split}}',"
    spec += " image_suffix: .png, label_suffix: .png, classes: [one, two], split: "
    sets = {name: f"{spec}{split}}}" for name, split in (("train", "train"), ("val", "val"))}
    data = f"data={{train: {sets['train']}, val: {sets['val']}, test: {{toy: {sets['val']}}}}}"
    return data, "eval.every=2"


@fault("truncated picture, no worker", workers=0)
@fault("truncated picture, 2 workers", workers=2)
@fault("truncated picture, 2 workers of a server", workers=2, method="forkserver")
@fault("truncated picture, 2 ranks with 2 workers", workers=2, ranks=2)
@fault("truncated picture in validation", workers=2, broken="val/1.png")
def truncated_picture(place, workers, method="", ranks=1, broken="train/5.png"):
    options = pictures(place.folder / "data", broken)
    run = place.start(
        "train_supervised", *options, f"data.workers={workers}", ranks=ranks, method=method
    )
    run.fails(re.escape(broken), plain=ranks == 1)


@fault("NaN loss, train_supervised", script="train_supervised")
@fault("NaN loss, train_uda", script="train_uda")
@fault("NaN loss, train_dg", script="train_dg")
@fault("NaN loss, 2 ranks with 2 workers", script="train_supervised", ranks=2)
def nan_loss(place, script, ranks=1):
    options = ["optimizer={name: SGD, lr: 1e38}", "schedule.warmup=0", "checkpoint.keep=1"]
    options += ["checkpoint.every=1", "data.workers=2"]
    run = place.start(script, *options, ranks=ranks)
    run.fails(r"step \d+", plain=ranks == 1)
    finite(place.folder / "run")


@fault("NaN gradient", at=5)
@fault("NaN gradient in the last step", at=11)
@fault("NaN gradient in one of 2 ranks", at=5, ranks=2)
def nan_gradient(place, at, ranks=1):
    """The step is not taken, and the checkpoints before stay."""
    options = [injected("gradient", at, ranks - 1), "checkpoint={every: 2, keep: 1}"]
    run = place.start("train_supervised", *options, "data.workers=2", ranks=ranks)
    run.fails(rf"step {at + 1}\b", plain=ranks == 1)
    finite(place.folder / "run")
    if not steps(place.folder / "run"):
        raise Wrong("no checkpoint is left")


@fault("an error in one of 2 ranks")
def error_in_a_rank(place):
    run = place.start("train_supervised", injected("error", 5, 1), "data.workers=2", ranks=2)
    run.fails("an injected error", plain=False)


@fault("a rank is killed")
def killed_rank(place):
    folder = place.folder / "run"
    run = place.start("train_supervised", "train.iters=100000", "data.workers=2", ranks=2)
    run.until(lambda: len(lines(folder)) >= 3, "three steps")
    kill(run, False, 2, 0)
    if run.code == 0:
        raise Wrong("ended with 0")
    run.nothing_left()


@fault("the loaders of a killed run", method="")
@fault("the loaders of a killed run, from a server", method="forkserver")
def orphans(place, method):
    """SIGKILL to the main process alone: its loaders end, and do not keep the folder from the next start."""
    folder = place.folder / "run"
    run = place.start("train_supervised", "data.workers=2", "train.iters=100000", method=method)
    run.until(lambda: len(lines(folder)) >= 3, "three steps")
    run.signal(signal.SIGKILL)
    again = place.start("train_supervised", "data.workers=2", "train.iters=100000", method=method)
    wait(lambda: not run.alive(), limit())
    again.until(lambda: len(lines(folder)) >= 8, "steps of the next start")
    run.nothing_left(0.1)


@contextlib.contextmanager
def small_disk(place, size):
    """A run folder with a file system of its own."""
    folder = place.folder / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise Skip("cannot mount a small file system: needs root")
    try:
        yield folder
    finally:
        place.close()
        wait(lambda: not subprocess.run(["umount", folder], capture_output=True).returncode, 5, 0.2)
        if os.path.ismount(folder):
            subprocess.run(["umount", "-l", folder])


@fault("full disk from the start")
def full_disk(place):
    """Checkpoints in between are warnings, the last one is an error."""
    with small_disk(place, "2m") as folder:
        run = place.start("train_supervised")
        run.fails("could not write .*step_0000002", "could not write .*step_0000012")
        if left := list(folder.glob("*.tmp.*")):
            raise Wrong(f"left: {left}")


@fault("full disk while training")
def disk_fills(place):
    """Somebody else fills it: the run ends, its last checkpoint stays, and with room again it goes on."""
    with small_disk(place, "200m") as folder:
        run = place.start("train_supervised", "train.iters=20")
        run.until(lambda: steps(folder), "a checkpoint")
        with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
            while True:
                file.write(bytes(2**16))
        run.fails()
        finite(folder)
        if not steps(folder):
            raise Wrong("no checkpoint is left")
        (folder / "filler").unlink()
        again = place.start("train_supervised", "train.iters=20")
        again.end("the next start", PATIENCE)
        expect(again, {0}, "with room again")


@fault("nobody reads the output")
def broken_pipe(place):
    """`| head -1`: it leaves soon, with a code that is not 0 and without a traceback, or trains to its end."""
    pipe, closed = place.folder / "pipe", []
    os.mkfifo(pipe)

    def head():
        with open(pipe, "rb") as file:
            file.readline()
        closed.append(time.monotonic())

    threading.Thread(target=head, daemon=True).start()
    run = place.start("train_supervised", "data.workers=2", stdout=pipe)
    code = run.end("its start", PATIENCE)
    if code and time.monotonic() > closed[0] + limit():
        raise Wrong(f"ended with {code} {time.monotonic() - closed[0]:.0f} s after the reader")
    run.nothing_left()
    complete = (place.folder / "run" / "results.json").exists()
    if (code == 0) != complete or "Traceback" in run.text():
        raise Wrong(f"ended with {code}, complete: {complete}; {run.end_of_text()}")


@fault("SIGTERM in training", number=signal.SIGTERM)
@fault("SIGINT in training, to all", number=signal.SIGINT, everyone=True)
@fault("SIGTERM in training, loaders of a server", number=signal.SIGTERM, method="forkserver")
@fault("SIGHUP in training", number=signal.SIGHUP)
@fault("SIGTERM in training to torchrun", number=signal.SIGTERM, ranks=2)
def first_signal(place, number, everyone=False, method="", ranks=1):
    """Finishes the step, saves, exits 0; torchrun itself 1; after SIGHUP 0 or 129, or it dies."""
    folder = place.folder / "run"
    options = ["data.workers=2", "train.iters=100000", "checkpoint.every=100000", "eval.every=0"]
    run = place.start("train_supervised", *options, method=method, ranks=ranks)
    run.until(lambda: len(lines(folder)) >= 3, "three steps")
    run.signal(number, everyone)
    run.end("the signal")
    run.nothing_left()
    if number == signal.SIGHUP:
        return expect(run, {0, 129, -1}, "after the signal")
    expect(run, {0} if ranks == 1 else {1}, "after the signal")
    if len(steps(folder)) != 1 or len(load(steps(folder)[0])["rng"]) != ranks:
        raise Wrong(f"no complete checkpoint was saved: {run.end_of_text()}")
    if ranks == 1 and "Traceback" in run.text():
        raise Wrong(f"a traceback: {run.end_of_text()}")


@fault("second SIGTERM", numbers=(signal.SIGTERM, signal.SIGTERM))
@fault("second SIGINT, to all", numbers=(signal.SIGINT, signal.SIGINT), everyone=True)
@fault("SIGTERM after SIGINT", numbers=(signal.SIGINT, signal.SIGTERM))
def second_signal(place, numbers, everyone=False):
    """In a step that takes long: the first waits for it, the second leaves at once."""
    run = place.start("train_supervised", injected("sleep", 3), "data.workers=2")
    run.until(lambda: "sleeping" in run.text(), "the long step")
    run.signal(numbers[0], everyone)
    # Two signals that wait for a busy process are one signal.
    run.until(lambda: "finishing the step" in run.text(), "the answer to the first signal")
    time.sleep(0.5)
    if run.code is not None:
        raise Wrong(f"ended with {run.code} at the first signal: {run.end_of_text()}")
    run.signal(numbers[1], everyone)
    run.end("the second signal")
    run.nothing_left()
    expect(run, {128 + numbers[1], -numbers[1]}, "after the second signal")
    if "Traceback" in run.text():
        raise Wrong(f"a traceback: {run.end_of_text()}")


LONG = 5003  # images
MOMENTS = {  # moment: script, overrides, a file of the run folder
    "preparation": ("train_uda", f"data.target.length={LONG}", ""),
    "validation": ("train_supervised", f"data.val.length={LONG}", ""),
    "report": ("train_supervised", f"data.test.toy.length={LONG}", "step_0000012.pt"),
}


@fault("SIGTERM in preparation", moment="preparation", number=signal.SIGTERM)
@fault("SIGINT in preparation, to all", moment="preparation", number=signal.SIGINT, everyone=True)
@fault("SIGTERM in validation", moment="validation", number=signal.SIGTERM)
@fault("SIGINT in validation, to all", moment="validation", number=signal.SIGINT, everyone=True)
@fault("SIGTERM in the report", moment="report", number=signal.SIGTERM)
@fault("SIGINT in the report, to all", moment="report", number=signal.SIGINT, everyone=True)
def signal_elsewhere(place, moment, number, everyone=False):
    """Nothing to finish: it leaves with 143 or 130. Where a step still runs, it may also save and exit 0."""
    folder = place.folder / "run"
    script, option, pattern = MOMENTS[moment]
    run = place.start(script, option, "data.workers=2", "eval.pictures=0")
    here = {
        "preparation": lambda: "stage adapt\n" in run.text(),
        "validation": lambda: len(lines(folder)) >= 4,
    }.get(moment, sight(folder, pattern))
    run.until(here, moment)
    time.sleep(1.0)
    if run.code is not None:
        raise Wrong(f"ended by itself with {run.code}: {run.end_of_text()}")
    run.signal(number, everyone)
    run.end("the signal")
    run.nothing_left()
    saved = moment == "validation" and steps(folder) and load(steps(folder)[-1])["step"] == 4
    # The last checkpoint was seen while it was being written: its step was not yet done.
    saved = saved or (moment == "report" and "saved at step 12" in run.text())
    expect(run, {128 + number, -number, *([0] if saved else [])}, f"after a signal in {moment}")
    if "Traceback" in run.text():
        raise Wrong(f"a traceback: {run.end_of_text()}")


@fault("a run folder in use")
def folder_in_use(place):
    """A second run is refused, and does no harm to the first one, which saves all the time."""
    folder = place.folder / "run"
    options = ["checkpoint={every: 1, keep: 1}", "train.iters=100000", "eval.every=0"]
    first = place.start("train_supervised", *options)
    first.until(lambda: len(lines(folder)) >= 2, "two steps")
    place.start("train_supervised", *options).fails("another run")
    first.signal(signal.SIGTERM)
    first.end("SIGTERM")
    expect(first, {0}, "after SIGTERM")
    if "could not" in first.text():
        raise Wrong(f"the first run lost a save: {first.end_of_text()}")
    load(steps(folder)[-1])


# --- the whole ----------------------------------------------------------------------------------------------------


def plan(seed, runs, only, references):
    """[(row of the table, name, function(place))]."""
    jobs = [(name, name, function) for name, function in FAULTS.items()]
    for script in SCRIPTS:
        rng = random.Random(f"{seed}/{script}")
        kinds = kinds_of(script)
        rng.shuffle(kinds)
        for number, kind in zip(range(runs), itertools.cycle(kinds)):
            ranks, workers = 2 if number % 5 == 4 else 1, 2 * (number % 2)
            options = {"script": script, "kind": kind, "ranks": ranks, "workers": workers}
            options |= {"rng": random.Random(f"{seed}/{script}/{number}")}
            name = f"random {script} {number}: {kind}, {ranks} ranks, {workers} workers"
            function = functools.partial(random_run, references=references, **options)
            jobs.append((f"random {script}: {kind}", name, function))
    return [job for job in jobs if only in job[1]]


def execute(job, folder, repository):
    """Run one job -> (row, name, what was wrong or None, skipped)."""
    row, name, function = job
    began, trouble, skipped = time.monotonic(), None, False
    place = Place(folder, repository)
    try:
        function(place)
    except Wrong as error:
        trouble = f"{error} ({folder})"
    except Skip as error:
        trouble, skipped = str(error), True
    except Exception:
        trouble = f"the harness itself failed ({folder})\n{traceback.format_exc()}"
    finally:
        place.close()
    if trouble is None or skipped:
        shutil.rmtree(folder)
    word = "skipped" if skipped else "wrong" if trouble else "right"
    spent = time.monotonic() - began
    print(f"{word:<7} {spent:5.0f} s  {name}" + (f": {trouble}" if trouble else ""), flush=True)
    return row, word


def table(results):
    """[(row, word)] -> text."""
    rows = list(dict.fromkeys(row for row, _ in results))
    counts = Counter(results)
    width = max(map(len, ["fault", *rows]))
    heads = ("right", "wrong", "skipped")
    text = [f"{'fault':<{width}}  {'runs':>5} " + " ".join(f"{head:>7}" for head in heads)]
    for row in rows:
        numbers = [counts[row, head] for head in heads]
        text.append(f"{row:<{width}}  {sum(numbers):>5} " + " ".join(f"{n:>7}" for n in numbers))
    return "\n".join(text)


def clean(folder):
    """Kill all runs of this harness, and give their small disks back."""
    for pid in processes(f"{os.getpid()}-"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", line.split()[1]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=20, help="random disturbances of each script")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    jobs = plan(options.seed, options.runs, options.only, References(folder, folder / "repository"))
    if options.list:
        folder.rmdir()
        return print("\n".join(name for _, name, _ in jobs))

    def leave(number, frame):
        for _ in range(2):  # a job may just start one
            clean(folder)
        os._exit(128 + number)

    # Also where nohup or `&` ignores them: what is ignored, children ignore too.
    for name in SIGNALS:
        signal.signal(getattr(signal, name), leave)
    began, repository = time.monotonic(), copy(folder / "repository")
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = [folder / f"{number:03d}" for number in range(len(jobs))]
        results = list(pool.map(execute, jobs, folders, itertools.repeat(repository)))
    print(f"\n{table(results)}\n{(time.monotonic() - began) / 60:.1f} minutes; seed {options.seed}")
    wrong = sum(word == "wrong" for _, word in results)
    if wrong:
        sys.exit(f"{wrong} of {len(results)} ended wrong; their folders are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
