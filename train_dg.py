"""Domain generalisation: trained on labelled sources alone, reported on domains that were never seen.

    python train_dg.py configs/toy/dg_ppar.yaml
    torchrun --nproc_per_node=4 train_dg.py configs/dg/gta5_ppar_resnet50.yaml optimizer.lr=0.02

Supervised training (train_supervised.py) plus, each a key of the configuration: a joint space of text and images
(model.heads.projector), members of the prototype family in it, a frozen image tower, weights of the source's pixels,
styles and strong colours. At test the network is backbone, decoder and classifier, as without them. Nothing is chosen
on a test domain: `data.val` is a part of the source, and what is reported is the last checkpoint. The same command goes
on where a killed run stopped.
"""

import logging

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from datasets.build import Stream, build_data, count_classes
from engine import config, distributed, precision, schedule
from engine.build import build_any
from engine.ema import Teacher
from engine.log import to_console
from engine.prepare import images
from engine.process import run as run_script
from engine.report import draw_step, final_report, selected_on_target, validate
from engine.run import Run
from engine.statistics import IGNORE, pure_labels, unit
from engine.step import Batch, Step, View, withheld
from losses.build import build_losses
from models.build import build_prototypes, build_segmentor, build_tower, joint_channels

logger = logging.getLogger("engine")


def evidence(steps, view, space, teacher, tower, autocast):
    """What updates a member of the prototype family: (features, labels, None) of every micro-batch of a step.

    view `source`: the student's features; `teacher`: the averaged network's, where it is right; `tower`: the image
    tower's, in cells that are nearly of one class.
    """
    for step in steps:
        image, labels, output = step.source.image, step.source.label, step.outputs.get("source")
        if view == "tower":
            dense = tower.dense(image)
            yield withheld(steps[-1], dense, pure_labels(labels, dense.shape[-2:]))
            continue
        if view == "teacher":
            with autocast:
                output = teacher.network.segment(image, heads=True)
        features = unit(output.embedding.detach()) if space == "joint" else output.features
        features, labels, _ = withheld(steps[-1], features, labels)
        if view == "teacher":
            labels = torch.where(output.logits.argmax(1) == labels, labels, IGNORE)
        yield features, labels, None


