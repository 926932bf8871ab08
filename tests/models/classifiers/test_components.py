"""What ProtoSeg, DNC and GMMSeg keep: memory, updates, processes, resuming, precision."""

import copy
import json

import pytest
import torch

from engine.build import build as build_part
from engine.errors import UserError
from losses import bcl
from losses.occl import OCCL
from losses.proda import Denoise
from models.classifiers._components import Ring, spread
from tests.models.classifiers.peers import (
    PEERS,
    D,
    K,
    M,
    build,
    evaluate,
    follow,
    look,
    scene,
    state_of,
    terms,
)
from tests.records import a_step, an_output
from tests.runs import as_two_processes, assert_same_state, last, train

EVERY = pytest.mark.parametrize("name", PEERS)


# --- evenly spaced pixels, first in, first out -----------------------------------------------------------------------


def test_chosen_pixels_are_evenly_spaced_in_their_group():
    groups = torch.tensor([0] * 10 + [2] * 3 + [1, 0, 1])  # of two groups; 2 is none
    numbers, chosen = spread(groups, 2, 4)
    assert chosen.tolist() == [4, 2]
    assert (numbers >= 0).nonzero().flatten().tolist() == [0, 3, 6, 9, 13, 15]
    assert numbers[numbers >= 0].tolist() == [0, 1, 2, 3, 0, 1]


def test_the_ring_wraps_and_keeps_the_last_vectors():
    ring, entered = Ring(groups=2, length=5, width=1, pixels=3), {0: [], 1: []}
    for step in range(6):
        groups = torch.tensor([0, 0, 1, 2, 0, 0] if step != 3 else [1, 2, 2, 2, 2, 2])
        rows = torch.arange(6.0)[:, None] + 10 * step
        for g in entered:
            own = rows[groups == g].flatten().tolist()
            entered[g] += own if len(own) < 4 else [own[i] for i in (0, 2, 3)]
        ring.push(rows, groups)
        for g, values in entered.items():
            held = ring.rows[g, ring.held()[g], 0].tolist()
            assert sorted(held) == sorted(values[-5:]) and ring.count[g] == len(values)
            assert values[-1] == ring.rows[g, (ring.count[g] - 1) % 5, 0]


# --- ProtoSeg --------------------------------------------------------------------------------------------------------


def test_no_gradient_reaches_prototypes_and_losses_reach_the_embedding_alone():
    for name in PEERS:
        part, (features, labels) = build(name), scene()
        assert not [key for key, buffer in part.named_buffers() if buffer.requires_grad]
        for term in terms(part):
            part.zero_grad()
            evaluate(term, part, features, labels).backward()
            assert part.calibration.weight.grad is None
            assert all(p.grad.abs().sum() > 0 for p in part.project.parameters())


@EVERY
def test_what_compares_features_refuses_vectors_of_another_space(name):
    features, labels = scene()
    step = a_step(an_output(features=features), labels, prototypes=build(name))
    contrast = bcl.Contrast(num_classes=K)
    with pytest.raises(UserError, match="embedding of its own"):
        OCCL(num_classes=K)(step)
    with pytest.raises(UserError, match="embedding of its own"):
        contrast.vectors("classifier", step.prototypes, features, labels, None)
    with pytest.raises(UserError, match="embedding of its own"):
        Denoise(prototypes="classifier").member(step.prototypes)


# --- what all of them keep -------------------------------------------------------------------------------------------


def learned(part, batches, start=0):
    for number, batch in enumerate(batches, start):
        follow(part, *batch, number=number)
    return state_of(part)


@EVERY
def test_updates_move_unit_vectors_of_the_classes_that_occur(name):
    part = build(name, update_every=1)
    learned(part, [(*scene(seed=1), None)])
    state = state_of(part)
    follow(part, *scene([1, 3], seed=2), number=1)
    torch.testing.assert_close(part.vectors.norm(dim=2), torch.ones(K, M).double())
    for key, value in part.state_dict().items():
        if (
            value.shape
            and value.shape[0] == K
            and key.split(".")[0] not in ("norm", "calibration", "project")
        ):
            same = (value == state[key]).view(K, -1).all(1)
            if (
                name != "DNC" or "memory" in key
            ):  # a memory keeps what it has seen: all classes follow it
                assert same.tolist() == [True, False, True, False], key


@EVERY
def test_an_update_without_labels_changes_nothing_and_losses_are_zero(name):
    part = build(name, update_every=1).train()
    features, labels = scene(seed=1)
    if name != "DNC":
        follow(part, features, labels)
    state, nothing = state_of(part), torch.full_like(labels, 255)
    follow(part, features, nothing, number=1)
    follow(part, features, labels, torch.zeros(labels.shape), number=2)
    assert all(
        torch.equal(value, state[key]) for key, value in part.state_dict().items()
    )  # batch norm too
    for term in terms(part):
        leaf = features.clone().requires_grad_()
        value = evaluate(term, part, leaf, nothing)
        value.backward()
        assert value == 0 and not leaf.grad.any()


@EVERY
def test_a_memory_without_new_pixels_is_unchanged(name):
    part = build(name, update_every=1)
    learned(part, [(*scene(seed=1), None)])
    state, (features, labels) = state_of(part), scene(seed=2)
    follow(part, features, torch.full_like(labels, 255), number=1)
    kept = [
        key
        for key in state
        if key.startswith(("memory", "queue", "mass", "first", "second", "variances"))
    ]
    assert all(torch.equal(part.state_dict()[key], state[key]) for key in kept)
    assert name == "ProtoSeg" or len(kept) > 1


