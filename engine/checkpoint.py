"""Checkpoints: safe types, written whole or not at all, found again after the queue has killed the
job.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that it loads without
running any code:

    format step model teacher prototypes optimizer scaler rng best seconds config classes palette
    stage stage_step labelers maps      (train_uda.py)
"""

import hashlib
import itertools
import logging
import os
import re
import shutil
from pathlib import Path

import torch

from engine import contents, distributed, weights
from engine.accepted import check_resume
from engine.config import difference, plain, stages
from engine.errors import NonFinite, UserError
from engine.process import signals

FORMAT = 1
logger = logging.getLogger("engine")


def save(path, content, required=True):
    """Write a checkpoint under a temporary name, flush it to the disk, then rename: readers see all
    of it or nothing.

    Raises:
        UserError: the file is `required` and could not be written. Otherwise that is a warning, and
            training goes on.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    signals.writing = True
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SystemExit) as error:
        temporary.unlink(missing_ok=True)
        if signals.code is not None:  # PyTorch's writer makes an error of the exit
            raise SystemExit(signals.code) from None
        free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.is_dir() else 0.0
        message = f"could not write {path} ({error}); {free:.1f} GiB are free there"
        if required:
            raise UserError(message) from None
        logger.warning(f"{message}; training continues")
    finally:
        signals.writing = False


def content(stateful, dataset, **about):
    """What a checkpoint holds: the states of all parts, generators of all processes, and `about`.

    Raises:
        NonFinite: on every process, if a tensor of one of them is not finite.
    """
    state = {name: part.state_dict() for name, part in stateful.items()}
    name, rng = first_nonfinite(state), distributed.gather(rng_state())
    if distributed.any_process(name is not None):
        raise NonFinite(
            f"step {about['step']}: {name or 'a tensor of another process'} is not finite. Nothing "
            "was written over the checkpoints before. Lower optimizer.lr, or set optimizer.clip=1"
        )
    palette = [list(map(int, color)) for color in dataset.PALETTE]
    return state | {"classes": list(dataset.CLASSES), "palette": palette, "rng": rng, **about}


def first_nonfinite(state):
    """The dotted name of a tensor in nested dicts that holds a NaN or an infinity; None if there is
    none.

    Thresholds of labelers may be infinite: a class that was never predicted has no threshold.
    """
    found = {}

    def collect(value, name):
        if isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{name}.{key}" if name else str(key))
        elif torch.is_tensor(value) and value.is_floating_point():
            bad = value.isnan() if name.startswith("labelers") else ~value.isfinite()
            found.setdefault(bad.device, {})[name] = bad.any()

    collect(state, "")
    for flags in found.values():  # one wait for each device
        broken = torch.stack([*flags.values()]).tolist()
        if any(broken):
            return [*flags][broken.index(True)]
    return None


def load(path, needed=contents.EVALUATED):
    """Read a checkpoint of this project, which must hold the `needed` keys.

    Raises:
        weights.WeightsError: no such file, an incomplete, damaged or unsafe one, or no checkpoint
            of this project.
        ConfigError: its configuration has an unknown key or a value of a wrong type.
    """
    return check(weights.read(path), path, needed)


def check(content, path, needed=contents.EVALUATED):
    """The content of a file, as `load` returns it."""
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT:
        raise weights.WeightsError(f"{path} is not a checkpoint of this project (format {FORMAT})")
    contents.check(content, path, needed)
    return content


def restore(part, name, saved, path):
    """Give a part of a run its state in a checkpoint.

    Raises:
        UserError: it has none, or that of another network, optimizer or scaler.
    """
    # An optimizer takes the options of the state that it loads; those of the configuration count.
    groups = part.param_groups if isinstance(part, torch.optim.Optimizer) else ()
    options = [{key: group[key] for key in group if key != "params"} for group in groups]
    try:
        part.load_state_dict(saved[name])
        how = ""
        for group, own in zip(part.param_groups if groups else (), options):
            how = how or ("" if own.keys() <= group.keys() else "its options are others")
            group.update(own)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        how = weights.reason(error) if name in saved else "there is none"
        if name in saved and isinstance(part, torch.nn.Module):
            how = weights.compare(part, saved[name])[1] or how
    if how:
        raise UserError(
            f"{path} cannot be resumed from, its '{name}' does not fit this run: {how}. Take the "
            "configuration of the run that wrote it, or another folder=... without resume"
        )


def fingerprint(dataset):
    """[number of images, hash of their names]: changes when images are added, removed or
    renamed."""
    names = "\n".join(dataset.stem(index) for index in range(len(dataset)))
    return [len(dataset), hashlib.sha256(names.encode()).hexdigest()[:16]]


def check_same(path, saved, cfg, data):
    """Compare a checkpoint with the run that is to go on from it.

    Args:
        saved: content of the checkpoint at `path`.
        cfg: configuration of the run.
        data: {name of a training set: fingerprint} of the run.
    Raises:
        ConfigError: the configurations differ.
        UserError: another script wrote it; the stages and steps of the run do not lead to it; or
            the training sets differ, and the checkpoint was not
            named explicitly; otherwise that is a warning.
    """
    if ("stage" in saved) != ("target" in data):
        raise UserError(
            f"{path} cannot be resumed from: "
            f"{'train_uda.py' if 'stage' in saved else 'another script'} wrote it"
        )
    check_resume(saved["config"], cfg)
    parts, number = stages(cfg), saved.get("stage", 0)
    lengths, done = [part.train.iters for part in parts], saved.get("stage_step", saved["step"])
    reached = number < len(parts) and done <= lengths[number]
    if not reached or sum(lengths[:number]) + done != saved["step"]:
        raise UserError(
            f"{path} is at step {saved['step']}, in stage {number + 1}: stages and train.iters of "
            "this configuration do not lead there, or end before"
        )
    for name, before in saved.get("data", {}).items():
        if data.get(name) != before:
            message = (
                f"data.{name} is not what {path} was trained on: {before[0]} images then, "
                f"{data[name][0]} now, or other names"
            )
            if cfg.resume == "auto":
                remedy = f"choose another folder=..., or go on all the same with resume={path}"
                raise UserError(f"{message}; {remedy}")
            logger.warning(message)


def save_step(folder, content, keep, final=False):
    """Write `step_<n>.pt` and remove all but the `keep` newest; main process only. The `final` one
    is required."""
    if not distributed.is_main():
        return
    save(Path(folder) / f"step_{content['step']:07d}.pt", content, required=final)
    for path in list_steps(folder)[max(keep, 1) :]:
        try:
            path.unlink()
        except OSError as error:
            logger.warning(f"could not remove the old checkpoint {path} ({error})")


def save_light(path, content, required=False):
    """Write all but what only a resumed run needs; main process only."""
    if distributed.is_main():
        light = {
            key: value
            for key, value in content.items()
            if key not in ("optimizer", "scaler", "rng")
        }
        save(path, light, required)


def list_steps(folder):
    """Paths of `step_<n>.pt`, the newest first."""
    paths = (p for p in Path(folder).glob("step_*.pt") if re.fullmatch(r"step_\d+", p.stem))
    return sorted(paths, key=lambda path: int(path.stem[5:]), reverse=True)


def find(cfg):
    """The checkpoint to go on from.

    `resume: auto` takes the newest complete one of the run folder, `none` starts anew. A path is
    taken, unless this very configuration has gone on from it before, as when a queue starts a
    command again: then the newest that it wrote.

    Returns:
        (path, content), or (None, None) for a fresh start.
    """
    folder, resume = cfg.folder, cfg.resume
    if resume == "none":
        if list_steps(folder):
            raise UserError(
                f"{folder} holds checkpoints of another run: choose another folder=..., or "
                f"resume=auto"
            )
        return None, None
    for path in list_steps(folder):
        try:
            saved = load(path, contents.RESUMED)
        except weights.WeightsError as error:
            logger.warning(f"skipping a checkpoint: {error}")
            continue
        if resume == "auto" or not difference(saved["config"], plain(cfg)):
            return path, saved
        break
    return (None, None) if resume == "auto" else (Path(resume), load(resume, contents.RESUMED))


def tidy(folder, start, named=None):
    """Remove what a killed save left behind, and move later checkpoints to `abandoned/`: they are
    neither lost nor taken for those of this run.

    Args:
        start: step from which the run goes on. Later ones are damaged, or there is a `named` one.
        named: path of the checkpoint of another run, or of an earlier step of this one. best.pt is
            then of the steps that are abandoned. The networks of earlier stages, which are
            compared at the end, and the maps of the stage lie beside that checkpoint.
    """
    folder = Path(folder)
    for path in folder.glob("*.tmp.*"):
        path.unlink(missing_ok=True)
    later = [path for path in list_steps(folder) if int(path.stem[5:]) > start]
    later += [folder / "best.pt"] if named and (folder / "best.pt").is_file() else []
    places = (folder / f"abandoned{n or ''}" for n in itertools.count())
    place = next(place for place in places if not any((place / p.name).exists() for p in later))
    for path in later:
        place.mkdir(exist_ok=True)
        os.replace(path, place / path.name)
    if named and named.parent.resolve() != folder.resolve():
        for kept in named.parent.glob("stage_*.pt"):
            shutil.copy2(kept, folder)
        if (named.parent / "maps").is_dir():
            shutil.copytree(named.parent / "maps", folder / "maps", dirs_exist_ok=True)


def rng_state():
    """The state of this process's generators. Dropout and drop path need it; all else is a function
    of the step."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(states):
    """Restore the generators from the list that one `rng_state` per process made."""
    if len(states) != distributed.world_size():
        logger.warning(
            f"the checkpoint comes from {len(states)} processes and there are "
            f"{distributed.world_size()} now: "
            "dropout will not repeat bitwise"
        )
        return
    state = states[distributed.rank()]
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
