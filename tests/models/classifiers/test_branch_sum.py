"""The sum of branches."""

import pytest

from engine.build import build
from engine.config import ConfigError
from models.classifiers.branch_sum import BranchSum


def test_branch_sum_needs_the_channels_of_its_branches_and_has_no_state():
    message = r"4 x 19 = 76 feature channels, and the decoder has 256: set model\.decoder\.width=19"
    with pytest.raises(ConfigError, match=message):
        build(
            "models.classifiers", {"name": "branch_sum.BranchSum"}, in_channels=256, num_classes=19
        )
    classifier = BranchSum(in_channels=76, num_classes=19)
    assert not list(classifier.parameters()) and not classifier.state_dict()
