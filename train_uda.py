"""Unsupervised domain adaptation: labelled source, unlabelled target, an averaged teacher, one or several stages.

    python train_uda.py configs/toy/uda_self_training.yaml
    torchrun --nproc_per_node=4 train_uda.py configs/... optimizer.lr=1e-4

A run is a composition of parts that the configuration names: a labeler (pseudo labels), a mixer (views) and losses.
None owns a trainable parameter, so the loop is the same for every method. The same command goes on where a killed run
stopped, in whatever stage.
"""

import contextlib
import logging
import time
from pathlib import Path

from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.base import IGNORE, to_device
from datasets.sampler import StreamSampler, make_loader
from engine import checkpoint, config, distributed, precision, schedule, weights
from engine.build import build, build_data, build_losses, build_segmentor, call
from engine.ema import Teacher
from engine.errors import run
from engine.log import Averages, Log, facts, to_console
from engine.preempt import Preemption
from engine.report import draw_similarity, draw_views, final_report, validate
from engine.statistics import resize_labels
from models.segmentor import View

logger = logging.getLogger("engine")


def initial_network(cfg, num_classes, previous):
    """The student at the start of a stage: pretrained as configured, the last stage's, or that of a checkpoint."""
    init = cfg.stage.init
    if init == "previous" and previous is None:
        raise config.ConfigError(f"stage {cfg.stage.name}: init: previous, but there is no stage before it")
    network = build_segmentor(cfg.model, num_classes, pretrained=init == "imagenet")
    if init == "previous":
        network.load_state_dict(previous.state_dict())
    elif init != "imagenet":
        weights.load_into(network, checkpoint.load(init)["model"], source=init)
    return network


def make_batches(dataset, cfg, number, start, device):
    """The micro-batches of a data set for one process, from a step of this stage on."""
    sampler = StreamSampler(
        len(dataset), batch_size=cfg.train.batch_size, accumulate=cfg.train.accumulate, start=start,
        stop=cfg.train.iters, seed=dataset.seed * 1009 + number, rank=distributed.rank(),
        world_size=distributed.world_size(),
    )  # fmt: skip
    return iter(make_loader(dataset, sampler, cfg.data.workers, pin_memory=device.type == "cuda"))


