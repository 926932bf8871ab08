"""What all three scripts do alike, around the method that each of them shows.

The script calls it; it calls nothing back.

run = Run(cfg, device)                      # finds the checkpoint to go on from
model = ...                                 # a typo shows before the run folder is touched
student = run.equip(model, cfg)             # makes optimiser, scaler and autocast
run.open(model, iters, train=train_set)     # claims the folder, compares configuration and data
run.begin({"model": model, ...}, ...)       # loads their states, if the run goes on
for number in run.steps():                  # sets the learning rate
    ...
    run.scaler.scale(loss).backward()
    run.add(losses)                         # of a micro-batch
    skipped = run.optimise()
    run.log()
    if run.validates:
        run.score(validate(...))            # may end the steps: eval.patience
    run.save()
"""

import logging
import signal
import time
from pathlib import Path

from tqdm import tqdm

from engine import checkpoint, config, distributed, precision, schedule
from engine.errors import UserError
from engine.guard import Guard, end_at
from engine.log import (
    Averages,
    Log,
    claim,
    facts,
    interactive,
    profiled,
    release,
    summary,
    to_console,
)
from engine.process import signals

logger = logging.getLogger("engine")


class Run:
    """A run folder and where the run in it stands.

    Attributes:
        saved: the checkpoint that the run goes on from, None at a fresh start; its parts are
            dropped once steps begin.
        named: its path, if the user has named it.
        at: number of the stage that it is in.
        resumed: the current stage goes on from it.
        done, iters: steps of the current stage that are done, and that it has.
        stopped: a signal was received, or the console is gone: the script leaves.
        known: {data set: ConfusionMatrix} of the last validation.
        best, waited: the best validation of the stage, and how many came after it.
        pending: the last step is still to be validated; a signal came before.
        validates: the last step is to be validated now.
        optimizer, scaler, autocast: of the current stage, with the configuration `stage`.
        about: facts for the results of the run.
    """

    def __init__(self, cfg, device):
        signals.install()
        to_console()
        self.cfg, self.device, self.folder = cfg, device, Path(cfg.folder)
        # Before anything in it is read or removed: another run may be saving there.
        try:
            begun = self.folder.is_dir()
        except OSError as error:  # a name that is too long
            raise UserError(f"cannot write the run folder {self.folder} ({error})") from None
        if begun:
            claim(self.folder)
        self.path, self.saved = checkpoint.find(cfg)
        self.named = self.path if self.path == Path(cfg.resume) else None
        self.spent, self.began = self.saved["seconds"] if self.saved else 0.0, time.monotonic()
        self.stopped, self.known, self.at = False, {}, self.saved and self.saved.get("stage", 0)

    def open(self, model, total, **datasets):
        """Make the run folder, or compare it with the run that goes on in it.

        Args:
            model: network, whose size is logged.
            total: steps of all stages.
            datasets: those that are trained on, by name.
        Raises:
            UserError: another run has it; another configuration or other data than the
                checkpoint's.
        """
        claim(self.folder)
        self.data = {name: checkpoint.fingerprint(dataset) for name, dataset in datasets.items()}
        if self.saved:
            checkpoint.check_same(self.path, self.saved, self.cfg, self.data)
        start, self.total = self.saved["step"] if self.saved else 0, total
        if distributed.is_main():
            checkpoint.tidy(self.folder, start, self.named)
            config.save(self.cfg, self.folder / "config.yaml")
        self.writer = Log(self.folder, start)
        self.about = facts(self.device) | {"seed": self.cfg.seed, "iters": total}
        logger.info(
            f"{self.folder}: "
            + "".join(f"{name} {len(dataset)} images, " for name, dataset in datasets.items())
            + f"{total} steps; "
            + (f"goes on from {self.path}" if self.saved else "started")
        )
        logger.info(", ".join(f"{key} {value}" for key, value in self.about.items()))
        logger.info(summary(model, self.cfg.data.augment))

    def equip(self, model, stage):
        """Optimiser, scaler and autocast of a stage, by its configuration.

        Returns:
            what to call in training: the network, or DDP around it.
        """
        self.stage, self.optimizer = stage, schedule.make_optimizer(model, stage.optimizer)
        self.scaler = precision.make_scaler(self.device, stage.precision)
        self.autocast = precision.autocast(self.device, stage.precision)
        return distributed.parallel(model, self.device)

    def begin(self, parts, dataset, *, seed, name="train", number=0, offset=0, keep=None, **more):
        """Start a stage, or go on in it.

        Args:
            parts: {name: module} whose states make up a checkpoint with those of `equip`; "model"
                is among them. None stands for a part that there is not.
            dataset: whose classes and palette a checkpoint names.
            seed: of what differs between processes from here on, such as dropout.
            number, offset: of the stage, and the steps of the stages before it.
            keep: name of a file in the run folder for the network at the end of the stage.
            more: what else a checkpoint holds.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None} | {
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        self.dataset, self.seed, self.name = dataset, seed, name
        self.offset, self.keep, self.more = offset, keep, more
        self.iters, self.resumed = self.stage.train.iters, self.at == number
        self.done, self.best, self.waited, self.pending = 0, -1.0, 0, False
        if self.resumed:
            for name, part in self.parts.items():
                checkpoint.restore(part, name, self.saved, self.path)
            self.done = self.saved.get("stage_step", self.saved["step"])
            self.pending = self.saved.get("pending", False)
            if not self.named:  # the best network of another run is not in this folder
                self.best, self.waited = self.saved["best"], self.saved.get("waited", 0)
        self.guard = Guard(self.parts["model"], self.device, self.stage.precision == "fp16")
        self.first, self.averages, self.losses, self.laps = self.done, Averages(), {}, []

    def seconds(self):
        """Seconds spent on the run, by all processes that went on from each other."""
        return self.spent + time.monotonic() - self.began

    def exhausted(self):
        """Whether eval.patience validations have passed without a better one."""
        return 0 < self.stage.eval.patience <= self.waited

    def steps(self, **streams):
        """Numbers of the steps that are left. A signal ends them after the current one, and so does
        a validation by which the run is `exhausted`.

        Args:
            streams: the datasets.build.Stream of each domain, for a step that is to be replayed.
        """
        self.streams = streams
        distributed.seed_everything(self.seed + distributed.rank())
        if self.resumed:
            checkpoint.set_rng_state(self.saved["rng"])
            for name in self.parts:  # twice the network's memory, and more
                self.saved.pop(name, None)
        self.bar = tqdm(
            range(self.done, self.done if self.exhausted() else self.iters),
            self.name,
            total=self.iters,
            initial=self.done,
            disable=not (distributed.is_main() and interactive()),
        )
        signals.gentle = True
        try:
            for number in precision.marked(
                profiled(self.bar, self.stage.log.profile, self.folder, self.device),
                self.stage.model.compile,
            ):
                self.started = time.monotonic()
                self.guard.begin(number)
                self.rates = schedule.set_rates(
                    self.optimizer, number, self.iters, self.stage.schedule
                )
                yield number
                # Once more: the next thing is another stage or the report, and may take long.
                self.stopped = self.stopped or (self.final and signals.requested())
                if self.stopped:
                    logger.info(
                        f"{signal.Signals(signals.received or signal.SIGTERM).name}: saved at step "
                        f"{self.offset + self.done}; the same command goes on from there"
                    )
                if self.stopped or self.final:
                    return
        finally:
            signals.gentle = False

    def add(self, losses, **values):
        """Scalars of a micro-batch: the losses, which must be finite, and others. Never waits."""
        self.losses = {k: self.losses.get(k, 0) + loss.detach() for k, loss in losses.items()}
        self.averages.add({f"train/{name}": value for name, value in losses.items()} | values)

    def optimise(self):
        """Clip, step, and clear the gradients.

        Returns:
            0-dim bool: the step was skipped, and nothing may learn from it.
        """
        self.norm = precision.clip(self.optimizer, self.scaler, self.stage.optimizer.clip)
        skipped = self.guard.judge(self.done, self.losses, self.norm)
        precision.step(self.optimizer, self.scaler, skipped)
        self.losses = {}
        return skipped

    def log(self):
        """The end of a step: count it, and write a line where one is due.

        Raises:
            NonFinite: a step since the last line was not finite.
        """
        self.done += 1
        self.laps.append(time.monotonic() - self.started)
        signals.slowest = max(signals.slowest, self.laps[-1])
        self.stopped = signals.requested()
        self.final = self.done == self.iters
        due = self.final or self._every(self.stage.eval.every)
        self.saves = self.final or self.stopped or self._every(self.stage.checkpoint.every)
        self.validates = due and not self.stopped
        # After a signal it is left to the process that goes on.
        self.pending = self.pending or (due and self.stopped)
        if not (due or self.saves or self._every(self.stage.log.every)):
            return
        if failure := self.guard.check():
            self.done, self.pending = failure[0], False
            end_at(*failure, self._content(), self.streams, self.folder)
        values = (
            self.averages.take()
            | {f"train/lr_{name}": rate for name, rate in self.rates.items()}
            | {
                "train/grad_norm": float(self.norm),
                "train/waiting": sum(s.waited() for s in self.streams.values()) / sum(self.laps),
            }
            | precision.figures(self.scaler)
        )
        eta = self.writer.progress(
            self.offset + self.done,
            self.total,
            values,
            self.laps,
            self.stage.train.batch_size,
            self.device,
        )
        self.bar.set_postfix_str(f"loss {values['train/loss']:.3f}, all done in {eta}")
        self.laps = []

    def _every(self, steps):
        return steps > 0 and self.done % steps == 0

    def score(self, score):
        """The validation of the network at this step: the best one is kept.

        Args:
            score: None where a signal cut it short.
        """
        late, self.pending = self.pending, score is None
        if self.pending:
            self.stopped = self.saves = True
        elif score > self.best:
            self.best, self.waited = score, 0
            checkpoint.save_light(self.folder / "best.pt", self._content())
        else:
            self.waited += 1
            if self.exhausted():
                self.final = self.saves = True
        if late and not self.pending:
            # The checkpoint that a signal left is now what it would have been.
            checkpoint.save_step(
                self.folder,
                self.saved | {"best": self.best, "waited": self.waited, "pending": False},
                self.stage.checkpoint.keep,
            )

    def save(self):
        """A checkpoint, where one is due."""
        if self.saves:
            content, last = self._content(), self.final or self.stopped
            # First: a run that goes on at the end of the stage would never make it.
            if self.final and self.keep:
                checkpoint.save_light(self.folder / self.keep, content, required=True)
            checkpoint.save_step(self.folder, content, self.stage.checkpoint.keep, last)

    def _content(self):
        return checkpoint.content(
            self.parts,
            self.dataset,
            step=self.offset + self.done,
            best=self.best,
            waited=self.waited,
            seconds=self.seconds(),
            config=config.plain(self.cfg),
            pending=self.pending,
            data=self.data,
            **({"stage_step": self.done, **self.more} if self.more else {}),
        )

    def close(self):
        """Leave the run folder.

        Returns:
            exit code: 129 after a hang-up, which nobody could see otherwise, and 0 after the
            signals of schedulers and people.
        """
        self.writer.close()
        release(self.folder)
        return 128 + signal.SIGHUP if signals.received == signal.SIGHUP else 0