@EVERY
def test_micro_batches_change_nothing(name):
    features, labels = scene()
    states = []
    for batches in (
        [(features, labels, None)],
        iter([(features[:1], labels[:1], None), (features[1:], labels[1:], None)]),
    ):
        part = build(name, update_every=1)
        part.update(batches, a_step())
        states.append(state_of(part))
    assert (states[0]["vectors"] != build(name).vectors).any()
    torch.testing.assert_close(states[0], states[1], rtol=1e-10, atol=1e-12)


@EVERY
def test_two_processes_equal_one(name, monkeypatch):
    steps = [scene(seed=step) for step in range(5)]
    for _, labels in steps:
        labels[2:][labels[2:] == 2] = 255  # class 2 is seen by one of them only
    features, labels = steps[0]
    pixels = 4 * (labels < K).sum()

    def run(part, share, of):
        state = learned(part, [(x[share], y[share], None) for x, y in steps])
        leaf = features[share].clone().requires_grad_()
        values = [evaluate(term, part, leaf, labels[share], pixels / of) for term in terms(part)]
        return state, torch.stack(values).detach(), torch.autograd.grad(sum(values) / of, leaf)[0]

    state, values, gradient = run(build(name), slice(None), 1)
    parts, shares = [build(name) for _ in range(2)], [slice(0, 2), slice(2, 4)]
    first, second = as_two_processes(monkeypatch, lambda rank: run(parts[rank], shares[rank], 2))
    assert (state["vectors"] != build(name).vectors).any()
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    torch.testing.assert_close(first[0], state, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close((first[1] + second[1]) / 2, values)
    torch.testing.assert_close(torch.cat([first[2], second[2]]), gradient)


@EVERY
def test_a_resumed_run_is_bitwise_the_same(name):
    batches = [(*scene(seed=step), None) for step in range(7)]
    whole, part, fresh = build(name), build(name), build(name)
    expected = learned(whole, batches)
    fresh.vectors.normal_()
    fresh.load_state_dict(learned(part, batches[:3]))
    torch.rand(5)  # what is drawn elsewhere plays no part
    assert all(
        torch.equal(value, expected[key]) for key, value in learned(fresh, batches[3:], 3).items()
    )


@EVERY
def test_half_precision_is_lifted_before_anything_is_added_up(name):
    torch.manual_seed(0)
    part, (features, labels) = PEERS[name](update_every=1), scene()
    single, half = copy.deepcopy(part), features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = look(part, half)
        follow(part, half, labels)
        value = evaluate(terms(part)[0], part, half, labels)
    follow(single, half.float(), labels)
    assert output.logits.dtype == output.components.dtype == value.dtype == torch.float32
    assert all(
        b.dtype in (torch.float32, torch.long) and b.isfinite().all() for b in part.buffers()
    )
    for key in ("vectors", "variances"):
        if key in part.state_dict():
            torch.testing.assert_close(
                part.get_buffer(key), single.get_buffer(key), rtol=1e-5, atol=1e-6
            )


@EVERY
def test_means_are_class_vectors_of_the_embedding(name):
    part = build(name)
    assert part.means().shape == (K, part.norm.normalized_shape[0])
    torch.testing.assert_close(part.means()[1], part.vectors[1].sum(0) / M)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("protoseg.ProtoSeg", {"per_class": 0}, "'per_class' must be an int"),
        ("protoseg.ProtoSeg", {"momentum": 1.5}, "'momentum' must be a float"),
        ("protoseg.ProtoSeg", {"update_every": 0}, "'update_every' must be an int"),
        ("gmmseg.GMMSeg", {"sharpness": 0.0}, "'sharpness' must be a float above 0"),
        ("gmmseg.GMMSeg", {"queue": 5}, "queue=5 must be 0, or hold the pixels=20"),
        ("gmmseg.GMMSeg", {"floor": 0.0}, "'floor' must be a float above 0"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    spec = {"name": name, **options}
    with pytest.raises(ValueError, match=message):
        build_part("models.classifiers", spec, in_channels=D, num_classes=K)


CROSS = "{name: cross_entropy.CrossEntropy}"
RUNS = {
    "dnc": (
        "{name: protoseg.ProtoSeg, per_class: 2, memory: 2, pixels: 4, update_every: 2}",
        "{name: protoseg.Contrast, weight: 0.01}, {name: protoseg.Distance, weight: 0.001}",
    ),
    "gmmseg": (
        "{name: gmmseg.GMMSeg, components: 2, width: 8, update_every: 2}",
        "{name: gmmseg.Contrast, weight: 0.01}",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_reports_and_resumes_bitwise(name, tmp_path):
    classifier, losses = RUNS[name]
    options = [
        f"model.classifier={classifier}",
        f"losses=[{CROSS}, {losses}]",
        "eval.pictures=0",
        "checkpoint.every=2",
    ]
    steps = train(tmp_path / "whole", *options, "train.iters=4", "train.accumulate=2")
    assert len(steps) == 4 and all(value > 0 for key, value in steps[4].items() if "loss" in key)
    assert (
        json.loads((tmp_path / "whole" / "results.json").read_text())["results"]["toy"]["mIoU"]
        is not None
    )
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "step_0000002.pt").rename(tmp_path / "part" / "step_0000002.pt")
    train(tmp_path / "part", *options, "train.iters=4", "train.accumulate=2")
    assert_same_state(last(tmp_path / "part"), last(tmp_path / "whole"))
