"""Domain generalisation: trained on labelled sources alone, reported on domains that were never
seen.

    python train_dg.py configs/toy/dg_ppar.yaml
    torchrun --nproc_per_node=4 train_dg.py configs/dg/gta5_ppar_resnet50.yaml optimizer.lr=0.02

Supervised training (train_supervised.py) plus, each a key of the configuration: a joint space of
text and images (model.heads.projector), members of the prototype family in it, a frozen image
tower, weights of the source's pixels, styles and strong colours. At test the network is backbone,
decoder and classifier, as without them. Nothing is chosen on a test domain: `data.val` is a part of
the source, and what is reported is the last checkpoint. The same command goes on where a killed run
stopped.
"""

import logging

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from datasets.build import Stream, build_data, count_classes
from engine import accepted, config, distributed
from engine.build import build_any
from engine.drawing import draw_step
from engine.ema import Teacher
from engine.prepare import images
from engine.process import run as run_script
from engine.report import final_report, selected_on_target, validate
from engine.run import Run
from engine.statistics import IGNORE, pure_labels, unit
from engine.step import Batch, Step, View, withheld
from losses.base import after_alone
from losses.build import build_losses
from models.build import build_prototypes, build_segmentor, build_tower, joint_channels

logger = logging.getLogger("engine")


def of_tower(tower, image, labels):
    """Dense features of the image tower, and the labels of its cells that are nearly of one
    class."""
    dense = tower.dense(image)
    return dense, pure_labels(labels, dense.shape[-2:])


def evidence(steps, view, space, teacher, tower, autocast):
    """What updates a prototype member: (features, labels, None) of every micro-batch of a step.

    view `source`: the student's features; `teacher`: the averaged network's, where it is right;
    `tower`: the image tower's.
    """
    for step in steps:
        image, labels, output = step.source.image, step.source.label, step.outputs.get("source")
        if view == "tower":
            yield withheld(steps[-1], *of_tower(tower, image, labels))
        else:
            if view == "teacher":
                with autocast:
                    output = teacher.segment(image, heads=True)
            features = unit(output.embedding.detach()) if space == "joint" else output.features
            features, labels, _ = withheld(steps[-1], features, labels)
            if view == "teacher":
                labels = labels.where(output.logits.argmax(1) == labels, IGNORE)
            yield features, labels, None


