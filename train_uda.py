"""Unsupervised domain adaptation: labelled source, unlabelled target, an averaged teacher, one or several stages.

    python train_uda.py configs/toy/uda_self_training.yaml
    torchrun --nproc_per_node=4 train_uda.py configs/... optimizer.lr=1e-4

A run is a composition of parts that the configuration names: labelers (pseudo labels), source weights, a style, a mixer
(views), prototypes and losses. None owns a trainable parameter, so the loop is the same for every method. The same
command goes on where a killed run stopped, in whatever stage.
"""

import contextlib
import logging
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from datasets.base import IGNORE, to_device
from engine import checkpoint, config, distributed, precision, schedule
from engine.build import (
    asks_for,
    batches,
    build_adaptation,
    build_data,
    build_losses,
    build_members,
    build_segmentor,
    call,
    initial_network,
    learners,
    restore,
)
from engine.ema import Teacher
from engine.errors import run
from engine.log import Averages, Log, facts, to_console
from engine.preempt import Preemption
from engine.prepare import Preparation
from engine.report import draw_regions, draw_step, final_report, log_pseudo_labels, validate
from engine.statistics import resize_labels
from models.segmentor import View

logger = logging.getLogger("engine")


def member_batches(seen, view):
    """What updates a member of the prototype family: (features, labels, None) of one view of every micro-batch."""
    for outputs, labels in seen:
        if view not in outputs or view not in labels:
            raise config.ConfigError(
                f"prototypes: no view '{view}' has labels; there are {', '.join(labels)}"
            )
        features = outputs[view].features.detach()
        yield features, resize_labels(labels[view], features.shape[-2:]), None


