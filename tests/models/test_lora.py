"""LoRA: nothing has changed at the start, the adapters alone learn, and checkpoints keep them."""

import pytest
import torch

from engine.config import load, stages
from models.build import build_segmentor, initial_network, restore
from models.lora import LoRA
from tests.runs import TINY, last, run, scalars, train

SWIN = "backbone: {name: swin.Swin, width: 32, depths: [1, 2, 1, 1], weights: none, drop_path: 0.0}"
VIT = "backbone: {name: vit.ViT, size: t, taps: [1, 3], weights: none, drop_path: 0.0}"
MIT = "backbone: {name: mit.MiT, size: b0, weights: none, drop_path: 0.0}"
REST = "decoder: {name: segformer_mlp.SegFormerMLP, width: 16, dropout: 0.0}"


@pytest.mark.parametrize("backbone", [VIT, MIT, SWIN])
def test_the_adapters_change_nothing_at_first_and_learn_alone(backbone):
    options = [f"model={{{backbone}, {REST}}}"]
    plain = build_segmentor(load(TINY, options).model, "abc").eval()
    adapted = build_segmentor(load(TINY, [*options, "model.lora=3"]).model, "abc").eval()
    adapted.load_state_dict(plain.state_dict(), strict=False)
    assert adapted.frozen_bn == ["backbone"]
    image = torch.rand(2, 3, 48, 64)
    assert torch.equal(adapted.segment(image).logits, plain.segment(image).logits)
    adapted.train().segment(image).logits.square().sum().backward()
    body = dict(adapted.backbone.named_parameters())
    learning = {name for name, p in body.items() if p.requires_grad}
    assert learning == {name for name, p in body.items() if p.grad is not None}
    layers = {name for name, m in adapted.backbone.named_modules() if isinstance(m, LoRA)}
    trained = {name for name, p in body.items() if name.endswith("lora_a") and p.requires_grad}
    assert {f"{name}.lora_a" for name in layers} == trained
    assert learning == {f"{name}.lora_{part}" for name in layers for part in "ab"}
    assert all(p.grad is not None for p in adapted.decoder.parameters())
    used = [name for name, p in plain.backbone.named_parameters() if p.requires_grad]
    linear = {n for n, m in plain.backbone.named_modules() if type(m) is torch.nn.Linear}
    assert layers == {name for name in linear if f"{name}.weight" in used}


def test_an_adapter_adds_a_product_of_low_rank():
    linear = torch.nn.Linear(5, 4)
    adapter = LoRA(linear, 2)
    with torch.no_grad():
        adapter.lora_b.normal_()
    x = torch.randn(3, 5)
    expected = linear(x) + 2 * x @ (adapter.lora_b @ adapter.lora_a).T
    torch.testing.assert_close(adapter(x), expected)
    variance = LoRA(torch.nn.Linear(4096, 2), 64).lora_a.detach().var()
    assert float(variance) == pytest.approx(1 / 4096, rel=0.02)


def test_a_run_with_adapters_resumes_and_starts_another_from_its_checkpoint(tmp_path):
    options = (f"model={{{VIT}, {REST}}}", "model.lora=2", "train.iters=4", "losses.occl.weight=0")
    straight = train(tmp_path / "straight", *options, "checkpoint.every=2")
    code, output = run(tmp_path / "parts", *options, "checkpoint.every=2")
    (tmp_path / "parts" / "step_0000004.pt").unlink()
    code, output = run(tmp_path / "parts", *options, "checkpoint.every=2")
    assert code == 0 and "step_0000002.pt" in output, output
    assert scalars(tmp_path / "parts")[4]["train/loss"] == straight[4]["train/loss"]
    state = last(tmp_path / "straight")["model"]
    key = "backbone.blocks.0.attn.qkv.lora_b"
    assert state[key].abs().sum() > 0
    network, *_ = restore(tmp_path / "straight" / "step_0000004.pt", ["eval.weights=student"])
    assert torch.equal(network.state_dict()[key], state[key])
    start = f"model.init={tmp_path / 'straight' / 'step_0000004.pt'}"
    for lora in (2, 0):
        begun = build_segmentor(load(TINY, [*options, start, f"model.lora={lora}"]).model, "abc")
        own = begun.state_dict()
        assert torch.equal(own["backbone.norm.weight"], state["backbone.norm.weight"])
        assert (key in own) == (lora == 2) and (lora == 0 or torch.equal(own[key], state[key]))
        image = torch.rand(1, 3, 48, 64)
        expected, found = (n.eval().segment(image).features for n in (network, begun))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("before, after", [(0, 2), (2, 0), (2, 2)])
def test_adapters_may_come_and_go_between_stages(before, after):
    def stage(lora):
        chosen = [f"model={{{VIT}, {REST}}}", f"model.lora={lora}", "stages=[{init: previous}]"]
        return stages(load(TINY, chosen))[0]

    old = build_segmentor(stage(before).model, "abc").eval()
    for name, parameter in old.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter)
    new = initial_network(stage(after), "abc", old).eval()
    assert any("lora" in name for name in new.state_dict()) == bool(after)
    image = torch.rand(1, 3, 48, 64)
    torch.testing.assert_close(new.segment(image).logits, old.segment(image).logits)
