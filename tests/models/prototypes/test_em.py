"""EM and its pool against plain loops: a step, where it stops and starts, empty components."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from models.prototypes import _em
from models.prototypes._em import Pool, expectation, maximisation, reseed
from models.prototypes.mixtures import Mixtures
from tests.models.prototypes.clusters import D, K, M, corners, planted, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_likelihood_never_falls_during_em(dtype):
    x = planted(corners(1), deviation=1.0, batch=1)[0].flatten(2)[0].to(dtype)
    parameters = (
        torch.full((M,), 1 / M).double(),
        torch.randn(M, D).double(),
        torch.ones(M, D).double(),
    )
    history = []
    for _ in range(60):
        sums = expectation(x, *parameters)
        torch.testing.assert_close(sums[:, 0].sum().item(), float(x.shape[1]), rtol=1e-5, atol=0)
        history.append((sums[:, -1].sum() / x.shape[1]).item())
        parameters = maximisation(sums[:, :-1], 1e-6)
    assert all(b >= a - 1e-6 * abs(a) for a, b in itertools.pairwise(history))
    assert history[-1] > history[0] + 1


def test_one_step_of_em_is_the_loop_over_components():
    x = torch.randn(D, 50).double()
    weights, means, variances = (
        torch.rand(M).double().softmax(0),
        torch.randn(M, D).double(),
        torch.rand(M, D).double() + 0.1,
    )
    densities = [
        weights[m] * Normal(means[m], variances[m].sqrt()).log_prob(x.T).sum(1).exp()
        for m in range(M)
    ]
    shares = torch.stack(densities) / sum(densities)
    sums = expectation(x, weights, means, variances)
    found = maximisation(sums[:, :-1], 1e-6)
    for m in range(M):
        mean = (shares[m] * x).sum(1) / shares[m].sum()
        variance = (shares[m] * (x - mean[:, None]) ** 2).sum(1) / shares[m].sum()
        for actual, expected in zip(found, (shares[m].mean(), mean, variance)):
            torch.testing.assert_close(actual[m], expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sums[:, -1].sum(), sum(densities).log().sum(), rtol=1e-12, atol=0)


def test_em_stops_where_the_gain_falls_below_the_tolerance(monkeypatch):
    features, labels, _ = planted(corners(), deviation=1.0)
    calls = []
    monkeypatch.setattr(_em, "expectation", lambda *a: calls.append(1) or expectation(*a))
    counts = {}
    for name, options in {
        "loose": {"tolerance": 1e9},
        "paper": {},
        "never": {"tolerance": -1.0},
    }.items():
        calls.clear()
        Mixtures(num_classes=K, in_channels=D, components=M, iterations=40, **options).fit(
            lambda: [(features.float(), labels, None)]
        )
        counts[name] = len(calls)
    assert counts["loose"] == 2 * K < counts["paper"] < counts["never"] == 40 * K


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_em_starts_from_the_centres_of_k_means(start, monkeypatch):
    """With variance 1 and equal weights as in the paper, or with the variance within the clusters."""
    features, labels, parts = planted(corners())
    seen = []
    monkeypatch.setattr(_em, "expectation", lambda x, *p: seen.append(p) or expectation(x, *p))
    Mixtures(num_classes=K, in_channels=D, components=M, start=start).double().fit(
        lambda: [(features, labels, None)]
    )
    weights, means, variances = seen[0]
    assert (weights == 1 / M).all()
    points, members = rows(features)[labels.flatten() == 0], parts[labels == 0]
    clusters = torch.stack([points[members == m].mean(0) for m in range(M)])
    distance = torch.cdist(means, clusters - points.mean(0))
    assert sorted(distance.argmin(1).tolist()) == [*range(M)] and (distance.amin(1) < 1e-9).all()
    expected = (
        torch.full((D,), start).double() if start else (points - clusters[members]).square().mean(0)
    )
    torch.testing.assert_close(variances, expected.expand(M, D), rtol=1e-9, atol=0)


def test_an_empty_component_shares_the_largest_one(monkeypatch):
    weights = torch.tensor([0.6, 0.0, 0.4, 0.0]).double()
    means, variances = torch.randn(M, D).double(), torch.rand(M, D).double()
    generator = torch.Generator().manual_seed(0)
    new = reseed(weights, means, variances, weights == 0, generator)
    torch.testing.assert_close(new[0], torch.tensor([0.2, 0.2, 0.4, 0.2]).double())
    assert torch.equal(new[1][[0, 2]], means[[0, 2]]) and torch.equal(
        new[2][[1, 3]], variances[[0, 0]]
    )
    assert ((new[1][1] - means[0]).abs() < 3 * variances[0].sqrt()).all() and not torch.equal(
        new[1][1], new[1][3]
    )

    features, labels, _ = planted(corners())
    points = torch.full((M, D), 1e3).double()
    points[0] = 0

    def far(total, *_):  # all centres but one lie far from every vector
        return points, total(_em.cluster, points)

    monkeypatch.setattr(_em, "kmeans", far)
    mixtures = Mixtures(num_classes=K, in_channels=D, components=M).double()
    mixtures.fit(lambda: [(features, labels, None)])
    assert (mixtures.reseeded >= M - 1).all() and (mixtures.component_weights > 0).all()
    assert mixtures.component_means.abs().max() < 100


@pytest.mark.parametrize("batches", [[50] * 8, [400], [10] * 40, [3, 97, 200, 100]])
def test_a_full_pool_is_a_uniform_sample(batches):
    counts = torch.zeros(400)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        pool, start = Pool(40, torch.zeros(1, 1), generator), 0
        for size in batches:
            maps = torch.arange(start, start + size).view(1, 1, size, 1)
            pool.add(maps, torch.ones(1, 1, size).nonzero())
            start += size
        kept = pool.rows[: pool.count].flatten().long()
        assert pool.count == 400 and len(kept) == 40 and len(kept.unique()) == 40
        counts[kept] += 1
    expected = 300 * 40 / 400
    groups = counts.view(8, 50).mean(1)  # means of 50 pixels: deviation 1
    assert ((groups - expected).abs() < 4.5 * math.sqrt(expected / 50)).all()
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()
