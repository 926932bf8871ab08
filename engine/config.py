"""Configuration: one YAML per experiment.

    cfg = load("configs/toy/supervised.yaml", ["optimizer.lr=1e-4", "losses.occl.weight=0"])

A file may start from others (`base: [a.yaml, b.yaml]`, merged from left to right, then its own
keys). Below them all lies `configs/defaults.yaml`: it lists every key with its meaning and unit,
and a key or a type that is not in it is an error. A mapping with a `name: module.Class` is a
component (engine/build.py); its other keys are keywords of the constructor. Naming another class
replaces the component, so no option of the old class is left behind.
"""

import difflib
import functools
import itertools
import logging
import re
from pathlib import Path

import numpy as np
import yaml

from engine.files import write
from engine.ranges import RANGES, STAGE_RANGES, brief, describe, is_a, mismatch, show
from engine.reading import LEVELS, ConfigError, Dumper, read_file, read_yaml

DEFAULTS = Path(__file__).parent.parent / "configs" / "defaults.yaml"
logger = logging.getLogger("engine")

# Sections of `model` that have become heads: {name: (key that switched it off with 0, class)}.
MOVED = {
    "projector": ("channels", "projector.Projector"),
    "text_attention": ("layers", "text_attention.TextAttention"),
    "auxiliary": ("stage", "auxiliary.Auxiliary"),
    "region": ("stage", "region.Region"),
}
STAGE = {
    "name": "main",
    "iters": 0,
    "init": "imagenet",
    "teacher": "ema",
    "repeat": 1,
    "lr_scale": 1.0,
}
# What a stage cannot have of its own.
OF_THE_RUN = ("folder", "resume", "device", "threads", "deterministic", "timeout", "stages")
TARGET, STAGES = 1, 2  # places of `derived_seed`


class Config(dict):
    """A dict whose keys can also be read as attributes: `cfg.optimizer.lr`."""

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(
                f"the configuration has no key '{key}'{suggest(key, self)}"
            ) from None


@functools.cache
def defaults():
    """The content of DEFAULTS; nobody may change it."""
    return read_file(DEFAULTS)


def load(path, overrides=()):
    """Read an experiment.

    Args:
        path: YAML file.
        overrides: strings `key.sub=value`, the value in YAML. An entry of a list is addressed by
            its position or, for components, by its module: `losses.0.weight=1` or
            `losses.occl.weight=1`.
    Returns:
        Config with every key of `configs/defaults.yaml`; `save` writes it so that it runs alone.
    Raises:
        ConfigError: unknown key, value out of its range, duplicate key, unreadable file; with a
            suggestion where there is one.
    """
    config = override(_read_with_bases(Path(path), ()), overrides)
    if config["folder"] == "auto":
        config["folder"] = str(Path("runs") / _experiment(path) / f"seed{config['seed']}")
    return config


def override(config, overrides):
    """Apply `key.sub=value` strings to a configuration such as a checkpoint's; keys it lacks get
    their defaults."""
    schema = defaults()
    if not isinstance(config, dict):
        raise ConfigError(f"a configuration must hold keys and values, not {show(config)}")
    config = _merge(schema, plain(config))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{show(text)} is not of the form key.sub=value")
        if key.count(".") > LEVELS:
            raise ConfigError(f"the override {show(key)} nests deeper than {LEVELS} levels")
        if re.search(r"^[^'\"\[{].* #", value):
            raise ConfigError(f"the override {brief(key)}: ' #' begins a comment; quote the value")
        value = read_yaml(value, f"the override {brief(key)}")
        config = _override(config, key.split("."), value, schema, RANGES, key)
    _check(config, schema, RANGES, "", "the configuration", known=False)
    _check_slide(config)
    for name in config["data"]["seen"]:
        if name not in config["data"]["test"]:
            raise ConfigError(
                f"data.seen names {show(name)}, which is not in data.test: "
                f"{listing(config['data']['test'])}"
            )
    stages(config)
    return _wrap(config)


def _check_slide(config):
    """No pixel lies between the windows."""
    for stride, crop in zip(config["eval"]["stride"], config["eval"]["crop"]):
        if config["eval"]["mode"] == "slide" and stride > crop:
            raise ConfigError(f"eval.stride {stride} must not be larger than eval.crop {crop}")


