"""The query decoder: what a query sees, what TMT opens to it, how it learns."""

import pytest
import torch
import torch.nn.functional as F

from engine.config import ConfigError, load
from engine.step import Output, View
from losses.cross_entropy import CrossEntropy
from models.build import build_segmentor
from models.classifiers.queries import Queries, positions
from models.heads._transferability import uncertainty
from models.heads.region import Regions
from tests.records import a_step

K, D = 5, 16
NETWORK = [
    "model.backbone={name: resnet.ResNet, depth: 18, stages: 3, weights: none}",
    "model.decoder={name: deeplabv3plus.DeepLabV3Plus, width: 16}",
    "model.classifier={name: queries.Queries, layers: 2}",
]
REGION = "model.heads.region={name: region.Region, stage: -1, variant: mask, cell: 4, ramp: 0}"


def network(*texts):
    cfg = load("configs/toy/uda_source_only.yaml", [*NETWORK, *texts])
    return build_segmentor(cfg.model, "abcde")


def one_layer():
    """A classifier in float64 and features in which class k owns the pixels of column k, as its first logits say."""
    torch.manual_seed(0)
    part = Queries(in_channels=D, num_classes=K, layers=1, heads=2).double().eval()
    vectors = F.normalize(part.means().detach(), dim=1)
    columns = (
        torch.linalg.pinv(vectors) * 50
    )  # (D, K): logits of 50 / |v| for the class of the column
    return part, columns[None, :, None].repeat(1, 1, 4, 1)  # (1, D, 4, K)


def test_a_query_sees_only_the_pixels_of_its_class():
    part, features = one_layer()
    seen = []
    part.layers[0].cross.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[3])
    )
    part(features)
    own = torch.eye(K, dtype=torch.bool).repeat(1, 4)  # (K, 4 K)
    assert torch.equal(seen[0][0], own)


def test_what_a_query_does_not_see_does_not_change_it():
    part, features = one_layer()
    layer, queries = part.layers[0], part.queries[None]
    pixels, mask = features.flatten(2).mT, torch.eye(K, dtype=torch.bool).repeat(1, 4)[None]
    moved = pixels.clone()
    moved[:, 0::K] += 3  # pixels of class 0
    before, after = (layer.cross(queries, x, x, mask) for x in (pixels, moved))
    assert (before[:, 0] - after[:, 0]).norm() > 1e-3
    torch.testing.assert_close(before[:, 1:], after[:, 1:], rtol=0, atol=1e-12)


def test_a_query_without_a_pixel_sees_all_of_them():
    part, features = one_layer()
    features[..., 2] = features[..., 1]  # nothing belongs to class 2
    seen = []
    part.layers[0].cross.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[3])
    )
    logits = part(features)
    assert seen[0][0, 2].all() and not seen[0][0, 1].all() and logits.isfinite().all()


def test_opened_pixels_are_seen_by_every_query():
    part, features = one_layer()
    seen, corner = [], torch.zeros(1, 4, K, dtype=torch.bool)
    corner[:, 0, 3] = True
    part.layers[0].cross.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[3])
    )
    regions = Regions(None, None, None, opens=lambda logits: corner)
    opened = part(features, Output(regions=regions))
    own = torch.eye(K, dtype=torch.bool).repeat(1, 4)
    assert torch.equal(seen[0][0], own | corner.flatten(1))
    assert (opened - part(features)).abs().max() > 1e-6


def test_without_layers_logits_are_products_with_the_class_vectors():
    part = Queries(in_channels=D, num_classes=K, layers=0, heads=2).double()
    features = torch.randn(2, D, 3, 4).double()
    torch.testing.assert_close(part(features), F.conv2d(features, part.means()[:, :, None, None]))


def test_positions_differ_everywhere_and_have_any_number_of_channels():
    for channels in (6, 16, 30):
        table = positions(5, 7, channels, "cpu")
        assert table.shape == (35, channels)
        assert torch.cdist(table, table).add(10 * torch.eye(35)).min() > 1e-3


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="heads=8 must divide the 12 feature channels"):
        Queries(in_channels=12, num_classes=K)


# --- in the network, with TMT ----------------------------------------------------------------------------------------


def test_logits_of_the_layers_before_are_for_training_alone():
    model, image = network(), torch.rand(2, 3, 32, 40)
    output = model.train()({"source": View(image)})["source"]
    assert [logits.shape[:2] for logits in output.layers] == [(2, K)] * 2
    assert output.scores("query0") is output.layers[0]
    assert output.scores("query1") is output.layers[1]
    assert model.eval().segment(image).layers == ()


def test_every_parameter_learns_where_all_layers_are_scored():
    model = network().train()
    labels = {"source": torch.randint(K, (2, 32, 40))}
    step = a_step(model({"source": View(torch.rand(2, 3, 32, 40))}), labels)
    sum(CrossEntropy(head=head)(step) for head in ("logits", "query0", "query1")).backward()
    silent = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert silent == []


def test_tmt_opens_its_share_of_the_pixels_where_priority_is_highest():
    model, image = (
        network(REGION, "model.heads.region.opened=0.25").eval(),
        torch.rand(1, 3, 64, 64),
    )
    seen, logits = [], []
    layer = model.classifier.layers[1]
    layer.cross.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[3]))
    model.classifier.layers[0].register_forward_hook(
        lambda module, arguments, output: logits.append(output)
    )
    output = model.segment(image)
    before = torch.einsum("bkd,bdhw->bkhw", model.classifier.project(logits[0]), output.features)
    priority = ((1 - output.regions.transferability) * uncertainty(before)).flatten(1)
    torch.testing.assert_close(output.regions.priority.flatten(1), priority)
    opened = priority >= priority.quantile(0.75)
    assert 0.24 < opened.double().mean() < 0.27
    assert torch.equal(seen[0][0] | opened, seen[0][0])  # every query sees what is opened
    drawn = {}
    log = type(
        "Log", (), {"picture": lambda self, name, picture, step: drawn.update({name: picture})}
    )()
    model.region.draw(log, 1, model, image)
    assert drawn["regions"].shape[1] > 3 * 64 and drawn["regions"].std() > 10


def test_opening_nothing_is_the_plain_decoder():
    torch.manual_seed(0)
    guided, plain, image = (
        network(REGION, "model.heads.region.opened=0").eval(),
        network().eval(),
        torch.rand(2, 3, 32, 40),
    )
    plain.load_state_dict(
        {k: v for k, v in guided.state_dict().items() if not k.startswith("region")}
    )
    assert torch.equal(guided.segment(image).logits, plain.segment(image).logits)


def test_the_mask_needs_queries_and_the_decoders_features():
    with pytest.raises(ConfigError, match=r"queries\.Queries"):
        network(REGION, "model.classifier={name: linear.Linear}")
    with pytest.raises(ConfigError, match="on stage -1 variant must be none or mask, not bias"):
        network("model.heads.region={name: region.Region, stage: -1, variant: bias}")


def test_regions_of_the_decoder_without_a_mask_suit_any_classifier():
    model = network(
        REGION, "model.heads.region.variant=none", "model.classifier={name: linear.Linear}"
    )
    regions = model.train()({"source": View(torch.rand(2, 3, 32, 40))})["source"].regions
    assert regions.domain.requires_grad and regions.priority is None and regions.opens is None
