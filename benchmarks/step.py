"""What a training step of a configuration costs, part by part: operators, host time, kernels.

    python -m benchmarks.step CONFIG [key=value ...] [--crop 128 128] [--batch 2] [--steps 3]

The script of the configuration runs its own loop on noise: no data, no weights, one process. Every
step sees the same batch with other numbers, so that mixers draw anew. Earlier stages take one step
each; the last one is measured, or `--stage NAME`.

An operator is a call that PyTorch dispatches, on a CPU too: what a GPU is launched by, and views.
A part has what runs in it and in no part within it. "losses" has their backward pass up to the
network's outputs, "student" the rest of it; "teacher" its update. Host time is of `--steps` steps
without any instrument; then one is counted, and on a GPU one profiled. The loss is the mean of the
timed steps: on two trees it must agree, with `model.backbone.drop_path=0` where they draw in
another order.
"""

import argparse
import bisect
import contextlib
import functools
import importlib
import itertools
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import train_dg
import train_supervised
import train_uda
from datasets import mixers, style
from datasets.build import Stream
from engine import config
from engine.ema import Teacher
from engine.log import peak_memory
from engine.run import Run
from losses.base import Labeler, Loss
from models.prototypes.base import Prototypes
from models.prototypes.text import write_rows
from models.segmentor import Segmentor

PARTS = ("student", "teacher", "mixer", "labelers", "losses", "prototypes", "optimiser", "rest")
NEVER, PICTURES, NONE = 10**9, 4, {"name": "none"}
# A first stage where labels need a network that has learnt something.
SOURCE = {
    "name": "start",
    "uda": {
        "labelers": [],
        "source_weights": NONE,
        "style": NONE,
        "mixer": {"name": "mixers.Source"},
    },
    "losses": [{"name": "cross_entropy.CrossEntropy"}],
    "teacher": "none",
}
METHODS = {  # {face: {method: part}}, of it and of every class below it
    Loss: {"__call__": "losses"},
    Labeler: dict.fromkeys(("before", "after", "update"), "labelers"),
    Prototypes: {"update": "prototypes"},
    mixers.Mixer: dict.fromkeys(("__call__", "after"), "mixer"),
    mixers.ColorBlur: {"__call__": "mixer"},
    style.Style: {"__call__": "mixer"},
    Teacher: {"update": "teacher", "segment": "teacher"},
    Segmentor: {"segment": "teacher"},
    Run: {"optimise": "optimiser"},
    torch.Tensor: {"backward": "losses"},
}


