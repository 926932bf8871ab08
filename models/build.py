"""The network of a configuration: assembled, started from other weights, restored from a
checkpoint; its prototypes."""

import logging
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import checkpoint, distributed, weights
from engine.build import build, build_any, present
from engine.config import ConfigError, listing, override, stages
from engine.step import Output
from models import foreign, lora
from models.cache import FeatureCache
from models.compiled import rates_as_tensors
from models.segmentor import Segmentor

logger = logging.getLogger("engine")

# The order in which heads run, and in which their parameters lie.
HEADS = ("projector", "text_attention", "region", "auxiliary")


class Start(NamedTuple):
    """A file that a network starts from."""

    path: str
    state: dict[str, Tensor]  # of a checkpoint of this project, or what stands beside the backbone
    classes: list[str] | None  # their names; None: the file does not say
    backbone: dict[str, Tensor] | None  # of a foreign file, with its names


def read_start(path):
    """A checkpoint of this project, or a file of a whole network or backbone from elsewhere -> its
    Start.

    Raises:
        WeightsError: no such file, or one that is damaged, unsafe or holds no weights.
    """
    content = weights.read(path)
    if isinstance(content, dict) and "format" in content:
        saved = checkpoint.check(content, path)
        return Start(path, weights_of(saved, reported(saved), path), saved["classes"], None)
    backbone, beside = weights.divided(weights.unwrap(content, path))
    return Start(path, foreign.heads(beside), foreign.class_names(content), backbone)


def build_segmentor(model, classes, pretrained=True, start=None):
    """The network of a configuration's `model` section.

    Args:
        model: the section.
        classes: names of the K classes.
        pretrained: False where a checkpoint follows, which then needs no file of weights or class
            vectors.
        start: the Start of a stage; None: that of `model.init`.
    """
    if pretrained and model.init != "none":
        start = start or read_start(model.init)
    alone = pretrained and not start  # without the weights of a file of the whole
    spec = model.backbone if alone else {**model.backbone, "weights": "none"}
    backbone = build("models.backbones", spec, "Backbone")
    if model.lora:
        if "backbone" in model.frozen:
            raise ConfigError(
                "model.lora trains adapters in a backbone that is otherwise frozen: take the "
                "backbone out of model.frozen"
            )
        lora.adapt(backbone, model.lora)
    sizes = {"in_channels": backbone.channels, "strides": backbone.strides}
    decoder = build("models.decoders", model.decoder, **sizes)
    context = {
        "in_channels": decoder.channels,
        "num_classes": len(classes),
        "classes": tuple(classes),
    }
    spec = dict(model.classifier)
    if not pretrained and "init" in spec:  # its file is not needed, nor what says how to read it
        spec = {k: v for k, v in spec.items() if k not in ("rows", "map")} | {"init": "random"}
    classifier = build("models.classifiers", spec, "Classifier", **context)
    context |= {"joint": joint_channels(model), "classifier": classifier}
    context |= {
        "map_channels": backbone.channels,
        "depths": backbone.depths,
        "reductions": backbone.reductions,
    }
    specs = present(model.heads)
    names = [name for name in dict.fromkeys((*HEADS, *specs)) if name in specs]
    heads = {name: build("models.heads", specs[name], "Head", **context) for name in names}
    parts = ("backbone", "decoder", *names)
    for key in ("frozen", "frozen_bn"):
        if unknown := {*model[key]} - {*parts}:
            raise ConfigError(
                f"model.{key} may name {', '.join(parts)}, not {', '.join(sorted(unknown))}"
            )
    if len(guides := [name for name in names if heads[name].bias(Output(), 0)]) > 1:
        raise ConfigError(
            f"model.heads: {', '.join(guides)} all look into the blocks of the backbone; keep one"
        )
    if taken := {*names} & {*dir(Segmentor(backbone, decoder, classifier))}:
        raise ConfigError(
            f"model.heads: a head cannot be named {', '.join(sorted(taken))}, that name is taken"
        )
    cache = None
    if model.cache != "none":
        if "backbone" not in model.frozen:
            raise ConfigError(
                "model.cache stores maps of a frozen backbone: model.frozen=[backbone]"
            )
        cache = FeatureCache(backbone, model.backbone, model.cache)
    network = Segmentor(
        backbone,
        decoder,
        classifier,
        heads,
        [*model.frozen_bn, *(["backbone"] if model.lora else [])],
        model.bn_views,
        model.frozen,
        cache,
        model.compile,
    )
    if model.compile:
        rates_as_tensors(network)
    if start:
        begin(network, start, classes)
    return network.to(memory_format=torch.channels_last) if model.channels_last else network


