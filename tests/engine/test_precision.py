"""Precisions: types of products, gradients that overflow, steps that are skipped."""

import copy

import pytest
import torch
from torch import nn

from engine import precision, schedule
from tests.engine.net import Net, options
from tests.runs import leaves

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "word, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_word_decides_the_type_of_the_products_and_whether_there_is_a_scaler(word, dtype):
    context = precision.autocast(CPU, word)
    for _ in range(2):  # the context is used again in every step
        with context:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert precision.make_scaler(CPU, word).is_enabled() is (word == "fp16")


TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


def step_with_gradient(gradient, word, clip=0.0, skipped=TAKEN):
    """One SGD step with a given gradient -> weights, norm, scaler."""
    weight = nn.Parameter(torch.ones(len(gradient)))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    scaler = precision.make_scaler(CPU, word)
    scaler.scale((weight * torch.tensor(gradient)).sum()).backward()
    norm = precision.clip(optimizer, scaler, clip)
    precision.step(optimizer, scaler, skipped)
    return weight.detach(), norm, scaler


@pytest.mark.parametrize("word", ["fp32", "bf16", "fp16"])
def test_a_step_is_taken_with_unscaled_gradients(word):
    weight, norm, _ = step_with_gradient([3.0, 4.0], word)
    assert float(norm) == 5 and weight.tolist() == [-2, -3]


@pytest.mark.parametrize("word", ["fp32", "fp16"])
@pytest.mark.parametrize("clip, moved", [(1.0, [0.6, 0.8]), (5.5, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_clip_limits_the_norm_of_the_unscaled_gradients(word, clip, moved):
    weight, norm, _ = step_with_gradient([3.0, 4.0], word, clip)
    assert float(norm) == 5 and (1 - weight).tolist() == pytest.approx(moved, rel=1e-5)


def test_what_learns_apart_is_clipped_by_itself_and_must_be_finite():
    own, probe = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [probe], "label": "probe"}, {"params": [own], "label": "head"}]
    optimizer, scaler = torch.optim.SGD(groups, lr=1.0), precision.make_scaler(CPU, "fp32")
    for clip, expected in ((1.0, [0.6, 0.8]), (0.0, [3.0, 4.0])):
        own.grad, probe.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 100.0])
        assert float(precision.clip(optimizer, scaler, clip)) == 5
        assert own.grad.tolist() == pytest.approx(expected, rel=1e-5)
        assert probe.grad.tolist() == pytest.approx([0, clip or 100], rel=1e-5)
    probe.grad = torch.tensor([torch.inf, 0.0])
    assert not precision.clip(optimizer, scaler, 0.0).isfinite()


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_under_fp16_lowers_the_scale(bad, clip):
    weight, norm, scaler = step_with_gradient([1.0, bad], "fp16", clip, SKIPPED)
    assert not norm.isfinite() and weight.tolist() == [1, 1]
    assert scaler.get_scale() == precision.make_scaler(CPU, "fp16").get_scale() / 2


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("word", ["fp32", "fp16"])
def test_a_skipped_step_leaves_weights_and_the_state_of_the_optimiser(name, word):
    net = Net()
    optimizer = schedule.make_optimizer(net, options(name=name))
    scaler = precision.make_scaler(CPU, word)

    def step(gradient, skipped):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones((), requires_grad=True)).backward()  # starts the scaler
        precision.clip(optimizer, scaler, 0.0)
        precision.step(optimizer, scaler, skipped)
        return copy.deepcopy([net.state_dict(), optimizer.state_dict()["state"]])

    first = step(float("nan"), SKIPPED)  # also the very first, whose momentum is not yet there
    assert all(t.isfinite().all() for t in leaves(first).values())
    step(1.0, TAKEN)
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()["state"]])
    after = step(float("nan"), SKIPPED)
    assert leaves(before).keys() == leaves(after).keys()
    assert all(torch.equal(a, b) for a, b in zip(leaves(before).values(), leaves(after).values()))
    moved = step(1.0, TAKEN)
    name = next(iter(after[0]))
    assert not torch.equal(after[0][name], moved[0][name])
