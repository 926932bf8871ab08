"""Networks of other programs: a start from each naming, the backbone complete, heads where they are the same.

The files are written here, with names from explicit lists and not from the tables that are tested.
"""

import pytest
import torch
from torchvision.models import segmentation

from engine.config import load
from engine.weights import divided, unwrap
from models import foreign
from models.build import Start, begin, build_segmentor
from tests.models.backbones.test_mit import hugging_face
from tests.models.networks import SMALL, scrambled, swin_mmsegmentation, translate
from tests.runs import TINY

CLASSES = ["road", "sky", "car"]


def network(backbone, decoder, *overrides):
    """A network of the project with a linear classifier of CLASSES."""
    texts = [
        f"model.{key}={value}" for key, value in (("backbone", backbone), ("decoder", decoder))
    ]
    model = load(TINY, [*texts, "model.classifier={name: linear.Linear}", *overrides]).model
    return model, build_segmentor(model, CLASSES, pretrained=False)


def part(state, name):
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def convs(state, table):
    """Pairs of convolution and norm -> mmcv's names: {place here: place there}, the rest goes."""
    found = {}
    for here, there in table.items():
        for number, kind in (("0", "conv"), ("1", "bn")):
            inner = part(state, f"{here}.{number}" if here else number)
            found |= prefixed(inner, f"{there}.{kind}.")
    return found


FCN = "{name: fcn.FCN, width: 8}"
RESNET = "{name: resnet.ResNet, depth: 18, stages: 3, weights: none}"
MIT = "{name: mit.MiT, size: b0, weights: none}"
AUXILIARY = "model.heads.auxiliary={name: auxiliary.Auxiliary, stage: 3, width: 8}"


def mmseg_fcn(state):
    """MMSegmentation's ResNet and FCN head with an auxiliary head; 1.x names the classes so."""
    table = {"convs.0": "convs.0", "convs.1": "convs.1", "join": "conv_cat"}
    decode = convs(part(state, "decoder"), table)
    decode |= prefixed(part(state, "classifier.conv"), "conv_seg.")
    second = convs(part(state, "auxiliary"), {"convs.0": "convs.0"})
    second |= prefixed(part(state, "auxiliary.classifier"), "conv_seg.")
    whole = prefixed(part(state, "backbone"), "backbone.") | prefixed(decode, "decode_head.")
    return whole | prefixed(second, "auxiliary_head.")


def mmseg_upernet(state):
    decoder = part(state, "decoder")
    table = {"join": "bottleneck", "fuse": "fpn_bottleneck"}
    for i in range(3):
        table |= {f"laterals.{i}": f"lateral_convs.{i}", f"smooth.{i}": f"fpn_convs.{i}"}
    decode = convs(decoder, table) | prefixed(part(state, "classifier.conv"), "conv_seg.")
    for i in range(4):
        for number, kind in ((1, "conv"), (2, "bn")):
            decode |= prefixed(part(decoder, f"pools.{i}.{number}"), f"psp_modules.{i}.1.{kind}.")
    backbone = swin_mmsegmentation(part(state, "backbone"))["state_dict"]
    backbone = {k: v for k, v in backbone.items() if k.startswith("backbone.")}
    return backbone | prefixed(decode, "decode_head.")


def daformer(state):
    decoder = part(state, "decoder")
    table = {"branches.0": "fuse_layer.aspp_modules.0", "fuse": "fuse_layer.bottleneck"}
    for i in range(1, 4):
        table[f"branches.{i}"] = f"fuse_layer.aspp_modules.{i}.depthwise_conv"
        table[f"branches.{i}.3"] = f"fuse_layer.aspp_modules.{i}.pointwise_conv"
    decode = convs(decoder, table) | prefixed(part(state, "classifier.conv"), "conv_seg.")
    for i in range(4):
        decode[f"embed_layers.{i}.proj.weight"] = decoder[f"embed.{i}.weight"][..., 0, 0]
        decode[f"embed_layers.{i}.proj.bias"] = decoder[f"embed.{i}.bias"]
    return prefixed(part(state, "backbone"), "backbone."), decode


def daformer_run(state):
    """Student, averaged and ImageNet network in one file."""
    backbone, decode = daformer(state)
    whole = backbone | prefixed(decode, "decode_head.")
    wrong = {key: value + 1 for key, value in whole.items()}
    return (
        prefixed(wrong, "ema_model.") | prefixed(whole, "model.") | prefixed(wrong, "imnet_model.")
    )


def hrda(state):
    """HRDA and MIC: the head of one scale within, and one for the attention."""
    backbone, decode = daformer(state)
    attention = {k: v for k, v in decode.items() if k.startswith("embed_layers")}
    attention |= {"fuse_layer.conv.weight": torch.ones(8, 32, 1, 1), "conv_seg.bias": torch.ones(3)}
    whole = backbone | prefixed(decode, "decode_head.head.")
    return prefixed(whole | prefixed(attention, "decode_head.scale_attention."), "model.")


