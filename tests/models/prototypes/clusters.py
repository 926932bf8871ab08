"""Class mixtures of tests, and features in planted clusters."""

import torch

K, M, D = 3, 4, 6


def planted(centres, batch=2, size=(30, 40), deviation=0.1, offset=0.0, seed=0):
    """Features (B, D, h, w), labels and components (B, h, w) of clusters around centres (K, M, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *size)
    labels, parts = (torch.randint(n, shape, generator=generator) for n in centres.shape[:2])
    noise = torch.randn(*shape, centres.shape[2], generator=generator, dtype=torch.float64)
    return (centres[labels, parts] + deviation * noise + offset).permute(0, 3, 1, 2), labels, parts


def corners(k=K, m=M, d=D):
    """Centres (K, M, D) that lie 1.4 or more apart."""
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(k, m, d, generator=generator, dtype=torch.float64).sign() * torch.eye(d)[
        :m
    ].double() + (torch.arange(k)[:, None, None] * 2.0)


def rows(maps):
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)
