"""The leaves of the engine: class sums, schedule and optimiser, precision, teacher, processes."""

import copy
import itertools
import math
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine import distributed, precision, schedule
from engine.config import Config
from engine.ema import Teacher
from engine.errors import UserError
from engine.statistics import IGNORE, class_sums, resize_labels, resize_logits
from tests.runs import leaves

CPU = torch.device("cpu")


# --- statistics ----------------------------------------------------------------------------------------------------

K = 6  # class 4 never occurs


def batch(shape=(2, 3, 5, 7), dtype=torch.float64):
    """Features, labels with ignored and out-of-range pixels, weights."""
    b, _, h, w = shape
    labels = torch.tensor([0, 1, 2, 3, 5, IGNORE, -1, K])[torch.randint(0, 8, (b, h, w))]
    return torch.randn(shape, dtype=dtype), labels, torch.rand(b, h, w, dtype=dtype)


def loop_sums(features, labels, weights=None):
    """The definition: one mask per class."""
    weights = torch.ones_like(labels, dtype=features.dtype) if weights is None else weights
    sums = [(features * (weights * (labels == k))[:, None]).sum((0, 2, 3)) for k in range(K)]
    return torch.stack(sums), torch.stack([weights[labels == k].sum() for k in range(K)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 1, 1), (3, 1, 9, 2)])
def test_class_sums_and_their_gradients_equal_a_loop_over_classes(weighted, shape):
    features, labels, weights = batch(shape)
    weights = weights if weighted else None
    results, gradients = [], []
    for function in (lambda *a: class_sums(a[0], a[1], K, a[2]), loop_sums):
        leaf = features.clone().requires_grad_()
        sums, counts = function(leaf, labels, weights)
        (sums.sin().sum() + sums.square().sum()).backward()
        results.append((sums.detach(), counts))
        gradients.append(leaf.grad)
    assert results[0][0].dtype == torch.float64 and results[0][0].shape == (K, shape[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)
    assert (results[0][0][4] == 0).all() and results[0][1][4] == 0


def test_the_gradient_of_class_sums_is_the_numerical_one():
    features, labels, weights = batch((1, 2, 3, 2))
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: class_sums(x, labels, K, weights), features)