def derived_seed(seed, *place):
    """A seed below 2^30 for a part of a run, by numbers that tell its place: unrelated to `seed`,
    and to those of other seeds and places."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1)[0]) >> 2


def stages(config):
    """The stages of a run, one configuration each: `stages` lists STAGE's keys and overrides of any
    others.

    Returns:
        list of Config with the key `stage`; a stage with `repeat: n` occurs n times, each time with
        its learning rate multiplied by `lr_scale` once more. The first has the seed of the run, and
        each later one its own: nothing is drawn twice.
    """
    schema = STAGE | {key: value for key, value in defaults().items() if key not in OF_THE_RUN}
    result = []
    for number, spec in enumerate(plain(config["stages"]) or [{}]):
        _check(spec, schema, STAGE_RANGES | RANGES, f"stages.{number}", "the configuration")
        stage = STAGE | {key: value for key, value in spec.items() if key in STAGE}
        changes = {key: value for key, value in spec.items() if key not in STAGE}
        if len(result) + stage["repeat"] > 1000:
            raise ConfigError("there are more than 1000 stages")
        for turn in range(stage["repeat"]):
            merged = _merge(plain(config), changes)
            _check_slide(merged)
            merged["train"]["iters"] = stage["iters"] or merged["train"]["iters"]
            merged["optimizer"]["lr"] *= stage["lr_scale"] ** turn
            if result:
                merged["seed"] = derived_seed(merged["seed"], STAGES, len(result))
            name = stage["name"] if stage["repeat"] == 1 else f"{stage['name']}{turn + 1}"
            result.append(_wrap(merged | {"stage": stage | {"name": name}}))
    return result


def save(config, path):
    """Write a configuration as YAML; `load(path)` gives it back."""
    write(path, text(config))


def text(config):
    """A configuration as YAML."""
    return yaml.dump(plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def check(config, where):
    """Compare a configuration that was not read from a YAML, such as a checkpoint's, with the
    defaults.

    Raises:
        ConfigError: unknown key or wrong type; `where` it is.
    """
    _check(plain(config), defaults(), RANGES, "", where)


def modern(config):
    """The configuration of an older checkpoint, with the keys of today."""
    config = plain(config)
    stages = config.get("stages")
    for section in [config, *(stages if isinstance(stages, list) else [])]:
        model = section.get("model") if isinstance(section, dict) else None
        for name, (switch, kind) in MOVED.items() if isinstance(model, dict) else ():
            if isinstance(old := model.pop(name, None), dict):
                spec = {"name": kind, **old} if old.get(switch, 1) else {"name": "none"}
                model.setdefault("heads", {})[name] = spec
    return config


def plain(config):
    """Config -> dicts, lists and numbers, for checkpoints."""
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def difference(old, new, prefix=""):
    """The keys at which two configurations differ -> {dotted key: (old value, new value)}; entries
    of a list of components go by their modules, as in an override."""
    changes = {}
    for key in sorted(set(old) | set(new), key=str):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        found = {name: (a, b)} if a != b else {}
        if isinstance(a, dict) and isinstance(b, dict):
            found = difference(a, b, f"{name}.")
        elif found and _are_components(a) and _are_components(b):
            entries = [
                {
                    word or str(n): spec
                    for n, (word, spec) in enumerate(zip(module_names(specs), specs))
                }
                for specs in (a, b)
            ]
            found = difference(*entries, f"{name}.") or found  # another order is a difference too
        changes |= found
    return changes


def _are_components(value):
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _experiment(path):
    """configs/camvid/resnet18.yaml -> camvid/resnet18: the name of the run folder."""
    parts = Path(path).resolve().with_suffix("").parts
    below = (
        parts[len(parts) - parts[::-1].index("configs") :]
        if "configs" in parts[:-1]
        else parts[-1:]
    )
    return "/".join(below)


def _read_with_bases(path, chain):
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path} is its own base, through {' -> '.join(p.name for p in chain)}")
    if not path.is_file():
        asked = f", which {chain[-1]} names as its base" if chain else ""
        raise ConfigError(f"there is no configuration file {path}{asked}")
    own = read_file(path)
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold keys and values, not {show(own)}")
    bases = own.pop("base", None) or []
    if not is_a(bases, str | list[str]):
        raise ConfigError(f"{path}: base must be a file or a list of files, not {show(bases)}")
    merged = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read_with_bases(path.parent / base, (*chain, path)))
    _check(own, defaults(), RANGES, "", path)
    return _merge(merged, own)


SEVERAL = ("data.train", "data.target")  # components that may be a list of components


def _check(value, schema, kinds, key, where, known=True):
    """Compare values with the defaults and RANGES; `known`: another key is an error. `build` checks
    components."""
    if schema is None and kinds is None:
        return  # within a list
    if key.endswith(SEVERAL) and isinstance(value, list) and value:  # also within a stage
        for number, item in enumerate(value):
            _check(item, schema, kinds, f"{key}.{number}", where, known)
    elif isinstance(kinds or schema, dict):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where}: {brief(key)} must be a mapping with keys such as {listing(schema)}, not "
                f"{show(value)}"
            )
        for name, item in value.items():
            dotted = f"{key}.{name}" if key else str(name)
            if name in schema:
                _check(item, schema[name], (kinds or {}).get(name), dotted, where, known)
            elif known and not _is_component(schema):
                raise ConfigError(f"{where}: {_unknown(name, schema, dotted)}")
    elif found := mismatch(value, type(schema) if kinds is None else kinds, key):
        key, value, kind = found
        raise ConfigError(f"{where}: {brief(key)} must be {describe(kind)}, not {show(value)}")


# What other programs call it.
ELSEWHERE = {"epochs": "iters", "max_iters": "iters", "learning_rate": "lr", "wd": "weight_decay"}


def _unknown(name, schema, dotted):
    """The sentence for a key that `schema` lacks: a similar one of the section, or one of its name
    in another."""
    name, prefix, dotted = str(name)[:80], dotted.rpartition(".")[0], brief(dotted)
    if name in MOVED and prefix.endswith("model"):
        new = f"{prefix}.heads.{name}={{name: {MOVED[name][1]}, ...}}"
        return f"'{dotted}' has moved to {new}; without it there is none"
    if not difflib.get_close_matches(name, schema):
        everywhere = [*_leaves(defaults())]
        ends = {key.rpartition(".")[2] for key in everywhere}
        close = [ELSEWHERE.get(name), *difflib.get_close_matches(name, ends, n=1)]
        word = next((word for word in close if word), None)
        meant = [f"'{key}'" for key in everywhere if key.rpartition(".")[2] == word][:3]
        if meant:
            return f"unknown key '{dotted}'; did you mean {' or '.join(meant)}?"
    return f"unknown key '{dotted}'{suggest(name, schema, prefix)}"


def _leaves(section, prefix=""):
    """The dotted keys of a mapping without those of its sections."""
    for key, value in section.items():
        yield from (
            _leaves(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else [f"{prefix}{key}"]
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


def _override(config, keys, value, schema, kinds, dotted):
    """Set one dotted key, through mappings and lists of components."""
    head, *rest = keys
    if isinstance(config, list):
        names = module_names(config)
        number = int(head) if re.fullmatch("[0-9]{1,5}", head) else -1
        index = names.index(head) if head and head in names else number
        if not 0 <= index < len(config):
            raise ConfigError(
                f"'{brief(dotted)}': the list has no entry '{brief(head)}'; it has "
                f"{listing(names) or len(config)}"
            )
        entry = _override(config[index], rest, value, None, None, dotted) if rest else value
        return [*config[:index], entry, *config[index + 1 :]]
    if not isinstance(config, dict):
        raise ConfigError(f"'{brief(dotted)}': {show(config)} has no key '{brief(head)}'")
    if schema and head not in schema and not _is_component(schema):
        where = dotted.split(".")[: len(dotted.split(".")) - len(rest)]
        raise ConfigError(_unknown(head, schema, ".".join(where)))
    schema = schema.get(head) if isinstance(schema, dict) else None
    kinds = kinds.get(head) if isinstance(kinds, dict) else None
    if rest:
        return {**config, head: _override(config.get(head, {}), rest, value, schema, kinds, dotted)}
    _check(value, schema, kinds, dotted, "the command line")
    return _merge(config, {head: value})


def module_names(specs):
    """Names of the components in a list: their modules; a second one is called `module_2`."""
    names = []
    for spec in specs:
        module = str(spec.get("name", "")).split(".")[0] if isinstance(spec, dict) else ""
        others = (f"{module}_{count}" for count in itertools.count(2))
        free = (name for name in itertools.chain([module], others) if name not in names)
        names.append(next(free) if module else "")
    return names


def _is_component(value):
    """Does `name` say module.Class, or none where it is to be chosen? `optimizer: {name: AdamW}` is
    a plain section."""
    name = value.get("name")
    return isinstance(name, str) and ("." in name or name == "none")


def _wrap(value):
    if isinstance(value, dict):
        return Config({key: _wrap(item) for key, item in value.items()})
    return [_wrap(item) for item in value] if isinstance(value, list) else value


def suggest(word, known, prefix=""):
    close = difflib.get_close_matches(str(word)[:80], [str(k) for k in known], n=1)
    if close:
        return f"; did you mean '{prefix + '.' if prefix else ''}{close[0]}'?"
    return f"; known here: {listing(known)}" if known else ""


def listing(names):
    return brief(", ".join(str(name) for name in names), 300)
