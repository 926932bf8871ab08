"""Optimiser, parameter groups, and the learning rate as a pure function of the step: resuming needs
no state."""

import torch


def factor(step, iters, schedule):
    """Learning rate at a step, relative to the optimiser's: linear warm-up, then polynomial decay.

    Args:
        step: 0 .. iters - 1.
        schedule: warmup (steps), warmup_ratio (at step 0), power, min_ratio (at the end).
    """
    if step < schedule.warmup:
        return schedule.warmup_ratio + (1 - schedule.warmup_ratio) * step / schedule.warmup
    progress = min((step - schedule.warmup) / max(iters - schedule.warmup, 1), 1.0)
    return max((1 - progress) ** schedule.power, schedule.min_ratio)


# Positions, tokens, queries and ConvNeXt's factors, by parts of their names.
UNDECAYED = (
    "pos_embed",
    "positional_embedding",
    "relative_position_bias_table",
    "_token",
    "layer_scale",
    "classifier.queries",
    "classifier.names",
)


def parameter_groups(model, options):
    """Split the trainable parameters into backbone / head x with / without weight decay.

    Norms, biases (all tensors of at most one dimension) and what UNDECAYED names get no decay.
    Each group has `base_lr`, what `set_lr` scales, and a `label` for the log.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "backbone" if name.startswith("backbone.") else "head"
        decay = parameter.ndim > 1 and not any(word in name for word in UNDECAYED)
        groups.setdefault((part, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "label": part,
            "base_lr": options.lr * (options.head_lr_factor if part == "head" else 1.0),
            "weight_decay": options.weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in groups.items()
    ]


def make_optimizer(model, options):
    """AdamW or SGD over `parameter_groups`; fused, so that a step can be skipped on the device
    (precision.step)."""
    groups = parameter_groups(model, options)
    if options.name == "AdamW":
        return torch.optim.AdamW(groups, lr=options.lr, betas=tuple(options.betas), fused=True)
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=True)
    for group in optimizer.param_groups if options.momentum else ():
        for parameter in group["params"]:
            # Otherwise PyTorch makes it at the first step, uninitialised if fp16 skips that one.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer, scale):
    """Set every group's learning rate to its base times `scale` -> {label: learning rate}."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
    return {group["label"]: group["lr"] for group in optimizer.param_groups}
