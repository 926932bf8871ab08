"""The adversarial loss of regions."""

import torch
import torch.nn.functional as F

from losses.tmt import RegionAdversarial
from models.heads.region import Regions
from tests.records import a_step, an_output


def regions_of(domain=None, **fields):
    """An Output whose regions have these fields."""
    return an_output(regions=Regions(None, domain, None, **fields))


def test_the_adversarial_loss_is_the_mean_of_both_domains():
    domain = {"source": torch.randn(2, 3, 4), "target": torch.randn(1, 3, 4)}
    outputs = {name: regions_of(domain=value) for name, value in domain.items()}
    expected = [
        F.binary_cross_entropy_with_logits(value, torch.full_like(value, float(name == "source")))
        for name, value in domain.items()
    ]
    torch.testing.assert_close(RegionAdversarial()(a_step(outputs)), sum(expected) / 2)
