"""`model.compile`: how many forms of the blocks are compiled, and that results stay.

The code generator, which takes a minute, is left out: graphs are counted and run as they are.
"""

import copy
import importlib

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from engine.config import ConfigError, load
from engine.ema import Teacher
from engine.step import View
from models.backbones.mit import MiT
from models.backbones.resnet import ResNet
from models.backbones.vit import ViT
from models.blocks import run
from models.classifiers.linear import Linear
from models.compiled import DropPath, compiled, compiling, rates_as_tensors
from models.decoders.deeplabv3plus import DeepLabV3Plus
from models.decoders.segformer_mlp import SegFormerMLP
from models.heads.region import Region
from models.segmentor import Segmentor
from tests.runs import TINY, TINY_UDA, train


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, in this order; `options` has those of each torch.compile."""

    class Graphs(list):
        options: list

    compiler, found = torch.compile, Graphs()
    found.options = []

    def without_code(function, dynamic, options):
        found.options.append(options)
        return compiler(function, dynamic=dynamic, backend=count)

    def count(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", without_code)
    compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(cache_size_limit=8):  # PyTorch's, and back to it
        yield found
    compiled.cache_clear()
    torch._dynamo.reset()


def complete():
    """Whether all calls of compiled functions are compiled, each as one graph."""
    counters = torch._dynamo.utils.counters
    return counters["frames"]["total"] == counters["frames"]["ok"] and not counters["graph_break"]


def a_network(backbone, compiled=True, heads=None, **options):
    torch.manual_seed(0)
    if backbone.per_domain or not backbone.joins:
        decoder = DeepLabV3Plus(
            in_channels=backbone.channels, strides=backbone.strides, width=8, dropout=0.0
        )
    else:
        decoder = SegFormerMLP(in_channels=backbone.channels, width=8, dropout=0.0)
    classifier = Linear(in_channels=8, num_classes=3)
    made = heads(classifier) if heads else None
    network = Segmentor(backbone, decoder, classifier, made, compiled=compiled, **options).train()
    if compiled:
        rates_as_tensors(network)
    return network


def views(images, height, width):
    source, target = torch.rand(2, images, 3, height, width)
    return {"source": View(source, "source"), "target": View(target, "target")}


def learn(network, seen):
    """A step's forward and backward pass -> {view: Output}."""
    outputs = network(seen)
    sum(output.logits.square().mean() for output in outputs.values()).backward()
    return outputs


def same_as_plain(network, seen):
    """Outputs, gradients and batch statistics of a compiled network agree with those of its copy
    that is not."""
    plain = copy.deepcopy(network)
    plain.compiled = False
    outputs, expected = learn(network, seen), learn(plain, seen)
    for name, output in outputs.items():
        torch.testing.assert_close(output.logits, expected[name].logits)
    for (name, mine), theirs in zip(network.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close([*network.buffers()], [*plain.buffers()])
    return outputs


def test_blocks_of_a_stage_share_one_graph_and_evaluation_has_none(graphs):
    torch.manual_seed(0)
    network = a_network(MiT(size="b2", weights="none", drop_path=0.2))  # 3, 4, 6 and 3 blocks
    teacher = Teacher(network, 0.9)
    learn(network, views(2, 96, 160))
    assert len(graphs) == 5  # four widths, and the decoder
    found = teacher.segment(image := torch.rand(2, 3, 96, 160)).logits
    assert len(graphs) == 10  # without gradients
    torch.testing.assert_close(found, teacher.network.segment(image).logits)
    learn(network, views(2, 160, 96))
    assert len(graphs) == 15  # another size
    for height in range(96, 112, 2):
        network.eval().segment(torch.rand(1, 3, height, 101))
    learn(network.train(), views(2, 96, 160))
    teacher.segment(image)
    assert len(graphs) == 15 and complete()
    assert graphs.options == [{"triton.cudagraphs": False, "fallback_random": True}]


def test_the_copy_of_the_teacher_for_autocast_is_compiled(graphs):
    teacher = Teacher(a_network(ViT(size="t", weights="none")), 0.9)
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.segment(image := torch.rand(2, 3, 32, 48)).logits
        assert len(graphs) == 2 and complete()  # a block, the decoder
        torch.testing.assert_close(found, teacher.cast[0].segment(image).logits)


def test_more_forms_of_blocks_than_pytorch_allows_are_compiled(graphs):
    """Two forms in layer1 to layer4 but for one in the first, and the decoder; the same for the
    teacher: 16, and PyTorch's limit is 8."""
    network = a_network(ResNet(depth=18, weights="none"))
    same_as_plain(network, views(2, 64, 96))
    assert len(graphs) == 8
    Teacher(network, 0.9).segment(torch.rand(2, 3, 64, 96))
    assert len(graphs) == 16 and complete()


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: MiT(size="b0", weights="none", drop_path=0.0, checkpointing=True),
        lambda: ResNet(depth=18, stages=2, weights="none", stem="per_domain", checkpointing=True),
    ],
    ids=["mit", "resnet"],
)
def test_compiled_blocks_give_the_same_gradients_with_checkpointing(graphs, backbone):
    options = {"bn_views": ["source"]}  # some batch norms keep their statistics
    network = a_network(backbone(), **options)
    names = list(network.state_dict())
    same_as_plain(network, views(2, 64, 96))
    assert graphs and complete()
    assert names == list(a_network(backbone(), compiled=False).state_dict())


