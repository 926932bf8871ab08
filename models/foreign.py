"""Heads of whole networks from other programs, under the names of this project.

    heads({"decode_head.conv_seg.weight": tensor})      {"classifier.conv.weight": tensor}

A table renames what has the same layers here; the rest keeps its name, which no network here has.
Names were compared with the networks of torchvision 0.29, segmentation_models_pytorch 0.6 and
transformers 5.24; with the sources of DAFormer, HRDA, SegFormer and MMSegmentation; those of MIC
(HRDA's) and of DINOv2's linear head are from general knowledge. No published file was at hand.
"""

import re

from engine.weights import rename

# Regular expressions, one after the other.
TABLE = {
    # MMSegmentation, and DAFormer, HRDA, MIC and SegFormer, which are built on it
    r"^decode_head\.head\.": "decode_head.",  # HRDA: the head of one scale
    r"^decode_head\.bn\.": "decoder.norm.",  # DINOv2's linear head
    r"^((?:decode|auxiliary)_head\..+)\.conv\.": r"\1.0.",
    r"^((?:decode|auxiliary)_head\..+)\.bn\.": r"\1.1.",
    r"^auxiliary_head\.conv_seg\.": "auxiliary.classifier.",
    r"^auxiliary_head\.": "auxiliary.",
    # SegFormer's release has an idle conv_seg too, which comes before linear_pred.
    r"^decode_head\.(conv_seg|linear_pred|classifier)\.": "classifier.conv.",
    r"^decode_head\.(?:linear_c|linear_projections)\.(\d)\.proj\.": r"decoder.linears.\1.",
    r"^decode_head\.linear_c(\d)\.proj\.": lambda m: f"decoder.linears.{int(m[1]) - 1}.",
    r"^decode_head\.linear_fuse\.weight$": "decoder.fuse.0.weight",  # Hugging Face
    r"^decode_head\.batch_norm\.": "decoder.fuse.1.",
    r"^decode_head\.linear_fuse\.": "decoder.fuse.",
    r"^decode_head\.embed_layers\.(\d)\.proj\.": r"decoder.embed.\1.",
    r"^decode_head\.fuse_layer\.bottleneck\.": "decoder.fuse.",
    r"^decode_head\.fuse_layer\.aspp_modules\.(\d)\.": r"decoder.branches.\1.",
    r"^(decoder\.branches\.\d)\.depthwise_conv\.": r"\1.",
    r"^(decoder\.branches\.\d)\.pointwise_conv\.": r"\1.3.",
    r"^decode_head\.psp_modules\.(\d)\.1\.(\d)\.": lambda m: (
        f"decoder.pools.{m[1]}.{int(m[2]) + 1}."
    ),
    r"^decode_head\.bottleneck\.": "decoder.join.",
    r"^decode_head\.lateral_convs\.": "decoder.laterals.",
    r"^decode_head\.fpn_convs\.": "decoder.smooth.",
    r"^decode_head\.fpn_bottleneck\.": "decoder.fuse.",
    r"^decode_head\.conv_cat\.": "decoder.join.",
    r"^decode_head\.convs\.": "decoder.convs.",
    # torchvision
    r"^aux_classifier\.([01])\.": r"auxiliary.convs.0.\1.",
    r"^aux_classifier\.4\.": "auxiliary.classifier.",
    # SMP, whose layers go from coarse to fine
    r"^decoder\.mlp_stage\.(\d)\.linear\.": lambda m: f"decoder.linears.{3 - int(m[1])}.",
    r"^decoder\.fuse_stage\.": "decoder.fuse.",
    r"^segmentation_head\.0\.": "classifier.conv.",
}
LINEAR = re.compile(r"decoder\.(linears|embed)\.\d\.weight")  # 1x1 convolutions here


def heads(state):
    """{key: tensor} beside the backbone -> with the names and shapes of this project."""
    return {
        key: value[..., None, None] if LINEAR.fullmatch(key) and value.ndim == 2 else value
        for key, value in rename(state, TABLE).items()
    }


def class_names(content):
    """Names of the classes in a file of MMSegmentation, of its version 0 or 1; None elsewhere."""
    meta = content.get("meta") if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    found = {**meta, **(meta.get("dataset_meta") or {})}
    names = found.get("classes", found.get("CLASSES"))
    return list(names) if isinstance(names, (list, tuple)) else None
