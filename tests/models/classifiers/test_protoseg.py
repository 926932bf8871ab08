"""ProtoSeg, DNC and GMMSeg against their equations: assignment, prototypes, mixtures, losses, processes, resuming."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal

from engine.build import build as build_part
from engine.errors import UserError
from engine.statistics import resize_labels
from losses import gmmseg, protoseg
from losses.occl import OCCL
from models.classifiers._components import Ring, spread
from models.classifiers.gmmseg import GMMSeg
from models.classifiers.linear import Linear
from models.classifiers.protoseg import ProtoSeg
from models.prototypes._sinkhorn import balanced, transport
from tests.records import a_step, an_output
from tests.runs import as_two_processes, assert_same_state, last, train

K, M, D = 4, 3, 12
PEERS = {
    "ProtoSeg": lambda **o: ProtoSeg(
        **{"in_channels": D, "num_classes": K, "per_class": M, "momentum": 0.9} | o
    ),
    "DNC": lambda **o: ProtoSeg(
        **{
            "in_channels": D,
            "num_classes": K,
            "per_class": M,
            "momentum": 0.5,
            "memory": 3,
            "pixels": 8,
        }
        | o
    ),
    "GMMSeg": lambda **o: GMMSeg(
        **{
            "in_channels": D,
            "num_classes": K,
            "components": M,
            "width": 8,
            "momentum": 0.5,
            "update_every": 2,
        }
        | o
    ),
    "GMMSeg, queue": lambda **o: PEERS["GMMSeg"](**{"queue": 30, "pixels": 8} | o),
}
EVERY = pytest.mark.parametrize("name", PEERS)


def build(name, **options):
    """In float64, training but for batch norm, which would tell one batch from its halves."""
    torch.manual_seed(0)
    part = PEERS[name](**options).double().eval()
    part.training = True
    part.vectors.copy_(F.normalize(part.vectors, dim=2))  # unit vectors in float64
    return part


def scene(classes=range(K), batch=4, seed=0, size=(12, 10)):
    """Features (B, D, h, w) that differ between classes, and labels (B, h, w), some ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(list(classes))[
        torch.randint(len(classes), (batch, *size), generator=generator)
    ]
    noise = torch.randn(batch, D, *size, generator=generator, dtype=torch.float64)
    features = noise + 3 * torch.eye(K, D, dtype=torch.float64)[labels].permute(0, 3, 1, 2)
    labels[:, 0] = 255
    return features, labels


def unit_rows(features):
    """An embedding without parameters: the direction of the features."""
    return F.normalize(features.movedim(1, -1).flatten(0, 2), dim=1)


def state_of(part):
    return {key: value.clone() for key, value in part.state_dict().items()}


def look(part, features):
    """What the network makes of these features."""
    output = an_output(features=features)
    output.logits = part(features, output)
    return output


def follow(part, *batch, number=0):
    """The update of a step of one micro-batch: features, labels and perhaps weights."""
    features, labels, *weights = batch
    part.update([(features, labels, *(weights or [None]))], a_step(number=number))


def evaluate(term, part, features, labels, pixels=None):
    """A loss on features that are labelled at twice their size; `pixels` are those of the step."""
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    step = a_step(look(part, features), labels, prototypes=part)
    if pixels is not None:
        step.counts["source"] = pixels
    return term(step)


def terms(part):
    if isinstance(part, GMMSeg):
        return [gmmseg.Contrast()]
    return [protoseg.Contrast(), protoseg.Distance()]


# --- balanced assignment ---------------------------------------------------------------------------------------------