@pytest.mark.parametrize(
    ("package", "name", "options", "expected"),
    [
        ("open_clip", "ViT", {"model": "ViT-B-32-quickgelu"}, 1),  # a block
        ("open_clip", "ResNet", {"model": "RN50"}, 4),  # the stages
        ("timm", "Timm", {"model": "vit_tiny_patch16_224"}, 1),  # all of it
    ],
)
def test_networks_of_other_packages_are_compiled(graphs, package, name, options, expected):
    pytest.importorskip(package)
    module = importlib.import_module(f"models.backbones.{'clip' if 'clip' in package else package}")
    backbone = getattr(module, name)(weights="none", **options).train()
    image = torch.rand(1, 3, 64, 64)
    with compiling(True):
        found = backbone(image)
    assert len(graphs) == expected and complete()
    torch.testing.assert_close(found, backbone(image))


def test_attention_that_a_head_guides_is_compiled(graphs):
    backbone = ViT(size="t", weights="none", drop_path=0.0)

    def heads(classifier):
        return {
            "region": Region(
                in_channels=8,
                map_channels=backbone.channels,
                depths=backbone.depths,
                reductions=backbone.reductions,
                num_classes=3,
                classifier=classifier,
                stage=1,
                blocks=2,
                cell=2,
                dropout=0.0,
            )
        }

    outputs = same_as_plain(a_network(backbone, heads=heads), views(2, 64, 96))
    assert outputs["source"].regions.priority.shape == (2, 4, 6)
    assert len(graphs) == 3 and complete()  # blocks without and with a bias, the decoder


def test_a_compiled_drop_path_leaves_out_whole_images_and_keeps_the_mean(graphs):
    layers = nn.Sequential(*(StochasticDepth(p, "row") for p in (0.0, 0.5, 0.75)))
    rates_as_tensors(layers)
    assert all(type(layer) is DropPath for layer in layers) and not layers.state_dict()
    torch.manual_seed(0)
    for layer, kept in zip(layers, (1.0, 0.5, 0.25)):
        with compiling(True):
            y = run(layer, False, torch.ones(4096, 2, 3))
        assert (y == y[:, :1, :1]).all() and set(y.unique().tolist()) <= {0.0, 1 / kept}
        assert abs(y.mean() - 1) < 0.1 and (y.std() > 0 or kept == 1)
    assert len(graphs) == 1
    assert torch.equal(run(layers[1].eval(), False, y), y)


def test_cuda_graphs_begin_anew_with_each_step(graphs, tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    train(tmp_path / "plain", "model.compile=true", "train.iters=1")
    assert not marks and graphs
    train(tmp_path / "graphs", "model.compile=reduce-overhead", config=TINY_UDA)
    assert len(marks) == 6  # three steps of two stages
    assert graphs.options[-1] == {"triton.cudagraphs": True, "fallback_random": True}


def test_compile_is_false_true_or_reduce_overhead():
    for word in ("false", "true", "reduce-overhead"):
        load(TINY, [f"model.compile={word}"])
    with pytest.raises(ConfigError, match=r"model\.compile must be false, true or reduce-overhead"):
        load(TINY, ["model.compile=max-autotune"])
