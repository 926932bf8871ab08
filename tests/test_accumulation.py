"""What `train.accumulate` changes: of every method, which terms of the loss it changes and which stay as they are.

configs/defaults.yaml says the same in words. Each method runs as 1 x 4 and as 2 micro-batches of 2, in float64. Batch
norm is frozen and dropout is off: both look at a micro-batch by their nature.
"""

import pytest
import torch

from tests.runs import TINY, TINY_DG, TINY_UDA, assert_same_state, last, leaves, train

SMALL = (
    "model.frozen_bn=[backbone, decoder]",
    "model.decoder.dropout=0.0",
    "optimizer={name: SGD, lr: 1e-2, head_lr_factor: 1.0, momentum: 0.9}",
    "schedule.warmup=0",
    "data.augment.crop=[31, 45]",
    "data.train.length=6",
    "data.val={name: none}",
    "eval.pictures=0",
    "train.iters=1",  # the momentum of SGD is then the gradient
)
TOY = ("data.test.toy.length=1",)
UDA = ("data.target.length=6", "uda.compare=false", "stages=[]", *TOY)
DG = ("train.teacher=0.9", "data.test.toy={name: none}", "data.test.fog={name: none}")
DG += ("model.frozen_bn=[backbone, decoder, projector]",)
TEACHER = "uda.labelers=[{name: self_training.TeacherConfidence, threshold: 0.2}]"
CE = "{name: cross_entropy.CrossEntropy}"
TARGET = "{name: cross_entropy.CrossEntropy, view: target}"
MIXED = "{name: cross_entropy.CrossEntropy, view: mixed}"

