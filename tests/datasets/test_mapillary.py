"""Mapillary Vistas on tiny files in its official format, also reduced."""

import numpy as np
import pytest
from PIL import Image

from datasets.base import DataError
from datasets.mapillary import Mapillary
from datasets.statistics import class_counts
from engine.build import build
from engine.config import ConfigError
from tests.datasets.published import CONVERTED, grey, row, save, vista

# The train ids of the ids 0 to 65, ten to a line; a dot is ignore.
VISTAS = {
    "strict": """
        .  .  1  4  .  .  3  .  .  .
        .  .  .  0  .  1  .  2  .  11
        12 12 12 .  0  .  .  10 .  9
        8  .  .  .  .  .  .  .  .  .
        .  0  .  .  .  5  .  5  6  .
        7  .  18 .  15 13 .  17 16 .
        .  14 .  .  .  .
    """,
    "wide": """
        .  .  1  4  .  .  3  0  0  1
        0  1  .  0  0  1  .  2  .  11
        12 12 12 0  0  .  .  10 .  9
        8  .  .  .  .  .  .  .  .  .
        .  .  .  .  5  5  7  5  6  7
        7  .  18 .  15 13 .  17 16 .
        .  14 .  .  .  .
    """,
}
VISTAS = {
    name: [255 if cell == "." else int(cell) for cell in text.split()]
    for name, text in VISTAS.items()
}


@pytest.mark.parametrize("ids", VISTAS)
@pytest.mark.parametrize("labels", ["labels", "v1.2/labels"])
def test_mapillary_maps_all_66_ids_in_both_arrangements(tmp_path, ids, labels):
    assert len(VISTAS[ids]) == 66 and {*VISTAS[ids]} == {*range(19), 255}
    assert (
        row(Mapillary(root=vista(tmp_path, labels=labels), split="validation", ids=ids))
        == VISTAS[ids]
    )
    vista(tmp_path, labels=labels, split="training")
    assert row(Mapillary(root=tmp_path, ids=ids)) == VISTAS[ids]


def test_mapillary_reads_the_strict_ids_unless_told_otherwise(tmp_path):
    assert (
        row(Mapillary(root=vista(tmp_path), split="validation"))
        == VISTAS["strict"]
        != VISTAS["wide"]
    )
    with pytest.raises(ConfigError, match="option 'ids' must be strict or wide, not 'broad'"):
        build("datasets", {"name": "mapillary.Mapillary", "ids": "broad"}, root=tmp_path)


def test_mapillary_labels_of_version_2_are_never_read(tmp_path):
    vista(tmp_path, labels="v2.0/labels", ids=[21] * 66)
    with pytest.raises(
        DataError,
        match=r"validation has labels of v2.0 alone, whose ids differ; those of v1.2 are read",
    ):
        Mapillary(root=tmp_path, split="validation")
    assert len(Mapillary(root=tmp_path, split="validation", labels=False)) == 1
    vista(tmp_path, labels="v1.2/labels")
    assert row(Mapillary(root=tmp_path, split="validation")) == VISTAS["strict"]
    vista(tmp_path / "moved", ids=[0, 123])  # v2.0 in the place of the original release
    with pytest.raises(
        DataError, match=r"labels/_1Gn.*png holds the id 123, but v1.2 has 0 to 65: labels of v2.0"
    ):
        Mapillary(root=tmp_path / "moved", split="validation")[0]


def test_mapillary_missing_labels_and_splits_are_named(tmp_path):
    vista(vista(tmp_path, "b", labels="v1.2/labels"), "a", labels=None)
    with pytest.raises(
        DataError, match=r"Mapillary validation: 1 of 2 labels .*validation/v1.2/labels/a.png"
    ):
        Mapillary(root=tmp_path, split="validation")
    vista(tmp_path, labels=None, split="testing")
    with pytest.raises(
        DataError, match=r"1 of 1 labels do not exist, such as .*testing/labels/_1Gn.*png"
    ):
        Mapillary(root=tmp_path, split="testing")
    assert {*row(Mapillary(root=tmp_path, split="testing", labels=False))} == {255}
    with pytest.raises(
        DataError, match=r"Mapillary has no split 'val': the folders in .* are testing, validation$"
    ):
        Mapillary(root=tmp_path, split="val")


