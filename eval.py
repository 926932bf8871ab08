"""Evaluate a checkpoint on one or several labelled data sets.

    python eval.py runs/camvid/resnet18_cbp_occl/seed0/best.pt
    python eval.py CHECKPOINT data.root=PATH eval.scales=[0.75,1.0,1.25] eval.flip=true
    python eval.py CHECKPOINT data.test.dusk='{name: camvid.CamVid, split: test_dusk}'
    torchrun --nproc_per_node=8 eval.py CHECKPOINT

The data sets are `data.test` of the checkpoint's configuration (or data.val, where it has none). Tables go to the
console, JSON, CSV and pictures to `eval_<checkpoint>/` beside the checkpoint. `eval.weights=teacher` evaluates the
averaged network.

    python eval.py CHECKPOINT CHECKPOINT ...

Several test sets end with a table over domains, rows checkpoints, columns sets, and the mean of those that are not in
`data.seen`; it is written to domains.txt beside the first checkpoint.

    python eval.py CHECKPOINT export=pseudo_labels

writes instead the labels that the checkpoint's labeler gives to the same data sets, as palette PNGs with settings.json
beside them: the labeler, the checkpoint and its hash, the classes, and, where a set has labels, the share and accuracy
of each class. Any checkpoint takes a labeler without fitted state, such as
`uda.labelers='[{name: self_training.StoredConfidence, threshold: 0.9}]'`.

    python eval.py CHECKPOINT diagnostics=true pairs='[[Car, Truck]]'

writes besides how far the class vectors are from orthogonal and equal, F1 by how frequent classes are in training, and
the summed IoU of similar classes (engine/diagnostics.py). It counts the labels of data.train once.
"""

import hashlib
import logging
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from datasets.base import check_scored
from datasets.statistics import class_counts
from engine import config, distributed, precision
from engine.build import build, build_adaptation, build_members, build_set, present, restore
from engine.config import ConfigError
from engine.diagnostics import checked_pairs, diagnose
from engine.errors import run
from engine.log import facts, to_console
from engine.prepare import images, write_maps
from engine.report import domain_table, label_scalars, pseudo_label_quality, report

logger = logging.getLogger("engine")
OWN = ("export=", "diagnostics=", "pairs=")  # arguments that are no keys of the configuration


def load_network(path, overrides=()):
    """Checkpoint file and overrides -> (network in eval mode on its device, configuration, device, checkpoint)."""
    network, cfg, saved = restore(path, overrides)
    device = distributed.setup(cfg)
    return network.to(device), cfg, device, saved


def export_pseudo_labels(network, cfg, device, saved, datasets, path, folder):
    """Write `<folder>/<set>/<path of the image>.png` by the rule of the first labeler that has one."""
    context = {
        "num_classes": len(saved["classes"]),
        "in_channels": network.decoder.channels,
        "seed": cfg.seed,
    }
    labelers, *_ = build_adaptation(cfg.uda, **context)
    members, _ = build_members(
        cfg.prototypes, cfg.model.projector.channels, classes=tuple(saved["classes"]), **context
    )
    members.load_state_dict(saved["prototypes"])
    if labelers.state_dict().keys() != saved.get("labelers", {}).keys():
        raise ConfigError(f"uda.labelers is not that of {path}, whose fitted state it needs")
    labelers.load_state_dict(saved.get("labelers", {}))
    rules = [
        (labeler, spec)
        for labeler, spec in zip(labelers, cfg.uda.labelers)
        if hasattr(labeler, "label")
    ]
    if not rules:
        raise ConfigError(
            "no labeler: set uda.labelers='[{name: self_training.StoredConfidence, threshold: 0.9}]'"
        )
    labeler, spec = rules[0]
    labeler, vectors = labeler.to(device), {"classifier": network.classifier, **members.to(device)}
    if hasattr(labeler, "prepare") and [*labeler.buffers()]:
        logger.warning(
            "the labeler was fitted to the network that labelled before the stage, not to this one"
        )
    autocast = precision.autocast(device, cfg.precision)
    about = {
        "checkpoint": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "step": saved["step"],
    }
    about |= {"labeler": config.plain(spec), "weights": cfg.eval.weights}

    def make(index, image, label):
        with autocast:
            return labeler.label(network, image, vectors)[0]

    for name, dataset in datasets.items():
        quality = {}
        if dataset.labels:
            quality = label_scalars(
                *pseudo_label_quality(network, labeler, vectors, dataset, device, autocast)
            )
            logger.info(
                f"\n{name}: per cent\n"
                + "\n".join(f"{key:<32}{value:8.2f}" for key, value in quality.items())
            )
        stream = images(dataset, device, cfg.data.workers)
        write_maps(folder / name, dataset, stream, make, about | quality, palette=True)
        logger.info(f"{name}: labels of {len(dataset)} images in {folder / name}")


