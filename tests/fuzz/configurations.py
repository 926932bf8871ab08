"""Random mutations of small configurations: read, checked and built up to the first batch.

Each mutation is a function of (seed, number) alone. It ends as accepted, as one UserError (how long its message is
counts too), as a traceback, or after five seconds of processor time. All files lie in a temporary folder.
"""

import collections
import contextlib
import copy
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
import yaml

from datasets.build import Stream, build_data
from engine import accepted, config, distributed, precision, schedule
from engine.build import PACKAGES, build_any
from engine.errors import UserError
from losses.build import build_adaptation, build_losses
from models.build import build_prototypes, build_segmentor, build_tower, joint_channels

ROOT = Path(__file__).parent.parent.parent
BASES = {
    f"train_{script}": ROOT / "tests" / f"tiny{suffix}.yaml"
    for script, suffix in (("supervised", ""), ("uda", "_uda"), ("dg", "_dg"))
}
SECONDS, MEMORY, LONG = 5, 6 * 2**30, 500

# Parts with options, so that constructors of all kinds are reached: (script or "", key, value).
PARTS = [
    ("", "data.augment", "{name: transforms.Augment, crop: [32, 40], scale: [0.5, 2.0], flip: 0.5, blur: 0.5}"),
    ("", "data.augment", "{name: transforms.Augment, crop: [9, 9], short_side: 40, cat_max_ratio: 0.8}"),
    ("", "data.train", "[{name: toy.Toy, length: 4, size: [40, 48]}, {name: toy.Toy, length: 3, domain: real}]"),
    ("", "data.rare_classes", "{temperature: 0.1, min_pixels: 10}"),
    ("", "model.backbone", "{name: resnet.ResNet, depth: 18, stages: 3, deep_stem: true, ibn: a, allow_missing: [x]}"),
    ("", "model.backbone", "{name: mit.MiT, size: b0, drop_path: 0.1}"),
    ("", "model.backbone", "{name: convnext.ConvNeXt, width: 8, depths: [1, 1, 1, 1], drop_path: 0.1}"),
    ("", "model.backbone", "{name: swin.Swin, width: 32, depths: [1, 1, 1, 1], window: 4}"),
    ("", "model.backbone", "{name: vit.ViT, size: t, patch: 16, taps: [1, 2, 3, 4], registers: 2, positions: 64}"),
    ("", "model.backbone", "{name: mobilenet.MobileNet, width: 0.25, output_stride: 16}"),
    ("", "model.decoder", "{name: deeplabv3plus.DeepLabV3Plus, width: 16, low_width: 8, rates: [1, 2], dropout: 0.1}"),
    ("", "model.decoder", "{name: deeplabv2.DeepLabV2, width: 11, rates: [1, 2]}"),
    ("", "model.decoder", "{name: daformer.DAFormer, width: 16, rates: [1, 2]}"),
    ("", "model.decoder", "{name: upernet.UPerNet, width: 16}"),
    ("", "model.decoder", "{name: segformer_mlp.SegFormerMLP, width: 16}"),
    ("", "model.classifier", "{name: linear.Linear, std: 0.1}"),
    ("", "model.classifier", "{name: cbp.CBP, length: 1.5, update: ema, momentum: 0.9, per_class: 1, fallback: etf}"),
    ("", "model.classifier", "{name: protoseg.ProtoSeg, per_class: 2, width: 8, momentum: 0.9, memory: 2, pixels: 5}"),
    ("", "model.classifier", "{name: gmmseg.GMMSeg, components: 2, width: 8, queue: 20, pixels: 5, update_every: 2}"),
    ("", "model.classifier", "{name: queries.Queries, layers: 1, heads: 2}"),
    ("", "model.heads.auxiliary", "{name: auxiliary.Auxiliary, stage: 2, width: 8, convs: 1, dropout: 0.1}"),
    ("", "model.frozen_bn", "[backbone, decoder]"),
    ("", "losses", "[{name: cross_entropy.CrossEntropy, ohem: 0.7, ohem_min: 9}, {name: occl.OCCL, temperature: 1}]"),
    ("", "losses", "[{name: occl.Orthogonality, weight: 0.1}, {name: protoseg.Contrast, temperature: 0.1}]"),
    ("", "prototypes", "{m: {name: mixtures.Mixtures, components: 2, pool: 50, iterations: 2, start: 0.5, chunk: 64}}"),
    ("", "prototypes", "{b: {name: basis.OrthogonalBasis, length: 2}, c: {name: centroids.Centroids, momentum: 0.9}}"),
    ("", "eval", "{mode: slide, crop: [32, 32], stride: [16, 16], scales: [0.5, 1.0], subsets: {a: [Sky]}}"),
    ("", "optimizer", "{name: SGD, lr: 0.1, momentum: 0.9, weight_decay: 1e-4, clip: 1.0}"),
    ("", "schedule", "{warmup: 2, warmup_ratio: 0.1, power: 1.0, min_ratio: 0.1}"),
    ("train_uda", "uda.labelers", "[{name: bcl.StaticLabels, share: 0.1}, {name: bcl.LabelTransfer, confidence: 0.5}]"),
    ("train_uda", "uda.labelers", "[{name: bismap.LikelihoodLabels, threshold: {nats: 10.0}, prototypes: centroids}]"),
    ("train_uda", "uda.labelers", "[{name: self_training.StoredConfidence, threshold: 0.9, scales: [0.5, 1.0]}]"),
    ("train_uda", "uda.source_weights", "{name: bismap.Transferability, clusters: 3, size: [32, 64], grid: [2, 2]}"),
    ("train_uda", "uda.style", "{name: style.FDA, beta: 0.01}"),
    ("train_uda", "uda.style", "{name: style.ColorStats}"),
    ("train_uda", "uda.mixer", "{name: mixers.Strong, operations: 2, p: 0.5, cutout: 0.2}"),
    ("train_uda", "uda.mixer", "{name: masked.Masked, block: 16, mixer: {name: mixers.ClassMix}}"),
    ("train_uda", "uda.mixer", "{name: mixers.ClassMix, color: [0.2, 0.2, 0.2, 0.2], color_p: 0.5, target: true}"),
    ("train_uda", "losses", "[{name: bcl.Contrast, temperature: 1, forward_weight: 2}, {name: tmt.RegionAdversarial}]"),
    ("train_uda", "losses", "[{name: bismap.SymmetricCrossEntropy, ce: 0.1, floor: 0.01}, {name: bismap.Consistency}]"),
    ("train_uda", "stages", "[{name: a, iters: 2, repeat: 2, lr_scale: 0.5}, {init: previous, teacher: frozen}]"),
    ("train_uda", "model.heads.region", "{name: region.Region, stage: -1, variant: none, cell: 2, kappa: 5.0,"
     " rounds: 1}"),
    ("train_dg", "dg.reweight", "{name: ppar.Reweight, alpha: 1.0, low: 0.5, high: 2.0, temperature: 1, warmup: 0.5}"),
    ("train_dg", "dg.strong", "{name: mixers.ColorBlur, color: [0.5, 0.5, 0.5, 0.3], blur_p: 0.5}"),
    ("train_dg", "losses", "[{name: ppar.Alignment, start: 0.1, samples: 100}, {name: ppar.TextFidelity}]"),
    ("train_dg", "model.heads.text_attention", "{name: text_attention.TextAttention, layers: 1}"),
]  # fmt: skip

