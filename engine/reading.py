"""Reading YAML: strings, numbers, lists and mappings, each as it is written.

It is read as the core schema of version 1.2 reads it: `1e-4` is a number, `on`, `off` and `no`
are strings, `010` is ten, and a key that appears twice is an error. Numbers are finite. `${NAME}`
in a string is the environment variable NAME, and a string that starts with `~/` starts with the
home folder.
"""

import itertools
import math
import os
import re
import typing
from pathlib import Path

import yaml

from engine.errors import UserError
from engine.ranges import show


class ConfigError(UserError):
    """A mistake in a YAML file or an override; the message names the key and what to do."""


LEVELS, VALUES = (
    50,
    20_000,
)  # what nests deeper or holds more is damaged, or made to take all memory


class _Loader(yaml.SafeLoader):
    # None of YAML 1.1's: those of the 1.2 core schema follow, so that other tags are unknown.
    yaml_implicit_resolvers: typing.ClassVar = {}
    yaml_constructors: typing.ClassVar = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")))
    }
    level = count = 0

    def compose_node(self, parent, index):
        self.level, self.count = self.level + 1, self.count + 1
        _limit(self.name, self.level, self.count)
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        # A key that is merged twice counts once, or their number would double with every level.
        keys = [k.value if isinstance(k.value, str) else id(k) for k, _ in node.value]
        node.value = [*dict(zip(keys, node.value)).values()]

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if isinstance(key, (list, dict)):
                continue  # not a key: the parent class says so
            if key in seen:
                raise ConfigError(
                    f"{_place(key_node.start_mark)}: the key {show(key)} appears twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_core(self, node):
        """null, true and false, and numbers, also where a tag such as !!int says so."""
        kind, text = node.tag.rpartition(":")[2], self.construct_scalar(node)
        if not re.fullmatch(_CORE[node.tag], text):
            raise ConfigError(f"{_place(node.start_mark)}: {show(text)} is no YAML {kind}")
        if kind in ("null", "bool"):
            return text.lower() == "true" if kind == "bool" else None
        number = float(text)
        if abs(number) >= (2**63 if kind == "int" else math.inf):
            raise ConfigError(f"{_place(node.start_mark)}: the number {show(text)} is too large")
        return number if kind == "float" else int(text)


class Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would read as something else."""


_CORE = {
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+",
    # no .inf, no .nan
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}
for _tag, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
    _Loader.add_constructor(_tag, _Loader.construct_core)
    Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])  # `<<: *anchor`


def _limit(name, level, count):
    if level > LEVELS or count > VALUES:
        raise ConfigError(
            f"{name} holds more than {VALUES} values, or nests deeper than {LEVELS} levels"
        )


def _place(mark):
    return f"{mark.name}, line {mark.line + 1}"


def read_yaml(text, name):
    """A YAML text -> plain values, with `${NAME}` replaced by environment variables and `~/` by the
    home folder."""
    try:
        loader = _Loader(text)
        loader.name = str(name)
        return _expand(loader.get_single_data(), name, itertools.count(1))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((problem or str(error)).split())[:200]
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        # `{dir: images/{split}}` is the usual reason, and PyYAML speaks of a missing comma.
        if re.search(r"[\w/.-]\{\w*\}|\{\w*\}[\w/.-]", line):
            problem += "; a text with { } in it needs quotes here"
        raise ConfigError(f"{name} is not valid YAML: {where}{problem}") from None


def read_file(path):
    """A YAML file in UTF-8, with or without a byte order mark -> plain values."""
    try:
        return read_yaml(Path(path).read_text("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not in UTF-8 (byte {error.start + 1}): save it with this encoding"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None


def _expand(value, name, count, level=1):
    """Replace what stands for something else; count values, since an alias may stand for many or
    for what holds it."""
    _limit(name, level, next(count))
    if isinstance(value, dict):
        return {key: _expand(item, name, count, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, name, count, level + 1) for item in value]
    if isinstance(value, str):
        for variable in re.findall(r"\$\{(\w+)\}", value):
            if variable not in os.environ:
                raise ConfigError(
                    f"{name}: the environment variable {show(variable)} in {show(value)} is not set"
                )
            value = value.replace(f"${{{variable}}}", os.environ[variable])
        value = os.path.expanduser(value) if value.startswith("~/") else value
    return value
