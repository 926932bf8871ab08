"""Prototypes from masked features of a backbone."""

import json

import pytest
import torch

from datasets.toy import Toy
from engine.build import build
from engine.config import load
from engine.errors import UserError
from engine.statistics import resize_labels
from models.classifiers.cbp import CBP
from models.prototypes import masked
from tests.runs import TINY

K, D = 5, 16


def cbp(k=K, d=D, seed=0, **options):
    torch.manual_seed(seed)
    return CBP(num_classes=k, in_channels=d, **options)


def test_masked_rows_are_the_class_means_of_the_backbone_over_the_training_set(tmp_path):
    out, data = tmp_path / "sub" / "masked.pt", {"domain": "real", "length": 30, "size": [64, 96]}
    masked.main([TINY, f"out={out}", f"data.train={json.dumps({'name': 'toy.Toy', **data})}"])
    content = torch.load(out, weights_only=True)
    torch.manual_seed(0)
    backbone, rows = build("models.backbones", load(TINY).model.backbone).eval(), {}
    for sample in (Toy(**data)[i] for i in range(data["length"])):
        with torch.no_grad():
            features = backbone(sample["image"][None] / 255)[-1]
        labels = resize_labels(sample["label"][None].long(), features.shape[-2:])[0]
        for c in labels.unique().tolist():
            rows.setdefault(c, []).append(features[0, :, labels == c])
    assert content["classes"] == list(Toy.CLASSES) and sorted(rows) == list(range(11))
    for c, columns in rows.items():
        torch.testing.assert_close(
            content["vectors"][c], torch.cat(columns, 1).mean(1), rtol=1e-4, atol=1e-5
        )
    w = cbp(11, 32, classes=Toy.CLASSES, init=str(out)).means()
    torch.testing.assert_close(w @ w.T, 4 * torch.eye(11), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="out=PATH is needed"):
        masked.main([TINY])
    with pytest.raises(UserError, match=r"is labelled .*Bicyclist: these classes have no mean"):
        masked.main([TINY, f"out={out}", "data.train={name: toy.Toy, length: 1, size: [64, 96]}"])
