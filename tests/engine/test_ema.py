"""The teacher: its average, its ramp, what it copies, when it stands still."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ema import Teacher, Turned
from engine.precision import autocast
from models.backbones.mit import MiT
from models.backbones.swin import Swin
from models.backbones.vit import ViT
from models.classifiers.cbp import CBP
from models.decoders.segformer_mlp import SegFormerMLP
from models.segmentor import Segmentor

TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


# --- teacher -------------------------------------------------------------------------------------------------------


def student(value=0.0):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def ramp(t, momentum):
    return min(1 - 1 / (t + 1), momentum)


@pytest.mark.parametrize("momentum, n", [(0.9, 5), (0.9, 40), (0.6, 12)])
def test_a_constant_student_is_approached_in_closed_form(momentum, n):
    teacher = Teacher(student(0.0), momentum)
    for _ in range(n):
        teacher.update(student(1.0), TAKEN)
    remaining = math.prod(ramp(t, momentum) for t in range(1, n + 1))
    assert all((p - (1 - remaining)).abs().max() < 1e-12 for p in teacher.network.parameters())
    if (
        1 - 1 / (n + 1) < momentum
    ):  # during the ramp the teacher is the plain mean of what it has seen
        assert remaining == pytest.approx(1 / (n + 1))


def test_buffers_are_copied_and_the_student_is_left_alone():
    net = student(1.0).train()
    teacher = Teacher(net, 0.99)
    net(torch.randn(4, 2, dtype=torch.float64))
    before = copy.deepcopy(net.state_dict())
    teacher.update(net, TAKEN)
    for own, other in zip(teacher.network.buffers(), net.buffers()):
        assert torch.equal(own, other) and own is not other
    assert net[1].num_batches_tracked == 1 and net[1].running_mean.any()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_teacher_is_in_eval_mode_without_gradients():
    net = student(1.0).train()
    teacher = Teacher(net, 0.9)
    teacher.update(net, TAKEN)
    assert not any(module.training for module in teacher.modules()) and net.training
    assert not any(p.requires_grad for p in teacher.parameters()) and all(
        p.requires_grad for p in net.parameters()
    )


def test_a_resumed_teacher_goes_on_with_the_ramp():
    students = [student(float(i)) for i in range(6)]
    through = Teacher(student(), 0.99)
    for net in students:
        through.update(net, TAKEN)
    first = Teacher(student(), 0.99)
    for net in students[:3]:
        first.update(net, TAKEN)
    state = copy.deepcopy(first.state_dict())
    assert state["updates"] == 3
    second = Teacher(student(5.0), 0.99)
    second.load_state_dict(state)
    for net in students[3:]:
        second.update(net, TAKEN)
    for key, value in through.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_skipped_step_leaves_the_teacher_alone(dtype):
    teacher = Teacher(student(0.0).to(dtype), 0.9)
    teacher.update(student(1.0).to(dtype), TAKEN)
    before = copy.deepcopy(teacher.state_dict())
    teacher.update(student(1.0).to(dtype), SKIPPED)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


BACKBONES = {
    MiT: {"size": "b0"},
    ViT: {"size": "t"},  # linear layers of tokens (B, N, C)
    Swin: {"size": "t"},  # its attention reads the weights themselves, and its mergings have no bias
}


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_teacher_says_is_what_its_network_says_and_no_weight_is_cast_or_turned_alone(
    precision, kind
):
    backbone = kind(**BACKBONES[kind], weights="none")
    decoder = SegFormerMLP(in_channels=backbone.channels, width=16)
    network = Segmentor(backbone, decoder, CBP(in_channels=16, num_classes=3))
    teacher, image, keys = Teacher(network, 0.5), torch.rand(1, 3, 32, 32), None
    for _ in range(2):
        keys = keys or [*teacher.state_dict()]
        with autocast(image.device, precision):
            teacher.segment(image)  # makes the copy
            with Calls() as mine:
                found = teacher.segment(image)
            with Calls() as theirs:
                expected = teacher.network.segment(image)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.features, expected.features)
        if precision == "fp32":
            assert mine.found == theirs.found
        else:
            layers = [m for m in backbone.modules() if type(m) in (nn.Linear, nn.Conv2d)]
            values = [p for layer in layers for p in layer.parameters(recurse=False)]
            assert theirs.found["_to_copy"] - mine.found["_to_copy"] == len(values)
            assert mine.found["t"] == (2 * 12 if kind is Swin else 0) < theirs.found["t"]
        with torch.no_grad():
            torch._foreach_add_([*network.parameters()], 0.01)
        teacher.update(network, TAKEN)
    assert [*teacher.state_dict()] == keys
    assert len([*teacher.parameters()]) == len([*network.parameters()])
    assert not [m for m in teacher.network.modules() if isinstance(m, Turned)]


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))
