"""The faces of losses and labelers, and the members of prototypes that they ask for."""

import pytest

from engine.errors import UserError
from losses.base import Labeler, Loss, member
from tests.records import a_step


def test_a_labeler_may_leave_every_method_out_and_a_loss_none():
    labeler, step = Labeler(), a_step()
    for method in (labeler.prepare, labeler.before, labeler.after, labeler.update):
        assert method(step) is None
    assert not step.labels and not step.weights
    with pytest.raises(NotImplementedError):
        labeler.label(None, None, {})
    with pytest.raises(NotImplementedError):
        Loss()(step)


def test_a_missing_member_is_named_with_who_asks_and_the_remedy():
    members = {"classifier": 1, "text": 2}
    assert member(members, "text", "it") == 2
    with pytest.raises(UserError) as error:
        member(members, "visual", "ppar", "Add it.")
    assert str(error.value) == (
        "ppar needs the prototypes 'visual'; there are classifier, text. Add it."
    )
