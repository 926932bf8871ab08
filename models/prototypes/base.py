"""The face of the prototype family: class vectors that anything can be compared with, contrasted
with or aligned to.

Members are interchangeable: whatever asks for prototypes takes any of them by name. The classifier
of the network is a member too, named "classifier" (models/classifiers/base.py).
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from engine.statistics import cosine
from engine.step import Step

# (features (B, D, h, w), labels (B, h, w) with 255 = ignore, weights (B, h, w) or None)
Evidence = tuple[Tensor, Tensor, Tensor | None]


class Prototypes(nn.Module):
    """K class vectors of D channels. State lies in buffers of at least float32, so that a
    checkpoint holds it.

    Attributes:
        seen: (K) bool, which classes have a vector.
        vectors: (K, D), or whatever a member makes `means` of.
        offline: images of the training set that `fit` looks at before the first step; 0: it follows
            the training.
        space: "features" if its vectors are compared with the features; "joint" with embeddings in
            the space of text and images, as the configuration says; "embedding" for vectors of an
            embedding of its own (ProtoSeg, GMMSeg).
    """

    seen: Tensor
    vectors: Tensor
    space = "features"
    offline = 0

    def keep(self, **buffers: Tensor) -> None:
        """Register buffers."""
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def means(self) -> Tensor:
        """Class vectors (K, D); zero rows for classes not seen yet."""
        return self.vectors

    def every(self) -> Tensor:
        """All vectors (K M, D) that are trained: of cbp.CBP M of each class."""
        return self.means()

    def score(self, features: Tensor) -> Tensor:
        """Similarity or log-likelihood: (B, D, h, w) -> (B, K, h, w). Here the cosine."""
        return cosine(features, self.means())

    def pair_means(
        self, features: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The class vectors of each image (B, K, D) and which it has (B, K) bool, of features
        (B, D, h, w), labels and weights (B, h, w). Here the same for all images."""
        means = self.means()
        return means.expand(len(features), *means.shape), self.seen.expand(len(features), -1)

    def quantiles(self, level: float) -> Tensor | None:
        """Score (K) that a share `level` of what it was fitted to does not exceed; None if it does
        not know."""
        return None

    def update(self, batches: Iterable[Evidence], step: Step) -> None:
        """After an optimiser step, without gradient: follow the micro-batches of the step, with one
        all-reduce, so that neither accumulation nor the number of processes changes anything. Here
        frozen."""

    def fit(self, batches: Callable[[], Iterable[Evidence]], prototypes: dict) -> None:
        """Offline, without gradient. `batches()` iterates over a data set anew; `prototypes` are
        all members by name. Here frozen."""

    def tables(self) -> dict:
        """For TensorBoard: {name: (values (K, N) with nan for no value, N column names, title,
        format)}. Here none."""
        return {}