class Meter(TorchDispatchMode):
    """Operators and host seconds of the part that runs."""

    def __init__(self):
        super().__init__()
        self.part, self.profiled = "rest", False
        self.clear()

    def clear(self):
        self.operators, self.seconds, self.since = Counter(), Counter(), time.perf_counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators[self.part] += 1
        return function(*args, **(kwargs or {}))

    def enter(self, part):
        """Go on in another part -> the one before."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.since, before, self.part = now, self.part, part
        if self.profiled:
            with record_function(f"part {part}"):
                pass
        return before

    def within(self, part, function):
        """The function, as a part."""

        @functools.wraps(function)
        def measured(*args, **kwargs):
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return measured

    def attach(self, stack):
        """Wrap METHODS of all classes that are loaded by now, until the stack is closed."""

        def replace(owner, name, new):
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, new)

        Loss.__call__ = Loss.__call__  # of nn.Module, for losses alone
        stack.callback(delattr, Loss, "__call__")
        for face, methods in METHODS.items():
            faces = [face]
            for owner in faces:
                faces += [] if face is torch.Tensor else owner.__subclasses__()
                for name, part in methods.items():
                    if name in vars(owner):
                        replace(owner, name, self.within(part, vars(owner)[name]))
        forward = self.within("student", Segmentor.forward)

        def watched(*args):
            outputs = forward(*args)
            for output in outputs.values():
                for tensor in [*vars(output).values(), *output.layers]:
                    if torch.is_tensor(tensor) and tensor.requires_grad:
                        # The first gradient that arrives: the losses' backward pass is over.
                        tensor.register_hook(lambda gradient: self.enter("student") and None)
            return outputs

        replace(Segmentor, "forward", watched)


def kernels_of(profiler):
    """{part: (kernels, their seconds)}: a kernel belongs to the part in which it was launched."""
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    marks = [event for event in events if event.name.startswith("part ")]
    starts = [mark.time_range.start for mark in marks]
    number, seconds = Counter(), Counter()
    for event in events:
        place = bisect.bisect_right(starts, event.time_range.start) - 1
        part = marks[place].name.removeprefix("part ") if place >= 0 else "rest"
        number[part] += len(event.kernels)
        seconds[part] += sum(kernel.duration for kernel in event.kernels) / 1e6
    return number, seconds


def made_set(folder, classes, size):
    """Pictures of noise with labels in squares -> the specification of their data set."""
    draw = np.random.default_rng(0)
    cells = [-(-side // 16) for side in size]
    for name, shape in (("images", (*size, 3)), ("labels", cells)):
        (folder / name).mkdir()
        for i in range(PICTURES):
            drawn = draw.integers(0, 256 if name == "images" else len(classes), shape, np.uint8)
            if name == "labels":
                drawn = drawn.repeat(16, 0).repeat(16, 1)[: size[0], : size[1]]
            Image.fromarray(drawn).save(folder / name / f"{i}.png")
    return {
        "name": "folder.Folder",
        "root": str(folder),
        "split": "train",
        "image_dir": "images",
        "image_suffix": ".png",
        "label_dir": "labels",
        "classes": list(classes),
    }


def without_files(value, text):
    """A configuration that needs no weights and takes the text rows of `text`."""
    if isinstance(value, list):
        return [without_files(item, text) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: without_files(item, text) for key, item in value.items()}
    if "name" in value and "weights" in value:
        value["weights"] = "none"
    if value.get("name") == "text.Text":
        value = {k: v for k, v in value.items() if k not in ("rows", "map")} | {"file": text}
    return value


def prepared(options, folder):
    """Write the configuration that is run -> its path."""
    cfg = config.plain(config.load(options.config, options.overrides))
    train = cfg["data"]["train"]
    train = train[0] if isinstance(train, list) else train
    module, _, name = train["name"].partition(".")
    owner = getattr(importlib.import_module(f"datasets.{module}"), name)
    classes = train.get("classes") or owner.CLASSES
    augment = cfg["data"]["augment"]
    crop = options.crop or augment.get("crop") or augment["size"]
    made, joint = made_set(folder, classes, crop), cfg["model"]["heads"].get("projector", {})
    write_rows(folder / "text.pt", torch.randn(len(classes), joint.get("channels", 512)), classes)
    cfg = without_files(cfg, str(folder / "text.pt"))
    cfg["data"] |= {
        "train": made,
        "target": NONE if cfg["data"]["target"] == NONE else made,
        "test": {"made": made},
        "augment": {"name": "transforms.Augment", "crop": crop, "scale": [1.0, 1.0], "flip": 0.0},
        "rare_classes": {"temperature": 0.0, "min_pixels": 0},
        "cache": str(folder / "statistics"),
        **{"val": NONE, "monitor": NONE, "target_augment": NONE, "seen": [], "workers": 0},
    }
    cfg["model"] |= {"init": "none", "cache": "none"}
    cfg["model"]["backbone"]["weights"] = "none"
    cfg["train"] |= {"iters": NEVER} | ({"batch_size": options.batch} if options.batch else {})
    cfg["eval"] |= {"every": 0, "short_side": 0, "subsets": {}}
    cfg["log"] |= {"every": NEVER, "images_every": 0}
    cfg["checkpoint"] |= {"every": NEVER}
    cfg |= {"folder": str(folder / "run"), "resume": "none"}
    stages = cfg["stages"]
    if stages and stages[0].get("init", "imagenet") not in ("imagenet", "previous"):
        stages = [SOURCE, *stages]
    names = [stage.get("name", "main") for stage in stages]
    last = names.index(options.stage) if options.stage else len(stages) - 1
    cfg["stages"] = [
        {key: value for key, value in stage.items() if key not in ("data", "lr_scale")}
        | {"iters": 1 if i < last else NEVER, "init": "previous" if i else "imagenet", "repeat": 1}
        for i, stage in enumerate(stages[: last + 1])
    ]
    config.save(cfg, folder / "step.yaml")
    return folder / "step.yaml"


def measure(path, script, options, stack):
    """Run the script -> {column: {part: value of a step}}, loss, and what was run."""
    meter, result, losses, first = Meter(), {}, [], Stream.__next__
    steps, add = Run.steps, Run.add

    def repeated(stream):
        batch = vars(stream).get("repeated") or first(stream)
        stream.repeated = batch | {"sample": batch["sample"] + len(batch["sample"])}
        return batch

    def note(run, values, **more):
        losses.append(values["loss"].detach())
        return add(run, values, **more)

    def by_part(counter, factor=1.0):
        return {part: counter[part] * factor for part in PARTS}

    def measured(run, **streams):
        numbers, gpu = steps(run, **streams), run.device.type == "cuda"
        if run.iters < NEVER:
            yield from numbers
            return

        def several(count):
            return itertools.islice(numbers, count)

        wait = torch.cuda.synchronize if gpu else lambda: None
        yield from several(4)  # allocators, libraries and CUDA graphs warm up
        wait()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        meter.attach(stack)
        losses.clear()
        meter.clear()
        began = time.perf_counter()
        yield from several(options.steps)
        meter.enter("rest")
        wait()
        result["wall"] = 1e3 * (time.perf_counter() - began) / options.steps
        result["host, ms"] = by_part(meter.seconds, 1e3 / options.steps)
        result["memory"] = peak_memory(run.device)
        result["loss"] = float(torch.stack(losses).mean())
        result["run"] = run
        with meter:
            yield from several(1)
        result["operators"] = by_part(meter.operators)
        if gpu:
            meter.profiled = True
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                yield from several(1)
                wait()
            number, seconds = kernels_of(profiler)
            result["kernels"], result["kernels, ms"] = by_part(number), by_part(seconds, 1e3)
        run.stopped = True

    for owner, name, new in (
        (Stream, "__next__", repeated),
        (Run, "steps", measured),
        (Run, "add", note),
    ):
        stack.callback(setattr, owner, name, vars(owner)[name])
        setattr(owner, name, new)
    script.main([str(path)])
    return result


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--crop", type=int, nargs=2, default=None)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--stage", default="")
    options = parser.parse_intermixed_args(arguments)
    head = Path(options.config).read_text().partition(".py")[0]
    script = {
        "train_uda": train_uda,
        "train_dg": train_dg,
        "train_supervised": train_supervised,
    }[head.split()[-1]]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = prepared(options, Path(folder))
        result = measure(path, script, options, stack)
    run = result["run"]
    columns = [
        name for name in ("operators", "host, ms", "kernels", "kernels, ms") if name in result
    ]
    print(f"\n| part | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for part in (*PARTS, "step"):
        cells = (
            sum(result[name].values()) if part == "step" else result[name][part] for name in columns
        )
        print(f"| {part} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    print(
        f"\n{result['wall']:.1f} ms a step, {result['memory']:.2f} GiB, loss {result['loss']:.8f}; "
        f"{run.stage.train.batch_size} crops of {run.stage.data.augment.crop}, "
        f"{run.stage.precision}, {run.about['device']}, commit {run.about['commit']}"
    )
    return result


if __name__ == "__main__":
    main()
