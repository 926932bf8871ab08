"""GMMSeg against its equations; what it shares with ProtoSeg: test_components.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal

from tests.models.classifiers.peers import D, K, M, build, follow, look, one_class, scene, unit_rows


def random_gaussians(**options):
    part = build("GMMSeg", **options)
    part.variances.uniform_(0.02, 2)
    return part


def test_densities_are_those_of_torch_distributions():
    part, (features, _) = random_gaussians(), scene()
    output = look(part, features)
    z = part.embed(features)
    expected = Independent(Normal(part.vectors, part.variances.sqrt()), 1).log_prob(
        z[:, None, None]
    )  # (N, K, M)
    found = output.components.permute(0, 3, 4, 1, 2).reshape(-1, K, M)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    logits = output.logits.permute(0, 2, 3, 1).reshape(-1, K)
    torch.testing.assert_close(logits, F.layer_norm(expected.amax(2), (K,)))
    single = look(copy.deepcopy(part).float(), features.float()).components.amax((1, 2))
    largest = output.components.amax((1, 2))
    torch.testing.assert_close(single.double(), largest, rtol=1e-4, atol=1e-3)


def test_the_largest_density_falls_with_the_distance():
    part = build("GMMSeg", width=D)
    part.embed = unit_rows
    away = torch.linalg.qr(part.vectors.flatten(0, 1).T, mode="complete").Q[
        :, -1
    ]  # orthogonal to all means
    part.vectors[0, 0] = F.normalize(part.vectors.flatten(0, 1).sum(0), dim=0)
    angles = torch.linspace(0, 1.5, 30).double()
    line = angles.cos()[:, None] * part.vectors[0, 0] + angles.sin()[:, None] * away
    scores = look(part, line.T[None, :, :, None]).components.amax((1, 2)).flatten()
    assert (scores.diff() < 0).all()


@pytest.mark.parametrize("options", [{}, {"queue": 3000, "pixels": 3000}], ids=["moments", "queue"])
def test_the_m_step_recovers_planted_directions_and_spreads(options):
    part = build(
        "GMMSeg", num_classes=1, width=D, momentum=0.0, update_every=1, **options
    )  # one class: all correct
    part.embed = unit_rows
    generator = torch.Generator().manual_seed(1)
    truth = F.normalize(
        part.vectors[0] + 0.15 * torch.randn(M, D, generator=generator, dtype=torch.float64), dim=1
    )
    spread_ = torch.linspace(0.01, 0.1, D).double()
    which = torch.arange(3000) % M
    z = truth[which] + spread_ * torch.randn(3000, D, generator=generator, dtype=torch.float64)
    follow(part, z.T[None, :, :, None], torch.zeros(1, 3000, 1, dtype=torch.long))
    assert F.cosine_similarity(part.vectors[0], truth).min() > 0.999
    unit = F.normalize(z, dim=1)
    for m in range(M):
        own = unit[which == m]
        target = F.normalize(own.mean(0), dim=0)
        torch.testing.assert_close(part.vectors[0, m], target, rtol=0, atol=2e-3)
        expected = (own - target).square().mean(0) + 0.01
        torch.testing.assert_close(part.variances[0, m], expected, rtol=0.05, atol=0)
    assert part.variances[0].mean(0)[-1] > part.variances[0].mean(0)[0] + 0.003


def test_pixels_are_shared_out_by_log_densities_over_the_largest_of_their_class():
    part, (features, labels) = random_gaussians(), scene()
    densities = look(part, features).components
    found = part.assign(densities, labels).flatten()
    for c in range(K):
        scores = densities[:, c].movedim(1, -1)[labels == c]
        expected = one_class(scores / scores.abs().max(), 0.05, 3).argmax(1)
        assert torch.equal(found[labels.flatten() == c], M * c + expected)
        assert not torch.equal(expected, one_class(scores, 0.05, 3).argmax(1))


@pytest.mark.parametrize("options", [{}, {"queue": 500, "pixels": 500}], ids=["moments", "queue"])
def test_the_m_step_is_that_of_the_correct_pixels_about_their_direction(options):
    part, (features, labels) = build("GMMSeg", momentum=0.3, update_every=1, **options), scene()
    output = look(part, features)
    right = output.logits.argmax(1) == labels
    targets, z = (
        part.assign(output.components, labels)[right],
        part.embed(features)[right.flatten()],
    )
    before = part.vectors.clone().flatten(0, 1)
    follow(part, features, labels)
    found, bent = 0, 0
    for number in targets.unique():
        own = z[targets == number]
        target = F.normalize(own.sum(0), dim=0)
        found, bent = found + 1, max(bent, (target - own.mean(0)).norm())
        mean, variance = (x.flatten(0, 1)[number] for x in (part.vectors, part.variances))
        torch.testing.assert_close(mean, F.normalize(0.3 * before[number] + 0.7 * target, dim=0))
        torch.testing.assert_close(variance, (own - target).square().mean(0) + 0.01)
    assert found > K and bent > 0.1


@pytest.mark.parametrize("options", [{}, {"queue": 50}], ids=["moments", "queue"])
def test_variances_never_fall_below_the_floor(options):
    part = build("GMMSeg", width=D, momentum=0.0, update_every=1, **options)
    part.embed = unit_rows
    features = torch.zeros(1, D, 6, 8, dtype=torch.float64)
    features[:, :K] = (
        torch.eye(K, dtype=torch.float64).repeat(1, 12).view(1, K, 6, 8)
    )  # each class in one point
    part.vectors[:] = F.normalize(torch.eye(K, D).double()[:, None] + 0.01 * part.vectors, dim=2)
    follow(part, features, features.argmax(1))
    assert (
        part.variances.sqrt().min() >= 0.1
        and torch.isclose(part.variances, torch.tensor(0.01).double()).any()
    )


def test_running_sums_that_do_not_fade_are_a_queue_that_is_not_full():
    sums, queue = build("GMMSeg", decay=1.0, pixels=500), build("GMMSeg", queue=5000, pixels=500)
    for step in range(4):
        for part in (sums, queue):
            follow(part, *scene(seed=step), number=step)
        for one, other in zip(sums.sums(), queue.sums()):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(sums.vectors, queue.vectors)
        torch.testing.assert_close(sums.variances, queue.variances)
    assert (sums.variances != 1).any()


def test_a_step_weighs_as_many_pixels_as_the_queue_would_take():
    part = build("GMMSeg", decay=0.5, pixels=2)
    counts = torch.zeros(K, M, 1).double()
    for step in range(4):
        features, labels = scene(seed=step)
        output = look(part, features)
        targets = part.assign(output.components, labels)[output.logits.argmax(1) == labels]
        number = torch.bincount(targets, minlength=K * M).view(K, M, 1)
        counts = torch.where(number > 0, 0.5 * counts + number.clamp_max(2), counts)
        follow(part, features, labels, number=step)
    torch.testing.assert_close(part.mass, counts)