@record
def main(arguments):
    cfg = config.load(arguments[0], arguments[1:])
    config.check_sections(cfg, "train_dg")
    device = distributed.setup(cfg)
    to_console()
    run = Run(cfg, device)

    # --- build ---
    data = build_data(cfg)
    classes, joint = tuple(data.train.CLASSES), joint_channels(cfg.model)
    model = build_segmentor(cfg.model, classes, pretrained=not run.saved)
    model = distributed.place(model, device, cfg.model.sync_bn)
    context = {"num_classes": len(classes), "in_channels": model.decoder.channels}
    context |= {"classes": classes, "seed": cfg.seed}
    context |= {"counts": lambda: count_classes(data.train, cfg)}
    members, view_of, space_of = build_prototypes(cfg.prototypes, joint, **context)
    members = members.to(device)
    prototypes = {"classifier": model.classifier, **members}
    losses, factors = build_losses(cfg.losses, **context)
    tower = build_tower(cfg.dg.tower, joint)
    tower = tower and tower.to(device)
    reweight = build_any("losses", cfg.dg.reweight, "Labeler", **context)
    style = build_any("datasets", cfg.dg.style, "Style", **context)
    strong = build_any("datasets", cfg.dg.strong, "ColorBlur", **context)
    teacher = Teacher(model, cfg.train.teacher) if cfg.train.teacher else None
    parts = [*losses.values(), *([reweight] if reweight else [])]
    text = "text_attention" in model.heads
    needs_tower = any(part.needs_tower for part in parts)
    check_parts(view_of, members, teacher, tower, needs_tower, text)
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    optimizer = schedule.make_optimizer(model, cfg.optimizer)
    scaler = precision.make_scaler(device, cfg.precision)
    autocast = precision.autocast(device, cfg.precision)
    student = distributed.parallel(model, device, cfg.model.compile)

    # --- resume, or fit what is fitted once ---
    run.open(cfg.train.iters, train=data.train)
    if selected_on_target(cfg, data.val, data.test):
        run.about["selected_on_target"] = True
    for name, member in members.items() if not run.saved else []:
        if view_of.get(name) == "tower" and member.offline:
            plain = data.train.without_augmentation()

            def batches(plain=plain, count=member.offline):
                for _, image, label in images(plain, device, cfg.data.workers, count):
                    step = Step(0, cfg.train.iters, Batch(image, label, None, []))
                    step.skipped = torch.tensor(False, device=device)
                    yield from evidence([step], "tower", "joint", None, tower, autocast)

            logger.info(
                f"prototypes.{name}: from {min(member.offline, len(plain))} training images"
            )
            member.fit(batches, prototypes)
    states = {"model": model, "prototypes": members, "optimizer": optimizer, "scaler": scaler}
    run.begin(states | {"teacher": teacher}, data.train, cfg.train.iters, seed=cfg.seed)
    stream = Stream(data.train, cfg, cfg.seed, run.done, device)

    def check():
        run.score(validate(reported, data.val, cfg.eval, autocast, run))

    if run.pending and data.val:
        check()

    # --- train ---
    model.train()
    for number in run.steps(train=stream):
        rates = schedule.set_lr(optimizer, schedule.factor(number, cfg.train.iters, cfg.schedule))
        batches = [Batch.load(next(stream), device) for _ in range(cfg.train.accumulate)]
        # Every labelled pixel of the step weighs the same, in all processes and micro-batches.
        labelled = sum((batch.label != IGNORE).sum() for batch in batches)
        labelled = distributed.mean(labelled.double()) / len(batches)

        steps = []
        for batch in batches:
            step = Step(number, cfg.train.iters, batch, prototypes=prototypes)
            step.labels["source"] = batch.label
            step.counts["source"] = labelled
            image = batch.image  # the image tower and the teacher see it without strong colours
            with torch.no_grad(), autocast:
                if needs_tower or (text and tower):
                    step.tower = tower.dense(image)
                image = style(image, image.roll(1, 0)) if style else image
                image = strong(image, batch.numbers) if strong else image
            rows = prototypes["text"].means() if text else None
            step.views["source"] = View(image, "source", rows, step.tower)
            with distributed.synced(student, batch is batches[-1]):
                with autocast:
                    step.outputs = student(step.views, number)
                if reweight:
                    with torch.no_grad():
                        reweight.after(step)
                terms = {name: loss(step) for name, loss in losses.items()}
                loss = sum(factors[name] * term for name, term in terms.items())
                scaler.scale(loss / len(batches)).backward()
            run.add(
                {f"loss_{name}": term for name, term in terms.items()} | {"loss": loss},
                **step.summary("dg"),
            )
            steps.append(step)

        step.skipped = run.optimise(optimizer, scaler)
        if teacher:
            teacher.update(model, step.skipped)
        for name, view in view_of.items():
            shown = evidence(steps, view, space_of[name], teacher, tower, autocast)
            prototypes[name].update(shown, step)

        # --- log, validate, save ---
        run.log(rates, scaler)
        if run.draws():
            draw_step(run, step, data.train)
        if run.validates() and data.val:
            check()
        run.save()

    if not run.stopped:
        final_report(
            reported, data.test or {"val": data.val}, cfg.eval, autocast, run, seen=cfg.data.seen
        )
    run.close()
    return run.exit_code


def check_parts(view_of, members, teacher, tower, needs_tower, text):
    """Raise ConfigError where a part needs another one that is not configured."""
    for name, view in view_of.items():
        if not {"source": True, "teacher": teacher, "tower": tower}.get(view):
            raise config.ConfigError(
                f"prototypes.{name}: view must be source, none, teacher (with train.teacher above 0) or tower (with "
                f"dg.tower), not {view!r}"
            )
    if needs_tower and not tower:
        raise config.ConfigError(
            "a loss or dg.reweight needs the features of the frozen image tower: set dg.tower"
        )
    if text and "text" not in members:
        raise config.ConfigError(
            "model.heads.text_attention needs the rows that look at the image: prototypes.text"
        )


if __name__ == "__main__":
    run_script(main, __doc__)