# Method: (smallest configuration, overrides, terms that accumulating changes). Why: labels, weights or statistics are
# made of a micro-batch. Everything else must be equal, and with no such term so must be the run.
METHODS = {
    "CBP + OCCL": (  # OHEM's number of hard pixels; OCCL's centroids
        TINY,
        "model.classifier.update=penalty",
        f"losses=[{CE}, {{name: occl.OCCL}}, {{name: occl.Orthogonality}},"
        " {name: cross_entropy.CrossEntropy, ohem: 0.05, ohem_min: 100}]",
        {"occl", "cross_entropy_2"},
    ),
    "ProtoSeg": (  # balanced assignment of pixels to prototypes
        TINY,
        "model.classifier={name: protoseg.ProtoSeg, per_class: 2}",
        f"losses=[{CE}, {{name: protoseg.Contrast}}, {{name: protoseg.Distance}}]",
        {"protoseg", "protoseg_2"},
    ),
    "GMMSeg": (  # the same, and the batch norm of the classifier
        TINY,
        "model.classifier={name: gmmseg.GMMSeg, components: 2}",
        f"losses=[{CE}, {{name: gmmseg.Contrast}}]",
        {"cross_entropy", "gmmseg"},
    ),
    "several CBP prototypes": (  # each pixel has its own arg max
        TINY,
        "model.classifier={name: cbp.CBP, per_class: 2, ortho: false}",
        f"losses=[{CE}, {{name: protoseg.Contrast}}]",
        set(),
    ),
    "source-only": (TINY_UDA, f"losses=[{CE}]", set()),
    "class weights": (  # the classes in the micro-batch, of CeCo
        TINY_UDA,
        f"losses=[{CE[:-1]}, class_weights: auto}}, {{name: ceco.CeCo, prior: true}}]",
        {"ceco"},
    ),
    "Dice and Lovász": (  # areas of the classes; order of the pixels
        TINY_UDA,
        f"losses=[{CE}, {{name: dice.Dice}}, {{name: lovasz.LovaszSoftmax}},"
        " {name: lovasz.LovaszSoftmax, per_image: true}, {name: focal.Focal}]",
        {"dice", "lovasz"},
    ),
    "self-training": (  # weight: share of confident pixels
        TINY_UDA,
        TEACHER,
        "uda.mixer={name: mixers.ClassMix}",
        f"losses=[{CE}, {MIXED}]",
        {"cross_entropy_2"},
    ),
    "BCL": (  # number of labelled target pixels; contrast is a mean over pairs
        TINY_UDA,
        "uda.labelers=[{name: bcl.StaticLabels}, {name: bcl.LabelTransfer, confidence: 0.9}]",
        "uda.mixer={name: mixers.SourceTarget}",
        f"losses=[{CE}, {TARGET}, {{name: entropy.Entropy}}, {{name: bcl.Contrast}}]",
        {"cross_entropy_2"},
    ),
    "BiSMAP": (  # the same; consistency and distillation are means over as many pixels
        TINY_UDA,
        "uda.source_weights={name: bismap.Transferability, clusters: 3, size: [32, 64], grid: [2, 2]}",
        "uda.labelers=[{name: bismap.LikelihoodLabels, prototypes: classifier, threshold: {source_quantile: 0.5}}]",
        "uda.mixer={name: mixers.Strong}",
        f"losses=[{CE}, {{name: bismap.SymmetricCrossEntropy}}, {{name: bismap.Consistency, ramp: 0}},"
        " {name: bismap.Distillation}]",
        {"bismap"},
    ),
    "TMT": (  # self-training's weight, nothing of its own
        TINY_UDA,
        "model={backbone: {name: mit.MiT, size: b0, drop_path: 0.0, weights: none},"
        " decoder: {name: segformer_mlp.SegFormerMLP, width: 16, dropout: 0.0}, frozen_bn: [decoder],"
        " heads: {region: {name: region.Region, stage: 3, cell: 2, ramp: 0, dropout: 0.0}}}",
        TEACHER,
        "uda.mixer={name: mixers.ClassMix, target: true}",
        f"losses=[{CE}, {MIXED}, {{name: cross_entropy.CrossEntropy, head: region}}, {{name: tmt.RegionAdversarial}}]",
        {"cross_entropy_2"},
    ),
    "ProDA": (  # all target pixels are labelled, each by itself
        TINY_UDA,
        "prototypes={target: {name: centroids.Centroids, view: target}}",
        "uda.labelers=[{name: proda.Denoise}]",
        "uda.mixer={name: mixers.SourceTarget}",
        f"losses=[{CE}, {{name: bismap.SymmetricCrossEntropy}}, {{name: proda.Regularity}}]",
        set(),
    ),
    "PPAR": (  # weights relative to class means, their sum; order of the pixels
        TINY_DG,
        "model.heads.text_attention={name: text_attention.TextAttention, layers: 1}",
        "dg.reweight.warmup=0.0",
        "losses=[{name: cross_entropy.CrossEntropy, by_weights: true}, {name: ppar.Alignment, ramp: 0.0,"
        " order: both}, {name: ppar.TextFidelity}]",
        {"cross_entropy", "ppar"},
    ),
}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_accumulating_changes_these_terms_and_no_other(tmp_path, method, double):
    config, *options, changed = METHODS[method]
    options = [*SMALL, *{TINY: TOY, TINY_UDA: UDA, TINY_DG: DG}[config], *options]
    if method in ("BCL", "BiSMAP", "ProDA"):  # they label with a network that has learnt something
        source = tmp_path / "source"
        train(source, *SMALL, *UDA, "train.teacher=0", f"losses=[{CE}]", config=config)
        options += [f"stages=[{{init: {source}/step_0000001.pt}}]"]
    one, two = (
        train(tmp_path / str(n), *options, f"train.accumulate={n}", config=config)[1]
        for n in (1, 2)
    )
    terms = [key for key in one if key.startswith("train/loss_")]
    gaps = {key.removeprefix("train/loss_"): abs(one[key] - two[key]) for key in terms}
    assert {term for term, gap in gaps.items() if gap > 1e-6} == changed, gaps
    assert all(gap < 1e-10 for term, gap in gaps.items() if term not in changed), gaps
    if not changed:
        keys = ("model", "teacher", "prototypes", "optimizer")
        return assert_same_state(last(tmp_path / "1"), last(tmp_path / "2"), 1e-10, keys)
    one, two = (leaves(last(tmp_path / name)["model"]) for name in ("1", "2"))
    assert any(not torch.allclose(one[key], two[key], rtol=0, atol=1e-6) for key in one)
