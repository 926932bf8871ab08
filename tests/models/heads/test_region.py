"""TMT: the reversal, transferability, and attention with priorities."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from benchmarks.planted_shift import area_under_curve
from engine.build import build
from engine.config import ConfigError, load
from engine.errors import UserError
from engine.step import Output, View
from losses.build import build_losses
from losses.cross_entropy import CrossEntropy
from losses.tmt import RegionAdversarial, RegionProbe
from models.build import build_segmentor
from models.heads import region as region_module
from models.heads._grouping import group, labels_of
from models.heads._transferability import Reversal, doubt, ranks, reversal, uncertainty
from models.heads.region import Region, Regions
from tests.records import a_step, an_output
from tests.runs import TINY_UDA

D, K = 6, 4


def maps(height=16, width=20, batch=2):
    return torch.randn(batch, D, height, width, dtype=torch.float64)


def region(channels=D, depth=3, **options):
    """On the second stage of a transformer, without a ramp unless it is asked for."""
    context = {"in_channels": 1, "map_channels": [1, channels], "depths": [9, depth]}
    context |= {"num_classes": K, "classifier": None, "stage": 2, "ramp": 0, "reductions": [9, 2]}
    return Region(**context | options).double()


def adversarial(part, x, step=0):
    """Loss of the domains of {view: maps (B, D, h, w)}."""
    found = {view: part.find(value, step) for view, value in x.items()}
    return RegionAdversarial()(a_step({view: Output(regions=r) for view, r in found.items()}))


# --- domain, transferability -----------------------------------------------------------------------------------------


def test_doubt_is_one_at_a_half_zero_when_certain_and_symmetric():
    logits = torch.tensor([0.0, 50.0, -50.0, 1e4, -1e4, 2.0, -2.0], dtype=torch.float64)
    found = doubt(logits)
    assert found[0] == pytest.approx(1) and (found[1:5] < 1e-12).all() and (found >= 0).all()
    p = logits[5].sigmoid()
    assert float(found[5]) == pytest.approx(float(-p * p.log2() - (1 - p) * (1 - p).log2()))
    torch.testing.assert_close(found[5], found[6])


def test_dense_transferability_lies_between_that_of_the_regions():
    part = region()
    x = maps()
    means = group(x, 4, 10.0, 3)[1]
    tau, found = part.transferability(means), part.find(x, 0)
    assert found.transferability.min() >= tau.min() - 1e-12
    assert found.transferability.max() <= tau.max() + 1e-12
    assert (found.priority >= 0).all() and (found.priority <= 1).all()
    torch.testing.assert_close(found.priority, (1 - found.transferability) * found.uncertainty)
    torch.testing.assert_close(found.uncertainty, uncertainty(found.logits))


def test_uncertainty_is_one_for_equal_logits_and_zero_for_a_certain_one():
    assert torch.allclose(uncertainty(torch.zeros(1, K, 2, 2)), torch.ones(1, 2, 2))
    certain = torch.zeros(1, K, 1, 1)
    certain[:, 0] = 100
    assert uncertainty(certain).max() < 1e-6


def test_the_reversal_grows_with_the_step_and_turns_the_gradient():
    assert [reversal(step, 10000) for step in (0, 1000, 5000)] == pytest.approx(
        [0, 0.4621, 0.9866], abs=1e-4
    )
    assert reversal(3, 0) == 1 and reversal(10**6, 100) == reversal(100, 100)
    x = torch.ones(3, requires_grad=True)
    (Reversal.apply(x, 0.25) * torch.arange(3.0)).sum().backward()
    torch.testing.assert_close(x.grad, -0.25 * torch.arange(3.0))


@pytest.mark.parametrize("reverse", [True, False])
def test_the_discriminator_learns_and_the_features_learn_the_opposite(reverse):
    part = region(reverse=reverse, ramp=10).eval()
    x = {name: maps().requires_grad_() for name in ("source", "target")}
    for step, factor in ((0, 0.0), (10, reversal(10, 10))):
        loss = adversarial(part, x, step)
        weights = list(part.discriminator.parameters())
        grads = torch.autograd.grad(loss, [*x.values(), *weights], allow_unused=True)
        assert all(g.abs().sum() > 0 for g in grads[2:])
        if not reverse:
            assert grads[0] is None and grads[1] is None
            continue
        straight = region(reverse=True, ramp=0).eval()
        straight.load_state_dict(part.state_dict())
        full = torch.autograd.grad(adversarial(straight, x), list(x.values()))
        for found, one in zip(grads, full):
            torch.testing.assert_close(found, factor * one)


def regions_of(domain=None, **fields):
    """An Output whose regions have these fields."""
    return an_output(regions=Regions(None, domain, None, **fields))


def test_swapping_the_domains_changes_no_transferability():
    part = region().eval()
    x = maps()
    before = part.find(x, 0).transferability
    last = part.discriminator[-1]
    with torch.no_grad():
        last.weight.neg_()
        last.bias.neg_()
    torch.testing.assert_close(part.find(x, 0).transferability, before)


@pytest.mark.parametrize("detach", [True, False])
def test_the_segmentation_loss_trains_the_discriminator_only_if_it_may(detach):
    part = region(detach=detach).eval()
    found = part.find(maps(), 0)
    guide = part.guide(found)
    loss = guide.bias.square().sum() + 0 * found.domain.sum()
    loss.backward()
    moved = sum(float(p.grad.abs().sum()) for p in part.discriminator.parameters())
    assert (moved == 0) == detach


def test_the_head_of_the_regions_learns_as_cross_entropy_does():
    logits, labels = torch.randn(2, K, 4, 5), torch.randint(0, K, (2, 8, 10))
    labels[0, :3] = 255
    found = CrossEntropy(head="region")(a_step(regions_of(logits=logits), labels))
    big = F.interpolate(logits, (8, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, F.cross_entropy(big, labels, ignore_index=255))
    bare = a_step(an_output(logits, logits), labels)
    for loss in (CrossEntropy(head="region"), RegionAdversarial(target="source")):
        with pytest.raises(UserError, match=r"model\.heads\.region"):
            loss(bare)


# --- attention -------------------------------------------------------------------------------------------------------


def attention(guide, queries=7, keys=6, dim=8):
    """softmax(q k^T + bias) and its output, with a guide or without one."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, dim, dtype=torch.float64) for n in (queries, keys, keys))
    logits = q @ k.transpose(2, 3) / dim**0.5
    weights = (logits if guide.bias is None else logits + guide.bias).softmax(3)
    return weights, weights @ (v if guide.values is None else v * guide.values)


