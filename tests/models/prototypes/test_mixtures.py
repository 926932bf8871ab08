"""Class mixtures against their equations: densities, EM, k-means, sampling, processes, memory.

What every member of the family must do: test_parts.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from engine.statistics import class_sums
from models.prototypes._em import expectation
from models.prototypes.mixtures import ABSENT, Mixtures
from tests.models.prototypes.clusters import D, K, M, corners, planted, rows
from tests.runs import ROOT, on_two_processes


def random_mixtures(k=K, m=M, d=D, dtype=torch.float64, **options):
    """Mixtures of random parameters, all classes seen."""
    mixtures = Mixtures(num_classes=k, in_channels=d, components=m, **options).to(dtype)
    mixtures.component_weights.copy_(torch.rand(k, m, dtype=dtype).softmax(1))
    mixtures.component_means.normal_()
    mixtures.component_variances.uniform_(0.2, 2)
    mixtures.seen.fill_(True)
    return mixtures


# --- density ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_score_is_the_log_density_of_torch_distributions(layout, chunk):
    mixtures = random_mixtures(chunk=chunk)
    features = torch.randn(2, D, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
    normal = Independent(Normal(mixtures.component_means, mixtures.component_variances.sqrt()), 1)
    reference = MixtureSameFamily(Categorical(mixtures.component_weights), normal)
    expected = reference.log_prob(rows(features)[:, None]).view(2, 5, 4, K).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixtures.score(features), expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_score_is_the_numerical_one():
    mixtures = random_mixtures(chunk=4)
    features = torch.randn(1, D, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixtures.score, features)


@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_equal_isotropic_variances_are_the_nearest_centroid(variance):
    mixtures = random_mixtures(m=1)
    mixtures.component_weights.fill_(1)
    mixtures.component_variances.fill_(variance)
    features = torch.randn(1, D, 20, 20, dtype=torch.float64)
    distance = torch.cdist(rows(features), mixtures.means()).square()
    scores = rows(mixtures.score(features))
    assert torch.equal(scores.argmax(1), distance.argmin(1))
    expected = (-distance / (2 * variance)).softmax(1)
    torch.testing.assert_close(scores.softmax(1), expected, rtol=0, atol=1e-14 / min(1, variance))


def test_unequal_variances_are_not_the_nearest_centroid():
    mixtures = random_mixtures(k=2, m=1, d=2)
    mixtures.component_weights.fill_(1)
    mixtures.component_means.copy_(torch.tensor([[[0.0, 0]], [[1.0, 0]]]))
    mixtures.component_variances.copy_(torch.tensor([1.0, 0.05])[:, None, None].expand(2, 1, 2))
    scores = mixtures.score(
        torch.tensor([0.6, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    ).flatten()
    torch.testing.assert_close(
        scores, torch.tensor([-2.018, -0.442], dtype=torch.float64), rtol=0, atol=5e-4
    )
    mixtures.component_means.copy_(torch.tensor([[[0.0, 0]], [[1.0, 0]]]))
    near = torch.tensor([0.45, 0.0], dtype=torch.float64).view(1, 2, 1, 1)  # nearer to the first
    mixtures.component_variances.copy_(torch.tensor([1.0, 0.2])[:, None, None].expand(2, 1, 2))
    assert mixtures.score(near).argmax() == 1


def test_levels_of_256_channels():
    """A deviation of 0.1 gives 354 nats at the mean, 1 gives -235: a threshold in nats belongs to one network."""
    for deviation, expected in ((0.1, 354), (1.0, -235)):
        mixtures = random_mixtures(k=1, m=1, d=256)
        mixtures.component_weights.fill_(1)
        mixtures.component_variances.fill_(deviation**2)
        score = mixtures.score(mixtures.component_means.view(1, 256, 1, 1))
        assert abs(score.item() - expected) < 0.5


def test_the_order_of_components_does_not_matter():
    mixtures, other = random_mixtures(), random_mixtures()
    order = torch.randperm(M)
    for buffer in ("component_weights", "component_means", "component_variances"):
        other.get_buffer(buffer).copy_(mixtures.get_buffer(buffer)[:, order])
    features = torch.randn(1, D, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        other.score(features), mixtures.score(features), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(other.means(), mixtures.means(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_an_offset_common_to_all_features_hardly_costs_precision(offset):
    """Uncentred, the expanded square is off by 0.1 at an offset of 10 and by 11 at 100."""
    mixtures = random_mixtures(d=64)
    mixtures.component_means.mul_(0.2).add_(offset)
    mixtures.component_variances.fill_(0.15**2)
    features = (
        mixtures.component_means[0, 0].view(1, 64, 1, 1) + 0.15 * torch.randn(1, 64, 9, 9).double()
    )
    features, mixtures = features.float(), mixtures.float()
    exact = random_mixtures(d=64)
    exact.load_state_dict(mixtures.state_dict())
    error = (mixtures.score(features) - exact.score(features.double())).abs().max()
    assert error < 2e-3


def test_channels_that_are_dead_in_a_class_cost_no_precision():
    """ReLU features: in float32 a variance at the floor made the own class's density wrong by nats."""
    generator = torch.Generator().manual_seed(0)
    alive = torch.rand(8, 1, 64, generator=generator) < 0.5
    mixtures = Mixtures(num_classes=8, in_channels=64, components=1)
    mixtures.component_weights.fill_(1)
    mixtures.component_means.copy_(alive * torch.rand(8, 1, 64, generator=generator))
    mixtures.component_variances.copy_(torch.where(alive, 0.04, 1e-6))
    mixtures.seen.fill_(True)
    noise = torch.randn(8, 64, 20, 1, generator=generator)
    features = (alive[:, 0, :, None, None]) * noise.mul(0.2)
    features = features + mixtures.component_means[:, 0, :, None, None]
    found = mixtures.score(features).diagonal(dim1=0, dim2=1)
    mixtures.double()
    expected = mixtures.score(features.double()).diagonal(dim1=0, dim2=1)
    normal = Normal(mixtures.component_means[:, 0], mixtures.component_variances[:, 0].sqrt())
    own = normal.log_prob(features.double().permute(2, 3, 0, 1)).sum(-1)  # (h, w, K)
    torch.testing.assert_close(expected, own, rtol=1e-9, atol=1e-6)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_scored_in_float32_also_under_autocast(dtype):
    mixtures = random_mixtures(dtype=torch.float32)
    features = torch.randn(1, D, 6, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        scores = mixtures.score(features)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, mixtures.score(features.float()), rtol=0, atol=0)


