"""The losses and labelers of a configuration."""

from torch import nn

from engine.build import build, build_any
from engine.config import ConfigError, module_names
from engine.ranges import is_a, show


def build_losses(specs, heads=None, **context):
    """The `losses` of a configuration -> ({name: Loss}, {name: factor}), named as by
    `config.module_names`.

    Args:
        heads: {name: Head} of the network.
    Raises:
        ConfigError: a weight that is no number; a loss with parameters or buffers; a head that no
            loss trains, which would do something all the same.
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
    trained = {what for name, term in terms.items() if factors[name] for what in term.trains}
    for name, head in (heads or {}).items():
        for what, loss in head.needs:
            if what not in trained:
                raise ConfigError(
                    f"model.heads.{name}: no loss trains its part '{what}': add {loss} to losses"
                )
    return terms, factors


def needs_teacher(cfg, labeling, losses, first):
    """Does a part of a stage of adaptation need the teacher?

    Args:
        cfg: configuration of the stage, `first` of the run or not.
        labeling: the labelers, with the source weights.
        losses: {name: Loss}.
    Raises:
        ConfigError: one needs a teacher where there is none, or labels of a network that has learnt
            nothing.
    """
    where, teacher = f"stage {cfg.stage.name}", cfg.stage.teacher
    needed = any(part.needs_teacher for part in [*labeling, *losses.values()])
    if needed and (teacher == "none" or (teacher == "ema" and not cfg.train.teacher)):
        raise ConfigError(
            f"{where}: a labeler or a loss needs a teacher: ema or frozen; of ema, "
            "train.teacher=0 would copy the student, so set 0.99 to 0.999"
        )
    unfit = [type(part).__name__ for part in labeling if part.learned]
    unfit += ["the frozen teacher"] * (needed and teacher == "frozen")
    if first and cfg.stage.init == "imagenet" and unfit:
        raise ConfigError(
            f"{where}: {unfit[0]} takes predictions of the network that the stage "
            "starts from, which has learnt nothing: put a stage on the source before it, as "
            "configs/base/source_then_adapt.yaml does, or set its init to the path of a checkpoint"
        )
    return needed


def build_adaptation(uda, **context):
    """The `uda` section -> (labelers, source weights, style, mixer), None for what is not
    configured."""
    labelers = nn.ModuleList(build("losses", s, "Labeler", **context) for s in uda.labelers)
    weights = build_any("losses", uda.source_weights, "Labeler", **context)
    style = build_any("datasets", uda.style, "Style", **context)
    return labelers, weights, style, build("datasets", uda.mixer, "Mixer", **context)
