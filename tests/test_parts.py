"""One test for every part: what lies in models/*, losses/ and datasets/ is found, built as from a YAML, and held to its
contract.

A new file is tested the day it is added. `SMALL` gives a class the options that keep it small, where it needs some.
"""

import ast
import importlib
import inspect
import itertools
import json
import pkgutil
import re
import tempfile
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from datasets.base import SegmentationData
from datasets.transforms import Augment
from engine.build import build, call
from models.segmentor import Output, Segmentor, View

ROOT = Path(__file__).parent.parent


def write_camvid(root):
    """Two frames in the layout images/<split>/, labels/<split>/."""
    for i in range(2):
        write_pair(
            root / "images" / "train" / f"{i}.jpg",
            root / "labels" / "train" / f"{i}.png",
            classes=11,
        )
    return {"root": str(root)}


def write_folder(root):
    for i in range(2):
        write_pair(
            root / "images" / "train" / f"{i}.jpg",
            root / "labels" / "train" / f"{i}.png",
            classes=3,
        )
    return {"root": str(root), "classes": ["road", "car", "sky"]}


def write_cityscapes(root):
    for i in range(2):
        image, label = (
            f"leftImg8bit/train/ulm/{i}_leftImg8bit.png",
            f"gtFine/train/ulm/{i}_gtFine_labelIds.png",
        )
        write_pair(root / image, root / label, classes=34)
    return {"root": str(root)}


def write_gta5(root):
    for i in range(2):
        write_pair(root / "images" / f"{i}.png", root / "labels" / f"{i}.png", classes=35)
    return {"root": str(root)}


def write_synthia(root):
    """16 bits, the class in the last channel of OpenCV's order."""
    for i in range(2):
        label = root / "GT" / "LABELS" / f"{i}.png"
        write_pair(root / "RGB" / f"{i}.png", label, classes=23)
        ids = np.random.default_rng(i).integers(0, 23, (48, 70, 3), dtype=np.uint16)
        cv2.imwrite(str(label), ids)
    return {"root": str(root)}


def write_acdc(root):
    for condition in ("fog", "night", "rain", "snow"):
        image, label = (
            f"{condition}/train/GP1/1_rgb_anon.png",
            f"{condition}/train/GP1/1_gt_labelTrainIds.png",
        )
        write_pair(root / "rgb_anon" / image, root / "gt" / label, classes=19)
    return {"root": str(root)}


def write_bdd100k(root):
    for i in range(2):
        write_pair(
            root / f"images/train/{i}.jpg", root / f"labels/train/{i}_train_id.png", classes=19
        )
    return {"root": str(root)}


def write_mapillary(root):
    for i in range(2):
        label = root / f"training/labels/{i}.png"
        write_pair(root / f"training/images/{i}.jpg", label, classes=65)
        Image.fromarray(np.array(Image.open(label)).clip(max=65)).save(
            label
        )  # 65 is its unlabelled
    return {"root": str(root)}


def write_labelmefacade(root):
    for i in range(2):
        image, label = root / f"images/train/{i}.jpg", root / f"labels/train/{i}.png"
        write_pair(image, label, classes=6)
        ids = np.array([0, 1, 3, 4, 5, 8, 255], np.uint8)[np.array(Image.open(label)).clip(max=6)]
        Image.fromarray(ids).save(label)
    return {"root": str(root)}


def write_ade20k(root):
    for i in range(2):
        label = root / f"annotations/training/{i}.png"
        write_pair(root / f"images/training/{i}.jpg", label, classes=151)
        Image.fromarray(np.array(Image.open(label)).clip(max=150)).save(label)  # 255 does not occur
    return {"root": str(root), "split": "training"}


def write_cocostuff10k(root):
    for i in range(2):
        label = root / f"annotations/train2014/{i}_labelTrainIds.png"
        write_pair(root / f"images/train2014/{i}.jpg", label, classes=172)
    return {"root": str(root), "split": "train2014"}


