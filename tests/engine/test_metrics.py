"""Metrics against numbers worked out by hand and a naive loop."""

import json
import math

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.metrics import ConfusionMatrix

CLASSES = ["road", "tree", "sky"]


def filled(counts, **options):
    matrix = ConfusionMatrix(CLASSES, **options)
    matrix.matrix += torch.tensor(counts)
    return matrix


def test_three_classes_by_hand():
    labels = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 255]])
    predictions = torch.tensor([[0, 0, 1, 2], [1, 0, 2, 1]])
    matrix = ConfusionMatrix(CLASSES, {"ground": ["road", "tree"]})
    matrix.update(predictions, labels)
    assert matrix.matrix.tolist() == [[2, 1, 1], [1, 1, 0], [0, 0, 1]]
    values = matrix.per_class()
    assert values["IoU"].tolist() == pytest.approx([2 / 5, 1 / 3, 1 / 2])
    assert values["Acc"].tolist() == pytest.approx([1 / 2, 1 / 2, 1])
    assert values["F1"].tolist() == pytest.approx([4 / 7, 1 / 2, 2 / 3])
    summary = matrix.summary()
    assert summary == pytest.approx(
        {
            "mIoU": 100 * (2 / 5 + 1 / 3 + 1 / 2) / 3,
            "mAcc": 200 / 3,
            "aAcc": 400 / 7,
            "mF1": 100 * (4 / 7 + 1 / 2 + 2 / 3) / 3,
            "ground": 100 * (2 / 5 + 1 / 3) / 2,
        }
    )


@pytest.mark.parametrize("ignored", [255, 3, -1])
@pytest.mark.parametrize("prediction", [0, 2])
def test_ignored_pixels_do_not_count(ignored, prediction):
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(torch.tensor([1, prediction]), torch.tensor([1, ignored]))
    assert matrix.matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("classes", [3, 200])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_the_counts_are_those_of_a_loop_over_pixels(dtype, classes):
    labels = torch.randint(0, classes + 2, (40, 50)).to(dtype)
    labels[0] = 255
    predictions, expected = torch.randint(0, classes, (40, 50)), np.zeros((classes, classes))
    matrix = ConfusionMatrix([str(i) for i in range(classes)])
    matrix.update(predictions, labels)
    for label, prediction in zip(labels.flatten().tolist(), predictions.flatten().tolist()):
        if label < classes:
            expected[label, prediction] += 1
    assert matrix.matrix.tolist() == expected.tolist()
    assert matrix.ignored == (labels >= classes).sum()