def test_labels_that_belong_to_no_class_add_nothing():
    features = torch.randn(1, 4, 3, 3)
    for label in (IGNORE, -1, K):
        sums, counts = class_sums(features, torch.full((1, 3, 3), label), K)
        assert (sums == 0).all() and (counts == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_float32_also_under_autocast(dtype):
    features = torch.full(
        (1, 1, 50, 100), 1.0, dtype=dtype
    )  # 5000 ones: bfloat16 and float16 cannot count so far exactly
    labels = torch.zeros(1, 50, 100, dtype=torch.int64)
    labels[0, 0, 0] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, counts = class_sums(features, labels, 2, weights=torch.ones(1, 50, 100, dtype=dtype))
    assert sums.dtype == counts.dtype == torch.float32
    assert sums[:, 0].tolist() == counts.tolist() == [4999, 1]


def test_synced_class_sums_on_one_process_are_the_same_and_keep_the_graph():
    features, labels, weights = batch()
    features.requires_grad_()
    synced, local = (class_sums(features, labels, K, weights, sync=sync) for sync in (True, False))
    assert torch.equal(synced[0], local[0]) and torch.equal(synced[1], local[1])
    gradient = torch.autograd.grad(synced[0].sum(), features)[0]
    assert (
        torch.equal(gradient, torch.autograd.grad(local[0].sum(), features)[0]) and gradient.any()
    )


def loop_resize(labels, size):
    """The pixel at the centre of each cell; a centre between two pixels belongs to the second."""
    (height, width), (h, w) = labels.shape[-2:], size
    rows = [(2 * i + 1) * height // (2 * h) for i in range(h)]
    columns = [(2 * j + 1) * width // (2 * w) for j in range(w)]
    return torch.stack([torch.stack([labels[:, r, c] for c in columns], -1) for r in rows], -2)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_labels_shrunk_by_an_integer_factor_come_from_the_cell_centres(factor):
    labels = torch.arange(2 * 24 * 40).view(2, 24, 40)
    small = resize_labels(labels, (24 // factor, 40 // factor))
    assert torch.equal(small, labels[:, factor // 2 :: factor, factor // 2 :: factor])
    assert torch.equal(small, loop_resize(labels, (24 // factor, 40 // factor)))


@pytest.mark.parametrize(
    "size, smaller",
    [
        ((13, 7), (5, 3)),
        ((65, 129), (9, 17)),
        ((7, 7), (1, 1)),
        ((3, 5), (7, 11)),
        ((1, 1), (4, 3)),
        ((1023, 769), (33, 97)),
    ],
)
def test_labels_of_odd_sizes_come_from_inside_each_cell(size, smaller):
    height, width = size
    labels = torch.arange(height * width).view(1, height, width)
    result = resize_labels(labels, smaller)
    assert result.shape == (1, *smaller) and torch.equal(result, loop_resize(labels, smaller))


def test_labels_of_the_same_size_are_the_same_tensor_and_the_type_stays():
    labels = torch.randint(0, 255, (1, 6, 5), dtype=torch.uint8)
    assert resize_labels(labels, (6, 5)) is labels
    assert resize_labels(labels, (3, 3)).dtype == torch.uint8


@pytest.mark.parametrize("large", [*range(1, 70), 360, 480, 713, 1024, 2048])
def test_resized_labels_are_never_read_out_of_range(large):
    for small in (1, 2, 3, large // 4 + 1, large, 2 * large + 1):
        positions = resize_labels(torch.arange(large).view(1, 1, large), (1, small))[0, 0]
        assert positions.min() >= 0 and positions.max() < large and (positions.diff() >= 0).all()


def test_logits_are_resized_without_a_shift():
    logits = torch.arange(4.0).view(1, 1, 1, 4)
    assert resize_logits(logits, (2, 4))[0, 0].tolist() == [[0, 1, 2, 3]] * 2
    assert resize_logits(logits, (1, 8))[0, 0, 0].tolist() == [
        0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.25,
        2.75,
        3,
    ]


# --- schedule ------------------------------------------------------------------------------------------------------


def plan(**changes):
    return Config({"warmup": 10, "warmup_ratio": 0.1, "power": 0.9, "min_ratio": 0.0} | changes)


def test_the_warm_up_is_linear_from_its_ratio_to_one():
    values = [schedule.factor(step, 100, plan()) for step in range(11)]
    assert values == pytest.approx([0.1 + 0.9 * step / 10 for step in range(11)])
    assert schedule.factor(0, 100, plan(warmup=0)) == 1


def test_the_decay_is_polynomial_monotone_and_ends_at_the_minimum():
    values = [schedule.factor(step, 100, plan()) for step in range(10, 101)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[0] == 1 and values[-1] == 0
    assert values[45] == pytest.approx(0.5**0.9)  # half of the 90 steps after the warm-up
    assert schedule.factor(45, 90, plan(warmup=0, power=2.0)) == 0.25
    assert schedule.factor(250, 200, plan()) == 0


def test_the_decay_stops_at_min_ratio():
    values = [schedule.factor(step, 100, plan(min_ratio=0.2, power=1.0)) for step in range(10, 101)]
    assert min(values) == values[-1] == 0.2 and values[45] == pytest.approx(0.5)


def test_a_run_that_is_all_warm_up_is_no_division_by_zero():
    assert schedule.factor(10, 10, plan()) == 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv = nn.Conv2d(3, 4, 1)
        self.backbone.norm = nn.BatchNorm2d(4)
        self.backbone.pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2))
        self.backbone.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.classifier = nn.Conv2d(4, 3, 1)


def options(**changes):
    default = {
        "name": "AdamW",
        "lr": 0.01,
        "head_lr_factor": 10.0,
        "weight_decay": 0.5,
        "momentum": 0.8,
        "betas": [0.7, 0.9],
        "layer_decay": 1.0,
    }
    return Config(default | changes)


def test_every_trainable_parameter_is_in_one_group_with_its_rate_and_decay():
    net = Net()
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = schedule.parameter_groups(net, options())
    placed = {
        names[p]: (g["label"], g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(placed)
    assert placed == {
        "backbone.conv.weight": ("backbone", 0.01, 0.5),
        "backbone.conv.bias": ("backbone", 0.01, 0.0),
        "backbone.norm.weight": ("backbone", 0.01, 0.0),
        "backbone.norm.bias": ("backbone", 0.01, 0.0),
        "backbone.pos_embed": ("backbone", 0.01, 0.0),
        "classifier.weight": ("head", 0.1, 0.5),
        "classifier.bias": ("head", 0.1, 0.0),
    }


def test_set_lr_scales_every_group_from_its_base_and_reports_it():
    optimizer = schedule.make_optimizer(Net(), options())
    for scale in (0.5, 0.25):
        assert schedule.set_lr(optimizer, scale) == pytest.approx(
            {"backbone": 0.01 * scale, "head": 0.1 * scale}
        )
    assert {group["lr"] for group in optimizer.param_groups} == {0.01 * 0.25, 0.1 * 0.25}


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("AdamW", torch.optim.AdamW, {"betas": (0.7, 0.9)}),
        ("SGD", torch.optim.SGD, {"momentum": 0.8}),
    ],
)
def test_optimisers_get_their_options(name, kind, expected):
    optimizer = schedule.make_optimizer(Net(), options(name=name))
    assert type(optimizer) is kind
    assert all(
        group[key] == value for group in optimizer.param_groups for key, value in expected.items()
    )
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}


# --- precision -----------------------------------------------------------------------------------------------------


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


# --- processes -----------------------------------------------------------------------------------------------------


def test_one_process_needs_no_process_group(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == CPU
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.close()


def test_collectives_of_one_process_are_identities():
    tensor = torch.randn(3, requires_grad=True)
    total = distributed.all_reduce(tensor)
    assert torch.equal(total, tensor) and not total.requires_grad
    total += 1  # a new tensor: the original stays
    assert not torch.equal(total, tensor)
    assert (
        torch.equal(distributed.mean(tensor), tensor) and not distributed.mean(tensor).requires_grad
    )
    assert torch.autograd.grad((2 * distributed.synced_sum(tensor)).sum(), tensor)[0].tolist() == [
        2,
        2,
        2,
    ]
    assert [distributed.any_process(flag) for flag in (True, False, 15, 0)] == [
        True,
        False,
        True,
        False,
    ]
    assert distributed.gather({"a": 1}) == [{"a": 1}]


def test_compiling_keeps_results_and_names(monkeypatch):
    compiler, compiled = torch.compile, []

    def without_code(
        function, **options
    ):  # the whole way but for the code generator, which takes a minute
        compiled.append(function)
        return compiler(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", without_code)
    network = nn.ModuleDict(
        {
            "backbone": nn.Conv2d(3, 4, 3),
            "decoder": nn.BatchNorm2d(4),
            "classifier": nn.Conv2d(4, 2, 1),
        }
    )
    plain, x = copy.deepcopy(network), torch.rand(2, 3, 8, 8)
    expected = plain.decoder(plain.backbone(x))
    assert distributed.parallel(network, torch.device("cpu")) is network and not compiled
    student = distributed.parallel(network, torch.device("cpu"), compiled=True)
    torch.testing.assert_close(student.decoder(student.backbone(x)), expected)
    assert len(compiled) == 2
    assert list(student.state_dict()) == list(plain.state_dict())
    copy.deepcopy(student)  # as for a teacher


def test_more_processes_than_devices_is_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UserError, match=r"2 CUDA devices, .* process 4 .*--nproc_per_node=2, or device=cpu"
    ):
        distributed.init("cuda")


def test_the_seed_decides_the_initialisation():
    weights = []
    for seed in (1, 1, 2):
        distributed.seed_everything(seed)
        weights.append(nn.Linear(3, 3).weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


FREED_MEMORY = """
import resource, torch
from engine import distributed
distributed.keep_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(50), faults(20))
"""


@pytest.mark.skipif(sys.platform != "linux" or not platform.libc_ver()[0], reason="needs glibc")
def test_memory_that_is_freed_is_used_again_without_page_faults():
    # In a process of its own: what other tests have left in the heap decides where a tensor fits.
    done = subprocess.run(
        [sys.executable, "-c", FREED_MEMORY], capture_output=True, text=True, check=True
    )
    # The first few may lie so that the next, with its alignment, does not fit where they were.
    assert int(done.stdout.split()[1]) < 1000  # 20 x 16,384 pages of 4 KiB otherwise