def guided(priority, **options):
    found = Regions(None, None, transferability=priority, priority=priority)
    return region(reductions=[9, 1], **options).guide(found)


def test_equal_priorities_and_no_strength_leave_attention_as_it_is():
    plain = attention(guided(torch.zeros(2, 2, 3).double(), strength=0.0))[0]
    for value in (0.0, 0.3, 1.0):
        same = attention(guided(torch.full((2, 2, 3), value).double()))[0]
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-6)
    output = Output()
    bias = region(strength=0.0).bias(output, 0)
    assert bias(2, 2, maps(), (2, 3)) is None and output.regions.priority is not None


def test_the_bias_is_multiplication_and_normalisation():
    priority = torch.rand(2, 2, 3).double()
    plain = attention(guided(priority, strength=0.0))[0]
    for strength in (1.0, 2.5):
        weights = attention(guided(priority, strength=strength))[0]
        expected = plain * ((0.5 + 0.5 * priority.flatten(1)) ** strength)[:, None, None]
        torch.testing.assert_close(
            weights, expected / expected.sum(3, keepdim=True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(weights.sum(3), torch.ones(2, 3, 7).double())


def test_keys_of_low_transferability_and_high_uncertainty_gain():
    priority = torch.tensor([[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]]).double().expand(2, 2, 3)
    plain, weights = attention(guided(priority, strength=0.0))[0], attention(guided(priority))[0]
    ratio = weights / plain
    assert (ratio.diff(dim=3) > 0).all()
    part, x = region().eval(), maps()
    found = part.find(x, 0)
    best = found.priority.flatten(1).argmax(1)
    product = (1 - found.transferability).flatten(1) * found.uncertainty.flatten(1)
    assert torch.equal(best, product.argmax(1))


def test_tvt_multiplies_by_transferability_without_normalising():
    value = torch.rand(2, 2, 3).double()
    guide = guided(value, variant="tvt")
    plain, output = attention(guided(value, strength=0.0))[0], attention(guide)[1]
    torch.manual_seed(1)
    *_, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (7, 6, 6))
    torch.testing.assert_close(output, (plain * value.flatten(1)[:, None, None]) @ v)


def test_only_the_last_blocks_are_guided():
    part, output = region(blocks=2, depth=4), Output()
    bias = part.bias(output, 0)
    x = maps()
    assert bias(1, 3, x, (4, 5)) is None and bias(2, 1, x, (4, 5)) is None
    assert output.regions is None
    assert bias(2, 2, x, (8, 10)).bias.shape == (2, 1, 1, 80)
    first = dict(vars(output.regions))
    assert first["keys"] == (8, 10)
    assert bias(2, 3, maps(), (8, 10)).bias.shape == (2, 1, 1, 80)
    assert all(vars(output.regions)[name] is first[name] for name in first)  # grouped once
    tvt = region(variant="tvt", blocks=2, depth=4).bias(Output(), 0)
    assert tvt(2, 2, x, (8, 10)) is None and tvt(2, 3, x, (8, 10)).values.shape == (2, 1, 80, 1)


def test_ranks_are_shares_of_the_image_and_ties_share_one():
    values = torch.tensor([[[3.0, 1.0], [1.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]])
    expected = [[[0.625, 0.25], [0.25, 0.875]], [[0.5, 0.5], [0.5, 0.5]]]
    torch.testing.assert_close(ranks(values), torch.tensor(expected))


@pytest.mark.parametrize("queries", ["all", "own"])
def test_nats_are_added_to_the_logits_of_keys_above_the_mean(queries):
    priority = torch.rand(2, 2, 3).double()
    bias = guided(priority, variant="nats", strength=3.0, queries=queries).bias
    flat = priority.flatten(1)
    expected = 3.0 * (flat - flat.mean(1, keepdim=True))[:, None, None]
    if queries == "own":
        expected = expected * flat[:, None, :, None]
    torch.testing.assert_close(bias, expected)
    same = guided(torch.full((2, 2, 3), 0.7), variant="nats", strength=3.0, queries=queries)
    assert same.bias.abs().max() < 1e-6


@pytest.mark.parametrize("variant", ["bias", "nats"])
def test_the_bias_is_on_the_keys_of_its_tokens(variant):
    """Where the tokens are no multiple of the reduction, the last of them are in no key."""
    priority = torch.rand(1, 9, 7).double()
    found = Regions(None, None, transferability=priority, priority=priority)
    part = region(variant=variant, reductions=[9, 4])
    keys = priority[:, :8, :4].unflatten(1, (2, 4)).mean((2, 3))  # (1, 2)
    bias = part.guide(found).bias.flatten(1)
    assert bias.shape == (1, 2)
    expected = torch.log(0.5 + 0.5 * keys) if variant == "bias" else keys
    torch.testing.assert_close(bias.diff(), expected.diff(), rtol=1e-4, atol=1e-6)


def test_pixels_that_tie_do_not_open_every_mask():
    part = region(opened=0.25)
    tied = Regions(None, None, transferability=torch.ones(2, 4, 6).double())
    assert not part.opening(tied, torch.randn(2, K, 4, 6)).any()
    some = Regions(None, None, transferability=torch.rand(2, 4, 6).double())
    assert part.opening(some, torch.randn(2, K, 4, 6)).flatten(1).sum(1).tolist() == [6, 6]


def test_opened_masks_keep_no_features_alive():
    """Without the collector of cycles, which does not see how large maps are."""
    queries = SimpleNamespace(takes_masks=True)
    part = region(stage=-1, variant="mask", opened=0.25, in_channels=D, classifier=queries)
    output = Output(features=maps(), logits=torch.randn(2, K, 16, 20).double())
    kept = weakref.ref(output.features)
    gc.disable()
    try:
        part(None, None, output, 0)
        assert output.regions.opens(torch.randn(2, K, 16, 20)).any()
        del output
        assert kept() is None
    finally:
        gc.enable()


def test_a_probe_learns_moves_no_feature_and_says_how_regions_transfer():
    part = region(channels=32, estimator="probe").eval()
    x, other = torch.randn(2, 2, 32, 16, 20).double().requires_grad_()
    both = {"source": part.find(x, 5), "target": part.find(other, 5)}
    step = a_step({view: Output(regions=r) for view, r in both.items()})
    weights = [*part.probe.parameters()]
    others = [x, *part.discriminator.parameters()]
    grads = torch.autograd.grad(RegionProbe()(step), [*weights, *others], allow_unused=True)
    assert all(g.abs().sum() > 0 for g in grads[: len(weights)])
    assert all(g is None for g in grads[len(weights) :])
    grads = torch.autograd.grad(RegionAdversarial()(step), [*others, *weights], allow_unused=True)
    assert all(g is not None for g in grads[: len(others)])
    assert all(g is None for g in grads[len(others) :])
    before = both["source"].transferability
    with torch.no_grad():
        part.discriminator[-1].bias += 3
    torch.testing.assert_close(part.find(x, 5).transferability, before)
    with torch.no_grad():
        part.probe[-1].bias += 3
    assert (part.find(x, 5).transferability < before).all()


def test_transferability_is_the_mean_over_cells_of_several_sizes():
    x, both = maps(), region(cells=[2]).eval()
    found = both.find(x, 0)
    singles = []
    for cell in (4, 2):
        single = region(cell=cell).eval()
        single.load_state_dict(both.state_dict())
        singles.append(single.find(x, 0))
    torch.testing.assert_close(
        found.transferability, sum(part.transferability for part in singles) / 2
    )
    torch.testing.assert_close(
        found.domain, torch.cat([part.domain for part in singles], 1), rtol=0, atol=1e-12
    )


def test_regions_follow_classes_and_places_where_they_are_asked_to():
    """Equal features: what is left is the class, or the place."""
    flat = torch.ones(1, D, 8, 8).double()
    logits = torch.zeros(1, K, 8, 8).double()
    logits[:, 1, :, 3:] = 30.0  # an edge off the grid of 4
    logits[:, 0, :, :3] = 30.0
    part = region(semantic=1.0, coordinates=0.0, kappa=500.0)
    assignment, _ = group(part.grouped(flat, logits), 4, part.kappa, 3)
    labels = labels_of(assignment, 4, (8, 8))[0]
    assert not {*labels[:, :3].flatten().tolist()} & {*labels[:, 3:].flatten().tolist()}
    part = region(coordinates=0.1, kappa=1e5)
    assignment, _ = group(part.grouped(flat, None), 4, part.kappa, 3)
    rows, columns = torch.arange(8)[:, None] // 4, torch.arange(8) // 4
    assert torch.equal(labels_of(assignment, 4, (8, 8))[0], rows * 2 + columns)
    means = region(semantic=1.0).eval().find(maps(), 0)
    assert means.domain.shape == (2, 20)  # of the features alone


def test_controls_turn_the_sign_and_shuffle_the_places():
    part = region(order="rank")
    found = Regions(None, None, transferability=torch.rand(2, 4, 6).double())
    unsure = torch.rand(2, 4, 6).double()
    part.prioritise(found, unsure)
    u = ranks(unsure)
    torch.testing.assert_close(found.priority, (ranks(1 - found.transferability) * u).sqrt())
    straight = found.priority
    region(order="rank", favour="high").prioritise(found, unsure)
    torch.testing.assert_close(found.priority, (ranks(found.transferability) * u).sqrt())
    for _ in range(2):
        region(order="rank", shuffle=True).prioritise(found, unsure)
        shuffled = found.priority
        assert not torch.equal(shuffled, straight)
        assert torch.equal(shuffled.flatten(1).sort(1)[0], straight.flatten(1).sort(1)[0])
    region(order="rank", shuffle=True).prioritise(found, unsure)
    assert torch.equal(found.priority, shuffled)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["{name: cross_entropy.CrossEntropy, head: region}"], "'discriminator': add {name: tmt"),
        (["{name: tmt.RegionAdversarial}"], "'probe': add {name: tmt.RegionProbe}"),
        (
            ["{name: tmt.RegionAdversarial}", "{name: tmt.RegionProbe}"],
            "'region': add {name: cross_entropy.CrossEntropy, head: region",
        ),
        (
            ["{name: tmt.RegionAdversarial, weight: 0.0}", "{name: tmt.RegionProbe}"],
            "'discriminator'",
        ),
    ],
)
def test_a_region_that_no_loss_trains_is_refused(given, missing):
    heads = {"region": region(estimator="probe")}
    with pytest.raises(ConfigError, match=rf"model\.heads\.region: no loss trains .*{missing}"):
        build_losses([yaml.safe_load(text) for text in given], heads, num_classes=K)
    everything = ["{name: tmt.RegionAdversarial}", "{name: tmt.RegionProbe}"]
    everything.append("{name: cross_entropy.CrossEntropy, head: region}")
    build_losses([yaml.safe_load(text) for text in everything], heads, num_classes=K)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "mask"}, "variant must be none, bias, nats or tvt, not mask"),
        ({"blocks": 4}, "blocks=4 must be 1 to 3"),
        ({"cell": 0}, "'cell' must be an int in"),
        ({"rounds": -1}, "'rounds' must be an int of at least 0"),
        ({"opened": 1.5}, r"'opened' must be a float in \[0, 1\]"),
        ({"stage": 3}, "stage=3 must be a stage of a transformer"),
        ({"stage": 0}, "stage=0 must be a stage of a transformer"),
        ({"look": "twice"}, "look=twice needs estimator: probe"),
        ({"features": "backbone"}, "features=backbone needs look: twice"),
        (
            {"look": "twice", "estimator": "probe", "stage": -1, "variant": "none"},
            "and a stage whose blocks it guides",
        ),
    ],
)
def test_a_wrong_option_is_a_clear_error(options, message):
    spec = {"name": "region.Region", "stage": 2, **options}
    context = {"in_channels": 1, "map_channels": [1, D], "depths": [9, 3], "num_classes": K}
    with pytest.raises(ConfigError, match=message):
        build("models.heads", spec, classifier=None, **context)