def write_cocostuff164k(root):
    for i in range(2):
        write_pair(
            root / f"images/val2017/{i}.jpg", root / f"stuffthingmaps/val2017/{i}.png", classes=11
        )
    return {"root": str(root), "split": "val2017"}


def write_voc(root):
    for i in range(2):
        write_pair(root / f"JPEGImages/{i}.jpg", root / f"SegmentationClass/{i}.png", classes=21)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n1\n")
    return {"root": str(root)}


def write_dark_zurich(root):
    image, label = "val/night/GOPR0356/1_rgb_anon.png", "val/night/GOPR0356/1_gt_labelTrainIds.png"
    write_pair(root / "rgb_anon" / image, root / "gt" / label, classes=19)
    return {"root": str(root), "split": "val"}


def write_pair(image, label, classes, size=(48, 70)):
    """A random picture and random ids with some ignored rows."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, classes, size, dtype=np.uint8)
    ids[:5] = 255
    for path, content in ((image, rng.integers(0, 256, (*size, 3), dtype=np.uint8)), (label, ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)


TINY = Path(tempfile.mkdtemp())
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
for model, tower in {  # the smallest CLIPs
    "tiny-RN": {
        "image_size": 64,
        "layers": [1, 1, 1, 2],
        "width": 16,
        "head_width": 64,
        "patch_size": None,
    },
    "tiny-ViT": {"image_size": 64, "layers": 6, "width": 32, "head_width": 16, "patch_size": 16},
}.items():
    (TINY / f"{model}.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": tower, "text_cfg": TEXT})
    )
open_clip.add_model_config(TINY)
torch.save({"vectors": torch.randn(5, 20), "classes": list("abcde")}, TINY / "text.pt")

# What a class needs beyond its defaults to be small, or a function (folder) -> options that writes the files it reads.
SMALL = {
    "resnet.ResNet": {"depth": 18},
    "mit.MiT": {"size": "b0"},
    "mobilenet.MobileNet": {"width": 0.25},
    "convnext.ConvNeXt": {"width": 8, "depths": [1, 1, 2, 1]},
    "swin.Swin": {"width": 32, "depths": [2, 1, 1, 1]},
    "deeplabv3plus.DeepLabV3Plus": {"width": 20, "low_width": 8},
    "deeplabv2.DeepLabV2": {"width": 5},
    "daformer.DAFormer": {"width": 20},
    "fcn.FCN": {"width": 20},
    "segformer_mlp.SegFormerMLP": {"width": 20},
    "upernet.UPerNet": {"width": 20},
    "queries.Queries": {"layers": 2, "heads": 2},
    "protoseg.ProtoSeg": {"per_class": 2},
    "gmmseg.GMMSeg": {
        "components": 2,
        "width": 20,
    },  # as many channels as features: means() lie in its own space
    "camvid.CamVid": write_camvid,
    "folder.Folder": write_folder,
    "cityscapes.Cityscapes": write_cityscapes,
    "gta5.GTA5": write_gta5,
    "synthia.Synthia": write_synthia,
    "acdc.ACDC": write_acdc,
    "toy.Toy": {"size": [48, 70], "length": 3},
    "bdd100k.BDD100K": write_bdd100k,
    "mapillary.Mapillary": write_mapillary,
    "labelmefacade.LabelMeFacade": write_labelmefacade,
    "ade20k.ADE20K": write_ade20k,
    "cocostuff.CocoStuff10k": write_cocostuff10k,
    "cocostuff.CocoStuff164k": write_cocostuff164k,
    "voc.VOC": write_voc,
    "dark_zurich.DarkZurich": write_dark_zurich,
    "clip.ResNet": {"model": "tiny-RN"},
    "clip.ViT": {"model": "tiny-ViT"},
    "timm.Timm": {"model": "test_resnet"},
    "vit.ViT": {"size": "t"},
    "text.Text": {"file": str(TINY / "text.pt"), "classes": list("abcde")},
    "visual_text.VisualText": {"center": False},  # the centre is that of all classes
}

# Modules that hold no part of their package's kind.
HELPERS = {
    "datasets.base": "what all data sets share",
    "datasets.check": "command line tool",
    "datasets.mixers": "views of domain adaptation, tested in test_mixers.py and test_uda.py",
    "datasets.sampler": "order of the samples",
    "datasets.several": "several sets as one, tested in test_several.py",
    "datasets.statistics": "class counts, tested in test_sampler.py",
    "datasets.style": "styles of domain adaptation, tested in test_mixers.py",
    "datasets.toy_scene": "geometry of datasets.toy",
    "datasets.transforms": "augmentation",
    "losses.self_training": "a labeler, tested in test_uda.py",
    "models.prototypes.masked": "command line tool, tested in test_cbp.py",
}


def asks_for(cls, *names):
    """Whether the class is a module of this package whose forward has arguments of these names."""
    return issubclass(cls, nn.Module) and {*names} <= {*inspect.signature(cls.forward).parameters}


# How a part is told from a helper class in the same file: by the names that its contract fixes.
KINDS = {
    "models.backbones": lambda cls: asks_for(cls, "image"),
    "models.decoders": lambda cls: asks_for(cls, "maps"),
    "models.classifiers": lambda cls: asks_for(cls, "features") and hasattr(cls, "means"),
    "models.prototypes": lambda cls: issubclass(cls, nn.Module) and hasattr(cls, "score"),
    "losses": lambda cls: asks_for(cls, "outputs"),
    "datasets": lambda cls: issubclass(cls, SegmentationData),
}


def modules(package):
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return [
        m.name for m in found if f"{package}.{m.name}" not in HELPERS and not m.name.startswith("_")
    ]


def parts(package, module=None):
    """Names `module.Class` of the parts that a package holds."""
    names = []
    for name in [module] if module else modules(package):
        members = vars(importlib.import_module(f"{package}.{name}"))
        own = [
            c
            for c in members.values()
            if inspect.isclass(c) and c.__module__ == f"{package}.{name}"
        ]
        names += [
            f"{name}.{c.__name__}"
            for c in own
            if not c.__name__.startswith("_") and KINDS[package](c)
        ]
    return names


def constructor(package, name):
    module, cls = name.split(".")
    return getattr(importlib.import_module(f"{package}.{module}"), cls)


def make(package, name, folder=None, options=(), **context):
    """Build a part as a YAML does, with the options of SMALL and random weights."""
    small = SMALL.get(name, {})
    spec = {"name": name, **(small(folder) if callable(small) else small), **dict(options)}
    if "weights" in inspect.signature(constructor(package, name)).parameters:
        spec.setdefault("weights", "none")
    torch.manual_seed(0)
    return build(package, spec, **context)


@pytest.mark.parametrize("package, module", [(p, m) for p in KINDS for m in modules(p)])
def test_every_file_holds_a_part(package, module):
    assert parts(package, module), (
        f"{package}.{module} holds no part of its kind; if it is a helper, list it in HELPERS"
    )


def test_tables_name_only_what_exists():
    assert {*SMALL} <= {name for package in KINDS for name in parts(package)}
    for helper in HELPERS:
        importlib.import_module(helper)


# --- networks --------------------------------------------------------------------------------------------------------

SIZES = [(97, 65), (64, 96)]
STRIDES = [(4, 8, 16, 32), (4, 8, 16)]
K, D = 5, 20  # every decoder has D channels: branch_sum.BranchSum needs 4 K


def random_maps(size, strides, batch=2, dtype=torch.float32):
    channels = [8 * 2**i for i in range(len(strides))]
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s), dtype=dtype)
        for c, s in zip(channels, strides)
    ]


def network_cases():
    """(id, function that builds the network, function (batch, dtype) -> its inputs) of every part of a network."""
    for name in parts("models.backbones"):
        yield (
            f"backbone {name}",
            lambda n=name: make("models.backbones", n),
            lambda b, t: torch.rand(b, 3, 97, 65, dtype=t),
        )
    for name, strides in itertools.product(parts("models.decoders"), STRIDES):
        context = {"in_channels": [8 * 2**i for i in range(len(strides))], "strides": list(strides)}
        yield (
            f"decoder {name} {len(strides)} maps",
            lambda n=name, c=context: make("models.decoders", n, **c),
            lambda b, t, s=strides: random_maps((97, 65), s, b, t),
        )
    for name in parts("models.classifiers"):
        yield (
            f"classifier {name}",
            lambda n=name: make("models.classifiers", n, in_channels=D, num_classes=K),
            lambda b, t: torch.randn(b, D, 9, 7, dtype=t),
        )


CASES = [
    pytest.param(build_network, inputs, id=name) for name, build_network, inputs in network_cases()
]


def flat(output):
    return list(output) if isinstance(output, (list, tuple)) else [output]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", parts("models.backbones"))
def test_backbone_maps_agree_with_channels_and_strides(name, size):
    backbone = make("models.backbones", name)
    maps = backbone(torch.rand(2, 3, *size), domain="source")
    assert len(maps) == len(backbone.channels) == len(backbone.strides)
    assert list(backbone.strides) == sorted(backbone.strides)
    for x, channels, stride in zip(maps, backbone.channels, backbone.strides):
        assert x.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strides", STRIDES, ids=len)
@pytest.mark.parametrize("name", parts("models.decoders"))
def test_decoder_gives_one_map_of_its_channels(name, strides, size):
    maps = random_maps(size, strides)
    decoder = make(
        "models.decoders", name, in_channels=[x.shape[1] for x in maps], strides=list(strides)
    )
    features = decoder(maps)
    assert features.shape[:2] == (2, decoder.channels)
    assert features.shape[-2:] in [x.shape[-2:] for x in maps]


@pytest.mark.parametrize("name", parts("models.classifiers"))
def test_classifier_gives_logits_and_class_vectors(name):
    classifier = make("models.classifiers", name, in_channels=D, num_classes=K)
    assert classifier(torch.randn(2, D, 9, 7)).shape == (2, K, 9, 7)
    assert classifier.means().shape == (K, D)


@pytest.mark.parametrize("build_network, inputs", CASES)
def test_network_gradients_reach_every_trainable_parameter_with_a_batch_of_one(
    build_network, inputs
):
    network = build_network().train()
    x = inputs(1, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in flat(x)]
    outputs = flat(network(x))
    sum((y * torch.randn_like(y)).sum() for y in outputs).backward()
    without = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "DistributedDataParallel waits for these gradients forever"
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize("build_network, inputs", CASES)
def test_network_in_eval_mode_is_deterministic_and_survives_a_state_dict_round_trip(
    build_network, inputs, tmp_path
):
    network = build_network()
    x = inputs(2, torch.float32)
    network.train()(x)  # so that batch statistics differ from their initial values
    network.eval()
    expected = network(x)
    assert same(expected, network(x))
    torch.save(network.state_dict(), tmp_path / "state.pt")
    other = build_network().eval()
    for tensor in [*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())]:
        nn.init.normal_(tensor.detach())
    for name, buffer in build_network().named_buffers():
        if name not in network.state_dict():  # constants, such as the mean colour, are not loaded
            other.get_buffer(name).copy_(buffer)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(expected, other(x))


@pytest.mark.parametrize("build_network, inputs", CASES)
def test_network_runs_in_float64_and_agrees_with_float32(build_network, inputs):
    network = build_network().eval()
    x = inputs(2, torch.float64)
    single = network([m.float() for m in x] if isinstance(x, list) else x.float())
    double = network.double()(x)
    assert all(y.dtype == torch.float64 for y in flat(double))
    for a, b in zip(flat(single), flat(double)):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build_network, inputs", CASES)
def test_network_can_be_built_without_memory(build_network, inputs):
    with torch.device("meta"):
        assert all(p.is_meta for p in build_network().parameters())


@pytest.mark.parametrize(
    "backbone, decoder",
    list(itertools.product(parts("models.backbones"), parts("models.decoders"))),
)
def test_every_backbone_fits_every_decoder_and_classifier(backbone, decoder):
    backbone = make("models.backbones", backbone)
    decoder = make(
        "models.decoders", decoder, in_channels=backbone.channels, strides=backbone.strides
    )
    views = {
        "source": View(torch.rand(2, 3, 64, 96)),
        "target": View(torch.rand(1, 3, 65, 97), "target"),
    }
    for name in parts("models.classifiers"):
        classifier = make("models.classifiers", name, in_channels=decoder.channels, num_classes=K)
        model = Segmentor(backbone, decoder, classifier)
        outputs = model(views, step=3)
        assert list(outputs) == list(views)
        for view, output in outputs.items():
            assert output.features.shape[:2] == (len(views[view].image), decoder.channels)
            assert output.logits.shape == (len(output.features), K, *output.features.shape[-2:])
        model.zero_grad()
        sum(output.logits.square().sum() for output in outputs.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- prototypes ------------------------------------------------------------------------------------------------------

MEMBERS = pytest.mark.parametrize("name", parts("models.prototypes"))


def member(name):
    return make("models.prototypes", name, num_classes=K, in_channels=D, seed=0)


def update(member, batches):
    """As a script does it: some members look at others."""
    text = make("models.prototypes", "basis.OrthogonalBasis", num_classes=K, in_channels=D)
    call(member.update, batches=batches, prototypes={"text": text}, step=5, iters=10)


def fit(member, batches):
    text = make("models.prototypes", "basis.OrthogonalBasis", num_classes=K, in_channels=D)
    call(member.fit, batches=batches, prototypes={"text": text})


def labelled(classes, batch=2, seed=0, dtype=torch.float32):
    """Features (B, D, h, w) and labels (B, h, w) of these classes; the first row is ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (batch, 9, 7), generator=generator)]
    labels[:, 0] = 255
    features = torch.randn(batch, D, 9, 7, generator=generator) + 2 * torch.eye(K, D)[
        labels % K
    ].permute(0, 3, 1, 2)
    return features.to(dtype), labels


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module, state):
    return all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@MEMBERS
