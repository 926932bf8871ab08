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
        # Tuples, not modules: what is in them is no state. Tensors keep their identity for life.
        self.followed, self.cast = (None,), ()

    @torch.no_grad()
    def update(self, student, skipped):
        """Call after each optimiser step. Where `skipped` (0-dim bool) is true, only buffers are
        copied."""
        moves = ~skipped
        self.updates += moves
        if self.followed[0] is not student:
            walks = [(n.parameters(), n.buffers()) for n in (self.network, student)]
            self.followed = student, *([*tensors] for pair in walks for tensors in pair)
        _, mine, my_buffers, theirs, their_buffers = self.followed
        share = (self.updates.to(theirs[0].dtype) + 1).reciprocal()  # 1 - alpha
        share = share.clamp_min(1 - self.momentum) * moves
        change = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(mine, change)
        torch._foreach_copy_(my_buffers, their_buffers)

    @torch.no_grad()
    def segment(self, image, **options):
        """What `Segmentor.segment` gives, bit for bit.

        Autocast would cast and turn each weight of the backbone by itself, in every step. Here all
        of them are cast by one call, into a copy of the backbone that shares everything else.
        """
        kind = image.device.type
        if not torch.is_autocast_enabled(kind) or self.network.cache:
            return self.network.segment(image, compiled=True, **options)
        if not self.cast:
            self.cast = lighter(self.network, torch.get_autocast_dtype(kind))
        network, halves, wholes = self.cast
        torch._foreach_copy_(halves, wholes)
        return network.segment(image, compiled=True, **options)


class Turned(nn.Linear):
    """A linear layer that does not turn its weight in every call: `turned` is another view of its
    memory."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = rows @ self.turned if self.bias is None else torch.addmm(self.bias, rows, self.turned)
        return y.view(*x.shape[:-1], -1) if x.ndim > 2 else y


def lighter(network, dtype):
    """A network that shares all tensors with another one, but for weights and biases of the linear
    layers and convolutions of its backbone, which have another type -> it, these, and the
    originals."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied, halves, wholes = copy.deepcopy(network, shared), [], []
    for module in copied.backbone.modules():
        # Not their subclasses: nn.MultiheadAttention has kernels for weights of one type.
        if type(module) in (nn.Linear, nn.Conv2d):
            for name, whole in module.named_parameters(recurse=False):
                wholes.append(whole)
                halves.append(nn.Parameter(whole.to(dtype), requires_grad=False))
                setattr(module, name, halves[-1])
        if type(module) is nn.Linear:
            module.__class__, module.turned = Turned, module.weight.t()
    return copied, halves, wholes
