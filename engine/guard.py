"""Steps that are not finite change nothing, and end the run where it waits for the device anyway.

A loss or a gradient norm that is NaN or infinite on any process makes its step, and every later
one, a step that is skipped: optimiser, teacher, prototypes and batch statistics keep what they had.
The script learns of it at the next line of the log or at the next save; the state is then that
before the first such step, which can be replayed.

fp16 skips steps whose gradients overflow as a matter of course. Only many of them in a row end the
run.
"""

import torch
from torch import nn

from engine import checkpoint, distributed
from engine.errors import NonFinite

# Skipped steps in a row after which the loss scale of fp16 can no longer rescue the run.
OVERFLOWS = 25


def _joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


class Guard:
    """The device's account of what was finite.

    Args:
        model: network whose batch statistics are kept.
        device: where the account is.
        fp16: gradients may overflow.
    """

    def __init__(self, model, device, fp16=False):
        self.fp16 = fp16
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)
        self.first = torch.full((), -1, dtype=torch.int64, device=device)
        self.names, self.values, self.generators = [], None, {}
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        # What is saved is the main process's. Were the others' their own, a run that goes on would
        # predict otherwise.
        self.local = not all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        statistics = [buffer for norm in norms for buffer in norm.buffers()]
        # Means and variances, and counters: each kind as one tensor, since there may be hundreds.
        kinds = ([s for s in statistics if s.is_floating_point() is kind] for kind in (True, False))
        self.statistics = [kind for kind in kinds if kind]

    def begin(self, step):
        """Before a step: note the generators and the batch statistics."""
        self.generators[step] = checkpoint.rng_state()
        self.kept = [_joined(kind) for kind in self.statistics]

    @torch.no_grad()
    def judge(self, step, losses, norm):
        """After the backward pass. Batch statistics become those of the main process, or what they
        were before the step.

        Args:
            losses: {name: 0-dim tensor} of the step on this process.
            norm: gradient norm, the same on every process.
        Returns:
            0-dim bool on the device: the step must be skipped.
        """
        values = torch.stack([*(loss.detach().double() for loss in losses.values()), norm.double()])
        finite = values.isfinite()
        overflow = ~finite[-1] if self.fp16 else torch.zeros_like(self.failed)
        failed = ~(finite[:-1] if self.fp16 else finite).all()
        if distributed.world_size() > 1:
            failed = distributed.all_reduce(failed.long()) > 0
        self.names = [*losses, "the gradient norm"]
        is_first = failed & ~self.failed
        self.first = torch.where(is_first, step, self.first)
        self.values = values if self.values is None else torch.where(is_first, values, self.values)
        self.failed = self.failed | failed
        self.overflows = torch.where(overflow, self.overflows + 1, 0)
        skipped = self.failed | overflow
        for kind, kept in zip(self.statistics, self.kept):
            new = _joined(kind)
            if self.local:
                distributed.of_the_first(new)
            parts = torch.where(skipped, kept, new).split([s.numel() for s in kind])
            torch._foreach_copy_(kind, [part.view_as(s) for part, s in zip(parts, kind)])
        return skipped

    def check(self):
        """Wait for the device.

        Returns:
            None, or of the first step that was not finite: its number in the stage, the generators
            of this process before it, and what is not finite; on every process alike.
        Raises:
            NonFinite: overflows of fp16 without end.
        """
        first, overflows = torch.stack([self.first, self.overflows]).tolist()
        if overflows > OVERFLOWS:
            raise NonFinite(
                f"the gradients overflowed fp16 in {overflows} steps in a row: use precision=bf16, "
                "a lower optimizer.lr or optimizer.clip=1"
            )
        if first >= 0:
            values = distributed.gather(self.values.tolist())
            wrong = [
                f"{name} is {row[i]}"
                for i, name in enumerate(self.names)
                for row in values
                if not abs(row[i]) < float("inf")
            ]
            return first, self.generators[first], wrong[0]
        self.generators = {}


def end_at(step, rng, reason, content, streams, folder):
    """End the run at a step that was not finite, and keep what replays it.

    Args:
        step, rng, reason: of `Guard.check`.
        content: of a checkpoint before the step.
        streams: {name: datasets.build.Stream}, which make its batches again.
    Raises:
        NonFinite: always.
    """
    number, rng = content["step"] + 1, distributed.gather(rng)
    path = folder / f"debug_step_{number:07d}.pt"
    if distributed.is_main():
        batches = {name: stream.whole(step) for name, stream in streams.items()}
        content = content | {"rng": rng, "reason": reason, "batch": batches}
        checkpoint.save(path, content, required=False)
    distributed.barrier()  # torchrun ends all processes with the first that leaves
    raise NonFinite(
        f"step {number}: {reason}. It was not taken, nor was one after it, and the checkpoints "
        "before are intact. Lower optimizer.lr, set optimizer.clip=1, or use precision=fp32. To "
        f"replay the step: resume={path}"
    )
