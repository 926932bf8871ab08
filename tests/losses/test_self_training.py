"""Self-training: how the teacher's labels are weighted."""

import torch

from losses.self_training import TeacherConfidence
from tests.records import a_step, an_output


def test_teacher_confidence_weights_by_the_share_of_confident_pixels():
    logits = torch.zeros(2, 3, 4, 4)
    logits[:, 1, :2], logits[:, 2, 2:] = 10.0, 0.1  # the upper half is confident
    step = a_step(target=torch.zeros(2, 3, 4, 4), teacher=an_output(logits))
    TeacherConfidence(threshold=0.968, ignore_top=1).before(step)
    labels, weights = step.labels["target"], step.weights["target"]
    assert (labels[:, :2] == 1).all() and (labels[:, 2:] == 2).all()
    assert (weights[:, 0] == 0).all() and (weights[:, 1:] == 0.5).all()


def test_crops_lower_than_the_ignored_rows_have_no_weight():
    step = a_step(target=torch.zeros(1, 3, 4, 4), teacher=an_output(torch.randn(1, 3, 4, 4)))
    TeacherConfidence(threshold=0.0, ignore_bottom=6).before(step)
    assert (step.weights["target"] == 0).all()
