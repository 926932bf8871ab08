"""What a run leaves behind: console and log.txt, TensorBoard events, and the same numbers in full
precision.

    runs/<config>/seed0/{config.yaml, log.txt, scalars.jsonl, events.*, step_*.pt, best.pt,
    results.json, eval/}

Only the main process writes.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine import distributed
from engine.errors import UserError
from engine.files import write
from engine.step import Output

logger = logging.getLogger("engine")
SETTLED = 10  # steps before a profile: by then libraries have chosen their algorithms
FREED = 5.0  # seconds that a killed run may take to leave its folder: its memory goes first
logging.raiseExceptions = False  # a full disk is said once, by `Log`, not by every line of log.txt


def interactive():
    """Whether somebody watches: then a bar shows the progress, otherwise lines do."""
    return sys.stderr.isatty()


class _Console(logging.Handler):
    def emit(self, record):
        try:
            tqdm.write(self.format(record), file=sys.stdout)  # keeps the progress bar in one piece
            sys.stdout.flush()
        except (OSError, ValueError):  # nobody reads any more, as when a terminal hangs up
            logger.removeHandler(self)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
            logger.warning("nobody reads the output any more")
            os.kill(os.getpid(), signal.SIGHUP)


def _thread_failed(arguments):
    """Said once: the thread that writes for TensorBoard passes its error on at the next call, see
    `Log`."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


