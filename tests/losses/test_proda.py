"""ProDA: how prototypes weight the teacher's predictions."""

import torch

from losses.proda import Denoise
from models.prototypes.centroids import Centroids

K, D = 3, 4


def test_the_nearest_centroid_is_believed_most():
    """Where the teacher is undecided it decides; a teacher that is sure enough stands against it."""
    centroids = Centroids(num_classes=K, in_channels=D).double()
    centroids.vectors.copy_(torch.eye(K, D))
    centroids.seen.fill_(True)
    labels = torch.randint(K, (2, 5, 6))
    features = torch.eye(K, D).double()[labels].permute(0, 3, 1, 2)
    features = features + 0.1 * torch.randn_like(features)
    logits = torch.zeros(2, K, 5, 6).double()
    assert torch.equal(Denoise().denoise(logits, features, centroids, (5, 6)), labels)
    logits[:, 1] = 9.0
    assert (Denoise().denoise(logits, features, centroids, (5, 6)) == 1).all()
    sharp = Denoise(temperature=0.05)
    assert torch.equal(sharp.denoise(logits, features, centroids, (5, 6)), labels)


def test_denoised_labels_are_those_of_the_equation():
    centroids = Centroids(num_classes=K, in_channels=D).double()
    centroids.vectors.normal_()
    centroids.seen.copy_(torch.tensor([True, False, True]))
    features, logits = torch.randn(1, D, 4, 4).double(), torch.randn(1, K, 4, 4).double()
    found = Denoise(temperature=0.5).denoise(logits, features, centroids, (4, 4))
    for y in range(4):
        for x in range(4):
            distance = (features[0, :, y, x] - centroids.vectors).norm(dim=1)
            trust = (-distance / 0.5).exp() * centroids.seen
            assert found[0, y, x] == (trust * logits[0, :, y, x].softmax(0)).argmax()
