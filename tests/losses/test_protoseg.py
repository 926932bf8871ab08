"""The losses of ProtoSeg, and of GMMSeg where both have them."""

import pytest
import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.statistics import resize_labels
from losses import gmmseg, protoseg
from models.classifiers.linear import Linear
from tests.models.classifiers.peers import D, K, M, build, evaluate, look, scene, terms, unit_rows


def test_contrast_is_cross_entropy_towards_the_assigned_prototype():
    for part in (build("ProtoSeg"), build("GMMSeg")):
        features, labels = scene()
        scores = look(part, features).components
        targets = part.assign(scores, labels)
        assert torch.equal(targets // M, torch.where(labels < K, labels, -1))
        assert len(targets.unique()) == K * M + 1
        for temperature in (0.1, 1.0):
            term = type(terms(part)[0])(temperature=temperature)
            expected = F.cross_entropy(scores.flatten(1, 2) / temperature, targets, ignore_index=-1)
            torch.testing.assert_close(evaluate(term, part, features, labels), expected)


def test_distance_is_zero_only_at_the_prototype():
    part, (_, labels) = build("ProtoSeg", rounds=0), scene()
    part.embed = unit_rows
    known = torch.where(labels < K, labels, 0)
    features = part.vectors[known, 1].permute(0, 3, 1, 2)
    assert evaluate(protoseg.Distance(), part, features, labels) < 1e-28
    other = F.normalize(features + 0.1 * torch.randn_like(features), dim=1)
    found = evaluate(protoseg.Distance(), part, other, labels)
    cosine = (other * features).sum(1)
    torch.testing.assert_close(found, (1 - cosine[labels < K]).square().mean())
    assert found > 1e-5


def test_losses_count_every_labelled_pixel_alike():
    part, (features, labels) = build("ProtoSeg"), scene()
    for term in terms(part):
        once = evaluate(term, part, features, labels)
        assert torch.isclose(
            evaluate(term, part, features, labels, pixels=torch.tensor(7)) * 7,
            once * 4 * (labels < K).sum(),
        )
        fine = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(resize_labels(fine, labels.shape[-2:]), labels)


def test_losses_say_which_classifier_they_need():
    part, (features, labels) = Linear(num_classes=K, in_channels=D).double(), scene()
    for term in (protoseg.Contrast(), protoseg.Distance(), gmmseg.Contrast()):
        name = f"{type(term).__module__}.{type(term).__name__}".removeprefix("losses.")
        with pytest.raises(UserError, match=rf"{name} needs .*: protoseg\.ProtoSeg, gmmseg\.GMMSe"):
            evaluate(term, part, features, labels)
    with pytest.raises(UserError, match=r"protoseg\.Distance needs cosines.* protoseg\.ProtoSeg"):
        evaluate(protoseg.Distance(), build("GMMSeg"), features, labels)
