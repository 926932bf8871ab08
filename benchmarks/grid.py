"""The grid file of benchmarks/reproduce.py, which describes it: read, checked, pairs made rows."""

import itertools
import json
from pathlib import Path
from typing import Literal

from engine.config import ConfigError, read_yaml
from engine.files import read_text
from engine.ranges import Few, Natural, describe, mismatch, show

DEFAULTS = {
    "script": "train_supervised.py",
    "seeds": [0],
    "metric": "mIoU",
    "common": [],
    "runs": 1,
    "threads": 0,
    "scalars": [],
    "folder": "runs",
    "out": "benchmarks/results",
    "pairs": None,
    "rows": {},
    "only": [],
}
GRID = {
    "name": str,
    "script": str,
    "seeds": list[Natural],
    "metric": str,
    "common": list[str],
    "runs": Few,
    "threads": Natural,
    "scalars": list[str],
    "folder": str,
    "out": str,
    "pairs": dict[Literal["sets", "first", "methods"], dict] | None,
    "rows": dict[str, dict],
    "only": list[str],
}
ROW = {"config": str, "set": list[str], "seeds": list[Natural], "script": str, "after": str}
# How and where, and no part of what was measured.
LOCAL = ("runs", "threads", "folder", "out", "only")


def load_grid(path, overrides):
    """Grid file and `key=value` overrides -> dict with every key of GRID."""
    if not Path(path).is_file():
        raise ConfigError(f"there is no grid file {path}")
    content = read_yaml(read_text(path), path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no grid: it must be a mapping with {', '.join(GRID)}")
    grid = DEFAULTS | content
    for text in overrides:
        key, _, value = text.partition("=")
        value, more = read_yaml(value, text), key.endswith("+")
        if more and not (isinstance(grid.get(key[:-1]), list) and isinstance(value, list)):
            raise ConfigError(f"'{text}' adds to a list, and one of the two is none")
        grid |= {key[:-1]: grid[key[:-1]] + value} if more else {key: value}
    check_kinds(grid, GRID, path)
    if "name" not in grid:
        raise ConfigError(f"{path}: the grid has no name")
    if grid["pairs"]:
        grid |= {"rows": grid["rows"] | paired(**grid["pairs"])}
    for row, spec in grid["rows"].items():
        if "config" not in spec:
            raise ConfigError(f"{path}: the row '{row}' has no config")
        check_kinds(spec, ROW, path, f"rows.{row}.")
    asked = {f"row '{row}': after": s["after"] for row, s in grid["rows"].items() if "after" in s}
    for where, row in [*asked.items(), *(("only", row) for row in grid["only"])]:
        if row not in grid["rows"]:
            raise ConfigError(
                f"{path}: {where} names the row '{row}'; there are {', '.join(grid['rows'])}"
            )
    return grid


def check_kinds(content, kinds, path, where=""):
    """Raise ConfigError where a mapping has an unknown key, or a value that is not of its kind."""
    for key, value in content.items():
        if key not in kinds:
            known = ", ".join(kinds)
            raise ConfigError(f"{path}: unknown key '{where}{key}'; there are {known}")
        if found := mismatch(value, kinds[key], where + key):
            name, wrong, kind = found
            raise ConfigError(f"{path}: '{name}' must be {describe(kind)}, not {show(wrong)}")


def paired(sets, first, methods):
    """The rows of `pairs`."""

    def row(spec, settings, **more):
        texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return {**spec, "set": [*spec.get("set", []), *texts], **more}

    train = {name: {"data.train": spec["train"]} for name, spec in sets.items()}
    test = {name: {"data.test": {name: spec["test"]}} for name, spec in sets.items()}
    rows = {a: row(first, train[a] | test[a]) for a in sets}
    for a, b in itertools.permutations(sets, 2):
        data = {**train[b], "data.target": sets[a]["train"], **test[b]}
        for method, spec in methods.items():
            spec = spec | {"set": [text.replace("{first}", a) for text in spec.get("set", [])]}
            rows[f"{a} to {b}, {method}"] = row(spec, data, after=a)
    return rows