def train_stage(
    run_config, cfg, number, offset, data, saved, previous, log, device, preemption, clock
):
    """One stage from its start, or from the checkpoint `saved` in it.

    Args:
        run_config, cfg: configuration of the run, as checkpoints keep it, and of this stage.
        offset: steps of the stages before.
        data: as `build_data` returns it.
        previous: network of the stage before, None in the first.
        clock: function that returns the seconds spent on the run.
    Returns:
        (network to report and to go on from, whether to stop).
    """
    # --- build ---
    source_set, val_set, _, target_set, monitor = data
    classes, world, folder = source_set.CLASSES, distributed.world_size(), Path(cfg.folder)
    distributed.seed_everything(cfg.seed + 1009 * number)
    model = (
        build_segmentor(cfg.model, len(classes), False)
        if saved
        else initial_network(cfg, classes, previous)
    )
    model = distributed.place(model, device, cfg.model.sync_bn)
    context = {"num_classes": len(classes), "in_channels": model.decoder.channels, "seed": cfg.seed}
    context["classes"] = tuple(classes)
    members, view_of = build_members(cfg.prototypes, **context)
    terms, factors = build_losses(cfg.losses, **context)
    labelers, source_weights, style, mixer = build_adaptation(cfg.uda, **context)
    members, labelers = members.to(device), labelers.to(device)
    teacher = None
    if cfg.stage.teacher == "ema":
        teacher = Teacher(model, cfg.train.teacher)
    elif cfg.stage.teacher == "frozen":
        teacher = Teacher(model if previous is None else previous, 1.0)
    befores = [labeler.before for labeler in labelers if hasattr(labeler, "before")]
    afters = [labeler.after for labeler in labelers if hasattr(labeler, "after")]
    guided = any(asks_for(part, "teacher") for part in [*befores, *afters, *terms.values()])
    if guided and not teacher:
        raise config.ConfigError(
            f"stage {cfg.stage.name}: a labeler or a loss needs a teacher: ema or frozen"
        )
    if guided and cfg.stage.teacher == "ema" and not cfg.train.teacher:
        raise config.ConfigError(
            f"stage {cfg.stage.name}: train.teacher=0 would copy the student; set 0.99 to 0.999"
        )
    optimizer = schedule.make_optimizer(model, cfg.optimizer)
    scaler = precision.make_scaler(device, cfg.precision)
    autocast = precision.autocast(device, cfg.precision)
    student = distributed.parallel(model, device, cfg.model.compile)
    stateful = {
        "model": model,
        "prototypes": members,
        "labelers": labelers,
        "optimizer": optimizer,
        "scaler": scaler,
    }
    stateful |= {"teacher": teacher} if teacher else {}
    vectors = {"classifier": model.classifier, **members}

    # --- resume, or prepare what the stage needs ---
    start, best = 0, -1.0
    origin = (
        model if previous is None else previous
    )  # the network that labels: what the stage starts or learns from
    preparation = Preparation(
        origin,
        source_set,
        target_set,
        {"classifier": origin.classifier, **members},
        folder / "maps" / f"{number + 1}_{cfg.stage.name}",
        device,
        autocast,
        cfg.data.workers,
    )
    if saved:
        for name, item in stateful.items():
            item.load_state_dict(saved[name])
        start, best = saved["stage_step"], saved["best"]
        preparation.attach(saved["maps"])
    else:
        for part in [source_weights, *labelers]:
            if hasattr(part, "prepare"):
                part.prepare(preparation)
                if monitor and hasattr(part, "label"):
                    prototypes = preparation.prototypes
                    log_pseudo_labels(
                        origin, part, prototypes, monitor, device, autocast, log, offset
                    )
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    distributed.seed_everything(cfg.seed + 1009 * number + distributed.rank())
    sources, targets = (
        batches(dataset, cfg, dataset.seed * 1009 + number, start, device)
        for dataset in (source_set, target_set)
    )
    if saved:
        checkpoint.set_rng_state(saved["rng"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages, overflow, stop = Averages(), precision.StepCounter(), False

    def content(step):
        """What a checkpoint holds after `step` steps of this stage."""
        return checkpoint.content(
            stateful,
            source_set,
            step=offset + step,
            stage=number,
            stage_step=step,
            best=best,
            seconds=clock(),
            maps=preparation.stored(),
            config=config.plain(run_config),
        )

    # --- train ---
    model.train()
    steps = range(start, cfg.train.iters)
    bar = tqdm(
        steps,
        cfg.stage.name,
        initial=start,
        total=cfg.train.iters,
        disable=not distributed.is_main(),
    )
    for step in bar:
        rates = schedule.set_lr(optimizer, schedule.factor(step, cfg.train.iters, cfg.schedule))
        micro_batches = [
            {"source": to_device(next(sources), device), "target": to_device(next(targets), device)}
            for _ in range(cfg.train.accumulate)
        ]
        labelled = sum((batch["source"]["label"] != IGNORE).sum() for batch in micro_batches)
        of_source = distributed.mean(labelled.double()) / cfg.train.accumulate

        seen = []
        for i, batch in enumerate(micro_batches):
            given = {"batch": batch, "prototypes": vectors, "step": step, "iters": cfg.train.iters}
            labels, trust = {"source": batch["source"]["label"]}, {}
            with torch.no_grad(), autocast:
                if style:
                    batch["source"]["image"] = style(
                        batch["source"]["image"], batch["target"]["image"]
                    )
                if guided:
                    given["teacher"] = teacher.network.segment(batch["target"]["image"])
                if source_weights:
                    trust["source"] = source_weights(batch)
                for before in befores:
                    found = call(before, labels=labels, weights=trust, **given)
                    labels, trust = labels | found[0], trust | found[1]
                views, labels, trust = mixer(batch, labels, trust)
            views = {name: View(*view) for name, view in views.items()}
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last or world == 1 else student.no_sync():
                with autocast:
                    given["outputs"] = outputs = student(views, step)
                with torch.no_grad():
                    for after in afters:
                        found = call(after, labels=labels, weights=trust, **given)
                        labels, trust = labels | found[0], trust | found[1]
                # Pseudo labels exist only now, so their number is that of the micro-batch, over all processes.
                pseudo = {name: y for name, y in labels.items() if name != "source"}
                valid = {
                    name: distributed.mean((y != IGNORE).sum().double())
                    for name, y in pseudo.items()
                }
                valid["source"] = of_source
                samples = {
                    name: batch["source" if name == "source" else "target"]["sample"]
                    for name in views
                }
                given |= {"labels": labels, "weights": trust, "valid": valid, "samples": samples}
                losses = {name: call(term, **given) for name, term in terms.items()}
                loss = (
                    sum(factors[name] * value for name, value in losses.items())
                    / cfg.train.accumulate
                )
                scaler.scale(loss).backward()
            seen.append((outputs, labels))
            named = {f"train/loss_{name}": value for name, value in losses.items()}
            named |= {f"uda/weight_{name}": value.mean() for name, value in trust.items()}
            named |= {
                f"uda/labelled_{name}": (y != IGNORE).double().mean() for name, y in pseudo.items()
            }
            averages.add({"train/loss": loss * cfg.train.accumulate, **named})

        norm, taken = precision.step(optimizer, scaler, parameters, cfg.optimizer.clip)
        optimizer.zero_grad(set_to_none=True)
        overflow(taken, step)
        if taken:
            if cfg.stage.teacher == "ema":
                teacher.update(model)
            for _, view, member in learners(members, model.classifier, view_of):
                shown = member_batches(seen, view)
                call(
                    member.update,
                    batches=shown,
                    prototypes=vectors,
                    step=step,
                    iters=cfg.train.iters,
                )
            for labeler in labelers:
                if hasattr(labeler, "update"):
                    labeler.update()

        # --- log, validate, save ---
        done, total = step + 1, offset + step + 1
        stop = preemption.requested()
        final = done == cfg.train.iters
        save = stop or final or done % cfg.checkpoint.every == 0
        check = not stop and (final or (cfg.eval.every and done % cfg.eval.every == 0))
        if save or check or done % cfg.log.every == 0:
            values = averages.take(total)
            log.training(total, values, rates, norm, scaler, cfg.train.batch_size, device)
            bar.set_postfix_str(f"loss {values['train/loss']:.3f}")
        if (
            distributed.is_main()
            and cfg.log.images_every
            and (done % cfg.log.images_every == 0 or step == start)
        ):
            draw_step(log, total, views, labels, trust, outputs, vectors, source_set)
            if model.region:
                draw_regions(log, total, model, batch["target"]["image"][:1])
        for labeler in labelers if check and monitor else []:
            if hasattr(labeler, "label") and not hasattr(
                labeler, "prepare"
            ):  # those were measured when they were made
                guide = teacher.network if teacher else model
                log_pseudo_labels(guide, labeler, vectors, monitor, device, autocast, log, total)
        if check and val_set:  # on the source: the target's labels choose nothing
            score = validate(reported, val_set, cfg.eval, device, autocast, log, total)
            if score > best:
                best = score
                checkpoint.save_light(folder / "best.pt", content(done))
        if save:
            checkpoint.save_step(folder, content(done), cfg.checkpoint.keep, final or stop)
        if final and number == 0 and run_config.stages:
            checkpoint.save_light(folder / f"stage_{cfg.stage.name}.pt", content(done))
        if stop:
            logger.info(
                f"signal received: saved at step {done} of stage {cfg.stage.name}; the same command goes on"
            )
            break
    return reported, stop


@record
def main(arguments):
    cfg = config.load(arguments[0], arguments[1:])
    device = distributed.setup(cfg)
    to_console()
    stages = config.stages(cfg)
    data = [
        build_data(stage) for stage in stages
    ]  # all of them first: a mistake should not show up only after hours
    if any(target is None for *_, target, _ in data):
        raise config.ConfigError("train_uda.py needs data.target, the unlabelled target set")
    folder = Path(cfg.folder)
    saved = checkpoint.find(folder, cfg.resume)
    if saved:
        config.check_resume(saved["config"], cfg)
    spent, began = saved["seconds"] if saved else 0.0, time.time()
    log, preemption = Log(folder, saved["step"] if saved else 0), Preemption()
    if distributed.is_main():
        config.save(cfg, folder / "config.yaml")
    total = sum(stage.train.iters for stage in stages)
    about = facts(device) | {"seed": cfg.seed, "iters": total}
    logger.info(
        f"{folder}: stages {', '.join(f'{s.stage.name} ({s.train.iters} steps)' for s in stages)}"
    )
    logger.info(", ".join(f"{key} {value}" for key, value in about.items()))

    def clock():
        return spent + time.time() - began

    offset, network, stop = 0, None, False
    for number, stage in enumerate(stages):
        if not saved or number >= saved["stage"]:
            here = saved if saved and saved["stage"] == number else None
            logger.info(
                f"stage {stage.stage.name}: "
                + (f"resumed at step {here['stage_step']}" if here else "started")
            )
            arguments = (offset, data[number], here, network, log, device, preemption, clock)
            network, stop = train_stage(cfg, stage, number, *arguments)
            if stop:
                break
        offset += stage.train.iters
    if not stop:
        about |= {"step": total, "seconds": round(clock())}
        autocast = precision.autocast(device, cfg.precision)
        tests, before = data[-1][2] or {"val": data[-1][1]}, None
        starts = (
            folder / f"stage_{stages[0].stage.name}.pt" if len(stages) > 1 else stages[0].stage.init
        )
        if cfg.uda.compare and starts not in ("imagenet", "previous"):
            averaged = (
                len(stages) > 1
                and stages[0].stage.teacher == "ema"
                and stages[0].eval.weights == "teacher"
            )
            before = restore(starts, [f"eval.weights={'teacher' if averaged else 'student'}"])[
                0
            ].to(device)
        final_report(network, tests, stages[-1].eval, device, autocast, folder, about, before)
    log.close()


if __name__ == "__main__":
    run(main, __doc__)
