"""The teacher: an exponential moving average of a network (Tarvainen and Valpola, Mean teachers, NeurIPS 2017).

It lives outside DDP and is identical on all processes, since every process averages the same weights.
"""

import copy

import torch
from torch import nn


class Teacher(nn.Module):
    """A copy of the student whose parameters follow it; buffers (batch statistics, prototypes) are copied.

    Args:
        student: network, not wrapped by DDP.
        momentum: alpha of teacher <- alpha teacher + (1 - alpha) student, with the ramp min(1 - 1 / (t + 1), alpha).
            The count t of updates is a buffer, so a resumed run goes on where it stopped.
    """

    def __init__(self, student, momentum):
        super().__init__()
        self.momentum = momentum
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.eval()

    @torch.no_grad()
    def update(self, student):
        """Call after each optimiser step that was taken."""
        self.updates += 1
        alpha = min(1 - 1 / (int(self.updates) + 1), self.momentum)
        mine, theirs = list(self.network.parameters()), list(student.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - alpha)
        for own, other in zip(self.network.buffers(), student.buffers(), strict=True):
            own.copy_(other)
