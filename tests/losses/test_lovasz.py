"""The Lovász-softmax against the authors' formula, pixel by pixel, and its meaning."""

import torch

from engine.statistics import IGNORE, resize_logits
from losses.lovasz import LovaszSoftmax, lovasz
from tests.losses.maps import logits_and_labels
from tests.records import a_step, an_output


def loss(logits, labels, weights=None, **options):
    return LovaszSoftmax(**options)(a_step(an_output(logits), labels, weights))


def by_hand(chances, labels):
    """Probabilities (K, N) and labels (N): without the ignored pixels, one class after the other."""
    chances, labels = chances[:, labels != IGNORE], labels[labels != IGNORE]
    terms = []
    for c in labels.unique().tolist():
        errors = ((labels == c).double() - chances[c]).abs()
        errors, order = errors.sort(descending=True)
        missed, extra, before, total = 0, 0, 0.0, 0.0
        for error, own in zip(errors, (labels == c)[order].tolist()):
            missed, extra = missed + own, extra + (not own)
            area = (labels == c).sum().item()
            jaccard = 1 - (area - missed) / (area + extra)
            total, before = total + error * (jaccard - before), jaccard
        terms.append(total)
    return sum(terms) / len(terms)


def test_the_loss_is_that_of_the_paper():
    logits, labels = logits_and_labels(k=4)
    labels[labels == 2] = IGNORE
    chances = resize_logits(logits, labels.shape[-2:]).softmax(1)
    expected = by_hand(chances.transpose(0, 1).flatten(1), labels.flatten())
    value = loss(logits, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, expected)))
    each = [by_hand(c.flatten(1), y.flatten()) for c, y in zip(chances, labels)]
    torch.testing.assert_close(loss(logits, labels, per_image=True), sum(each) / 2)


def test_of_sure_predictions_it_is_one_minus_iou():
    own = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    said = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert lovasz((own - said).abs(), own, torch.ones(5)).item() == 1 - 2 / 4


def test_a_weight_counts_a_pixel_as_often():
    torch.manual_seed(0)
    own, errors = torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), torch.rand(4).double()
    weights = torch.tensor([2.0, 3.0, 1.0, 0.0]).double()
    times = weights.long()
    repeated = lovasz(*(v.repeat_interleave(times) for v in (errors, own)), torch.ones(6).double())
    torch.testing.assert_close(lovasz(errors, own, weights), repeated)


def test_weights_of_the_step_are_those_of_its_pixels():
    logits, labels = logits_and_labels(k=4)
    shown = torch.rand(labels.shape) < 0.5
    torch.testing.assert_close(
        loss(logits, labels, shown.double()), loss(logits, labels.where(shown, IGNORE))
    )
