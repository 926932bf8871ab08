"""Gaussian mixtures: every class is a density, p(x|c) = sum_m pi_cm N(x; mu_cm, diag sigma_cm^2).

Source prototypes of BiSMAP (Lu et al., "Bidirectional Self-Training with Multiple Anisotropic Prototypes", ACM MM
2022, section 3; details from its released code).

    prototypes.mixtures: {name: mixtures.Mixtures, components: 8, pool: 300000}

    log p(x|c) = logsumexp_m [log pi_cm - 1/2 sum_d (log 2 pi sigma^2_cmd + (x_d - mu_cmd)^2 / sigma^2_cmd)]

It is a density in nats, without a class prior: its level depends on the network, so `quantiles` says which level a share
of the fitted vectors exceeds.

The square is expanded, x^2/s^2 - 2 x mu/s^2 + mu^2/s^2: two matrix products for all components, instead of a tensor
N x M x D. That cancels where |x| is large against sigma, so a mean is subtracted first: in `fit` that of the class, in
`score` and `update` the mean of the class means. Everything is float32 or wider, with autocast off.

    fit      offline, the paper's: a pool of vectors per class, k-means, then EM.
    update   online [R]: one EM step on the moments (pi, pi mu, pi (sigma^2 + mu^2)), m old + (1 - m) new (Cappe and
             Moulines 2009). The released code has a moving average of parameters instead and never calls it.

Processes exchange sums only. Two equal one on the union of their data, to rounding, for `update` always and for `fit`
while no process sees more than `pool` vectors of a class; beyond that each keeps a uniform sample of its own share, and
its sums count for all that it saw.
"""

import math

import torch
from torch import nn

from engine import distributed

ABSENT = -1e8  # log-likelihood of a class without a mixture
DRAWS = 20  # random starts of k-means
LEVELS = 101  # stored quantiles: 0, 0.01 ... 1


def log_joint(x, square, weights, means, variances):
    """log(pi_m N(x_n; mu_m, sigma_m^2)): x (D, N) and its square, parameters (M), (M, D), (M, D) -> (M, N)."""
    precisions = 1 / variances
    linear = means * precisions
    constant = weights.log() - 0.5 * (means * linear + variances.log() + math.log(2 * math.pi)).sum(1)
    return torch.addmm(
        torch.addmm(constant[:, None].to(x), linear.to(x), x), precisions.to(x), square, alpha=-0.5
    )  # fmt: skip


def moments(x, square, shares):
    """Sums of r, r x and r x^2 for shares r (M, N) of the vectors x (D, N) -> (M, 1 + 2 D), float64."""
    return torch.cat([shares.sum(1, keepdim=True), shares @ x.T, shares @ square.T], 1).double()


def expectation(x, parameters):
    """E step: x (D, N) -> (M, 2 + 2 D): the moments under the responsibilities, and their part of sum_n log p(x_n)."""
    square = x.square()
    joint = log_joint(x, square, *parameters)
    evidence = joint.logsumexp(0)
    shares = joint.sub_(evidence).exp_()
    return torch.cat([moments(x, square, shares), (shares @ evidence)[:, None].double()], 1)


