"""CBP and its options: how its prototypes are drawn, learned, moved, pooled and assigned."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import distributed
from engine.errors import UserError
from engine.schedule import make_optimizer, parameter_groups
from losses.occl import Orthogonality
from losses.protoseg import Contrast
from models.classifiers.cbp import CBP
from tests.engine.net import options
from tests.records import a_step, an_output
from tests.runs import assert_same_state, last, train

K, D = 5, 16
OPTIONS = options(lr=0.05, head_lr_factor=1.0, betas=[0.9, 0.999], momentum=0.9)


def cbp(k=K, d=D, seed=0, **options):
    torch.manual_seed(seed)
    return CBP(num_classes=k, in_channels=d, **options)


def cosines(vectors):
    unit = F.normalize(vectors.detach().double(), dim=1)
    return unit @ unit.T


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def trained(classifier, extra=lambda classifier: 0.0, steps=5):
    """Some steps of the optimiser on random pixels -> the class vectors before and after."""
    before = classifier.means().detach().clone()
    optimizer = make_optimizer(nn.Sequential(nn.Conv2d(1, 1, 1), classifier), OPTIONS)
    for _ in range(steps):
        logits = classifier(torch.randn(2, D, 6, 6))
        (F.cross_entropy(logits, torch.randint(K, (2, 6, 6))) + extra(classifier)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, classifier.means().detach()


# --- how the prototypes are drawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("ortho", [True, False])
def test_equal_and_ortho_switch_one_property_each(equal, ortho):
    w = cbp(20, 32, equal=equal, ortho=ortho, length=1.5).means().double()
    norms, largest = w.norm(dim=1), off_diagonal(cosines(w)).abs().max()
    assert (norms.max() - norms.min() < 1e-6) == equal and (largest < 1e-6) == ortho
    assert torch.allclose(norms, torch.tensor(1.5).double()) == equal


def test_without_equal_the_rows_are_those_of_gram_schmidt_and_without_both_those_that_are_drawn():
    torch.manual_seed(0)
    drawn = nn.init.kaiming_normal_(torch.empty(6, 10, dtype=torch.float64))
    torch.testing.assert_close(
        cbp(6, 10, equal=False, ortho=False).means().double(), drawn, rtol=0, atol=1e-6
    )
    expected = []
    for row in drawn:
        expected.append(
            row - sum(((row @ b) / (b @ b) * b for b in expected), torch.zeros(10).double())
        )
    result = cbp(6, 10, equal=False).means().double()
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-6)


def write(path, vectors, classes):
    torch.save({"vectors": vectors, "classes": list(classes)}, path)
    return str(path)


def test_rows_of_a_file_are_taken_by_the_names_of_the_classes(tmp_path):
    vectors = torch.randn(3, 4).float()
    file = write(tmp_path / "rows.pt", vectors, "abc")
    w = cbp(2, 4, classes=("c", "a"), init=file, ortho=False, length=3.0).means()
    torch.testing.assert_close(w, 3 * F.normalize(vectors[[2, 0]], dim=1))
    plain = cbp(2, 4, classes=("c", "a"), init=file, ortho=False, equal=False).means()
    torch.testing.assert_close(plain, vectors[[2, 0]])
    np.save(tmp_path / "rows.npy", vectors.numpy())
    array = {"init": str(tmp_path / "rows.npy"), "rows": ["a", "b", "c"]}
    assert torch.equal(
        cbp(2, 4, classes=("c", "a"), ortho=False, equal=False, **array).means(), plain
    )
    mapped = cbp(
        2, 4, classes=("c", "x"), init=file, ortho=False, equal=False, map={"x": ["a", "b"]}
    ).means()
    torch.testing.assert_close(mapped[1], vectors[:2].mean(0))
    orthogonal = cbp(3, 4, classes=("b", "a", "c"), init=file).means()
    torch.testing.assert_close(orthogonal @ orthogonal.T, 4 * torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        F.normalize(orthogonal[0], dim=0), F.normalize(vectors[1], dim=0)
    )  # the first row stays


@pytest.mark.parametrize("channels, kept", [(8, True), (64, True), (4, False)])
def test_rows_of_other_channels_keep_their_cosines_as_long_as_there_are_as_many_channels_as_classes(
    channels, kept, tmp_path
):
    vectors = torch.randn(6, 16) + 1
    options = {
        "classes": "abcdef",
        "init": write(tmp_path / "rows.pt", vectors, "abcdef"),
        "ortho": False,
    }
    w = cbp(6, channels, **options).means()
    assert (off_diagonal(cosines(w) - cosines(vectors)).abs().max() < 1e-5) == kept
    assert torch.equal(w, cbp(6, channels, **options).means())


def test_a_file_that_does_not_fit_is_an_error_that_says_why(tmp_path):
    file = write(tmp_path / "rows.pt", torch.randn(3, 4), "abc")
    with pytest.raises(ValueError, match="has no row for d; its rows are a, b, c"):
        cbp(2, 4, classes=("a", "d"), init=file)
    with pytest.raises(ValueError, match="is read by the names of the classes"):
        cbp(2, 4, init=file)
    with pytest.raises(ValueError, match="there is no file"):
        cbp(2, 4, classes=("a", "b"), init=str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="has a row that is zero"):
        zero = write(
            tmp_path / "zero.pt", torch.eye(3)[[0, 1]] * torch.tensor([[1.0], [0.0]]), "ab"
        )
        cbp(2, 3, classes="ab", init=zero, ortho=False)
    with pytest.raises(ValueError, match="rows that depend on each other"):
        cbp(2, 3, classes="ab", init=write(tmp_path / "same.pt", torch.ones(2, 3), "ab"))
    with pytest.raises(ValueError, match="per_class is 2"):
        cbp(2, 4, classes="ab", init=file, per_class=2)
    for option in ({"rows": ["a", "b"]}, {"map": {"a": ["b"]}}):
        with pytest.raises(ValueError, match="rows and map say how a file is read: set init=PATH"):
            cbp(2, 4, **option)


# --- fewer channels than prototypes ----------------------------------------------------------------------------------


def test_a_simplex_has_equal_cosines():
    w = cbp(9, 8, fallback="etf", length=3.0).means()
    torch.testing.assert_close(
        off_diagonal(cosines(w)), torch.full((72,), -1 / 8).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(w.norm(dim=1), torch.full((9,), 3.0))
    with pytest.raises(ValueError, match=r"simplex of 10 prototypes needs at least 9 .* has 8"):
        cbp(10, 8, fallback="etf")


@pytest.mark.parametrize("k, d", [(11, 8), (19, 16), (150, 64)])
def test_polar_frames_come_near_the_bound_of_welch(k, d):
    bound = math.sqrt((k - d) / (d * (k - 1)))
    projected, polar = (cbp(k, d, fallback=kind).means() for kind in ("project", "polar"))
    coarse, fine = (float(off_diagonal(cosines(w)).abs().max()) for w in (projected, polar))
    assert bound <= fine < 1.15 * bound < 2.5 * bound < coarse
    for w in (projected, polar):
        torch.testing.assert_close(w.norm(dim=1), torch.full((k,), 2.0))
    assert torch.equal(polar, cbp(k, d, fallback="polar").means()) and coarse < 0.9
    assert not torch.isclose(polar, cbp(k, d, seed=1, fallback="polar").means()).all()


def test_a_fallback_is_not_used_where_there_are_enough_channels():
    assert torch.equal(cbp(8, 8, fallback="polar").means(), cbp(8, 8).means())


def test_options_that_contradict_each_other_are_errors():
    with pytest.raises(ValueError, match="need equal: true"):
        cbp(update="penalty", equal=False)
    with pytest.raises(ValueError, match="need equal: true"):
        cbp(20, 16, fallback="polar", equal=False)
    with pytest.raises(
        ValueError, match=r"5 classes with 4 prototypes each need at least 20 .*has 16"
    ):
        cbp(per_class=4)


# --- how they are updated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["frozen", "gradient", "penalty", "ema"])
def test_only_ema_looks_at_the_features_of_a_step_and_moves(update):
    classifier, looked = cbp(update=update, momentum=0.9), []
    before = classifier.means().detach().clone()

    def batches():  # in a run these may cost a forward pass
        looked.append(update)
        yield (*batch([0, 1, 3]), None)

    classifier.update(batches(), a_step())
    assert looked == ["ema"] * (update == "ema")
    assert torch.equal(classifier.means(), before) == (update != "ema")


def test_all_updates_start_from_the_frozen_prototypes():
    for update in ("gradient", "penalty", "ema"):
        torch.testing.assert_close(cbp(update=update).means(), cbp().means(), rtol=0, atol=1e-6)


def test_gradient_moves_the_prototypes_and_lets_them_become_unequal():
    before, after = trained(cbp(update="gradient"))
    assert not torch.isclose(before, after).all(1).any()
    norms = after.norm(dim=1)
    assert norms.max() - norms.min() > 0.01 and off_diagonal(cosines(after)).abs().max() > 0.01


def test_penalty_moves_the_prototypes_and_keeps_them_equal():
    before, after = trained(cbp(update="penalty", length=1.5))
    assert not torch.isclose(before, after).all(1).any()
    torch.testing.assert_close(after.norm(dim=1), torch.full((K,), 1.5))


def test_the_orthogonality_loss_is_the_mean_squared_cosine_and_pulls_apart():
    def term(classifier):
        return Orthogonality()(a_step(prototypes=classifier))

    classifier = cbp(update="penalty", ortho=False)
    with torch.no_grad():
        torch.testing.assert_close(term(cbp()), torch.tensor(0.0), atol=1e-12, rtol=0)
    with pytest.raises(UserError, match="nothing trains the vectors of 'classifier'"):
        term(cbp())
    value = term(classifier).detach()
    torch.testing.assert_close(
        value.double(), off_diagonal(cosines(classifier.means())).square().mean()
    )
    assert term(cbp(1, update="penalty")) == 0
    trained(classifier, lambda classifier: 100 * term(classifier), steps=20)
    assert term(classifier) < 0.3 * value


def batch(classes, seed=0, images=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (images, 6, 7), generator=generator)]
    return torch.randn(images, D, 6, 7, generator=generator) + 1, labels


def test_ema_moves_the_classes_that_are_present_by_its_momentum():
    classifier = cbp(update="ema", momentum=0.9)
    before, (features, labels) = classifier.means().clone(), batch([1, 3, 255])
    classifier.update([(features, labels, None)], a_step())
    after = classifier.means()
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    for c in (1, 3):
        mean = features.movedim(1, -1)[labels == c].mean(0)
        torch.testing.assert_close(after[c], 0.9 * before[c] + 0.1 * mean)


@pytest.mark.parametrize("per_class", [1, 3])
def test_ema_on_two_processes_equals_one_and_micro_batches_change_nothing(per_class, monkeypatch):
    options, (features, labels) = (
        {"update": "ema", "momentum": 0.5, "per_class": per_class},
        batch([0, 1, 3]),
    )
    parts, seen = [(features[:1], labels[:1], None), (features[1:], labels[1:], None)], []
    whole, split, process = (cbp(**options) for _ in range(3))
    whole.update([(features, labels, None)], a_step())
    split.update(parts, a_step())
    monkeypatch.setattr(
        distributed, "all_reduce", lambda total: seen.append(total.clone()) or total
    )
    cbp(**options).update(parts[1:], a_step())
    monkeypatch.setattr(distributed, "all_reduce", lambda total: total + seen[0])
    process.update(parts[:1], a_step())
    for other in (split, process):
        torch.testing.assert_close(other.prototypes.vectors, whole.prototypes.vectors)
    assert not torch.isclose(whole.prototypes.vectors, cbp(**options).prototypes.vectors).all()


@pytest.mark.parametrize("update", ["ema", "penalty"])
def test_a_run_with_learned_prototypes_resumes_bitwise(update, tmp_path):
    options = [
        f"model.classifier={{name: cbp.CBP, update: {update}, momentum: 0.9}}",
        "train.iters=4",
        "data.test={}",
    ]
    options += [
        "checkpoint.every=2",
        "eval.pictures=0",
        "losses=[{name: cross_entropy.CrossEntropy}]",
    ]
    options += ["data.val={name: toy.Toy, domain: real, split: val, length: 1, size: [48, 64]}"]
    train(tmp_path / "whole", *options)
    whole = last(tmp_path / "whole")
    (tmp_path / "whole" / "step_0000004.pt").unlink()
    (tmp_path / "whole" / "results.json").unlink()
    train(tmp_path / "whole", *options)
    assert_same_state(whole, last(tmp_path / "whole"))
    start = cbp(11, 16).means()
    assert not torch.isclose(
        whole["model"]["classifier.prototypes.vectors"], start, atol=1e-5
    ).all()


# --- several prototypes per class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["max", "logsumexp"])
def test_logits_pool_the_prototypes_of_a_class(pool):
    classifier, features = cbp(per_class=3, pool=pool), torch.randn(2, D, 4, 5)
    w = classifier.components()
    torch.testing.assert_close(
        w.flatten(0, 1) @ w.flatten(0, 1).T, 4 * torch.eye(15), atol=1e-5, rtol=0
    )
    scores = torch.einsum("bdhw,kmd->bkmhw", features, w)
    expected = scores.max(2).values if pool == "max" else scores.exp().sum(2).log()
    torch.testing.assert_close(classifier(features), expected)
    torch.testing.assert_close(classifier.means(), 2 * F.normalize(w.mean(1), dim=1))
    assert torch.equal(cbp(per_class=1, pool=pool)(features), cbp()(features))


@pytest.mark.parametrize("assign", ["argmax", "sinkhorn"])
def test_pixels_are_assigned_to_prototypes_of_their_class(assign):
    classifier, (features, labels) = (
        cbp(per_class=3, assign=assign),
        batch([0, 2, 4, 255], images=8),
    )
    number = classifier.assign(classifier.cosines(features), labels)
    assert torch.equal(torch.where(number < 0, 255, number // 3), labels)
    if assign == "argmax":
        scores = torch.einsum("bdhw,kmd->bkmhw", features, classifier.components())
        best = scores.gather(1, labels.clamp(max=4)[:, None, None].expand(-1, -1, 3, -1, -1))[
            :, 0
        ].argmax(1)
        assert torch.equal((number % 3)[labels != 255], best[labels != 255])
    else:
        counts = torch.bincount(number[number >= 0], minlength=15).view(5, 3)[[0, 2, 4]].double()
        assert (counts / counts.sum(1, keepdim=True) - 1 / 3).abs().max() < 0.1


def usage(classifier, features, labels):
    """Entropy of how often each prototype of a class is the nearest, 1 for all alike, averaged over classes."""
    nearest = torch.einsum("bdhw,kmd->bkmhw", features, classifier.components())
    m, values = classifier.per_class, []
    for c in range(K):
        share = (
            torch.bincount(nearest[:, c].argmax(1)[labels == c], minlength=m) / (labels == c).sum()
        )
        values.append(float(-(share * share.clamp_min(1e-9).log()).sum() / math.log(m)))
    return sum(values) / K


def test_balanced_assignment_keeps_prototypes_in_use_that_pooled_cross_entropy_drops():
    labels = torch.arange(K).view(1, K, 1).expand(1, K, 60)
    modes = torch.randn(K, 3, 24)[
        torch.arange(K)[:, None], torch.arange(60) % 3
    ]  # three kinds of pixels in each class
    pixels = (4 * modes + 0.3 * torch.randn(K, 60, 24)).permute(2, 0, 1)[None]
    found = {}
    for assign, weight in (("argmax", 0.0), ("argmax", 1.0), ("sinkhorn", 1.0)):
        classifier = cbp(per_class=3, assign=assign)
        network = nn.Conv2d(24, D, 1)
        nn.init.constant_(network.bias, 1.0)  # all pixels start nearest to the same prototype
        nn.init.normal_(network.weight, std=1e-3)
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(100):
            features = network(pixels)
            output = an_output(features=features)
            output.logits = classifier(features, output)
            loss = F.cross_entropy(output.logits, labels)
            loss = loss + weight * Contrast()(a_step(output, labels, prototypes=classifier))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = (classifier(features).argmax(1) == labels).double().mean()
        assert accuracy > 0.95
        found[assign, weight] = usage(classifier, features.detach(), labels)
    assert (
        found["sinkhorn", 1.0] > 0.9 > 0.6 > found["argmax", 0.0] and found["argmax", 1.0] < 0.6
    ), found


def test_cosines_of_several_prototypes_are_left_in_training_alone():
    classifier, features = cbp(per_class=2), torch.randn(2, D, 4, 5)
    found, at_test, single = (an_output(features=features) for _ in range(3))
    assert torch.equal(classifier(features, found), classifier(features))
    w, unit = F.normalize(classifier.components(), dim=2), F.normalize(features, dim=1)
    torch.testing.assert_close(found.components, torch.einsum("bdhw,kmd->bkmhw", unit, w))
    assert torch.equal(classifier.eval()(features, at_test), classifier.train()(features))
    cbp()(features, single)
    assert at_test.components is None and single.components is None


# --- the readings of OCCL --------------------------------------------------------------------------------------------


ADAMW = options(lr=0.1, head_lr_factor=1.0, betas=[0.9, 0.999], momentum=0.9)


# --- category-basis prototypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_classes, dim, length", [(1, 1, 1.0), (11, 128, 2.0), (19, 19, 0.3), (150, 256, 3.0)]
)
def test_prototypes_are_orthogonal_and_of_one_length(num_classes, dim, length):
    w = CBP(num_classes=num_classes, in_channels=dim, length=length).means()
    torch.testing.assert_close(w @ w.T, length**2 * torch.eye(num_classes), atol=1e-5, rtol=1e-5)


def test_prototypes_depend_on_the_seed_and_come_back_bit_exactly():
    def drawn(seed):
        torch.manual_seed(seed)
        return CBP(num_classes=7, in_channels=16)

    assert torch.equal(drawn(1).means(), drawn(1).means())
    assert not torch.isclose(drawn(1).means(), drawn(2).means()).all()
    other = drawn(2)
    other.load_state_dict(drawn(1).state_dict())
    assert torch.equal(other.means(), drawn(1).means())


def test_prototypes_are_never_trained():
    conv = nn.Conv2d(3, 16, 1)
    model = nn.Sequential(conv, CBP(num_classes=7, in_channels=16))
    before = model[1].means().clone()
    assert not before.requires_grad and not list(model[1].parameters())
    trained = [p for group in parameter_groups(model, ADAMW) for p in group["params"]]
    assert {id(p) for p in trained} == {id(conv.weight), id(conv.bias)}
    optimizer = make_optimizer(model, ADAMW)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.randint(7, (2, 8, 8))).backward()
        optimizer.step()
    assert torch.equal(model[1].means(), before)


def test_more_classes_than_channels_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"19 classes.*has 16"):
        CBP(num_classes=19, in_channels=16)


def test_logits_are_feature_length_times_prototype_length_times_cosine():
    classifier = CBP(num_classes=5, in_channels=16, length=1.5)
    features = torch.randn(2, 16, 6, 7)
    cosine = torch.einsum(
        "bdhw,kd->bkhw", F.normalize(features, dim=1), F.normalize(classifier.means(), dim=1)
    )
    torch.testing.assert_close(
        classifier(features), features.norm(dim=1, keepdim=True) * 1.5 * cosine
    )


def test_logits_follow_permutation_and_scale_of_the_prototypes():
    classifier = CBP(num_classes=5, in_channels=16)
    features, order = torch.randn(2, 16, 6, 7), torch.tensor([3, 0, 4, 1, 2])
    logits = classifier(features)
    classifier.prototypes.vectors.copy_(classifier.means()[order] * 3)
    torch.testing.assert_close(classifier(features), 3 * logits[:, order])
