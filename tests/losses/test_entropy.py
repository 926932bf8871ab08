"""Entropy of the predictions."""

import math

import pytest
import torch

from losses.entropy import Entropy
from tests.records import a_step, an_output

K, D = 5, 8


def maps(batch=2, size=(6, 5), dim=D, dtype=torch.float64, grad=False):
    return torch.randn(batch, dim, *size, dtype=dtype).requires_grad_(grad)


def entropy(logits, view="target", **options):
    return Entropy(view=view, **options)(a_step({view: an_output(logits)}))


def test_entropy_is_the_mean_over_pixels():
    logits = maps(dim=K, grad=True)
    expected = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy().mean()
    torch.testing.assert_close(entropy(logits), expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(e, logits)[0] for e in (entropy(logits), expected))
    )
    assert entropy(logits, "source") == entropy(logits)


def test_entropy_lies_between_zero_and_its_maximum():
    assert entropy(torch.zeros(1, 19, 2, 2)).item() == pytest.approx(math.log(19))
    sure = (500 * torch.eye(4)).view(1, 4, 2, 2).requires_grad_()
    value = entropy(sure)
    value.backward()
    assert value == 0 and sure.grad.isfinite().all()


def test_entropy_of_bf16_logits_is_computed_in_float32():
    logits = maps(dim=K, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = entropy(logits)
    assert value == entropy(logits.float()) and value.dtype == torch.float32
