"""The Dice loss against its definition, a pixel at a time."""

import pytest
import torch

from engine.statistics import IGNORE, resize_logits
from losses.dice import Dice
from tests.losses.maps import logits_and_labels
from tests.records import a_step, an_output
from tests.runs import as_two_processes


def dice(logits, labels, weights=None, **options):
    return Dice(**options)(a_step(an_output(logits), labels, weights))


def by_hand(logits, labels, weights, smooth):
    chances = resize_logits(logits, labels.shape[-2:]).softmax(1)
    terms = []
    for c in range(logits.shape[1]):
        truth = weights * (labels == c)
        if truth.any():
            overlap = 2 * (truth * chances[:, c]).sum()
            areas = (weights * (labels != IGNORE) * chances[:, c]).sum() + truth.sum()
            terms.append(1 - (overlap + smooth) / (areas + smooth))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("smooth", [1e-3, 1.0])
def test_dice_is_the_mean_over_the_classes_present(smooth):
    logits, labels = logits_and_labels()
    labels[labels == 2] = IGNORE
    weights = torch.rand(labels.shape, dtype=logits.dtype)
    value = dice(logits, labels, weights, smooth=smooth)
    torch.testing.assert_close(value, by_hand(logits, labels, weights, smooth))
    ones = torch.ones_like(weights)
    plain = dice(logits, labels, smooth=smooth)
    torch.testing.assert_close(plain, by_hand(logits, labels, ones, smooth))


def test_dice_of_a_perfect_prediction_is_zero_and_of_a_wrong_one_one():
    labels = torch.arange(4).view(1, 2, 2)
    right = 100 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).double()
    assert dice(right, labels, smooth=1e-9) < 1e-8
    assert dice(right, 3 - labels, smooth=1e-9) > 1 - 1e-8


def test_dice_of_two_processes_is_that_of_one(monkeypatch):
    logits, labels = logits_and_labels()
    labels[1][labels[1] == 1] = IGNORE  # a class that one process alone sees
    whole = dice(logits, labels)
    expected = torch.autograd.grad(whole, logits)[0]

    def process(rank):
        mine = logits[rank : rank + 1].detach().requires_grad_()
        value = dice(mine, labels[rank : rank + 1])
        value.backward()
        return value.detach(), mine.grad / 2  # DDP takes the mean of both

    (value, *gradients), (other, *more) = as_two_processes(monkeypatch, process)
    torch.testing.assert_close(torch.stack([value, other]), whole.detach().expand(2))
    torch.testing.assert_close(torch.cat([*gradients, *more]), expected)