def test_an_absent_class_scores_lowest_and_stays_untouched():
    features, labels, _ = planted(corners())
    mixtures = Mixtures(num_classes=K + 1, in_channels=D, components=M).double()
    before = mixtures.component_means[1].clone()
    keep = torch.where(labels == 1, 255, labels)
    mixtures.fit(lambda: [(features, keep, None)])
    assert mixtures.seen.tolist() == [True, False, True, False]
    scores = mixtures.score(features)
    assert (scores[:, [1, 3]] == ABSENT).all() and scores.isfinite().all()
    assert not torch.isin(scores.argmax(1), torch.tensor([1, 3])).any()
    assert torch.equal(mixtures.component_means[1], before) and not mixtures.means()[1].any()


# --- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, offset, start",
    [(1.0, 0.0, 1.0), (1.0, 0.0, 0.0), (1.0, 50.0, 1.0), (1.0, 50.0, 0.0), (0.1, 0.0, 0.0)],
)
def test_fit_finds_planted_clusters(scale, offset, start):
    features, labels, parts = planted(corners() * scale, deviation=0.1 * scale, offset=offset)
    mixtures = Mixtures(num_classes=K, in_channels=D, components=M, start=start).double()
    mixtures.fit(lambda: [(features[:1], labels[:1], None), (features[1:], labels[1:], None)])
    points = rows(features)
    for c in range(K):
        for part in range(M):
            members = points[((labels == c) & (parts == part)).flatten()]
            found = (mixtures.component_means[c] - members.mean(0)).norm(dim=1).argmin()
            share = len(members) / (labels == c).sum().double()
            torch.testing.assert_close(
                mixtures.component_means[c, found], members.mean(0), rtol=1e-6, atol=1e-6 * scale
            )
            variance = members.var(0, correction=0).clamp_min(1e-6)
            torch.testing.assert_close(
                mixtures.component_variances[c, found], variance, rtol=1e-4, atol=0
            )
            torch.testing.assert_close(
                mixtures.component_weights[c, found], share, rtol=1e-6, atol=0
            )
    assert (mixtures.score(features).argmax(1) == labels).all()


