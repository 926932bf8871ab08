"""`model.compile`: torch.compile of what repeats in a network, its blocks, and of its decoder.

A network compiled as a whole takes minutes to its first step, and again for each size of images.
Its blocks share code: MiT-B5's 52 blocks are four functions, one for each width.
"""

import contextlib
import contextvars
import functools

import torch
from torchvision.ops import StochasticDepth

CODES = 64  # forms of blocks that may be compiled; PyTorch's 8 are few, and others run as they are
mode = contextvars.ContextVar("mode", default=False)  # `model.compile` of the pass that runs


@contextlib.contextmanager
def compiling(value):
    """Within it, `caller` is compiled, in the mode that `model.compile` names."""
    before = mode.set(value)
    try:
        yield
    finally:
        mode.reset(before)


def compiles(by_default):
    """Decorator of a network's method: its blocks are compiled as the network's `compiled` says, if
    the caller says so too (the keyword `compiled`) or it is the default."""

    def decorate(method):
        @functools.wraps(method)
        def inner(network, *arguments, compiled=by_default, **options):
            with compiling(compiled and network.compiled):
                return method(network, *arguments, **options)

        return inner

    return decorate


def called(block, *inputs):
    return block(*inputs)


@functools.cache
def compiled(mode):
    """`called`, compiled: blocks of one class and width share its code, for each size of maps.

    Code for any size takes longer to compile, and of MiT's blocks PyTorch 2.14 makes none.
    """
    torch._dynamo.config.cache_size_limit = CODES
    # Random numbers as without compilation.
    options = {"triton.cudagraphs": mode == "reduce-overhead", "fallback_random": True}
    return torch.compile(called, dynamic=False, options=options)


def caller():
    """What calls a block in the pass that runs: f(block, *inputs)."""
    return compiled(mode.get()) if mode.get() else called


class DropPath(StochasticDepth):
    """Leaves a residual out for some images of a batch, by a rate that compiled code reads.

    A number would become a part of the code, and each block, with its own rate, had its own.
    """

    def __init__(self, rate):
        super().__init__(rate, "row")
        self.register_buffer("kept", torch.tensor(1 - rate), persistent=False)

    def forward(self, x):
        if not (self.training and torch.compiler.is_compiling()):
            return super().forward(x) if self.training else x  # not compiled with the number either
        kept = torch.bernoulli(self.kept.expand(len(x), *[1] * (x.ndim - 1))) / self.kept
        return x * kept.to(x.dtype)


def rates_as_tensors(network):
    """Make every StochasticDepth of a network a DropPath, unless all rates are 0."""
    found = [
        (parent, name, child.p)
        for parent in network.modules()
        for name, child in parent.named_children()
        if type(child) is StochasticDepth and child.mode == "row"
    ]
    for parent, name, rate in found if any(rate for *_, rate in found) else ():
        setattr(parent, name, DropPath(rate))
