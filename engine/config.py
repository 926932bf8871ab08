"""Configuration: one YAML per experiment, and the components that it names.

    cfg = load("configs/camvid/resnet18_cbp_occl.yaml", ["optimizer.lr=1e-4", "losses.occl.weight=0"])
    model = build_segmentor(cfg.model, num_classes=11)
    loss = build("losses", {"name": "occl.OCCL", "temperature": 0.07}, num_classes=11)

A file may start from others (`base: [a.yaml, b.yaml]`, merged from left to right, then its own keys). Below them all lies
`configs/defaults.yaml`: it lists every key with its meaning and unit, and a key or a type that is not in it is an error.
A mapping with a `name: module.Class` is a component; its other keys are keywords of the constructor. Naming another class
replaces the component, so no option of the old class is left behind.

YAML is read as version 1.2 reads it: `1e-4` is a number, `on`, `off` and `no` are strings, `010` is ten, and a key that
appears twice is an error. `${NAME}` in a string is the environment variable NAME.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import types
import typing
from pathlib import Path

import yaml

from engine.errors import UserError

DEFAULTS = Path(__file__).parent.parent / "configs" / "defaults.yaml"
PACKAGES = (
    "datasets",
    "losses",
    "models.backbones",
    "models.decoders",
    "models.classifiers",
    "models.prototypes",
)


class ConfigError(UserError):
    """A mistake in a YAML file or an override; the message names the key and what to do."""


class Config(dict):
    """A dict whose keys can also be read as attributes: `cfg.optimizer.lr`."""

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"the configuration has no key '{key}'{_suggest(key, self)}") from None


# --- reading -------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar = {}  # none of YAML 1.1's; those of the 1.2 core schema follow

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if isinstance(key, (list, dict)):
                continue  # not a key: the parent class says so
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}, line {mark.line + 1}: the key '{key}' appears twice")
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
                raise ConfigError(f"{name}: the environment variable {variable} in '{value}' is not set")
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
    schema = read_yaml(DEFAULTS.read_text(), DEFAULTS)
    config = override(_merge(schema, _read_with_bases(Path(path), schema, ())), overrides)
    if config["folder"] == "auto":
        config["folder"] = str(Path("runs") / _experiment(path) / f"seed{config['seed']}")
    return config


def override(config, overrides):
    """Apply `key.sub=value` strings to a complete configuration, such as a checkpoint's."""
    schema = read_yaml(DEFAULTS.read_text(), DEFAULTS)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not of the form key.sub=value")
        config = _override(config, key.split("."), read_yaml(value, f"the override {key}"), schema, key)
    return _wrap(config)


def save(config, path):
    """Write a configuration as YAML; `load(path)` gives it back."""
    Path(path).write_text(yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def plain(config):
    """Config -> dicts, lists and numbers, for checkpoints."""
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def difference(old, new, prefix=""):
    """The keys at which two configurations differ -> {dotted key: (old value, new value)}."""
    changes = {}
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            changes.update(difference(a, b, f"{name}."))
        elif a != b:
            changes[name] = (a, b)
    return changes


# Keys that may change between a checkpoint and the run that goes on from it: they do not change what is computed.
FREE = ("folder", "resume", "device", "threads", "timeout", "data.root", "data.workers", "data.test", "model.backbone.weights",
        "eval", "log", "checkpoint")  # fmt: skip


def check_resume(old, new):
    """Compare a checkpoint's configuration with the one of the run that is to go on from it.

    Raises:
        ConfigError: they differ in more than FREE, and the checkpoint was not named explicitly.
    """
    changes = difference(old, new)
    changes = {k: v for k, v in changes.items() if not any(k == free or k.startswith(f"{free}.") for free in FREE)}
    if changes and new["resume"] == "auto":
        listing = ", ".join(f"{key} {a!r} -> {b!r}" for key, (a, b) in changes.items())
        raise ConfigError(
            f"{new['folder']} holds a run with another configuration: {listing}. Choose another folder=..., or go on from "
            "it all the same with resume=PATH of the checkpoint"
        )


def _experiment(path):
    """configs/camvid/resnet18.yaml -> camvid/resnet18: the name of the run folder."""
    parts = Path(path).resolve().with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts[:-1] else parts[-1:]
    return "/".join(below)


def _read_with_bases(path, schema, chain):
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path} is its own base, through {' -> '.join(p.name for p in chain)}")
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}")
    own = read_yaml(path.read_text(), path)
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(own).__name__}")
    bases = own.pop("base", None) or []
    merged = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read_with_bases(path.parent / base, schema, (*chain, path)))
    _check(own, schema, "", path)
    return _merge(merged, own)


def _check(value, schema, key, where):
    """Compare a layer with the defaults: known keys, the same types. Components are checked by `build`."""
    if schema is None or (isinstance(schema, dict) and not schema):
        return  # null in the defaults: any value; {}: names chosen by the user
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} must be a mapping with keys such as {_some(schema)}, not {value!r}")
        for name, item in value.items():
            dotted = f"{key}.{name}" if key else str(name)
            if name in schema:
                _check(item, schema[name], dotted, where)
            elif not _is_component(schema):
                raise ConfigError(f"{where}: unknown key '{dotted}'{_suggest(name, schema, key)}")
    elif not _is_a(value, type(schema)):
        raise ConfigError(f"{where}: {key} must be {_article(type(schema))} such as {schema!r}, not {value!r}")


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
        names = [item.get("name", "").split(".")[0] if isinstance(item, dict) else "" for item in config]
        choices = names.index(head) if head in names else int(head) if head.isdigit() else -1
        if not 0 <= choices < len(config):
            raise ConfigError(f"'{dotted}': the list has no entry '{head}'; it has {_some(names) or len(config)}")
        entry = _override(config[choices], rest, value, None, dotted) if rest else value
        return [*config[:choices], entry, *config[choices + 1 :]]
    if not isinstance(config, dict):
        raise ConfigError(f"'{dotted}': {config!r} has no key '{head}'")
    if schema is not None and schema and head not in schema and not _is_component(schema):
        raise ConfigError(f"unknown key '{dotted}'{_suggest(head, schema, '.'.join(dotted.split('.')[: -len(keys)]))}")
    below = schema.get(head) if isinstance(schema, dict) else None
    if rest:
        return {**config, head: _override(config.get(head, {}), rest, value, below, dotted)}
    _check(value, below, dotted, "the command line")
    return _merge(config, {head: value})