@pytest.mark.parametrize("options", [{}, {"floor": 0.05}])
def test_weights_sum_to_one_and_variances_stay_above_the_floor(options):
    features, labels, _ = planted(corners())
    features[:, 2] = 0  # a dead channel
    mixtures = Mixtures(num_classes=K, in_channels=D, components=M, **options).double()
    for learn in (
        lambda: mixtures.fit(lambda: [(features, labels, None)]),
        lambda: mixtures.update([(features, labels, None)]),
    ):
        learn()
        torch.testing.assert_close(
            mixtures.component_weights.sum(1), torch.ones(K).double(), rtol=0, atol=1e-12
        )
        smallest = torch.full((K,), options.get("floor", 1e-6), dtype=torch.float64)
        assert (mixtures.component_variances >= smallest[:, None, None]).all()
        assert torch.isclose(
            mixtures.component_variances[..., 2], smallest[:, None], rtol=1e-2
        ).all()


def test_an_offset_hardly_costs_precision_in_fit():
    features, labels, _ = planted(corners(), offset=100.0)
    features = features.float()
    single, double = (
        Mixtures(num_classes=K, in_channels=D, components=M).to(t)
        for t in (torch.float, torch.double)
    )
    single.fit(lambda: [(features, labels, None)])
    double.fit(lambda: [(features.double(), labels, None)])
    error = (single.likelihood_quantiles - double.likelihood_quantiles).abs()
    assert error.median() < 1e-3 and error.max() < 0.1


