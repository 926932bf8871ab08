"""A network of tests and the options of its optimiser."""

import torch
from torch import nn

from engine.config import Config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv = nn.Conv2d(3, 4, 1)
        self.backbone.norm = nn.BatchNorm2d(4)
        self.backbone.pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2))
        self.backbone.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.classifier = nn.Conv2d(4, 3, 1)


def options(**changes):
    default = {
        "name": "AdamW",
        "lr": 0.01,
        "head_lr_factor": 10.0,
        "weight_decay": 0.5,
        "momentum": 0.8,
        "betas": [0.7, 0.9],
        "layer_decay": 1.0,
    }
    return Config(default | changes)