def begin(network, start, classes):
    """Copy what fits of a Start into a network, and report every key.

    The backbone must fit as a whole, but for adapters and a stem of the source, which one of the
    two may lack. The classifier, and what else has a row per class, is left out
    unless the names of the classes agree.

    Raises:
        WeightsError: a backbone that does not fit.
    """
    given, own = start.state, network.state_dict()
    if start.backbone is not None:
        inner = network.backbone.own_names(start.backbone)
        given = given | {f"backbone.{key}": value for key, value in inner.items()}
    given = lora.merged(shared_stems(own, given), own)
    body = {
        key.removeprefix("backbone."): value
        for key, value in given.items()
        if key.startswith("backbone.") and (key in own or not key.startswith("backbone.source."))
    }
    *_, may_lack = network.backbone.foreign
    if how := weights.compare(network.backbone, body, [*may_lack, "*.lora_?"])[1]:
        raise weights.WeightsError(
            f"{start.path} does not fit the backbone {type(network.backbone).__name__}: {how}. "
            "Wrong backbone or options?"
        )
    agree = start.classes == list(classes)
    bound = [k for k, v in given.items() if not agree and of_classes(k, v, start.classes or ())]
    fitting, _ = weights.compare(network, {k: v for k, v in given.items() if k not in bound})
    network.load_state_dict(fitting, strict=False)
    lines = [
        f"{start.path}:",
        f"loaded   {grouped(fitting)}",
        f"missing  {grouped(own.keys() - fitting)}, which keep their initial values",
        f"left out {grouped(given.keys() - fitting)} of the file",
    ]
    if bound and start.classes is None:
        lines.append("The file does not name its classes: its classifier is left out.")
    elif bound:
        lines.append(
            f"Its classes are {listing(start.classes)}, and here {listing(classes)}: the "
            "classifier is left out."
        )
    logger.info("\n  ".join(lines))


def of_classes(key, value, names):
    """Does a tensor beside the backbone have a row per class of its file?"""
    if key.startswith("backbone."):
        return False
    by_name = key.startswith(("classifier.", "auxiliary.classifier."))
    return by_name or len(names) in value.shape[:1]


def grouped(keys):
    """How many keys there are, in all and of each part."""
    keys = sorted(key for key in keys if not key.endswith("num_batches_tracked"))
    parts = Counter(
        "backbone" if key.startswith("backbone.") else ".".join(key.split(".")[:2]) for key in keys
    )
    names = weights.plain(", ".join(f"{part} ({n})" for part, n in parts.items()), 600)
    return f"{len(keys)} keys{': ' * bool(keys)}{names}"


def shared_stems(own, state):
    """A state dict for a network with the keys `own`: a stem per domain that it lacks is the shared
    one."""
    stems = {key: key.replace("backbone.source.", "backbone.") for key in own}
    return {own: state[shared] for own, shared in stems.items() if shared in state} | state


def joint_channels(model):
    """Channels of the joint space of text and images, 0 without heads.projector."""
    return present(model.heads).get("projector", {}).get("channels", 0)


def head_keys(network, state):
    """What a stage may add to the network of the one before or leave out, which is every head.

    Returns:
        patterns of the heads of the network; patterns of those that the state dict alone has.
    """
    gone = {key.partition(".")[0] for key in state} - {name for name, _ in network.named_children()}
    return [f"{name}.*" for name in network.heads], [f"{name}.*" for name in sorted(gone)]


def initial_network(cfg, classes, previous):
    """The student at the start of a stage: as configured, the last stage's, or that of a file."""
    init = cfg.stage.init
    if init == "previous" and previous is None:
        raise ConfigError(
            f"stage {cfg.stage.name}: init: previous, but there is no stage before it"
        )
    if init == "imagenet":
        return build_segmentor(cfg.model, classes)
    if init != "previous":
        start = read_start(init)
        comparable = start.backbone is None and start.classes == list(classes)
        if cfg.uda.compare and len(stages(cfg)) == 1 and not comparable:
            raise ConfigError(
                f"uda.compare reports the network of {init} too, which is no checkpoint of these "
                "classes: set uda.compare=false"
            )
        return build_segmentor(cfg.model, classes, start=start)
    network = build_segmentor(cfg.model, classes, pretrained=False)
    state = previous.state_dict()
    new, unwanted = head_keys(network, state)
    own = network.state_dict()
    state = lora.merged(shared_stems(own, state), own)
    new.append("backbone.*.lora_?")
    weights.load_into(network, state, source=init, allow_missing=new, drop=unwanted)
    return network


def stage_networks(cfg, classes, device, previous, before=None, resumed=False):
    """The student of a stage, and the network that labels or teaches: that of the stage before, in
    the first the student.

    Args:
        previous: network of the stage before; None in the first stage, and where a run goes on.
        before: configuration of the stage before.
        resumed: the states of both follow from a checkpoint. A frozen teacher may have another
            shape than the student.
    """
    network = (
        build_segmentor(cfg.model, classes, pretrained=False)
        if resumed
        else initial_network(cfg, classes, previous)
    )
    network = distributed.place(network, device, cfg.model.sync_bn)
    if resumed and before and cfg.stage.teacher == "frozen":
        previous = build_segmentor(before.model, classes, pretrained=False)
        previous = distributed.place(previous, device, before.model.sync_bn)
    return network, network if previous is None else previous


