"""Balanced assignment: equal shares, all classes at once, any scale of the scores."""

import pytest
import torch
import torch.nn.functional as F

from models.prototypes._sinkhorn import balanced, transport
from tests.models.classifiers.peers import one_class


def cosines(pixels=4000, m=10, seed=0):
    """Cosines (N, M) of random directions, and classes (N) of which the last is that of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    z, p = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (pixels, m))
    return z @ p.T, torch.randint(4, (pixels,), generator=generator)


@pytest.mark.parametrize("rounds, tolerance", [(3, 0.05), (100, 1e-6)])
def test_prototypes_get_equal_shares_of_their_class(rounds, tolerance):
    scores, classes = cosines()
    shares = transport(scores, classes, 3, 0.05, rounds)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)).double(), rtol=0, atol=1e-12)
    for c in range(3):
        mass = shares[classes == c].sum(0) / (classes == c).sum() * 10
        assert (mass - 1).abs().max() < tolerance
    before = transport(scores, classes, 3, 0.05, 0)[classes == 0].mean(0) * 10
    assert (before - 1).abs().max() > 0.1


def test_all_classes_at_once_are_each_class_by_itself():
    scores, classes = cosines(pixels=500)
    shares, found = transport(scores, classes, 3, 0.05, 3), balanced(scores, classes, 3, 0.05, 3)
    for c in range(3):
        expected = one_class(scores[classes == c], 0.05, 3)
        torch.testing.assert_close(shares[classes == c], expected, rtol=1e-10, atol=1e-14)
        assert torch.equal(found[classes == c], expected.argmax(1))
    fewer = balanced(scores[classes < 3], classes[classes < 3], 3, 0.05, 3)
    assert torch.equal(fewer, found[classes < 3])  # ignored pixels take part in nothing


def test_one_prototype_takes_all_pixels_and_no_rounds_take_the_largest_score():
    scores, classes = cosines(pixels=100)
    assert (balanced(scores[:, :1], classes, 3, 0.05, 3) == 0).all()
    assert torch.equal(balanced(scores, classes, 3, 0.05, 0), scores.argmax(1))


def test_a_prototype_that_is_nearest_to_all_gets_its_share_alone():
    scores, classes = cosines(pixels=2000, m=2)
    scores[:, 0] += 5
    assert (scores.argmax(1) == 0).all()
    share = balanced(scores, classes, 3, 0.05, 20)[classes == 1].double().mean()
    assert abs(share - 0.5) < 0.03


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_assignment_is_finite_at_any_scale_of_the_scores(scale):
    scores, classes = cosines(pixels=300)
    assert transport(scale * scores, classes, 3, 0.05, 3).isfinite().all()
    assert transport(scores[:0], classes[:0], 3, 0.05, 3).shape == (0, 10)