class Drawn(dict):
    """A log that keeps its pictures."""

    def picture(self, name, picture, step):
        self[name] = picture


TWICE = "look: twice, estimator: probe, order: rank"
VARIANTS = ["bias", "nats, order: rank, queries: own", "tvt", "none"]
VARIANTS += [f"{variant}, {TWICE}" for variant in ("nats, queries: own", "bias", "tvt", "none")]
VARIANTS += [f"nats, features: backbone, semantic: 1.0, {TWICE}"]


def guided_network(backbone, variant, *options):
    """The smallest network with regions on a transformer, of the tokens 4 x 6 of 64 x 96 pixels."""
    spec = {"mit.MiT": {"size": "b0"}, "vit.ViT": {"size": "t"}}[backbone]
    stage = {"mit.MiT": 3, "vit.ViT": 1}[backbone]
    changes = [
        f"model.backbone={ {'name': backbone, 'weights': 'none', 'drop_path': 0.0, **spec} }",
        "model.decoder={name: segformer_mlp.SegFormerMLP, width: 8}",
        "model.classifier={name: linear.Linear}",
        f"model.heads.region={{name: region.Region, cell: 2, stage: {stage}, variant: {variant}}}",
        *options,
    ]
    return build_segmentor(load(TINY_UDA, changes).model, "abcd", pretrained=False).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", ["mit.MiT", "vit.ViT"])