def test_prototypes_have_the_shapes_of_the_family(name):
    prototypes = member(name)
    features, labels = labelled(range(K))
    update(prototypes, [(features, labels, None)])
    assert prototypes.score(features).shape == (2, K, 9, 7)
    assert prototypes.score(features).isfinite().all()
    assert prototypes.means().shape == (K, D)
    assert (
        prototypes.seen.shape == (K,)
        and prototypes.seen.dtype == torch.bool
        and prototypes.seen.all()
    )


@MEMBERS
def test_prototype_scores_have_a_gradient_and_keep_float64(name):
    prototypes = member(name)
    features, labels = labelled(range(K))
    update(prototypes, [(features, labels, None)])
    features = features.requires_grad_()
    (gradient,) = torch.autograd.grad((prototypes.score(features) ** 2).sum(), features)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    score = prototypes.double().score(features.double())
    assert score.dtype == torch.float64
    torch.testing.assert_close(
        score.float(), prototypes.float().score(features), rtol=1e-4, atol=1e-4
    )


@MEMBERS
def test_prototype_state_lies_in_buffers_of_at_least_float32(name):
    prototypes = member(name)
    features, labels = labelled(range(K), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        update(prototypes, [(features, labels, None)])
        fit(prototypes, lambda: [(features, labels, None)])
    assert not list(prototypes.parameters())
    assert {key for key, _ in prototypes.named_buffers()} == {*prototypes.state_dict()}
    floating = [b for b in prototypes.buffers() if b.is_floating_point()]
    assert floating and all(
        b.dtype in (torch.float32, torch.float64) and b.isfinite().all() for b in floating
    )
    assert not any(b.requires_grad for b in prototypes.buffers())


@MEMBERS
def test_prototype_update_moves_only_classes_that_are_present(name):
    prototypes = member(name)
    fit(prototypes, lambda: [(*labelled([0, 1, 2, 3], seed=1), None)])
    state, means, seen = state_of(prototypes), prototypes.means().clone(), prototypes.seen.clone()
    features, labels = labelled([1, 3], seed=2)
    update(prototypes, iter([(features.requires_grad_(), labels, None)]))
    absent = [0, 2, 4]
    assert torch.equal(prototypes.means()[absent], means[absent])
    assert torch.equal(prototypes.seen[absent], seen[absent])
    if not unchanged(prototypes, state):  # a frozen member keeps everything
        assert prototypes.seen[[1, 3]].all()
        assert not torch.isclose(prototypes.means()[[1, 3]], means[[1, 3]]).all(1).any()


@MEMBERS
def test_prototypes_that_an_update_leaves_alone_stay_through_fit(name):
    prototypes = member(name)
    state = state_of(prototypes)
    update(prototypes, [(*labelled(range(K)), None)])
    if unchanged(prototypes, state):
        fit(prototypes, lambda: [(*labelled(range(K)), None)])
        assert unchanged(prototypes, state)


@MEMBERS
@pytest.mark.parametrize("empty", ["ignored", "no weight"])
def test_prototype_update_without_labels_changes_nothing(name, empty):
    prototypes = member(name)
    update(prototypes, [(*labelled(range(K)), None)])
    state = state_of(prototypes)
    features, labels = labelled(range(K), seed=1)
    if empty == "ignored":
        update(prototypes, [(features, torch.full_like(labels, 255), None)])
    else:
        update(prototypes, [(features, labels, torch.zeros(labels.shape))])
    assert unchanged(prototypes, state)


@MEMBERS
def test_prototype_update_does_not_depend_on_micro_batches_and_counts_weights(name):
    features, labels = labelled(range(K), batch=4)
    ones = torch.ones(labels.shape)
    results = []
    for batches in (
        [(features, labels, None)],
        [(features[:1], labels[:1], None), (features[1:], labels[1:], None)],
        [(features, labels, ones)],
        [(torch.where(labels[:, None] == 255, 7.0, features), labels, ones / 2)],
    ):
        prototypes = member(name)
        update(prototypes, [(*labelled(range(K), seed=1), None)])
        update(prototypes, batches)
        results.append(prototypes.means())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@MEMBERS
def test_prototypes_come_back_from_a_state_dict(name):
    prototypes, other = member(name), member(name)
    features, labels = labelled(range(K))
    fit(prototypes, lambda: [(features, labels, None)])
    for buffer in other.buffers():
        if buffer.is_floating_point():
            nn.init.normal_(buffer)
    other.load_state_dict(state_of(prototypes))
    assert unchanged(other, state_of(prototypes))
    assert torch.equal(other.score(features), prototypes.score(features))


# --- losses ----------------------------------------------------------------------------------------------------------

LOSSES = pytest.mark.parametrize("name", parts("losses"))


def evaluate(name, classes, dtype=torch.float32):
    """A loss on random outputs whose labels hold these classes -> (value, leaves)."""
    generator = torch.Generator().manual_seed(0)
    outputs, labels, samples, leaves = {}, {}, {}, []
    for number, view in enumerate(("source", "target", "strong")):
        logits = (
            torch.randn(2, K, 9, 7, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_()
        )
        features = (
            torch.randn(2, D, 9, 7, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_()
        )
        ids = torch.tensor(classes)[torch.randint(len(classes), (2, 18, 14), generator=generator)]
        ids[:, :4] = 255
        aux = {
            "embedding": F.normalize(features, dim=1),
            "prototypes": logits[:, :, :4, :5].flatten(2),
        }
        aux |= {"domain": logits[:, 0, :2, :3], "auxiliary": logits[:, :, ::2, ::2]}
        aux |= dict.fromkeys(
            ("cosines", "densities"), logits[:, :, None] * logits.new_tensor([1, -1])[:, None, None]
        )
        outputs[view], labels[view] = Output(logits, features, aux), ids
        samples[view] = torch.tensor([4, 9]) + number
        leaves += [logits, features]
    valid = {view: (ids != 255).sum() for view, ids in labels.items()}
    kept = {"strong": (labels["strong"] != 255).to(dtype)}
    drawn = [
        torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(dtype)
        for leaf in leaves[:2]
    ]
    teacher = Output(*drawn, {})
    members = {
        "classifier": make("models.classifiers", "linear.Linear", in_channels=D, num_classes=K).to(
            dtype
        )
    }
    peer = make("models.classifiers", "protoseg.ProtoSeg", in_channels=D, num_classes=K)
    members[
        "classifier"
    ].assign = peer.assign  # what losses ask of a classifier with several components per class
    members |= {
        name: make("models.prototypes", "basis.OrthogonalBasis", in_channels=D, num_classes=K).to(
            dtype
        )
        for name in ("text", "visual")
    }
    loss = make("losses", name, num_classes=K, in_channels=D, seed=0)
    value = call(
        loss,
        outputs=outputs,
        labels=labels,
        weights=kept,
        valid=valid,
        samples=samples,
        prototypes=members,
        step=5,
        teacher=teacher,
        iters=10,
        tower=drawn[1],
    )
    return value, leaves


def gradients(value, leaves):
    return [g for g in torch.autograd.grad(value, leaves, allow_unused=True) if g is not None]


@LOSSES
def test_loss_is_a_scalar_that_reaches_the_network_and_float64_is_kept(name):
    value, leaves = evaluate(name, [0, 1, 3])
    exact, _ = evaluate(name, [0, 1, 3], torch.float64)
    assert value.shape == () and value.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    found = gradients(value, leaves)
    assert any(g.abs().sum() > 0 for g in found) and all(g.isfinite().all() for g in found)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_outputs_is_computed_in_float32(name, dtype):
    with torch.autocast("cpu", torch.bfloat16):
        value, leaves = evaluate(name, [0, 1, 3], dtype)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, evaluate(name, [0, 1, 3])[0], rtol=0.1, atol=0.1)
    assert all(g.isfinite().all() for g in gradients(value, leaves))


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_without_labels_is_zero_and_keeps_the_graph(name, dtype):
    arguments = {*inspect.signature(constructor("losses", name).forward).parameters}
    if not arguments & {"labels", "weights"}:
        pytest.skip(f"{name} uses no labels")
    value, leaves = evaluate(name, [255], dtype)
    assert value == 0 and value.requires_grad
    found = gradients(value, leaves)
    assert found and all((g == 0).all() for g in found)


@LOSSES
def test_loss_of_a_single_class_is_finite(name):
    value, leaves = evaluate(name, [2])
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, leaves))


