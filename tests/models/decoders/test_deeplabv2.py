"""DeepLabV2 and its sum of branches against the head of the release."""

import pytest
import torch
from torch import nn

from models.classifiers.branch_sum import BranchSum
from models.decoders.deeplabv2 import DeepLabV2


@pytest.mark.parametrize("rates", [(6, 12, 18, 24), (1, 3)])
def test_deeplabv2_with_the_sum_is_the_head_of_the_release(rates):
    """The release adds the logits of dilated convolutions up."""
    num_classes, maps = 7, [torch.randn(2, 4, 40, 30), torch.randn(2, 16, 20, 15)]
    decoder = DeepLabV2(in_channels=[4, 16], width=num_classes, rates=rates).double()
    for conv in decoder.branches:
        nn.init.normal_(conv.bias)
    maps = [x.double() for x in maps]
    classifier = BranchSum(
        in_channels=decoder.channels, num_classes=num_classes, branches=len(rates)
    ).double()
    head = [nn.Conv2d(16, num_classes, 3, padding=rate, dilation=rate).double() for rate in rates]
    for theirs, ours in zip(head, decoder.branches):
        theirs.load_state_dict(ours.state_dict())
    logits = head[0](maps[-1])
    for conv in head[1:]:
        logits = logits + conv(maps[-1])
    features = decoder(maps)
    assert features.shape == (2, len(rates) * num_classes, 20, 15)
    torch.testing.assert_close(classifier(features), logits, rtol=1e-12, atol=1e-12)
    # The class vectors are what the sum multiplies by.
    assert {*classifier.means().unique().tolist()} == {0.0, 1.0} and (
        classifier.means().sum(1) == len(rates)
    ).all()
    product = torch.einsum("kd,bdhw->bkhw", classifier.means(), features)
    torch.testing.assert_close(product, logits, rtol=1e-12, atol=1e-12)


def test_deeplabv2_of_bcl_has_76_channels_and_starts_small():
    decoder = DeepLabV2(in_channels=[256, 512])
    assert decoder.channels == 76
    assert [conv.dilation for conv in decoder.branches] == [(6, 6), (12, 12), (18, 18), (24, 24)]
    weights = torch.cat([conv.weight.flatten() for conv in decoder.branches])
    assert (
        weights.std().item() == pytest.approx(0.01, rel=0.01) and abs(weights.mean().item()) < 1e-4
    )
    assert all((conv.bias == 0).all() for conv in decoder.branches)
