"""Configuration: one YAML per experiment.

    cfg = load("configs/camvid/resnet18_cbp_occl.yaml", ["optimizer.lr=1e-4", "losses.occl.weight=0"])

A file may start from others (`base: [a.yaml, b.yaml]`, merged from left to right, then its own keys). Below them all
lies `configs/defaults.yaml`: it lists every key with its meaning and unit, and a key or a type that is not in it is an
error. A mapping with a `name: module.Class` is a component (engine/build.py); its other keys are keywords of the
constructor. Naming another class replaces the component, so no option of the old class is left behind.

YAML is read as version 1.2 reads it: `1e-4` is a number, `on`, `off` and `no` are strings, `010` is ten, and a key that
appears twice is an error. `${NAME}` in a string is the environment variable NAME.
"""

import difflib
import os
import re
import types
import typing
from pathlib import Path

import yaml

from engine.errors import UserError

DEFAULTS = Path(__file__).parent.parent / "configs" / "defaults.yaml"


class ConfigError(UserError):
    """A mistake in a YAML file or an override; the message names the key and what to do."""


class Config(dict):
    """A dict whose keys can also be read as attributes: `cfg.optimizer.lr`."""

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(
                f"the configuration has no key '{key}'{suggest(key, self)}"
            ) from None


# --- reading -------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar = {}  # none of YAML 1.1's; those of the 1.2 core schema follow

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if isinstance(key, (list, dict)):
                continue  # not a key: the parent class says so
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(
                    f"{mark.name}, line {mark.line + 1}: the key '{key}' appears twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would read as something else."""


_NUMBERS = {
    "tag:yaml.org,2002:null": r"~|null|",
    "tag:yaml.org,2002:bool": r"true|false",
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])  # `<<: *anchor`
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(text, name):
    """A YAML text -> plain values, with `${NAME}` replaced by environment variables."""
    try:
        loader = _Loader(text)
        loader.name = str(name)
        return _expand(loader.get_single_data(), name)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None


def _expand(value, name):
    if isinstance(value, dict):
        return {key: _expand(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, name) for item in value]
    if isinstance(value, str):
        for variable in re.findall(r"\$\{(\w+)\}", value):
            if variable not in os.environ:
                raise ConfigError(
                    f"{name}: the environment variable {variable} in '{value}' is not set"
                )
            value = value.replace(f"${{{variable}}}", os.environ[variable])
    return value


# --- merging and checking ------------------------------------------------------------------------------------------


def load(path, overrides=()):
    """Read an experiment.

    Args:
        path: YAML file.
        overrides: strings `key.sub=value`, the value in YAML. An entry of a list is addressed by its position or, for
            components, by its module: `losses.0.weight=1` or `losses.occl.weight=1`.
    Returns:
        Config with every key of `configs/defaults.yaml`; `save` writes it so that it runs alone.
    Raises:
        ConfigError: unknown key, wrong type, duplicate key, unreadable file; with a suggestion where there is one.
    """
    schema = read_yaml(DEFAULTS.read_text("utf-8"), DEFAULTS)
    config = override(_read_with_bases(Path(path), schema, ()), overrides)
    if config["folder"] == "auto":
        config["folder"] = str(Path("runs") / _experiment(path) / f"seed{config['seed']}")
    return config


def override(config, overrides):
    """Apply `key.sub=value` strings to a configuration such as a checkpoint's; keys it lacks get their defaults."""
    schema = read_yaml(DEFAULTS.read_text("utf-8"), DEFAULTS)
    config = _merge(schema, plain(config))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not of the form key.sub=value")
        config = _override(
            config, key.split("."), read_yaml(value, f"the override {key}"), schema, key
        )
    return _wrap(config)


def check(config, where):
    """Compare a configuration that was not read from a YAML, such as a checkpoint's, with the defaults.

    Raises:
        ConfigError: unknown key or wrong type; `where` it is.
    """
    _check(plain(config), read_yaml(DEFAULTS.read_text("utf-8"), DEFAULTS), "", where)


