"""Evaluate a checkpoint on one or several labelled data sets.

    python eval.py runs/camvid/resnet18_cbp_occl/seed0/best.pt
    python eval.py CHECKPOINT data.root=PATH eval.scales=[0.75,1.0,1.25] eval.flip=true
    python eval.py CHECKPOINT data.test.dusk='{name: camvid.CamVid, split: test_dusk}'
    torchrun --nproc_per_node=8 eval.py CHECKPOINT

The data sets are `data.test` of the checkpoint's configuration (or data.val, where it has none).
Tables go to the console, JSON, CSV and pictures to `eval_<checkpoint>/` beside the checkpoint.
`eval.weights=teacher` evaluates the averaged network. What differs from the checkpoint's own
configuration stands in the JSON, as `overrides`, and in the name of the folder:
`eval_best_flip_scales0.75-1-1.25/`, or `eval_best_data-1f3870be/` with a hash of what is long.

    python eval.py CHECKPOINT CHECKPOINT ...

Several sets or checkpoints end with a table, rows checkpoints, columns sets, and the mean over
sets. Of checkpoints of train_dg.py the mean is over those that are not in `data.seen`. It is
written to domains.txt in the folder of the results, of several checkpoints to domains_<hash of
their paths>.txt in that of the first.

    python eval.py CHECKPOINT export=pseudo_labels

writes instead the labels that the checkpoint's labeler gives to the same data sets, as palette PNGs
with settings.json beside them: the labeler, the checkpoint and its hash, the classes, and, where a
set has labels, the share and accuracy of each class. Labels of an earlier export are replaced. Any
checkpoint takes a labeler without fitted state, such as `uda.labelers='[{name:
self_training.StoredConfidence, threshold: 0.9}]'`.

    python eval.py CHECKPOINT diagnostics=true pairs='[[Car, Truck]]'

writes besides how far the class vectors are from orthogonal and equal, F1 by how frequent classes
are in training, and the summed IoU of similar classes (engine/diagnostics.py). It counts the labels
of data.train once.

    python eval.py CHECKPOINT domains=true

writes how far each test set is from the training domain, in the features and in the joint space
(engine/domains.py). The training domain is that of `data.seen`, or data.val.
"""

import hashlib
import json
import logging
import re
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from datasets.base import check_scored
from datasets.build import build_set
from datasets.statistics import class_counts
from engine import checkpoint, config, distributed, precision
from engine.build import present
from engine.config import ConfigError
from engine.diagnostics import checked_pairs, diagnose
from engine.domains import measure
from engine.errors import UserError
from engine.files import write
from engine.log import facts, to_console
from engine.metrics import ConfusionMatrix
from engine.prepare import images, write_maps
from engine.process import run
from engine.report import domain_table, pseudo_label_quality, report
from losses.build import build_adaptation
from models.build import build_prototypes, joint_channels, restore, trained_with

logger = logging.getLogger("engine")
# Arguments that are no keys of the configuration.
OWN = ("export=", "diagnostics=", "pairs=", "domains=")
# Keys that change nothing of a result.
NEUTRAL = (
    "folder",
    "resume",
    "device",
    "threads",
    "timeout",
    "log",
    "checkpoint",
    "data.workers",
    "data.cache",
    "eval.every",
    "eval.patience",
    "eval.pictures",
)