def test_regions_work_in_either_transformer_and_are_drawn(backbone, variant):
    network = guided_network(backbone, variant)
    image = torch.rand(1, 3, 64, 96)
    guided = network.segment(image)
    fine = backbone == "mit.MiT" and TWICE in variant  # features of the decoder or the first map, at stride 4
    size = (1, 16, 24) if fine else (1, 4, 6)
    assert guided.regions.priority.shape == guided.regions.transferability.shape == size
    drawn = Drawn()
    network.region.draw(drawn, 1, network.train(), image)
    assert drawn["regions"].shape[1] > 6 * 96 and drawn["regions"].std() > 10
    assert network.training
    network.eval().head_names.remove("region")
    plain = network.segment(image)
    assert plain.regions is None
    assert torch.allclose(plain.logits, guided.logits) == variant.startswith("none")


def test_a_key_that_gets_nearly_all_attention_does_not_darken_its_picture(monkeypatch):
    network, drawn = guided_network("vit.ViT", "nats"), Drawn()
    sink = torch.ones(1, 25)
    sink[:, 7] = 1000
    monkeypatch.setattr(region_module, "received", lambda q, k, guide=None: sink if guide is None else sink / 2)
    network.region.draw(drawn, 1, network, torch.rand(1, 3, 64, 96))
    height = drawn["regions"].shape[0] // 2
    before, after = np.array_split(drawn["regions"][height:], 6, axis=1)[4:]
    assert before.mean() > 220 and 100 < after.mean() < 150


