"""ProtoSeg and DNC against their equations; what they share with GMMSeg: test_components.py."""

import torch
import torch.nn.functional as F

from tests.models.classifiers.peers import (
    D,
    K,
    M,
    build,
    evaluate,
    follow,
    one_class,
    scene,
    state_of,
    terms,
)

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
