"""Gaussian mixtures: every class is a density, p(x|c) = sum_m pi_cm N(x; mu_cm, diag sigma_cm^2).

Source prototypes of BiSMAP (Lu et al., "Bidirectional Self-Training with Multiple Anisotropic
Prototypes for Domain Adaptive Semantic Segmentation", ACM MM 2022; constants of its released code).

    prototypes.mixtures: {name: mixtures.Mixtures, components: 8, pool: 300000}

    log p(x|c) = logsumexp_m [log pi_cm - 1/2 sum_d (log 2 pi sigma^2_cmd + (x_d - mu_cmd)^2 /
    sigma^2_cmd)]

That is a density in nats without a class prior. Its level depends on the network; `quantiles` gives
it as a share of the fitted vectors.

The square is expanded, x^2/s^2 - 2 x mu/s^2 + mu^2/s^2: two matrix products for all components
instead of a tensor N x M x D. That cancels where |x| is large against sigma, so a mean is
subtracted first: in `fit` that of the class, otherwise the mean of the class means, and EM and
scores are computed in float64. (In float32 a class whose dead channels lie at the floor is off by 5
to 20 nats; float64 costs the same on a CPU, and the products are small on a GPU.)

    fit      the paper's, offline: a pool of vectors per class, k-means, then EM.
    update   online [R]: one EM step on the moments s = (pi, pi mu, pi (sigma^2 + mu^2)), s <- m s +
             (1 - m) s_batch
             (Cappe and Moulines 2009). The released code averages parameters instead, and never
             calls it.

Processes exchange sums and the few vectors where k-means starts. Two of them equal one on the union
of their data, to rounding: `update` always, `fit` while none sees more than `pool` vectors of a
class. Beyond that each process keeps a uniform sample of its own share, whose sums count for all
that it saw.
"""

import torch

from engine import distributed
from engine.ranges import Count, Few, Momentum, NonNegative, Positive
from models.prototypes._em import LEVELS, Pool, fit_mixture, log_joint, maximisation, moments
from models.prototypes.base import Prototypes

ABSENT = -1e8  # log-likelihood of a class without a mixture


