"""What a run leaves behind: console and log.txt, TensorBoard events, and the same numbers in full precision.

    runs/<config>/seed0/{config.yaml, log.txt, scalars.jsonl, events.*, step_*.pt, best.pt, results.json, eval/}

Only the main process writes.
"""

import contextlib
import fcntl
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine import distributed
from engine.errors import UserError

logger = logging.getLogger("engine")


class _Console(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)  # keeps the progress bar in one piece


def to_console():
    """Messages of the project on the main process's console; of the other processes only errors."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    handler = _Console()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)


def facts(device):
    """What a number depends on besides its configuration."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "command": " ".join(sys.argv),
        "commit": (_git("rev-parse", "--short", "HEAD") or "none")
        + ("+" if _git("status", "--porcelain") else ""),
        "device": f"{distributed.world_size()} x {name} ({device.type}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
    }


def _git(*arguments):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        root = Path(__file__).parent
        return subprocess.check_output(
            ["git", *arguments], cwd=root, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return ""


class Averages:
    """Means of scalar tensors over the steps since the last look. Adding never waits for the GPU."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, values):
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def take(self, step):
        """Averages over steps and processes -> {name: float}, the same on every process; starts anew.

        Raises:
            FloatingPointError: a loss was not finite. All processes see the same sums, so they stop together, before
                the next checkpoint is written.
        """
        names, count = list(self.sums), max(self.count, 1)
        if not names:
            return {}
        values = distributed.mean(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums, self.count = {}, 0
        for name, value in zip(names, values):
            if name.startswith("train/loss") and not abs(value) < float("inf"):
                raise FloatingPointError(
                    f"{name} became {value} in the {count} steps up to step {step}; the checkpoints before are intact. "
                    "Lower optimizer.lr, set optimizer.clip=1, or use precision=fp32"
                )
        return {name: value / count for name, value in zip(names, values)}


class Log:
    """The files of a run.

    Args:
        folder: run folder; made if needed and locked against a second run.
        start: steps that are done already; later scalars of an interrupted run are dropped.
    """

    def __init__(self, folder, start=0):
        self.folder, self.writer = Path(folder), None
        self.began, self.first = time.time(), start
        if not distributed.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is writing to {self.folder}; choose another folder=..."
            ) from None
        self.handler = handler = logging.FileHandler(self.folder / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        self.writer = SummaryWriter(str(self.folder), purge_step=start + 1)
        path = self.folder / "scalars.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self.scalars_file = open(path, "a")  # noqa: SIM115

    def scalars(self, values, step):
        """Numbers by tag, such as {"train/loss": 0.7}."""
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)
            self.scalars_file.write(json.dumps({"step": step, **values}) + "\n")
            self.scalars_file.flush()

    def training(self, step, values, rates, norm, scaler, batch_size, device):
        """After `step` steps: the averages of `Averages.take`, learning rates, gradient norm, the scale of mixed
        precision, and the speed."""
        values = (
            values
            | {f"train/lr_{name}": rate for name, rate in rates.items()}
            | {"train/grad_norm": float(norm)}
        )
        values |= {"train/amp_scale": scaler.get_scale()} if scaler.is_enabled() else {}
        self.scalars(values | self.speed(step - 1, batch_size, device), step)

    def picture(self, tag, picture, step):
        """A picture (H, W, 3) uint8."""
        if self.writer:
            self.writer.add_image(tag, picture, step, dataformats="HWC")

    def speed(self, step, batch_size, device):
        """Throughput since the start of this process, and its peak of memory: of the GPU, or of all on a CPU."""
        images = (step + 1 - self.first) * batch_size / (time.time() - self.began)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # KiB on Linux
        memory = (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
        ) / 2**30
        return {
            "train/images_per_sec": images,
            "train/samples": (step + 1) * batch_size,
            "train/max_mem_gb": memory,
        }

    def close(self):
        if self.writer:
            self.writer.close()
            self.scalars_file.close()
            self.lock.close()
            logger.removeHandler(self.handler)
            self.handler.close()
            self.writer = None
