"""Domain generalisation: trained on labelled sources alone, reported on domains that were never seen.

    python train_dg.py configs/toy/dg_ppar.yaml
    torchrun --nproc_per_node=4 train_dg.py configs/dg/gta5_ppar_resnet50.yaml optimizer.lr=0.02

Supervised training (train_supervised.py) plus, each a key of the configuration: a joint space of text and images
(model.projector), members of the prototype family in it, a frozen image tower, weights of the source's pixels, styles
and strong colours. At test the network is backbone, decoder and classifier, as without them. Nothing is chosen on a
test domain: `data.val` is a part of the source, and what is reported is the last checkpoint. The same command goes on
where a killed run stopped.
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
    build_data,
    build_generalisation,
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
from engine.prepare import images
from engine.report import draw_step, final_report, selected_on_target, validate
from engine.statistics import pure_labels, resize_labels, unit
from models.segmentor import View

logger = logging.getLogger("engine")


def evidence(seen, view, space, teacher, tower, autocast):
    """What updates a member of the prototype family: (features, labels, None) of every micro-batch of a step.

    view `source`: the student's features; `teacher`: the averaged network's, where it is right; `tower`: the image
    tower's, in cells that are nearly of one class.
    """
    for batch, output in seen:
        image, labels = batch["image"], batch["label"]
        if view == "tower":
            dense = tower.dense(image)
            yield dense, pure_labels(labels, dense.shape[-2:]), None
            continue
        if view == "teacher":
            with autocast:
                output = teacher.network.segment(image, embed=True)
        features = (
            unit(output.aux["embedding"].detach()) if space == "joint" else output.features.detach()
        )
        labels = resize_labels(labels, features.shape[-2:])
        if view == "teacher":
            labels = torch.where(output.logits.argmax(1) == labels, labels, IGNORE)
        yield features, labels, None


@record
def main(arguments):
    cfg = config.load(arguments[0], arguments[1:])
    device = distributed.setup(cfg)
    to_console()
    world, folder = distributed.world_size(), Path(cfg.folder)

    # --- build ---
    train_set, val_set, test_sets, *_ = build_data(cfg)
    num_classes, joint = len(train_set.CLASSES), cfg.model.projector.channels
    chosen = selected_on_target(cfg, val_set, test_sets)
    saved = checkpoint.find(folder, cfg.resume)
    if saved:
        config.check_resume(saved["config"], cfg)
    model = build_segmentor(cfg.model, num_classes, not saved, train_set.CLASSES)
    model = distributed.place(model, device, cfg.model.sync_bn)
    context = {"num_classes": num_classes, "in_channels": model.decoder.channels, "seed": cfg.seed}
    context["classes"] = tuple(train_set.CLASSES)
    members, views = build_members(cfg.prototypes, joint, **context)
    members, spaces = (
        members.to(device),
        {name: cfg.prototypes[name].get("space", "features") for name in members},
    )
    terms, factors = build_losses(cfg.losses, **context)
    tower, reweight, style, strong = build_generalisation(cfg, **context)
    tower = tower.to(device) if tower else None
    teacher = Teacher(model, cfg.train.teacher) if cfg.train.teacher else None
    for name, view in views.items():
        needed = {"source": model, "none": model, "teacher": teacher, "tower": tower}
        if not needed.get(view):
            raise config.ConfigError(
                f"prototypes.{name}: view must be source, none, teacher (with train.teacher above 0) or tower (with "
                f"dg.tower), not {view!r}"
            )
    if model.text_attention and "text" not in members:
        raise config.ConfigError(
            "model.text_attention needs the rows that look at the image: prototypes.text"
        )
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    optimizer = schedule.make_optimizer(model, cfg.optimizer)
    scaler = precision.make_scaler(device, cfg.precision)
    autocast = precision.autocast(device, cfg.precision)
    student = distributed.parallel(model, device, cfg.model.compile)
    vectors = {"classifier": model.classifier, **members}

    # --- resume, or fit what is fitted once ---
    stateful = {"model": model, "prototypes": members, "optimizer": optimizer, "scaler": scaler}
    stateful |= {"teacher": teacher} if teacher else {}
    start, best, seconds = 0, -1.0, 0.0
    if saved:
        for name, item in stateful.items():
            item.load_state_dict(saved[name])
        start, best, seconds = saved["step"], saved["best"], saved["seconds"]
    else:
        for name, member in members.items():
            if views[name] == "tower" and getattr(member, "offline", 0):
                plain = train_set.without_augmentation()

                def shown(plain=plain, count=member.offline):
                    for _, image, label in images(plain, device, cfg.data.workers, count):
                        yield {"image": image, "label": label}, None

                logger.info(
                    f"prototypes.{name}: from {min(member.offline, len(plain))} training images"
                )
                call(
                    member.fit,
                    prototypes=vectors,
                    batches=lambda shown=shown: evidence(
                        shown(), "tower", "joint", None, tower, autocast
                    ),
                )
    log = Log(folder, start)
    logger.info(
        f"{folder}: {len(train_set)} images, {num_classes} classes, {'resumed' if saved else 'started'} at step {start}"
    )
    if distributed.is_main():
        config.save(cfg, folder / "config.yaml")
    about = facts(device) | {"seed": cfg.seed, "iters": cfg.train.iters}
    about |= {"selected_on_target": True} if chosen else {}
    logger.info(", ".join(f"{key} {value}" for key, value in about.items()))
    distributed.seed_everything(
        cfg.seed + distributed.rank()
    )  # from here on dropout differs between processes
    stream = batches(train_set, cfg, cfg.seed, start, device)
    if saved:
        checkpoint.set_rng_state(saved["rng"])
    preemption, averages, overflow = Preemption(), Averages(), precision.StepCounter()
    parameters = [p for p in model.parameters() if p.requires_grad]
    guided = bool(tower) and (
        any(
            asks_for(part, "tower")
            for part in [*terms.values(), *([reweight.after] if reweight else [])]
        )
        or bool(model.text_attention)
    )
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
        steps, "train", initial=start, total=cfg.train.iters, disable=not distributed.is_main()
    )
    for step in bar:
        rates = schedule.set_lr(optimizer, schedule.factor(step, cfg.train.iters, cfg.schedule))
        micro_batches = [to_device(next(stream), device) for _ in range(cfg.train.accumulate)]
        labelled = sum((batch["label"] != IGNORE).sum() for batch in micro_batches)
        valid = {"source": distributed.mean(labelled.double()) / cfg.train.accumulate}

        seen = []
        for i, batch in enumerate(micro_batches):
            given = {
                "batch": batch,
                "prototypes": vectors,
                "valid": valid,
                "step": step,
                "iters": cfg.train.iters,
            }
            given |= {
                "labels": {"source": batch["label"]},
                "samples": {"source": batch["sample"]},
                "weights": {},
            }
            image = batch["image"]  # the image tower and the teacher see it without strong colours
            with torch.no_grad(), autocast:
                if guided:
                    given["tower"] = tower.dense(image)
                image = style(image, image.roll(1, 0)) if style else image
                image = strong(image, batch["numbers"]) if strong else image
            text = vectors["text"].means() if model.text_attention else None
            views_of = {"source": View(image, "source", text, given.get("tower"))}
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last or world == 1 else student.no_sync():
                with autocast:
                    given["outputs"] = outputs = student(views_of, step)
                if reweight:
                    with torch.no_grad():
                        given["weights"] = call(reweight.after, **given)[1]
                losses = {name: call(term, **given) for name, term in terms.items()}
                loss = (
                    sum(factors[name] * value for name, value in losses.items())
                    / cfg.train.accumulate
                )
                scaler.scale(loss).backward()
            seen.append((batch, outputs["source"]))
            named = {f"train/loss_{name}": value for name, value in losses.items()}
            named |= {f"dg/weight_{name}": value.mean() for name, value in given["weights"].items()}
            averages.add({"train/loss": loss * cfg.train.accumulate, **named})

        norm, taken = precision.step(optimizer, scaler, parameters, cfg.optimizer.clip)
        optimizer.zero_grad(set_to_none=True)
        overflow(taken, step)
        if taken:
            if teacher:
                teacher.update(model)
            for name, view, member in learners(members, model.classifier, views):
                shown = evidence(seen, view, spaces.get(name, "features"), teacher, tower, autocast)
                call(
                    member.update,
                    batches=shown,
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
            draw_step(
                log, done, views_of, given["labels"], given["weights"], outputs, vectors, train_set
            )
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
        tests = test_sets or {"val": val_set}
        final_report(reported, tests, cfg.eval, device, autocast, folder, about, seen=cfg.data.seen)
    log.close()


if __name__ == "__main__":
    run(main, __doc__)