def before_adaptation(cfg, folder, device):
    """The network that adaptation started from, to be compared: that of the first of several
    stages, or of `init: PATH`; None where there is none, or without `uda.compare`."""
    first, *later = stages(cfg)
    start = folder / f"stage_{first.stage.name}.pt" if later else first.stage.init
    compared = cfg.uda.compare and start not in ("imagenet", "previous")
    return restore(start)[0].to(device) if compared else None


def trained_with(saved):
    """The configuration of a checkpoint's stage, with every key."""
    cfg = override(saved["config"], [])
    return stages(cfg)[saved["stage"]] if "stage" in saved else cfg


def frozen(saved):
    """Did the teacher of a checkpoint stand still: is it the network of the stage before?"""
    return trained_with(saved).get("stage", {}).get("teacher") == "frozen"


def reported(saved):
    """Which network of a checkpoint its run reports and hands on, "student" or "teacher"."""
    averaged = "teacher" in saved and not frozen(saved)
    return trained_with(saved).eval.weights if averaged else "student"


def weights_of(saved, kind, path):
    """State dict of a checkpoint's student or teacher.

    Raises:
        ConfigError: it has no teacher.
    """
    if kind == "student":
        return saved["model"]
    if "teacher" not in saved:
        raise ConfigError(
            f"{path} has no teacher: it was trained without one; set eval.weights=student"
        )
    named = saved["teacher"].items()
    return {k.removeprefix("network."): v for k, v in named if k.startswith("network.")}


def restore(path, overrides=()):
    """A checkpoint's network, the one that its run reported unless `eval.weights` is overridden.

    Returns:
        (network in eval mode, the configuration of its stage with the overrides, the checkpoint).
    """
    saved = checkpoint.load(path)
    # Last: a key that the stage sets is overridden too.
    cfg = override(trained_with(saved), [f"eval.weights={reported(saved)}", *overrides])
    network = build_segmentor(cfg.model, saved["classes"], pretrained=False)
    if cfg.eval.weights == "teacher" and frozen(saved):
        logger.warning(
            f"{path}: its teacher was frozen, so this is the network of the stage before; "
            "eval.weights=student is what the stage trained"
        )
    weights.load_into(network, weights_of(saved, cfg.eval.weights, path), source=str(path))
    return network.eval(), cfg, saved


def build_prototypes(specs, joint=0, **context):
    """The `prototypes` of a configuration.

    Args:
        joint: channels of the joint space of text and images (`joint_channels`).
        context: num_classes, in_channels of the features, ...
    Returns:
        {name: Prototypes} as a module; {name: view whose features update it}, of those that follow
        any, and of "classifier"; {name: space of these features}.
    """
    specs, members, features = present(specs), nn.ModuleDict(), context["in_channels"]
    views = {name: spec.get("view", "source") for name, spec in specs.items()}
    spaces = {name: spec.get("space", "features") for name, spec in specs.items()}
    for name, spec in specs.items():
        if name in ("classifier", *dir(members)):
            raise ConfigError(f"prototypes: the name {name} is taken; choose another one")
        if spaces[name] not in ("features", "joint") or (spaces[name] == "joint" and not joint):
            raise ConfigError(
                f"prototypes.{name}: space must be features, or joint with model.heads.projector, "
                f"not {spaces[name]!r}"
            )
        options = {key: value for key, value in spec.items() if key not in ("view", "space")}
        context["in_channels"] = joint if spaces[name] == "joint" else features
        members[name] = build("models.prototypes", options, "Prototypes", **context)
        if spaces[name] == "joint":
            members[name].space = "joint"
        if members[name].offline and views[name] != "tower":
            raise ConfigError(
                f"prototypes.{name}: {spec['name']} is fitted to {members[name].offline} images of "
                f"the frozen tower (offline): set view: tower and dg.tower, not view: {views[name]}"
            )
    views = {name: view for name, view in views.items() if view != "none"}
    return members, views | {"classifier": "source"}, spaces | {"classifier": "features"}


def build_tower(spec, joint, device=None):
    """`dg.tower`, the frozen tower of images, None where there is none.

    Raises:
        ConfigError: a backbone without dense features, or in another space than the projector.
    """
    tower = build_any("models.backbones", spec, "Backbone")
    if tower is None:
        return None
    if not tower.joint:
        raise ConfigError(
            f"dg.tower: {spec['name']} has no dense features; clip.ViT, clip.ResNet and vit.ViT "
            "have"
        )
    if joint != tower.joint:
        raise ConfigError(
            f"the joint space of dg.tower has {tower.joint} channels, and that of "
            f"model.heads.projector {joint}: set "
            f"its channels to {tower.joint}"
        )
    return tower.requires_grad_(False).eval().to(device=device)
