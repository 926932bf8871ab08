"""The linear classifier."""

import pytest

from models.classifiers.linear import Linear


@pytest.mark.parametrize("std", [0.01, 0.177])
def test_class_vectors_of_the_linear_classifier_start_as_long_as_they_are_told(std):
    classifier = Linear(num_classes=300, in_channels=128, **({} if std == 0.01 else {"std": std}))
    assert float(classifier.means().detach().norm(dim=1).mean()) == pytest.approx(
        std * 128**0.5, rel=0.02
    )
    assert not classifier.conv.bias.any()
