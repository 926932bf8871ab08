"""What a classifier costs on one network: training step, inference, peak memory.

The paper of CBP compares them so with GMMSeg.

    python -m benchmarks.classifiers [--device cuda] [--classes 150] [--batch 8] [--size 256 320]
    python -m benchmarks.classifiers --rows CBP "CBP + OCCL" [--rounds 5]   # what OCCL adds

Ratios are to the first row. The features have `--width 256` channels, at least as many as there are
classes. `--queue 32000` pixels per component take 6.1 GB with 150 classes; `--memory-of ROW` prints
the memory of one row alone, as JSON.

ResNet-18 and DeepLabV3+, the losses of each method, AdamW, and the classifier's own update, with
the paper's constants and full queues. Times are interleaved as in benchmarks/kernels.py; a time of
training is that of five steps, with one M step, divided by five. Memory is the peak of a process of
its own that makes two steps with one M step: its resident set on the CPU, with what PyTorch itself
takes; what the allocator gave out on a GPU. State is what the classifier keeps in buffers, which a
teacher keeps again.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.kernels import arguments, compare, patches, record
from engine.build import build
from engine.statistics import IGNORE
from engine.step import evidence
from losses.build import build_losses
from models.backbones.resnet import ResNet
from models.classifiers._components import Ring
from models.decoders.deeplabv3plus import DeepLabV3Plus
from models.segmentor import Segmentor

CROSS = {"name": "cross_entropy.CrossEntropy"}
CONTRAST, DISTANCE = (
    {"name": "protoseg.Contrast", "weight": 0.01},
    {"name": "protoseg.Distance", "weight": 0.001},
)
GAUSSIAN = {"name": "gmmseg.Contrast", "weight": 0.01}
STEPS = 5  # from one M step to the next
ROWS = {  # name: (classifier, losses beside cross-entropy)
    "linear": ({"name": "linear.Linear"}, []),
    "CBP": ({"name": "cbp.CBP"}, []),
    "CBP + OCCL": ({"name": "cbp.CBP"}, [{"name": "occl.OCCL", "split": "random"}]),
    "ProtoSeg": ({"name": "protoseg.ProtoSeg"}, [CONTRAST, DISTANCE]),
    "DNC": ({"name": "protoseg.ProtoSeg", "memory": 100}, []),
    "GMMSeg, moments": ({"name": "gmmseg.GMMSeg"}, [GAUSSIAN]),
    "GMMSeg, queue": ({"name": "gmmseg.GMMSeg", "queue": 32000}, [GAUSSIAN]),
}


class Row:
    """The network with one classifier, and what is done with it."""

    def __init__(self, name, options):
        classifier, losses = ROWS[name]
        if "queue" in classifier:
            classifier = classifier | {"queue": options.queue}
        device, k = torch.device(options.device), options.classes
        torch.manual_seed(0)
        backbone = ResNet(depth=18, stages=3, output_stride=16, weights="none")
        decoder = DeepLabV3Plus(
            in_channels=backbone.channels, strides=backbone.strides, width=options.width
        )
        with device:  # a queue is not made twice
            classifier = build(
                "models.classifiers", classifier, in_channels=options.width, num_classes=k
            )
        for ring in (
            m for m in classifier.modules() if isinstance(m, Ring)
        ):  # written, or it would take no memory yet
            ring.rows.fill_(ring.rows.shape[2] ** -0.5)
            ring.count.fill_(ring.rows.shape[1])
        self.model = Segmentor(backbone, decoder, classifier, frozen_bn=["backbone"])
        self.model = self.model.to(device, memory_format=torch.channels_last).train()
        self.terms, self.weights = build_losses(
            [CROSS, *losses], num_classes=k, in_channels=options.width, seed=0
        )
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-4
        )
        self.views = {"source": torch.rand(options.batch, 3, *options.size, device=device)}
        labels = patches(options.batch, *options.size, k).to(device)
        self.labels = {"source": torch.where(labels < k, labels, IGNORE)}
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled={"bf16": True, "fp32": False}[options.precision]
        )
        self.device, self.count = device, 0
        self.taken = torch.zeros((), dtype=torch.bool, device=device)  # no step is skipped

    def step(self):
        """A training step, as train_supervised.py makes it."""
        classifier = self.model.classifier
        step = record(self.views, self.labels, prototypes={"classifier": classifier})
        step.number, step.skipped = self.count, self.taken
        with self.autocast:
            step.outputs = self.model(step.views)
        sum(self.weights[name] * term(step) for name, term in self.terms.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        classifier.update(evidence([step], "source"), step)
        self.count += 1
        self.wait()

    def train(self):
        for _ in range(STEPS):
            self.step()

    @torch.no_grad()
    def infer(self):
        """Logits of the batch at feature size."""
        with self.autocast:
            self.model.eval().segment(self.views["source"])
        self.model.train()
        self.wait()

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def state(self):
        """Megabytes of the classifier's buffers."""
        return sum(b.numel() * b.element_size() for b in self.model.classifier.buffers()) / 2**20


def memory(name, options):
    """Peak and state of a row in megabytes; in a process of its own."""
    row = Row(name, options)
    row.count = STEPS - 2  # the second step makes the M step
    row.step()
    row.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if row.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return peak, row.state()


def main():
    options = arguments(
        "classifiers",
        device="cuda" if torch.cuda.is_available() else "cpu",
        precision="fp32",
        rounds=5,
        classes=150,
        width=256,
        batch=8,
        size=[256, 320],
        queue=32000,
        rows=[*ROWS],
        memory_of="",
    )
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options)))
        return
    peaks = {}
    for name in options.rows:
        command = [
            sys.executable,
            "-m",
            "benchmarks.classifiers",
            *sys.argv[1:],
            "--memory-of",
            name,
        ]
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )
        if found.returncode:
            sys.exit(found.stderr)
        peaks[name] = json.loads(found.stdout)
    rows = {name: Row(name, options) for name in options.rows}
    steps = compare({name: row.train for name, row in rows.items()}, options.rounds)
    inference = compare({name: row.infer for name, row in rows.items()}, options.rounds)
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {options.threads} thread(s)"
    )
    height, width = options.size
    crops = f"{options.batch} crops of {height} x {width}"
    print(f"{crops}, {options.classes} classes, {options.precision}, {where}\n")
    heads = [
        "classifier",
        "step, ms",
        "ratio",
        "inference, ms",
        "ratio",
        "peak, MB",
        f"more than {options.rows[0]}",
    ]
    print(f"| {' | '.join(heads)} | state, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.rows:
        (step, slower), (look, later), (peak, state) = steps[name], inference[name], peaks[name]
        more = peak - peaks[options.rows[0]][0]
        print(
            f"| {name} | {step / STEPS:.1f} | {slower:.3g} | {look:.1f} | {later:.3g} | "
            f"{peak:.0f} | {more:+.0f} | {state:.1f} |"
        )


if __name__ == "__main__":
    main()
