"""Precision as one word: fp32, bf16 or fp16, with one code path for all of them.

fp16 means a live gradient scaler, everything else a disabled one, whose calls then do nothing.
"""

import torch

from engine.schedule import APART

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """The context of the forward pass. Losses and prototypes leave it by themselves."""
    return torch.autocast(
        device.type, dtype=DTYPES[precision] or torch.bfloat16, enabled=precision != "fp32"
    )


def make_scaler(device, precision):
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def clip(optimizer, scaler, largest):
    """Unscale the gradients and clip their norm -> the norm before clipping, 0-dim; not finite
    where one of those apart is not (schedule.APART), which are clipped by themselves.

    Args:
        largest: gradient norm; 0 measures the norm and leaves the gradients alone.
    """
    scaler.unscale_(optimizer)
    norms = []
    for apart in (False, True):
        groups = [g["params"] for g in optimizer.param_groups if (g.get("label") in APART) == apart]
        parameters = [p for group in groups for p in group]
        if parameters and largest > 0:
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, largest))
        elif parameters:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients))
    return sum((0 * norm for norm in norms[1:]), norms[0])


def figures(scaler):
    """For the log: the loss scale, where there is one."""
    return {"train/amp_scale": scaler.get_scale()} if scaler.is_enabled() else {}


def step(optimizer, scaler, skipped):
    """Step, and clear the gradients; nothing moves if `skipped` (0-dim bool on the device).

    Fused optimisers read it there, so nobody waits.
    This is what GradScaler.step does for a fused optimiser; the scale then follows the overflows
    that `clip` found.
    """
    optimizer.found_inf = skipped.to(torch.float32)
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def marked(numbers, compiled):
    """The numbers of steps. With `model.compile: reduce-overhead` each tells CUDA graphs that what
    the step before left in their memory is free."""
    for number in numbers:
        if compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        yield number
