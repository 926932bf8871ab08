"""LoRA: low-rank adapters in the linear layers of a frozen backbone.

    model: {backbone: {name: vit.ViT, size: s, ...}, lora: 8}

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., ICLR 2022) adapts the projections
of queries and values; here every linear layer of the backbone gets an adapter, as is usual since.
The attention of CLIP's towers (nn.MultiheadAttention) has none of its own, and gets none. The
backbone's own weights are frozen, with all else in it, batch statistics too.
"""

import torch
from torch import nn

from engine.errors import UserError

SCALE = 2.0  # alpha / r


class LoRA(nn.Linear):
    """(W + 2 B A) x + b, where A (r, in) and B (out, r) alone learn; B starts at zero, so that
    nothing has changed. Weights keep their names. Some networks read the weight of a layer instead
    of calling it (Swin, BEiT): the sum is the weight."""

    def __init__(self, linear, rank):
        out, inside = linear.weight.shape
        nn.Module.__init__(self)
        self.in_features, self.out_features = inside, out
        self._parameters.update(weight=linear.weight, bias=linear.bias)
        self.lora_a = nn.Parameter(torch.randn(rank, inside) / inside**0.5)
        self.lora_b = nn.Parameter(torch.zeros(out, rank))

    @property
    def weight(self):
        return self._parameters["weight"] + SCALE * self.lora_b @ self.lora_a


def merged(state, keys):
    """A state dict for a network with these keys: adapters that it lacks are added to their
    weights."""
    adapters = [k.removesuffix("lora_a") for k in state if k.endswith(".lora_a") and k not in keys]
    state = dict(state)
    for layer in adapters:
        a, b = state.pop(f"{layer}lora_a"), state.pop(f"{layer}lora_b")
        state[f"{layer}weight"] = state[f"{layer}weight"] + SCALE * b @ a
    return state


def adapt(backbone, rank):
    """Freeze a backbone and put adapters of this rank into its linear layers.

    Raises:
        UserError: it has none.
    """
    found = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        # No subclasses, whose users read the weights; no layers that the maps do not need.
        if type(child) is nn.Linear and child.weight.requires_grad
    ]
    backbone.requires_grad_(False)
    if not found:
        raise UserError(
            f"model.lora adapts linear layers, of which {type(backbone).__name__} has none: take a "
            "transformer, such as vit.ViT or mit.MiT, or model.lora=0"
        )
    for parent, name, child in found:
        setattr(parent, name, LoRA(child, rank))