class Mixtures(Prototypes):
    """Diagonal Gaussian mixtures, one per class.

    Args:
        components: M per class.
        pool: most vectors of a class that a process keeps in `fit`, on the device of the buffers:
            19 classes x 300,000 x 256 channels take 5.8 GB.
        memory: GiB of the pools of all classes together, which make `pool` smaller where classes
            are many.
        iterations: most iterations of k-means, and of EM.
        tolerance: EM stops when the mean log-likelihood gains less, in nats.
        start: variance at the start of EM; 0 takes the one within the k-means clusters [R], for
            features whose spread is far from 1.
        floor: smallest variance.
        momentum: m of `update`.
        chunk: vectors at a time.
    """

    def __init__(
        self,
        *,
        num_classes,
        in_channels,
        seed=0,
        components: Few = 8,
        pool: Count = 300_000,
        memory: Positive = 8.0,
        iterations: Count = 100,
        tolerance: NonNegative = 1e-3,
        start: NonNegative = 1.0,
        floor: Positive = 1e-6,
        momentum: Momentum = 0.99,
        chunk: Count = 8192,
    ):
        super().__init__()
        most = int(memory * 2**30 / (4 * num_classes * in_channels))
        self.seed, self.pool, self.iterations = seed, max(1, min(pool, most)), iterations
        self.tolerance, self.start, self.momentum = tolerance, start, momentum
        self.floor, self.chunk = floor, chunk
        shape = num_classes, components, in_channels
        self.keep(
            component_weights=torch.full(shape[:2], 1 / components),
            component_means=torch.zeros(shape),
            component_variances=torch.ones(shape),
            seen=torch.zeros(num_classes, dtype=torch.bool),
            likelihood_quantiles=torch.full((num_classes, LEVELS), ABSENT),
            reseeded=torch.zeros(num_classes, dtype=torch.long),  # empty components met by `fit`
        )
        drawn = torch.Generator().manual_seed(seed)
        noise = torch.randn(components, in_channels, generator=drawn, dtype=torch.float64)
        self.noise = noise - noise.mean(0)  # of the first visit

    def means(self):
        """(K, D), sum_m pi_m mu_m; zero rows for classes not seen yet."""
        return torch.einsum("km,kmd->kd", self.component_weights, self.component_means)

    def quantiles(self, level):
        """Log-likelihoods (K) that a share `level` (to 0.01) of the vectors of the last fit does
        not exceed."""
        return self.likelihood_quantiles[:, round(level * (LEVELS - 1))]

    def tables(self):
        """Likelihood quantiles of the vectors of the last fit, and the mean responsibility of each
        component."""
        levels, absent = (0.05, 0.25, 0.5, 0.75, 0.95), ~self.seen[:, None]
        quantiles = torch.stack([self.quantiles(level) for level in levels], 1).double()
        shares = self.component_weights.double()
        return {
            "likelihood": (
                quantiles.masked_fill(absent, torch.nan),
                [f"{level:.0%}" for level in levels],
                "quantiles of the log-likelihood, nats",
                "{:.0f}",
            ),
            "components": (
                shares.masked_fill(absent, torch.nan),
                [str(number + 1) for number in range(shares.shape[1])],
                "mean responsibility of each component",
                "{:.0%}",
            ),
        }

    def _origin(self):
        """Mean of the class means (D), float64."""
        return (self.means() * self.seen[:, None]).sum(0).double() / self.seen.sum().clamp_min(1)

    def _log_joint(self, x):
        """x (D, N) -> joint (K, M, N), and x about the origin with its square, both (D, N); all of
        it float64."""
        x = x.double() - self._origin()[:, None]
        square, means = x.square(), self.component_means - self._origin()
        weights, variances = self.component_weights.double(), self.component_variances.double()
        joint = log_joint(
            x, square, weights.flatten(), means.flatten(0, 1), variances.flatten(0, 1)
        )
        return joint.unflatten(0, weights.shape), x, square

    def score(self, features):
        """Log-likelihoods log p(x|c) in nats, -1e8 for classes not seen: (B, D, h, w) ->
        (B, K, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            maps, dtype = features.flatten(2), torch.promote_types(features.dtype, torch.float32)
            scores = maps.new_empty(len(maps), len(self.seen), maps.shape[2], dtype=dtype)
            for image, x in enumerate(maps):  # (D, N)
                for start in range(0, x.shape[1], self.chunk):
                    joint, *_ = self._log_joint(x[:, start : start + self.chunk])
                    score = torch.where(self.seen[:, None], joint.logsumexp(1), ABSENT)
                    scores[image, :, start : start + self.chunk] = score
            return scores.unflatten(2, features.shape[2:])

    def _store(self, where, weights, means, variances):
        """Write the parameters of the classes where (K) is set."""
        for name, new in (("weights", weights), ("means", means), ("variances", variances)):
            buffer = self.get_buffer(f"component_{name}")
            buffer.copy_(
                torch.where(where.view(-1, *[1] * (new.dim() - 1)), new.to(buffer), buffer)
            )

    @torch.no_grad()
    def update(self, batches, step=None):
        """One online EM step for the classes that occur. The others stay as they are; all do if a
        sum is not finite.

        The first visit of a class puts its components at random around the mean of the class, half
        a deviation away.
        """
        k, m, d = self.component_means.shape
        sums = torch.zeros(k, m, 1 + 2 * d, dtype=torch.float64, device=self.seen.device)
        for features, labels, weights in batches:
            weights = torch.ones_like(labels) if weights is None else weights
            with torch.autocast(features.device.type, enabled=False):
                for image in zip(features.flatten(2), labels.flatten(1), weights.flatten(1)):
                    for x, ids, factors in zip(*(part.split(self.chunk, -1) for part in image)):
                        joint, x, square = self._log_joint(x)
                        members = (ids == torch.arange(k, device=ids.device)[:, None]) * factors.to(
                            x
                        )  # (K, N)
                        shares = joint.softmax(1) * members[:, None]
                        sums += moments(x, square, shares.flatten(0, 1)).unflatten(0, (k, m))
        sums, origin = distributed.all_reduce(sums), self._origin()
        count = sums[..., :1].sum(1, keepdim=True)  # (K, 1, 1)
        present = (count > 0).flatten() & sums.isfinite().all()
        new = sums / torch.where(count > 0, count, 1)

        weights, means = self.component_weights[..., None].double(), self.component_means - origin
        old = torch.cat(
            [weights, weights * means, weights * (self.component_variances + means.square())], 2
        )
        merged = torch.lerp(new, old, self.momentum)
        weights, means, variances = maximisation(merged, self.floor)
        self._store(present & self.seen, weights, means + origin, variances)

        _, centre, variances = maximisation(new.sum(1, keepdim=True), self.floor)  # (K, 1, D)
        self.noise = self.noise.to(new.device)  # copied once: every copy is waited for
        means = centre + 0.5 * variances.sqrt() * self.noise
        self._store(
            present & ~self.seen, torch.full_like(weights, 1 / m), means + origin, variances
        )
        self.seen |= present

    @torch.no_grad()
    def fit(self, batches, prototypes=None):
        """EM on a pool of vectors per class, those that are finite and of weight above 0.

        Classes without one stay as they are.
        """
        generator = torch.Generator().manual_seed(self.seed + distributed.rank())
        pools = [Pool(self.pool, self.component_means, generator) for _ in self.seen]
        for features, labels, weights in batches():
            valid = features.sum(
                1, dtype=torch.promote_types(features.dtype, torch.float32)
            ).isfinite()
            valid = valid if weights is None else valid & (weights > 0)
            valid = valid & (labels >= 0) & (labels < len(pools))
            classes = torch.where(valid, labels, len(pools)).flatten().long()
            places = torch.unravel_index(classes.argsort(stable=True), labels.shape)
            # One wait for a GPU, not one of each class.
            counts = torch.bincount(classes, minlength=len(pools) + 1).tolist()
            for pool, own in zip(pools, torch.stack(places, 1).split(counts)):
                pool.add(features.permute(0, 2, 3, 1), own)
        counts = distributed.all_reduce(torch.tensor([pool.count for pool in pools]))
        for c in counts.nonzero().flatten().tolist():
            with torch.autocast(self.seen.device.type, enabled=False):
                *parameters, quantiles, reseeded = fit_mixture(
                    pools[c].rows[: pools[c].count],
                    max(1, pools[c].count / self.pool),
                    self.component_weights.shape[1],
                    iterations=self.iterations,
                    tolerance=self.tolerance,
                    start=self.start,
                    floor=self.floor,
                    chunk=self.chunk,
                    generator=torch.Generator().manual_seed(self.seed + c),
                )
            pools[c] = None  # frees its memory
            for buffer, new in zip(
                (self.component_weights, self.component_means, self.component_variances), parameters
            ):
                buffer[c] = new
            self.likelihood_quantiles[c], self.reseeded[c], self.seen[c] = quantiles, reseeded, True