WAITING = {
    "item",
    "nonzero",
    "unique",
    "tolist",
    "cpu",
    "numpy",
}  # methods that make the CPU wait for a GPU


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "losses").glob("*.py"), ROOT / "engine" / "statistics.py"]),
    ids=lambda p: p.name,
)
def test_losses_never_wait_for_the_gpu(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    waiting = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in WAITING]
    assert not waiting, [f"line {c.lineno}: .{c.func.attr}(" for c in waiting]


# --- data sets -------------------------------------------------------------------------------------------------------

DATASETS = pytest.mark.parametrize("name", parts("datasets"))


def dataset(name, folder, **options):
    return make("datasets", name, folder, options, root=str(folder), seed=0)


@DATASETS
def test_dataset_names_and_colours_its_classes(name, tmp_path):
    data = dataset(name, tmp_path)
    assert 0 < len(data.CLASSES) == len(set(data.CLASSES)) == len(data.PALETTE) < 254
    assert np.shape(data.PALETTE) == (len(data.CLASSES), 3)
    assert np.min(data.PALETTE) >= 0 and np.max(data.PALETTE) <= 255


@DATASETS
def test_dataset_samples_keep_the_contract(name, tmp_path):
    data = dataset(name, tmp_path)
    assert len(data) > 0
    samples = [data[i] for i in range(min(len(data), 2))]
    for i, sample in enumerate(samples):
        image, label = sample["image"], sample["label"]
        assert type(image) is type(label) is torch.Tensor
        assert image.dtype == label.dtype == torch.uint8
        assert image.shape == (3, *label.shape) and label.ndim == 2
        assert ((label < len(data.CLASSES)) | (label == 255)).all() and (label != 255).any()
        assert sample["index"] == sample["sample"] == i
    assert data[0, 17]["index"] == 0 and data[0, 17]["sample"] == 17
    assert torch.equal(data[0]["image"], samples[0]["image"]) and torch.equal(
        data[0]["label"], samples[0]["label"]
    )