@pytest.mark.parametrize("features", ["decoder", "backbone"])
@pytest.mark.parametrize("backbone", ["mit.MiT", "vit.ViT"])
def test_the_second_look_is_guided_by_what_the_first_has_seen(backbone, features):
    variant = f"nats, features: {features}, {TWICE}"
    network = guided_network(backbone, variant, "model.heads.region.regions=patches")
    image = torch.rand(2, 3, 64, 96)
    plain = guided_network(backbone, f"none, features: {features}, {TWICE}")
    plain.load_state_dict(network.state_dict())
    plain = plain.segment(image)
    output = network.segment(image)
    assert torch.equal(output.first.logits, plain.logits) and output.first.regions is None
    assert not torch.equal(output.logits, plain.logits)
    seen = network.backbone(image)[0] if features == "backbone" else plain.features
    tau = network.region.transferability(F.avg_pool2d(seen, 2))
    found = F.avg_pool2d(output.regions.transferability[:, None], 2)[:, 0]
    torch.testing.assert_close(found, tau)
    unsure = F.avg_pool2d(uncertainty(plain.logits)[:, None], 2)
    torch.testing.assert_close(F.interpolate(unsure, scale_factor=2)[:, 0], output.regions.uncertainty)
    # A key and a query see the mean of their part of the map.
    small = F.adaptive_avg_pool2d(output.regions.priority[:, None], output.regions.tokens)
    assert output.regions.tokens == (4, 6)
    reduction = network.backbone.reductions[network.region.stage - 1]
    keys = F.avg_pool2d(small, reduction).flatten(1)
    bias = network.region.guide(output.regions).bias
    torch.testing.assert_close(bias[:, 0, 0], keys - keys.mean(1, keepdim=True))