def linears(state, name):
    """SegFormer's layers: `name` has a place for the number of the map."""
    decoder, found = part(state, "decoder"), {}
    for i in range(4):
        found[f"{name(i)}.weight"] = decoder[f"linears.{i}.weight"][..., 0, 0]
        found[f"{name(i)}.bias"] = decoder[f"linears.{i}.bias"]
    return found


def segformer_release(state):
    """NVIDIA's: with an idle classifier of another size."""
    decode = {"conv_seg.weight": torch.ones(3, 128, 1, 1), "conv_seg.bias": torch.ones(3)}
    decode |= linears(state, lambda i: f"linear_c{i + 1}.proj")
    decode |= convs(part(state, "decoder"), {"fuse": "linear_fuse"})
    decode |= prefixed(part(state, "classifier.conv"), "linear_pred.")
    return prefixed(part(state, "backbone"), "backbone.") | prefixed(decode, "decode_head.")


def segformer_hub(state, linear="linear_c"):
    decode = linears(state, lambda i: f"{linear}.{i}.proj")
    decode["linear_fuse.weight"] = state["decoder.fuse.0.weight"]
    decode |= prefixed(part(state, "decoder.fuse.1"), "batch_norm.")
    decode |= prefixed(part(state, "classifier.conv"), "classifier.")
    body = hugging_face(part(state, "backbone"), "segformer.encoder.")
    return body | prefixed(decode, "decode_head.")


def smp_segformer(state):
    decode = linears(state, lambda i: f"mlp_stage.{3 - i}.linear")
    decode |= prefixed(part(state, "decoder.fuse"), "fuse_stage.")
    whole = prefixed(part(state, "backbone"), "encoder.") | prefixed(decode, "decoder.")
    return whole | prefixed(part(state, "classifier.conv"), "segmentation_head.0.")


def smp_unet(state):
    """As Lightning saves it, with the mean that SMP's example keeps beside the network."""
    whole = prefixed(part(state, "backbone"), "encoder.")
    whole |= {
        "decoder.blocks.0.conv1.0.weight": torch.ones(8),
        "segmentation_head.0.bias": torch.ones(3),
    }
    return {"mean": torch.ones(1, 3, 1, 1)} | prefixed(whole, "model.")


def dinov2_linear(state):
    decode = prefixed(part(state, "decoder.norm"), "bn.")
    decode |= prefixed(part(state, "classifier.conv"), "conv_seg.")
    return prefixed(part(state, "backbone"), "backbone.") | prefixed(decode, "decode_head.")


