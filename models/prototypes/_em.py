"""EM for one diagonal Gaussian mixture on a pool of vectors that lies in several processes; see
`mixtures`.

Vectors come as columns (D, N), a chunk at a time, and every step is a sum over chunks and
processes, `total`. E and M step take two matrix products each and never build a tensor N x M x D.
"""

import itertools
import math

import torch

from engine import distributed

DRAWS = 20  # random starts of k-means
LEVELS = 101  # quantiles of the log-likelihood: 0, 0.01 ... 1


def log_joint(x, square, weights, means, variances):
    """log(pi_m N(x_n; mu_m, sigma_m^2)): x (D, N), its square, parameters (M), (M, D), (M, D) ->
    (M, N)."""
    precisions = 1 / variances
    linear = means * precisions
    constant = weights.log() - 0.5 * (means * linear + variances.log() + math.log(2 * math.pi)).sum(
        1
    )
    joint = torch.addmm(constant[:, None].to(x), linear.to(x), x)
    return torch.addmm(joint, precisions.to(x), square, alpha=-0.5)


def moments(x, square, shares):
    """Sums of r, r x and r x^2 over the vectors x (D, N) with shares r (M, N) -> (M, 1 + 2 D),
    float64."""
    return torch.cat([shares.sum(1, keepdim=True), shares @ x.T, shares @ square.T], 1).double()


def whole(x):
    """Moments of all vectors x (D, N) -> (1, 1 + 2 D)."""
    return moments(x, x.square(), torch.ones_like(x[:1]))


def expectation(x, *parameters):
    """E step: (M, 2 + 2 D), the moments of x (D, N) under the responsibilities, and parts of sum_n
    log p(x_n). In float64, as scores are: see models/prototypes/mixtures.py."""
    x = x.double()
    square = x.square()
    joint = log_joint(x, square, *parameters)
    evidence = joint.logsumexp(0)
    shares = joint.sub_(evidence).exp_()
    return torch.cat([moments(x, square, shares), (shares @ evidence)[:, None].double()], 1)


def maximisation(sums, floor):
    """M step: moments (..., M, 1 + 2 D) -> weights (..., M), means and variances (..., M, D).

    Variances are clamped to the floor, the maximum under that constraint, so the likelihood never
    falls; the released code adds the floor.
    """
    dim = sums.shape[-1] // 2
    mass, first, second = sums.split([1, dim, dim], -1)
    filled = torch.where(mass > 0, mass, 1)
    means = first / filled
    total = mass.sum(-2, keepdim=True)
    weights = mass / torch.where(total > 0, total, 1)
    return weights.squeeze(-1), means, (second / filled - means.square()).clamp_min(floor)


def reseed(weights, means, variances, empty, generator):
    """Let empty components share the weight of the largest, each half a deviation away from it at
    random."""
    largest, noise = (
        weights.argmax(),
        torch.randn(means.shape, generator=generator, dtype=torch.float64).to(means),
    )
    means = torch.where(
        empty[:, None], means[largest] + 0.5 * variances[largest].sqrt() * noise, means
    )
    variances = torch.where(empty[:, None], variances[largest], variances)
    weights = torch.where(empty, 0, weights)
    sharing = empty | (torch.arange(len(empty), device=empty.device) == largest)
    weights = torch.where(sharing, weights[largest] / sharing.sum(), weights)
    return weights / weights.sum(), means, variances


def distances(x, centres):
    """|x - c|^2 - |x|^2 of vectors x (D, N) and centres (P, D) -> (P, N)."""
    return torch.addmm(centres.square().sum(1)[:, None], centres, x, alpha=-2)


def cluster(x, centres):
    """Moments (M, 1 + 2 D) of the vectors x (D, N) nearest to each centre."""
    members = (
        distances(x, centres).argmin(0) == torch.arange(len(centres), device=x.device)[:, None]
    )
    return moments(x, x.square(), members.to(x))


def draw(pool, components, scale, chunk, generator):
    """Random vectors of all processes where k-means may start, (DRAWS, M, D).

    A draw takes the vectors with the smallest hashes, so it does not depend on the order and the
    process they lie in.
    """
    hashes = (
        torch.randn(DRAWS, pool.shape[1], generator=generator, dtype=torch.float64).to(pool.device)
        * 1e6
        / scale
    )
    found = []
    for x in pool.split(chunk):
        keys, index = (
            (hashes @ x.T.double()).frac().abs().topk(min(components, len(x)), largest=False)
        )
        found.append((keys.cpu(), x[index].cpu()))
    keys, vectors = (
        torch.cat(parts, 1) for parts in zip(*itertools.chain(*distributed.gather(found)))
    )
    order = keys.argsort(1)[
        :, torch.arange(components) % keys.shape[1]
    ]  # fewer vectors than components repeat
    return vectors[torch.arange(DRAWS)[:, None], order].to(pool.device)


