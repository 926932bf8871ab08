"""Supervised training: CBP + OCCL, or any classifier and losses that a configuration names.

    python train_supervised.py configs/toy/supervised.yaml
    python train_supervised.py configs/camvid/resnet18_cbp_occl.yaml optimizer.lr=1e-4
    torchrun --nproc_per_node=8 train_supervised.py configs/camvid/resnet18_cbp_occl.yaml

The same command goes on where a killed run stopped. configs/defaults.yaml lists the run folder, the
options and their units.
"""

from torch.distributed.elastic.multiprocessing.errors import record

from datasets.build import Stream, build_data, count_classes
from engine import accepted, distributed
from engine.drawing import draw_step
from engine.ema import Teacher
from engine.process import run as run_script
from engine.report import final_report, validate
from engine.run import Run
from engine.statistics import IGNORE
from engine.step import Batch, Step, View, evidence
from losses.build import build_losses
from models.build import build_prototypes, build_segmentor


@record
def main(arguments):
    cfg = accepted.of_script("train_supervised", arguments)
    run = Run(cfg, distributed.setup(cfg))

    # --- build ---
    data = build_data(cfg)
    classes = tuple(data.train.CLASSES)
    model = build_segmentor(cfg.model, classes, pretrained=not run.saved)
    model = distributed.place(model, run.device, cfg.model.sync_bn)
    context = {
        "num_classes": len(classes),
        "in_channels": model.decoder.channels,
        "classes": classes,
        "seed": cfg.seed,
        "counts": lambda: count_classes(data.train, cfg),
    }
    members, view_of, _ = build_prototypes(cfg.prototypes, **context)
    members = members.to(run.device)
    prototypes = {"classifier": model.classifier, **members}
    losses, factors = build_losses(cfg.losses, model.heads, **context)
    teacher = Teacher(model, cfg.train.teacher) if cfg.train.teacher else None
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    student = run.equip(model, cfg)

    # --- resume ---
    run.open(model, cfg.train.iters, train=data.train)
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
            step.views["source"] = View(batch.image)
            step.labels["source"] = batch.label
            step.counts["source"] = labelled
            with distributed.synced(student, batch is batches[-1]):
                with run.autocast:
                    step.outputs = student(step.views, number)
                terms = {name: loss(step) for name, loss in losses.items()}
                loss = sum(factors[name] * term for name, term in terms.items())
                run.scaler.scale(loss / len(batches)).backward()
            run.add({f"loss_{name}": term for name, term in terms.items()} | {"loss": loss})
            steps.append(step)

        step.skipped = run.optimise()
        if teacher:
            teacher.update(model, step.skipped)
        for name, view in view_of.items():
            prototypes[name].update(evidence(steps, view), step)

        # --- log, validate, save ---
        run.log()
        draw_step(run, step, data.train)
        if run.validates and data.val:
            run.score(validate(reported, data.val, cfg.eval, run.autocast, run))
        run.save()

    if not run.stopped:
        final_report(reported, data.test or {"val": data.val}, cfg.eval, run.autocast, run)
    return run.close()


if __name__ == "__main__":
    run_script(main, __doc__)
