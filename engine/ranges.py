"""What a value may be: Python's types, numbers with their range.

    def __init__(self, *, momentum: Momentum = 0.99, crop: Size, split: Literal["a", "b"] = "a"):

`Annotated[int, "[1, inf)"]` is an int of at least 1. The interval is that of a number, or of the
length of a list or a string. The keys of configs/defaults.yaml have theirs here, the
options of a component in the signature of its constructor, which engine/build.py compares with the
YAML.
"""

import json
import math
import re
import types
from typing import Annotated, Literal, Union, get_args, get_origin

Count = Annotated[int, "[1, inf)"]
Natural = Annotated[int, "[0, inf)"]
Width = Annotated[int, "[1, 16384]"]  # channels, pixels, and what else takes memory
OptionalWidth = Annotated[int, "[0, 16384]"]  # 0: none, or a default
Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
Momentum = Annotated[float, "[0, 1)"]
Few = Annotated[int, "[1, 1024]"]
Depths = Annotated[list[Few], "[4, 4]"] | Annotated[list, "[0, 0]"]  # blocks of four stages
Rates = Annotated[list[Few], "[1, 100]"]
Scales = Annotated[list[Annotated[float, "(0, 16]"]], "[1, 100]"]
Size = Annotated[list[Width], "[2, 2]"]  # height, width
Text = Annotated[str, "[1, 4096]"]
# What becomes a file or a folder: no path, and short enough with a suffix in any alphabet.
Name = Annotated[str, re.compile(r"(?!.*\.\.)\w[\w.-]{0,49}")]

# What the values of configs/defaults.yaml may be; another key takes what its default's type is.
Part = Literal["backbone", "decoder", "projector"]
RANGES = {
    "seed": Annotated[int, "[0, 2147483647]"],
    "folder": Text,
    "resume": Text,
    "device": Literal["auto", "cpu", "cuda"],
    "threads": Annotated[int, "[0, 1024]"],
    "precision": Literal["fp32", "bf16", "fp16"],
    "timeout": Annotated[float, "(0, 100000]"],
    "data": {
        "root": Text | None,
        "test": dict[Name, dict],
        "seen": list[str],
        "rare_classes": {"temperature": NonNegative, "min_pixels": Natural},
        "cache": Text,
        "workers": Literal["auto"] | Annotated[int, "[0, 256]"],
    },
    "model": {
        "init": Text,
        "heads": dict[Name, dict],
        "frozen_bn": list[Part],
        "frozen": list[str],
        "lora": Annotated[int, "[0, 1024]"],
        "cache": Text,
        "bn_views": list[str],
        "compile": Literal[False, True, "reduce-overhead"],
    },
    "uda": {"labelers": list[dict], "source_short_side": OptionalWidth},
    "stages": list[dict],
    "prototypes": dict[Name, dict],
    "losses": Annotated[list[dict], "[1, inf)"],
    "train": {
        "iters": Count,
        "batch_size": Annotated[int, "[1, 65536]"],
        "accumulate": Count,
        "teacher": Momentum,
    },
    "optimizer": {
        "name": Literal["AdamW", "SGD"],
        "lr": Positive,
        "head_lr_factor": NonNegative,
        "layer_decay": Annotated[float, "(0, 1]"],
        "weight_decay": NonNegative,
        "momentum": Momentum,
        "betas": Annotated[list[Momentum], "[2, 2]"],
        "clip": NonNegative,
    },
    "schedule": {
        "warmup": Natural,
        "warmup_ratio": Share,
        "power": NonNegative | Literal["cosine"],
        "min_ratio": Share,
        "min_lr": NonNegative,
    },
    "eval": {
        "every": Natural,
        "mode": Literal["whole", "slide"],
        "crop": Size,
        "stride": Size,
        "short_side": OptionalWidth,
        "scales": Scales,
        "weights": Literal["student", "teacher"],
        "subsets": dict[Name, Annotated[list[str], "[1, inf)"]],
        "pictures": Natural,
        "patience": Natural,
    },
    "log": {"every": Count, "images_every": Natural, "profile": Natural},
    "checkpoint": {"every": Count, "keep": Count},
}
STAGE_RANGES = {
    "name": Name,
    "iters": Natural,
    "init": Text,
    "teacher": Literal["ema", "frozen", "none"],
    "repeat": Annotated[int, "[1, 100]"],
    "lr_scale": Annotated[float, "(0, 10]"],
}


