"""The network as a whole: which views move its statistics, and what they need."""

import pytest
import torch

from engine.errors import UserError
from engine.step import View
from models.backbones.mit import MiT
from models.backbones.resnet import ResNet
from models.blocks import joined
from models.classifiers.linear import Linear
from models.decoders.fcn import FCN
from models.segmentor import Segmentor
from tests.runs import train


def test_only_the_named_views_move_the_running_statistics():
    torch.manual_seed(0)
    views = {"source": View(torch.rand(2, 3, 32, 32)), "target": View(torch.rand(2, 3, 32, 32) + 2)}

    def run(bn_views, given=views):
        torch.manual_seed(1)
        backbone = ResNet(depth=18, stages=3, weights="none")
        decoder = FCN(in_channels=backbone.channels, width=8, dropout=0.0)
        network = Segmentor(
            backbone, decoder, Linear(in_channels=8, num_classes=3), bn_views=bn_views
        )
        outputs = network(given)
        return outputs, network.backbone.bn1

    outputs, norm = run(["target"])
    alone, expected = run([], {"target": views["target"]})
    assert torch.equal(norm.running_mean, expected.running_mean) and norm.momentum == 0.1
    assert not torch.equal(run([])[1].running_mean, expected.running_mean)
    assert torch.equal(outputs["target"].logits, alone["target"].logits)
    with pytest.raises(
        UserError, match=r"model\.bn_views names strong; the views are source, target"
    ):
        run(["strong"])


def test_stems_per_domain_on_several_processes_need_both_domains(monkeypatch):
    backbone = ResNet(depth=18, stages=3, weights="none", stem="per_domain")
    decoder = FCN(in_channels=backbone.channels, width=8)
    network = Segmentor(backbone, decoder, Linear(in_channels=8, num_classes=3))
    one = {"source": View(torch.rand(1, 3, 32, 32), "source")}
    network.eval()(one)
    monkeypatch.setattr("engine.distributed.world_size", lambda: 2)
    with pytest.raises(
        UserError, match="per_domain on several processes needs views of both domains"
    ):
        network(one)
    network(one | {"mixed": View(torch.rand(1, 3, 32, 32), "target")})


def test_views_go_through_a_backbone_without_batch_statistics_as_one_batch(monkeypatch):
    backbone = MiT(size="b0", drop_path=0.0, weights="none")
    decoder = FCN(in_channels=backbone.channels, width=8, dropout=0.0)
    classifier = Linear(in_channels=8, num_classes=3)
    network = Segmentor(backbone, decoder, classifier, frozen_bn=["decoder"]).train()
    image, calls, given = torch.rand(3, 3, 32, 64), [], backbone.forward
    views = {"source": View(image[:1], "source"), "mixed": View(image[1:])}

    def count(image, **more):
        calls.append(len(image))
        return given(image, **more)

    monkeypatch.setattr(backbone, "forward", count)

    def learn(views):
        calls.clear()
        network.zero_grad()
        outputs = network(views)
        sum(output.logits.square().sum() for output in outputs.values()).backward()
        return outputs, [parameter.grad.clone() for parameter in backbone.parameters()]

    one, gradients = learn(views)
    assert calls == [3]
    monkeypatch.setattr(MiT, "joins", False)
    two, expected = learn(views)
    assert calls == [1, 2]
    for name, output in one.items():
        torch.testing.assert_close(output.logits, two[name].logits, rtol=0, atol=1e-6)
        assert torch.equal(output.logits.argmax(1), two[name].logits.argmax(1))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(MiT, "joins", True)
    learn(views | {"strong": View(image[:1, :, :, :32])})  # another size
    assert calls == [1, 2, 1]
    monkeypatch.setattr(Linear, "bias", lambda *given: print, raising=False)
    network.head_names = ["classifier"]  # in the place of a head that guides the attention
    calls.clear()
    assert joined(network, views, 0) == {} and calls == []


@pytest.mark.parametrize("part", ["backbone", "decoder"])
def test_a_frozen_part_is_bitwise_what_it_was_and_the_rest_trains(tmp_path, part):
    # The first step has a learning rate of nearly 0, so the network of step 1 stands for the start.
    train(tmp_path / "a", f"model.frozen=[{part}]", "checkpoint.every=1", "schedule.warmup_ratio=0")
    first, last = (
        torch.load(tmp_path / "a" / "step_0000001.pt", weights_only=False),
        torch.load(tmp_path / "a" / "step_0000006.pt", weights_only=False),
    )
    moved = {
        name.split(".")[0]
        for name, value in first["model"].items()
        if not torch.equal(value, last["model"][name])
    }
    assert moved == {"backbone", "decoder"} - {part}
    states = sum(len(group["params"]) for group in last["optimizer"]["param_groups"])
    network = [name for name in last["model"] if name.startswith(("backbone.", "decoder."))]
    assert states < len(network)


def test_frozen_parts_are_in_evaluation_mode_without_gradients():
    backbone = ResNet(depth=18, stages=3, weights="none")
    model = Segmentor(backbone, torch.nn.Dropout(), torch.nn.Identity(), frozen=["backbone"])
    model.train()
    assert not any(module.training for module in backbone.modules())
    assert model.decoder.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
