"""UPerNet against a plain forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.decoders.upernet import PooledNorm, UPerNet
from tests.models.networks import equal, scrambled


@torch.no_grad()
def test_upernet_is_the_plain_forward_pass():
    decoder = scrambled(UPerNet(in_channels=[4, 6, 8, 10], width=12)).double()
    maps = [
        torch.randn(2, c, h, w).double()
        for c, h, w in ((4, 25, 17), (6, 13, 9), (8, 7, 5), (10, 4, 3))
    ]
    state = decoder.state_dict()

    def layer(name, x, numbers=(0, 1)):
        conv, norm = (f"{name}.{number}." for number in numbers)
        weight = state[conv + "weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        statistics = [
            state[norm + key] for key in ("running_mean", "running_var", "weight", "bias")
        ]
        mean, var, scale, shift = (value.view(-1, 1, 1) for value in statistics)
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()

    def bigger(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    pooled = [
        bigger(layer(f"pools.{i}", F.adaptive_avg_pool2d(maps[3], n), (1, 2)), maps[3])
        for i, n in enumerate((1, 2, 3, 6))
    ]
    laterals = [layer(f"laterals.{i}", maps[i]) for i in range(3)] + [
        layer("join", torch.cat([maps[3], *pooled], 1))
    ]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + bigger(laterals[i + 1], laterals[i])
    outs = [layer(f"smooth.{i}", laterals[i]) for i in range(3)] + [laterals[3]]
    expected = layer("fuse", torch.cat([bigger(x, maps[0]) for x in outs], 1))
    torch.testing.assert_close(decoder(maps), expected, rtol=1e-9, atol=1e-9)
    assert decoder(maps).shape == (2, 12, 25, 17)


def test_a_single_mean_is_normalised_by_running_statistics():
    norm, plain = scrambled(PooledNorm(5)).train(), nn.BatchNorm2d(5).train()
    plain.load_state_dict(norm.state_dict())
    one, two = torch.randn(1, 5, 1, 1), torch.randn(2, 5, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(5)(one)
    torch.testing.assert_close(norm(one), plain.eval()(one))
    assert equal(norm.state_dict().values(), plain.state_dict().values())
    assert torch.equal(norm(two), plain.train()(two))
    assert equal(norm.state_dict().values(), plain.state_dict().values())