def test_mapillary_converted_labels_are_train_ids(tmp_path):
    vista(tmp_path, "a", CONVERTED)
    grey(tmp_path / "train_ids" / "validation" / "a.png", CONVERTED)
    options = {"root": tmp_path, "split": "validation", "train_ids": "train_ids/{split}"}
    assert row(Mapillary(**options)) == row(Mapillary(ids="wide", **options)) == CONVERTED
    assert row(Mapillary(root=tmp_path, split="validation", labels=False)) == [255] * 20
    grey(tmp_path / "train_ids" / "validation" / "a.png", range(20))
    with pytest.raises(DataError, match=r"a.png holds the ids \[19\].*converted to class ids"):
        Mapillary(**options)[0]
    with pytest.raises(
        DataError, match=r"a.png holds the id 255, .* set train_ids to their folder"
    ):
        Mapillary(
            root=grey(tmp_path / "validation" / "labels" / "a.png", CONVERTED).parents[2],
            split="validation",
        )[0]


def big(root, width=60, height=40):
    """Stripes of one pixel, black and white; the label is road on the left half, sky on the right."""
    stripes = np.zeros((height, width, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(
        (vista(root, "a") / "validation" / "images" / "a.jpg"), quality=100, subsampling=0
    )
    save(
        root / "validation" / "labels" / "a.png",
        np.repeat([[13] * (width // 2) + [27] * (width // 2)], height, 0),
    )
    return {"root": root, "split": "validation"}


def test_mapillary_long_side_reduces_image_and_label_alike(tmp_path):
    options = big(tmp_path)
    for long_side, size in (
        (0, (40, 60)),
        (60, (40, 60)),
        (2048, (40, 60)),
        (30, (20, 30)),
        (20, (13, 20)),
    ):
        data = Mapillary(long_side=long_side, **options)
        image, label = data.load(0)
        assert (
            image.shape == (*size, 3)
            and label.shape == size
            and image.dtype == label.dtype == np.uint8
        )
        assert np.array_equal(data.load_label(0), label)
        assert (label[:, : size[1] // 2] == 0).all() and (label[:, size[1] // 2 :] == 10).all()
        if (
            size[1] < 60
        ):  # without antialiasing every second or third column would be black or white
            assert abs(image[:, 1:-1].astype(float) - 127.5).max() < 30
        else:
            assert image[:, ::2].min() > 200 and image[:, 1::2].max() < 50


def test_mapillary_reduced_portraits_keep_their_ratio_and_take_the_labels_in_the_middle(tmp_path):
    ids = np.full((60, 36), 65)
    ids[2::5] = np.arange(13, 25)[:, None]  # the middle row of each five
    save(tmp_path / "validation" / "images" / "a.jpg", np.zeros((60, 36, 3)))
    save(tmp_path / "validation" / "labels" / "a.png", ids)
    data = Mapillary(root=tmp_path, split="validation", long_side=12)
    image, label = data.load(0)
    assert image.shape == (12, 7, 3) and label[:, 3].tolist() == VISTAS["strict"][13:25]


def test_mapillary_maps_and_counts_have_the_reduced_size(tmp_path):
    options = big(tmp_path / "data")
    full, half = Mapillary(**options), Mapillary(long_side=30, **options)
    for size, data in (((40, 60), full), ((20, 30), half)):
        save(tmp_path / str(size[0]) / "validation" / "images" / "a.png", np.full(size, 7))
        data.extra["map"] = tmp_path / str(size[0])
        assert data[0]["extra"]["map"].shape == size
    half.extra["map"] = tmp_path / "40"
    with pytest.raises(DataError, match=r"sizes differ: .*a.jpg is 30x20, .*a.png is 60x40"):
        half[0]
    counts = [class_counts(data, tmp_path / "cache")[0].tolist() for data in (full, half, full)]
    assert [count[0] for count in counts] == [1200, 300, 1200] and len(
        {full.label_key(), half.label_key()}
    ) == 2


def test_mapillary_labels_of_another_shape_are_errors_at_any_size(tmp_path):
    options = big(tmp_path)
    save(tmp_path / "validation" / "labels" / "a.png", np.zeros((50, 60)))
    for long_side in (0, 30):
        with pytest.raises(DataError, match=r"sizes differ: .*images/a.jpg is .*labels/a.png is"):
            Mapillary(long_side=long_side, **options)[0]
    with pytest.raises(ConfigError, match="'long_side' must be an int of at least 0, not -1"):
        build("datasets", {"name": "mapillary.Mapillary", "long_side": -1}, root=tmp_path)