def is_a(value, kind):
    """Is a YAML value of this kind? An int counts as a float, a bool as neither; NaN and infinity
    are no floats."""
    return mismatch(value, kind) is None


def mismatch(value, kind, key=""):
    """The first part of a value that is not of its kind -> (its dotted key, itself, its kind); None
    if all are."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = mismatch(value, arguments[0], key)
        if found and found[0] != key:
            return found
        fits = not found and all(within(value, rule) for rule in arguments[1:])
    elif origin in (Union, types.UnionType):
        fits = any(is_a(value, argument) for argument in arguments)
    elif origin is Literal:
        fits = any(type(value) is type(argument) and value == argument for argument in arguments)
    elif list in (origin, kind):
        fits = isinstance(value, (list, tuple))
        for number, item in enumerate(value if fits and arguments else ()):
            if found := mismatch(item, arguments[0], f"{key}.{number}"):
                return found
    elif dict in (origin, kind):
        fits = isinstance(value, dict)
        for name, item in value.items() if fits and arguments else ():
            if not is_a(name, arguments[0]):
                return f"a name in {key}", name, arguments[0]
            if found := mismatch(item, arguments[1], f"{key}.{name}"):
                return found
    elif kind in (int, float):
        fits = isinstance(value, int) and not isinstance(value, bool)
        fits |= kind is float and isinstance(value, float) and math.isfinite(value)
    elif kind in (None, types.NoneType):
        fits = value is None
    else:
        fits = isinstance(value, kind)
    return None if fits else (key, value, kind)


def within(value, rule):
    """Does a number, or a length, lie in an interval such as "[0, 1)"; does a string match a
    pattern?"""
    if isinstance(rule, re.Pattern):
        return rule.fullmatch(value) is not None
    value = value if isinstance(value, (int, float)) else len(value)
    low, high = map(float, rule[1:-1].split(","))
    above = low < value or (rule[0] == "[" and low == value)
    return above and (value < high or (rule[-1] == "]" and value == high))


def describe(kind):
    """A kind in words: "an int of at least 1"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, rule = arguments[:2]
        if isinstance(rule, re.Pattern):
            return (
                "a name of 1 to 50 letters, digits, _, - and . (files are called by it, so no path)"
            )
        low, high = rule[1:-1].split(", ")
        if base in (int, float):
            span = f"of at least {low}" if rule[0] == "[" else f"above {low}"
            return f"{describe(base)} {span if high == 'inf' else f'in {rule}'}"
        length = {"inf": f"{low} or more", low: low}.get(high, f"{low} to {high}")
        each = f", each {describe(get_args(base)[0])}" if get_args(base) else ""
        return f"{describe(get_origin(base) or base)} of length {length}{each}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        *most, last = (value if isinstance(value, str) else show(value) for value in arguments)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is list:
        return f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return f"a mapping, each value {describe(arguments[1])}"
    words = {int: "an int", float: "a float", str: "a string", bool: "true or false"}
    words |= {list: "a list", dict: "a mapping", None: "null", types.NoneType: "null"}
    return words.get(origin or kind) or f"a {kind.__name__}"


def brief(text, length=80):
    """What a user wrote, in a message: on one line, shortened."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def show(value, length=80):
    """A value in a message: as YAML has it, shortened."""
    if isinstance(value, str):
        return brief(repr(value), length)
    return brief(json.dumps(value, ensure_ascii=False, skipkeys=True, default=str), length)
