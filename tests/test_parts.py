"""One test for every part: what lies in models/*, losses/ and datasets/ is found, built as from a
YAML, and held to the face of its folder (base.py).

A new file is tested the day it is added. `SMALL` gives a class the options that keep it small,
where it needs some.
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
from engine.build import build
from engine.config import ConfigError, load, stages
from engine.errors import UserError
from engine.step import Record, View
from losses.base import Labeler, Loss
from models.backbones.base import Backbone
from models.build import HEADS, build_segmentor, initial_network, restore
from models.classifiers.base import Classifier
from models.heads.base import Head
from models.heads.region import Regions
from models.prototypes.base import Prototypes
from models.segmentor import Segmentor
from tests.records import a_batch, a_step, an_output
from tests.runs import TINY, TINY_UDA, last, train

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


CLIPS = Path(tempfile.mkdtemp())
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
    (CLIPS / f"{model}.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": tower, "text_cfg": TEXT})
    )
open_clip.add_model_config(CLIPS)
torch.save({"vectors": torch.randn(5, 20), "classes": list("abcde")}, CLIPS / "text.pt")

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
    "text.Text": {"file": str(CLIPS / "text.pt"), "classes": list("abcde")},
    "mapped.Mapped": {"file": str(CLIPS / "text.pt"), "classes": list("abcde")},
    "visual_text.VisualText": {"center": False},  # the centre is that of all classes
    "auxiliary.Auxiliary": {"stage": 1, "width": 8},
    "projector.Projector": {"channels": 12},
    "text_attention.TextAttention": {"width": 16, "heads": 2},
    "region.Region": {"stage": -1, "variant": "none", "cell": 2, "ramp": 0},
}

# Modules that hold no part of their package's kind, beside base.py, the face, and build.py.
HELPERS = {
    "datasets.check": "command line tool",
    "datasets.masked": "a view of domain adaptation, tested in test_masked.py",
    "datasets.mixers": "views of domain adaptation, tested in test_mixers.py",
    "datasets.reading": "files to arrays, tested in test_reading.py",
    "datasets.sampler": "order of the samples",
    "datasets.several": "several sets as one, tested in test_several.py",
    "datasets.statistics": "class counts, tested in test_statistics.py",
    "datasets.style": "styles of domain adaptation, tested in test_style.py",
    "datasets.toy_scene": "geometry of datasets.toy",
    "datasets.transforms": "augmentation",
    "models.prototypes.masked": "command line tool, tested in test_masked.py",
}
BASES = ["basis.Rows"]  # classes between a face and its parts

# The faces of a package. Decoders need none: maps in, features out.
FACES = {
    "models.backbones": (Backbone,),
    "models.decoders": (nn.Module,),
    "models.heads": (Head,),
    "models.classifiers": (Classifier,),
    "models.prototypes": (Prototypes,),
    "losses": (Loss, Labeler),
    "datasets": (SegmentationData,),
}


def modules(package):
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    helpers = [*HELPERS, f"{package}.base", f"{package}.build"]
    return [
        m.name
        for m in found
        if f"{package}.{m.name}" not in helpers
        and m.name.isidentifier()
        and not m.name.startswith("_")
    ]


def classes(package, module=None):
    """{"module.Class": class} of the classes that the modules of a package define."""
    found = {}
    for name in [module] if module else modules(package):
        for value in vars(importlib.import_module(f"{package}.{name}")).values():
            if inspect.isclass(value) and value.__module__ == f"{package}.{name}":
                found[f"{name}.{value.__name__}"] = value
    return found


def parts(package, face=None):
    """Names `module.Class` of the parts that a package holds, of one of its faces or of any."""
    faces = face or FACES[package]
    return [
        name
        for name, cls in classes(package).items()
        if issubclass(cls, faces)
        and name not in BASES
        and not name.split(".")[1].startswith("_")
        and (package != "models.decoders" or asks_for(cls, "maps"))
    ]


def asks_for(cls, *names):
    """Whether the class is a module whose forward has arguments of these names."""
    return issubclass(cls, nn.Module) and {*names} <= {*inspect.signature(cls.forward).parameters}


# What looks like a part, by the names that its face fixes, must be one.
LOOKS = {
    "models.backbones": lambda cls: asks_for(cls, "image"),
    "models.heads": lambda cls: asks_for(cls, "output") or hasattr(cls, "at_test"),
    "models.classifiers": lambda cls: asks_for(cls, "features") and hasattr(cls, "means"),
    "models.prototypes": lambda cls: hasattr(cls, "score") or hasattr(cls, "means"),
    "losses": lambda cls: issubclass(cls, nn.Module),
    "datasets": lambda cls: hasattr(cls, "CLASSES"),
}


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


@pytest.mark.parametrize("package, module", [(p, m) for p in FACES for m in modules(p)])
def test_every_file_holds_a_part(package, module):
    found = [name for name in parts(package) if name.split(".")[0] == module]
    assert found, (
        f"{package}.{module} holds no part of its kind; if it is a helper, list it in HELPERS"
    )


def test_tables_name_only_what_exists():
    assert {*SMALL} <= {name for package in FACES for name in parts(package)}
    assert {*BASES} <= {name for package in FACES for name in classes(package)}
    for helper in HELPERS:
        importlib.import_module(helper)


@pytest.mark.parametrize("package", LOOKS)
def test_what_looks_like_a_part_derives_from_its_face(package):
    alike = {name: cls for name, cls in classes(package).items() if LOOKS[package](cls)}
    assert {*parts(package)} <= {*alike}
    assert not [name for name, cls in alike.items() if not issubclass(cls, FACES[package])]


def face_methods(cls, faces):
    """(name, method of the face, method of the class) of what a class overrides."""
    for face in (base for base in cls.__mro__ if issubclass(base, faces)):
        for name, method in vars(face).items():
            if inspect.isfunction(method) and face.__module__.endswith(".base"):
                own = getattr(cls, name)
                if name[0] != "_" and inspect.isfunction(own) and own is not method:
                    yield name, method, own


@pytest.mark.parametrize(
    "package, name",
    [(p, n) for p in FACES if p not in ("datasets", "models.decoders") for n in classes(p)],
)
def test_a_method_of_a_face_can_be_called_as_the_face_says(package, name):
    for method, face, own in face_methods(classes(package)[name], FACES[package]):
        wanted, given = (list(inspect.signature(f).parameters.values()) for f in (face, own))
        named = [parameter.name for parameter in given[: len(wanted)]]
        assert named == [parameter.name for parameter in wanted], f"{name}.{method}"
        further = [p.name for p in given[len(wanted) :] if p.default is p.empty]
        assert not further, f"{name}.{method} needs {further}, which nobody gives to it"


# --- networks --------------------------------------------------------------------------------------------------------

SIZES = [(97, 65), (64, 96)]
STRIDES = [(4, 8, 16, 32), (4, 8, 16)]
K, D = 5, 20  # decoders with a width have D channels: branch_sum.BranchSum needs 4 K


def random_maps(size, strides, batch=2, dtype=torch.float32):
    channels = [8 * 2**i for i in range(len(strides))]
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s), dtype=dtype)
        for c, s in zip(channels, strides)
    ]


HEAD_CONTEXT = {"in_channels": D, "map_channels": [D], "depths": (), "num_classes": K, "joint": D}
HEAD_CONTEXT["classifier"] = None


def tensors(record):
    """{field: tensor} of a record and of the records in it."""
    found = {}
    for name, value in vars(record).items():
        if isinstance(value, Record):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()}
        elif torch.is_tensor(value):
            found[name] = value
    return found


class Alone(nn.Module):
    """A head by itself: features (B, D, h, w), which are also the map of the backbone and what the
    image tower sees -> the tensors that it writes."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features):
        output = an_output(features=features)
        before = tensors(output)
        text = torch.eye(K, D, dtype=features.dtype)
        self.head(View(features, text=text, dense=features), [features], output, 3)
        return [value for name, value in tensors(output).items() if value is not before.get(name)]


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
    for name in parts("models.heads"):
        yield (
            f"head {name}",
            lambda n=name: Alone(make("models.heads", n, **HEAD_CONTEXT)),
            lambda b, t: torch.randn(b, D, 9, 7, dtype=t),
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
    maps = backbone(torch.rand(2, 3, *size))
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


@pytest.mark.parametrize("name", parts("models.backbones"))
def test_backbone_says_what_it_takes_and_has(name):
    backbone, image = make("models.backbones", name), torch.rand(1, 3, 64, 96)
    takes = {*inspect.signature(backbone.forward).parameters}
    assert takes <= {"image", "domain", "bias"} and ("bias" in takes) == bool(backbone.depths)
    assert "domain" in takes or not backbone.per_domain
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert backbone.joins == (not norms) or name.startswith("timm.")  # which may hold anything
    if backbone.depths:
        asked = []
        backbone(image, bias=lambda stage, block, x, keys: asked.append((stage, block)))
        stages = enumerate(backbone.depths, 1)
        assert asked == [(stage, block) for stage, depth in stages for block in range(depth)]
        assert all(block.attn for s, b in asked for block in [backbone.stage_blocks(s)[b]])
    else:
        with pytest.raises(NotImplementedError):
            backbone.stage_blocks(1)
    if backbone.joint:
        dense = backbone.dense(image)
        assert dense.shape[:2] == (1, backbone.joint) and dense.ndim == 4
        torch.testing.assert_close(dense.norm(dim=1), torch.ones_like(dense[:, 0]))
    else:
        with pytest.raises(NotImplementedError):
            backbone.dense(image)


def test_a_stem_per_domain_is_an_attribute_of_the_backbone():
    for stem, expected in (("shared", False), ("per_domain", True)):
        spec = {"name": "resnet.ResNet", "depth": 18, "weights": "none", "stem": stem}
        assert build("models.backbones", spec).per_domain == expected


@pytest.mark.parametrize("name", parts("models.classifiers"))
def test_classifier_gives_logits_and_class_vectors(name):
    classifier = make("models.classifiers", name, in_channels=D, num_classes=K).eval()
    features = torch.randn(2, D, 9, 7)
    assert classifier(features).shape == (2, K, 9, 7)
    assert torch.equal(classifier.score(features), classifier(features))
    assert classifier.means().shape == (K, D)
    assert classifier.every().shape[1] == D and len(classifier.every()) % K == 0
    assert classifier.seen.dtype == torch.bool and classifier.seen.tolist() == [True] * K
    means, present = classifier.pair_means(features, torch.zeros(2, 9, 7, dtype=torch.long))
    assert means.shape == (2, K, D) and present.shape == (2, K) and present.all()
    assert classifier.space in ("features", "embedding") and classifier.offline == 0


@pytest.mark.parametrize("name", parts("models.classifiers"))
def test_classifier_writes_scores_of_components_and_layers_in_training_alone(name):
    classifier = make("models.classifiers", name, in_channels=D, num_classes=K)
    features = torch.randn(2, D, 9, 7)
    labels = torch.randint(K, (2, 9, 7)).index_fill(1, torch.tensor([0]), 255)
    output, silent = an_output(features=features), an_output(features=features)
    logits = classifier.train()(features, output)
    classifier.eval()(features, silent)
    assert {*tensors(silent)} == {"features"} and silent.layers == ()
    assert {*tensors(output)} <= {"features", "components"}
    assert all(layer.shape == logits.shape for layer in output.layers)
    if output.components is not None:
        m = output.components.shape[2]
        assert output.components.shape == (2, K, m, 9, 7) and m > 1
        chosen = classifier.assign(output.components, labels)
        assert chosen.shape == labels.shape and (chosen[labels == 255] == -1).all()
        assert torch.equal(chosen[labels < K] // m, labels[labels < K])


@pytest.mark.parametrize("name", parts("models.classifiers"))
def test_classifier_follows_a_step_as_the_other_members_do(name):
    classifier = make("models.classifiers", name, in_channels=D, num_classes=K)
    features, labels = labelled(range(K))
    assert classifier.update(iter([(features, labels, None)]), a_step(number=5)) is None
    assert all(value.isfinite().all() for value in classifier.state_dict().values())


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


FITS = itertools.product(parts("models.backbones"), parts("models.decoders"))
TURN = itertools.cycle(parts("models.classifiers"))


# A classifier sees the decoder alone: each decoder meets all of them behind one backbone.
@pytest.mark.parametrize(
    "backbone, decoder, classifiers",
    [
        (b, d, tuple(parts("models.classifiers")) if b == "mobilenet.MobileNet" else (next(TURN),))
        for b, d in FITS
    ],
)
def test_every_backbone_fits_every_decoder_and_classifier(backbone, decoder, classifiers):
    backbone = make("models.backbones", backbone)
    decoder = make(
        "models.decoders", decoder, in_channels=backbone.channels, strides=backbone.strides
    )
    views = {
        "source": View(torch.rand(2, 3, 32, 48)),
        "target": View(torch.rand(1, 3, 33, 49), "target"),
    }
    models, total = [], 0
    for name in classifiers:
        if name == "branch_sum.BranchSum" and decoder.channels != D:
            name = "linear.Linear"  # batchnorm.BatchNorm has the channels of the backbone
        classifier = make("models.classifiers", name, in_channels=decoder.channels, num_classes=K)
        models.append(model := Segmentor(backbone, decoder, classifier))
        outputs = model(views, step=3)
        assert list(outputs) == list(views)
        for view, output in outputs.items():
            assert output.features.shape[:2] == (len(views[view].image), decoder.channels)
            assert output.logits.shape == (len(output.features), K, *output.features.shape[-2:])
            total = total + output.logits.square().sum()
    total.backward()
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


# --- heads ----------------------------------------------------------------------------------------

YAML = {  # every head, as a configuration names it
    part.split(".")[0]: {"name": part, **SMALL[part]} for part in parts("models.heads")
}


def with_heads(**heads):
    torch.manual_seed(0)
    return build_segmentor(load(TINY, [f"model.heads={heads}"]).model, "abcde")


def written(output):
    """Names of the fields that a head or the classifier has filled."""
    return {name for name, value in vars(output).items() if value not in (None, ())} - {
        "logits",
        "features",
    }


def test_heads_of_a_configuration_run_in_their_order_under_their_names():
    network = with_heads(**dict(reversed(YAML.items())))
    assert list(network.heads) == list(HEADS) and {*HEADS} == {*YAML}
    state, plain = network.state_dict(), with_heads().state_dict()
    for name, head in network.heads.items():
        assert network.get_submodule(name) is head
        assert {k for k in state if k.startswith(f"{name}.")} == {
            f"{name}.{key}" for key in head.state_dict()
        }
    own = tuple(f"{name}." for name in HEADS)
    assert {key for key in state if not key.startswith(own)} == {*plain}


@pytest.mark.parametrize("name", YAML)
def test_a_head_runs_in_training_alone_unless_it_is_for_tests_too(name):
    needed = {"text_attention": ["projector"]}.get(name, [])
    network = with_heads(**{key: YAML[key] for key in [*needed, name]})
    head, image, calls = network.heads[name], torch.rand(2, 3, 32, 48), []
    head.register_forward_hook(lambda *_: calls.append(1))
    fields = written(network.eval().segment(image))
    assert len(calls) == head.at_test and bool(fields) == head.at_test
    assert written(network.segment(image, heads=True)) and len(calls) == 1 + head.at_test
    view = View(image, text=torch.eye(5, SMALL["projector.Projector"]["channels"]))
    output = network.train()({"source": view})["source"]
    assert len(calls) == 2 + head.at_test and (written(output) == fields) == head.at_test


def test_a_network_without_heads_writes_logits_and_features_alone():
    network, view = with_heads(region={"name": "none"}), View(torch.rand(2, 3, 32, 48))
    assert network.heads == {} and written(network.train()({"source": view})["source"]) == set()


@pytest.mark.parametrize(
    "heads, message",
    [
        (
            {"region": {"name": "regio.Region"}},
            r"models\.heads has no module 'regio'; did you mean 'region'",
        ),
        (
            {"auxiliary": {"name": "auxiliary.Auxiliary"}},
            "auxiliary.Auxiliary needs the option stage",
        ),
        ({"text_attention": YAML["text_attention"]}, r"set model\.heads\.projector"),
        ({"backbone": YAML["projector"]}, "a head cannot be named backbone"),
        ({"forward": YAML["projector"]}, "a head cannot be named forward"),
        ({"training": YAML["projector"]}, "a head cannot be named training"),
        ({"cache": YAML["projector"]}, "a head cannot be named cache"),
    ],
)
def test_a_head_that_cannot_be_says_why(heads, message):
    with pytest.raises(UserError, match=message):
        with_heads(**heads)


MINE = """
from torch import nn

from models.heads.base import Head


class Mine(Head):
    def __init__(self, *, map_channels, num_classes, factor: float = 1.0):
        super().__init__()
        self.factor, self.layer = factor, nn.Conv2d(map_channels[0], num_classes, 1)

    def forward(self, view, maps, output, step):
        output.auxiliary = self.factor * self.layer(maps[0])
"""


def test_an_own_head_works_from_a_configuration_alone(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    package = importlib.import_module("models.heads")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    head = "{name: mine.Mine, factor: 2.0}"
    losses = (
        "[{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, head: auxiliary}]"
    )
    settings = [f"model.heads.mine={head}", f"losses={losses}", "train.iters=1"]
    assert len(train(tmp_path / "run", *settings)) == 1
    saved = last(tmp_path / "run")
    own = {"mine.layer.weight", "mine.layer.bias"}
    assert {key for key in saved["model"] if key.startswith("mine.")} == own
    network, *_ = restore(tmp_path / "run" / "step_0000001.pt")
    assert network.heads["mine"].factor == 2 and not written(
        network.segment(torch.rand(1, 3, 32, 32))
    )
    # A stage may leave it out, and the next one add it.
    for texts in ((), settings[:1]):
        stage = stages(load(TINY_UDA, texts))[1]
        following = initial_network(stage, saved["classes"], network)
        assert {*network.state_dict()} ^ {*following.state_dict()} == own
        assert torch.equal(following.backbone.conv1.weight, network.backbone.conv1.weight)
        network = following
    with pytest.raises(
        ConfigError, match=r"mine\.Mine has no option 'faktor'; did you mean 'factor'"
    ):
        build_segmentor(load(TINY, ["model.heads.mine={name: mine.Mine, faktor: 2.0}"]).model, "ab")


# --- prototypes ------------------------------------------------------------------------------------------------------

MEMBERS = pytest.mark.parametrize("name", parts("models.prototypes"))


def member(name):
    return make("models.prototypes", name, num_classes=K, in_channels=D, seed=0)


def text():
    return make("models.prototypes", "basis.OrthogonalBasis", num_classes=K, in_channels=D)


def update(member, batches):
    """As a script does it: some members look at others, and some at a data set before all steps."""
    if member.offline and not member.seen.any():
        fit(member, lambda: batches)
    member.update(batches, a_step(prototypes={"text": text()}, number=5, total=10))


def fit(member, batches):
    member.fit(batches, {"text": text()})


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
    means, present = prototypes.pair_means(features, labels)
    assert means.shape == (2, K, D) and present.shape == (2, K) and present.dtype == torch.bool
    assert prototypes.every().shape[1] == D and prototypes.space == "features"
    assert prototypes.offline >= 0


@MEMBERS
def test_prototype_tables_and_quantiles_have_a_row_for_each_class(name):
    prototypes = member(name)
    update(prototypes, [(*labelled([0, 1, 3]), None)])
    fit(prototypes, lambda: [(*labelled([0, 1, 3]), None)])
    quantiles = prototypes.quantiles(0.5)
    assert quantiles is None or quantiles.shape == (K,)
    for values, columns, title, text in prototypes.tables().values():
        assert values.shape == (K, len(columns)) and title and text.format(0.5)
        assert torch.equal(values.isnan().all(1), ~prototypes.seen)


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

LOSSES = pytest.mark.parametrize("name", parts("losses", Loss))


class Watched(dict):
    """A dict that notes if it was looked at."""

    used = False

    def __getitem__(self, key):
        self.used = True
        return super().__getitem__(key)

    def __contains__(self, key):
        self.used = True
        return super().__contains__(key)


def step_of(classes, dtype, needs):
    """A step of random outputs whose labels hold these classes -> (step, leaves)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    outputs, labels, leaves = Watched(), Watched(), []
    for view in ("source", "target", "strong"):
        logits, features = (draw(2, c, 9, 7).requires_grad_() for c in (K, D))
        ids = torch.tensor(classes)[torch.randint(len(classes), (2, 18, 14), generator=generator)]
        ids[:, :4] = 255
        outputs[view] = an_output(
            logits,
            features,
            embedding=F.normalize(features, dim=1),
            text=logits[:, :, :4, :5].flatten(2),
            auxiliary=logits[:, :, ::2, ::2],
            components=logits[:, :, None] * logits.new_tensor([1, -1])[:, None, None],
            regions=Regions(None, logits[:, 0, 0], None, probe=logits[:, 1, 0]),
        )
        labels[view] = ids
        leaves += [logits, features]
    frozen = [draw(*leaf.shape) for leaf in leaves[:2]]
    classifier = make("models.classifiers", "linear.Linear", in_channels=D, num_classes=K)
    peer = make("models.classifiers", "protoseg.ProtoSeg", in_channels=D, num_classes=K)
    classifier.assign = peer.assign  # as of several components a class
    members = {"classifier": classifier.to(dtype)}
    members |= {name: text().to(dtype) for name in ("text", "visual")}
    for name in ("text", "visual"):
        members[name].space = "joint"
    image = torch.zeros(2, 3, 18, 14)
    step = a_step(
        outputs,
        labels,
        Watched(strong=(labels["strong"] != 255).to(dtype)),
        members,
        5,
        10,
        source=a_batch(image, labels["source"], [4, 9]),
        target=a_batch(image, samples=[5, 10]),
        teacher=an_output(*frozen) if "teacher" in needs else None,
        tower=frozen[1] if "tower" in needs else None,
    )
    outputs.used = labels.used = step.weights.used = False
    return step, leaves


def content(step):
    """All that a loss could change, by name."""
    found = {
        f"{view}.{k}": v for view, out in step.outputs.items() for k, v in tensors(out).items()
    }
    for name in ("labels", "weights", "views"):
        found |= {f"{name}.{view}": value for view, value in vars(step)[name].items()}
    for name, member in step.prototypes.items():
        found |= {f"{name}.{key}": value for key, value in member.state_dict().items()}
    return found


def loss_of(name):
    loss = make("losses", name, num_classes=K, in_channels=D, seed=0)
    asks = {"teacher": loss.needs_teacher, "tower": loss.needs_tower}
    return loss, [part for part in asks if asks[part]]


def evaluate(name, classes, dtype=torch.float32):
    """A loss on random outputs whose labels hold these classes -> (value, leaves)."""
    loss, needs = loss_of(name)
    step, leaves = step_of(classes, dtype, needs)
    value = loss(step)
    return value, leaves if step.outputs.used else [*step.prototypes["classifier"].parameters()]


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
    loss, needs = loss_of(name)
    step, leaves = step_of([255], dtype, needs)
    value = loss(step)
    if not step.labels.used and not step.weights.used:
        pytest.skip(f"{name} uses no labels")
    assert value == 0 and value.requires_grad
    found = gradients(value, leaves)
    assert found and all((g == 0).all() for g in found)


@LOSSES
def test_loss_of_a_single_class_is_finite(name):
    value, leaves = evaluate(name, [2])
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, leaves))


@LOSSES
def test_loss_has_no_state_and_changes_nothing_of_the_step(name):
    loss, needs = loss_of(name)
    assert not [*loss.parameters(), *loss.buffers()]
    step, _ = step_of([0, 1, 3], torch.float32, needs)
    before = {key: value.clone() for key, value in content(step).items()}
    loss(step)
    assert before.keys() == content(step).keys()
    assert all(torch.equal(value, before[key]) for key, value in content(step).items())


@pytest.mark.parametrize(
    "name, part", [(name, part) for name in parts("losses", Loss) for part in loss_of(name)[1]]
)
def test_loss_asks_only_for_what_it_reads(name, part):
    loss, needs = loss_of(name)
    step, _ = step_of([0, 1, 3], torch.float32, [one for one in needs if one != part])
    with pytest.raises((AttributeError, TypeError)):
        loss(step)


@pytest.mark.parametrize("name", parts("losses", Labeler))
def test_labeler_keeps_its_state_in_buffers_and_says_what_it_does(name):
    cls = constructor("losses", name)
    labeler = make("losses", name, num_classes=K, in_channels=D, seed=0)
    assert not list(labeler.parameters())
    assert not [key for key, value in vars(labeler).items() if torch.is_tensor(value)]
    own = {method for method, *_ in face_methods(cls, Labeler)}
    assert own & {"before", "after"} or labeler.stored  # the face reads stored labels
    assert labeler.labels_images == ("label" in own)
    assert not labeler.stored or "prepare" in own
    if not labeler.labels_images:
        with pytest.raises(NotImplementedError):
            labeler.label(None, torch.rand(1, 3, 8, 8), {})


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
LEAVES = tuple(
    f"engine.{name}"
    for name in (
        "distributed",
        "errors",
        "files",
        "metrics",
        "pictures",
        "process",
        "ranges",
        "statistics",
        "step",
        "weights",
    )
)
EXTRA = {  # beside its own folder and the leaves
    "models": ("models.blocks", "models.compiled"),
    "models.classifiers": ("models.prototypes",),
    "models.prototypes.text": ("models.backbones.clip",),  # the command that makes its file
    "models.prototypes.masked": (  # a command too
        "datasets.build",
        "engine.build",
        "engine.config",
        "engine.prepare",
    ),
    "models.build": (
        "models.cache",
        "models.foreign",
        "models.lora",
        "models.segmentor",
        "engine.build",
        "engine.checkpoint",
        "engine.config",
    ),
    "losses.build": ("engine.build", "engine.config"),
    "losses.self_training": ("engine.inference",),
    "datasets.build": ("engine.build", "engine.config"),
    "datasets.check": ("engine.build", "engine.config"),
    "datasets.masked": ("engine.build",),  # around another mixer
}
PARTS = ("models", "losses", "datasets")


def imports(path):
    """Full names of our modules that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith(OURS)]


def under(name, prefixes):
    return any(re.match(rf"{re.escape(prefix)}(\.|$)", name) for prefix in prefixes)


def files(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(*PARTS), ids=relative)
def test_parts_import_only_their_own_folder_and_the_leaves_of_the_engine(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package = module.rpartition(".")[0]
    allowed = [package] if package != "models" else []
    allowed += [
        *LEAVES,
        *(n for key, names in EXTRA.items() if under(module, [key]) for n in names),
    ]
    assert not [name for name in imports(path) if not under(name, allowed)]


def test_leaves_of_the_engine_import_only_leaves():
    for leaf in LEAVES:
        path = ROOT / f"{leaf.replace('.', '/')}.py"
        assert not [name for name in imports(path) if not under(name, LEAVES)], leaf


@pytest.mark.parametrize("path", files("engine"), ids=relative)
def test_engine_imports_no_part_not_even_inside_a_function(path):
    assert not [name for name in imports(path) if not under(name, ["engine"])]
    names = {
        node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
    }
    dynamic = {"importlib", "import_module", "__import__", "exec", "eval"} & names
    assert dynamic == ({"importlib"} if path.name == "build.py" else set())


# What may be asked of an object of Python or PyTorch. Of our own parts nothing is guessed: their
# faces have every attribute.
ASKED = {
    ("engine/log.py", "progress"),  # a record of logging
    ("engine/reading.py", "problem"),  # an error of PyYAML
    ("engine/reading.py", "problem_mark"),
    ("datasets/reading.py", "decode_image"),  # torchvision, which will drop it
    ("datasets/reading.py", "is_animated"),  # an image of Pillow
    ("datasets/reading.py", "tag_v2"),
    ("engine/process.py", "sched_getaffinity"),  # os, on Linux
    ("models/blocks.py", "is_exporting"),  # PyTorch, newer than 2.6
    ("models/backbones/timm.py", "pretrained_cfg"),
}
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("path", [*SCRIPTS, *files("engine", *PARTS)], ids=relative)
def test_nothing_is_guessed_from_the_attributes_that_a_part_happens_to_have(path):
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    guessed = [
        (relative(path), ast.literal_eval(call.args[1]))
        for call in calls
        if call.func.id == "hasattr" or (call.func.id == "getattr" and len(call.args) == 3)
    ]
    assert not {*guessed} - ASKED