def cosines(pixels=4000, m=10, seed=0):
    """Cosines (N, M) of random directions, and classes (N) of which the last is that of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    z, p = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (pixels, m))
    return z @ p.T, torch.randint(4, (pixels,), generator=generator)


def one_class(scores, sharpness, rounds):
    """The equations of ProtoSeg for one class: mass 1 in all, 1 / M per prototype, 1 / n per pixel."""
    q = (scores.double() / sharpness).exp()
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


@pytest.mark.parametrize("rounds, tolerance", [(3, 0.05), (100, 1e-6)])
def test_prototypes_get_equal_shares_of_their_class(rounds, tolerance):
    scores, classes = cosines()
    shares = transport(scores, classes, 3, 0.05, rounds)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)).double(), rtol=0, atol=1e-12)
    for c in range(3):
        mass = shares[classes == c].sum(0) / (classes == c).sum() * 10
        assert (mass - 1).abs().max() < tolerance
    before = transport(scores, classes, 3, 0.05, 0)[classes == 0].mean(0) * 10
    assert (before - 1).abs().max() > 0.1


def test_all_classes_at_once_are_each_class_by_itself():
    scores, classes = cosines(pixels=500)
    shares, found = transport(scores, classes, 3, 0.05, 3), balanced(scores, classes, 3, 0.05, 3)
    for c in range(3):
        expected = one_class(scores[classes == c], 0.05, 3)
        torch.testing.assert_close(shares[classes == c], expected, rtol=1e-10, atol=1e-14)
        assert torch.equal(found[classes == c], expected.argmax(1))
    fewer = balanced(scores[classes < 3], classes[classes < 3], 3, 0.05, 3)
    assert torch.equal(fewer, found[classes < 3])  # ignored pixels take part in nothing


def test_one_prototype_takes_all_pixels_and_no_rounds_take_the_largest_score():
    scores, classes = cosines(pixels=100)
    assert (balanced(scores[:, :1], classes, 3, 0.05, 3) == 0).all()
    assert torch.equal(balanced(scores, classes, 3, 0.05, 0), scores.argmax(1))


def test_a_prototype_that_is_nearest_to_all_gets_its_share_alone():
    scores, classes = cosines(pixels=2000, m=2)
    scores[:, 0] += 5
    assert (scores.argmax(1) == 0).all()
    share = balanced(scores, classes, 3, 0.05, 20)[classes == 1].double().mean()
    assert abs(share - 0.5) < 0.03


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_assignment_is_finite_at_any_scale_of_the_scores(scale):
    scores, classes = cosines(pixels=300)
    assert transport(scale * scores, classes, 3, 0.05, 3).isfinite().all()
    assert transport(scores[:0], classes[:0], 3, 0.05, 3).shape == (0, 10)


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


def test_logits_are_the_layer_norm_of_the_largest_cosine():
    part, (features, _) = build("ProtoSeg"), scene()
    torch.nn.init.normal_(part.calibration.weight), torch.nn.init.normal_(part.calibration.bias)
    z = part.embed(features)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(len(z)).double())
    best = torch.stack([(z @ part.vectors[c].T).max(1).values for c in range(K)], 1)
    calibration = part.calibration.weight, part.calibration.bias
    expected = F.layer_norm(best, (K,), *calibration).view(4, 12, 10, K).permute(0, 3, 1, 2)
    torch.testing.assert_close(part(features), expected)
    inner = F.normalize(part.project[:3](features), dim=1).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(z, F.normalize(part.norm(inner), dim=1))


def test_prototypes_follow_the_direction_of_their_correct_pixels():
    part, (features, labels) = build("ProtoSeg", momentum=0.0), scene()
    state, z, classes = state_of(part), part.embed(features), labels.flatten()
    scores = z @ part.vectors.flatten(0, 1).T
    right = part(features).argmax(1).flatten() == classes
    follow(part, features, labels)
    moved = 0
    for c in range(K):
        pixels = classes == c
        parts = one_class(scores[pixels][:, M * c : M * c + M], 0.05, 3).argmax(1)
        for m in range(M):
            chosen = z[pixels][(parts == m) & right[pixels]]
            expected = F.normalize(chosen.sum(0), dim=0) if len(chosen) else state["vectors"][c, m]
            moved += len(chosen) > 0
            torch.testing.assert_close(part.vectors[c, m], expected, rtol=1e-12, atol=1e-12)
    assert moved > K and not right[classes < K].all()


def test_momentum_of_one_changes_nothing_and_of_a_half_goes_half_way():
    features, labels = scene()
    still, half, whole = (build("ProtoSeg", momentum=momentum) for momentum in (1.0, 0.5, 0.0))
    before = still.vectors.clone()
    for part in (still, half, whole):
        follow(part, features, labels)
    torch.testing.assert_close(still.vectors, before, rtol=0, atol=1e-15)
    moved = (whole.vectors != before).any(2)
    between = torch.where(moved[..., None], F.normalize(before + whole.vectors, dim=2), before)
    torch.testing.assert_close(half.vectors, between)


def test_logits_do_not_depend_on_the_order_of_classes():
    part, other, (features, labels) = build("ProtoSeg"), build("ProtoSeg"), scene()
    order = torch.tensor([2, 0, 3, 1])
    other.vectors.copy_(part.vectors[order])
    renamed = torch.where(labels < K, order.argsort()[labels.clamp_max(K - 1)], labels)
    for _ in range(2):
        torch.testing.assert_close(other(features), part(features)[:, order])
        for term in terms(part):
            torch.testing.assert_close(
                evaluate(term, other, features, renamed), evaluate(term, part, features, labels)
            )
        follow(part, features, labels)
        follow(other, features, renamed)
        torch.testing.assert_close(other.vectors, part.vectors[order])


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


def test_no_gradient_reaches_prototypes_and_losses_reach_the_embedding_alone():
    for name in PEERS:
        part, (features, labels) = build(name), scene()
        assert not [key for key, buffer in part.named_buffers() if buffer.requires_grad]
        for term in terms(part):
            part.zero_grad()
            evaluate(term, part, features, labels).backward()
            assert part.calibration.weight.grad is None
            assert all(p.grad.abs().sum() > 0 for p in part.project.parameters())


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


@EVERY
def test_occl_refuses_vectors_of_another_space(name):
    features, labels = scene()
    term = OCCL(num_classes=K)
    with pytest.raises(UserError, match="embedding of its own"):
        term(a_step(an_output(features=features), labels, prototypes=build(name)))


# --- DNC -------------------------------------------------------------------------------------------------------------


def test_with_one_centroid_and_no_momentum_it_is_the_nearest_class_mean():
    part = build("DNC", per_class=1, momentum=0.0, memory=5, pixels=200)
    batches = [scene(seed=seed) for seed in range(5)]
    rows, classes = [], []
    for step, (features, labels) in enumerate(batches):
        z, ids = part.embed(features), labels.flatten()
        right = part(features).argmax(1).flatten() == ids
        rows, classes = [*rows, z[right]], [*classes, ids[right]]
        follow(part, features, labels, number=step)
        assert right.sum() > 20
    rows, classes = torch.cat(rows), torch.cat(classes)
    means = torch.stack([rows[classes == c].mean(0) for c in range(K)])
    features, _ = scene(seed=9)
    z = part.embed(features)
    nearest = torch.cdist(z, F.normalize(means, dim=1)).argmin(1)
    torch.testing.assert_close(part.vectors[:, 0], F.normalize(means, dim=1))
    assert torch.equal(part(features).argmax(1).flatten(), nearest) and len(nearest.unique()) == K


def test_the_memory_takes_as_many_pixels_of_each_class_and_step():
    part = build("DNC", update_every=3)
    first = part.vectors.clone()
    for step in range(5):
        follow(part, *scene(seed=step, classes=[0, 1] if step == 1 else range(K)), number=step)
        assert torch.equal(part.vectors, first) == (step < 2)
    assert part.memory.count.tolist() == [40, 40, 32, 32] and part.memory.rows.shape == (
        K,
        24,
        D + 1,
    )
    assert part.memory.held().all()


# --- GMMSeg ----------------------------------------------------------------------------------------------------------


def random_gaussians(**options):
    part = build("GMMSeg", **options)
    part.variances.uniform_(0.02, 2)
    return part


def test_densities_are_those_of_torch_distributions():
    part, (features, _) = random_gaussians(), scene()
    output = look(part, features)
    z = part.embed(features)
    expected = Independent(Normal(part.vectors, part.variances.sqrt()), 1).log_prob(
        z[:, None, None]
    )  # (N, K, M)
    found = output.components.permute(0, 3, 4, 1, 2).reshape(-1, K, M)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    logits = output.logits.permute(0, 2, 3, 1).reshape(-1, K)
    torch.testing.assert_close(logits, F.layer_norm(expected.amax(2), (K,)))
    single = look(copy.deepcopy(part).float(), features.float()).components.amax((1, 2))
    largest = output.components.amax((1, 2))
    torch.testing.assert_close(single.double(), largest, rtol=1e-4, atol=1e-3)


def test_the_largest_density_falls_with_the_distance():
    part = build("GMMSeg", width=D)
    part.embed = unit_rows
    away = torch.linalg.qr(part.vectors.flatten(0, 1).T, mode="complete").Q[
        :, -1
    ]  # orthogonal to all means
    part.vectors[0, 0] = F.normalize(part.vectors.flatten(0, 1).sum(0), dim=0)
    angles = torch.linspace(0, 1.5, 30).double()
    line = angles.cos()[:, None] * part.vectors[0, 0] + angles.sin()[:, None] * away
    scores = look(part, line.T[None, :, :, None]).components.amax((1, 2)).flatten()
    assert (scores.diff() < 0).all()


@pytest.mark.parametrize("options", [{}, {"queue": 3000, "pixels": 3000}], ids=["moments", "queue"])
def test_the_m_step_recovers_planted_directions_and_spreads(options):
    part = build(
        "GMMSeg", num_classes=1, width=D, momentum=0.0, update_every=1, **options
    )  # one class: all correct
    part.embed = unit_rows
    generator = torch.Generator().manual_seed(1)
    truth = F.normalize(
        part.vectors[0] + 0.15 * torch.randn(M, D, generator=generator, dtype=torch.float64), dim=1
    )
    spread_ = torch.linspace(0.01, 0.1, D).double()
    which = torch.arange(3000) % M
    z = truth[which] + spread_ * torch.randn(3000, D, generator=generator, dtype=torch.float64)
    follow(part, z.T[None, :, :, None], torch.zeros(1, 3000, 1, dtype=torch.long))
    assert F.cosine_similarity(part.vectors[0], truth).min() > 0.999
    unit = F.normalize(z, dim=1)
    for m in range(M):
        own = unit[which == m]
        target = F.normalize(own.mean(0), dim=0)
        torch.testing.assert_close(part.vectors[0, m], target, rtol=0, atol=2e-3)
        expected = (own - target).square().mean(0) + 0.01
        torch.testing.assert_close(part.variances[0, m], expected, rtol=0.05, atol=0)
    assert part.variances[0].mean(0)[-1] > part.variances[0].mean(0)[0] + 0.003


def test_pixels_are_shared_out_by_log_densities_over_the_largest_of_their_class():
    part, (features, labels) = random_gaussians(), scene()
    densities = look(part, features).components
    found = part.assign(densities, labels).flatten()
    for c in range(K):
        scores = densities[:, c].movedim(1, -1)[labels == c]
        expected = one_class(scores / scores.abs().max(), 0.05, 3).argmax(1)
        assert torch.equal(found[labels.flatten() == c], M * c + expected)
        assert not torch.equal(expected, one_class(scores, 0.05, 3).argmax(1))


@pytest.mark.parametrize("options", [{}, {"queue": 500, "pixels": 500}], ids=["moments", "queue"])
def test_the_m_step_is_that_of_the_correct_pixels_about_their_direction(options):
    part, (features, labels) = build("GMMSeg", momentum=0.3, update_every=1, **options), scene()
    output = look(part, features)
    right = output.logits.argmax(1) == labels
    targets, z = (
        part.assign(output.components, labels)[right],
        part.embed(features)[right.flatten()],
    )
    before = part.vectors.clone().flatten(0, 1)
    follow(part, features, labels)
    found, bent = 0, 0
    for number in targets.unique():
        own = z[targets == number]
        target = F.normalize(own.sum(0), dim=0)
        found, bent = found + 1, max(bent, (target - own.mean(0)).norm())
        mean, variance = (x.flatten(0, 1)[number] for x in (part.vectors, part.variances))
        torch.testing.assert_close(mean, F.normalize(0.3 * before[number] + 0.7 * target, dim=0))
        torch.testing.assert_close(variance, (own - target).square().mean(0) + 0.01)
    assert found > K and bent > 0.1


@pytest.mark.parametrize("options", [{}, {"queue": 50}], ids=["moments", "queue"])
def test_variances_never_fall_below_the_floor(options):
    part = build("GMMSeg", width=D, momentum=0.0, update_every=1, **options)
    part.embed = unit_rows
    features = torch.zeros(1, D, 6, 8, dtype=torch.float64)
    features[:, :K] = (
        torch.eye(K, dtype=torch.float64).repeat(1, 12).view(1, K, 6, 8)
    )  # each class in one point
    part.vectors[:] = F.normalize(torch.eye(K, D).double()[:, None] + 0.01 * part.vectors, dim=2)
    follow(part, features, features.argmax(1))
    assert (
        part.variances.sqrt().min() >= 0.1
        and torch.isclose(part.variances, torch.tensor(0.01).double()).any()
    )


def test_running_sums_that_do_not_fade_are_a_queue_that_is_not_full():
    sums, queue = build("GMMSeg", decay=1.0, pixels=500), build("GMMSeg", queue=5000, pixels=500)
    for step in range(4):
        for part in (sums, queue):
            follow(part, *scene(seed=step), number=step)
        for one, other in zip(sums.sums(), queue.sums()):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(sums.vectors, queue.vectors)
        torch.testing.assert_close(sums.variances, queue.variances)
    assert (sums.variances != 1).any()


def test_a_step_weighs_as_many_pixels_as_the_queue_would_take():
    part = build("GMMSeg", decay=0.5, pixels=2)
    counts = torch.zeros(K, M, 1).double()
    for step in range(4):
        features, labels = scene(seed=step)
        output = look(part, features)
        targets = part.assign(output.components, labels)[output.logits.argmax(1) == labels]
        number = torch.bincount(targets, minlength=K * M).view(K, M, 1)
        counts = torch.where(number > 0, 0.5 * counts + number.clamp_max(2), counts)
        follow(part, features, labels, number=step)
    torch.testing.assert_close(part.mass, counts)


@pytest.mark.parametrize("options", [{}, {"queue": 400, "pixels": 400}], ids=["moments", "queue"])
def test_loss_does_not_depend_on_the_order_in_which_pixels_enter(options):
    values, (features, labels) = [], scene()
    for order in (
        torch.arange(120),
        torch.randperm(120, generator=torch.Generator().manual_seed(3)),
    ):
        part = build("GMMSeg", update_every=1, **options)
        shuffled = (
            features.flatten(2)[..., order].view_as(features),
            labels.flatten(1)[:, order].view_as(labels),
        )
        follow(part, *shuffled)
        values.append(evaluate(gmmseg.Contrast(), part, features, labels))
    assert (values[0] - evaluate(gmmseg.Contrast(), build("GMMSeg"), features, labels)).abs() > 1e-3
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)


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
