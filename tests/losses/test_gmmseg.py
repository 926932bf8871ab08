"""The loss of GMMSeg."""

import pytest
import torch

from losses import gmmseg
from tests.models.classifiers.peers import build, evaluate, follow, scene


@pytest.mark.parametrize("options", [{}, {"queue": 400, "pixels": 400}], ids=["moments", "queue"])
def test_loss_does_not_depend_on_the_order_in_which_pixels_enter(options):
    values, (features, labels) = [], scene()
    for order in (
        torch.arange(120),
        torch.randperm(120, generator=torch.Generator().manual_seed(3)),
    ):
        part = build("GMMSeg", update_every=1, **options)
        shuffled = (
            features.flatten(2)[..., order].view_as(features),
            labels.flatten(1)[:, order].view_as(labels),
        )
        follow(part, *shuffled)
        values.append(evaluate(gmmseg.Contrast(), part, features, labels))
    assert (values[0] - evaluate(gmmseg.Contrast(), build("GMMSeg"), features, labels)).abs() > 1e-3
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