@record
def main(arguments):
    cfg = accepted.of_script("train_dg", arguments)
    run = Run(cfg, distributed.setup(cfg))

    # --- build ---
    data = build_data(cfg)
    classes, joint = tuple(data.train.CLASSES), joint_channels(cfg.model)
    model = build_segmentor(cfg.model, classes, pretrained=not run.saved)
    model = distributed.place(model, run.device, cfg.model.sync_bn)
    context = {
        "num_classes": len(classes),
        "in_channels": model.decoder.channels,
        "classes": classes,
        "seed": cfg.seed,
        "counts": lambda: count_classes(data.train, cfg),
    }
    members, view_of, space_of = build_prototypes(cfg.prototypes, joint, **context)
    members = members.to(run.device)
    prototypes = {"classifier": model.classifier, **members}
    losses, factors = build_losses(cfg.losses, model.heads, **context)
    tower = build_tower(cfg.dg.tower, joint, run.device)
    reweight = build_any("losses", cfg.dg.reweight, "Labeler", **context)
    style = build_any("datasets", cfg.dg.style, "Style", **context)
    strong = build_any("datasets", cfg.dg.strong, "ColorBlur", **context)
    teacher = Teacher(model, cfg.train.teacher) if cfg.train.teacher else None
    text = "text_attention" in model.heads
    needs_tower = any(part.needs_tower for part in [*losses.values(), reweight] if part)
    alone = cfg.train.batch_size // (cfg.train.accumulate * distributed.world_size()) < 2
    check_parts(view_of, members, teacher, tower, needs_tower, text, style and alone, reweight)
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    student = run.equip(model, cfg)

    # --- resume, or fit what is fitted once ---
    run.open(model, cfg.train.iters, train=data.train)
    if selected_on_target(cfg, data.val, data.test):
        run.about["selected_on_target"] = True
    for name, member in members.items() if not run.saved else []:
        if view_of.get(name) == "tower" and member.offline:
            plain = data.train.without_augmentation()

            def shown(plain=plain, count=member.offline):
                return (
                    (*of_tower(tower, image, label), None)
                    for _, image, label in images(plain, run.device, cfg.data.workers, count)
                )

            logger.info(
                f"prototypes.{name}: from {min(member.offline, len(plain))} training images"
            )
            member.fit(shown, prototypes)
    run.begin(
        {"model": model, "prototypes": members, "teacher": teacher}, data.train, seed=cfg.seed
    )
    stream = Stream(data.train, cfg, cfg.seed, run.done, run.device)
    if run.pending and data.val:
        run.score(validate(reported, data.val, cfg.eval, run.autocast, run))

    # --- train ---
    model.train()
    for number in run.steps(train=stream):
        batches = [Batch.load(next(stream), run.device) for _ in range(cfg.train.accumulate)]
        # Every labelled pixel of the step weighs the same, in all processes and micro-batches.
        labelled = sum((batch.label != IGNORE).sum() for batch in batches)
        labelled = distributed.mean(labelled.double()) / len(batches)

        steps = []
        for batch in batches:
            step = Step(number, cfg.train.iters, batch, prototypes=prototypes)
            step.labels["source"] = batch.label
            step.counts["source"] = labelled
            image = batch.image  # the image tower and the teacher see it without strong colours
            with torch.no_grad(), run.autocast:
                if needs_tower or (text and tower):
                    step.tower = tower.dense(image)
                image = style(image, image.roll(1, 0)) if style else image
                image = strong(image, batch.numbers) if strong else image
            rows = prototypes["text"].means() if text else None
            step.views["source"] = View(image, "source", rows, step.tower)
            with distributed.synced(student, batch is batches[-1]):
                with run.autocast:
                    step.outputs = student(step.views, number)
                if reweight:
                    with torch.no_grad():
                        reweight.after(step)
                terms = {name: loss(step) for name, loss in losses.items()}
                loss = sum(factors[name] * term for name, term in terms.items())
                run.scaler.scale(loss / len(batches)).backward()
            run.add(
                {f"loss_{name}": term for name, term in terms.items()} | {"loss": loss},
                **step.summary("dg"),
            )
            steps.append(step)

        step.skipped = run.optimise()
        if teacher:
            teacher.update(model, step.skipped)
        for name, view in view_of.items():
            shown = evidence(steps, view, space_of[name], teacher, tower, run.autocast)
            prototypes[name].update(shown, step)

        # --- log, validate, save ---
        run.log()
        draw_step(run, step, data.train)
        if run.validates and data.val:
            run.score(validate(reported, data.val, cfg.eval, run.autocast, run))
        run.save()

    if not run.stopped:
        final_report(
            reported,
            data.test or {"val": data.val},
            cfg.eval,
            run.autocast,
            run,
            seen=cfg.data.seen,
        )
    return run.close()


def check_parts(
    view_of, members, teacher, tower, needs_tower, text, styled_alone=False, reweight=None
):
    """Raise ConfigError where a part needs another one that is not configured."""
    needed = {
        f"prototypes.{name}: view must be source, none, teacher (with train.teacher above 0) or "
        f"tower (with dg.tower), not {view!r}": {
            "source": True,
            "teacher": teacher,
            "tower": tower,
        }.get(view)
        for name, view in view_of.items()
    } | {
        "dg.style takes the style of another image of the micro-batch: it needs two or more in "
        "each process and micro-batch, so raise train.batch_size": not styled_alone,
        "a loss or dg.reweight needs the features of the frozen image tower: set dg.tower": (
            tower or not needs_tower
        ),
        "dg.reweight is called after the forward pass alone: it must be ppar.Reweight, or another "
        "labeler with the method `after` and without prepare, before and update": (
            not reweight or after_alone(reweight)
        ),
        "model.heads.text_attention needs the rows that look at the image: prototypes.text": (
            "text" in members or not text
        ),
    }
    if lacking := [sentence for sentence, there in needed.items() if not there]:
        raise config.ConfigError(lacking[0])


if __name__ == "__main__":
    run_script(main, __doc__)
