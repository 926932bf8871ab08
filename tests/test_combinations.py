"""Combination is configuration: every labeler with every member of the prototype family, on either classifier."""

import json

import pytest

from tests.runs import TINY_UDA, train

STORED = "{name: mixers.SourceTarget}"
SURE = "[{name: self_training.TeacherConfidence, threshold: 0.2}]"
MIXTURES, TRANSFER = (
    "{name: bismap.LikelihoodLabels, threshold: %s}",
    "{name: bcl.LabelTransfer, confidence: 0.2}",
)
QUANTILE = "{source_quantile: 0.1}"
LABELERS = {  # name: (labelers, mixer, teacher)
    "teacher": (SURE, "{name: mixers.ClassMix, target: true}", "ema"),
    "stored": (
        "[{name: self_training.StoredConfidence, threshold: 0.1, flip: true}]",
        STORED,
        "none",
    ),
    "static": ("[{name: bcl.StaticLabels}]", STORED, "none"),
    "hybrid": (f"[{{name: bcl.StaticLabels}}, {TRANSFER}]", STORED, "none"),
    "mixtures": (f"[{MIXTURES % QUANTILE}]", "{name: mixers.Strong}", "ema"),
    "mixtures and transfer": (
        f"[{MIXTURES % '{nats: -1e6}'}, {TRANSFER}]",
        "{name: mixers.Strong}",
        "ema",
    ),
    "centroids": (f"[{MIXTURES[:-1] % QUANTILE}, prototypes: centroids}}]", STORED, "none"),
    "denoised": ("[{name: proda.Denoise, prototypes: centroids}]", STORED, "frozen"),
}
SOURCE = (
    "{name: source, teacher: none, iters: 1, train: {teacher: 0.0}, losses: [{name: cross_entropy.CrossEntropy}],"
    " uda: {labelers: [], source_weights: {name: none}, mixer: {name: mixers.Source}}}"
)
MEMBERS = ("pair", "centroids", "mixtures", "basis", "classifier")
PROTOTYPES = (
    "prototypes={pair: {name: pair.Pair}, centroids: {name: centroids.Centroids}, basis: {name: basis.OrthogonalBasis},"
    " mixtures: {name: mixtures.Mixtures, components: 2, pool: 50, iterations: 2, view: none}}"
)


@pytest.mark.parametrize("classifier", ["linear.Linear", "cbp.CBP"])
@pytest.mark.parametrize("labels", LABELERS)
def test_every_labeler_trains_with_every_member_on_either_classifier(tmp_path, labels, classifier):
    labelers, mixer, teacher = LABELERS[labels]
    terms = [f"{{name: bcl.Contrast, source: {member}}}" for member in MEMBERS]
    terms += [
        "{name: cross_entropy.CrossEntropy}",
        "{name: bismap.SymmetricCrossEntropy, view: target}",
    ]
    terms += ["{name: entropy.Entropy}", "{name: proda.Regularity}", "{name: occl.OCCL}"]
    terms += ["{name: bismap.Consistency, ramp: 2}"] * ("Strong" in mixer)
    terms += ["{name: bismap.Distillation}"] * (teacher == "frozen")
    steps = train(
        tmp_path / "run",
        PROTOTYPES,
        f"uda.labelers={labelers}",
        f"uda.mixer={mixer}",
        f"losses=[{', '.join(terms)}]",
        f"stages=[{SOURCE}, {{name: adapt, init: previous, teacher: {teacher}, iters: 2}}]",
        f"model.classifier={{name: {classifier}}}",
        "uda.source_weights={name: bismap.Transferability, clusters: 3, size: [32, 64], grid: [2, 2]}",
        "model.decoder.width=12",
        "checkpoint.every=2",
        "eval.pictures=0",
        config=TINY_UDA,
    )
    contrasts = [
        f"train/loss_bcl{suffix}"
        for suffix in ("", *(f"_{i + 2}" for i in range(len(MEMBERS) - 1)))
    ]
    assert len(steps) == 3 and all(steps[n][name] >= 0 for n in (2, 3) for name in contrasts)
    assert 0 < steps[2]["uda/weight_source"] <= 1 and 0 <= steps[2]["uda/labelled_target"] <= 1
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["results"]["toy"]["mIoU"]
        is not None
    )