def _is_component(value):
    """Does `name` say module.Class, or none where one is to be chosen? `optimizer: {name: AdamW}` is a plain section."""
    name = value.get("name")
    return isinstance(name, str) and ("." in name or name == "none")


def _wrap(value):
    if isinstance(value, dict):
        return Config({key: _wrap(item) for key, item in value.items()})
    return [_wrap(item) for item in value] if isinstance(value, list) else value


def _suggest(word, known, prefix=""):
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{prefix + '.' if prefix else ''}{close[0]}'?"
    return f"; known here: {_some(known)}" if known else ""


def _some(names):
    return ", ".join(str(name) for name in names)


def _article(kind):
    return {int: "an int", float: "a float", str: "a string", bool: "true or false", list: "a list"}.get(kind, str(kind))


def _is_a(value, kind):
    """Is a YAML value of this annotated type? An int counts as a float, a bool counts as neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple) or kind in (list, tuple):
        return isinstance(value, (list, tuple))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if kind is None or kind is types.NoneType:
        return value is None
    return isinstance(value, kind) if kind in (str, bool, dict) else True


# --- building ------------------------------------------------------------------------------------------------------


def build(package, spec, **context):
    """Make the object that a component names.

    Args:
        package: one of PACKAGES; it comes from our code, never from the YAML, so a YAML cannot import anything else.
        spec: {"name": "module.Class", keyword: value, ...}
        context: what only the running program knows (num_classes, in_channels, root ...). The constructor gets what it
            asks for by name; a key in the spec wins.
    Raises:
        ConfigError: no such module or class, an unknown, missing or wrongly typed keyword.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{package}: a component needs 'name: module.Class', got {spec!r}")
    name = spec["name"]
    if package not in PACKAGES or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", name):
        raise ConfigError(f"'{name}' must be 'module.Class' of the package {package}")
    module_name, class_name = name.split(".")
    modules = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    if module_name not in modules:
        raise ConfigError(f"{package} has no module '{module_name}'{_suggest(module_name, modules)}")
    module = importlib.import_module(f"{package}.{module_name}")
    constructor = getattr(module, class_name, None)
    if not inspect.isclass(constructor):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise ConfigError(f"{package}.{module_name} has no class '{class_name}'{_suggest(class_name, classes)}")
    keywords = _keywords(constructor, name, spec, context)
    try:
        return constructor(**keywords)
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _keywords(constructor, name, spec, context):
    """Check a spec against a constructor's signature and add the context that it asks for."""
    parameters = inspect.signature(constructor).parameters
    # A class without a constructor has the (*args, **kwargs) of nn.Module; neither is an option.
    parameters = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints = typing.get_type_hints(constructor.__init__)
    given = {key: value for key, value in spec.items() if key != "name"}
    options = [key for key in parameters if key not in context]
    for key, value in given.items():
        if key not in parameters:
            raise ConfigError(f"{name} has no option '{key}'{_suggest(key, options)}")
        if not _is_a(value, hints.get(key, object)):
            hint = hints[key]
            wanted = _article(hint) if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ConfigError(f"{name}: option '{key}' must be {wanted}, not {value!r}")
    keywords = {key: value for key, value in context.items() if key in parameters} | given
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in keywords]
    if missing:
        raise ConfigError(f"{name} needs the option{'s' * (len(missing) > 1)} {_some(missing)}")
    return keywords


def build_segmentor(model, num_classes, pretrained=True):
    """The network of a configuration's `model` section; `pretrained=False` where a checkpoint follows."""
    from models.segmentor import Segmentor

    spec = model.backbone if pretrained else {**model.backbone, "weights": "none"}
    backbone = build("models.backbones", spec)
    decoder = build("models.decoders", model.decoder, in_channels=backbone.channels, strides=backbone.strides)
    classifier = build("models.classifiers", model.classifier, in_channels=decoder.channels, num_classes=num_classes)
    return Segmentor(backbone, decoder, classifier, frozen_bn=model.frozen_bn)


def build_losses(specs, **context):
    """The `losses` of a configuration -> ({name: term}, {name: weight}); a term is named after its module.

    A second term of the same module gets a number, as in `cross_entropy_2`.
    """
    terms, weights = {}, {}
    for spec in specs:
        weight = spec.get("weight", 1.0) if isinstance(spec, dict) else 1.0
        options = {key: value for key, value in spec.items() if key != "weight"} if isinstance(spec, dict) else spec
        term = build("losses", options, **context)
        if not _is_a(weight, float):
            raise ConfigError(f"{spec['name']}: weight must be a float, not {weight!r}")
        name = module = spec["name"].split(".")[0]
        count = 2
        while name in terms:
            name, count = f"{module}_{count}", count + 1
        terms[name], weights[name] = term, weight
    return terms, weights


def call(function, **available):
    """Call with those of the available arguments that the function asks for by name."""
    parameters = inspect.signature(getattr(function, "forward", function)).parameters
    return function(**{name: available[name] for name in parameters if name in available})
