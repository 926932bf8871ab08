"""The focal loss, which is also the example of docs/extending.md."""

import pytest
import torch
import torch.nn.functional as F

from engine.statistics import IGNORE, resize_logits
from losses.focal import Focal
from tests.losses.maps import logits_and_labels, pixel_loss
from tests.records import a_step, an_output


def focal(logits, labels, weights=None, **options):
    return Focal(**options)(a_step(an_output(logits), labels, weights))


def test_focal_loss_is_its_definition_and_weighs_pixels():
    logits, labels = logits_and_labels()
    weights = torch.rand(labels.shape, dtype=logits.dtype)
    chances = resize_logits(logits, labels.shape[-2:]).softmax(1)
    right = chances.gather(1, labels.clamp_max(4)[:, None])[:, 0]
    expected = -((1 - right) ** 2) * right.log() * weights * (labels != IGNORE)
    expected = expected.sum() / (labels != IGNORE).sum()
    torch.testing.assert_close(focal(logits, labels, weights), expected)


def test_without_gamma_it_is_cross_entropy():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(focal(logits, labels, gamma=0.0), pixel_loss(logits, labels))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_pixels_that_are_ignored_or_surely_right_have_a_finite_gradient(gamma):
    logits = 500 * F.one_hot(torch.tensor([[[0, 1, 2, 0]]]), 3).movedim(-1, 1).double()
    logits.requires_grad_()
    value = focal(logits, torch.tensor([[[0, 1, IGNORE, 1]]]), gamma=gamma)
    value.backward()
    assert value > 0 and logits.grad.isfinite().all() and not logits.grad[..., 2].any()
