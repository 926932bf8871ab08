"""Unsupervised domain adaptation: labelled source, unlabelled target, an averaged teacher, stages.

    python train_uda.py configs/toy/uda_self_training.yaml
    torchrun --nproc_per_node=4 train_uda.py configs/... optimizer.lr=1e-4

A run is a composition of parts that the configuration names: labelers (pseudo labels), source
weights, a style, a mixer (views), prototypes and losses. None owns a trainable parameter, so the
loop is the same for every method. The same command goes on where a killed run stopped, in whatever
stage.
"""

import logging
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from datasets.build import Stream, build_data, count_classes
from engine import accepted, config, distributed
from engine.drawing import draw_step
from engine.ema import Teacher
from engine.prepare import Preparation
from engine.process import run as run_script
from engine.report import final_report, log_pseudo_labels, validate
from engine.run import Run
from engine.statistics import IGNORE
from engine.step import Batch, Step, evidence
from losses.build import build_adaptation, build_losses, needs_teacher
from models.build import before_adaptation, build_prototypes, build_segmentor, stage_networks

logger = logging.getLogger("engine")


def build_parts(cfg, model, train, first=False):
    """The parts of a stage, the first or a later one, around its network.

    Returns:
        members, {name: view that a member follows}, losses, their factors, labelers, the same after
        the source weights, style, mixer, whether one of them needs the teacher.
    Raises:
        ConfigError: a part that is not one, or that needs a teacher where there is none, a view
            that nothing makes, or labels of a network that has learnt nothing.
    """
    classes = tuple(train.CLASSES)
    context = {
        "num_classes": len(classes),
        "in_channels": model.decoder.channels,
        "classes": classes,
        "seed": cfg.seed,
        "counts": lambda: count_classes(train, cfg),
    }
    members, view_of, _ = build_prototypes(cfg.prototypes, **context)
    losses, factors = build_losses(cfg.losses, model.heads, **context)
    labelers, source_weights, style, mixer = build_adaptation(cfg.uda, **context)
    labeling = [source_weights, *labelers] if source_weights else [*labelers]
    followed = {f"prototypes.{name}.view": [view] for name, view in view_of.items()}
    for key, views in (followed | {"model.bn_views": cfg.model.bn_views}).items():
        if views and not {*views} & {*mixer.views}:
            raise config.ConfigError(
                f"{key} names {', '.join(views)}, and {cfg.uda.mixer.name} makes the views "
                f"{', '.join(mixer.views)}: change one of the two"
            )
    taught = needs_teacher(cfg, labeling, losses, first)
    return members, view_of, losses, factors, labelers, labeling, style, mixer, taught