def train_stage(run_config, cfg, number, offset, data, saved, previous, log, device, preemption, clock):
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
    source_set, val_set, _, target_set = data
    num_classes, world, folder = len(source_set.CLASSES), distributed.world_size(), Path(cfg.folder)
    distributed.seed_everything(cfg.seed + 1009 * number)
    model = build_segmentor(cfg.model, num_classes, False) if saved else initial_network(cfg, num_classes, previous)
    model = model.to(device)
    if cfg.model.sync_bn and device.type == "cuda" and world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    context = {"num_classes": num_classes, "in_channels": model.decoder.channels, "seed": cfg.seed}
    members = {name: build("models.prototypes", spec, **context) for name, spec in cfg.prototypes.items()}
    members = nn.ModuleDict(members).to(device)
    terms, factors = build_losses(cfg.losses, **context)
    labeler = build("losses", cfg.uda.labeler, **context) if cfg.uda.labeler["name"] != "none" else None
    mixer = build("datasets", cfg.uda.mixer, **context)
    teacher = None
    if cfg.stage.teacher == "ema":
        teacher = Teacher(model, cfg.train.teacher)
    elif cfg.stage.teacher == "frozen":
        teacher = Teacher(previous if previous is not None else model, 1.0).to(device)
    if labeler and not teacher:
        raise config.ConfigError(f"stage {cfg.stage.name}: a labeler needs a teacher: ema or frozen")
    optimizer = schedule.make_optimizer(model, cfg.optimizer)
    scaler = precision.make_scaler(device, cfg.precision)
    autocast = precision.autocast(device, cfg.precision)
    student = model
    if world > 1:
        devices = [device.index] if device.type == "cuda" else None
        student = DistributedDataParallel(model, devices, broadcast_buffers=False)
    stateful = {"model": model, "prototypes": members, "optimizer": optimizer, "scaler": scaler}
    stateful |= {"teacher": teacher} if teacher else {}
    start, best = 0, -1.0
    if saved:
        for name, item in stateful.items():
            item.load_state_dict(saved[name])
        start, best = saved["stage_step"], saved["best"]
    reported = teacher.network if teacher and cfg.eval.weights == "teacher" else model
    distributed.seed_everything(cfg.seed + 1009 * number + distributed.rank())
    sources = make_batches(source_set, cfg, number, start, device)
    targets = make_batches(target_set, cfg, number, start, device)
    if saved:
        checkpoint.set_rng_state(saved["rng"])
    vectors = {"classifier": model.classifier, **members}
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages, overflow, stop = Averages(), precision.StepCounter(), False

    def content(step):
        """What a checkpoint holds after `step` steps of this stage."""
        state = {name: item.state_dict() for name, item in stateful.items()}
        facts = {"classes": list(source_set.CLASSES), "palette": [list(map(int, c)) for c in source_set.PALETTE]}
        rng = distributed.gather(checkpoint.rng_state())
        return state | facts | {
            "step": offset + step, "stage": number, "stage_step": step, "best": best, "seconds": clock(), "rng": rng,
            "config": config.plain(run_config),
        }  # fmt: skip

    # --- train ---
    model.train()
    steps = range(start, cfg.train.iters)
    bar = tqdm(steps, cfg.stage.name, initial=start, total=cfg.train.iters, disable=not distributed.is_main())
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
            with autocast:
                labels, trust = labeler.before(batch, teacher, step) if labeler else ({}, {})
            views, labels, trust = mixer(batch, labels | {"source": batch["source"]["label"]}, trust)
            views = {name: View(*view) for name, view in views.items()}
            # Pseudo labels exist only now, so their number is that of the micro-batch, over all processes.
            pseudo = {name: y for name, y in labels.items() if name != "source"}
            valid = {name: distributed.mean((y != IGNORE).sum().double()) for name, y in pseudo.items()}
            valid["source"] = of_source
            samples = {name: batch["source" if name == "source" else "target"]["sample"] for name in views}
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last or world == 1 else student.no_sync():
                with autocast:
                    outputs = student(views, step)
                losses = {
                    name: call(
                        term, outputs=outputs, labels=labels, weights=trust, valid=valid, samples=samples,
                        prototypes=vectors, step=step,
                    )
                    for name, term in terms.items()
                }  # fmt: skip
                loss = sum(factors[name] * value for name, value in losses.items()) / cfg.train.accumulate
                scaler.scale(loss).backward()
            features = outputs["source"].features.detach()
            seen.append((features, resize_labels(labels["source"], features.shape[-2:]), None))
            named = {f"train/loss_{name}": value for name, value in losses.items()}
            named |= {f"uda/weight_{name}": value.mean() for name, value in trust.items()}
            averages.add({"train/loss": loss * cfg.train.accumulate, **named})

        norm, taken = precision.step(optimizer, scaler, parameters, cfg.optimizer.clip)
        optimizer.zero_grad(set_to_none=True)
        overflow(taken, step)
        if taken:
            if cfg.stage.teacher == "ema":
                teacher.update(model)
            for member in members.values():
                member.update(seen)

        # --- log, validate, save ---
        done, total = step + 1, offset + step + 1
        stop = preemption.requested()
        final = done == cfg.train.iters
        save = stop or final or done % cfg.checkpoint.every == 0
        check = not stop and (final or (cfg.eval.every and done % cfg.eval.every == 0))
        if save or check or done % cfg.log.every == 0:
            values = averages.take(total)
            values |= {f"train/lr_{name}": value for name, value in rates.items()} | {"train/grad_norm": float(norm)}
            values |= {"train/amp_scale": scaler.get_scale()} if scaler.is_enabled() else {}
            log.scalars(values | log.speed(total - 1, cfg.train.batch_size, device), total)
            bar.set_postfix_str(f"loss {values['train/loss']:.3f}")
        if distributed.is_main() and cfg.log.images_every and (done % cfg.log.images_every == 0 or step == start):
            draw_views(log, total, views, labels, outputs, source_set)
            draw_similarity(log, total, vectors, source_set)
        if check:  # on the source: the target's labels choose nothing
            score = validate(reported, val_set, cfg.eval, device, autocast, log, total)
            if score > best:
                best = score
                checkpoint.save_best(folder, content(done))
        if save:
            checkpoint.save_step(folder, content(done), cfg.checkpoint.keep, final or stop)
        if stop:
            logger.info(f"signal received: saved at step {done} of stage {cfg.stage.name}; the same command goes on")
            break
    return reported, stop


@record
def main(arguments):
    cfg = config.load(arguments[0], arguments[1:])
    device = distributed.setup(cfg)
    to_console()
    stages = config.stages(cfg)
    data = [build_data(stage) for stage in stages]  # all of them first: a mistake should not show up only after hours
    if any(target is None for *_, target in data):
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
    logger.info(f"{folder}: stages {', '.join(f'{s.stage.name} ({s.train.iters} steps)' for s in stages)}")
    logger.info(", ".join(f"{key} {value}" for key, value in about.items()))

    def clock():
        return spent + time.time() - began

    offset, network, stop = 0, None, False
    for number, stage in enumerate(stages):
        if not saved or number >= saved["stage"]:
            here = saved if saved and saved["stage"] == number else None
            logger.info(
                f"stage {stage.stage.name}: " + (f"resumed at step {here['stage_step']}" if here else "started")
            )
            arguments = (offset, data[number], here, network, log, device, preemption, clock)
            network, stop = train_stage(cfg, stage, number, *arguments)
            if stop:
                break
        offset += stage.train.iters
    if not stop:
        about |= {"step": total, "seconds": round(clock())}
        autocast = precision.autocast(device, cfg.precision)
        final_report(network, data[-1][2] or {"val": data[-1][1]}, stages[-1].eval, device, autocast, folder, about)
    log.close()


if __name__ == "__main__":
    run(main, __doc__)
