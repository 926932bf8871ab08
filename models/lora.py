"""LoRA: low-rank adapters in the linear layers of a frozen backbone.

    model: {backbone: {name: vit.ViT, size: s, ...}, lora: 8}

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., ICLR 2022) adapts the projections
of queries and values; here every linear layer of the backbone gets an adapter, as is usual since.
Its own weights are frozen, with all else in it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError

SCALE = 2.0  # alpha / r


class LoRA(nn.Linear):
    """W x + b + 2 B A x, where A (r, in) and B (out, r) alone learn; B starts at zero, so that
    nothing has changed. Weights keep their names."""

    def __init__(self, linear, rank):
        out, inside = linear.weight.shape
        super().__init__(inside, out, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(torch.randn(rank, inside) / inside**0.5)
        self.lora_b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


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
