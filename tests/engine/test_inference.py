"""Inference against the plain forward pass: windows, mirrors, scales, what is evaluated."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import nn

from engine import distributed
from engine.config import Config, load
from engine.errors import UserError
from engine.inference import NonFiniteScores, bands, evaluate, label, predict
from engine.metrics import ConfusionMatrix
from tests.runs import TINY

CLASSES = ["road", "tree", "sky"]
CPU = torch.device("cpu")


class Output(NamedTuple):
    logits: torch.Tensor


class Pointwise(nn.Module):
    """Logits that depend on the pixel alone, at the image's size or at a fraction of it."""

    def __init__(self, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(3, len(CLASSES), 1)
        self.stride, self.windows, self.training_seen = stride, [], set()

    def segment(self, image):
        self.windows.append(tuple(image.shape[-2:]))
        self.training_seen.add(self.training)
        return Output(self.conv(nn.functional.avg_pool2d(image, self.stride, ceil_mode=True)))


class Position(nn.Module):
    """The column inside the window as the only logit: shows which windows a pixel was seen in."""

    def segment(self, image):
        return Output(
            torch.arange(image.shape[-1], dtype=image.dtype).expand(1, 1, *image.shape[-2:])
        )


def options(**changes):
    default = {
        "mode": "whole",
        "crop": [8, 8],
        "stride": [5, 5],
        "short_side": 0,
        "scales": [1.0],
        "flip": False,
        "subsets": {},
    }
    return Config(default | changes)


def random_image(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(8, 8), (9, 23), (17, 8), (5, 30), (31, 6), (1, 1), (18, 18)])
@pytest.mark.parametrize("stride", [[5, 5], [8, 8], [1, 3], [7, 2]])
def test_sliding_windows_equal_the_whole_image_for_a_pointwise_network(size, stride):
    network, image = Pointwise(), random_image(*size)
    whole = predict(network, image, options())
    slide = predict(network, image, options(mode="slide", stride=stride))
    assert whole.shape == slide.shape == (1, 3, *size)
    torch.testing.assert_close(slide, whole)  # a pixel that no window covers would be nan


def test_windows_have_the_crop_size_and_the_last_one_ends_at_the_border():
    network = Pointwise()
    predict(network, random_image(8, 19), options(mode="slide", crop=[8, 8], stride=[8, 8]))
    assert network.windows[0] == (8, 8) and len(network.windows) == 3
    columns = predict(Position(), random_image(8, 12), options(mode="slide", stride=[4, 4]))[
        0, 0, 0
    ]
    assert columns.tolist() == [
        0,
        1,
        2,
        3,
        2,
        3,
        4,
        5,
        4,
        5,
        6,
        7,
    ]  # windows at 0 and 4, averaged where both see


def test_window_logits_are_resized_to_the_window():
    network = Pointwise(stride=2)
    slide = predict(
        network, random_image(12, 20), options(mode="slide", crop=[8, 8], stride=[4, 6])
    )
    assert slide.shape == (1, 3, 12, 20) and slide.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (9, 23), (31, 6), (1, 1), (40, 17)])
def test_labels_by_bands_are_those_of_the_whole_and_hold_one_row_of_windows(size):
    network, image = Pointwise(stride=2), random_image(*size)
    slide = options(mode="slide", stride=[3, 5])
    parts = [*bands(network, image, slide)]
    assert sum(part.shape[2] for part in parts) == size[0]
    assert max(part.shape[2] for part in parts) <= 8
    for view in (slide, options(), options(mode="slide", flip=True)):
        ids = label(network, image, view, "a.png")
        assert ids.dtype == torch.uint8
        assert torch.equal(ids.long(), predict(network, image, view).argmax(1)[0])
    network.conv.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteScores, match=r"a\.png: the network's scores are not finite"):
        label(network, image, slide, "a.png")


@pytest.mark.parametrize("stride", [[9, 8], [8, 9], [0, 4]])
def test_a_stride_that_leaves_gaps_is_an_error(stride):
    with pytest.raises(UserError, match=r"eval\.stride"):
        load(TINY, ["eval.mode=slide", "eval.crop=[8, 8]", f"eval.stride={stride}"])


@pytest.mark.parametrize("stride", [1, 2])
def test_averaging_with_the_mirrored_image_changes_nothing_for_a_mirror_equivariant_network(stride):
    network, image = Pointwise(stride), random_image(10, 14)
    plain = predict(network, image, options())
    mirrored = predict(network, image, options(flip=True))
    torch.testing.assert_close(mirrored, plain.softmax(1))
    assert torch.equal(mirrored.argmax(1), plain.argmax(1))


def test_the_mirrored_view_is_really_mirrored():
    both = predict(BorderAware(), random_image(4, 6), options(flip=True))
    torch.testing.assert_close(both, both.flip(-1))


