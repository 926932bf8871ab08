"""PPAR: curricula, reliability and alignment against naive loops and closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from engine.build import build
from engine.config import ConfigError, load
from engine.errors import UserError
from engine.statistics import IGNORE, resize_labels
from losses.bcl import StaticLabels
from losses.bismap import LikelihoodLabels
from losses.cross_entropy import CrossEntropy
from losses.ppar import (
    Alignment,
    FrozenFeatures,
    Reweight,
    TextFidelity,
    at_labels,
    balanced,
    means_of_classes,
)
from models.classifiers.linear import Linear
from models.heads.text_attention import TextAttention
from models.prototypes.basis import OrthogonalBasis, RandomDirections
from models.prototypes.visual_text import VisualText
from tests.models.prototypes.members import D, K, members, unit
from tests.records import a_batch, a_step, an_output
from tests.runs import ROOT, as_two_processes
from train_dg import check_parts


def shown(embedding, **fields):
    """What the network makes of a view with this embedding; its logits are the first K channels."""
    return an_output(embedding[:, :K], embedding, embedding=embedding, **fields)


def align(loss, embedding, labels, prototypes, number=100, weights=None, **fields):
    return loss(a_step(shown(embedding, **fields), labels, weights, prototypes, number, 100))


# --- curricula -------------------------------------------------------------------------------------------------------


def test_omega_and_the_kept_share_grow_from_their_start_to_one():
    loss = Alignment(num_classes=K)
    steps = torch.linspace(0, 1, 50).tolist()
    omegas, shares = [loss.omega(s) for s in steps], [loss.kept(s) for s in steps]
    assert omegas == sorted(omegas) and shares == sorted(shares)
    assert (loss.omega(0.2), loss.omega(0.5), loss.omega(0.8)) == pytest.approx((0, 0.5, 1))
    assert (loss.kept(0), loss.kept(0.3), loss.kept(0.6), loss.kept(1)) == pytest.approx(
        (0.5, 0.75, 1, 1)
    )


def test_prototypes_go_from_easy_to_hard_or_back():
    prototypes = members(unit(K, D), unit(K, D))
    begin, middle, end = (a_step(prototypes=prototypes, number=number) for number in (0, 5, 10))
    easy, hard = prototypes["visual"].vectors, prototypes["text"].vectors
    forth, back = (
        Alignment(num_classes=K, order=order) for order in ("easy_to_hard", "hard_to_easy")
    )
    for loss, first, last in ((forth, easy, hard), (back, hard, easy)):
        torch.testing.assert_close(loss.targets(begin), [first])
        torch.testing.assert_close(loss.targets(end), [last])
        torch.testing.assert_close(loss.targets(middle), [F.normalize(easy + hard, dim=1)])
    both, only = (Alignment(num_classes=K, order=order) for order in ("both", "hard"))
    torch.testing.assert_close(both.targets(a_step(prototypes=prototypes, number=3)), [easy, hard])
    torch.testing.assert_close(only.targets(begin), [hard])


def options_of(spec):
    """The options of a component of a configuration, without the keys of its place."""
    return {k: v for k, v in spec.items() if k not in ("name", "weight", "view", "space")}


@pytest.mark.parametrize(
    "config", ["", "dg/camvid_day_ppar", "toy/dg_ppar", "dg/gta5_ppar_resnet50"]
)
def test_what_a_class_is_aligned_to_never_gets_easier(config):
    visual, alignment = {}, {}
    if config:
        cfg = load(ROOT / "configs" / f"{config}.yaml", [])
        visual = options_of(cfg.prototypes.visual) | {"offline": 0}
        alignment = options_of(cfg.losses[1])
    member = VisualText(num_classes=K, in_channels=D, **visual).double()
    member.space = "joint"
    prototypes = {**members(), "visual": member}
    loss = Alignment(num_classes=K, **alignment)
    looks, text = unit(K, D), prototypes["text"].vectors
    shares = [[] for _ in range(K)]  # of the text, by step, where the class is aligned
    for number in range(40):
        step = a_step(prototypes=prototypes, number=number, total=40)
        for c in range(K):
            features, ids = unit(1, D, 1, 1), torch.full((1, 1, 1), c)
            if loss(a_step(shown(features), ids, None, prototypes, number, 40)) > 0:
                easy = member.vectors[c] if member.seen[c] else text[c]
                pair = torch.stack([easy, text[c]], 1)
                parts = torch.linalg.lstsq(pair, loss.targets(step)[0][c]).solution
                apart = F.cosine_similarity(*pair.T, dim=0) < 1 - 1e-9
                shares[c].append((number, float(parts[1] / parts.sum()) if apart else 1.0))
        seen = [c for c in range(K) if number >= (0, 0, 20, 36)[c]]  # from when a class occurs
        batch = looks[seen].T[None, :, None], torch.tensor(seen)[None, None], None
        member.update([batch], step)
    first = round(40 * member.start) + 1
    assert [numbers[0][0] for numbers in shares] == [first, first, 21, 32]
    for numbers in shares:
        values = [share for _, share in numbers]
        assert all(after > before - 1e-9 for before, after in itertools.pairwise(values))
        assert values[-1] == pytest.approx(1)
    assert max(shares[0][0][1], shares[1][0][1]) < 1e-9


def test_a_class_without_its_easy_prototype_waits_for_the_hard_one_in_this_order_alone():
    prototypes = members(seen=torch.zeros(K, dtype=torch.bool))
    embedding, labels = unit(1, D, 4, 4).requires_grad_(), torch.randint(0, K, (1, 4, 4))
    waiting = align(Alignment(num_classes=K), embedding, labels, prototypes, 79)
    waiting.backward()
    assert waiting == 0 and not embedding.grad.any()
    assert align(Alignment(num_classes=K), embedding, labels, prototypes, 80) > 0
    for order in ("hard_to_easy", "both", "easy", "hard", "by_difficulty"):
        loss = Alignment(num_classes=K, order=order)
        assert align(loss, embedding, labels, prototypes, 79) > 0


def test_by_difficulty_the_easiest_pixels_take_the_easy_prototype_and_the_others_the_hard_one():
    prototypes, weights = members(), torch.rand(2, 3, 40, dtype=torch.float64)
    embedding, labels = unit(2, D, 3, 40), torch.randint(0, K, (2, 3, 40))
    labels[0, 0] = IGNORE
    loss = Alignment(num_classes=K, order="by_difficulty", curriculum=0.25, ramp=0.0)
    found = [align(loss, embedding, labels, prototypes, n, weights) for n in (0, 100)]
    easy, hard = (
        torch.einsum("bdhw,kd->bkhw", embedding, prototypes[name].vectors)
        for name in ("visual", "text")
    )
    first = loss.easiest(easy, labels, 0.25).bool()
    for c in range(K):
        assert 0.2 < first[labels == c].double().mean() < 0.45
    scores = torch.where(first[:, None], easy, hard) / 0.1
    each = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="none")
    known = labels != IGNORE
    expected = (each * weights)[known].sum() / weights[known].sum()
    torch.testing.assert_close(found, [expected, expected])
    with pytest.raises(ConfigError, match="by_difficulty is of single pixels"):
        options = {"order": "by_difficulty", "granularity": "coarse_to_fine"}
        build("losses", {"name": "ppar.Alignment", **options}, num_classes=K)


def test_classes_without_an_easy_prototype_take_the_hard_one():
    seen = torch.tensor([True, True, False, True])
    prototypes = members(unit(K, D), unit(K, D), seen)
    found = Alignment(num_classes=K, order="easy").targets(a_step(prototypes=prototypes))[0]
    assert torch.equal(found[2], prototypes["text"].vectors[2])
    torch.testing.assert_close(found[seen], prototypes["visual"].vectors[seen])


def test_the_easiest_share_of_each_class_is_kept_and_at_least_one_pixel():
    loss = Alignment(num_classes=K)
    ids = torch.randint(0, K, (2, 400))
    ids[0, :30] = IGNORE
    ids[ids == 3] = 2
    ids[1, 7] = 3  # the only pixel of its class
    scores = torch.rand(2, K, 400, dtype=torch.float64) * 2 - 1
    own = ids.clamp_max(K - 1)
    mine = scores.gather(1, own[:, None])[:, 0]
    difficulty = 1 - mine + scores.scatter(1, own[:, None], -2.0).amax(1)
    for share in (0.1, 0.5, 0.9):
        kept = loss.easiest(scores, ids, share).bool()
        assert not kept[ids == IGNORE].any() and kept[1, 7]
        for c in range(3):
            mask = ids == c
            bound = difficulty[mask].sort().values[math.ceil(share * int(mask.sum())) - 1]
            assert kept[mask & (difficulty <= bound)].all()
            assert not kept[mask & (difficulty > bound + 4 / 128)].any()
    assert torch.equal(loss.easiest(scores, ids, 1.0).bool(), ids != IGNORE)


def test_sampled_pixels_are_balanced_over_classes():
    labels = torch.zeros(2, 1000, dtype=torch.int64)
    labels[0, :10], labels[0, 10:40], labels[1, :999] = 1, 2, IGNORE
    lots = torch.randint(0, 2**32, labels.shape)
    place = balanced(labels, lots, K, 60)
    first, second = (labels[i, place[i]].bincount(minlength=256) for i in range(2))
    assert first[:3].tolist() == [25, 10, 25]
    assert second[0] == 1 and second[IGNORE] == 59
    assert all(len(set(row.tolist())) == 60 for row in place)


# --- reliability -----------------------------------------------------------------------------------------------------


def test_scores_are_taken_at_the_label_of_each_pixel():
    scores, labels = torch.randn(2, K, 3, 4), torch.randint(0, K, (2, 9, 12))
    labels[0, 0, 0] = IGNORE
    found = at_labels(scores, labels)
    assert found[0, 0, 0] == 0
    for b, row, column in ((0, 4, 7), (1, 8, 11), (1, 0, 3)):
        assert found[b, row, column] == scores[b, labels[b, row, column], row // 3, column // 3]


@pytest.mark.parametrize("side, cells", [(7, 3), (45, 7), (90, 11), (12, 4)])
def test_scores_are_taken_from_the_cell_in_which_the_centre_of_the_pixel_lies(side, cells):
    labels = torch.zeros(1, side, side, dtype=torch.int64)
    scores = torch.arange(cells * cells).view(1, 1, cells, cells).double()
    nearest = resize_labels(scores[0], labels.shape[1:])
    assert torch.equal(at_labels(scores, labels)[0], nearest[0])


def weigh(embedding, labels, prototypes, number=100, tower=None, part=None, **options):
    source = a_batch(torch.zeros(len(labels), 3, 1, 1), labels, part=part)
    step = a_step(
        shown(embedding), labels, None, prototypes, number, 100, tower=tower, source=source
    )
    Reweight(**options).after(step)
    assert [*step.labels] == [*step.weights] == ["source"] and step.labels["source"] is labels
    return step.weights["source"]


def test_weights_have_mean_one_in_each_class_and_none_where_ignored():
    labels = torch.randint(0, K, (2, 12, 16))
    labels[0, :3] = IGNORE
    embedding, prototypes = unit(2, D, 3, 4), members()
    bounds = {(0.2, 2.0): {}, (0.0, 1e9): {"low": 0.0, "high": 1e9}, (0.5, 1.0): {}, (1.0, 3.0): {}}
    for low, high in bounds:
        given = bounds[low, high] or ({} if low == 0.2 else {"low": low, "high": high})
        weights = weigh(embedding, labels, prototypes, **given)
        for c in range(K):
            assert float(weights[labels == c].mean()) == pytest.approx(1, abs=1e-12)
        assert not weights[labels == IGNORE].any()
        inside = weights[labels != IGNORE]
        assert inside.min() >= low - 1e-12 and inside.max() <= high + 1e-12
        assert (inside.std() > 0.1) == (low < 1 < high)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_a_class_of_which_a_share_is_right_keeps_its_weight(share, alpha):
    """0.95 and 0.01 are the reliabilities of a class that begins to be learned."""
    right = torch.arange(1000) < 1000 * share
    reliability = torch.where(right, 0.95, 0.01).double()
    weights = Reweight(alpha=alpha).bounded(reliability, torch.mean)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
    assert weights.min() >= 0.2 and weights.max() <= 2
    if 0 < share < 1:
        assert weights[0] > 1 > weights[-1]
        stretched = (weights - weights[-1]) / (weights[0] - weights[-1])
        torch.testing.assert_close(stretched, right.double())


def test_reliabilities_that_vanish_weigh_alike():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    vectors = torch.eye(K, D, dtype=torch.float64)
    far = (vectors[1] - vectors[0]).view(1, D, 1, 1).expand(1, D, 2, 2)
    weights = weigh(far, labels, members(vectors, vectors), temperature=1e-3)
    torch.testing.assert_close(weights, torch.ones_like(weights))


def planted(level, shared=True):
    """Weights of four images, two of each source; labels of the second source are random."""
    torch.manual_seed(0)
    vectors = torch.eye(K, D, dtype=torch.float64)
    labels = torch.randint(0, K if shared else K // 2, (4, 8, 8))
    labels[2:] += 0 if shared else K // 2  # then no class is in both sources
    seen = labels.clone()  # what the pixels look like
    seen[2:] = seen[2:].flatten()[torch.randperm(128)].view(2, 8, 8)
    embedding = vectors[seen].permute(0, 3, 1, 2) + 0.2 * torch.randn(4, D, 8, 8).double()
    part = torch.tensor([0, 0, 1, 1])
    return weigh(embedding, labels, members(vectors, vectors), level=level, part=part)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("level", ["image", "source"])
def test_a_source_with_random_labels_loses_weight_as_a_whole(level, shared):
    pixel, whole = planted("pixel", shared), planted(level, shared)
    factors = whole / pixel
    of_image = factors.mean((1, 2))
    torch.testing.assert_close(factors, of_image[:, None, None].expand_as(factors))
    assert of_image[:2].min() > 1.2 and of_image[2:].max() < 0.8
    assert float(of_image.mean()) == pytest.approx(1, abs=1e-12)
    same = torch.isclose(of_image[::2], of_image[1::2])
    assert same.all() if level == "source" else not same.any()
    if not shared:  # the weights within a class do not see it
        assert float(pixel[2:].mean()) == pytest.approx(1)


def test_factors_of_images_and_sources_do_not_depend_on_the_number_of_processes(monkeypatch):
    embedding, labels, prototypes = unit(4, D, 3, 4), torch.randint(0, K, (4, 6, 8)), members()
    labels[0, :4] = IGNORE
    part = torch.tensor([2, 0, 2, 0])
    levels = ("pixel", "image", "source")
    whole = [weigh(embedding, labels, prototypes, part=part, level=level) for level in levels]

    def half(rank):
        own = slice(2 * rank, 2 * rank + 2)
        return [
            weigh(embedding[own], labels[own], prototypes, part=part[own], level=level)
            for level in levels
        ]

    halves = as_two_processes(monkeypatch, half)
    for one, *two in zip(whole, *halves):
        torch.testing.assert_close(torch.cat(two), one)
    assert not torch.allclose(whole[1], whole[2])


def test_sources_need_a_list_of_them():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(
        UserError, match=r"level: source needs several sources: a list as data\.train"
    ):
        weigh(unit(1, D, 2, 2), labels, members(), level="source")


def test_reliability_is_a_softmax_with_the_sharpness_of_its_features():
    prototypes, labels = members(), torch.randint(0, K, (1, 2, 3))
    own, tower = unit(1, D, 2, 3), unit(1, D, 2, 3)
    step = a_step(shown(own), labels, tower=tower)
    vectors = prototypes["visual"].vectors
    expected = torch.zeros(2, 1, 2, 3).double()
    for kind, (features, sharpness) in enumerate(((own, 1 / 0.5), (tower, 3.0))):
        for row in range(2):
            for column in range(3):
                scores = sharpness * vectors @ features[0, :, row, column]
                expected[kind, 0, row, column] = scores.softmax(0)[labels[0, row, column]]
    options = {"temperature": 0.5, "scale": 3.0}
    for source, value in (
        ("student", expected[0]),
        ("clip", expected[1]),
        ("both", expected.mean(0)),
    ):
        found = Reweight(source=source, **options).reliability(step, vectors)
        torch.testing.assert_close(found, value)


def test_the_towers_sharpness_in_the_configuration_is_clips_for_text_that_is_centred():
    cfg = load(ROOT / "configs" / "base" / "dg_ppar_clip.yaml", [])
    assert cfg.dg.reweight.scale == 1 / cfg.prototypes.visual.temperature == 50
    # Rows of CLIP lie within a narrow cone; of the same length when centred, here.
    corners = torch.eye(K, D, dtype=torch.float64)
    corners -= corners.mean(0)
    text = F.normalize(F.normalize(corners, dim=1) * 0.5 + 3 * torch.eye(D).double()[-1], dim=1)
    centred = text - text.mean(0)
    length = float(centred.norm(dim=1).mean())
    features, centred = unit(5, D), F.normalize(centred, dim=1)
    torch.testing.assert_close(
        (100 * features @ text.T).softmax(1), (100 * length * features @ centred.T).softmax(1)
    )


def test_weights_move_from_one_to_their_value_over_the_warm_up():
    embedding, labels, prototypes = unit(2, D, 3, 4), torch.randint(0, K, (2, 12, 16)), members()
    full = weigh(embedding, labels, prototypes, warmup=0.0, number=0)
    assert full.std() > 0.1
    for number, share in ((0, 0.0), (5, 0.25), (10, 0.5), (20, 1.0), (90, 1.0)):
        found = weigh(embedding, labels, prototypes, warmup=0.2, number=number)
        torch.testing.assert_close(found, 1 + share * (full - 1))


def test_a_pixel_like_another_class_weighs_less_than_one_like_its_own():
    prototypes, labels = members(), torch.zeros(1, 1, 2, dtype=torch.int64)
    vectors = prototypes["visual"].vectors
    both = torch.stack([vectors[0], vectors[1]], 1)[None, :, None]  # (1, D, 1, 2)
    for options in ({}, {"source": "clip", "tower": both}, {"source": "both", "tower": both}):
        weights = weigh(both, labels, prototypes, low=0.0, high=10.0, **options)
        assert weights[0, 0, 0] > 1 > weights[0, 0, 1]


def test_alpha_0_and_the_first_step_weigh_all_pixels_alike_so_that_cross_entropy_is_plain():
    embedding, labels = unit(2, D, 3, 4), torch.randint(0, K, (2, 12, 16))
    labels[1, 5:] = IGNORE
    ones = (labels != IGNORE).double()
    assert torch.equal(weigh(embedding, labels, members(), alpha=0.0), ones)
    assert torch.equal(weigh(embedding, labels, members(), number=0), ones)
    plain = CrossEntropy()(a_step(shown(embedding), labels))
    assert CrossEntropy(by_weights=True)(a_step(shown(embedding), labels, ones)) == plain


def test_cross_entropy_is_divided_by_the_sum_of_the_weights():
    embedding, labels = unit(2, D, 3, 4), torch.randint(0, K, (2, 3, 4))
    labels[0, 0] = IGNORE
    weights = torch.rand(2, 3, 4, dtype=torch.float64)
    step = a_step(shown(embedding), labels, weights)
    step.counts["source"] = labels.sum()  # not what it divides by
    found = CrossEntropy(by_weights=True)(step)
    each = F.cross_entropy(embedding[:, :K], labels, ignore_index=IGNORE, reduction="none")
    known = labels != IGNORE
    torch.testing.assert_close(found, (each * weights)[known].sum() / weights[known].sum())


def test_class_means_are_those_of_a_loop():
    values, labels = torch.rand(2, 5, 6, dtype=torch.float64), torch.randint(0, K - 1, (2, 5, 6))
    means = means_of_classes(values, labels, K)
    torch.testing.assert_close(
        means[:3], torch.stack([values[labels == c].mean() for c in range(3)])
    )
    assert means[3] == 1


# --- alignment -------------------------------------------------------------------------------------------------------


def test_alignment_is_the_weighted_mean_of_the_pixels_that_are_kept():
    embedding, labels = unit(2, D, 3, 4), torch.randint(0, K, (2, 3, 4))
    labels[0, 0] = IGNORE
    prototypes, weights = members(), torch.rand(2, 3, 4, dtype=torch.float64)
    loss = Alignment(num_classes=K, order="hard", temperature=0.2, ramp=0.0)
    found = align(loss, embedding, labels, prototypes, weights=weights)
    rows, ids, w = (
        embedding.permute(0, 2, 3, 1)[labels != IGNORE],
        labels[labels != IGNORE],
        weights[labels != IGNORE],
    )
    each = F.cross_entropy(rows @ prototypes["text"].vectors.T / 0.2, ids, reduction="none")
    torch.testing.assert_close(found, (each * w).sum() / w.sum())


def test_alignment_falls_when_pixels_move_to_their_prototype_and_moves_them_there():
    prototypes, labels = members(), torch.randint(0, K, (1, 6, 6))
    embedding = unit(1, D, 6, 6).requires_grad_()
    loss = Alignment(num_classes=K)
    before = align(loss, embedding, labels, prototypes, 50)
    before.backward()
    moved = F.normalize(embedding.detach() - 2 * embedding.grad * labels.numel(), dim=1)
    assert align(loss, moved, labels, prototypes, 50) < before
    assert not any(vector.requires_grad for vector in prototypes["text"].buffers())


def test_coarse_to_fine_starts_with_class_means_and_ends_with_pixels():
    embedding, labels, prototypes = unit(2, D, 6, 6), torch.randint(0, K, (2, 6, 6)), members()
    coarse = Alignment(num_classes=K, granularity="coarse_to_fine", ramp=0.0)
    fine = Alignment(num_classes=K, ramp=0.0)
    torch.testing.assert_close(
        align(coarse, embedding, labels, prototypes, 100),
        align(fine, embedding, labels, prototypes, 100),
    )
    only = Alignment(
        num_classes=K, granularity="coarse_to_fine", curriculum=1.0, ramp=0.0, order="hard"
    )
    means = torch.stack([embedding.permute(0, 2, 3, 1)[labels == c].mean(0) for c in range(K)])
    expected = F.cross_entropy(
        F.normalize(means, dim=1) @ prototypes["text"].vectors.T / 0.1, torch.arange(K)
    )
    torch.testing.assert_close(align(only, embedding, labels, prototypes, 0), expected)


def test_coarse_to_fine_with_prototypes_of_each_image_is_the_same_in_two_processes(monkeypatch):
    embedding, labels = unit(4, D, 6, 6), torch.randint(0, K, (4, 6, 6))
    text, prototypes = F.normalize(torch.randn(4, K, D).double(), dim=-1), members()
    loss = Alignment(num_classes=K, easy="attention", granularity="coarse_to_fine")

    def share(rows):
        parts = [x[rows].clone().requires_grad_() for x in (embedding, text)]
        value = align(loss, parts[0], labels[rows], prototypes, 30, text=parts[1])
        value.backward()
        return [value.detach(), *(part.grad for part in parts)]

    whole = share(slice(None))
    one, two = as_two_processes(monkeypatch, lambda rank: share(slice(2 * rank, 2 * rank + 2)))
    torch.testing.assert_close((one[0] + two[0]) / 2, whole[0])
    for first, second, both in zip(one[1:], two[1:], whole[1:]):
        assert both.abs().sum() > 0
        torch.testing.assert_close(torch.cat([first, second]) / 2, both)


def test_no_gradient_reaches_a_member_that_is_learned():
    embedding, labels = unit(1, D, 4, 4), torch.randint(0, K, (1, 4, 4))
    learned = Linear(num_classes=K, in_channels=D).double()
    learned.space = "joint"
    prototypes = {**members(seen=torch.arange(K) > 1), "classifier": learned}
    embedding.requires_grad_()
    for order, easy in (("hard", "visual"), ("easy", "classifier"), ("easy", "visual")):
        loss = Alignment(num_classes=K, order=order, hard="classifier", easy=easy)
        align(loss, embedding, labels, prototypes, 50).backward()
    TextFidelity(text="classifier")(
        a_step(shown(embedding, text=unit(1, D, K).mT.requires_grad_()), labels, prototypes=learned)
    ).backward()
    assert embedding.grad.any() and all(p.grad is None for p in learned.parameters())


@pytest.mark.parametrize("labels", [IGNORE, 2])
@pytest.mark.parametrize("granularity", ["pixel", "coarse_to_fine"])
def test_all_ignored_and_single_class_batches_are_finite_and_keep_the_graph(labels, granularity):
    ids = torch.full((2, 6, 6), labels)
    embedding = unit(2, D, 3, 3).requires_grad_()
    prototypes = members()
    weights = weigh(embedding, ids, prototypes)
    loss = align(
        Alignment(num_classes=K, granularity=granularity),
        embedding,
        ids,
        prototypes,
        50,
        weights=weights,
    )
    loss = loss + CrossEntropy(by_weights=True)(a_step(shown(embedding), ids, weights))
    loss.backward()
    assert (
        torch.isfinite(loss)
        and torch.isfinite(embedding.grad).all()
        and torch.isfinite(weights).all()
    )
    assert (float(loss.detach()) == 0) == (labels == IGNORE)


def test_the_loss_grows_over_its_ramp():
    embedding, labels, prototypes = unit(1, D, 4, 4), torch.randint(0, K, (1, 4, 4)), members()
    loss = Alignment(num_classes=K, ramp=0.1, order="hard", curriculum=1.0)
    values = [float(align(loss, embedding, labels, prototypes, number)) for number in (0, 5, 10)]
    assert values[0] == 0 and values[1] == pytest.approx(values[2] / 2) and values[2] > 0


def test_what_is_missing_is_named():
    embedding, labels = unit(1, D, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    bare = a_step(an_output(embedding, embedding), labels, None, members(), 1)
    with pytest.raises(UserError, match=r"set model\.heads\.projector=\{name: projector\.Proj"):
        Alignment(num_classes=K)(bare)
    with pytest.raises(UserError, match="needs the prototypes 'clip'; there are text, visual"):
        align(Alignment(num_classes=K, hard="clip"), embedding, labels, members())
    for loss in (TextFidelity(), Alignment(num_classes=K, easy="attention")):
        with pytest.raises(UserError, match=r"set model\.heads\.text_attention=\{name: text_att"):
            loss(a_step(shown(embedding), labels, None, members()))
    alignment = {"name": "ppar.Alignment"}
    for options in ({"temperature": 0.0}, {"curriculum": 0.0}, {"start": 0.9}):
        with pytest.raises(ConfigError, match=f"option '{next(iter(options))}' must be a float"):
            build("losses", alignment | options, num_classes=K)
    with pytest.raises(ConfigError, match=r"option 'low' must be a float in \[0, 1\], not 1\.5"):
        build("losses", {"name": "ppar.Reweight", "low": 1.5})


def test_parts_that_look_at_the_tower_are_refused_without_one():
    sources = ("student", "clip", "both")
    parts = [*(Reweight(source=name) for name in sources), FrozenFeatures(), TextFidelity()]
    assert [part.needs_tower for part in parts] == [False, True, True, True, False]
    with pytest.raises(ConfigError, match=r"frozen image tower: set dg\.tower"):
        check_parts({}, {}, None, None, needs_tower=True, text=False)


@pytest.mark.parametrize("part", [LikelihoodLabels(num_classes=K), StaticLabels(num_classes=K)])
def test_a_labeler_of_which_nothing_runs_is_refused_as_reweight(part):
    quiet = {"needs_tower": False, "text": False}
    with pytest.raises(ConfigError, match=r"dg\.reweight is called after .* ppar\.Reweight"):
        check_parts({}, {}, None, None, **quiet, reweight=part)
    check_parts({}, {}, None, None, **quiet, reweight=Reweight())
    check_parts({}, {}, None, None, **quiet)


# --- the network's side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["pixel", "coarse_to_fine"])
def test_of_an_embedding_only_the_directions_count(granularity):
    embedding, labels, prototypes = unit(2, D, 3, 4), torch.randint(0, K, (2, 3, 4)), members()
    longer = embedding * (0.1 + 10 * torch.rand(2, 1, 3, 4, dtype=torch.float64))
    loss = Alignment(num_classes=K, granularity=granularity)
    for measured in (
        lambda x: weigh(x, labels, prototypes),
        lambda x: align(loss, x, labels, prototypes, 50),
        lambda x: FrozenFeatures()(a_step(shown(x), tower=embedding.roll(1, 3))),
    ):
        torch.testing.assert_close(measured(longer), measured(embedding))


def test_attention_starts_from_the_text_and_is_held_there():
    text = F.normalize(torch.randn(K, D), dim=1)
    attention = TextAttention(joint=D, layers=1, width=16, heads=2)
    rows = attention.attend(text, torch.randn(2, D, 3, 3))
    assert rows.shape == (2, K, D) and float((rows - text).detach().abs().max()) < 1e-2
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, K))
    prototypes = members(hard=text.double())
    near, far = (
        TextFidelity()(a_step(shown(unit(2, D, 2, 2), text=x.double()), prototypes=prototypes))
        for x in (rows, rows.roll(1, 1))
    )
    assert near < far
    loss = Alignment(num_classes=K, easy="attention", order="easy")
    labels = torch.randint(0, K, (2, 3, 3))
    align(loss, unit(2, D, 3, 3), labels, prototypes, 50, text=rows.double()).backward()
    assert attention.gamma.grad.abs().sum() > 0


def test_the_student_is_held_to_the_frozen_tower():
    embedding, tower = unit(2, D, 3, 3), unit(2, D, 2, 2)
    loss = FrozenFeatures()(a_step(shown(embedding), tower=tower))
    mine, frozen = (F.normalize(x.mean((2, 3)), dim=1) for x in (embedding, tower))
    torch.testing.assert_close(loss, (2 - 2 * (mine * frozen).sum(1)).mean())
    same = FrozenFeatures()(a_step(shown(embedding), tower=embedding))
    assert same == pytest.approx(0, abs=1e-12)


def test_any_member_stands_in_for_the_text():
    embedding, labels = unit(1, D, 4, 4), torch.randint(0, K, (1, 4, 4))
    basis = OrthogonalBasis(num_classes=K, in_channels=D).double()
    with pytest.raises(UserError, match=r"compares embeddings: set prototypes\.text\.space: joint"):
        align(Alignment(num_classes=K, order="hard"), embedding, labels, {"text": basis})
    basis.space = "joint"
    loss = align(Alignment(num_classes=K, order="hard"), embedding, labels, {"text": basis})
    assert torch.isfinite(loss) and loss > 0
    random = RandomDirections(num_classes=K, in_channels=D)
    torch.testing.assert_close(random.means().norm(dim=1), torch.ones(K))
    assert float((random.means() @ random.means().T - torch.eye(K)).abs().max()) > 0.01