def to_console():
    """Messages of the project on the main process's console; of the other processes only errors."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    handler = _Console()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: not (interactive() and getattr(record, "progress", False)))
    logger.addHandler(handler)


def facts(device):
    """What a number depends on besides its configuration."""
    name = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return {
        "command": shlex.join(sys.argv),
        "commit": (_git("rev-parse", "--short", "HEAD") or "none")
        + ("+" if _git("status", "--porcelain") else ""),
        "device": f"{distributed.world_size()} x {name} "
        f"({device.type}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
    }


def summary(network, augment):
    """The size of a Segmentor in words: parameters of its parts, and the multiply-adds of one
    training picture, found without computing it (tensors on PyTorch's meta device).

    Args:
        augment: the component `data.augment`, whose crop or size is the picture's.
    """
    parts = {"backbone": network.backbone, "decoder": network.decoder, **network.heads}
    parts |= {"classifier": network.classifier}
    words = [f"{name} {type(p).__name__} {_millions(p.parameters())}" for name, p in parts.items()]
    trained = (p for p in network.parameters() if p.requires_grad)
    words += [f"all {_millions(network.parameters())} parameters, {_millions(trained)} trained"]
    size, mode = augment.get("crop") or augment.get("size"), network.training
    if not size or not distributed.is_main():
        return ", ".join(words)
    network.eval()
    with (
        contextlib.suppress(RuntimeError),
        torch.no_grad(),
        FlopCounterMode(display=False) as count,
    ):
        found = torch.empty(1, 3, *size, device="meta")
        for part, more in ("backbone", ()), ("decoder", ()), ("classifier", (Output(),)):
            state = dict([*parts[part].named_parameters(), *parts[part].named_buffers()])
            state = {name: tensor.detach().to("meta") for name, tensor in state.items()}
            found = functional_call(parts[part], state, (found, *more))
        adds = count.get_total_flops() / 2e9
        words += [f"{adds:.2f} G multiply-adds for {size[0]}x{size[1]} pixels"]
    network.train(mode)
    return ", ".join(words)


def _millions(parameters):
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M"


def _git(*arguments):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        root = Path(__file__).parent
        return subprocess.check_output(
            ["git", *arguments], cwd=root, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return ""


# What TensorBoard's tab Custom Scalars shows first: {page: {chart: its tags}}.
LAYOUT = {
    "run": {
        "loss and its terms": ["Multiline", [r"train/loss.*"]],
        "validation": ["Multiline", [r"val/m.*", r"val/aAcc"]],
        "pseudo labels: share and accuracy in per cent (train_uda.py with data.monitor)": [
            "Multiline",
            [r"pseudo/share$", r"pseudo/accuracy$"],
        ],
        "learning rates": ["Multiline", [r"train/lr_.*"]],
    },
    "classes": {
        "IoU on data.val": ["Multiline", [r"val/IoU_.*"]],
        "pseudo labels: share": ["Multiline", [r"pseudo/share_.*"]],
        "pseudo labels: accuracy": ["Multiline", [r"pseudo/accuracy_.*"]],
    },
}
_claims = {}  # {run folder: its lock}, of this process


def _lock(file):
    """Lock an open file against other processes, within FREED seconds; raises OSError."""
    end = time.monotonic() + FREED
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def claim(folder):
    """Lock a run folder against a run of another process, until `release` or the end of this one.

    Raises:
        UserError: another run has it, or it cannot be made.
    """
    if not distributed.is_main() or folder in _claims:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder} ({error}); choose another folder=..."
        ) from None
    try:
        _lock(lock)
    except BlockingIOError:
        lock.close()
        raise UserError(f"another run is writing to {folder}; choose another folder=...") from None
    except OSError:
        logger.warning(f"the file system of {folder} has no locks: do not start a second run there")
    os.register_at_fork(after_in_child=lock.close)  # loaders that outlive the run would hold it
    _claims[folder] = lock


def release(folder):
    if folder in _claims:
        _claims.pop(folder).close()


class Averages:
    """Means of scalar tensors over the micro-batches since the last look. Adding never waits for
    the GPU."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, values):
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def take(self):
        """Averages over steps and processes -> {name: float}, the same on every process; starts
        anew."""
        sums, count = self.sums, self.count
        self.sums, self.count = {}, 0
        values = distributed.mean(torch.stack([*sums.values()])).tolist() if sums else []
        return {name: value / count for name, value in zip(sums, values)}


class Log:
    """The files of a run; only the main process has any.

    Args:
        folder: run folder, which exists and is claimed.
        start: steps that are done already; later scalars of an interrupted run are dropped.
    """

    def __init__(self, folder, start=0):
        self.folder, self.writer = Path(folder), None
        if not distributed.is_main():
            return
        self.handler = logging.FileHandler(self.folder / "log.txt", errors="backslashreplace")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(self.handler)
        threading.excepthook = _thread_failed
        self.writer = SummaryWriter(str(self.folder), purge_step=start + 1)
        self.writer.add_custom_scalars(LAYOUT)
        if (self.folder / "config.yaml").is_file():
            self.text("configuration", (self.folder / "config.yaml").read_text("utf-8"), start)
        path = self.folder / "scalars.jsonl"
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        write(path, "".join(f"{line}\n" for line in lines if _step(line) <= start))
        self.scalars_file = open(path, "a")  # noqa: SIM115

    def scalars(self, values, step):
        """Numbers by tag, such as {"train/loss": 0.7}."""
        if self.writer:
            with self._writing():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)
                known = {tag: value for tag, value in values.items() if value == value}  # no nan
                self.scalars_file.write(json.dumps({"step": step, **known}) + "\n")
                self.scalars_file.flush()

    def progress(self, step, total, values, laps, batch_size, device):
        """The line and the scalars of a step.

        Args:
            values: averages since the last line, and "train/waiting", the share of the time in
                which training waited for its data.
            laps: seconds of each step since then.
        Returns:
            the time that is left, as text.
        """
        pace = sum(laps) / len(laps)
        days, left = divmod(round((total - step) * pace), 86400)
        eta = f"{days} d " * (days > 0) + time.strftime("%H:%M:%S", time.gmtime(left))
        rate = max(value for name, value in values.items() if name.startswith("train/lr"))
        speed, memory = batch_size / pace, peak_memory(device)
        logger.info(
            f"step {step}/{total}  loss {values['train/loss']:.4f}  lr {rate:.2e}  "
            f"{pace:.3f} s/step  {speed:.1f} images/s  {values['train/waiting']:.0%} waiting  "
            f"{memory:.2f} GiB  eta {eta}",
            extra={"progress": True},
        )
        self.scalars(values | {"train/images_per_sec": speed, "train/max_mem_gb": memory}, step)
        return eta

    def text(self, tag, text, step):
        """Text as it is, such as a table."""
        if self.writer:
            with self._writing():
                self.writer.add_text(tag, f"```\n{text}\n```", step)

    def picture(self, tag, picture, step):
        """A picture (H, W, 3) uint8."""
        if self.writer:
            with self._writing():
                self.writer.add_image(tag, picture, step, dataformats="HWC")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:  # TensorBoard's thread passes its errors on at the next call
            raise UserError(
                f"could not write the log in {self.folder} ({error}); the last checkpoint is "
                f"complete"
            ) from None

    def close(self):
        if self.writer:
            self.writer.close()
            self.scalars_file.close()
            logger.removeHandler(self.handler)
            self.handler.close()
            self.writer = None


def profiled(numbers, steps, folder, device):
    """The numbers of steps; meanwhile the main process profiles `steps` of them, 0: none.

    The profile, profile.pt.trace.json in the run folder, is a Chrome trace. A run that has one
    makes no other.
    """
    path, numbers = folder / "profile.pt.trace.json", iter(numbers)
    if steps and distributed.is_main() and not path.exists():
        names = dict.fromkeys(["CPU", device.type.upper()])
        plan = schedule(wait=SETTLED, warmup=1, active=steps, repeat=1)

        def save(profiler):
            profiler.export_chrome_trace(str(path))

        kinds = [getattr(ProfilerActivity, name) for name in names]
        with profile(activities=kinds, schedule=plan, on_trace_ready=save) as profiler:
            for number in itertools.islice(numbers, SETTLED + 1 + steps):
                yield number
                profiler.step()
    yield from numbers


def _step(line):
    """The step of a line of scalars.jsonl; infinite for one that a full disk or a power cut has
    damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def peak_memory(device):
    """GiB: of the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
