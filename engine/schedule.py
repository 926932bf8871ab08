"""Optimiser, parameter groups, and the learning rate as a pure function of the step: resuming needs
no state."""

import math

import torch

from engine.errors import UserError


def factor(step, iters, schedule):
    """Learning rate at a step, relative to the optimiser's: linear warm-up, then decay, polynomial
    or half a cosine (Loshchilov and Hutter, SGDR, ICLR 2017, without restarts).

    Args:
        step: 0 .. iters - 1.
        schedule: warmup (steps), warmup_ratio (at step 0), power (or "cosine"), min_ratio (at the
            end; the polynomial stops there, the cosine ends there).
    """
    if step < schedule.warmup:
        return schedule.warmup_ratio + (1 - schedule.warmup_ratio) * step / schedule.warmup
    progress = min((step - schedule.warmup) / max(iters - schedule.warmup, 1), 1.0)
    if schedule.power == "cosine":
        return (
            schedule.min_ratio + (1 - schedule.min_ratio) * (1 + math.cos(math.pi * progress)) / 2
        )
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
# What learns beside the network, from features that it does not move: its gradient is clipped by
# itself (precision.clip), and its rate is at least this. At that of a fine-tuned head it would not
# tell day from dusk after 250 steps.
APART, ITS_RATE = ("probe",), 5e-3


def parameter_groups(model, options):
    """Split the trainable parameters into backbone / head x with / without weight decay.

    Norms, biases (all tensors of at most one dimension) and what UNDECAYED names get no decay.
    With `layer_decay`, each layer of the backbone is a part: its rate is lr * layer_decay^n with n
    layers above it (`layers_above` of models/backbones/base.py).
    What APART names is a part of its own, with a rate of ITS_RATE or of a head and no decay.
    Each group has `base_lr`, what `set_lr` scales, and a `label` for the log.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("nothing is left to train: take a part out of model.frozen")
    body = [name for name in trained if name.startswith("backbone.")]
    names = [name.removeprefix("backbone.") for name in body]
    above = model.backbone.layers_above(names) if options.layer_decay < 1 else {}
    groups = {}
    for name, parameter in trained.items():
        part, _, own = name.partition("backbone.")
        factor = options.layer_decay ** above.get(own, 0) if not part else options.head_lr_factor
        label = "head" if part else "backbone"
        label = next((kind for kind in APART if f".{kind}." in name), label)
        decay = parameter.ndim > 1 and not any(word in name for word in UNDECAYED)
        decay = decay and label not in APART
        groups.setdefault((label, factor, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "label": label,
            "base_lr": max(options.lr * factor, ITS_RATE if label in APART else 0.0),
            "weight_decay": options.weight_decay if decay else 0.0,
        }
        for (label, factor, decay), parameters in groups.items()
    ]


def make_optimizer(model, options):
    """AdamW or SGD over `parameter_groups`; fused, so that a step can be skipped on the device
    (precision.step)."""
    groups = parameter_groups(model, options)
    if options.name == "AdamW":
        betas = tuple(map(float, options.betas))  # of 0 and 0.9 PyTorch refuses the 0
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=True)
    for group in optimizer.param_groups if options.momentum else ():
        for parameter in group["params"]:
            # Otherwise PyTorch makes it at the first step, uninitialised if fp16 skips that one.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rates(optimizer, step, iters, schedule):
    """Set the learning rates of a step -> {label: highest learning rate}. `schedule` as of
    `factor`, and min_lr: no rate falls below it after the warm-up."""
    low = schedule.min_lr if step >= schedule.warmup else 0.0
    return set_lr(optimizer, factor(step, iters, schedule), low)


def set_lr(optimizer, scale, low=0.0):
    """Set every group's learning rate to its base times `scale`, at least `low` where its base is
    above that -> {label: highest learning rate}."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = max(group["base_lr"] * scale, min(low, group["base_lr"]))
        rates[group["label"]] = max(group["lr"], rates.get(group["label"], 0.0))
    return rates