STAGE = {
    "name": "main",
    "iters": 0,
    "init": "imagenet",
    "teacher": "ema",
    "repeat": 1,
    "lr_scale": 1.0,
}


def stages(config):
    """The stages of a run, one configuration each: `stages` lists STAGE's keys and overrides of any others.

    Returns:
        list of Config with the key `stage`; a stage with `repeat: n` occurs n times, each time with its learning rate
        multiplied by `lr_scale` once more.
    """
    schema = read_yaml(DEFAULTS.read_text("utf-8"), DEFAULTS)
    result = []
    for number, spec in enumerate(plain(config["stages"]) or [{}]):
        where = f"stages.{number}"
        if not isinstance(spec, dict):
            raise ConfigError(
                f"{where} must be a mapping with keys such as {listing(STAGE)}, not {spec!r}"
            )
        _check(
            {key: value for key, value in spec.items() if key in STAGE},
            STAGE,
            where,
            "the configuration",
        )
        changes = {key: value for key, value in spec.items() if key not in STAGE}
        _check(changes, schema, where, "the configuration")
        stage = STAGE | {key: value for key, value in spec.items() if key in STAGE}
        for turn in range(stage["repeat"]):
            merged = _merge(plain(config), changes)
            merged["train"]["iters"] = stage["iters"] or merged["train"]["iters"]
            merged["optimizer"]["lr"] *= stage["lr_scale"] ** turn
            name = stage["name"] if stage["repeat"] == 1 else f"{stage['name']}{turn + 1}"
            result.append(_wrap(merged | {"stage": stage | {"name": name}}))
    return result


def save(config, path):
    """Write a configuration as YAML; `load(path)` gives it back."""
    Path(path).write_text(
        yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True), "utf-8"
    )


def plain(config):
    """Config -> dicts, lists and numbers, for checkpoints."""
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def difference(old, new, prefix=""):
    """The keys at which two configurations differ -> {dotted key: (old value, new value)}."""
    changes = {}
    for key in sorted(set(old) | set(new), key=str):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            changes.update(difference(a, b, f"{name}."))
        elif a != b:
            changes[name] = (a, b)
    return changes


# Keys that may change between a checkpoint and the run that goes on from it: they do not change what is computed.
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
    "model.backbone.checkpointing",
    "dg.tower.weights",
)


def check_resume(old, new):
    """Compare a checkpoint's configuration with the one of the run that is to go on from it.

    Raises:
        ConfigError: they differ in more than FREE, and the checkpoint was not named explicitly.
    """
    changes = difference(old, new)
    changes = {
        k: v
        for k, v in changes.items()
        if not any(k == free or k.startswith(f"{free}.") for free in FREE)
    }
    if changes and new["resume"] == "auto":
        changed = ", ".join(f"{key} {a!r} -> {b!r}" for key, (a, b) in changes.items())
        raise ConfigError(
            f"{new['folder']} holds a run with another configuration: {changed}. Choose another folder=..., or go on "
            "from it all the same with resume=PATH of the checkpoint"
        )


def _experiment(path):
    """configs/camvid/resnet18.yaml -> camvid/resnet18: the name of the run folder."""
    parts = Path(path).resolve().with_suffix("").parts
    below = (
        parts[len(parts) - parts[::-1].index("configs") :]
        if "configs" in parts[:-1]
        else parts[-1:]
    )
    return "/".join(below)


def _read_with_bases(path, schema, chain):
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path} is its own base, through {' -> '.join(p.name for p in chain)}")
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}")
    own = read_yaml(path.read_text("utf-8"), path)
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(own).__name__}")
    bases = own.pop("base", None) or []
    merged = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read_with_bases(path.parent / base, schema, (*chain, path)))
    _check(own, schema, "", path)
    return _merge(merged, own)


SEVERAL = ("data.train", "data.target")  # components that may be a list of components


