"""What an evaluation takes in memory above its network: 150 classes, 1024 x 2048 pixels.

    python -m benchmarks.memory [--classes 150] [--size 1024 2048] [--stride 16] [--modes flip]

Logits are random and have the stride of a ResNet-18 without dilation of its last stage; the network
itself is left out, so that nothing of it hides in the peak. That is the high-water mark of a
process of its own (Linux), less its size before the picture. Seconds are those of resizing and
choosing.
"""

import json
import math
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

from benchmarks.kernels import arguments
from engine.inference import classify

MODES = {
    "whole": {},
    "slide": {"mode": "slide"},
    "flip": {"flip": True},
    "scales": {"scales": [0.75, 1.0, 1.25], "flip": True},
}


class Logits:
    """Random logits at a stride, in place of a network."""

    def __init__(self, classes, stride):
        self.classes, self.stride = classes, stride

    def segment(self, image):
        height, width = (math.ceil(side / self.stride) for side in image.shape[-2:])
        return SimpleNamespace(logits=torch.randn(1, self.classes, height, width))


def peak():
    """High-water mark in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(mode, options):
    """MiB and seconds of one picture."""
    protocol = {"mode": "whole", "short_side": 0, "scales": [1.0], "flip": False}
    protocol |= {"crop": [512, 1024], "stride": [341, 683]}
    protocol = SimpleNamespace(**(protocol | MODES[mode]))
    network = Logits(options.classes, options.stride)
    classify(network, torch.rand(1, 3, 64, 64), protocol)  # what PyTorch itself takes
    image = torch.rand(1, 3, *options.size)
    before, start = peak(), time.process_time()
    classify(network, image, protocol)
    return peak() - before, time.process_time() - start


def main():
    defaults = {"classes": 150, "size": [1024, 2048], "stride": 16, "modes": [*MODES]}
    options = arguments("memory", **defaults, alone="")
    if options.alone:
        return print(json.dumps(measure(options.alone, options)))
    print("| mode | MiB above the network | s |\n|---|---|---|", flush=True)
    for mode in options.modes:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--alone", mode]
        mebibytes, seconds = json.loads(subprocess.check_output(command).splitlines()[-1])
        print(f"| {mode} | {mebibytes:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
