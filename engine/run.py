"""What all three scripts do alike, around the method that each of them shows. The script calls it; it calls nothing back.

run = Run(cfg, device)                      # finds the checkpoint to go on from
model = ...                                 # a typo shows before the run folder is touched
run.open(iters, train=train_set)            # claims the folder, compares configuration and data, opens the log
run.begin({"model": model, ...}, ...)       # loads their states, if the run goes on
for number in run.steps():
    ...
    run.add(losses)                         # of a micro-batch
    skipped = run.optimise(optimizer, scaler)
    run.log(rates, scaler)
    if run.validates():
        run.score(validate(...))
    run.save()
"""

import logging
import signal
import time
from pathlib import Path

from tqdm import tqdm

from engine import checkpoint, config, distributed, precision
from engine.guard import Guard, NonFinite
from engine.log import Averages, Log, claim, facts, interactive, release
from engine.process import signals

logger = logging.getLogger("engine")


class Run:
    """A run folder and where the run in it stands.

    Attributes:
        saved: the checkpoint that the run goes on from, None at a fresh start.
        resumed: the current stage goes on from it.
        done, iters: steps of the current stage that are done, and that it has.
        stopped: a signal was received, or the console is gone: the script leaves.
        known: {data set: ConfusionMatrix} of the last validation.
        pending: the last step is still to be validated; a signal came before.
        about: facts for the results of the run.
    """

    def __init__(self, cfg, device):
        signals.install()
        self.cfg, self.device, self.folder = cfg, device, Path(cfg.folder)
        # Before anything in it is read or removed: another run may be saving there.
        if self.folder.is_dir():
            claim(self.folder)
        self.path, self.saved = checkpoint.find(cfg)
        self.spent, self.began = self.saved["seconds"] if self.saved else 0.0, time.monotonic()
        self.resumed = self.stopped = self.pending = False
        self.known = {}

    def open(self, total, **datasets):
        """Make the run folder, or compare it with the run that goes on in it.

        Args:
            total: steps of all stages.
            datasets: those that are trained on, by name.
        Raises:
            UserError: another run has it; another configuration or other data than the checkpoint's.
        """
        claim(self.folder)
        self.data = {name: checkpoint.fingerprint(dataset) for name, dataset in datasets.items()}
        if self.saved:
            config.check_resume(self.saved["config"], self.cfg)
            checkpoint.check_data(self.path, self.saved.get("data", {}), self.data, self.cfg.resume)
        start, self.total = self.saved["step"] if self.saved else 0, total
        if distributed.is_main():
            checkpoint.tidy(self.folder, start, self.cfg.resume)
            config.save(self.cfg, self.folder / "config.yaml")
        self.writer = Log(self.folder, start)
        self.about = facts(self.device) | {"seed": self.cfg.seed, "iters": total}
        images = ", ".join(f"{name} {len(dataset)} images" for name, dataset in datasets.items())
        where = f"goes on from {self.path}" if self.saved else "started"
        logger.info(f"{self.folder}: {images}, {total} steps; {where}")
        logger.info(", ".join(f"{key} {value}" for key, value in self.about.items()))

    def resumes(self, number):
        """Whether a stage goes on from the checkpoint."""
        return bool(self.saved) and self.saved.get("stage", 0) == number

    def begin(
        self, parts, dataset, iters, *, seed, name="train", number=0, offset=0, keep=None, **more
    ):
        """Start a stage, or go on in it.

        Args:
            parts: {name: module, optimiser or scaler} whose states make up a checkpoint; "model" among them. None
                stands for a part that there is not.
            dataset: whose classes and palette a checkpoint names.
            seed: of what differs between processes from here on, such as dropout.
            number, offset: of the stage, and the steps of the stages before it.
            keep: name of a file in the run folder for the network at the end of the stage.
            more: what else a checkpoint holds.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.dataset, self.iters, self.seed, self.name = dataset, iters, seed, name
        self.offset, self.keep, self.more = offset, keep, more
        self.resumed = self.resumes(number)
        self.done, self.best, self.pending = 0, -1.0, False
        if self.resumed:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            self.done = self.saved.get("stage_step", self.saved["step"])
            self.best, self.pending = self.saved["best"], self.saved.get("pending", False)
        self.first = self.done
        self.guard = Guard(self.parts["model"], self.device, self.cfg.precision == "fp16")
        self.averages, self.losses, self.busy, self.laps = Averages(), {}, 0.0, 0

    def seconds(self):
        """Seconds spent on the run, by all processes that went on from each other."""
        return self.spent + time.monotonic() - self.began

    def steps(self, **streams):
        """Numbers of the steps that are left. A signal ends them after the current one.

        Args:
            streams: the datasets.build.Stream of each domain, for a step that is to be replayed.
        """
        self.streams = streams
        distributed.seed_everything(self.seed + distributed.rank())
        if self.resumed:
            checkpoint.set_rng_state(self.saved["rng"])
        hidden = not (distributed.is_main() and interactive())
        numbers = range(self.done, self.iters)
        signals.gentle = True
        try:
            for number in (
                bar := tqdm(numbers, self.name, initial=self.done, total=self.iters, disable=hidden)
            ):
                self.bar, self.started = bar, time.monotonic()
                self.guard.begin(number)
                yield number
                if self.stopped:
                    return
        finally:
            signals.gentle = False

    def add(self, losses, **values):
        """Scalars of a micro-batch: the losses, watched for what is not finite, and other values. Never waits."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach()
        self.averages.add({f"train/{name}": value for name, value in losses.items()} | values)

    def optimise(self, optimizer, scaler):
        """Clip, step, and clear the gradients -> 0-dim bool: the step was skipped, and nothing may learn from it."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = precision.clip(optimizer, scaler, parameters, self.cfg.optimizer.clip)
        skipped = self.guard.judge(self.done, self.losses, self.norm)
        precision.step(optimizer, scaler, skipped)
        optimizer.zero_grad(set_to_none=True)
        self.losses = {}
        return skipped

    def log(self, rates, scaler):
        """The end of a step: count it, and write a line where one is due.

        Args:
            rates: {group of parameters: learning rate}.
        Raises:
            NonFinite: a step since the last line was not finite.
        """
        self.done += 1
        spent = time.monotonic() - self.started
        signals.slowest = max(signals.slowest, spent)
        self.busy, self.laps = self.busy + spent, self.laps + 1
        self.stopped = signals.requested()
        self.due = self.done == self.iters or self._every(self.cfg.eval.every)
        self.saves = (
            self.stopped or self.done == self.iters or self._every(self.cfg.checkpoint.every)
        )
        if not (self.due or self.saves or self._every(self.cfg.log.every)):
            return
        try:
            self.guard.check()
        except NonFinite as error:
            self._fail(error)
        values = self.averages.take() | {f"train/lr_{name}": rate for name, rate in rates.items()}
        values["train/grad_norm"] = float(self.norm)
        if scaler.is_enabled():
            values["train/amp_scale"] = scaler.get_scale()
        pace, batch = self.busy / self.laps, self.cfg.train.batch_size
        eta = self.writer.progress(
            self.offset + self.done, self.total, values, pace, batch, self.device
        )
        self.bar.set_postfix_str(f"loss {values['train/loss']:.3f}, all done in {eta}")
        self.busy, self.laps = 0.0, 0

    def _every(self, steps):
        return steps > 0 and self.done % steps == 0

    def draws(self):
        """Whether pictures of this step are due, on this process."""
        every = self.cfg.log.images_every
        return (
            distributed.is_main()
            and every > 0
            and (self._every(every) or self.done == self.first + 1)
        )

    def validates(self):
        """Whether the step is to be validated now. After a signal it is left to the process that goes on."""
        self.pending = self.pending or (self.due and self.stopped)
        return self.due and not self.stopped

    def score(self, score):
        """The validation of the network at this step: the best one is kept. None: a signal cut it short."""
        late, self.pending = self.pending, score is None
        if self.pending:
            self.stopped = self.saves = True
        elif score > self.best:
            self.best = score
            checkpoint.save_light(self.folder / "best.pt", self._content())
        if (
            late and not self.pending
        ):  # the checkpoint that a signal left is now what it would have been
            known = self.saved | {"best": self.best, "pending": False}
            checkpoint.save_step(self.folder, known, self.cfg.checkpoint.keep)

    def save(self):
        """A checkpoint, where one is due."""
        if not self.saves:
            return
        content, final = self._content(), self.done == self.iters
        # First: a run that goes on at the end of the stage would never make it.
        if final and self.keep:
            checkpoint.save_light(self.folder / self.keep, content, required=True)
        checkpoint.save_step(self.folder, content, self.cfg.checkpoint.keep, final or self.stopped)
        if self.stopped:
            logger.info(
                f"{signal.Signals(signals.received or signal.SIGTERM).name}: saved at step {content['step']}; the same "
                "command goes on from there"
            )

    def _content(self):
        about = {"step": self.offset + self.done, "best": self.best, "seconds": self.seconds()}
        about |= {"config": config.plain(self.cfg), "pending": self.pending, "data": self.data}
        about |= {"stage_step": self.done, **self.more} if self.more else {}
        content = checkpoint.content(self.parts, self.dataset, **about)
        name = checkpoint.first_nonfinite({part: content[part] for part in self.parts})
        if distributed.any_process(name is not None):
            raise NonFinite(
                f"step {about['step']}: {name or 'a tensor of another process'} is not finite. Nothing was written over "
                "the checkpoints before. Lower optimizer.lr, or set optimizer.clip=1"
            )
        return content

    def _fail(self, error):
        """End the run at a step that was not finite, and keep what replays it."""
        if error.step is None:
            raise error
        self.done, self.pending = error.step, False
        number = self.offset + self.done + 1
        path, rng = self.folder / f"debug_step_{number:07d}.pt", distributed.gather(error.rng)
        content = self._content() | {"rng": rng, "reason": str(error)}
        if distributed.is_main():
            batches = {name: stream.whole(error.step) for name, stream in self.streams.items()}
            checkpoint.save(path, content | {"batch": batches}, required=False)
        raise NonFinite(
            f"step {number}: {error}. It was not taken, nor was one after it, and the checkpoints before are intact. "
            f"Lower optimizer.lr, set optimizer.clip=1, or use precision=fp32. To replay the step: resume={path}"
        )

    @property
    def exit_code(self):
        """129 after a hang-up, which nobody could see otherwise; 0 after signals of schedulers and people."""
        return 128 + signal.SIGHUP if signals.received == signal.SIGHUP else 0

    def close(self):
        self.writer.close()
        release(self.folder)
