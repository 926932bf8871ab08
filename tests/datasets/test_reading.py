"""Reading files: depths, EXIF, labels, maps, hidden files, links, lists, and what is said where they are wrong."""

import logging
import os
import pickle
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin
from torch.utils.data import DataLoader, Dataset

from datasets import reading
from datasets.base import DataError
from datasets.camvid import CamVid
from datasets.folder import Folder
from datasets.gta5 import GTA5
from datasets.reading import (
    files_below,
    files_in,
    opened,
    read_colors,
    read_ids,
    read_image,
    read_list,
    read_map,
)
from datasets.voc import VOC
from engine.build import build
from engine.errors import UserError
from engine.process import loader
from tests.datasets.files import CLASSES, LAYOUTS, column, laid_out, mine, picture, rows, save
from tests.fuzz import pictures
from tests.fuzz.pictures import png, tiff
from tests.runs import ROOT

GREY, COLORS = picture()[..., 0], picture()
CASES = ROOT.parent / "shared" / "cases"


def written(path, content):
    """Bytes, or an array or a picture that Pillow saves -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)
    return path


def deep_png(array, color):
    """A PNG of 16 bits: color 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""
    filtered = b"".join(b"\0" + line.tobytes() for line in array.astype(">u2"))
    return png(array.shape[1], array.shape[0], 16, color, filtered)


def packed_png(ids, bits):
    """A grey PNG of 1, 2 or 4 bits that holds these ids."""
    each = np.unpackbits(ids[..., None], axis=-1)[..., 8 - bits :].reshape(len(ids), -1)
    filtered = b"".join(b"\0" + line.tobytes() for line in np.packbits(each, axis=1))
    return png(ids.shape[1], ids.shape[0], bits, 0, filtered)