def digest(value):
    """Eight hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def protocol_name(changes):
    """{dotted key: value} of a protocol -> its part of a folder's name: "" for none,
    "_flip_scales0.75-1", and a hash of what is too long to be read, "_data-1f3870be"."""
    words, others = [], {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        values = value if isinstance(value, list) else [value]
        if section not in ("", "eval") or not all(isinstance(v, (int, float, str)) for v in values):
            others[key] = value
        elif isinstance(value, bool):
            words.append(name if value else f"no-{name}")
        else:
            told = "-".join(v if isinstance(v, str) else f"{v:.15g}" for v in values)
            words.append(told if isinstance(value, str) else f"{name}{told}")
    if others:
        sections = dict.fromkeys(key.split(".")[0] for key in others)
        words.append("-".join([*sections, digest(others)]))
    readable = "".join("_" + re.sub(r"[^\w.]+", "-", word) for word in words)
    return readable if len(readable) <= 80 else f"_{digest(changes)}"


def load_network(path, overrides=(), start=distributed.setup):
    """Checkpoint file and overrides -> (network in eval mode on its device, configuration, device,
    checkpoint).

    Args:
        start: configuration -> device; here it also sets up the process, as every script needs it.
    Raises:
        UserError: a file, a key or weights that cannot be used, such as weights of NaN.
    """
    network, cfg, saved = restore(path, overrides)
    if name := checkpoint.first_nonfinite(network.state_dict()):
        raise UserError(
            f"{path}: the weights {name} are not finite, the training had diverged; take an "
            f"earlier checkpoint"
        )
    device = start(cfg)
    return network.to(device), cfg, device, saved


def export_pseudo_labels(network, cfg, device, saved, datasets, path, folder):
    """Write `<folder>/<set>/<path of the image>.png` by the rule of the first labeler that has
    one."""
    context = {
        "num_classes": len(saved["classes"]),
        "in_channels": network.decoder.channels,
        "seed": cfg.seed,
    }
    labelers, *_ = build_adaptation(cfg.uda, **context)
    members, *_ = build_prototypes(
        cfg.prototypes, joint_channels(cfg.model), classes=tuple(saved["classes"]), **context
    )
    checkpoint.restore(members, "prototypes", saved, path)
    if labelers.state_dict().keys() != saved.get("labelers", {}).keys():
        raise ConfigError(f"uda.labelers is not that of {path}, whose fitted state it needs")
    labelers.load_state_dict(saved.get("labelers", {}))
    rules = [pair for pair in zip(labelers, cfg.uda.labelers) if pair[0].labels_images]
    if not rules:
        raise ConfigError(
            "no labeler: set uda.labelers='[{name: self_training.StoredConfidence, threshold: "
            "0.9}]'"
        )
    labeler, spec = rules[0]
    labeler, vectors = labeler.to(device), {"classifier": network.classifier, **members.to(device)}
    if labeler.stored and [*labeler.buffers()]:
        logger.warning(
            "the labeler was fitted to the network that labelled before the stage, not to this one"
        )
    autocast = precision.autocast(device, cfg.precision)
    about = {
        "checkpoint": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "step": saved["step"],
        "labeler": config.plain(spec),
        "weights": cfg.eval.weights,
    }

    def make(index, image, label):
        with autocast:
            return labeler.label(network, image, vectors)[0]

    for name, dataset in datasets.items():
        quality = {}
        if dataset.labels:
            quality = pseudo_label_quality(
                network, labeler, vectors, dataset, device, autocast, cfg.eval.short_side
            )
            logger.info(
                f"\n{name}: per cent\n"
                + "\n".join(f"{key:<32}{value:8.2f}" for key, value in quality.items())
            )
        stream = images(dataset, device, cfg.data.workers, short_side=cfg.eval.short_side)
        written = write_maps(folder, name, dataset, stream, make, about | quality, palette=True)
        logger.info(f"{name}: labels of {len(dataset)} images in {written}")


@record
def main(arguments):
    paths = [Path(a) for a in arguments if "=" not in a or Path(a).is_file()]
    rest = [a for a in arguments if Path(a) not in paths]
    overrides = [a for a in rest if not a.startswith(OWN)]
    own = {key: value for key, _, value in (a.partition("=") for a in rest if a.startswith(OWN))}
    only_values = {"export": "pseudo_labels", "diagnostics": "true", "domains": "true"}
    for key, only in only_values.items():
        if own.get(key, only) != only:
            raise ConfigError(f"{key} must be {only}, not {own[key]}")
    if "pairs" in own and "diagnostics" not in own:
        raise ConfigError("pairs belongs to diagnostics=true")
    if "export" in own and len(own) > 1:
        raise ConfigError("export=pseudo_labels evaluates nothing: leave out the other modes")
    if any(text.startswith("folder=") for text in overrides):
        raise ConfigError("eval.py writes beside the checkpoint: leave out folder=")
    if not paths:
        raise ConfigError("name a checkpoint: python eval.py CHECKPOINT")
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
    to_console()
    rows, folders, seen = {}, [], []
    for path in paths:
        matrices, folder, own_seen = evaluate_checkpoint(path, overrides, **own)
        rows[str(path)] = {
            name: matrix.as_dict()["summary"]["mIoU"] for name, matrix in matrices.items()
        }
        folders.append(folder)
        seen = None if seen is None or own_seen is None else [*seen, *own_seen]
    if any(rows.values()) and (len(rows) > 1 or max(map(len, rows.values())) > 1):
        table = domain_table(rows, seen)
        name = "domains.txt" if len(rows) == 1 else f"domains_{digest(list(rows))}.txt"
        logger.info(f"\n{table}\nwritten to {folders[0] / name}")
        if distributed.is_main():
            write(folders[0] / name, table + "\n")


def evaluate_checkpoint(path, overrides, export="", diagnostics="", pairs=None, domains=""):
    """One checkpoint on the test sets of its configuration.

    Returns:
        {set: ConfusionMatrix}, empty for an export; the folder of the results; names of the sets of
        the training domain if the checkpoint is one of train_dg.py, None if not.
    """
    network, cfg, device, saved = load_network(path, overrides)
    to_console()  # again: only now each process knows its rank
    specs = present(cfg.data.test) or {"val": cfg.data.val}
    tested = [*specs]
    source = next((name for name in cfg.data.seen if name in specs), "val")
    if domains:
        if present(cfg.data.test) and source in {*specs} - {*cfg.data.seen}:
            raise ConfigError("data.test.val has the name of data.val: call it otherwise")
        specs = {source: specs.get(source, cfg.data.val), **specs}
    if taken := {*specs} & {"diagnostics", "domains"}:
        raise ConfigError(f"data.test.{min(taken)} has the name of a file of results: rename it")
    if domains and (distributed.world_size() > 1 or specs[source]["name"] == "none"):
        raise ConfigError(
            "domains=true needs one process, and a set of the training domain: data.val, or one of "
            "data.test that data.seen names"
        )
    where = "data.test." if present(cfg.data.test) else "data."
    datasets = {
        name: build_set(f"{where}{name}", spec, root=cfg.data.root) for name, spec in specs.items()
    }
    for name, dataset in datasets.items():
        if list(dataset.CLASSES) != saved["classes"]:
            raise ConfigError(
                f"{where}{name} has {len(dataset.CLASSES)} classes ({', '.join(dataset.CLASSES)}) "
                f"and {path} was "
                f"trained with {len(saved['classes'])} ({', '.join(saved['classes'])})"
            )
        if not export:
            check_scored(f"{where}{name}".removeprefix("data."), dataset)
            ConfusionMatrix(dataset.CLASSES, cfg.eval.subsets)  # before labels are counted
    changes = {
        key: value
        for key, (_, value) in config.difference(trained_with(saved), cfg).items()
        if not f"{key}.".startswith(tuple(f"{neutral}." for neutral in NEUTRAL))
    }
    folder = path.parent / f"eval_{path.stem}{protocol_name(changes)}"
    generalises = "stage" not in saved and (cfg.data.seen or present(cfg.dg))
    seen = list(cfg.data.seen) if generalises else None
    if export:
        export_pseudo_labels(network, cfg, device, saved, datasets, path, folder / "pseudo_labels")
        return {}, folder, seen
    about = facts(device) | {"checkpoint": str(path), "step": saved["step"]}
    about["seed"] = saved["config"]["seed"]
    about["overrides"] = config.plain(changes)
    autocast = precision.autocast(device, cfg.precision)
    if diagnostics:
        pairs = checked_pairs(pairs and config.read_yaml(pairs, "pairs"), saved["classes"])
        train_set = build_set("data.train", cfg.data.train, root=cfg.data.root, seed=cfg.seed)
        counts = class_counts(train_set, cfg.data.cache, cfg.data.workers).sum(0)
    matrices = report(
        network, datasets, cfg.eval, device, autocast, folder, about, workers=cfg.data.workers
    )
    if diagnostics:
        diagnose(network.classifier, matrices, counts, folder, saved["step"], pairs)
    if domains:
        place = (folder, device, autocast, cfg.data.workers, cfg.eval.short_side)
        measure(network, datasets, source, matrices, *place)
    return {name: matrices[name] for name in tested}, folder, seen


if __name__ == "__main__":
    run(main, __doc__)