ODD = [
    None, True, False, -1, 0, 1, 2, 3, 7, -3.5, 0.5, 1.5, 1e-9, 1e30, -0.0, 10**6 + 1, 10**9, 10**12, 2**62, -(2**62),
    float("nan"), float("inf"), "", " ", "x", "none", "auto", "toy.Toy", "a.b", "../../x", "/etc/passwd", "~/x", "a/b",
    "..", "\0", "Straße", "${HOME}", "${NOT_SET}", "true", "1", "[1]", "%s %d {x}", "x" * 10_000, [], [0], [1],
    [0, 0], [2, 1], [0, 5], [1, 2, 3, 4], [[1]], [None], ["x"], {}, {"name": "none"}, {"name": 3}, {"name": "toy.Toy"},
    {"a": {"b": 1}}, {1: 2}, {None: None}, [{}], [{"name": "occl.OCCL"}],
]  # fmt: skip
NAMES = [f"{path.stem}.{name}" for package in PACKAGES for path, name in (
    (path, line[6:].split("(")[0].split(":")[0])
    for path in sorted((ROOT / package.replace(".", "/")).glob("*.py"))
    for line in path.read_text("utf-8").splitlines() if line.startswith("class "))]  # fmt: skip
LAUGHS = "\n".join(
    ["a0: &a0 [x, x]"]
    + [f"a{i}: &a{i} [{', '.join(['*a' + str(i - 1)] * 9)}]" for i in range(1, 12)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1, y: 2}"]
    + [f"a{i}: &a{i} {{<<: [{', '.join(['*a' + str(i - 1)] * 9)}]}}" for i in range(1, 12)]
)
SNIPPETS = [
    "!!python/object/apply:os.system ['touch MARKER']", "!!python/object/apply:pathlib.Path.touch [MARKER]",
    "!!python/name:os.system", "!!python/object/new:os.system [touch MARKER]", "!!float x", "!!bool x", "!!int x",
    "!!null x", "!!set {a}", "!!binary x", "!!timestamp x", "!!omap [a]", "!x y", "&a [*a]", "&a {b: *a}", "*nowhere",
    "9" * 4301, "1e999", "0x1F", "." * 50, "[" * 3000, "{a: " * 300, "? [a]\n: b", "- - - -", ": :", "|", ">", "'", '"',
    "\t", "\x07", "\u2028", "%YAML 1.3", "---", "...", "@x", "`x`", "{a, a}", "<<: {a: 1}", "<<: 3", "base: [3]",
    "base: {a: b}", "base: nowhere.yaml", "base: .", "base: mutated.yaml", f"\n{LAUGHS}\n", f"\n{MERGES}\n",
]  # fmt: skip


