"""CeCo, centre collapse, a term beside the pixel loss: "Understanding Imbalanced Semantic
Segmentation Through Neural Collapse" (Zhong et al., CVPR 2023).

    losses: [{name: cross_entropy.CrossEntropy}, {name: ceco.CeCo, weight: 0.8}]

Pixels of rare classes have little say in the pixel loss; here every class of a batch has one say.
z_c is the mean feature of class c over the batch. m_1 ... m_K are fixed directions, all cosines
between them -1 / (K - 1): a simplex ETF, where neural collapse ends on balanced data.

    L = mean_c -log softmax_j (kappa <z_c / |z_c|, m_j> + log pi_j)_c    over the classes c present

[C], read in the authors' release (dvlab-research/Parametric-Contrastive-Learning at 2fd1504,
GPaCo/Seg, UPerHead_ceco): kappa = 5; the mean over present classes; pi_j, the share of class j by a
file of image counts; weight 0.8 for ADE20K with Swin-T; centres over the images of one GPU, of
features enlarged to the size of the labels. There z_c first passes a 1x1 convolution to 128
channels with batch norm, a linear layer to 512, a ReLU, and after its normalisation the head's
dropout. None of these layers is trained.

Reconstructed [R]: centres of the features themselves, without those layers, at the size of the
features; with `space: joint` of the embedding of model.heads.projector, which is trained. Every
labelled cell counts alike, whatever weight its pixels have in the cross-entropy. `sync`
takes the centres over all processes. `prior` is off by default, because it reads every label of the
training set once. The paper's text was not at hand.
"""

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.ranges import Positive
from engine.statistics import class_sums, resize_labels
from losses.base import Loss


@functools.cache
def simplex(num_classes, dim, seed, device):
    """K unit vectors (K, D), float64, with cosines -1 / (K - 1), turned at random; kept there.

    Raises:
        UserError: D < K - 1.
    """
    if dim < num_classes - 1:
        raise UserError(
            f"ceco.CeCo needs at least {num_classes - 1} channels for {num_classes} classes, and "
            f"there are {dim}: raise model.decoder.width, or set space=joint and a projector head"
        )
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(dim, num_classes - 1, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(turn).Q  # (D, K - 1), orthonormal columns
    # The corners of a simplex about its centre span K - 1 dimensions.
    corners = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    plane = torch.linalg.qr(corners[:, 1:]).Q  # (K, K - 1)
    return math.sqrt(num_classes / (num_classes - 1)) * (plane @ turn.T).to(device)


class CeCo(Loss):
    """Class centres drawn to the corners of a fixed simplex.

    Args:
        counts: returns (n, K) pixels of each class in each training image; for `prior`.
        scale: kappa.
        space: features, which enter the classifier, or joint, the embedding of heads.projector.
        prior: add log pi_j; a class in no image has the share of one in a single image.
        sync: centres over the batch of all processes, or of each process's own images.
        view: the view whose features are meant.
    """

    def __init__(
        self,
        *,
        num_classes,
        seed=0,
        counts=None,
        scale: Positive = 5.0,
        space: Literal["features", "joint"] = "features",
        prior: bool = False,
        sync: bool = True,
        view: str = "source",
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError("a simplex needs at least two classes")
        self.num_classes, self.seed, self.scale = num_classes, seed, scale
        self.space, self.sync, self.view = space, sync, view
        self.prior = torch.zeros(num_classes, dtype=torch.float64)
        if prior:
            if counts is None:
                raise ValueError("prior needs the labels of a training set, and there is none here")
            images = torch.from_numpy(counts() > 0).sum(0).clamp_min(1)
            self.prior = (images / images.sum(dtype=torch.float64)).log()

    def forward(self, step):
        output = step.outputs[self.view]
        features = output.features if self.space == "features" else output.embedding
        if features is None:
            raise UserError("ceco.CeCo: space=joint needs model.heads.projector")
        labels = resize_labels(step.labels[self.view], features.shape[-2:])
        sums, counts = class_sums(features, labels, self.num_classes, sync=self.sync)
        with torch.autocast(features.device.type, enabled=False):
            corners = simplex(self.num_classes, sums.shape[1], self.seed, sums.device)
            self.prior = self.prior.to(sums)  # copied to a GPU once
            # The direction of a mean is that of the sum.
            cosines = F.normalize(sums, dim=1, eps=1e-6) @ corners.to(sums.dtype).T  # (K, K)
            targets = torch.arange(self.num_classes, device=sums.device)
            loss = F.cross_entropy(self.scale * cosines + self.prior, targets, reduction="none")
            present = counts > 0
            return (loss * present).sum() / present.sum().clamp_min(1)
