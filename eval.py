"""Evaluate a checkpoint on one or several labelled data sets.

    python eval.py runs/camvid/resnet18_cbp_occl/seed0/best.pt
    python eval.py CHECKPOINT data.root=PATH eval.scales=[0.75,1.0,1.25] eval.flip=true
    python eval.py CHECKPOINT data.test.dusk='{name: camvid.CamVid, split: test_dusk}'
    torchrun --nproc_per_node=8 eval.py CHECKPOINT

The data sets are `data.test` of the checkpoint's configuration (or data.val, where it has none). Tables go to the
console, JSON, CSV and pictures to `eval_<checkpoint>/` beside the checkpoint. `eval.weights=teacher` evaluates the
averaged network.
"""

from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from engine import checkpoint, config, distributed, precision
from engine.build import build, build_segmentor
from engine.config import ConfigError
from engine.errors import run
from engine.log import facts, to_console
from engine.report import report


def load_network(path, overrides=()):
    """Checkpoint file and overrides -> (network in eval mode on its device, configuration, device, checkpoint)."""
    saved = checkpoint.load(path)
    cfg = config.override(saved["config"], overrides)
    cfg = config.stages(cfg)[saved["stage"]] if "stage" in saved else cfg
    device = distributed.setup(cfg)
    network = build_segmentor(cfg.model, len(saved["classes"]), pretrained=False)
    state = saved["model"]
    if cfg.eval.weights == "teacher":
        if "teacher" not in saved:
            raise ConfigError(f"{path} has no teacher: it was trained with train.teacher=0; set eval.weights=student")
        state = {k.removeprefix("network."): v for k, v in saved["teacher"].items() if k.startswith("network.")}
    checkpoint.weights.load_into(network, state, source=str(path))
    return network.to(device).eval(), cfg, device, saved


@record
def main(arguments):
    path, overrides = Path(arguments[0]), arguments[1:]
    to_console()
    network, cfg, device, saved = load_network(path, overrides)
    to_console()  # again: only now each process knows its rank
    specs = cfg.data.test or {"val": cfg.data.val}
    datasets = {name: build("datasets", spec, root=cfg.data.root) for name, spec in specs.items()}
    for name, dataset in datasets.items():
        if list(dataset.CLASSES) != saved["classes"]:
            raise ConfigError(
                f"data.test.{name} has {len(dataset.CLASSES)} classes ({', '.join(dataset.CLASSES)}) and {path} was "
                f"trained with {len(saved['classes'])} ({', '.join(saved['classes'])})"
            )
    about = facts(device) | {"checkpoint": str(path), "step": saved["step"], "seed": cfg.seed}
    autocast = precision.autocast(device, cfg.precision)
    report(network, datasets, cfg.eval, device, autocast, path.parent / f"eval_{path.stem}", about)


if __name__ == "__main__":
    run(main, __doc__)