def test_a_class_that_does_not_occur_is_left_out_and_the_table_says_so():
    matrix = filled([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    values = matrix.per_class()
    assert all(math.isnan(values[name][2]) for name in ("IoU", "Acc", "F1"))
    assert matrix.summary()["mIoU"] == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    lines = matrix.table().splitlines()
    assert lines[3].split()[:4] == ["sky", "-", "-", "-"]
    assert (
        lines[1].split()[:2] == ["road", "75.00"]
        and "mIoU 77.50" in lines[-1]
        and "2 of 3 classes" in lines[-1]
    )


def test_a_class_that_is_only_predicted_counts_as_zero():
    matrix = filled([[3, 0, 1], [0, 4, 0], [0, 0, 0]])
    values = matrix.per_class()
    assert values["IoU"][2] == 0 and values["F1"][2] == 0 and math.isnan(values["Acc"][2])
    assert matrix.summary()["mIoU"] == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert "3 of 3 classes" in matrix.table()


def test_a_subset_with_an_unknown_class_is_an_error():
    with pytest.raises(
        UserError,
        match=r"eval\.subsets\.mIoU2 names the class 'grass'; the data set has road, tree, sky",
    ):
        ConfusionMatrix(CLASSES, {"mIoU2": ["road", "grass"]})


def test_classes_that_are_not_scored_have_no_values_but_predicting_them_is_an_error():
    counts = [
        [3, 1, 2],
        [0, 4, 0],
        [0, 0, 0],
    ]  # two pixels of road are taken for sky, which never occurs
    plain, scored = (
        filled(counts),
        filled(counts, scored=["road", "tree"], subsets={"top": ["tree", "sky"]}),
    )
    assert scored.matrix.tolist() == counts
    values, summary = scored.per_class(), scored.summary()
    assert all(math.isnan(values[name][2]) for name in ("IoU", "Acc", "F1"))
    assert values["IoU"][:2].tolist() == pytest.approx([3 / 6, 4 / 5])
    assert values["Acc"][:2].tolist() == pytest.approx([3 / 6, 1])
    assert summary["mIoU"] == pytest.approx(100 * (3 / 6 + 4 / 5) / 2) and summary[
        "top"
    ] == pytest.approx(80)
    assert plain.summary()["mIoU"] == pytest.approx(100 * (3 / 6 + 4 / 5 + 0) / 3)
    assert summary["aAcc"] == plain.summary()["aAcc"] == pytest.approx(70)
    lines = scored.table().splitlines()
    assert (
        lines[3].split()[:4] == ["sky", "-", "-", "-"] and "mean over 2 of 3 classes" in lines[-1]
    )
    assert json.loads(json.dumps(scored.as_dict(), allow_nan=False))["IoU"][2] is None


def test_a_class_that_is_not_scored_has_no_values_even_where_it_occurs():
    assert filled([[1, 0, 0], [0, 1, 0], [0, 0, 1]], scored=["sky"]).per_class()[
        "IoU"
    ].isnan().tolist() == [1, 1, 0]


def test_an_unknown_class_to_score_is_an_error():
    with pytest.raises(
        UserError, match=r"SCORED names the class 'grass'; the data set has road, tree, sky"
    ):
        ConfusionMatrix(CLASSES, scored=["grass"])


def test_updates_add_up():
    predictions, labels = torch.randint(0, 3, (2, 4, 5)), torch.randint(0, 3, (2, 4, 5))
    once, twice = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
    once.update(predictions, labels)
    for pair in zip(predictions, labels):
        twice.update(*pair)
    assert torch.equal(once.matrix, twice.matrix) and once.matrix.sum() == 40
    assert once.matrix.dtype == torch.int64 and torch.equal(once.all_reduce().matrix, twice.matrix)


@pytest.mark.parametrize("k", [1, 5, 19])
def test_random_labels_against_a_loop_over_pixels(k):
    random = np.random.default_rng(k)
    labels = random.choice([*range(k), 255], (17, 13))
    predictions = random.integers(0, k, (17, 13))
    matrix = ConfusionMatrix([str(i) for i in range(k)])
    matrix.update(torch.from_numpy(predictions), torch.from_numpy(labels).to(torch.uint8))
    expected = np.zeros((k, k), int)
    for truth, prediction in zip(labels.flat, predictions.flat):
        if truth != 255:
            expected[truth, prediction] += 1
    assert matrix.matrix.tolist() == expected.tolist()
    valid = labels != 255
    for i, value in enumerate(matrix.per_class()["IoU"].tolist()):
        truth, prediction = (labels == i) & valid, (predictions == i) & valid
        assert value == pytest.approx((truth & prediction).sum() / (truth | prediction).sum())
    assert matrix.summary()["aAcc"] == pytest.approx(100 * (labels == predictions)[valid].mean())


@pytest.mark.parametrize("counts", [[[3, 1, 0], [0, 4, 0], [0, 0, 0]], [[0] * 3] * 3])
def test_as_dict_is_strict_json_with_null_for_what_does_not_occur(counts):
    matrix = filled(counts, subsets={"top": ["sky"]})
    again = json.loads(json.dumps(matrix.as_dict(), allow_nan=False))
    assert again["classes"] == CLASSES and again["matrix"] == counts
    assert again["IoU"][2] is None and again["summary"]["top"] is None
    assert again["summary"]["aAcc"] == (pytest.approx(100 * 7 / 8) if counts[0][0] else None)


def test_a_subset_has_no_name_of_a_mean():
    with pytest.raises(UserError, match=r"eval\.subsets: aAcc is the mean over all classes"):
        ConfusionMatrix(CLASSES, {"aAcc": ["sky"]})