def train_stage(run, cfg, number, offset, data, before, previous):
    """One stage from its start, or from the checkpoint of the run in it.

    Args:
        cfg: configuration of the stage.
        offset: steps of the stages before.
        before, previous: configuration and network of the stage before, None in the first.
    Returns:
        network to report and to go on from.
    """
    # --- build ---
    classes, device, resumed = tuple(data.train.CLASSES), run.device, run.at == number
    distributed.seed_everything(cfg.seed)
    # The origin labels: the network that the stage starts or learns from.
    model, origin = stage_networks(cfg, classes, device, previous, before, resumed)
    members, view_of, losses, factors, labelers, labeling, style, mixer, taught = build_parts(
        cfg, model, data.train, number == 0
    )
    members, labelers = members.to(device), labelers.to(device)
    prototypes = {"classifier": model.classifier, **members}
    followed = {"ema": (model, cfg.train.teacher), "frozen": (origin, 1.0)}.get(cfg.stage.teacher)
    teacher = Teacher(*followed) if followed else None
    student = run.equip(model, cfg)
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model

    # --- resume, or prepare what the stage needs ---
    preparation = Preparation(
        origin,
        data.train,
        data.target,
        prototypes | {"classifier": origin.classifier},
        run.folder / "maps" / f"{number + 1}_{cfg.stage.name}",
        device,
        run.autocast,
        cfg.data.workers,
        (cfg.uda.source_short_side or cfg.eval.short_side, cfg.eval.short_side),
        style,
        cfg.seed,
        config.plain([cfg.data.train, cfg.data.target, cfg.uda.style, cfg.precision]),
    )
    fresh = [] if resumed else labeling
    for labeler in fresh:
        labeler.prepare(preparation)
    log_pseudo_labels(origin, fresh, preparation.prototypes, data.monitor, run, offset, stored=True)
    preparation.attach(run.saved["maps"] if resumed else [])
    run.begin(
        {"model": model, "prototypes": members, "labelers": labelers, "teacher": teacher},
        data.train,
        seed=cfg.seed,
        name=cfg.stage.name,
        number=number,
        offset=offset,
        stage=number,
        maps=preparation.stored(),
        keep=f"stage_{cfg.stage.name}.pt" if number == 0 and run.cfg.stages else None,
    )
    sources, targets = (
        Stream(dataset, cfg, dataset.seed * 1009, run.done, device)
        for dataset in (data.train, data.target)
    )

    def check():
        network = teacher.network if teacher else model
        log_pseudo_labels(network, labelers, prototypes, data.monitor, run, offset + run.done)
        if data.val:  # on the source: the target's labels choose nothing
            run.score(validate(reported, data.val, cfg.eval, run.autocast, run))

    if run.pending:
        check()

    # --- train ---
    model.train()
    for number in run.steps(source=sources, target=targets):
        pairs = [
            (Batch.load(next(sources), device), Batch.load(next(targets), device))
            for _ in range(cfg.train.accumulate)
        ]
        # Every labelled pixel of the step weighs the same, in all processes and micro-batches.
        labelled = sum((source.label != IGNORE).sum() for source, _ in pairs)
        labelled = distributed.mean(labelled.double()) / len(pairs)

        steps = []
        for source, target in pairs:
            step = Step(number, cfg.train.iters, source, target, prototypes)
            step.labels["source"] = source.label
            step.counts["source"] = labelled
            with torch.no_grad(), run.autocast:
                if style:
                    source.image = style(source.image, target.image)
                if taught:
                    step.teacher = teacher.segment(target.image)
                for labeler in labeling:
                    labeler.before(step)
                mixer(step)
            with distributed.synced(student, len(steps) == len(pairs) - 1):
                with run.autocast:
                    step.outputs = student(step.views, number)
                with torch.no_grad():
                    for labeler in labeling:
                        labeler.after(step)
                    mixer.after(step)
                terms = {name: loss(step) for name, loss in losses.items()}
                loss = sum(factors[name] * term for name, term in terms.items())
                run.scaler.scale(loss / len(pairs)).backward()
            run.add(
                {f"loss_{name}": term for name, term in terms.items()} | {"loss": loss},
                **step.summary("uda"),
            )
            steps.append(step)

        step.skipped = run.optimise()
        if cfg.stage.teacher == "ema":
            teacher.update(model, step.skipped)
        for name, view in view_of.items():
            prototypes[name].update(evidence(steps, view), step)
        for labeler in labeling:
            labeler.update(step)

        # --- log, validate, save ---
        run.log()
        draw_step(run, step, data.train, model)
        if run.validates:
            check()
        run.save()
    return reported


@record
def main(arguments):
    cfg = accepted.of_script("train_uda", arguments)
    run = Run(cfg, distributed.setup(cfg))
    stages = config.stages(cfg)
    # All of them first: a mistake should not show up only after hours.
    data = [build_data(stage) for stage in stages]
    train = data[0].train
    for number, stage in enumerate(stages):
        begun, start = bool(run.saved) and number <= run.at, stage.stage.init
        read = not begun or (cfg.uda.compare and len(stages) == 1)
        if read and start not in ("imagenet", "previous") and not Path(start).is_file():
            hint = ", which uda.compare=true reports too" * begun
            raise config.ConfigError(
                f"stage {stage.stage.name}: init: there is no file {start}{hint}"
            )
    alike = {"optimizer": 0, "seed": 0}
    for number, stage in {
        str(stage | alike | {"stage": [stage.stage.teacher, not number]}): (number, stage)
        for number, stage in enumerate(stages)
    }.values():
        network = build_segmentor(stage.model, tuple(train.CLASSES), False)
        build_parts(stage, network, train, number == 0)
    run.open(network, sum(s.train.iters for s in stages), train=train, target=data[0].target)
    logger.info(f"stages {', '.join(f'{s.stage.name} ({s.train.iters} steps)' for s in stages)}")

    offset, network = 0, None
    for number, (before, stage) in enumerate(zip([None, *stages], stages)):
        if not run.saved or number >= run.saved["stage"]:
            logger.info(f"stage {stage.stage.name}")
            network = train_stage(run, stage, number, offset, data[number], before, network)
            if run.stopped:
                break
        offset += stage.train.iters
    if not run.stopped:
        final_report(
            network,
            data[-1].test or {"val": data[-1].val},
            stages[-1].eval,
            run.autocast,
            run,
            before_adaptation(cfg, run.folder, run.device),
        )
    return run.close()


if __name__ == "__main__":
    run_script(main, __doc__)
