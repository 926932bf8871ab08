"""Precision as one word: fp32, bf16 or fp16, with one code path for all of them.

fp16 means a live gradient scaler, everything else a disabled one, whose calls then do nothing.
"""

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """The context of the forward pass. Losses and prototypes leave it by themselves."""
    return torch.autocast(
        device.type, dtype=DTYPES[precision] or torch.bfloat16, enabled=precision != "fp32"
    )


def make_scaler(device, precision):
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def step(optimizer, scaler, parameters, clip):
    """Unscale, clip and step.

    Args:
        parameters: all trainable parameters.
        clip: largest gradient norm; 0 measures the norm and leaves the gradients alone.
    Returns:
        (gradient norm, 0-dim tensor; whether the step was taken). fp16 skips a step whose gradients overflow; teacher
        and prototypes must then stay as they are too.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else float("inf"))
    before = (
        scaler.get_scale()
    )  # waits for the GPU under fp16 alone, where scaler.step waits anyway
    scaler.step(optimizer)
    scaler.update()
    return norm, scaler.get_scale() >= before


class StepCounter:
    """Stop when fp16 skips too many steps in a row: the loss scale can no longer rescue the run."""

    def __init__(self, limit=25):
        self.limit, self.skipped = limit, 0

    def __call__(self, taken, step):
        self.skipped = 0 if taken else self.skipped + 1
        if self.skipped > self.limit:
            raise FloatingPointError(
                f"fp16 gradients overflowed {self.skipped} times in a row up to step {step}: use precision=bf16, "
                "a lower optimizer.lr or optimizer.clip=1"
            )
