"""Toy scenes: labels alone, maps, label spaces, sizes."""

import numpy as np
import pytest
import torch

from datasets.statistics import class_counts
from datasets.toy import DOMAINS, Toy, draw, draw_label
from datasets.transforms import Augment
from engine.build import build
from engine.errors import UserError
from tests.datasets.files import with_maps

SIZE = (8, 12)  # height, width


def test_toy_scenes_can_be_read_in_another_label_space(tmp_path):
    space = {"far": ["Sky", "Building"], "rail": [], "ground": ["Pavement", "Road"]}
    own, data = (Toy(domain="fog", length=2, size=[24, 32], label_space=s) for s in (None, space))
    table = np.full(256, 255)
    table[[0, 1, 3, 4]] = 0, 0, 2, 2
    for index in range(2):
        label = data.load(index)[1]
        assert np.array_equal(label, table[own.load(index)[1]]) and np.array_equal(
            label, data.load_label(index)
        )
    assert (data.CLASSES, data.SCORED) == (("far", "rail", "ground"), ("far", "ground"))
    assert (own.PALETTE[0], (160, 160, 160), own.PALETTE[4]) == data.PALETTE
    counts = [class_counts(dataset, tmp_path).sum(0) for dataset in (own, data)]
    assert counts[1].tolist() == [counts[0][:2].sum(), 0, counts[0][3:5].sum()]
    assert (Toy(length=1, labels=False, label_space=space)[0]["label"] == 255).all()


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"size": [0, 8]}, {"size": [8]}, {"size": "ab"}]
)
def test_toy_sets_need_images_and_pixels(options):
    with pytest.raises(UserError, match=r"^toy.Toy: option '(length|size)[.\d]*' must be a"):
        build("datasets", {"name": "toy.Toy", **options})


# --- toy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_toy_labels_are_drawn_alone_as_with_the_picture(domain):
    for index in range(3):
        assert np.array_equal(draw(4, index, domain, (30, 46))[1], draw_label(4, index, (30, 46)))
    data = Toy(domain=domain, length=3, size=[30, 46])
    assert np.array_equal(data.load_label(2), data.load(2)[1])
    assert Toy(domain=domain, length=3, labels=False).load_label(2) is None


def test_toy_takes_maps_too(tmp_path):
    data = Toy(length=2, size=list(SIZE), augment=Augment(crop=[6, 6]))
    with_maps(data, tmp_path, [data.load(i)[1] for i in range(2)])
    sample = data[(1, 4)]
    assert torch.equal(sample["extra"]["map"], sample["label"])
    assert data.without_augmentation()[1]["extra"] == {}