def _check(value, schema, key, where):
    """Compare a layer with the defaults: known keys, the same types. Components are checked by `build`."""
    if schema is None or (isinstance(schema, dict) and not schema):
        return  # null in the defaults: any value; {}: names chosen by the user
    if key.endswith(SEVERAL) and isinstance(value, list) and value:  # also within a stage
        for number, item in enumerate(value):
            _check(item, schema, f"{key}.{number}", where)
        return
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where}: {key} must be a mapping with keys such as {listing(schema)}, not {value!r}"
            )
        for name, item in value.items():
            dotted = f"{key}.{name}" if key else str(name)
            if name in schema:
                _check(item, schema[name], dotted, where)
            elif not _is_component(schema):
                raise ConfigError(f"{where}: unknown key '{dotted}'{suggest(name, schema, key)}")
    elif not is_a(value, type(schema)):
        raise ConfigError(
            f"{where}: {key} must be {article(type(schema))} such as {schema!r}, not {value!r}"
        )


def _merge(old, new):
    """Deep merge, the new value wins; a component with another name replaces the old one."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "name" in new and new["name"] != old.get("name") and _is_component(old):
        return new
    merged = dict(old)
    for key, value in new.items():
        merged[key] = _merge(old[key], value) if key in old else value
    return merged


def _override(config, keys, value, schema, dotted):
    """Set one dotted key, through mappings and lists of components."""
    head, *rest = keys
    if isinstance(config, list):
        names = module_names(config)
        index = names.index(head) if head in names else int(head) if head.isdigit() else -1
        if not 0 <= index < len(config):
            raise ConfigError(
                f"'{dotted}': the list has no entry '{head}'; it has {listing(names) or len(config)}"
            )
        entry = _override(config[index], rest, value, None, dotted) if rest else value
        return [*config[:index], entry, *config[index + 1 :]]
    if not isinstance(config, dict):
        raise ConfigError(f"'{dotted}': {config!r} has no key '{head}'")
    if schema is not None and schema and head not in schema and not _is_component(schema):
        raise ConfigError(
            f"unknown key '{dotted}'{suggest(head, schema, '.'.join(dotted.split('.')[: -len(keys)]))}"
        )
    below = schema.get(head) if isinstance(schema, dict) else None
    if rest:
        return {**config, head: _override(config.get(head, {}), rest, value, below, dotted)}
    _check(value, below, dotted, "the command line")
    return _merge(config, {head: value})


def module_names(specs):
    """Names of the components in a list: their modules; a second one of a module is called `module_2`."""
    names = []
    for spec in specs:
        name = module = str(spec.get("name", "")).split(".")[0] if isinstance(spec, dict) else ""
        count = 1
        while name in names:
            count += 1
            name = f"{module}_{count}"
        names.append(name)
    return names


def _is_component(value):
    """Does `name` say module.Class, or none where it is to be chosen? `optimizer: {name: AdamW}` is a plain section."""
    name = value.get("name")
    return isinstance(name, str) and ("." in name or name == "none")


def _wrap(value):
    if isinstance(value, dict):
        return Config({key: _wrap(item) for key, item in value.items()})
    return [_wrap(item) for item in value] if isinstance(value, list) else value


def suggest(word, known, prefix=""):
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{prefix + '.' if prefix else ''}{close[0]}'?"
    return f"; known here: {listing(known)}" if known else ""


def listing(names):
    return ", ".join(str(name) for name in names)


def article(kind):
    return {
        int: "an int",
        float: "a float",
        str: "a string",
        bool: "true or false",
        list: "a list",
    }.get(kind, str(kind))


def is_a(value, kind):
    """Is a YAML value of this annotated type? An int counts as a float, a bool counts as neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin in (list, tuple) or kind in (list, tuple):
        return isinstance(value, (list, tuple))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(
            value, bool
        )
    if kind is None or kind is types.NoneType:
        return value is None
    return isinstance(value, kind) if kind in (str, bool, dict) else True
