"""Category-basis prototypes as the classifier: "Frozen is better than learning" (Chen et al., PR
2024).

Logits are inner products with frozen, mutually orthogonal prototypes of one length (equations 1 and
2). Orthogonality keeps similar classes from getting correlated weights, the equal length keeps
frequent classes from getting longer ones. There is no bias, which would bring the prior back, and
features are not normalised in the pixel loss.

    model.classifier: {name: cbp.CBP, length: 2}

The paper's ablations are options:

    {name: cbp.CBP, update: gradient}       # or ema; or penalty, with the loss occl.Orthogonality
    {name: cbp.CBP, equal: false}               # or ortho: false
    {name: cbp.CBP, ortho: false, init: FILE}   # of models/prototypes/text.py or .../masked.py

Two things are ideas of this project: several prototypes per class, and frames for fewer feature
channels than prototypes (models/prototypes/basis.py):

    {name: cbp.CBP, per_class: 4, assign: sinkhorn}    # with the loss {name: protoseg.Contrast}
    {name: cbp.CBP, fallback: polar}

Cross-entropy on pooled logits is content when one prototype of a class takes all of its pixels. In
the contrast of ProtoSeg (losses/protoseg.py) the others of the class are negatives, and with a
balanced assignment each gets its share.
"""

import logging
from typing import Literal

import torch
import torch.nn.functional as F

from engine.ranges import Few, Positive, Share
from engine.statistics import class_means, cosine
from models.classifiers.base import Classifier
from models.prototypes import basis
from models.prototypes._sinkhorn import balanced, numbered
from models.prototypes.text import choose, read_rows

logger = logging.getLogger("engine")


