"""Whether a configuration may run: with this script, and from that checkpoint."""

import logging
import re
import sys
from pathlib import Path

from engine.config import (
    ConfigError,
    defaults,
    difference,
    listing,
    load,
    override,
    plain,
    stages,
    text,
)
from engine.ranges import show

logger = logging.getLogger("engine")

# Keys that may change between a checkpoint and the run that goes on from it: they do not change
# what is computed.
FREE = (
    "folder",
    "resume",
    "device",
    "threads",
    "timeout",
    "eval",
    "log",
    "checkpoint",
    "data.root",
    "data.workers",
    "data.test",
    "data.monitor",
    "data.cache",
    "data.seen",
    "model.backbone.weights",
    "model.init",
    "model.cache",
    "model.backbone.checkpointing",
    "dg.tower.weights",
    "uda.compare",
)
# Of these the folder alone: another file, or none, begins elsewhere.
FILES = ("model.backbone.weights", "model.init", "dg.tower.weights")
# But these do in train_uda.py: what labels the target, at which size, and what a stage hands on.
ADAPTS = ("eval.short_side", "eval.weights")


def check_resume(old, new):
    """Compare a checkpoint's configuration with the one of the run that is to go on from it.

    The last stage, or the one of a run without stages, may be longer than it was.

    Raises:
        ConfigError: they differ in more than that and FREE, and the checkpoint was not named
            explicitly.
    """
    old = override(old, [])  # keys that are new since then have their defaults
    # What a stage says of eval may also decide how it labels the target.
    free = [*map(re.escape, FREE), r"stages\.[^.]+\.(log|checkpoint)"]
    before, after = ([stage["train"]["iters"] for stage in stages(cfg)] for cfg in (old, new))
    if longer := before[:-1] == after[:-1] and before[-1] <= after[-1]:
        free += [r"train\.iters", r"stages\.[^.]+\.iters", r"stages\.[^.]+\.train\.iters"]
    free = re.compile(rf"({'|'.join(free)})(\..*)?")
    kept = ADAPTS if new["data"]["target"] != defaults()["data"]["target"] else ()
    changes = difference(old, new).items()
    names = {k: [Path(str(value)).name for value in v] for k, v in changes if k in FILES}
    kept += tuple(key for key, (was, now) in names.items() if was != now)
    changes = {k: v for k, v in changes if k in kept or not free.fullmatch(k)}
    if changes and new["resume"] == "auto":
        changed = [f"{key} {show(a, 40)} -> {show(b, 40)}" for key, (a, b) in changes.items()]
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ConfigError(
            f"{new['folder']} holds a run with another configuration: "
            f"{', '.join(changed[:5])}{more}. Choose another "
            "folder=..., or go on from it all the same with resume=PATH of the checkpoint"
        )
    if longer and before[-1] < after[-1]:
        logger.warning(
            f"{before[-1]} -> {after[-1]} iterations: from the checkpoint on, the learning rate is "
            f"that of the longer "
            "run"
        )


# Sections that only one script uses: in the others they would train as if they were not there.
SECTIONS = {
    "train_uda": (
        "uda",
        "stages",
        "data.target",
        "data.target_augment",
        "data.monitor",
        "model.bn_views",
    ),
    "train_dg": ("dg", "model.heads.projector", "model.heads.text_attention"),
}
VIEWS = {
    "train_supervised": ("source", "none"),
    "train_dg": ("source", "none", "teacher", "tower"),
}  # train_uda.py: those of the mixer


def of_script(script, arguments):
    """The configuration of a training script from its command line: CONFIG and overrides. With
    --show it is printed as YAML, and the process ends.

    Raises:
        ConfigError: as of `load` and `check_sections`; a file of text vectors that is not there.
    """
    path, *overrides = [word for word in arguments if word != "--show"] or [""]
    config = load(path, overrides)
    check_sections(config, script)
    if "--show" in arguments:
        print(text(config), end="")
        sys.exit(0)
    specs = [spec for part in stages(config) for spec in part["prototypes"].values()]
    files = [spec["file"] for spec in specs if isinstance(spec.get("file"), str)]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ConfigError(  # now, and not after data were read and weights downloaded
            f"there is no file {missing[0]}; make it: python -m models.prototypes.text "
            f"out={missing[0]} classes=..."
        )
    return config


def check_sections(config, script):
    """What a configuration sets must have an effect in the script that reads it: train_supervised,
    train_uda, train_dg.

    Raises:
        ConfigError: a section that another script uses differs from the defaults, a loss or a
            member of the prototype family needs another script's view, or the teacher is to be
            reported and there is none, or a frozen one.
    """
    parts = stages(config)
    changed = [key for part in parts for key in difference(defaults(), plain(part))]
    for owner, sections in SECTIONS.items():
        for section in sections if owner != script else ():
            if any(f"{key}.".startswith(f"{section}.") for key in changed):
                raise ConfigError(
                    f"{section} has no effect in {script}.py: it belongs to {owner}.py"
                )
    for spec in [*config["losses"], *config["prototypes"].values()]:
        for key, view in spec.items():
            if str(key).endswith("view") and view not in VIEWS.get(script, (view,)):
                raise ConfigError(
                    f"{spec.get('name')}: {script}.py has no {key} {show(view)}; there are "
                    f"{listing(VIEWS[script])}"
                )
    targets = [part["data"]["target"] for part in parts if script == "train_uda"]
    if any(isinstance(target, dict) and target["name"] == "none" for target in targets):
        raise ConfigError("train_uda.py needs data.target, the unlabelled target set")
    for part in parts if script == "train_uda" else ():
        if part["stage"]["teacher"] == "frozen" and part["eval"]["weights"] == "teacher":
            raise ConfigError(
                f"stage {part['stage']['name']}: eval.weights=teacher would report and hand on the "
                "frozen network, and discard what the stage trains: set eval.weights=student, in "
                "this stage or for all"
            )
    for part in parts:
        check_patience(part, script)
    last = parts[-1]  # what is reported
    kind = last["stage"]["teacher"] if script == "train_uda" else "ema"
    if last["eval"]["weights"] == "teacher" and not (kind == "ema" and last["train"]["teacher"]):
        raise ConfigError(
            "eval.weights=teacher, but there is no teacher: set train.teacher, such as 0.999, or "
            "eval.weights=student"
        )


def check_patience(config, script):
    """Raise ConfigError where eval.patience has nothing to wait for, or chooses by a domain that
    says nothing of what is reported."""
    if not config["eval"]["patience"]:
        return
    if script == "train_uda":
        raise ConfigError(
            "eval.patience would end an adaptation by its accuracy on the source: set the steps of "
            "each stage instead"
        )
    if config["data"]["val"]["name"] == "none" or not config["eval"]["every"]:
        raise ConfigError("eval.patience counts validations: it needs data.val and eval.every")