def dinov2_hub(state):
    """A backbone alone."""
    table = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.": "encoder.layer.",
    }
    table |= {"pos_embed": "embeddings.position_embeddings", "cls_token": "embeddings.cls_token"}
    table |= {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    table |= {"attn.proj": "attention.output.dense"}
    found = {"embeddings.mask_token": torch.ones(1, 192)}
    for key, value in translate(part(state, "backbone"), table).items():
        key = key.replace("norm.", "layernorm.") if key.startswith("norm.") else key
        if ".attn.qkv." in key:
            for name, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[key.replace("attn.qkv", f"attention.attention.{name}")] = rows.clone()
        else:
            found[key] = value
    return found


NAMED = {"meta": {"CLASSES": tuple(CLASSES)}}
NEW = {"meta": {"dataset_meta": {"classes": tuple(CLASSES), "palette": []}}}
DAFORMER = "{name: daformer.DAFormer, width: 8}"
SEGFORMER = "{name: segformer_mlp.SegFormerMLP, width: 8}"
SWIN = f"{{name: swin.Swin, weights: none, width: {SMALL['width']}, depths: {SMALL['depths']}}}"
VIT = "{name: vit.ViT, size: t, patch: 14, positions: 28, layer_scale: true, weights: none}"
CASES = {  # network, writer, what is around the state dict, parts that stay as they were, left out
    "mmsegmentation 0": ((RESNET, FCN, AUXILIARY), mmseg_fcn, NAMED, [], []),
    "mmsegmentation 1": ((SWIN, "{name: upernet.UPerNet, width: 8}"), mmseg_upernet, NEW, [], []),
    "another decoder": (
        (RESNET, "{name: deeplabv3plus.DeepLabV3Plus, width: 8}"),
        mmseg_fcn,
        NAMED,
        ["decoder"],
        ["decoder.convs (10)", "auxiliary.classifier (2)"],
    ),
    "no names": (
        (RESNET, FCN, AUXILIARY),
        mmseg_fcn,
        {},
        ["classifier", "auxiliary.classifier"],
        ["auxiliary.classifier (2), classifier.conv (2)"],
    ),
    "daformer": (
        (MIT, DAFORMER),
        daformer_run,
        NAMED,
        [],
        ["ema_model.backbone", "imnet_model.decode_head"],
    ),
    "hrda, mic": ((MIT, DAFORMER), hrda, NAMED, [], ["decode_head.scale_attention (10)"]),
    "segformer": ((MIT, SEGFORMER), segformer_release, NAMED, [], ["left out 0 keys"]),
    "hugging face": (
        (MIT, SEGFORMER),
        segformer_hub,
        None,
        ["classifier"],
        ["classifier.conv (2)"],
    ),
    "transformers 5": (
        (MIT, SEGFORMER),
        lambda s: segformer_hub(s, "linear_projections"),
        None,
        ["classifier"],
        ["classifier.conv (2)"],
    ),
    "smp segformer": (
        (MIT, SEGFORMER),
        smp_segformer,
        None,
        ["classifier"],
        ["classifier.conv (2)"],
    ),
    "smp, lightning": (
        (RESNET, FCN),
        smp_unet,
        {},
        ["decoder", "classifier"],
        ["decoder.blocks (1), mean (1)"],
    ),
    "dinov2 linear": (
        (VIT, "{name: batchnorm.BatchNorm}"),
        dinov2_linear,
        NAMED,
        [],
        ["left out 0 keys"],
    ),
    "dinov2 hub": (
        (VIT, "{name: batchnorm.BatchNorm}"),
        dinov2_hub,
        None,
        ["decoder", "classifier"],
        [],
    ),
}


def start(model, content, folder):
    """A network with other weights than the file's, which starts from it."""
    torch.save(content, folder / "a.pth")
    torch.manual_seed(1)
    model = type(model)(model | {"init": str(folder / "a.pth")})
    return build_segmentor(model, CLASSES)


def check(model, given, state, around, kept, folder):
    """All but `kept` is the file's."""
    content = state if around is None else {"state_dict": state, **around}
    found = start(model, content, folder).state_dict()
    same = {key for key, value in given.items() if torch.equal(found[key], value)}
    other = {key for key in given if key.startswith(tuple(f"{name}." for name in kept))}
    counters = {key for key in given if key.endswith("num_batches_tracked")}
    assert given.keys() - other - counters <= same
    assert not (other & same) - counters


@pytest.mark.parametrize("case", CASES)
def test_a_network_starts_from_the_names_of(case, tmp_path, caplog):
    parts, write, around, kept, left = CASES[case]
    model, net = network(*parts)
    given = scrambled(net).state_dict()
    kept_here = [name for name in kept if any(k.startswith(name) for k in given)]
    with caplog.at_level("INFO", "engine"):
        source = given
        if case == "another decoder":  # the file's network has another one
            other = scrambled(network(RESNET, FCN, AUXILIARY)[1]).state_dict()
            source = other | prefixed(part(given, "backbone"), "backbone.")
            source |= prefixed(part(given, "classifier"), "classifier.")
        check(model, given, write(source), around, kept_here, tmp_path)
    assert all(text in caplog.text for text in left), caplog.text
    unnamed = "The file does not name its classes: its classifier is left out."
    assert (unnamed in caplog.text) == ("classifier" in kept and case not in ("dinov2 hub",))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "net.", "model.module."]
)
def test_what_wrappers_add_to_the_names_goes(prefix):
    tensor = torch.ones(1)
    names = ["backbone.conv1.weight", "backbone.layer1.0.model.bias", "decode_head.net.weight"]
    state = {f"{prefix}{name}": tensor for name in names}
    state |= {"backbone._orig_mod.bn1.weight": tensor}
    inner, beside = divided(unwrap({"state_dict": state, "epoch": 3}))
    assert [*inner] == ["conv1.weight", "layer1.0.model.bias", "bn1.weight"]
    assert [*beside] == ["decode_head.net.weight"]


TORCHVISION = [  # its network, ours, which has an auxiliary head where torchvision's is the same
    ("fcn_resnet50", "{name: resnet.ResNet, depth: 50, stages: 4, weights: none}"),
    ("deeplabv3_resnet50", "{name: resnet.ResNet, depth: 50, stages: 4, weights: none}"),
    (
        "deeplabv3_mobilenet_v3_large",
        "{name: mobilenet.MobileNet, version: v3_large, weights: none}",
    ),
]


@pytest.mark.parametrize("name, backbone", TORCHVISION)
def test_the_names_are_those_of_torchvisions_networks(name, backbone, caplog):
    head = "model.heads.auxiliary={name: auxiliary.Auxiliary, stage: 3}"
    with torch.device("meta"), caplog.at_level("INFO", "engine"):
        theirs = segmentation.__dict__[name](weights=None, weights_backbone=None, aux_loss=True)
        inner, beside = divided(theirs.state_dict())
        start = Start(name, foreign.heads(beside), None, inner)
        net = network(backbone, FCN, *[head] * ("resnet" in name))[1]
        begin(net, start, CLASSES)
    loaded, left = caplog.text.split("missing")[0], caplog.text.split("left out")[1]
    count = len([key for key in net.backbone.state_dict() if "num_batches" not in key])
    assert f"backbone ({count})" in loaded and "classifier.4 (2)" in left
    assert ("auxiliary.convs (5)" in loaded) == ("resnet" in name)
    assert "auxiliary.classifier (2)" in left


def test_class_names_of_a_file_are_those_of_its_data_set():
    assert foreign.class_names(NAMED) == foreign.class_names(NEW) == CLASSES
    for other in ([], {}, {"meta": 3}, {"meta": {"classes": 3}}, {"meta": {"dataset_meta": None}}):
        assert foreign.class_names(other) is None
