"""What a checkpoint must hold, checked in one place before anything uses it: the file may come from
anywhere."""

import math
import re

import torch

from engine import config
from engine.weights import WeightsError

EVALUATED = ("step", "model", "config", "classes", "palette")  # what no use can do without
RESUMED = (*EVALUATED, "optimizer", "scaler", "rng", "prototypes", "best", "seconds")

STAGED = ("stage_step", "maps", "labelers")  # and this, where there are stages


def fits(value, kind):
    """Is a value of a kind: a type, [kind], {str: kind}, or a function that says so?"""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            fits(key, str) and fits(item, kind[str]) for key, item in value.items()
        )
    return isinstance(value, kind) if isinstance(kind, type) else kind(value)


def count(value):
    return type(value) is int and value >= 0


def number(value):
    return type(value) in (int, float) and math.isfinite(value)


def color(value):
    return fits(value, [count]) and len(value) == 3 and max(value) < 256


def stored_map(value):
    return isinstance(value, str) and re.fullmatch(
        r"(\d+_\w[\w.-]*/)?(source|target)/\w[\w.-]*", value
    )


def fingerprint(value):
    return isinstance(value, list) and list(map(type, value)) == [int, str]


def optimizer(value):
    groups = value.get("param_groups") if isinstance(value, dict) else None
    return fits(groups, [dict]) and fits(value.get("state"), dict)


def generators(value):
    if not fits(value, {str: torch.Tensor}) or "torch" not in value:
        return False
    try:
        torch.Generator().set_state(value["torch"])
    except (TypeError, RuntimeError):  # of another type or size
        return False
    return True


TENSORS = {str: torch.Tensor}, "tensors by name"
KINDS = {
    "step": (count, "a number of steps"),
    "model": TENSORS,
    "teacher": TENSORS,
    "prototypes": TENSORS,
    "labelers": TENSORS,
    "optimizer": (optimizer, "the state of an optimizer"),
    "scaler": (dict, "the state of a scaler"),
    "rng": ([generators], "a list of states of random generators"),
    "best": (number, "a number"),
    "waited": (count, "a number of validations"),
    "seconds": (number, "a number"),
    "config": (dict, "a mapping"),
    "classes": ([str], "a list of names"),
    "palette": ([color], "a list of colours [r, g, b]"),
    "pending": (bool, "true or false"),
    "data": ({str: fingerprint}, "the number and hash of the images of each set"),
    "stage": (count, "the number of a stage"),
    "stage_step": (count, "a number of steps"),
    "maps": ([stored_map], "a list of names such as 2_adapt/target/pseudo_labels"),
}


def check(content, path, needed=EVALUATED):
    """Compare a checkpoint's content with KINDS, its configuration with the defaults. An older
    configuration becomes one of today.

    Raises:
        WeightsError: a key of another kind, or a needed one is missing.
        ConfigError: an unknown key or a wrong type in the configuration.
    """
    foreign = f"{path} is not a checkpoint of this project"
    for key, (kind, what) in KINDS.items():
        if key in content and not fits(content[key], kind):
            raise WeightsError(f"{foreign}: '{key}' must be {what}")
    if missing := [key for key in EVALUATED if key not in content]:
        raise WeightsError(f"{foreign}: it lacks {', '.join(missing)}")
    staged = STAGED if "stage" in content and needed is RESUMED else ()
    if missing := [key for key in (*needed, *staged) if key not in content]:
        raise WeightsError(
            f"{path} cannot be resumed from: it lacks {', '.join(missing)}; take a step_<n>.pt"
        )
    names = content["classes"]
    if not 0 < len(set(names)) == len(names) == len(content["palette"]):
        raise WeightsError(f"{foreign}: 'classes' must be different, each with one colour")
    content["config"] = config.modern(content["config"])
    config.check(content["config"], f"the configuration in {path}")
    if "stage" in content:
        stages, stage = config.stages(config.override(content["config"], [])), content["stage"]
        if stage >= len(stages):
            raise WeightsError(f"{foreign}: 'stage' must be one of its {len(stages)} stages")
        if content.get("stage_step", 0) > (iters := stages[stage].train.iters):
            raise WeightsError(
                f"{foreign}: 'stage_step' must be at most {iters}, its stage's steps"
            )
