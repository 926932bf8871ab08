"""Checkpoints: safe types, written whole or not at all, found again after the queue has killed the job.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that it loads without running any code:

    format step model teacher prototypes optimizer scaler rng best seconds config classes palette
    stage stage_step labelers maps      (train_uda.py)
"""

import errno
import logging
import os
import re
import shutil
from pathlib import Path

import torch

from engine import contents, distributed, weights
from engine.errors import UserError

FORMAT = 1
logger = logging.getLogger("engine")


def save(path, content, required=True):
    """Write a checkpoint under a temporary name, flush it to the disk, then rename: readers see all of it or nothing.

    A failure is an OSError if the file is `required`; otherwise it is a warning, and training goes on.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.is_dir() else 0.0
        message = f"could not write {path} ({error}); {free:.1f} GiB are free there"
        if required:
            raise OSError(errno.EIO, message) from None
        logger.warning(f"{message}; training continues")


def content(stateful, dataset, **about):
    """What a checkpoint holds: the states of all parts, the classes, the generators of all processes, and `about`."""
    state = {name: part.state_dict() for name, part in stateful.items()}
    palette = [list(map(int, color)) for color in dataset.PALETTE]
    return state | {
        "classes": list(dataset.CLASSES),
        "palette": palette,
        "rng": distributed.gather(rng_state()),
        **about,
    }


def load(path, needed=contents.EVALUATED):
    """Read a checkpoint of this project, which must hold the `needed` keys.

    Raises:
        weights.WeightsError: no such file, an incomplete, damaged or unsafe one, or no checkpoint of this project.
        ConfigError: its configuration has an unknown key or a value of a wrong type.
    """
    content = weights.read(path)
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT:
        raise weights.WeightsError(f"{path} is not a checkpoint of this project (format {FORMAT})")
    contents.check(content, path, needed)
    return content


def save_step(folder, content, keep, final=False):
    """Write `step_<n>.pt` and remove all but the `keep` newest; main process only. The `final` one is required."""
    if not distributed.is_main():
        return
    save(Path(folder) / f"step_{content['step']:07d}.pt", content, required=final)
    for path in list_steps(folder)[max(keep, 1) :]:
        try:
            path.unlink()
        except OSError as error:
            logger.warning(f"could not remove the old checkpoint {path} ({error})")


def save_light(path, content):
    """Write all but what only a resumed run needs; main process only."""
    if distributed.is_main():
        light = {
            key: value
            for key, value in content.items()
            if key not in ("optimizer", "scaler", "rng")
        }
        save(path, light, required=False)


def list_steps(folder):
    """Paths of `step_<n>.pt`, the newest first."""
    paths = [
        path for path in Path(folder).glob("step_*.pt") if re.fullmatch(r"step_\d+", path.stem)
    ]
    return sorted(paths, key=lambda path: int(path.stem[5:]), reverse=True)


def find(folder, resume):
    """The checkpoint to go on from, or None for a fresh start.

    Args:
        folder: run folder.
        resume: "auto" takes the newest complete checkpoint, "none" starts anew, a path must exist.
    Returns:
        The checkpoint's content, or None.
    """
    if resume == "none":
        if list_steps(folder):
            raise UserError(
                f"{folder} holds checkpoints of another run: choose another folder=..., or resume=auto"
            )
        return None
    if resume != "auto":
        return load(resume, contents.RESUMED)
    for path in Path(folder).glob("*.tmp.*"):
        if distributed.is_main():
            path.unlink(missing_ok=True)  # what a killed save left behind
    for path in list_steps(folder):
        try:
            return load(path, contents.RESUMED)
        except weights.WeightsError as error:
            logger.warning(f"skipping a checkpoint: {error}")
    return None


def rng_state():
    """The state of this process's generators. Dropout and drop path need it; all else is a function of the step."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(states):
    """Restore the generators from the list that one `rng_state` per process made."""
    if len(states) != distributed.world_size():
        logger.warning(
            f"the checkpoint comes from {len(states)} processes and there are {distributed.world_size()} now: "
            "dropout will not repeat bitwise"
        )
        return
    state = states[distributed.rank()]
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
