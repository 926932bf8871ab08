"""Components: from `name: module.Class` in a YAML to an object, checked against the constructor's signature.

    loss = build("losses", {"name": "occl.OCCL", "temperature": 0.07}, num_classes=11)

There is no registry: the name is the place, `losses/occl.py`, and it is imported only when a configuration asks for it.
"""

import importlib
import inspect
import pkgutil
import re
import typing

from engine.config import ConfigError, article, is_a, listing, suggest
from engine.errors import UserError

PACKAGES = (
    "datasets",
    "losses",
    "models.backbones",
    "models.decoders",
    "models.heads",
    "models.classifiers",
    "models.prototypes",
)


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
    if name == "none":
        raise ConfigError(
            f"the configuration names no component of {package}: give it 'name: module.Class' and its options"
        )
    if package not in PACKAGES or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", name):
        raise ConfigError(f"'{name}' must be 'module.Class' of the package {package}")
    module_name, class_name = name.split(".")
    modules = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    if module_name not in modules:
        raise ConfigError(f"{package} has no module '{module_name}'{suggest(module_name, modules)}")
    module = importlib.import_module(f"{package}.{module_name}")
    classes = [
        n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__
    ]
    if class_name not in classes:
        raise ConfigError(
            f"{package}.{module_name} has no class '{class_name}'{suggest(class_name, classes)}"
        )
    constructor = getattr(module, class_name)
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
    parameters = {
        k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    hints = typing.get_type_hints(constructor.__init__)
    given = {key: value for key, value in spec.items() if key != "name"}
    options = [key for key in parameters if key not in context]
    for key, value in given.items():
        if key not in parameters:
            raise ConfigError(f"{name} has no option '{key}'{suggest(key, options)}")
        if not is_a(value, hints.get(key, object)):
            hint = hints[key]
            wanted = article(hint) if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ConfigError(f"{name}: option '{key}' must be {wanted}, not {value!r}")
    keywords = {key: value for key, value in context.items() if key in parameters} | given
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in keywords]
    if missing:
        raise ConfigError(f"{name} needs the option{'s' * (len(missing) > 1)} {listing(missing)}")
    return keywords


def present(specs):
    """{name: component} without those that `name: none` takes out."""
    return {name: spec for name, spec in specs.items() if spec.get("name") != "none"}


def build_any(package, spec, **context):
    """What a component names, None for `name: none`."""
    return None if spec["name"] == "none" else build(package, spec, **context)
