"""The teacher: an exponential moving average of a network (Tarvainen and Valpola, Mean teachers,
NeurIPS 2017).

It lives outside DDP and is identical on all processes, since every process averages the same
weights.
"""

import copy

import torch
from torch import nn


class Teacher(nn.Module):
    """A copy of the student whose parameters follow it; buffers (batch statistics, prototypes) are
    copied.

    Args:
        student: network, not wrapped by DDP.
        momentum: alpha of teacher <- alpha teacher + (1 - alpha) student, with the ramp min(1 - 1 /
            (t + 1), alpha). The count t of updates is a buffer, so a resumed run goes on where it
            stopped.
    """

    def __init__(self, student, momentum):
        super().__init__()
        self.momentum = momentum
        self.network = copy.deepcopy(student).requires_grad_(False)
        device = next(student.parameters()).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self.eval()

    @torch.no_grad()
    def update(self, student, skipped):
        """Call after each optimiser step. Where `skipped` (0-dim bool) is true, only buffers are
        copied."""
        self.updates += ~skipped
        alpha = (1 - 1 / (self.updates.double() + 1)).clamp_max(self.momentum)
        share = ((1 - alpha) * ~skipped).to(next(student.parameters()).dtype)
        mine, theirs = list(self.network.parameters()), list(student.parameters())
        change = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(mine, change)
        torch._foreach_copy_(list(self.network.buffers()), list(student.buffers()))