class CBP(Classifier):
    """Features (B, D, h, w) -> logits (B, K, h, w) = <features, prototypes>.

    Args:
        length: T, the norm of every prototype: 2 in the paper's default, 0.3 to 3 per data set and
            network.
        update: frozen; gradient: the optimiser trains the vectors, and nothing makes them equal
            again; ema: w_l <- m w_l + (1 - m) s_l with the mean feature s_l of the class in the
            step, for classes that occur, and nothing makes them orthogonal or equal again; penalty:
            the optimiser trains u in w = T u / |u|.
        momentum: m of ema [R].
        equal: all of length T; otherwise as long as they are drawn, or as Gram-Schmidt leaves them,
            whatever T is.
        ortho: mutually orthogonal; otherwise in the directions that are drawn.
        init: random, or a file with a row of any number of channels per class.
        rows, map: names of the rows of a plain array in `init`, and {class: [names of rows]} for
            classes that have no row of their own name, as in models/prototypes/text.py.
        fallback: when D < K M cannot hold K M orthogonal vectors. none is an error; project, polar
            and etf are frames of unit vectors times T, see basis.frame.
        per_class: M prototypes per class, all K M of them orthogonal.
        pool: the logit of a class of its M: the largest, or their log-sum-exp.
        assign: which of the M a labelled pixel belongs to, in ema and in protoseg.Contrast: the
            nearest (argmax), or so that each takes an equal share of the pixels of its class in a
            micro-batch (sinkhorn).
    State: prototypes.vectors (K M, D), those of a class one after the other.
    Raises:
        ValueError: fewer feature channels than prototypes and no fallback; a file that does not
            fit; options that contradict each other.
    """

    def __init__(
        self,
        *,
        in_channels,
        num_classes,
        classes=(),
        length: Positive = 2.0,
        update: Literal["frozen", "gradient", "ema", "penalty"] = "frozen",
        momentum: Share = 0.999,
        equal: bool = True,
        ortho: bool = True,
        init: str = "random",
        rows: str | list[str] | None = None,
        map: dict[str, list[str] | str] | None = None,
        fallback: Literal["none", "project", "polar", "etf"] = "none",
        per_class: Few = 1,
        pool: Literal["max", "logsumexp"] = "max",
        assign: Literal["argmax", "sinkhorn"] = "argmax",
    ):
        super().__init__()
        count = num_classes * per_class
        what = f"{num_classes} classes" + f" with {per_class} prototypes each" * (per_class > 1)
        short = ortho and count > in_channels
        wrong = {
            "rows and map say how a file is read: set init=PATH": (
                init == "random" and (rows or map)
            ),
            f"per_class is {per_class}: it must be 1 with a file of rows as init": (
                per_class > 1 and init != "random"
            ),
            f"{what} need at least {count} feature channels for orthogonal prototypes, and the "
            f"decoder has {in_channels}: raise model.decoder.width, or set "
            "model.classifier.fallback=polar": short and fallback == "none",
            "update: penalty and a fallback make all prototypes equally long: they need equal: "
            "true": not equal and (short or update == "penalty"),
        }
        if sentences := [sentence for sentence, met in wrong.items() if met]:
            raise ValueError(sentences[0])
        self.per_class, self.length, self.momentum, self.pool = per_class, length, momentum, pool
        self.unit, self.follows = update == "penalty", update == "ema"
        self.rounds = 3 if assign == "sinkhorn" else 0  # none: each pixel's nearest prototype
        drawn = (
            basis.kaiming_rows(count, in_channels)
            if init == "random"
            else read(init, rows, map or {}, classes, in_channels)
        )
        if not ortho:
            vectors = F.normalize(drawn, dim=1) * length if equal else drawn
        elif short:
            vectors = basis.frame(drawn, fallback) * length
            if not vectors.is_meta:
                logger.info(
                    f"cbp.CBP: {count} prototypes in {in_channels} channels ({fallback}): the "
                    f"largest |cosine| of two is {float(basis.coherence(vectors)):.3f}"
                )
        else:
            vectors = basis.gram_schmidt(drawn, equal) * (length if equal else 1.0)
        if not vectors.is_meta and not vectors.norm(dim=1).min() > 1e-6 * length:
            raise ValueError(f"{init} has a row that is zero or not finite")
        self.prototypes = basis.Rows(vectors, learned=update in ("gradient", "penalty"))

    def components(self):
        """The prototypes of each class (K, M, D)."""
        vectors = self.prototypes.means()
        vectors = F.normalize(vectors, dim=1) * self.length if self.unit else vectors
        return vectors.unflatten(0, (-1, self.per_class))

    def means(self):
        """The prototypes (K, D); of several per class the direction of their mean, with length
        T."""
        vectors = self.components()
        return (
            vectors[:, 0]
            if self.per_class == 1
            else F.normalize(vectors.mean(1), dim=1) * self.length
        )

    def every(self):
        """All prototypes (K M, D)."""
        return self.components().flatten(0, 1)

    def forward(self, features, output=None):
        """In training `output.components` gets the cosines (B, K, M, h, w) of several prototypes
        per class."""
        scores = basis.inner_products(features, self.every())
        if self.per_class == 1:
            return scores
        if output is not None and self.training:
            output.components = self.cosines(features)
        scores = scores.unflatten(1, (-1, self.per_class))
        return scores.amax(2) if self.pool == "max" else scores.logsumexp(2)

    def cosines(self, features):
        """Features (B, D, h, w) -> (B, K, M, h, w) in at least float32."""
        return cosine(features, self.every()).unflatten(1, (-1, self.per_class))

    def assign(self, scores, labels):
        """Cosines (B, K, M, h, w), labels (B, h, w) -> numbers of prototypes (B, h, w).

        Those of a label are M label + 0 ... M - 1; -1 stands where there is no label.
        """
        options = {"num_classes": scores.shape[1], "sharpness": 0.05, "rounds": self.rounds}
        return numbered(scores, labels, lambda rows, own: balanced(rows, own, **options))

    @torch.no_grad()
    def update(self, batches, step=None):
        """update: ema, after an optimiser step."""
        if self.follows:
            vectors = self.prototypes.vectors
            if self.per_class > 1:
                batches = ((f, self.assign(self.cosines(f), labels), w) for f, labels, w in batches)
            means, present = class_means(batches, vectors)
            moved = torch.lerp(means, vectors, self.momentum)
            vectors.copy_(torch.where(present[:, None], moved, vectors))


def read(file, rows, mapped, classes, dim):
    """The rows of a file for these classes, in `dim` channels: (K, D) float64."""
    if not classes:
        raise ValueError(f"init: {file} is read by the names of the classes, and there are none")
    vectors, names = read_rows(file, rows)
    taken = [vectors[numbers].mean(0) for numbers in choose(names, classes, mapped, file)]
    return basis.resized_rows(torch.stack(taken), dim)
