"""Supervised training: CBP + OCCL, or any classifier and losses that a configuration names.

    python train_supervised.py configs/toy/supervised.yaml
    python train_supervised.py configs/camvid/resnet18_cbp_occl.yaml data.root=PATH optimizer.lr=1e-4
    torchrun --nproc_per_node=8 train_supervised.py configs/camvid/resnet18_cbp_occl.yaml

The same command goes on where a killed run stopped. The run folder, the options and their units: configs/defaults.yaml.
"""

from torch.distributed.elastic.multiprocessing.errors import record

from datasets.build import Stream, build_data, count_classes
from engine import config, distributed, precision, schedule
from engine.ema import Teacher
from engine.log import to_console
from engine.process import run as run_script
from engine.report import draw_step, final_report, validate
from engine.run import Run
from engine.statistics import IGNORE
from engine.step import Batch, Step, View, evidence
from losses.build import build_losses
from models.build import build_prototypes, build_segmentor


@record
def main(arguments):
    cfg = config.load(arguments[0], arguments[1:])
    config.check_sections(cfg, "train_supervised")
    device = distributed.setup(cfg)
    to_console()
    run = Run(cfg, device)

    # --- build ---
    data = build_data(cfg)
    classes = tuple(data.train.CLASSES)
    model = build_segmentor(cfg.model, classes, pretrained=not run.saved)
    model = distributed.place(model, device, cfg.model.sync_bn)
    context = {"num_classes": len(classes), "in_channels": model.decoder.channels}
    context |= {"classes": classes, "seed": cfg.seed}
    context |= {"counts": lambda: count_classes(data.train, cfg)}
    members, view_of, _ = build_prototypes(cfg.prototypes, **context)
    members = members.to(device)
    prototypes = {"classifier": model.classifier, **members}
    losses, factors = build_losses(cfg.losses, **context)
    teacher = Teacher(model, cfg.train.teacher) if cfg.train.teacher else None
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    optimizer = schedule.make_optimizer(model, cfg.optimizer)
    scaler = precision.make_scaler(device, cfg.precision)
    autocast = precision.autocast(device, cfg.precision)
    student = distributed.parallel(model, device, cfg.model.compile)

    # --- resume ---
    run.open(cfg.train.iters, train=data.train)
    parts = {"model": model, "prototypes": members, "optimizer": optimizer, "scaler": scaler}
    run.begin(parts | {"teacher": teacher}, data.train, cfg.train.iters, seed=cfg.seed)
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
            step.views["source"] = View(batch.image)
            step.labels["source"] = batch.label
            step.counts["source"] = labelled
            with distributed.synced(student, batch is batches[-1]):
                with autocast:
                    step.outputs = student(step.views, number)
                terms = {name: loss(step) for name, loss in losses.items()}
                loss = sum(factors[name] * term for name, term in terms.items())
                scaler.scale(loss / len(batches)).backward()
            run.add({f"loss_{name}": term for name, term in terms.items()} | {"loss": loss})
            steps.append(step)

        step.skipped = run.optimise(optimizer, scaler)
        if teacher:
            teacher.update(model, step.skipped)
        for name, view in view_of.items():
            prototypes[name].update(evidence(steps, view), step)

        # --- log, validate, save ---
        run.log(rates, scaler)
        if run.draws():
            draw_step(run, step, data.train)
        if run.validates() and data.val:
            check()
        run.save()

    if not run.stopped:
        final_report(reported, data.test or {"val": data.val}, cfg.eval, autocast, run)
    run.close()
    return run.exit_code


if __name__ == "__main__":
    run_script(main, __doc__)