def test_quantiles_are_those_of_the_scores_where_channels_are_dead_in_some_components():
    """In float32 they were off by 4 nats here, and a share of 0.05 lay below the tenth part."""
    generator = torch.Generator().manual_seed(0)
    centres, dead = 5 * torch.rand(4, 256, generator=generator), torch.rand(4, 256, generator=generator) < 0.5
    modes = torch.randint(4, (6000,), generator=generator)
    noise = torch.randn(6000, 256, generator=generator)
    x = (centres[modes] + 0.3 * noise).clamp_min(0) * ~dead[modes]
    features, labels = x.T.reshape(1, 256, 60, 100), torch.zeros(1, 60, 100, dtype=torch.long)
    mixtures = Mixtures(num_classes=1, in_channels=256, components=4)
    mixtures.fit(lambda: [(features, labels, None)])
    score = mixtures.score(features)
    for level in (0.05, 0.1, 0.5):
        assert (score < mixtures.quantiles(level)).double().mean() == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_fewer_vectors_than_components_and_equal_vectors(vectors):
    features = torch.randn(1, D, 1, vectors).repeat(1, 1, 2, 1)
    mixtures = Mixtures(num_classes=2, in_channels=D, components=M)
    mixtures.fit(lambda: [(features, torch.zeros(1, 2, vectors), None)])
    assert all(b.isfinite().all() for b in mixtures.buffers())
    torch.testing.assert_close(mixtures.means()[0], features.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert mixtures.score(features).isfinite().all()


def test_masked_and_infinite_vectors_are_left_out():
    features, labels, _ = planted(corners())
    weights = (torch.rand(labels.shape) > 0.5).double()
    spoilt = torch.where(weights[:, None] > 0, features, float("nan"))
    infinite = torch.where(weights[:, None] > 0, features, float("inf"))
    results = []
    for batch in (
        (features, labels, weights),
        (features, torch.where(weights > 0, labels, 255), None),
        (spoilt, labels, None),
        (infinite, labels, weights),
    ):
        mixtures = Mixtures(num_classes=K, in_channels=D, components=M).double()
        mixtures.fit(lambda batch=batch: [batch])
        results.append(mixtures.state_dict())
    for result in results[1:]:
        assert all(torch.equal(value, results[0][key]) for key, value in result.items())


def test_features_that_are_not_finite_change_nothing_in_an_update():
    features, labels, _ = planted(corners())
    mixtures = Mixtures(num_classes=K, in_channels=D, components=M).double()
    mixtures.update([(features, labels, None)])
    before = {key: value.clone() for key, value in mixtures.state_dict().items()}
    features[0, 0, 0, 0] = float("inf")
    mixtures.update([(features, labels, None)])
    assert all(torch.equal(value, before[key]) for key, value in mixtures.state_dict().items())


def test_quantiles_are_those_of_the_fitted_likelihoods():
    features, labels, _ = planted(corners(), size=(37, 41))
    mixtures = Mixtures(num_classes=K, in_channels=D, components=M).double()
    assert (mixtures.quantiles(0.5) == ABSENT).all()
    mixtures.fit(lambda: [(features, labels, None)])
    scores = mixtures.score(features)
    for c in range(K):
        own = scores[:, c][labels == c]
        levels = torch.linspace(0, 1, 101).double()
        expected = own.quantile(levels, interpolation="higher")
        assert (mixtures.likelihood_quantiles[c].diff() >= 0).all()
        torch.testing.assert_close(mixtures.quantiles(0)[c], own.min())
        torch.testing.assert_close(mixtures.quantiles(1)[c], own.max())
        assert (mixtures.likelihood_quantiles[c] - expected).abs().median() < 0.05
        for level in (0.1, 0.5, 0.9):
            share = (own < mixtures.quantiles(level)[c]).double().mean().item()
            assert abs(share - level) < 2 / len(own)


def test_fit_depends_on_the_seed_alone_and_not_on_the_order_of_vectors():
    features, labels, _ = planted(corners(), deviation=1.0)

    def fitted(features, labels, **options):
        torch.manual_seed(torch.randint(1000, ()).item())
        mixtures = Mixtures(num_classes=K, in_channels=D, components=M, **options).double()
        mixtures.fit(lambda: [(features, labels, None)])
        return mixtures

    first = fitted(features, labels, seed=1)
    assert torch.equal(first.component_means, fitted(features, labels, seed=1).component_means)
    other = fitted(features.flip(0, 3), labels.flip(0, 2), seed=1, chunk=100)
    torch.testing.assert_close(other.state_dict(), first.state_dict(), rtol=1e-9, atol=1e-9)
    assert not torch.isclose(
        first.component_means, fitted(features, labels, seed=2).component_means
    ).all()


def test_a_full_pool_still_finds_the_clusters():
    features, labels, _ = planted(corners(), size=(60, 80))
    mixtures = Mixtures(num_classes=K, in_channels=D, components=M, pool=200).double()
    mixtures.fit(lambda: [(features[:1], labels[:1], None), (features[1:], labels[1:], None)])
    assert (mixtures.score(features).argmax(1) == labels).all()
    distance = torch.cdist(corners(), mixtures.component_means).amin(2)
    assert (distance < 0.2).all()


# --- update ----------------------------------------------------------------------------------------------------------


def moments_of(mixtures):
    weights, means = mixtures.component_weights[..., None], mixtures.component_means
    return torch.cat(
        [weights, weights * means, weights * (mixtures.component_variances + means**2)], 2
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_update_moves_the_moments_towards_one_step_of_em(momentum):
    mixtures = random_mixtures(momentum=momentum)
    features, labels, _ = planted(corners() / 3, deviation=1.0)
    old = moments_of(mixtures)
    new = torch.empty_like(old)
    for c in range(K):
        x = rows(features)[labels.flatten() == c].T
        sums = expectation(
            x,
            mixtures.component_weights[c],
            mixtures.component_means[c],
            mixtures.component_variances[c],
        )
        new[c] = sums[:, :-1] / x.shape[1]
    mixtures.update([(features, labels, None)])
    expected = momentum * old + (1 - momentum) * new
    torch.testing.assert_close(moments_of(mixtures), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        mixtures.means(), expected[..., 1 : 1 + D].sum(1), rtol=1e-10, atol=1e-10
    )


def test_updates_in_a_row_raise_the_likelihood_and_keep_absent_classes_bit_identical():
    features, labels, _ = planted(corners(), deviation=0.5)
    mixtures = Mixtures(num_classes=K + 1, in_channels=D, components=M, momentum=0.5).double()
    mixtures.update([(features, labels, None)])
    assert mixtures.seen.tolist() == [True] * K + [False]
    expected = class_sums(features, labels, K)
    torch.testing.assert_close(
        mixtures.means()[:K], expected[0] / expected[1][:, None], rtol=1e-10, atol=1e-10
    )
    before = mixtures.score(features).amax(1).mean()
    state = {key: value[2].clone() for key, value in mixtures.state_dict().items()}
    for _ in range(30):
        mixtures.update([(features, torch.where(labels == 2, 255, labels), None)])
    assert all(torch.equal(value[2], state[key]) for key, value in mixtures.state_dict().items())
    assert mixtures.score(features).amax(1)[labels != 2].mean() > before


def test_state_comes_back_from_a_file(tmp_path):
    features, labels, _ = planted(corners())
    mixtures, other = (
        Mixtures(num_classes=K, in_channels=D, components=M).double() for _ in range(2)
    )
    mixtures.fit(lambda: [(features, labels, None)])
    torch.save(mixtures.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.score(features), mixtures.score(features))
    assert torch.equal(other.quantiles(0.1), mixtures.quantiles(0.1)) and other.seen.all()


# --- processes and memory --------------------------------------------------------------------------------------------


def learned(batches):
    """Two updates on the batches, then a fit: a state after each."""
    mixtures = Mixtures(num_classes=K + 1, in_channels=D, components=M, chunk=100).double()
    states = []
    for _ in range(2):
        mixtures.update(batches)
        states.append({key: value.clone() for key, value in mixtures.state_dict().items()})
    mixtures.fit(lambda: batches)
    return [*states, mixtures.state_dict()]


def shared_batches():
    """Interleaved between two processes; class 2 occurs in one of them only."""
    features, labels, _ = planted(corners(), batch=4, size=(12, 20), deviation=0.7)
    labels[1::2] = torch.where(labels[1::2] == 2, 255, labels[1::2])
    return [(features[i : i + 1], labels[i : i + 1], None) for i in range(4)]


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(learned(shared_batches()[rank::2]), f"{folder}/{rank}.pt")
    mixtures = Mixtures(
        num_classes=1, in_channels=1, components=1, pool=50
    )  # of 300 zeros here, 100 ones there
    mixtures.fit(
        lambda: [
            (
                torch.full((1, 1, 1, 300 - 200 * rank), float(rank)),
                torch.zeros(1, 1, 300 - 200 * rank),
                None,
            )
        ]
    )
    assert abs(mixtures.means().item() - 0.25) < 1e-6
    assert (
        mixtures.quantiles(0.2) < mixtures.quantiles(0.3) - 0.5
        or mixtures.quantiles(0.7) < mixtures.quantiles(0.8) - 0.5
    )
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    on_two_processes(one_of_two, tmp_path)
    expected = learned(shared_batches())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for a, b, c in zip(first, second, expected):
        assert all(torch.equal(value, b[key]) for key, value in a.items())
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)


MEMORY = """
import os, resource, torch
from models.prototypes.mixtures import Mixtures

def size():
    now = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return now / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def batches():
    for i in range(classes * pool // 10000 + classes):
        yield torch.randn(1, dim, 100, 100), torch.full((1, 100, 100), i % classes), None

torch.set_num_threads(1)
classes, pool, dim = 3, 60000, 128
mixtures = Mixtures(num_classes=classes, in_channels=dim, pool=pool, iterations=2)
mixtures.fit(lambda: [(torch.randn(1, dim, 3, 3), torch.zeros(1, 3, 3), None)])  # loads what is loaded once
for _ in batches():
    pass
before = size()[1]
mixtures.fit(batches)
print(size()[1] - before - classes * pool * dim * 4 / 2**20)
features = torch.zeros(1, dim, 512, 512)
before = size()[1]
mixtures.score(features)
print(size()[1] - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="measures memory as Linux counts it"
)
def test_the_pools_of_many_classes_fit_into_the_memory():
    sizes = {19: 300_000, 150: 55_924}
    for num_classes, pool in sizes.items():
        assert Mixtures(num_classes=num_classes, in_channels=256).pool == pool
    assert Mixtures(num_classes=4, in_channels=2**20, memory=1e-6).pool == 1


def test_working_memory_is_a_few_chunks():
    """8192 vectors x 128 are 4 MiB; a tensor N x M x D of them 32 MiB."""
    command = [sys.executable, "-c", MEMORY]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    fit, score = map(float, output.split())
    assert fit < 60, output
    assert score < 60, output