@record
def main(arguments):
    paths = [Path(a) for a in arguments if "=" not in a or Path(a).is_file()]
    rest = [a for a in arguments if Path(a) not in paths]
    overrides = [a for a in rest if not a.startswith(OWN)]
    own = {key: value for key, _, value in (a.partition("=") for a in rest if a.startswith(OWN))}
    for key, only in (("export", "pseudo_labels"), ("diagnostics", "true")):
        if own.get(key, only) != only:
            raise ConfigError(f"{key} must be {only}, not {own[key]}")
    if "pairs" in own:
        if "diagnostics" not in own:
            raise ConfigError("pairs belongs to diagnostics=true")
        own["pairs"] = config.read_yaml(own["pairs"], "pairs")
    if not paths:
        raise ConfigError("name a checkpoint: python eval.py CHECKPOINT")
    to_console()
    rows, seen = {}, []
    for path in paths:
        matrices, cfg = evaluate_checkpoint(path, overrides, **own)
        rows[str(path)] = {
            name: matrix.as_dict()["summary"]["mIoU"] for name, matrix in matrices.items()
        }
        seen = list(dict.fromkeys([*seen, *cfg.data.seen]))
    if len(rows) > 1 or max(map(len, rows.values())) > 1:
        table = domain_table(rows, seen)
        logger.info("\n" + table)
        if distributed.is_main():
            (paths[0].parent / f"eval_{paths[0].stem}" / "domains.txt").write_text(table + "\n")


def evaluate_checkpoint(path, overrides, export="", diagnostics="", pairs=None):
    """One checkpoint on the test sets of its configuration -> ({set: ConfusionMatrix}, configuration)."""
    network, cfg, device, saved = load_network(path, overrides)
    to_console()  # again: only now each process knows its rank
    specs = present(cfg.data.test) or {"val": cfg.data.val}
    datasets = {name: build("datasets", spec, root=cfg.data.root) for name, spec in specs.items()}
    for name, dataset in datasets.items():
        if list(dataset.CLASSES) != saved["classes"]:
            raise ConfigError(
                f"data.test.{name} has {len(dataset.CLASSES)} classes ({', '.join(dataset.CLASSES)}) and {path} was "
                f"trained with {len(saved['classes'])} ({', '.join(saved['classes'])})"
            )
    folder = path.parent / f"eval_{path.stem}"
    if export:
        export_pseudo_labels(network, cfg, device, saved, datasets, path, folder / "pseudo_labels")
        return {}, cfg
    for name, dataset in datasets.items():
        check_scored(f"test.{name}" if present(cfg.data.test) else name, dataset)
    about = facts(device) | {"checkpoint": str(path), "step": saved["step"], "seed": cfg.seed}
    autocast = precision.autocast(device, cfg.precision)
    if diagnostics:
        pairs = checked_pairs(pairs, saved["classes"])
        train_set = build_set(cfg.data.train, root=cfg.data.root, seed=cfg.seed)
        counts = class_counts(train_set, cfg.data.cache, cfg.data.workers).sum(0)
    matrices = report(network, datasets, cfg.eval, device, autocast, folder, about)
    if diagnostics:
        diagnose(network.classifier, matrices, counts, folder, saved["step"], pairs)
    return matrices, cfg


if __name__ == "__main__":
    run(main, __doc__)