@DATASETS
def test_dataset_augmentation_is_a_function_of_the_sample_number(name, tmp_path):
    data = dataset(name, tmp_path, augment=Augment(crop=[32, 40], color=[0.3, 0.3, 0.3, 0.05]))
    first, again, other = data[0, 5], data[0, 5], data[0, 6]
    assert first["image"].shape == (3, 32, 40) and first["label"].shape == (32, 40)
    assert torch.equal(first["image"], again["image"]) and torch.equal(
        first["label"], again["label"]
    )
    assert not torch.equal(first["image"], other["image"])
    assert default_collate([first, other])["image"].shape == (2, 3, 32, 40)


@DATASETS
def test_unlabelled_dataset_has_the_same_images_and_ignore_everywhere(name, tmp_path):
    data, unlabelled = dataset(name, tmp_path), dataset(name, tmp_path, labels=False)
    assert len(data) == len(unlabelled)
    assert torch.equal(data[0]["image"], unlabelled[0]["image"])
    assert (unlabelled[0]["label"] == 255).all()
    assert unlabelled[0]["label"].shape == data[0]["label"].shape


# --- who may import whom ---------------------------------------------------------------------------------------------

OURS = ("engine", "models", "losses", "datasets", "benchmarks", "eval", "predict", "train_")
LEAVES = (
    "engine.ranges",
    "engine.distributed",
    "engine.statistics",
    "engine.weights",
    "engine.errors",
)
EXTRA = {  # beside its own folder and the leaves
    "models": ("models.blocks",),
    "models.classifiers": ("models.prototypes",),
    "models.prototypes.text": ("models.backbones.clip",),  # the command that makes its file
    "models.prototypes.masked": ("engine.build", "engine.config", "engine.prepare"),
    "losses.self_training": ("engine.inference",),
    "datasets.check": ("engine.build", "engine.config", "engine.pictures"),
}


def imports(path, lazy):
    """Full names of our modules that a file imports; `lazy`: also inside functions."""
    found, nodes = [], [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        if lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return [name for name in found if name.startswith(OURS)]


def under(name, prefixes):
    return any(re.match(rf"{re.escape(prefix)}(\.|$)", name) for prefix in prefixes)


def files(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    "path", files("models", "losses", "datasets"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_parts_import_only_their_own_folder_and_the_leaves_of_the_engine(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package = module.rpartition(".")[0]
    allowed = [package] if package != "models" else []
    allowed += [
        *LEAVES,
        *itertools.chain.from_iterable(
            names for key, names in EXTRA.items() if under(module, [key])
        ),
    ]
    assert not [name for name in imports(path, lazy=True) if not under(name, allowed)]


@pytest.mark.parametrize("path", files("engine"), ids=lambda p: p.name)
def test_engine_imports_parts_only_inside_functions(path):
    assert not [name for name in imports(path, lazy=False) if not under(name, ["engine"])]
