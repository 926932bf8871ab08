"""Components: from `name: module.Class` in a YAML to an object, checked against the constructor's signature.

    loss = build("losses", {"name": "occl.OCCL", "temperature": 0.07}, num_classes=11)
    model = build_segmentor(cfg.model, num_classes=11)

There is no registry: the name is the place, `losses/occl.py`, and it is imported only when a configuration asks for it.
"""

import importlib
import inspect
import pkgutil
import re
import typing

import torch
from torch import nn

from engine import checkpoint, distributed, weights
from engine.config import (
    ConfigError,
    article,
    is_a,
    listing,
    module_names,
    override,
    stages,
    suggest,
)
from engine.errors import UserError

PACKAGES = (
    "datasets",
    "losses",
    "models.backbones",
    "models.decoders",
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


def build_set(specs, **context):
    """One data set, or several as one (datasets/several.py) where a list is given."""
    if not isinstance(specs, list):
        return build("datasets", specs, **context)
    from datasets.several import Several

    sets = [build("datasets", spec, **context) for spec in specs]
    return sets[0] if len(sets) == 1 else Several(sets)


def build_data(cfg):
    """The data sets of a configuration; they must share their classes.

    Returns:
        training set, validation set, {name: test set}, target set without labels, labelled set of the target domain
        that pseudo labels are measured on; None for those that the configuration does not name, but for the first.
    """
    from datasets.base import check_scored

    context = {"root": cfg.data.root, "seed": cfg.seed}
    train = build_set(cfg.data.train, augment=build("datasets", cfg.data.augment), **context)
    check_scored("train", train)
    others = (
        {"val": build("datasets", cfg.data.val, **context)}
        if cfg.data.val["name"] != "none"
        else {}
    )
    others |= {
        f"test.{name}": build("datasets", spec, **context)
        for name, spec in present(cfg.data.test).items()
    }
    if cfg.data.monitor["name"] != "none":
        others["monitor"] = build("datasets", cfg.data.monitor, **context)
    for name, dataset in others.items():
        check_scored(name, dataset)
    target = None
    if isinstance(cfg.data.target, list) or cfg.data.target["name"] != "none":
        spec, augment = cfg.data.target, cfg.data.target_augment
        augment = build("datasets", augment if augment["name"] != "none" else cfg.data.augment)
        # A target set for training gets no label path at all; its samples are drawn independently of the source's.
        specs = [{**one, "labels": False} for one in (spec if isinstance(spec, list) else [spec])]
        target = build_set(specs, augment=augment, **context | {"seed": cfg.seed + 1})
    for name, dataset in (others | ({"target": target} if target else {})).items():
        if tuple(dataset.CLASSES) != tuple(train.CLASSES):
            raise ConfigError(
                f"data.{name} has {len(dataset.CLASSES)} classes ({', '.join(dataset.CLASSES)}) and data.train has "
                f"{len(train.CLASSES)} ({', '.join(train.CLASSES)}): they must be the same"
            )
    val, monitor = others.pop("val", None), others.pop("monitor", None)
    if not others and val is None:
        raise ConfigError("nothing to evaluate on: set data.val or data.test")
    return (
        train,
        val,
        {name.removeprefix("test."): dataset for name, dataset in others.items()},
        target,
        monitor,
    )


def build_segmentor(model, num_classes, pretrained=True, classes=()):
    """The network of a configuration's `model` section; `pretrained=False` where a checkpoint follows, which then needs
    no file of weights or class vectors. `classes`: their names, by which such vectors are read."""
    from models.region import Region
    from models.segmentor import Auxiliary, Projector, Segmentor
    from models.text_attention import TextAttention

    spec = model.backbone if pretrained else {**model.backbone, "weights": "none"}
    backbone = build("models.backbones", spec)
    decoder = build(
        "models.decoders", model.decoder, in_channels=backbone.channels, strides=backbone.strides
    )
    spec = (
        model.classifier
        if pretrained or "init" not in model.classifier
        else {**model.classifier, "init": "random"}
    )
    context = {
        "in_channels": decoder.channels,
        "num_classes": num_classes,
        "classes": tuple(classes),
    }
    classifier = build("models.classifiers", spec, **context)
    channels, width, layers = (
        model.projector.channels,
        model.projector.width,
        model.text_attention.layers,
    )
    projector = Projector(decoder.channels, channels, width or channels) if channels else None
    if layers and not channels:
        raise ConfigError(
            "model.text_attention needs a joint space of text and images: set model.projector.channels"
        )
    attention = TextAttention(channels, layers) if layers else None
    region = None
    if stage := model.region.stage:
        if stage != -1 and (
            not hasattr(backbone, "depths") or not 1 <= stage <= len(backbone.depths)
        ):
            raise ConfigError(
                f"model.region.stage={stage} needs a transformer with such a stage (mit.MiT: 1 to 4, vit.ViT: 1), not "
                f"{model.backbone['name']}; -1 takes the features of any decoder"
            )
        if model.region.variant == "mask" and not asks_for(classifier, "opens"):
            raise ConfigError(
                "model.region.variant=mask opens the masks of model.classifier: {name: queries.Queries}, not of "
                f"{model.classifier['name']}"
            )
        sizes = {"channels": decoder.channels, "depth": model.region.blocks}
        if stage > 0:
            sizes = {"channels": backbone.channels[stage - 1], "depth": backbone.depths[stage - 1]}
        region = Region(num_classes=num_classes, **sizes, **model.region)
    auxiliary = None
    if stage := model.auxiliary.stage:
        if not 1 <= stage <= len(backbone.channels):
            raise ConfigError(
                f"model.auxiliary.stage={stage} must be a map of {model.backbone['name']}, 1 to "
                f"{len(backbone.channels)}, or 0 for no auxiliary head"
            )
        auxiliary = Auxiliary(backbone.channels[stage - 1], num_classes, **model.auxiliary)
    parts = {
        "projector": projector,
        "text_attention": attention,
        "region": region,
        "auxiliary": auxiliary,
    }
    network = Segmentor(backbone, decoder, classifier, model.frozen_bn, model.bn_views, **parts)
    return network.to(memory_format=torch.channels_last) if model.channels_last else network


# Parts for training alone, which a stage may add to the network of the one before or leave out.
TRAINING = ("region.*", "projector.*", "text_attention.*", "auxiliary.*")


def unwanted(network):
    """Patterns of TRAINING that a network does not have."""
    return [pattern for pattern in TRAINING if getattr(network, pattern.split(".")[0]) is None]


def initial_network(cfg, classes, previous):
    """The student at the start of a stage: pretrained as configured, the last stage's, or that of a checkpoint."""
    init = cfg.stage.init
    if init == "previous" and previous is None:
        raise ConfigError(
            f"stage {cfg.stage.name}: init: previous, but there is no stage before it"
        )
    network = build_segmentor(cfg.model, len(classes), init == "imagenet", classes)
    if init != "imagenet":
        state = previous.state_dict() if init == "previous" else checkpoint.load(init)["model"]
        # A stem per domain starts from the shared one.
        stems = {key: key.replace("backbone.source.", "backbone.") for key in network.state_dict()}
        state = state | {
            own: state[shared]
            for own, shared in stems.items()
            if own not in state and shared in state
        }
        weights.load_into(
            network, state, source=init, allow_missing=TRAINING, drop=unwanted(network)
        )
    return network


def restore(path, overrides=()):
    """A checkpoint's network.

    Returns:
        (network in eval mode, the configuration of its stage with the overrides, the checkpoint).
    """
    saved = checkpoint.load(path)
    cfg = override(saved["config"], [])
    # A key that the stage itself sets is overridden too, so the overrides come last.
    cfg = override(stages(cfg)[saved["stage"]] if "stage" in saved else cfg, overrides)
    network = build_segmentor(cfg.model, len(saved["classes"]), pretrained=False)
    state = saved["model"]
    if cfg.eval.weights == "teacher":
        if "teacher" not in saved:
            raise ConfigError(
                f"{path} has no teacher: it was trained without one; set eval.weights=student"
            )
        state = {
            k.removeprefix("network."): v
            for k, v in saved["teacher"].items()
            if k.startswith("network.")
        }
    weights.load_into(network, state, source=str(path))
    return network.eval(), cfg, saved


def batches(dataset, cfg, seed, start, device):
    """The micro-batches of a training set for one process, from step `start` of a stage on."""
    from datasets.sampler import RareClassSampler, StreamSampler, make_loader
    from datasets.statistics import class_counts

    options = {
        "batch_size": cfg.train.batch_size,
        "accumulate": cfg.train.accumulate,
        "start": start,
        "stop": cfg.train.iters,
        "seed": seed,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
    }
    if cfg.data.rare_classes.temperature and dataset.labels:
        counts = class_counts(dataset, cfg.data.cache, workers=cfg.data.workers)
        sampler = RareClassSampler(counts, **cfg.data.rare_classes, **options)
    else:
        sampler = StreamSampler(len(dataset), **options)
    return iter(make_loader(dataset, sampler, cfg.data.workers, pin_memory=device.type == "cuda"))


def build_losses(specs, **context):
    """The `losses` of a configuration -> ({name: term}, {name: weight}), named as by `config.module_names`."""
    terms, weights = {}, {}
    for name, spec in zip(module_names(specs), specs):
        weight = spec.get("weight", 1.0) if isinstance(spec, dict) else 1.0
        options = (
            {key: value for key, value in spec.items() if key != "weight"}
            if isinstance(spec, dict)
            else spec
        )
        term = build("losses", options, **context)
        if not is_a(weight, float):
            raise ConfigError(f"{spec['name']}: weight must be a float, not {weight!r}")
        terms[name], weights[name] = term, weight
    return terms, weights


def build_adaptation(uda, **context):
    """The `uda` section -> (labelers, source weights, style, mixer), None for what is not configured."""
    labelers = nn.ModuleList(build("losses", spec, **context) for spec in uda.labelers)
    weights, style = (
        None if spec["name"] == "none" else build(package, spec, **context)
        for package, spec in (("losses", uda.source_weights), ("datasets", uda.style))
    )
    return labelers, weights, style, build("datasets", uda.mixer, **context)


def build_generalisation(cfg, **context):
    """The `dg` section -> (frozen image tower, reweighting, style, strong colours), None for what is not configured.

    Raises:
        ConfigError: a tower without dense features, or in another space than the projector.
    """
    packages = {
        "tower": "models.backbones",
        "reweight": "losses",
        "style": "datasets",
        "strong": "datasets",
    }
    parts = dict.fromkeys(packages)
    parts |= {key: build(packages[key], spec, **context) for key, spec in present(cfg.dg).items()}
    if tower := parts["tower"]:
        if not hasattr(tower, "dense"):
            raise ConfigError(
                f"dg.tower: {cfg.dg.tower['name']} has no dense features; clip.ViT and clip.ResNet have"
            )
        if cfg.model.projector.channels != tower.joint:
            raise ConfigError(
                f"the joint space of dg.tower has {tower.joint} channels, and model.projector.channels is "
                f"{cfg.model.projector.channels}: set it to {tower.joint}"
            )
        tower.requires_grad_(False).eval()
    return parts["tower"], parts["reweight"], parts["style"], parts["strong"]


def build_members(specs, joint=0, **context):
    """The `prototypes` of a configuration.

    Args:
        joint: channels of the joint space of text and images, `model.projector.channels`.
        context: num_classes, in_channels of the features, ...
    Returns:
        {name: member} as a module, {name: view that updates it}; `name: none` takes a member out.
    """
    specs = present(specs)
    views, members = (
        {name: spec.get("view", "source") for name, spec in specs.items()},
        nn.ModuleDict(),
    )
    for name, spec in specs.items():
        space = spec.get("space", "features")
        if space not in ("features", "joint") or (space == "joint" and not joint):
            raise ConfigError(
                f"prototypes.{name}: space must be features, or joint with model.projector.channels above 0, not "
                f"{space!r}"
            )
        options = {key: value for key, value in spec.items() if key not in ("view", "space")}
        channels = joint if space == "joint" else context["in_channels"]
        members[name] = build("models.prototypes", options, **context | {"in_channels": channels})
    return members, views


def learners(members, classifier, views):
    """What follows the features after a step, (name, view, part): the members, and a classifier with an `update`."""
    parts = [
        (name, views[name], member) for name, member in members.items() if views[name] != "none"
    ]
    return parts + ([("classifier", "source", classifier)] if hasattr(classifier, "update") else [])


def asks_for(function, name):
    """Whether a function, or the forward of a module, has an argument of this name."""
    return name in inspect.signature(getattr(function, "forward", function)).parameters


def call(function, **available):
    """Call with those of the available arguments that the function asks for by name."""
    return function(
        **{name: value for name, value in available.items() if asks_for(function, name)}
    )
