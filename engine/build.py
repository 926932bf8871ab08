"""Components: from `name: module.Class` in a YAML to an object, checked against the constructor's
signature.

    loss = build("losses", {"name": "occl.OCCL", "temperature": 0.07}, num_classes=11)

There is no registry: the name is the place, `losses/occl.py`, and it is imported only when a
configuration asks for it.
"""

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable

from engine.config import RANGES, ConfigError, listing, suggest
from engine.errors import UserError
from engine.ranges import Few, Text, Width, describe, mismatch, show

PACKAGES = (
    "datasets",
    "losses",
    "models.backbones",
    "models.decoders",
    "models.heads",
    "models.classifiers",
    "models.prototypes",
)


# What the context of `build` may be where a spec names it; constructors do not annotate it.
CONTEXT = {
    "root": Text | None,
    "seed": RANGES["seed"],
    "augment": Callable,
    "num_classes": Few,
    "in_channels": Width,
    "classes": list[str],
    "strides": list[Few],
    "counts": Callable,
}


def build(package, spec, face="", **context):
    """Make the object that a component names.

    Args:
        package: one of PACKAGES; it comes from our code, never from the YAML, so a YAML cannot
            import anything else.
        spec: {"name": "module.Class", keyword: value, ...}
        face: name of the base class that the class must have, such as "Loss": a package holds parts
            of several kinds.
        context: what only the running program knows (num_classes, in_channels, root ...). The
            constructor gets what it asks for by name; a key in the spec wins.
    Raises:
        ConfigError: no such module or class, an unknown or missing keyword, or one out of its
            range.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{package}: a component needs 'name: module.Class', got {show(spec)}")
    name = spec["name"]
    if name == "none":
        raise ConfigError(
            f"the configuration names no component of {package}: give it 'name: module.Class' and "
            f"its options"
        )
    if package not in PACKAGES or not re.fullmatch(r"[A-Za-z_]\w{0,50}\.[A-Za-z_]\w{0,50}", name):
        raise ConfigError(f"{show(name)} must be 'module.Class' of the package {package}")
    module_name, class_name = name.split(".")
    modules = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    if module_name not in modules:
        raise ConfigError(f"{package} has no module '{module_name}'{suggest(module_name, modules)}")
    module = importlib.import_module(f"{package}.{module_name}")
    classes = [
        n
        for n, kind in vars(module).items()
        if inspect.isclass(kind)
        and kind.__module__ == module.__name__
        and not issubclass(kind, Exception)
    ]
    if class_name not in classes:
        raise ConfigError(
            f"{package}.{module_name} has no class '{class_name}'{suggest(class_name, classes)}"
        )
    constructor = getattr(module, class_name)
    if face and face not in [base.__name__ for base in constructor.__mro__]:
        raise ConfigError(f"{name} is no {face}: it belongs to another key")
    keywords = _keywords(constructor, name, spec, context)
    try:
        return constructor(**keywords)
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def signature(constructor):
    """What a class takes: {name: inspect.Parameter}, {name: kind}. A constructor with `**options`
    hands them to that of its base class, whose parameters count as its own."""
    parameters, kinds = {}, {}
    for owner in constructor.__mro__:
        if "__init__" in vars(owner):
            _, *own = inspect.signature(owner.__init__).parameters.values()
            named = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            parameters = named | parameters
            kinds = typing.get_type_hints(owner.__init__, include_extras=True) | kinds
            if not any(p.kind is p.VAR_KEYWORD for p in own):
                break
    return parameters, kinds


def _keywords(constructor, name, spec, context):
    """Check a spec against a constructor's signature and add the context that it asks for."""
    parameters, kinds = signature(constructor)
    kinds = CONTEXT | kinds
    options = [key for key in parameters if key not in context]
    given = {key: value for key, value in spec.items() if key != "name"}
    for key, value in given.items():
        if key not in parameters:
            raise ConfigError(f"{name} has no option {show(key)}{suggest(key, options)}")
        if found := mismatch(value, kinds.get(key, object), key):
            key, value, kind = found
            raise ConfigError(f"{name}: option '{key}' must be {describe(kind)}, not {show(value)}")
    keywords = {key: value for key, value in context.items() if key in parameters} | given
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in keywords]
    if missing:
        raise ConfigError(f"{name} needs the option{'s' * (len(missing) > 1)} {listing(missing)}")
    return keywords


def present(specs):
    """{name: component} without those that `name: none` takes out."""
    return {name: spec for name, spec in specs.items() if spec.get("name") != "none"}


def build_any(package, spec, face="", **context):
    """What a component names, None for `name: none`."""
    return None if spec["name"] == "none" else build(package, spec, face, **context)
