"""SYNTHIA on tiny files in its official format, and the conventions of its papers."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets import synthia
from datasets.base import DataError
from datasets.cityscapes import Cityscapes
from datasets.synthia import Synthia
from engine.metrics import ConfusionMatrix
from tests.datasets.published import (
    CONVERTED,
    NAMES,
    RAW,
    SYNTHIA,
    city_frame,
    drawn_frame,
    grey,
    palette_png,
    picture,
    row,
)

# --- the two conventions of SYNTHIA -> Cityscapes --------------------------------------------------------------------


WITHOUT_ABSENT = [n for n in NAMES if n not in ("terrain", "truck", "train")]
THIRTEEN = [n for n in WITHOUT_ABSENT if n not in ("wall", "fence", "pole")]


def test_synthia_subsets_are_those_of_the_papers():
    assert synthia.SUBSETS == {"mIoU16": WITHOUT_ABSENT, "mIoU13": THIRTEEN}
    assert len(WITHOUT_ABSENT) == 16 and len(THIRTEEN) == 13


@pytest.mark.parametrize("kind, ids", [("labelIds", RAW), ("labelTrainIds", CONVERTED)])
def test_ignored_classes_are_255_and_the_others_keep_their_ids(tmp_path, kind, ids):
    root = city_frame(tmp_path, "ulm_000000_000019", ids, kind)
    plain = row(Cityscapes(root=root))
    assert {*plain} == {*range(19), 255}
    data = Cityscapes(root=root, ignore=list(synthia.ABSENT))
    assert row(data) == [255 if i in (9, 14, 16) else i for i in plain]
    assert list(data.CLASSES) == NAMES


def test_convention_a_counts_false_positives_on_absent_classes_and_b_does_not(tmp_path):
    root = city_frame(tmp_path, "ulm_000000_000019", [7, 7, 27, 26])  # road, road, truck, car
    predicted = np.array([[0, 0, 13, 13]] * 4)  # the truck is taken for a car
    scores = {}
    for name, ignore in (("A", []), ("B", ["terrain", "truck", "train"])):
        data = Cityscapes(root=root, ignore=ignore)
        matrix = ConfusionMatrix(data.CLASSES, synthia.SUBSETS)
        sample = data[0]["label"][None].long()
        matrix.update(sample.new_tensor(predicted)[None], sample)
        scores[name] = {
            key: value for key, value in matrix.summary().items() if key in synthia.SUBSETS
        }
    assert scores["A"] == pytest.approx({"mIoU16": 75.0, "mIoU13": 75.0})  # road 100, car 50
    assert scores["B"] == pytest.approx({"mIoU16": 100.0, "mIoU13": 100.0})


def test_unknown_names_to_ignore_are_errors(tmp_path):
    root = city_frame(tmp_path, "ulm_000000_000019")
    with pytest.raises(
        DataError,
        match=r"Cityscapes: ignore names \['lorry'\]; there are road, sidewalk, .*bicycle",
    ):
        Cityscapes(root=root, ignore=["truck", "lorry"])


# --- SYNTHIA ---------------------------------------------------------------------------------------------------------


def png_48_bits(pixels):
    """(H, W, 3) uint16 RGB -> the bytes of a PNG, written out by the format's definition (no filter, big-endian)."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
        for kind, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_synthia_class_lies_in_the_first_of_three_16_bit_channels(tmp_path):
    data = Synthia(root=drawn_frame(tmp_path, "0000000"))
    assert row(data) == SYNTHIA
    red = np.array([range(23)] * 4)
    path = tmp_path / "GT" / "LABELS" / "0000000.png"
    path.write_bytes(png_48_bits(np.dstack([red, 1000 + red, 22 - red])))
    assert row(data) == SYNTHIA
    path.write_bytes(png_48_bits(np.dstack([red + 256, 0 * red, 0 * red])))  # both bytes count
    with pytest.raises(DataError, match=r"0000000.png holds the ids \[256, 257,"):
        data[0]


@pytest.mark.parametrize("name", ["0000000.png", "0000000_labelTrainIds.png"])
def test_synthia_mapped_labels_are_not_mapped_twice(tmp_path, name):
    picture(tmp_path / "RGB" / "0000000.png", len(CONVERTED))
    path = grey(tmp_path / "GT" / "LABELS" / name, CONVERTED)
    data = Synthia(root=tmp_path)
    assert row(data) == CONVERTED
    palette_png(path, CONVERTED)
    assert row(data) == CONVERTED
    grey(path, [*range(3, 23)])
    with pytest.raises(
        DataError, match=rf"{name} holds the ids \[19, 20, 21, 22\].*converted to class ids"
    ):
        data[0]


def test_synthia_prefers_the_official_label(tmp_path):
    drawn_frame(tmp_path, "0000000")
    grey(tmp_path / "GT" / "LABELS" / "0000000_labelTrainIds.png", [0] * 23)
    assert row(Synthia(root=tmp_path)) == SYNTHIA


def test_synthia_labels_in_other_formats_are_refused_by_name(tmp_path):
    data, path = (
        Synthia(root=drawn_frame(tmp_path, "0000000")),
        tmp_path / "GT" / "LABELS" / "0000000.png",
    )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read the label .*GT/LABELS/0000000.png"):
            data[0]
    picture(path, 23)  # GT/COLOR, for instance
    with pytest.raises(DataError, match=r"GT/LABELS/0000000.png is a colour picture"):
        data[0]
    Image.fromarray(np.zeros((4, 23), np.uint16)).save(path)
    with pytest.raises(
        DataError, match=r"GT/LABELS/0000000.png is no label of SYNTHIA: 16 bits with 3 channels"
    ):
        data[0]
    cv2.imwrite(str(path), np.zeros((4, 23, 4), np.uint16))
    with pytest.raises(DataError, match=r"GT/LABELS/0000000.png"):
        data[0]
