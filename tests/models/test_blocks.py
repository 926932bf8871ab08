"""Pieces that networks share: batch norms that keep their statistics."""

import pytest
import torch
from torch import nn

from models.blocks import run, still


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_still_norms_normalise_by_their_batch_and_keep_their_state(kind):
    """nn.SyncBatchNorm, which several GPUs have, checks its counter before it looks at the device."""
    norm, x = kind(3), torch.randn(2, 3, 4, 4)
    norm(x)
    before, counter = {k: v.clone() for k, v in norm.state_dict().items()}, norm.num_batches_tracked
    with still(norm):
        found = norm(x + 1)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert norm.num_batches_tracked is counter and norm.momentum == 0.1
    torch.testing.assert_close(found, nn.BatchNorm2d(3)(x + 1))
    norm(x)
    assert norm.num_batches_tracked == 2


def test_a_norm_without_statistics_may_be_still():
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    with still(norm):
        norm(torch.randn(2, 3, 4, 4))
    assert norm.num_batches_tracked is None


def test_the_backward_pass_computes_synchronised_norms_again_with_checkpointing():
    block, x = nn.SyncBatchNorm(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    run(block, True, x).square().sum().backward()
    assert x.grad is not None and block.num_batches_tracked == 1
