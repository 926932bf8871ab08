"""The losses and labelers of a configuration."""

from torch import nn

from engine.build import build, build_any
from engine.config import ConfigError, module_names
from engine.ranges import is_a, show


def build_losses(specs, **context):
    """The `losses` of a configuration -> ({name: Loss}, {name: factor}), named as by
    `config.module_names`.

    Raises:
        ConfigError: a weight that is no number; a loss with parameters or buffers.
    """
    terms, factors = {}, {}
    for name, spec in zip(module_names(specs), specs):
        factor = spec.get("weight", 1.0)
        options = {key: value for key, value in spec.items() if key != "weight"}
        term = build("losses", options, "Loss", **context)
        if not is_a(factor, float):
            raise ConfigError(f"{spec['name']}: weight must be a float, not {show(factor)}")
        if [*term.parameters(), *term.buffers()]:
            raise ConfigError(
                f"{spec['name']} has parameters or buffers, which no checkpoint would hold: what "
                f"is learned belongs to a "
                "head (models/heads), a running state to a member of models/prototypes"
            )
        terms[name], factors[name] = term, factor
    return terms, factors


def build_adaptation(uda, **context):
    """The `uda` section -> (labelers, source weights, style, mixer), None for what is not
    configured."""
    labelers = nn.ModuleList(build("losses", s, "Labeler", **context) for s in uda.labelers)
    weights = build_any("losses", uda.source_weights, "Labeler", **context)
    style = build_any("datasets", uda.style, "Style", **context)
    return labelers, weights, style, build("datasets", uda.mixer, "Mixer", **context)
