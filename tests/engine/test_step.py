"""The record of a step: its fields, what it counts, what is refused, what a skipped step leaves."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import train_dg
from engine import distributed
from engine.config import ConfigError
from engine.errors import UserError
from engine.step import Batch, ByView, Output, Step, evidence
from losses.base import Loss
from models.classifiers.cbp import CBP
from models.classifiers.gmmseg import GMMSeg
from models.classifiers.protoseg import ProtoSeg
from models.heads.region import Regions
from models.prototypes.basis import RandomDirections
from models.prototypes.centroids import Centroids
from models.prototypes.mixtures import Mixtures
from models.prototypes.pair import Pair
from models.prototypes.visual_text import VisualText
from tests.records import a_batch, a_step, an_output
from tests.runs import TINY_UDA, train

K, D, IGNORE = 4, 8, 255


# --- fields ---------------------------------------------------------------------------------------


RECORDS = {
    "Step": (a_step, "number, total, source"),
    "Output": (an_output, "logits, features, embedding"),
    "Batch": (lambda: a_batch(torch.zeros(1, 3, 2, 2)), "image, label, sample"),
    "Regions": (lambda: Regions(*torch.zeros(3, 1)), "assignment, domain, transferability"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_misspelt_field_is_an_error_that_lists_the_fields(name):
    make, listed = RECORDS[name]
    record, message = make(), f"{name} has no field 'logit'; it has {listed}"
    with pytest.raises(AttributeError, match=message):
        record.logit  # noqa: B018
    with pytest.raises(AttributeError, match=message):
        record.logit = torch.zeros(1)
    with pytest.raises(TypeError, match="logit"):
        type(record)(logit=torch.zeros(1))


def test_a_term_with_a_typing_error_says_what_there_is():
    class Typing(Loss):
        def forward(self, step):
            return step.outputs["source"].feature.sum() / step.pixels("source")

    with pytest.raises(AttributeError, match="Output has no field 'feature'; it has logits, feat"):
        Typing()(a_step(an_output(features=torch.zeros(1, D, 2, 2)), torch.zeros(1, 4, 4)))


def test_records_do_not_share_what_they_hold():
    one, other = (Step(0, 1, a_batch(torch.zeros(1, 3, 2, 2))) for _ in range(2))
    one.labels["source"] = one.source.label
    one.source.extra["map"] = one.source.label
    assert not other.labels and not other.source.extra


def test_a_batch_is_loaded_as_floats_ids_and_numbers():
    collated = {
        "image": torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1),
        "label": torch.full((1, 1, 1), IGNORE, dtype=torch.uint8),
        "sample": torch.tensor([7]),
        "extra": {"pseudo_labels": torch.full((1, 1, 1), 3, dtype=torch.uint8)},
        "index": torch.tensor([0]),
    }
    batch = Batch.load(collated, torch.device("cpu"))
    assert batch.image.flatten().tolist() == pytest.approx([0, 1, 0.2])
    assert batch.image.dtype == torch.get_default_dtype() and batch.label.dtype == torch.int64
    assert batch.numbers == [7] == batch.sample.tolist() and batch.label.item() == IGNORE
    assert batch.extra["pseudo_labels"].item() == 3


# --- what it counts -------------------------------------------------------------------------------


def test_a_map_that_no_stage_has_stored_is_one_sentence():
    collated = {"image": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "sample": torch.zeros(1)}
    collated |= {"label": torch.zeros(1, 2, 2), "extra": {}}
    batch = Batch.load(collated, torch.device("cpu"))
    with pytest.raises(
        UserError,
        match=r"no such thing for 'pseudo_labels', only for .* maps are stored when a stage starts",
    ):
        batch.extra["pseudo_labels"]


def test_pixels_are_the_labelled_ones_of_the_view_or_those_of_the_whole_step(monkeypatch):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, 1] = IGNORE
    step = a_step(None, {"source": labels, "mixed": torch.full_like(labels, IGNORE)})
    assert step.pixels("source") == 28 and step.pixels("mixed") == 1  # none: a divisor
    step.labels["source"] = torch.full_like(labels, IGNORE)
    assert step.pixels("source") == 28  # counted once
    whole = a_step(labels=labels, counts={"source": torch.tensor(100.0)})
    assert whole.pixels("source") == 100
    whole = a_step(labels=labels, counts={"source": torch.tensor(0.25)})  # one pixel in four processes
    assert whole.pixels("source") == 0.25
    monkeypatch.setattr(distributed, "mean", lambda tensor: (tensor + 4) / 2)
    assert a_step(labels=labels).pixels("source") == 16


def test_samples_are_those_of_the_images_behind_a_view():
    source, target = (a_batch(torch.zeros(2, 3, 4, 4), samples=s) for s in ([1, 2], [8, 9]))
    step = a_step(source=source, target=target)
    assert step.batch("source").sample.tolist() == [1, 2]
    assert step.batch("target").sample.tolist() == step.batch("mixed").sample.tolist() == [8, 9]
    assert a_step(source=source).batch("strong").sample.tolist() == [1, 2]


def test_progress_runs_from_zero_to_below_one():
    assert [a_step(number=n, total=4).progress for n in range(4)] == [0, 0.25, 0.5, 0.75]


def test_the_summary_has_mean_weights_and_labelled_shares_of_all_views_but_the_source():
    labels = torch.tensor([[[0, IGNORE, IGNORE, 1]]])
    weights = {"source": torch.tensor([[[1.0, 0.0, 0.5, 0.5]]])}
    step = a_step(None, {"source": labels, "target": labels}, weights)
    values = {name: float(value) for name, value in step.summary("uda").items()}
    assert values == {"uda/weight_source": 0.5, "uda/labelled_target": 0.5}


def test_scores_are_found_by_the_name_of_their_head():
    maps = torch.randn(6, 1, K, 2, 2)
    regions = Regions(*torch.zeros(3, 1), logits=maps[0])
    output = an_output(maps[1], auxiliary=maps[2], layers=(maps[3], maps[4]), regions=regions)
    heads = {"region": 0, "logits": 1, "auxiliary": 2, "query0": 3, "query1": 4}
    assert all(torch.equal(output.scores(head), maps[i]) for head, i in heads.items())
    with pytest.raises(UserError, match="no head 'query2'; it has logits, auxiliary, region, q"):
        output.scores("query2")
    with pytest.raises(UserError, match=r"no head 'auxiliary'; it has logits\. 'auxiliary' needs"):
        Output(logits=maps[0]).scores("auxiliary")
    bare = an_output(maps[0], regions=Regions(*torch.zeros(3, 1)))
    with pytest.raises(UserError, match="no head 'region'; it has logits"):
        bare.scores("region")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("losses=[{name: bismap.Distillation}]", "uda.labelers=[]", "stages=[{teacher: none}]"),
        ("uda.labelers=[{name: self_training.TeacherConfidence}]", "stages=[{teacher: none}]"),
    ],
    ids=["loss", "labeler"],
)
def test_a_part_that_needs_a_teacher_is_refused_in_a_stage_without_one(options, tmp_path):
    with pytest.raises(
        ConfigError, match=r"stage .*a labeler or a loss needs a teacher: ema or fr"
    ):
        train(tmp_path / "run", *options, config=TINY_UDA)


# --- what a skipped step teaches ------------------------------------------------------------------


GIVEN = {"num_classes": K, "in_channels": D}
FOLLOWERS = {
    "centroids": lambda: Centroids(**GIVEN, momentum=0.5),
    "pair": lambda: Pair(**GIVEN),
    "mixtures": lambda: Mixtures(**GIVEN, components=2, momentum=0.5),
    "visual_text": lambda: VisualText(**GIVEN, momentum=0.5),
    "cbp, ema": lambda: CBP(**GIVEN, update="ema", momentum=0.5),
    "cbp, ema, several": lambda: CBP(**GIVEN, update="ema", momentum=0.5, per_class=2),
    "ProtoSeg": lambda: ProtoSeg(**GIVEN, per_class=2, momentum=0.5),
    "DNC": lambda: ProtoSeg(**GIVEN, per_class=2, momentum=0.5, memory=3, pixels=8),
    "GMMSeg": lambda: GMMSeg(**GIVEN, components=2, width=6, momentum=0.5, update_every=1),
    "GMMSeg, queue": lambda: GMMSeg(
        **GIVEN, components=2, width=6, momentum=0.5, update_every=1, queue=30, pixels=8
    ),
}


def shown(prototypes, factor=1.0, number=0, **fields):
    """A step of source features about their class, times a factor."""
    labels = torch.randint(K, (2, 6, 8))
    labels[:, 0] = IGNORE
    rows = 3 * torch.eye(K, D)[labels.clamp_max(K - 1)] + torch.randn(2, 6, 8, D)
    features = rows.permute(0, 3, 1, 2) * factor
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    output = an_output(features=features, embedding=features)
    return a_step(output, labels, None, prototypes, number, **fields)


def buffers(part):
    return {name: value.clone() for name, value in part.named_buffers()}


@pytest.mark.parametrize("factor", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_skipped_step_leaves_what_follows_the_features_as_it_is(name, steps, factor):
    """After some steps that were taken, or none; the text of VisualText moves in between."""
    part, text = FOLLOWERS[name](), RandomDirections(**GIVEN)
    prototypes = {"classifier": part, "text": text}
    for number in range(steps):
        before, step = buffers(part), shown(prototypes, number=number)
        part.update(evidence([step], "source"), step)
        assert any(not torch.equal(value, before[key]) for key, value in part.named_buffers())
    text.vectors.copy_(F.normalize(torch.randn(K, D), dim=1))
    before = buffers(part)
    # Two micro-batches; the script notes on the last one that the step was not taken.
    first = shown(prototypes, factor, steps)
    last = shown(prototypes, number=steps, skipped=torch.tensor(True))
    part.update(evidence([first, last], "source"), last)
    part.update(
        train_dg.evidence([first, last], "source", "joint", None, None, contextlib.nullcontext()),
        last,
    )
    for key, value in part.named_buffers():
        assert torch.equal(value, before[key]), key


def test_evidence_is_features_without_a_graph_and_labels_at_their_size():
    step = shown({})
    step.outputs["source"].features.requires_grad_()
    ((features, labels, weights),) = evidence([step], "source")
    assert torch.equal(features, step.outputs["source"].features) and not features.requires_grad
    assert torch.equal(labels, step.labels["source"][:, 1::2, 1::2]) and weights is None


def test_evidence_of_a_view_without_labels_lists_those_that_have_some():
    labels = ByView(source=torch.zeros(1, 2, 2))
    step = a_step({"target": an_output(features=torch.zeros(1, D, 2, 2))}, labels)
    with pytest.raises(UserError, match=r"for 'target', only for source: give .* prototypes"):
        list(evidence([step], "target"))


def test_evidence_has_the_weights_of_its_view_at_feature_size():
    """Centroids do not learn from what a teacher is unsure of."""
    step = shown({})
    labels = step.labels["source"]
    step.weights["source"] = torch.rand(labels.shape).round()
    ((features, found, weights),) = evidence([step], "source")
    assert torch.equal(weights, step.weights["source"][:, 1::2, 1::2])
    one, other = (Centroids(num_classes=K, in_channels=D) for _ in range(2))
    one.update(evidence([step], "source"), step)
    other.update([(features, found.where(weights > 0, IGNORE), None)], step)
    torch.testing.assert_close(one.means(), other.means())
    assert (weights == 0).any() and torch.equal(one.seen, other.seen)
