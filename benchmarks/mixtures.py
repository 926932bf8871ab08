"""What class mixtures cost at the paper's size: fit, its memory, scores of 2048 x 1024 pixels.

    python -m benchmarks.mixtures [--classes 19] [--components 8] [--pool 300000] [--dim 256]
    python -m benchmarks.mixtures [--chunks 2048 8192 32768] [--threads 1]

Features are synthetic: overlapping clusters after a ReLU. Working memory is the high-water mark of
the process (Linux) less its size before and less the pool. Seconds are those of one machine,
processor time with one thread. The ratio to torch.distributions, on a slice that fits, is a result.
"""

import os
import resource
import time

import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from benchmarks.kernels import arguments, compare
from models.prototypes.mixtures import Mixtures

SIDE = 100  # of the square maps that feed the pool


def clusters(options):
    """A function that returns maps (1, D, 100, 100) of one class each, until every pool is full."""
    centres = 0.3 * torch.randn(options.classes, options.components, options.dim)

    def batches():
        for c, points in enumerate(centres):
            for _ in range(-(-options.pool // SIDE**2)):
                means = points[torch.randint(len(points), (SIDE, SIDE))]
                features = (means + 0.3 * torch.randn_like(means)).relu_().permute(2, 0, 1)[None]
                yield features, torch.full((1, SIDE, SIDE), c), None

    return batches


def clock():
    """Processor time of one thread, so that other load hardly matters; else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def megabytes():
    """Size of the process now, and its high-water mark."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def fit(options):
    mixtures = Mixtures(
        num_classes=options.classes,
        in_channels=options.dim,
        components=options.components,
        pool=options.pool,
    )
    batches = clusters(options)
    start = clock()
    for _ in batches():
        pass
    drawing, (before, _) = clock() - start, megabytes()
    start = clock()
    mixtures.fit(batches, {})
    seconds = clock() - start - drawing
    pool = options.classes * options.pool * options.dim * 4 / 2**20
    used = megabytes()[1] - before - pool
    print(f"fit: {seconds:.1f} s, {used:.0f} MiB besides a pool of {pool:.0f} MiB", flush=True)
    return mixtures


@torch.no_grad()
def score(mixtures, options):
    for name, (h, w) in {"stride 4": (256, 512), "full size": (1024, 2048)}.items():
        features = torch.rand(1, options.dim, h, w)
        for mixtures.chunk in options.chunks:
            start = clock()
            mixtures.score(features)
            seconds = clock() - start
            count = -(-h * w // mixtures.chunk)
            print(
                f"score at {name}: {seconds:.2f} s in {count} chunks of {mixtures.chunk}",
                flush=True,
            )


@torch.no_grad()
def against_torch(mixtures, options, vectors=512, rounds=5):
    """The same log-likelihoods by torch.distributions."""
    features = torch.rand(1, options.dim, 1, vectors)
    weights, means = mixtures.component_weights, mixtures.component_means
    normal = Independent(Normal(means, mixtures.component_variances.sqrt()), 1)
    reference = MixtureSameFamily(Categorical(weights), normal)
    rows = features[0, :, 0].T[:, None]  # (N, 1, D)
    torch.testing.assert_close(
        mixtures.score(features)[0, :, 0].T, reference.log_prob(rows), rtol=1e-3, atol=1e-2
    )
    ways = {"ours": lambda: mixtures.score(features), "theirs": lambda: reference.log_prob(rows)}
    _, ratio = compare(ways, rounds)["theirs"]
    print(f"torch.distributions takes {ratio:.0f} times as long on {vectors} vectors", flush=True)


def main():
    sizes = {"classes": 19, "components": 8, "pool": 300_000, "dim": 256}
    options = arguments("mixtures", **sizes, chunks=[2048, 8192, 32768])
    mixtures = fit(options)
    score(mixtures, options)
    against_torch(mixtures, options)


if __name__ == "__main__":
    main()
