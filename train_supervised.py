"""Supervised training: CBP + OCCL, or any classifier and losses that a configuration names.

    python train_supervised.py configs/toy/supervised.yaml
    python train_supervised.py configs/camvid/resnet18_cbp_occl.yaml data.root=PATH optimizer.lr=1e-4
    torchrun --nproc_per_node=8 train_supervised.py configs/camvid/resnet18_cbp_occl.yaml

The same command goes on where a killed run stopped. The run folder, the options and their units: configs/defaults.yaml.
"""

import contextlib
import logging
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from datasets.base import IGNORE, to_device
from engine import checkpoint, config, distributed, precision, schedule
from engine.build import (
    batches,
    build_data,
    build_losses,
    build_members,
    build_segmentor,
    call,
    learners,
)
from engine.ema import Teacher
from engine.errors import run
from engine.log import Averages, Log, facts, to_console
from engine.preempt import Preemption
from engine.report import draw_step, final_report, validate
from engine.statistics import resize_labels
from models.segmentor import View

logger = logging.getLogger("engine")


@record
def main(arguments):
    cfg = config.load(arguments[0], arguments[1:])
    device = distributed.setup(cfg)
    to_console()
    world, folder = distributed.world_size(), Path(cfg.folder)

    # --- build ---
    train_set, val_set, test_sets, *_ = build_data(cfg)
    num_classes = len(train_set.CLASSES)
    saved = checkpoint.find(folder, cfg.resume)
    if saved:
        config.check_resume(saved["config"], cfg)
    model = build_segmentor(cfg.model, num_classes, not saved, train_set.CLASSES)
    model = distributed.place(model, device, cfg.model.sync_bn)
    context = {"num_classes": num_classes, "in_channels": model.decoder.channels, "seed": cfg.seed}
    context["classes"] = tuple(train_set.CLASSES)
    members, views_of = build_members(cfg.prototypes, **context)
    members = members.to(device)
    terms, weights = build_losses(cfg.losses, **context)
    teacher = Teacher(model, cfg.train.teacher) if cfg.train.teacher else None
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    optimizer = schedule.make_optimizer(model, cfg.optimizer)
    scaler = precision.make_scaler(device, cfg.precision)
    autocast = precision.autocast(device, cfg.precision)
    student = distributed.parallel(model, device, cfg.model.compile)

    # --- resume ---
    stateful = {"model": model, "prototypes": members, "optimizer": optimizer, "scaler": scaler}
    stateful |= {"teacher": teacher} if teacher else {}
    start, best, seconds = 0, -1.0, 0.0
    if saved:
        for name, item in stateful.items():
            item.load_state_dict(saved[name])
        start, best, seconds = saved["step"], saved["best"], saved["seconds"]
    log = Log(folder, start)
    logger.info(
        f"{folder}: {len(train_set)} images, {num_classes} classes, {'resumed' if saved else 'started'} at step {start}"
    )
    if distributed.is_main():
        config.save(cfg, folder / "config.yaml")
    about = facts(device) | {"seed": cfg.seed, "iters": cfg.train.iters}
    logger.info(", ".join(f"{key} {value}" for key, value in about.items()))
    distributed.seed_everything(
        cfg.seed + distributed.rank()
    )  # from here on dropout differs between processes
    stream = batches(train_set, cfg, cfg.seed, start, device)
    if saved:
        checkpoint.set_rng_state(saved["rng"])
    preemption, averages, overflow = Preemption(), Averages(), precision.StepCounter()
    vectors = {"classifier": model.classifier, **members}
    parameters = [p for p in model.parameters() if p.requires_grad]
    clock, stop = time.time(), False

    def content(step):
        """What a checkpoint holds after `step` steps."""
        spent = seconds + time.time() - clock
        about = {"step": step, "best": best, "seconds": spent, "config": config.plain(cfg)}
        return checkpoint.content(stateful, train_set, **about)

    # --- train ---
    model.train()
    steps = range(start, cfg.train.iters)
    bar = tqdm(
        steps,
        initial=start,
        total=cfg.train.iters,
        disable=not distributed.is_main(),
        smoothing=0.05,
    )
    for step in bar:
        rates = schedule.set_lr(optimizer, schedule.factor(step, cfg.train.iters, cfg.schedule))
        micro_batches = [to_device(next(stream), device) for _ in range(cfg.train.accumulate)]
        # Labelled pixels of the whole step: every pixel weighs the same in all processes and micro-batches.
        labelled = sum((batch["label"] != IGNORE).sum() for batch in micro_batches)
        valid = {"source": distributed.mean(labelled.double()) / cfg.train.accumulate}

        seen = []
        for i, batch in enumerate(micro_batches):
            views = {"source": View(batch["image"])}
            labels, samples = {"source": batch["label"]}, {"source": batch["sample"]}
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last or world == 1 else student.no_sync():
                with autocast:
                    outputs = student(views, step)
                losses = {
                    name: call(
                        term,
                        outputs=outputs,
                        labels=labels,
                        weights={},
                        valid=valid,
                        samples=samples,
                        prototypes=vectors,
                        step=step,
                    )
                    for name, term in terms.items()
                }
                loss = (
                    sum(weights[name] * value for name, value in losses.items())
                    / cfg.train.accumulate
                )
                scaler.scale(loss).backward()
            features = outputs["source"].features.detach()
            seen.append((features, resize_labels(batch["label"], features.shape[-2:]), None))
            named = {f"train/loss_{name}": value for name, value in losses.items()}
            averages.add({"train/loss": loss * cfg.train.accumulate, **named})

        norm, taken = precision.step(optimizer, scaler, parameters, cfg.optimizer.clip)
        optimizer.zero_grad(set_to_none=True)
        overflow(taken, step)
        if taken:
            if teacher:
                teacher.update(model)
            for _, _, member in learners(members, model.classifier, views_of):
                call(
                    member.update,
                    batches=seen,
                    prototypes=vectors,
                    step=step,
                    iters=cfg.train.iters,
                )

        # --- log, validate, save ---
        done = step + 1
        stop = preemption.requested()
        final = done == cfg.train.iters
        save = stop or final or done % cfg.checkpoint.every == 0
        check = val_set and not stop and (final or (cfg.eval.every and done % cfg.eval.every == 0))
        if save or check or done % cfg.log.every == 0:
            values = averages.take(step)
            log.training(done, values, rates, norm, scaler, cfg.train.batch_size, device)
            bar.set_postfix_str(f"loss {values['train/loss']:.3f}")
        if (
            distributed.is_main()
            and cfg.log.images_every
            and (done % cfg.log.images_every == 0 or step == start)
        ):
            draw_step(log, done, views, labels, {}, outputs, vectors, train_set)
        if check:
            score = validate(reported, val_set, cfg.eval, device, autocast, log, done)
            if score > best:
                best = score
                checkpoint.save_light(folder / "best.pt", content(done))
        if save:
            checkpoint.save_step(folder, content(done), cfg.checkpoint.keep, final or stop)
        if stop:
            logger.info(
                f"signal received: saved at step {done}; the same command goes on from there"
            )
            break

    if not stop:
        about |= {
            "step": cfg.train.iters,
            "seconds": round(seconds + time.time() - clock),
            "best_val": best,
        }
        final_report(
            reported, test_sets or {"val": val_set}, cfg.eval, device, autocast, folder, about
        )
    log.close()


if __name__ == "__main__":
    run(main, __doc__)