class Slow(BaseException):
    """Not an Exception: nothing may catch it on its way."""


@contextlib.contextmanager
def guard():
    """Within it a computation ends after SECONDS of processor time, or ten times as long on a clock."""

    def stop(*_):
        raise Slow

    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before):
            signal.signal(number, handler)


@contextlib.contextmanager
def confined():
    """Within it the working folder is a new one, memory is limited, and nothing is downloaded -> the folder."""
    here, limits = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old, os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", ""), "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
        try:
            yield Path(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            os.chdir(here)
            os.environ["HF_HUB_OFFLINE"] = old


# --- mutating ------------------------------------------------------------------------------------------------------


def places(value, path=()):
    """The paths of all values in nested mappings and lists."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def change(rng, tree):
    """One random change within nested values, in place."""
    path = rng.choice([*places(tree)])
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    key, value = path[-1], holder[path[-1]]
    kind = rng.randrange(12)
    if kind <= 2:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif kind >= 9 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice(
            [value + 1, value - 1, 2 * value, 10 * value, -value, value / 2, 0 * value]
        )
    elif kind == 3:  # another type
        holder[key] = rng.choice(
            [[value], {"x": value}, str(value), [value, value], {str(value): value}]
        )
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):  # rename
        name = str(key)
        at = rng.randrange(len(name) + 1)
        new = rng.choice(
            [name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper(), *ODD[:30]]
        )
        holder[new] = holder.pop(key)
    elif kind == 6 and isinstance(holder, dict):  # nest
        holder[key] = {key: value}
    elif kind == 7:
        names = [p for p in places(tree) if p[-1] == "name"]
        if names:
            *where, last = rng.choice(names)
            for step in where:
                tree = tree[step]
            tree[last] = rng.choice(NAMES)
    else:  # a value from elsewhere
        other = tree
        for step in rng.choice([*places(tree)]):
            other = other[step]
        holder[key] = copy.deepcopy(other)


def damage(rng, text):
    """One random change of a text."""
    lines = text.splitlines() or [""]
    at, row, kind = rng.randrange(len(text) + 1), rng.randrange(len(lines)), rng.randrange(7)
    if kind == 0:
        return text[:at] + text[at + rng.randint(1, 5) :]
    if kind == 1:
        return text[:at] + rng.choice("[]{}:,-#&*!|>'\"%@`\t\n ~0aé") + text[at:]
    if kind == 2:
        return "\n".join([*lines[:row], *lines[row + 1 :]])
    if kind == 3:
        return "\n".join([*lines[: row + 1], lines[row], *lines[row + 1 :]])
    if kind == 4:
        return "\n".join([*lines[:row], " " + lines[row], *lines[row + 1 :]])
    if kind == 5:  # a value, where the line has one
        head, colon, _ = lines[row].partition(": ")
        return "\n".join(
            [*lines[:row], head + (colon or ": ") + rng.choice(SNIPPETS), *lines[row + 1 :]]
        )
    return "\n".join([*lines[:row], rng.choice(SNIPPETS), *lines[row:]])


def mutation(seed, number, marker):
    """(script, content of a file in bytes, overrides), a function of seed and number."""
    rng = random.Random(f"{seed}/{number}")
    script = rng.choice([*BASES])
    tree = config.plain(config.load(BASES[script]))
    tree = {
        key: tree[key] for key in yaml.safe_load(BASES[script].read_text("utf-8")) if key != "base"
    } | {
        key: tree[key]
        for key in ("data", "model", "losses", "train")
        + (("uda", "stages") if "uda" in script else ())
    }
    for owner, key, value in rng.sample(PARTS, 4):
        if owner in ("", script):
            *sections, last = key.split(".")
            holder = tree
            for section in sections:
                holder = holder.setdefault(section, {})
            holder[last] = config.read_yaml(value, key)
    if script == "train_dg":
        tree["dg"] = {key: part for key, part in tree["dg"].items() if part["name"] != "none"}
    kinds = rng.choices(["values", "text", "overrides"], (7, 2, 3), k=rng.choice([1, 1, 1, 2]))
    overrides = []
    for _ in range(rng.choice([1, 1, 1, 2]) if "values" in kinds else 0):
        change(rng, tree)
    if "overrides" in kinds:
        for _ in range(rng.randint(1, 3)):
            key = ".".join(map(str, rng.choice([*places(tree)] or [("seed",)])))
            value = (
                yaml.safe_dump(rng.choice(ODD), default_flow_style=True)
                .removesuffix("\n...\n")
                .strip()
            )
            value = rng.choice([value, value, rng.choice(SNIPPETS)])
            text = f"{key}={value}"
            overrides.append(damage(rng, text) if rng.random() < 0.4 else text)
    text = yaml.safe_dump(
        tree, sort_keys=False, allow_unicode=True, default_flow_style=rng.random() < 0.3
    )
    for _ in range(rng.randint(1, 3) if "text" in kinds else 0):
        text = damage(rng, text)
    encoding = rng.choices(["utf-8", "utf-8-sig", "utf-16", "latin-1"], (20, 1, 1, 1))[0]
    overrides = [override.replace("MARKER", marker) for override in overrides]
    return script, text.replace("MARKER", marker).encode(encoding, "replace"), overrides


# --- trying --------------------------------------------------------------------------------------------------------


def attempt(script, path, overrides):
    """What a script does with a configuration before its first step, without weights and loader processes."""
    cfg = config.load(path, overrides)
    accepted.check_sections(cfg, script)
    accepted.check_resume(config.plain(cfg), cfg)
    device = distributed.init(cfg.device, cfg.timeout)
    precision.autocast(device, cfg.precision)
    for stage in config.stages(cfg)[:2]:
        stage.data |= {"cache": "cache", "workers": 0}
        distributed.seed_everything(stage.seed)
        data = build_data(stage)
        classes, joint = tuple(data.train.CLASSES), joint_channels(stage.model)
        network = build_segmentor(stage.model, classes, pretrained=False)
        context = {"num_classes": len(classes), "classes": classes, "seed": stage.seed}
        context["in_channels"] = network.decoder.channels
        build_prototypes(stage.prototypes, joint if script == "train_dg" else 0, **context)
        build_losses(stage.losses, **context)
        build_adaptation(stage.uda, **context)
        build_tower(stage.dg.tower, joint)
        build_any("losses", stage.dg.reweight, "Labeler", **context)
        build_any("datasets", stage.dg.style, "Style", **context)
        build_any("datasets", stage.dg.strong, "ColorBlur", **context)
        schedule.set_lr(
            schedule.make_optimizer(network, stage.optimizer),
            schedule.factor(0, stage.train.iters, stage.schedule),
        )
        for dataset in filter(None, (data.train, data.target)):
            next(Stream(dataset, stage, stage.seed, 0, device))
        for dataset in filter(None, (data.val, data.monitor, *data.test.values())):
            dataset[0]


def judge(script, path, overrides):
    """-> (outcome, what says so: the message of a UserError, or the place of a traceback)."""
    began = time.process_time()
    try:
        with guard():
            attempt(script, path, overrides)
    except Slow as error:
        return "slow", place(error)
    except UserError as error:
        if time.process_time() - began > SECONDS:
            return "slow", str(error)
        lines, long = "\n" in str(error).strip(), len(str(error)) > LONG
        return "several lines" if lines else "too long" if long else "one line", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "traceback", f"{type(error).__name__} {str(error)[:200]!r} {place(error)}"
    return "accepted", ""


def place(error):
    """The last of our own lines in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
    ours = [f for f in frames if "tests/fuzz" not in f.filename] or frames
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"


OUTCOMES = ("accepted", "one line", "several lines", "too long", "traceback", "slow", "executed")
BAD = ("traceback", "slow", "executed")


def run(seed, count, numbers=None):
    """Try mutations -> ({outcome: how many}, [(number, outcome, what)] of all)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    with confined() as folder:
        marker, path = folder / "executed", folder / "mutated.yaml"
        for number in range(count) if numbers is None else numbers:
            script, content, overrides = mutation(seed, number, str(marker))
            path.write_bytes(content)
            outcome, what = judge(script, path, overrides)
            if marker.exists():
                outcome = "executed"
                marker.unlink()
            found.append((number, outcome, what))
    torch.set_num_threads(threads)
    counts = collections.Counter(outcome for _, outcome, _ in found)
    return {outcome: counts[outcome] for outcome in OUTCOMES}, found
