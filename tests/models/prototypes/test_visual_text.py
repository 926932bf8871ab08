"""Visual-text prototypes: how text and class means are blended and learned."""

import torch
import torch.nn.functional as F

from engine.statistics import IGNORE
from models.prototypes.visual_text import VisualText, blended
from tests.models.prototypes.members import D, K, members, unit
from tests.records import a_step


def test_blend_0_is_the_text_and_1_the_direction_of_the_centred_mean():
    text, visual, seen = unit(K, D), torch.randn(K, D).double(), torch.ones(K, dtype=torch.bool)
    torch.testing.assert_close(blended(text, visual, seen, 0.0, True), text)
    moved = visual - visual.mean(0) + text.mean(0)
    torch.testing.assert_close(blended(text, visual, seen, 1.0, True), F.normalize(moved, dim=1))
    torch.testing.assert_close(blended(text, visual, seen, 1.0, False), F.normalize(visual, dim=1))


def test_classes_that_were_not_seen_keep_the_text_and_do_not_move_the_centre():
    text, visual = unit(K, D), torch.randn(K, D).double()
    seen = torch.tensor([True, False, True, True])
    visual[1] = 1e6
    result = blended(text, visual, seen, 0.5, True)
    assert torch.equal(result[1], text[1])
    torch.testing.assert_close(
        result[seen], blended(text[seen], visual[seen], seen[seen], 0.5, True)
    )


def test_the_mean_is_weighted_by_agreement_with_the_text():
    member = VisualText(
        num_classes=K, in_channels=D, temperature=0.1, blend=1.0, center=False, momentum=0.5
    ).double()
    prototypes, features = members(), unit(1, D, 3, 3)
    labels = torch.tensor([[[0, 0, 0], [1, 1, 255], [0, 255, 1]]])
    text = prototypes["text"].vectors
    sums, mass = torch.zeros(K, D).double(), torch.zeros(K).double()
    for row in range(3):
        for column in range(3):
            y, g = int(labels[0, row, column]), features[0, :, row, column]
            if y != IGNORE:
                a = (text @ g / 0.1).softmax(0)[y]
                sums[y] += a * g
                mass[y] += a
    member.update([(features, labels, None)], a_step(prototypes=prototypes))
    expected = F.normalize(sums[:2] / mass[:2, None], dim=1)
    torch.testing.assert_close(member.means()[:2], expected)
    torch.testing.assert_close(member.means()[2:], text[2:])
    assert member.seen.tolist() == [True, True, False, False]


def test_the_running_average_has_no_bias_towards_its_start():
    member = VisualText(num_classes=K, in_channels=D, momentum=0.9).double()
    prototypes, first, second = members(), unit(K, D), unit(K, D)
    for rows in (first, second):
        batch = rows.T[None, :, None], torch.arange(K)[None, None], None
        member.update([batch], a_step(prototypes=prototypes, number=5))
    visual = member.average / member.mass[:, None]
    torch.testing.assert_close(visual, (0.9 * first + second) / 1.9)


def test_nothing_is_learned_before_start_or_by_an_offline_member():
    late = VisualText(num_classes=K, in_channels=D, start=0.5).double()
    batch = [(unit(1, D, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), None)]
    late.update(batch, a_step(prototypes=members(), number=4, total=10))
    assert not late.seen.any() and not late.means().any()
    late.update(batch, a_step(prototypes=members(), number=5, total=10))
    assert late.seen.tolist() == [True, False, False, False]
    offline = VisualText(num_classes=K, in_channels=D, offline=5).double()
    offline.fit(lambda: batch, members())
    before = offline.means().clone()
    offline.update([(unit(1, D, 2, 2), batch[0][1], None)], a_step(prototypes=members(), number=9))
    assert offline.seen[0] and torch.equal(offline.means(), before)
