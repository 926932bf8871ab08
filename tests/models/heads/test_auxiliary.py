"""The auxiliary head: when it learns, and that a stage may add it or leave it out."""

import pytest
import torch

from engine.config import ConfigError, load
from engine.errors import UserError
from engine.step import View
from engine.weights import load_into
from losses.cross_entropy import CrossEntropy
from models.build import build_segmentor, head_keys
from tests.records import a_step
from tests.runs import ROOT


def with_auxiliary(**options):
    heads = {"auxiliary": {"name": "auxiliary.Auxiliary", **options}} if options else {}
    options = [f"model.heads={heads}", "model.backbone.stages=3"]
    model = load(ROOT / "tests" / "tiny.yaml", options).model
    torch.manual_seed(0)
    return build_segmentor(model, "abcde")


def test_the_auxiliary_head_learns_in_training_and_costs_nothing_in_eval():
    network, plain = with_auxiliary(stage=2, width=12, convs=2), with_auxiliary()
    assert plain.heads == {}
    head = network.auxiliary
    assert [tuple(conv[0].weight.shape) for conv in head.convs] == [(12, 128, 3, 3), (12, 12, 3, 3)]
    assert head.classifier.weight.shape == (5, 12, 1, 1) and head.dropout.p == 0.1
    image, labels = torch.rand(2, 3, 48, 64), torch.randint(0, 5, (2, 48, 64))
    outputs = network.train()({"source": View(image, "source")})
    assert outputs["source"].auxiliary.shape == (2, 5, 6, 8)
    bare = plain.train()({"source": View(image)})
    assert bare["source"].auxiliary is None
    CrossEntropy(head="auxiliary")(a_step(outputs, labels)).backward()
    learned = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert learned == {"backbone", "auxiliary"}
    assert all(p.grad is not None for p in head.parameters())
    assert network.backbone.layer3[0].conv1.weight.grad is None  # the map of stage 2
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    assert network.eval().segment(image).auxiliary is None and not calls
    with pytest.raises(UserError, match=r"no head 'auxiliary'; .*needs model\.heads\.auxiliary"):
        CrossEntropy(head="auxiliary")(a_step(bare, labels))


def test_a_stage_may_add_the_auxiliary_head_or_leave_it_out():
    network, plain = with_auxiliary(stage=3, convs=0), with_auxiliary()
    assert network.auxiliary.classifier.in_channels == 256 and not len(network.auxiliary.convs)
    for new, old in ((network, plain), (plain, network)):
        state = old.state_dict()
        added, left_out = head_keys(new, state)
        load_into(new, state, source="a stage", allow_missing=added, drop=left_out)
    for stage in (4, 0, -1):
        message = rf"auxiliary\.Auxiliary: stage={stage} must be a map of the backbone, 1 to 3"
        with pytest.raises(ConfigError, match=message):
            with_auxiliary(stage=stage)