def maximisation(sums, floor):
    """M step: moments (..., M, 1 + 2 D) -> weights (..., M), means and variances (..., M, D).

    The variance is clamped, where the released code adds 1e-6 to it: the constrained maximum, so EM stays monotone.
    """
    mass, first, second = sums.split([1, (sums.shape[-1] - 1) // 2] + [(sums.shape[-1] - 1) // 2], -1)
    positive = torch.where(mass > 0, mass, 1)
    means = first / positive
    variances = torch.maximum(second / positive - means.square(), torch.as_tensor(floor).to(means))
    return (mass / mass.sum(-2, keepdim=True)).squeeze(-1), means, variances


class Pool:
    """A uniform sample of at most `size` vectors of a stream, in memory that is reserved once."""

    def __init__(self, size, like, generator):
        self.rows = like.new_empty(size, like.shape[-1])  # pages that are never written take no memory on the CPU
        self.generator, self.count = generator, 0

    def add(self, maps, index):
        """Vectors of maps (B, h, w, D) at index (n, 3): fill the room, then replace, so that all stay equally likely."""
        size = len(self.rows)
        fresh, index = index.split([room := min(len(index), max(0, size - self.count)), len(index) - room])
        self.rows[self.count : self.count + room] = maps[fresh.unbind(1)].to(self.rows)
        self.count += room + len(index)
        if len(index):
            chance = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            number = int(len(index) * size / self.count + chance)
            chosen, slots = (torch.randperm(n, generator=self.generator)[:number] for n in (len(index), size))
            self.rows[slots.to(index.device)] = maps[index[chosen.to(index.device)].unbind(1)].to(self.rows)

    def vectors(self):
        """(n, D)."""
        return self.rows[: self.count]


class Mixtures(nn.Module):
    """Diagonal Gaussian mixtures, one per class.

    Args:
        components: M per class.
        pool: most vectors of a class that a process keeps in `fit`, on the device of the buffers. 19 classes x 300,000
            x 256 channels are 5.8 GB.
        iterations: most iterations of EM, and of k-means before it.
        tolerance: EM stops when the mean log-likelihood gains less, in nats.
        start: variance at the start of EM; 0 takes the variances of the k-means clusters [R], for features whose
            spread is far from 1.
        floor: smallest variance.
        relative_floor: the same as a share of the mean variance of the class; 1e-4 to 1e-3 if labels collapse [R].
        momentum: m of `update`.
        chunk: vectors at a time.
    """

    def __init__(
        self,
        *,
        num_classes,
        in_channels,
        seed=0,
        components: int = 8,
        pool: int = 300_000,
        iterations: int = 100,
        tolerance: float = 1e-3,
        start: float = 1.0,
        floor: float = 1e-6,
        relative_floor: float = 0.0,
        momentum: float = 0.99,
        chunk: int = 16384,
    ):
        super().__init__()
        self.seed, self.pool, self.iterations, self.tolerance, self.start = seed, pool, iterations, tolerance, start
        self.floor, self.relative_floor, self.momentum, self.chunk = floor, relative_floor, momentum, chunk
        self.register_buffer("component_weights", torch.full((num_classes, components), 1 / components))
        self.register_buffer("component_means", torch.zeros(num_classes, components, in_channels))
        self.register_buffer("component_variances", torch.ones(num_classes, components, in_channels))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("likelihood_quantiles", torch.full((num_classes, LEVELS), ABSENT))
        self.register_buffer("reseeded", torch.zeros(num_classes, dtype=torch.long))  # empty components in `fit`

    def means(self):
        """(K, D), sum_m pi_m mu_m; zero rows for classes not seen yet."""
        return torch.einsum("km,kmd->kd", self.component_weights, self.component_means)

    def quantiles(self, level):
        """Log-likelihoods (K) that a share `level` of the vectors in the last fit does not exceed, to 0.01."""
        return self.likelihood_quantiles[:, round(level * (LEVELS - 1))]

    def _log_joint(self, x):
        """x (D, N) -> joint (K, M, N), and x about the mean of the class means with its square, both (D, N)."""
        origin = (self.means() * self.seen[:, None]).sum(0) / self.seen.sum().clamp_min(1)
        x = x - origin[:, None].to(x)
        square, means = x.square(), self.component_means.double() - origin
        weights, variances = self.component_weights.double(), self.component_variances.double()
        joint = log_joint(x, square, weights.flatten(), means.flatten(0, 1), variances.flatten(0, 1))
        return joint.unflatten(0, weights.shape), x, square

    def components(self, features):
        """Log-densities with their weights, log(pi_cm N_cm): (B, D, h, w) -> (B, K, M, h, w). Whole, for diagnosis;
        the softmax over M are the responsibilities."""
        with torch.autocast(features.device.type, enabled=False):
            maps = features.flatten(2).to(torch.promote_types(features.dtype, torch.float32))
            return torch.stack([self._log_joint(x)[0] for x in maps]).unflatten(3, features.shape[2:])

    def score(self, features):
        """Log-likelihoods log p(x|c) in nats, -1e8 for classes not seen: (B, D, h, w) -> (B, K, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(features.dtype, torch.float32)
            scores = features.new_empty(len(features), len(self.seen), features[0, 0].numel(), dtype=dtype)
            for image, maps in enumerate(features.flatten(2)):  # (D, N)
                for start in range(0, maps.shape[1], self.chunk):
                    joint, *_ = self._log_joint(maps[:, start : start + self.chunk].to(dtype))
                    result = torch.where(self.seen[:, None], joint.logsumexp(1), ABSENT)
                    scores[image, :, start : start + self.chunk] = result
            return scores.unflatten(2, features.shape[2:])

    @torch.no_grad()
    def update(self, batches):
        """One online EM step for the classes that occur; the others stay as they are, all do if a sum is not finite.

        The first visit of a class puts its components around the mean of the class, at random.
        """
        k, m, d = self.component_means.shape
        classes, sums = torch.arange(k, device=self.seen.device)[:, None], self.component_means.new_zeros(())
        origin = (self.means() * self.seen[:, None]).sum(0) / self.seen.sum().clamp_min(1)