class BorderAware(nn.Module):
    """Prefers class 0 on the left whatever the image shows."""

    def segment(self, image):
        ramp = torch.linspace(1, -1, image.shape[-1]).expand(1, 1, *image.shape[-2:])
        return Output(torch.cat([ramp, -ramp, 0 * ramp], 1))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_several_scales_give_mean_probabilities_at_the_image_size(mode):
    network = Pointwise()
    scores = predict(
        network, random_image(11, 15), options(scales=[0.5, 1.0, 1.75], flip=True, mode=mode)
    )
    assert scores.shape == (1, 3, 11, 15) and (scores >= 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 11, 15))
    if mode == "whole":
        assert network.windows == [(6, 8)] * 2 + [(11, 15)] * 2 + [(19, 26)] * 2


def test_scales_are_averaged():
    network, image = Pointwise(), random_image(8, 8)
    one, two = (predict(network, image, options(scales=[s])).softmax(1) for s in (1.0, 2.0))
    torch.testing.assert_close(predict(network, image, options(scales=[1.0, 2.0])), (one + two) / 2)


@pytest.mark.parametrize(
    "size, seen",
    [((20, 30), (10, 15)), ((30, 20), (15, 10)), ((5, 8), (10, 16)), ((10, 17), (10, 17))],
)
def test_the_short_side_is_resized_before_and_the_scores_after(size, seen):
    network = Pointwise()
    assert predict(network, random_image(*size), options(short_side=10)).shape[-2:] == size
    assert network.windows == [seen]
    assert predict(network, random_image(*size), options(), size=(7, 9)).shape == (1, 3, 7, 9)


class Labelled:
    """Images whose labels may have another size than the image."""

    CLASSES, SCORED, expected, split = CLASSES, (), CLASSES, "val"

    def __init__(self, length=5, scale=1):
        self.asked, self.length, self.scale = [], length, scale

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        image = (255 * random_image(6, 7, index)[0]).to(torch.uint8)
        label = torch.full((6 * self.scale, 7 * self.scale), index % 3, dtype=torch.uint8)
        label[0, 0] = 255
        return {"image": image, "label": label}


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_every_image_once_at_label_size_in_eval_mode(scale, training):
    network, dataset = Pointwise().train(training), Labelled(scale=scale)
    matrix = evaluate(network, dataset, options(), CPU, contextlib.nullcontext())
    assert sorted(dataset.asked) == list(range(5))
    pixels = 42 * scale**2 - 1
    assert matrix.matrix.sum(1).tolist() == [2 * pixels, 2 * pixels, pixels]
    assert matrix.pixels().tolist() == [2 * pixels, 2 * pixels, pixels, 5]
    assert network.training_seen == {False} and network.training is training
    assert network.conv.weight.grad is None


def test_evaluate_scores_what_predict_says():
    network, dataset = Pointwise(), Labelled()
    matrix = evaluate(
        network,
        dataset,
        options(subsets={"ground": ["road"]}),
        CPU,
        torch.autocast("cpu", enabled=False),
    )
    expected = ConfusionMatrix(CLASSES)
    for i in range(len(dataset)):
        sample = dataset[i]
        scores = predict(network, sample["image"][None].float() / 255, options())
        expected.update(scores.argmax(1)[0].detach(), sample["label"].long())
    assert torch.equal(matrix.matrix, expected.matrix) and "ground" in matrix.summary()


class Masks(Labelled):
    """Everything ignored but one pixel of the first class."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["label"].fill_(255)[-1, -1] = 0
        return sample


def test_evaluate_says_once_what_is_suspicious_about_labels(caplog, monkeypatch):
    def said(dataset, title=""):
        caplog.clear()
        matrix = evaluate(Pointwise(), dataset, options(), CPU, contextlib.nullcontext(), title)
        assert matrix.pixels().tolist() == [5, 0, 0, 5 * 41]
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    data = Masks()
    assert [level for level, _ in said(data, "night")] == ["WARNING"] * 2
    assert said(data, "night") == [] and len(said(Masks())) == 2
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert said(Masks()) == []
    monkeypatch.undo()
    scored = Masks()
    scored.expected = CLASSES[:1]
    assert [text for _, text in said(scored, "night")] == [
        "Masks val (night): 97.6% of the pixels are ignored (id 255); masks of 0 and 255 need "
        "folder.Folder with id_map: {0: road, 255: tree}"
    ]


def test_evaluate_scores_the_classes_that_the_data_set_names():
    class Two(Labelled):
        SCORED = ("road", "sky")

    matrix = evaluate(Pointwise(), Two(), options(), CPU, contextlib.nullcontext())
    assert (
        matrix.per_class()["IoU"].isnan().tolist() == [False, True, False]
        and "2 of 3 classes" in matrix.table()
    )