# --- depths of images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_pictures_are_those_of_8_bits(tmp_path, dtype):
    grey, colors = ((values.astype(np.uint16) * 257).astype(dtype) for values in (GREY, COLORS))
    alpha = np.dstack([colors, grey])
    files = {
        "grey.png": (deep_png(grey, 0), GREY),
        "colors.png": (deep_png(colors, 2), COLORS),
        "grey_alpha.png": (deep_png(np.dstack([grey, grey // 2]), 4), GREY),
        "alpha.png": (deep_png(alpha, 6), COLORS),
        "grey.tif": (Image.fromarray(grey), GREY),
        "colors.tif": (tiff(colors), COLORS),
        "alpha.tif": (tiff(alpha, extra=[2]), COLORS),
        "grey.pgm": (Image.fromarray(grey.astype("<u2")), GREY),
    }
    for name, (content, expected) in files.items():
        expected = expected if expected.ndim == 3 else np.dstack([expected] * 3)
        assert np.array_equal(read_image(written(tmp_path / name, content)), expected), name


def test_deep_grey_is_rounded_and_not_cut(tmp_path):
    path = written(tmp_path / "a.png", np.array([[0, 128, 129, 257, 65535]], np.uint16))
    assert read_image(path)[0, :, 0].tolist() == [0, 0, 1, 1, 255]


def test_12_bit_tiffs_and_floats_of_0_to_1_are_scaled_by_their_depth(tmp_path):
    packed = np.array([[0xFF, 0xF8, 0x00]], np.uint8)  # 4095 and 2048
    tags = [(256, 4, [2]), (258, 3, [12])]
    path = written(tmp_path / "12.tif", tiff(packed, tags=tags))
    assert read_image(path)[0, :, 0].tolist() == [255, 128]
    floats = np.array([[0, 0.2, 0.502, 1]], np.float32)
    path = written(tmp_path / "float.tif", tiff(floats, kind=3))
    assert read_image(path)[0].tolist() == [[v] * 3 for v in (0, 51, 128, 255)]


REFUSED = {
    "float_255": (
        tiff(GREY.astype(np.float32), 3),
        r"holds floats from \d to 2\d\d: floats of 0..1",
    ),
    "float_nan": (tiff(np.array([[0, np.nan]], np.float32), 3), "holds floats from nan to nan"),
    "float_inf": (tiff(np.array([[0, np.inf]], np.float32), 3), "holds floats from 0 to inf"),
    "int_32": (tiff(GREY.astype(np.int32), 2), "holds integers of 32 bits, or with a sign"),
    "int_16": (tiff(GREY.astype(np.int16), 2), "holds integers of 32 bits, or with a sign"),
    "12_in_16": (tiff(GREY.astype(np.uint16) * 16), "16 bits a channel and no value above 4095"),
    "12_in_rgb": (tiff(COLORS.astype(np.uint16) * 16), "16 bits a channel and no value above 4095"),
    "12_in_png": (deep_png(COLORS * 16.0, 2), "16 bits a channel and no value above 4095"),
    "8_in_png": (deep_png(COLORS, 2), "16 bits a channel and no value above 4095"),
    "five": (
        tiff(np.dstack([COLORS, COLORS[..., :2]]), extra=[0, 0]),
        r"cannot read the image .*: TIFFs of 5 channels of 8 bits are not read: 1, 3 or 4",
    ),
    "seven": (
        tiff(np.dstack([COLORS, COLORS, GREY]), photometric=1, extra=[0] * 6),
        "TIFFs of 7 channels of 8 bits are not read",
    ),
    "float_rgb": (tiff(COLORS / np.float32(255), 3), "TIFFs of 3 channels of 32 bits are not"),
    "white_is_zero": (
        tiff(GREY.astype(np.uint16) * 257, photometric=0),
        "cannot read the image .*: in this TIFF 0 is white",
    ),
    "planes_16": (
        tiff(COLORS.astype(np.uint16) * 257, planar=2),
        "TIFFs of 3 channels of 16 bits, not interleaved are not read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_of_other_kinds_are_refused_by_name(tmp_path, name):
    content, says = REFUSED[name]
    path = written(tmp_path / f"{name}.tif", content)
    with pytest.raises(DataError, match=f"{name}.tif.*{says}|{says}") as refused:
        read_image(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_planes_of_8_bits_are_read(tmp_path):
    path = written(tmp_path / "planes.tif", tiff(COLORS, planar=2))
    assert np.array_equal(read_image(path), COLORS)


def test_stylised_copies_of_16_bits_are_scaled_too(tmp_path):
    mine(tmp_path, names=("a",))
    written(tmp_path / "new" / "a.png", GREY.astype(np.uint16) * 257)
    image, _ = Folder(root=tmp_path, classes=CLASSES, stylised="new").load(0)
    assert np.array_equal(image, np.dstack([GREY] * 3))


@pytest.mark.skipif(not CASES.is_dir(), reason="the odd inputs are not here")
def test_a_set_of_16_bits_is_the_set_of_8_bits():
    deep, plain = (sorted((CASES / n).rglob("images/*/*.png")) for n in ("2", "2_same_in_8_bit"))
    assert len(deep) == len(plain) == 8
    for one, other in zip(deep, plain):
        assert np.array_equal(read_image(one), read_image(other))


# --- EXIF ------------------------------------------------------------------------------------------------------------

TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_are_turned_as_their_exif_tag_says(tmp_path, orientation, suffix):
    path, options = tmp_path / f"a.{suffix}", {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(COLORS).save(path, exif=exif(orientation), **options)
    assert np.array_equal(read_image(path), TURNS[orientation](COLORS))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["L", "P", "I;16"])
def test_labels_that_lie_in_a_tiff_as_they_are_in_memory_are_turned(tmp_path, orientation, kind):
    ids = np.arange(54).reshape(6, 9).astype(np.uint16 if kind == "I;16" else np.uint8)
    picture = Image.fromarray(ids)
    if kind == "P":
        picture.putpalette(bytes(range(256)) * 3)
    picture.save(tmp_path / "a.tif", exif=exif(orientation))
    assert np.array_equal(read_ids(tmp_path / "a.tif"), TURNS[orientation](ids))


def phone(root, orientation):
    """A photograph of rows of two colours, stored as `orientation` says, with an upright label."""
    upright = np.repeat(rows((250, 0, 0), (250, 0, 0), (0, 0, 250), (0, 0, 250)), 4, 0)
    stored = TURNS[{6: 8, 8: 6}.get(orientation, orientation)](upright)  # the inverse
    (root / "images" / "train").mkdir(parents=True)
    options = {"exif": exif(orientation), "quality": 95, "subsampling": 0}
    Image.fromarray(stored).save(root / "images" / "train" / "a.jpg", **options)
    label = save(root / "labels" / "train" / "a.png", (upright[..., 2] > 0).astype(np.uint8))
    return Folder(root=root, classes=["red", "blue"]), label


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photograph_of_a_phone_agrees_with_its_label(tmp_path, orientation):
    data, _ = phone(tmp_path, orientation)
    image, label = data.load(0)
    assert np.array_equal(image[..., 2] > 125, label == 1) and len({*label.flat}) == 2


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_a_loader_takes_one_thread_of_opencv(context):
    options = {"worker_init_fn": loader, "num_workers": 1, "multiprocessing_context": context}
    assert next(iter(DataLoader(Threads(), batch_size=None, **options))) == 1


class Threads(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return cv2.getNumThreads()


def test_a_black_picture_of_16_bits_is_black(tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (4, 6, 3) and not read_image(tmp_path / "a.png").any()


def test_where_sizes_differ_the_exif_tag_is_named(tmp_path):
    data, label = phone(tmp_path, 6)
    save(label, read_ids(label).T)
    with pytest.raises(
        DataError, match=r"a.jpg is 12x32, turned upright by its EXIF tag, .*a.png is 32x12$"
    ):
        data[0]


def test_a_damaged_exif_block_does_no_harm(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.png", exif=b"Exif\0\0rubbish and more rubbish")
    assert np.array_equal(read_image(tmp_path / "a.png"), COLORS)


# --- labels and maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_and_palette_labels_of_few_bits_are_their_ids(tmp_path, bits):
    ids = rows(*range(min(2**bits, 8)))
    path = written(tmp_path / "grey.png", packed_png(ids, bits))
    assert np.array_equal(read_ids(path), ids) and read_ids(path).dtype == np.uint8
    palette = Image.fromarray(ids)
    palette.putpalette([200, 10, 10, 0, 255, 0] * 8)
    palette.save(tmp_path / "palette.png", bits=bits)
    assert np.array_equal(read_ids(tmp_path / "palette.png"), ids)
    spread = rows(*range(min(2**bits, 8))).astype(int) * 255 // (2**bits - 1)
    assert np.array_equal(read_image(path)[..., 0], spread)  # an image is grey, not ids


@pytest.mark.parametrize("largest", [1, 10, 254, 1000])
def test_pgm_labels_are_the_numbers_in_the_file(tmp_path, largest):
    ids = np.arange(largest + 1, dtype=">u2" if largest > 255 else "u1")
    path = written(tmp_path / "a.pgm", b"P5 %d 1 %d\n" % (len(ids), largest) + ids.tobytes())
    assert read_ids(path)[0].tolist() == [*range(largest + 1)]


@pytest.mark.parametrize("dtype, kind", [("i2", 2), ("i4", 2), ("u4", 1), ("f4", 3)])
def test_labels_of_other_number_types_are_ids_where_they_are_whole(tmp_path, dtype, kind):
    ids = np.array([[0, 1, 2, 255, 30_000]], dtype)
    path = written(tmp_path / "a.tif", tiff(ids, kind))
    assert read_ids(path).tolist() == ids.tolist() and read_ids(path).dtype == np.uint16


@pytest.mark.parametrize(
    "values, kind, says",
    [
        (np.array([[0, 70_000, 140_000]], np.int32), 2, "holds 70000, 140000: ids must be"),
        (np.array([[3, -1]], np.int16), 2, "holds -1: ids must be whole numbers of 0 to 65535"),
        (np.array([[1, 0.5, np.nan, 70_000]], np.float32), 3, "holds 0.5, 70000, nan: ids"),
        (np.array([[1, -np.inf, np.inf]], np.float32), 3, "holds -inf, inf: ids"),
    ],
)
def test_what_cannot_be_an_id_is_named(tmp_path, values, kind, says):
    mine(tmp_path, names=("a",))
    written(tmp_path / "labels" / "train" / "a.tif", tiff(values, kind))
    data = Folder(root=tmp_path, classes=CLASSES, label_suffix=".tif")
    with pytest.raises(DataError, match=rf"labels/train/a.tif {says}"):
        data[0]


def test_a_label_of_five_channels_is_refused_with_their_number(tmp_path):
    path = written(tmp_path / "a.tif", tiff(np.dstack([COLORS, COLORS[..., :2]]), extra=[0, 0]))
    with pytest.raises(DataError, match=r"cannot read the label .*a.tif: TIFFs of 5 channels of 8"):
        read_ids(path)


def test_ids_of_a_tiff_where_0_is_white_are_refused_and_its_picture_is_read(tmp_path):
    path = written(tmp_path / "a.tif", tiff(np.array([[0, 200]], np.uint8), photometric=0))
    assert read_image(path)[0, :, 0].tolist() == [255, 55]
    for read in (read_ids, read_map):
        with pytest.raises(DataError, match=r"a\.tif: in this TIFF 0 is white"):
            read(path)


def test_maps_have_8_bits(tmp_path):
    for bits in (1, 2, 4):
        path = written(tmp_path / "a.png", packed_png(rows(0, 1), bits))
        with pytest.raises(DataError, match="is no map: one channel of 8 bits"):
            read_map(path)


# --- several pictures in a file, too many pixels, broken files -------------------------------------------------------


def test_of_several_pictures_the_first_is_read_and_that_is_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reading, "told", set())
    first, second = (Image.fromarray(picture(seed)) for seed in (0, 1))
    for name in ("a.tif", "b.tif", "c.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert np.array_equal(read_image(tmp_path / name), COLORS)
    first.save(tmp_path / "d.tif")
    read_image(tmp_path / "d.tif")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith(f"{tmp_path}/a.tif holds several pictures: the f")


def test_the_size_of_a_picture_is_limited_by_the_memory_and_not_by_a_number(tmp_path, monkeypatch):
    giant = written(tmp_path / "giant.png", png(40_000, 20_000, 1, 0, b""))
    monkeypatch.setattr(reading, "free_memory", lambda: 20e9)
    with opened(giant, "image") as header:  # above Pillow's own limit
        assert header.size == (40_000, 20_000)
    monkeypatch.setattr(reading, "free_memory", lambda: 10e9)
    for kind, reader in {"image": read_image, "label": read_ids, "map": read_map}.items():
        with pytest.raises(
            DataError,
            match=rf"cannot read the {kind} {giant}: its 40000x20000 pixels take 6.4 GB to decode, "
            "more than half of the 10.0 GB of free memory",
        ):
            reader(giant)
    assert np.array_equal(read_image(save(tmp_path / "small.png", COLORS)), COLORS)


def test_free_memory_is_that_of_the_machine():
    assert 2**20 < reading.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    "reader", [read_image, read_ids, read_map, lambda p: read_colors(p, {(0, 0, 0): 0})]
)
def test_whatever_the_decoder_raises_names_the_file(tmp_path, reader):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2**21, zip=True)  # more than Pillow unpacks: ValueError
    Image.fromarray(GREY).save(tmp_path / "text.png", pnginfo=text)
    written(tmp_path / "chunk.png", png(4, 4, 8, 4, b"\0" * 36, (b"gAMA", b"1")))  # struct.error
    Image.fromarray(GREY).save(tmp_path / "cut.tif")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:-40])
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match=rf"^cannot read the (image|label|map) {path}: \S"):
            reader(path)


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too\nlarge"), EOFError("ended")])
def test_other_errors_while_decoding_are_one_sentence(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    path = save(tmp_path / "a.png", COLORS)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    monkeypatch.setattr(reading, "plain", lambda *_: None)  # torchvision has refused it
    reason = " ".join(str(error).split()) or "MemoryError"
    with pytest.raises(DataError, match=rf"^cannot read the image {path}: {reason}$"):
        read_image(path)


def test_random_files_are_read_or_refused():
    outcomes = pictures.run(seed=11, count=60)
    assert outcomes["traceback"] == outcomes["slow"] == 0, outcomes
    assert outcomes["accepted"] > 20 and outcomes["DataError"] > 100


def test_the_fuzzer_counts_tracebacks_by_kind_and_reader(monkeypatch):
    def fail(path):
        raise zlib.error("bad")

    monkeypatch.setattr(pictures, "read_map", fail)
    outcomes = pictures.run(seed=0, count=10)
    assert outcomes["traceback"] == outcomes["traceback error: map"] == 10


def test_what_is_no_picture_is_said_so_without_naming_it_twice(tmp_path):
    path = written(tmp_path / "a.png", b"<html>not found</html>")
    with pytest.raises(DataError, match=f"^cannot read the label {path}: it is damaged, or no p"):
        read_ids(path)


def test_a_data_error_keeps_its_sentence_through_pickling():
    again = pickle.loads(pickle.dumps(DataError("a.png is no picture")))
    assert type(again) is DataError and str(again) == "a.png is no picture"


# --- folders ---------------------------------------------------------------------------------------------------------


def names(folder, *suffixes, **options):
    found = files_below(folder, suffixes or [".png"], **options)
    return [path.relative_to(folder).as_posix() for path in found]


def test_files_below_a_folder_are_sorted_and_end_as_asked(tmp_path):
    for name in ("b/2.PNG", "b/1.png", "a.png", "b/c/3.png", "a.txt", "b/x_mask.png"):
        written(tmp_path / name, b"")
    assert names(tmp_path) == ["a.png", "b/1.png", "b/2.PNG", "b/c/3.png", "b/x_mask.png"]
    assert names(tmp_path, "_mask.png", ".TXT") == ["a.txt", "b/x_mask.png"]
    assert [names(tmp_path, depth=n) for n in (1, 3)] == [["a.png"], ["b/c/3.png"]]
    assert names(tmp_path, depth=2) == ["b/1.png", "b/2.PNG", "b/x_mask.png"]
    assert files_below(str(tmp_path), [".txt"]) == [tmp_path / "a.txt"]


def test_hidden_files_and_folders_are_left_out_but_not_below_a_hidden_root(tmp_path):
    root = tmp_path / ".data"
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "b/.c/d.png", "b/.e.png"):
        written(root / name, b"")
    assert names(root) == ["a.png"]


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    written(tmp_path / "elsewhere" / "1.png", b"")
    written(tmp_path / "root" / "own" / "2.png", b"")
    (tmp_path / "root" / "berlin").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "ulm").symlink_to(tmp_path / "elsewhere")  # twice is no loop
    (tmp_path / "root" / "own" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root" / "own")
    found = names(tmp_path / "root")
    assert {"berlin/1.png", "ulm/1.png", "own/2.png", "berlin/back/2.png"} <= {*found}
    assert len(found) == len({*found}) < 10


def test_a_link_to_itself_is_no_folder_and_no_file(tmp_path):
    written(tmp_path / "a.png", b"")
    (tmp_path / "b.png").symlink_to("b.png")
    (tmp_path / "c.png").symlink_to("nowhere")
    (tmp_path / "d.png").symlink_to("a.png")
    (tmp_path / "e.png").mkdir()
    assert names(tmp_path) == ["a.png", "b.png", "c.png", "d.png"]  # asked for, they are missing
    assert files_in(tmp_path) == {"a.png", "d.png"} and files_in(tmp_path / "none") == set()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    file = written(tmp_path / "a.png", b"")
    for path, reason in ((file, "Not a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(DataError, match=f"cannot list the folder {path}: {reason}"):
            files_below(path, [".png"])


def test_linked_sub_folders_are_samples(tmp_path):
    mine(tmp_path / "data", names=("a", "b"))
    mine(tmp_path / "elsewhere", names=("c", "d"))
    for kind in ("images", "labels"):
        link = tmp_path / "data" / kind / "train" / "berlin"
        link.symlink_to(tmp_path / "elsewhere" / kind / "train")
    data = Folder(root=tmp_path / "data", classes=CLASSES)
    assert [Path(image).stem for image, _ in data.samples] == ["a", "b", "c", "d"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "images").symlink_to(tmp_path / "data" / "images")
    assert Folder(root=tmp_path / "data", classes=CLASSES, stylised=tmp_path / "new").stylised


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_reader_takes_hidden_files_for_samples(tmp_path, name):
    laid_out(tmp_path, name)
    options = {"folder.Folder": {"classes": CLASSES}, "acdc.ACDC": {"condition": "fog"}}
    spec = {"name": name, "labels": False, **options.get(name, {})}
    first = build("datasets", spec, root=str(tmp_path), seed=0).samples
    shown = tmp_path / LAYOUTS[name]
    written(shown.with_name(f"._{shown.name}"), b"left behind by a file manager")
    written(shown.parent / ".ipynb_checkpoints" / shown.name, b"and an editor")
    written(shown.parent.parent / ".hidden" / shown.name, b"")
    assert build("datasets", spec, root=str(tmp_path), seed=0).samples == first != []


# --- lists -----------------------------------------------------------------------------------------------------------


def listed(root, data):
    """Two pictures, `b c` and `a`, in a layout with lists -> (the place of the list, a function that reads the set)."""
    image, options, text = {
        Folder: ("images/train/{}.jpg", {"classes": CLASSES, "list": "x.txt"}, "x.txt"),
        CamVid: ("images/train/{}.png", {"split": "few"}, "lists/few.txt"),
        GTA5: ("images/{}.png", {"split": "few"}, "lists/few.txt"),
        VOC: ("JPEGImages/{}.jpg", {"split": "few"}, "ImageSets/Segmentation/few.txt"),
    }[data]
    for name in ("ü c", "a"):
        save(root / image.format(name), picture())
    save(root / "labels" / "train" / "ü c.png", rows(0))
    save(root / "labels" / "train" / "a.png", rows(0))
    (root / text).parent.mkdir(parents=True, exist_ok=True)
    labels = {} if data is CamVid else {"labels": False}
    return root / text, lambda: data(root=root, **labels, **options)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("data", [Folder, CamVid, GTA5, VOC])
def test_lists_are_utf_8_with_or_without_a_mark_and_names_may_have_blanks(tmp_path, data, encoding):
    path, read = listed(tmp_path, data)
    folder = "train/" if data is CamVid else ""
    wanted = ["a"] if data is VOC else ["ü c", "a"]  # VOC's lines may be image and label
    lines = "".join(f"{folder}{name} \r\n\r\n" for name in wanted)
    path.write_bytes(lines.encode(encoding))
    assert [Path(image).stem for image, _ in read().samples] == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("data", [Folder, CamVid, GTA5, VOC])
def test_lists_in_other_encodings_are_named(tmp_path, data, encoding):
    path, read = listed(tmp_path, data)
    path.write_bytes("a\nü c\n".encode(encoding))
    with pytest.raises(UserError, match=f"{path} is not text in UTF-8 but .*: save it as UTF-8"):
        read()


def test_an_empty_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the list .*a.txt is empty"):
        read_list(written(tmp_path / "a.txt", b"\xef\xbb\xbf \n\n"))


def test_reading_says_nothing_about_ordinary_pictures(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "engine")
    assert np.array_equal(read_image(save(tmp_path / "a.png", COLORS)), COLORS)
    assert column(read_ids(save(tmp_path / "b.png", rows(0, 255))))[:2] == [0, 255]
    assert not [record for record in caplog.records if record.name == "engine"]


# --- decoding by torchvision -------------------------------------------------------------------------


def saved(path, **options):
    Image.fromarray(COLORS).save(path, **options)
    return path


def chunk(name, body):
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


@pytest.mark.parametrize("name, options", [
    ("a.jpg", {"quality": 80}), ("b.jpg", {"subsampling": 2, "progressive": True}),
])  # fmt: skip
def test_plain_jpegs_are_decoded_by_torchvision_to_the_pixels_of_pillow(
    name, options, tmp_path, monkeypatch
):
    path = saved(tmp_path / name, **options)
    fast = read_image(path)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "plain", lambda *_: None)
        expected = read_image(path)
    assert fast.dtype == np.uint8 and np.array_equal(fast, expected)
    monkeypatch.setattr(Image, "open", None)  # Pillow reads nothing
    assert np.array_equal(read_image(path), expected)


def test_a_png_that_opencv_would_not_see_through_is_left_to_pillow(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    end = content.index(b"IEND") - 4
    cases = {
        "a sum": content[: end - 6] + b"\0\1" + content[end - 4 :],
        "turned": content[:end] + chunk(b"eXIf", b"") + content[end:],
        "transparent": content[:33] + chunk(b"tRNS", bytes(2)) + content[33:],
        "text that may be EXIF": content[:33] + chunk(b"tEXt", b"exif\0") + content[33:],
        "physical size": content[:33] + chunk(b"pHYs", bytes(9)) + content[33:],
    }
    shapes = [reading.plain_png(memoryview(data)) for data in cases.values()]
    assert shapes == [None] * 4 + [(*GREY.shape, 1)]


@pytest.mark.parametrize("kind, reader", [(0, read_ids), (2, read_image)])
def test_a_png_with_a_broken_stream_is_named(kind, reader, tmp_path):
    """Its sums are right. torchvision ends the process on it."""
    raw = zlib.compress(bytes(8 * (1 + 12 * (1 + kind))))
    path = written(tmp_path / "a.png", png(12, 8, 8, kind, b""))
    content = path.read_bytes()
    end = content.index(b"IEND") - 4
    for stream in (raw[: len(raw) // 2], b"\0\0" + raw[2:]):
        start = content.index(b"IDAT") - 4
        written(path, content[:start] + chunk(b"IDAT", stream) + content[end:])
        with pytest.raises(DataError, match=rf"cannot read the (image|label) {path}"):
            reader(path)


def test_a_file_of_another_kind_is_not_read_twice(tmp_path, monkeypatch):
    Image.fromarray(COLORS).save(tmp_path / "a.tif")
    monkeypatch.setattr(np, "fromfile", None)
    assert np.array_equal(read_image(tmp_path / "a.tif"), COLORS)
    monkeypatch.setattr(reading, "LARGE", 99)
    assert read_image(saved(tmp_path / "a.jpg")).shape == COLORS.shape


def segment(code, body):
    return b"\xff" + bytes([code]) + (len(body) + 2).to_bytes(2, "big") + body


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("added, fast", [
    (b"", True), (segment(0xE1, turned(1)), True), (segment(0xE1, turned(6)), False),
    (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0 <a/>"), True),
    (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0 tiff:Orientation=6"), False),
    (segment(0xE2, b"MPF\0"), False), (segment(0xE2, b"ICC_PROFILE\0"), True), (b"\xff", False),
    (segment(0xFE, b"a comment"), True), (segment(0xD0, b""), False), (segment(0xD7, b""), False),
])  # fmt: skip
def test_jpegs_that_are_turned_or_hold_more_are_left_to_pillow(added, fast, tmp_path):
    content = saved(tmp_path / "a.jpg", progressive=True).read_bytes()
    path = written(tmp_path / "b.jpg", content[:2] + added + content[2:])
    assert (reading.plain(path) is not None) == fast
    pixels = read_image(path)
    assert sorted(pixels.shape) == sorted(COLORS.shape)
    if fast:
        assert np.array_equal(pixels, read_image(tmp_path / "a.jpg"))


def test_grey_is_plain_for_ids_alone_and_other_modes_and_large_pictures_never(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.jpg")
    assert reading.plain(tmp_path / "a.jpg").shape == GREY.shape
    assert reading.plain(tmp_path / "a.jpg", rgb=True) is None
    assert read_image(tmp_path / "a.jpg").shape == (*GREY.shape, 3)
    Image.fromarray(COLORS).convert("CMYK").save(tmp_path / "b.jpg")
    assert reading.plain(tmp_path / "b.jpg") is None
    Image.fromarray(GREY).save(tmp_path / "d.png")
    assert np.array_equal(reading.plain(tmp_path / "d.png"), GREY)
    assert reading.plain(tmp_path / "d.png", rgb=True) is None
    for mode, name in (("RGB", "a.png"), ("P", "b.png"), ("LA", "c.png"), ("1", "d.png")):
        Image.fromarray(COLORS).convert(mode).save(tmp_path / name)
        assert reading.plain(tmp_path / name) is None
    path = saved(tmp_path / "e.jpg")
    assert reading.plain(path) is not None
    monkeypatch.setattr(reading, "LARGE", 8 * COLORS[..., 0].size - 1)
    assert path.stat().st_size <= reading.LARGE and reading.plain(path) is None