class Pool:
    """A uniform sample of at most `size` vectors of a stream, in memory that is reserved once."""

    def __init__(self, size, like, generator):
        self.rows = like.new_empty(
            size, like.shape[-1]
        )  # on the CPU a page takes memory when it is first written
        self.generator, self.count = generator, 0

    def add(self, maps, index):
        """Take maps (B, h, w, D) at index (n, 3): fill up, then replace, so that all seen so far
        are equally likely."""
        size, room = len(self.rows), max(0, len(self.rows) - self.count)
        fresh, rest = index[:room], index[room:]
        self.rows[self.count : self.count + len(fresh)] = maps[fresh.unbind(1)].to(self.rows.dtype)
        self.count += len(index)
        if len(rest):
            number = len(rest) * size / self.count + torch.rand((), generator=self.generator).item()
            chosen = torch.randperm(len(rest), generator=self.generator)[: int(number)].to(
                rest.device
            )
            slots = torch.randperm(size, generator=self.generator)[: len(chosen)].to(rest.device)
            self.rows[slots] = maps[rest[chosen].unbind(1)].to(self.rows.dtype)


def kmeans(total, pool, components, iterations, chunk, generator):
    """The best of several random starts, moved until no centre moves by 1e-3 of the range ->
    centres (M, D), moments.

    The paper scales the features to [0, 1] for it, which changes nothing but the unit of that
    tolerance.
    """
    ends = distributed.gather([*map(float, pool.aminmax())] if len(pool) else [])
    low, *_, high = sorted(itertools.chain(*ends))
    scale = max(high - low, 1e-30)
    starts = draw(pool, components, scale, chunk, generator)
    costs = total(
        lambda x: (
            distances(x, starts.flatten(0, 1))
            .unflatten(0, starts.shape[:2])
            .amin(1)
            .sum(1)
            .double()
        )
    )
    centres = starts[costs.argmin()]
    for _ in range(iterations):
        sums = total(cluster, centres)
        weights, means, _ = maximisation(sums, 0)
        moved = torch.where(weights[:, None] > 0, means, centres).to(pool)
        shift, centres = (moved - centres).norm(dim=1).max(), moved
        if shift < 1e-3 * scale:
            break
    return centres.double(), sums


def fit_mixture(pool, share, components, *, iterations, tolerance, start, floor, chunk, generator):
    """k-means, then EM.

    Args:
        pool: (n, D) of this process, centred in place.
        share: how often the sums of this process count.
        floor: smallest variance.
        generator: in the same state on all processes.
    Returns:
        weights (M), means (M, D), variances (M, D), log-likelihood quantiles (LEVELS), number of
        reseeded components.
    """

    def total(function, *arguments):
        return distributed.all_reduce(
            share * sum(function(x.T, *arguments) for x in pool.split(chunk))
        )

    _, centre, _ = maximisation(total(whole), 0)
    pool -= centre.to(pool)
    means, sums = kmeans(total, pool, components, iterations, chunk, generator)
    weights, _, variances = maximisation(sums, 0)
    within = weights @ variances if start == 0 else torch.full_like(means[0], start)
    parameters = (
        torch.full_like(weights, 1 / components),
        means,
        within.clamp_min(floor).expand_as(means),
    )

    before, reseeded, needed = -math.inf, 0, 1e-3 * min(1, sums[:, 0].sum().item() / components)
    for _ in range(iterations):
        sums = total(expectation, *parameters)
        if not sums.isfinite().all():
            break  # keep the parameters: what follows from these sums is not finite
        parameters = maximisation(sums[:, :-1], floor)
        likelihood, empty = (sums[:, -1].sum() / sums[:, 0].sum()).item(), sums[:, 0] < needed
        if empty.any():
            parameters, before = reseed(*parameters, empty, generator), -math.inf
            reseeded += int(empty.sum())
        elif likelihood - before < tolerance:
            break
        else:
            before = likelihood

    doubles = (part.double().T for part in pool.split(chunk))  # one at a time: a pool is large
    values = torch.cat([log_joint(x, x.square(), *parameters).logsumexp(0) for x in doubles]).cpu()
    parts = distributed.gather((values, torch.full_like(values, share, dtype=torch.float64)))
    values, shares = (torch.cat(part) for part in zip(*parts))
    values, order = values.sort()
    below = shares[order].cumsum(0)
    index = torch.searchsorted(below, below[-1] * torch.linspace(0, 1, LEVELS, dtype=below.dtype))
    weights, means, variances = parameters
    return (
        weights,
        means + centre.to(pool),
        variances,
        values[index.clamp_max(len(values) - 1)],
        reseeded,
    )