def test_two_looks_group_a_map_of_another_size_than_the_class_scores():
    variant = f"nats, features: backbone, semantic: 1.0, {TWICE}"
    network = guided_network("mit.MiT", variant, "model.decoder={name: fcn.FCN, width: 8}")
    output = network.segment(torch.rand(1, 3, 64, 96))
    assert output.logits.shape[2:] == (2, 3)
    assert output.regions.uncertainty.shape == output.regions.transferability.shape == (1, 16, 24)


def test_a_second_look_trains_the_probe_beside_a_network_that_learns_as_before():
    network = guided_network("mit.MiT", f"none, {TWICE}").train()
    views = {name: View(torch.rand(2, 3, 64, 96)) for name in ("source", "target")}
    outputs = network(views)
    assert not outputs["source"].first.logits.requires_grad
    step = a_step(outputs)
    learning = dict(network.named_parameters())
    probe = {n: p for n, p in learning.items() if n.startswith("region.")}
    assert all(n.startswith("region.probe.") for n in probe)
    grads = torch.autograd.grad(RegionProbe()(step), [*learning.values()], allow_unused=True)
    assert {n for n, g in zip(learning, grads) if g is not None} == {*probe}
    with pytest.raises(UserError, match="RegionAdversarial with look: once"):
        RegionAdversarial()(step)
    losses = [yaml.safe_load("{name: tmt.RegionProbe}")]
    build_losses(losses, {"region": network.region}, num_classes=4)


# --- a planted shift -------------------------------------------------------------------------------------------------


def test_a_shift_in_one_part_of_the_picture_is_found_by_a_probe():
    """Target features differ in one quarter; 1 - T is high there, in both domains only where they differ."""
    torch.manual_seed(0)
    part = region(channels=32, reverse=False, ramp=0)
    layout = torch.randn(32, 4, 5).double().repeat_interleave(4, 1).repeat_interleave(4, 2)
    shift = torch.zeros(16, 20, dtype=torch.bool)
    shift[:8, :8] = True
    moved = torch.where(shift, 1.5, 0.0).double() * torch.randn(32, 1, 1).double()
    optimizer = torch.optim.Adam(part.discriminator.parameters(), 1e-2)
    for _ in range(150):
        source, target = (layout + 0.3 * torch.randn(4, 32, 16, 20).double() for _ in range(2))
        optimizer.zero_grad()
        adversarial(part, {"source": source, "target": target + moved}).backward()
        optimizer.step()
    found = part.eval().find(layout + 0.3 * torch.randn(1, 32, 16, 20).double() + moved, 0)
    doubtful = 1 - found.transferability.detach()
    assert area_under_curve(doubtful.flatten(), shift.flatten()) > 0.8
