"""What every data set does: samples, label spaces, augmentation, maps, stylised copies, and what is
said about files that are wrong.
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from datasets.base import DataError, read_ids, read_image, read_map
from datasets.build import Stream, build_data
from datasets.folder import Folder
from datasets.sampler import StreamSampler, make_loader
from datasets.several import Several
from datasets.toy import Toy
from datasets.transforms import Augment
from engine.build import build
from engine.config import load
from engine.metrics import warnings_about
from engine.step import Batch
from tests.datasets.files import (
    CLASSES,
    Files,
    column,
    files,
    laid_out,
    mine,
    picture,
    rows,
    save,
    shows,
    spaced,
    styled,
    with_maps,
)
from tests.runs import TINY

SIZE = (8, 12)  # height, width


# --- what all data sets share --------------------------------------------------------------------------------------


def test_a_sample_is_image_label_and_numbers(tmp_path):
    sample = Files(root=files(tmp_path))[(1, 17)]
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), picture(1))
    assert sample["label"].shape == SIZE and column(sample["label"])[:4] == [0, 1, 2, 255]
    assert sample["image"].dtype == sample["label"].dtype == torch.uint8
    assert type(sample["image"]) is type(sample["label"]) is torch.Tensor
    assert sample["image"].is_contiguous()  # as the loader stacks and sends it
    assert (sample["index"], sample["sample"]) == (1, 17)


def test_an_unlabelled_set_has_no_label_path_and_ignores_every_pixel(tmp_path):
    files(tmp_path)
    for path in (tmp_path / "labels").iterdir():
        path.unlink()  # it must not even look for them
    dataset = Files(root=tmp_path, labels=False)
    assert all(label is None for _, label in dataset.samples)
    assert (dataset[0]["label"] == 255).all() and dataset[0]["label"].shape == SIZE


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    grey = picture()[..., 0]
    alpha = np.dstack([picture(), grey])
    assert np.array_equal(read_image(save(tmp_path / "grey.png", grey)), np.dstack([grey] * 3))
    assert np.array_equal(read_image(save(tmp_path / "alpha.png", alpha)), picture())
    Image.fromarray(rows((9, 8, 7), (1, 2, 3))).quantize(2).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), rows((9, 8, 7), (1, 2, 3)))


def test_palette_16_bit_and_1_bit_labels_are_read_as_ids(tmp_path):
    image = Image.fromarray(rows(0, 2, 1)).convert("P")
    image.putpalette([200, 10, 10, 0, 255, 0, 7, 7, 7])
    image.save(tmp_path / "palette.png")
    assert np.array_equal(read_ids(tmp_path / "palette.png"), rows(0, 2, 1))
    Image.fromarray(rows(1, 2).astype(np.uint16) * 1000).save(tmp_path / "deep.png")
    assert np.array_equal(read_ids(tmp_path / "deep.png"), rows(1, 2).astype(int) * 1000)
    files(tmp_path, count=1)
    Image.fromarray(rows(0, 1) > 0).save(tmp_path / "labels" / "0.png")
    assert np.array_equal(Files(root=tmp_path).load(0)[1], rows(0, 1))


def test_known_bad_files_are_left_out_and_reported(tmp_path):
    class Official(Files):
        KNOWN_BAD = {"1": "the label is of another image"}  # noqa: RUF012

    dataset = Official(root=files(tmp_path))
    assert [image.stem for image, _ in dataset.samples] == ["0", "2"]
    assert [image.stem for image in dataset.left_out] == ["1"]


@pytest.mark.parametrize(
    "root, says",
    [(None, "set data.root=PATH"), ("nowhere", r"no folder .*nowhere; set the root of")],
)
def test_a_missing_root_says_which_key_to_set(tmp_path, root, says):
    with pytest.raises(DataError, match=f"Files.*{says}"):
        Files(root=root and tmp_path / root)


def test_an_empty_folder_names_data_set_split_and_folder(tmp_path):
    with pytest.raises(
        DataError, match=rf"Files val: no images under {tmp_path}; layouts: docs/data.md$"
    ):
        Files(root=tmp_path, split="val")


def test_missing_labels_are_counted_and_named(tmp_path):
    files(tmp_path, count=4)
    (tmp_path / "labels" / "1.png").unlink()
    (tmp_path / "labels" / "3.png").unlink()
    with pytest.raises(
        DataError, match=r"2 of 4 labels do not exist, such as .*labels/1.png, .*labels/3.png"
    ):
        Files(root=tmp_path)


def test_different_sizes_name_both_files_and_both_sizes(tmp_path):
    files(tmp_path)
    save(tmp_path / "labels" / "1.png", np.zeros((6, 10)))
    with pytest.raises(
        DataError, match=r"sizes differ: .*images/1.png is 12x8, .*labels/1.png is 10x6"
    ):
        Files(root=tmp_path)[1]


def test_a_truncated_jpeg_is_an_error_that_names_it(tmp_path):
    path = save(tmp_path / "cut.jpg", picture(size=(64, 64)))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cannot read the image .*cut.jpg"):
        read_image(path)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"<html>not found</html>", lambda data: b""],
)
def test_a_damaged_label_is_an_error_that_names_it(tmp_path, damage):
    path = save(tmp_path / "cut.png", picture(size=(64, 64))[..., 0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot read the label .*cut.png"):
        read_ids(path)


def test_unknown_ids_are_named_with_file_and_remedy(tmp_path):
    files(tmp_path)
    save(tmp_path / "labels" / "2.png", rows(0, 7, 254))
    with pytest.raises(
        DataError, match=r"labels/2.png holds the ids \[7, 254\].* \(3 classes\) .*id_map"
    ):
        Files(root=tmp_path)[2]


def test_a_colour_label_where_ids_are_expected_says_what_to_do(tmp_path):
    files(tmp_path)
    save(tmp_path / "labels" / "0.png", picture())
    with pytest.raises(
        DataError, match=r"labels/0.png is a colour picture \(3 channels\).*color_labels: true"
    ):
        Files(root=tmp_path)[0]


# --- the classes of another label space ----------------------------------------------------------------------------


def test_a_label_space_gives_its_names_its_ids_and_colours(tmp_path):
    data = spaced(files(tmp_path), {"z": ["c"], "none": [], "y": ["b", "a"]})
    assert data.CLASSES == ("z", "none", "y") and data.PALETTE == (
        (3, 0, 0),
        (160, 160, 160),
        (2, 0, 0),
    )
    assert column(data[0]["label"])[:4] == [2, 2, 0, 255] and data.SCORED == ("z", "y")
    assert Files.CLASSES == ("a", "b", "c") and Files(root=tmp_path).CLASSES == Files.CLASSES
    assert (
        Files(root=tmp_path, label_space={}).PALETTE == Files.PALETTE
        and Files(root=tmp_path).SCORED == ()
    )


def test_own_classes_that_a_label_space_does_not_name_are_ignored(tmp_path):
    data = spaced(files(tmp_path), {"rest": ["b"]})
    assert column(data[0]["label"])[:4] == [255, 0, 255, 255] and data.SCORED == ()


def test_ignored_names_are_those_of_the_label_space(tmp_path):
    space = {"z": ["c"], "y": ["a", "b"]}
    data = spaced(files(tmp_path), space, ignore=["y"])
    assert column(data[0]["label"])[:4] == [255, 255, 0, 255] and data.CLASSES == ("z", "y")
    with pytest.raises(DataError, match=r"Files: ignore names \['a'\]; there are z, y$"):
        spaced(tmp_path, space, ignore=["a"])


class Raw(Files):
    """Ids 10, 20, 30 on disk, or class ids in files whose name ends in _ids."""

    ID_MAP = {10: 0, 20: 1, 30: 2, 7: 255}  # noqa: RUF012

    def is_mapped(self, path, ids):
        return path.stem.endswith("_ids")


def test_a_label_space_follows_the_map_of_ids_and_labels_that_are_mapped_already(tmp_path):
    for name, ids in (("0", (10, 20, 30, 7)), ("1_ids", (0, 1, 2, 255))):
        save(tmp_path / "images" / f"{name}.png", picture())
        save(tmp_path / "labels" / f"{name}.png", rows(*ids))
    data = Raw(root=tmp_path, label_space={"x": ["b", "c"], "w": ["a"]})
    assert [column(data[i]["label"])[:4] for i in range(2)] == [[1, 0, 0, 255]] * 2
    save(
        tmp_path / "labels" / "1_ids.png", rows(2, 3)
    )  # 3 is no class here, however many the label space has
    with pytest.raises(
        DataError, match=r"1_ids.png holds the ids \[3\], which Raw \(3 classes\) does not know"
    ):
        Raw(root=tmp_path, label_space={"x": ["b", "c"], "w": ["a"], "v": [], "u": []})[1]


def test_classes_that_are_not_scored_stay_so_in_a_label_space(tmp_path):
    class Fewer(Files):
        SCORED = ("a", "c")

    assert Fewer(root=files(tmp_path)).SCORED == ("a", "c")
    assert Fewer(root=tmp_path, label_space={"x": ["b"], "y": ["a"], "z": []}).SCORED == ("y",)
    assert Fewer(root=tmp_path, label_space={"x": ["b", "c"], "y": ["a"]}).SCORED == ()
    with pytest.raises(
        DataError, match="Fewer: label_space has no class that occurs in this data set"
    ):
        Fewer(root=tmp_path, label_space={"x": ["b"], "z": []})


@pytest.mark.parametrize(
    "space, says",
    [
        ({"x": ["a", "d"], "y": ["e"]}, r"label_space names \['d', 'e'\]; there are a, b, c"),
        ({"x": ["a", "b"], "y": ["b"]}, r"label_space names \['b'\] more than once"),
        ({"x": ["a", "a"]}, r"label_space names \['a'\] more than once"),
        ({"x": ["a"], "y": "b"}, "label_space.y must be a list of class names, not 'b'"),
        ({"x": ["a"], "y": None}, "label_space.y must be a list of class names, not None"),
        ({"x": []}, "label_space has no class that occurs"),
    ],
)
def test_label_spaces_that_cannot_be_meant_are_named(tmp_path, space, says):
    with pytest.raises(DataError, match=f"Files: {says}"):
        spaced(files(tmp_path), space)


# --- augmentation is a function of (seed, sample) ------------------------------------------------------------------


def augmented(root, seed=0):
    return Files(root=root, seed=seed, augment=Augment(crop=[6, 6], color=[0.4, 0.4, 0.4, 0.1]))


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "label"))


def test_augmentation_depends_on_seed_and_sample_alone(tmp_path):
    dataset = augmented(files(tmp_path))
    first = dataset[(0, 5)]
    torch.manual_seed(123)
    assert same(first, dataset[(0, 5)]) and same(first, augmented(tmp_path)[(0, 5)])
    assert not same(first, dataset[(0, 6)])
    assert not same(first, augmented(tmp_path, seed=1)[(0, 5)])


def test_augmentation_leaves_the_global_generators_alone(tmp_path):
    dataset, torch_before, numpy_before = (
        augmented(files(tmp_path)),
        torch.get_rng_state(),
        np.random.get_state()[1],
    )
    dataset[(0, 5)]
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_workers_change_nothing(tmp_path):
    dataset = augmented(files(tmp_path))
    alone, helped = (
        make_loader(dataset, StreamSampler(3, batch_size=2, stop=3), workers=n) for n in (0, 2)
    )
    for a, b in zip(alone, helped, strict=True):
        assert same(a, b) and torch.equal(a["sample"], b["sample"])


def test_augmentation_leaves_the_generators_of_gpus_alone(tmp_path, monkeypatch):
    dataset = augmented(files(tmp_path))
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded")
    )
    dataset[(0, 5)]


# --- pixels of each class, and what is suspicious about them --------------------------------------------------------


def test_a_stream_counts_each_label_once_as_it_was_augmented(tmp_path, caplog):
    files(tmp_path, ids=(0, 1, 0, 255))
    cfg = load(TINY, ["train.batch_size=3", "train.iters=9", "data.workers=0"])
    data = Files(root=tmp_path, augment=Augment(crop=[20, 30], scale=[1, 1]))
    stream = Stream(data, cfg, 0, 0, torch.device("cpu"))
    while stream.unseen > 0:
        assert not caplog.messages
        batch = next(stream)
    counted = len(data) * torch.tensor([48, 24, 0, 24 + 600 - 96])
    assert torch.equal(stream.pixels, counted) and stream.pixels.dtype == torch.int64
    assert "never occur: c (1 of 3)" in caplog.text and "of the pixels are ignored" in caplog.text
    assert next(stream) and torch.equal(stream.pixels, counted) and "pixels" not in batch
    bare = Stream(Files(root=tmp_path, labels=False), cfg, 0, 0, torch.device("cpu"))
    assert next(bare) and not bare.pixels.any()


def test_a_batch_keeps_its_numbers_on_the_host(tmp_path):
    batch = default_collate([Files(root=files(tmp_path))[i] for i in range(2)])
    loaded = Batch.load(batch, torch.device("meta"))
    assert loaded.label.device.type == "meta" and loaded.numbers == [0, 1]


def test_classes_that_never_occur_and_ignored_pixels_are_suspicious():
    names, where = ["a", "b", "c"], "data.train"
    assert warnings_about([5, 4, 1, 10], names, where) == []
    assert warnings_about([0, 4, 0, 3], names, where) == [
        "data.train: classes that never occur: a, c (2 of 3)"
    ]
    assert warnings_about([2, 4, 1, 8], names, where) == [
        "data.train: 53.3% of the pixels are ignored (id 255)"
    ]
    assert warnings_about(torch.tensor([0, 4, 0, 3]), names, where, ["a", "b"]) == [
        "data.train: classes that never occur: a (1 of 2)"
    ]
    (many,) = warnings_about([3, *[0] * 9, 0], "abcdefghij", where)
    assert many.endswith(": classes that never occur: b, c, d, e, f, ... (9 of 10)")
    assert warnings_about([0, 0, 0, 0], names, where) == []  # nothing was counted


@pytest.mark.parametrize("ignored", [3, 30])
def test_masks_of_0_and_255_get_their_remedy(ignored):
    said = warnings_about([10, 0, ignored], ["bg", "fg"], "val")
    assert said[0].startswith("val: classes that never occur: fg (1 of 2)")
    remedy = "; masks of 0 and 255 need folder.Folder with id_map: {0: bg, 255: fg}"
    assert "".join(said).count(remedy) == 1 and said[-1].endswith(remedy)
    assert "masks" not in "".join(warnings_about([0, 10, ignored], ["bg", "fg"], "val"))
    assert "masks" not in "".join(warnings_about([10, 0, 0], ["bg", "fg"], "val"))


def test_classes_that_a_set_does_not_have_are_not_expected(tmp_path):
    files(tmp_path)
    assert Files(root=tmp_path).expected == Files.CLASSES
    assert Files(root=tmp_path, ignore=["b"]).expected == ("a", "c")
    space = {"z": ["c"], "none": [], "y": ["b"]}
    assert Files(root=tmp_path, label_space=space).expected == ("z", "y")
    parts = [Files(root=tmp_path, ignore=names) for names in (["a", "b"], ["a", "c"])]
    assert Several(parts).expected == ("b", "c")
    for name, absent in (("labelmefacade.LabelMeFacade", 5), ("synthia.Synthia", 3)):
        laid_out(tmp_path / name, name)
        data = build("datasets", {"name": name, "labels": False}, root=str(tmp_path / name))
        assert len(data.CLASSES) - len(data.expected) == absent


@pytest.mark.parametrize("key", ["train", "val", "test.toy", "monitor"])
def test_sets_that_are_scored_or_trained_on_need_labels(key):
    toy = "{name: toy.Toy, length: 1, size: [8, 8], labels: false}"
    cfg = load(TINY, [f"data.{key}={toy}"])
    with pytest.raises(DataError, match=rf"^data.{key} has labels: false, .* use predict.py$"):
        build_data(cfg)
    build_data(load(TINY, [f"data.target={toy}"]))


# --- maps that belong to the images --------------------------------------------------------------------------------


def numbered(count=3):
    return [
        np.random.default_rng(90 + i).integers(0, 256, SIZE, dtype=np.uint8) for i in range(count)
    ]


def test_a_sample_has_no_maps_until_the_set_has_folders_of_them(tmp_path):
    dataset = Files(root=files(tmp_path / "data"))
    assert dataset[0]["extra"] == {} and Files(root=tmp_path / "data").extra is not dataset.extra
    with_maps(dataset, tmp_path / "one", numbered())
    with_maps(dataset, tmp_path / "two", [rows(3, 255)] * 3, name="label")
    extra = dataset[(1, 17)]["extra"]
    assert list(extra) == ["map", "label"] and {type(v) for v in extra.values()} == {torch.Tensor}
    assert {v.dtype for v in extra.values()} == {torch.uint8}
    assert np.array_equal(extra["map"], numbered()[1]) and column(extra["label"])[:2] == [3, 255]


def test_a_map_with_a_palette_is_read_as_its_indices(tmp_path):
    dataset = Files(root=files(tmp_path / "data", count=1))
    (tmp_path / "maps" / "images").mkdir(parents=True)
    image = Image.fromarray(rows(2, 0, 255))
    image.putpalette([9, 9, 9] * 256)
    image.save(tmp_path / "maps" / "images" / "0.png")
    dataset.extra["map"] = tmp_path / "maps"
    assert column(dataset[0]["extra"]["map"])[:3] == [2, 0, 255]


@pytest.mark.parametrize("sample", range(8))
def test_maps_follow_the_label_through_the_augmentation(tmp_path, sample):
    augment = Augment(crop=[10, 9], scale=[0.4, 2.0], color=[0.4, 0.4, 0.4, 0.1])
    bare, dataset = (Files(root=files(tmp_path / "data"), augment=augment) for _ in range(2))
    labels = [dataset.load(index)[1] for index in range(3)]
    with_maps(dataset, tmp_path / "maps", labels, "copy")
    with_maps(dataset, tmp_path / "other", [label // 2 + 40 for label in labels], "other")
    drawn = dataset[(1, sample)]
    assert same(drawn, bare[(1, sample)])  # maps change nothing about what is drawn
    assert torch.equal(drawn["extra"]["copy"], drawn["label"])
    padding = drawn["extra"]["other"] == 255
    assert torch.equal(drawn["extra"]["other"][~padding], drawn["label"][~padding] // 2 + 40)
    assert (drawn["label"][padding] == 255).all()


def test_padding_of_maps_is_255(tmp_path):
    dataset = Files(root=files(tmp_path / "data"), augment=Augment(crop=[20, 30], scale=[1, 1]))
    padded = with_maps(dataset, tmp_path / "maps", [np.zeros(SIZE)] * 3)[0]["extra"]["map"]
    assert (padded == 255).sum() == 20 * 30 - 8 * 12 and (padded == 0).sum() == 8 * 12


def test_maps_reach_the_device_as_bytes(tmp_path):
    dataset = with_maps(
        Files(root=files(tmp_path / "data")), tmp_path / "maps", numbered(), "extra"
    )
    with_maps(dataset, tmp_path / "label", numbered(), "label")
    (batch,) = make_loader(dataset, StreamSampler(3, batch_size=3, stop=1), workers=1)
    moved = Batch.load(batch, torch.device("cpu"))
    assert moved.image.dtype == torch.get_default_dtype() and moved.label.dtype == torch.int64
    assert sorted(moved.numbers) == [0, 1, 2] and set(moved.extra) == {"extra", "label"}
    for index, values in zip(batch["index"].tolist(), moved.extra["extra"]):
        assert values.dtype == torch.uint8 and np.array_equal(values, numbered()[index])
    plain = default_collate([Files(root=tmp_path / "data")[0]])
    assert Batch.load(plain, torch.device("cpu")).extra == {}


def test_a_missing_map_names_image_map_and_file(tmp_path):
    dataset = with_maps(Files(root=files(tmp_path / "data")), tmp_path / "maps", numbered())
    (tmp_path / "maps" / "images" / "1.png").unlink()
    with pytest.raises(
        DataError, match=r"data/images/1.png has no map 'map': there is no file .*maps/images/1.png"
    ):
        dataset[1]


def test_a_map_of_another_size_names_both_files(tmp_path):
    dataset = with_maps(
        Files(root=files(tmp_path / "data")), tmp_path / "maps", [np.zeros((6, 12))] * 3
    )
    with pytest.raises(
        DataError, match=r"sizes differ: .*data/images/2.png is 12x8, .*maps/images/2.png is 12x6"
    ):
        dataset[2]


def test_what_is_no_map_of_bytes_is_named(tmp_path):
    Image.fromarray(rows(1, 2).astype(np.uint16) * 1000).save(tmp_path / "deep.png")
    for path in (save(tmp_path / "colour.png", picture()), tmp_path / "deep.png"):
        with pytest.raises(DataError, match=rf"{path} is no map: one channel of 8 bits"):
            read_map(path)
    (tmp_path / "cut.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read the map .*cut.png"):
        read_map(tmp_path / "cut.png")


def test_a_stem_is_the_path_below_the_root_without_suffix(tmp_path):
    mine(tmp_path / "data", names=("berlin/a", "b.c"))
    stems = ["images/train/b.c", "images/train/berlin/a"]
    data = Folder(root=tmp_path / "data", classes=CLASSES)
    assert sorted(map(data.stem, range(2))) == stems
    elsewhere = Folder(
        root=files(tmp_path / "root"),
        image_dir="../data/images/train",
        labels=False,
        classes=CLASSES,
    )
    outside = str(tmp_path)[1:]
    assert sorted(map(elsewhere.stem, range(2))) == [f"{outside}/data/{stem}" for stem in stems]
    assert Toy(domain="fog", length=12).stem(11) == "fog/train/00011"


def test_a_relative_root_gives_the_same_stems(tmp_path, monkeypatch):
    files(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert [Files(root="data").stem(1), Files(root="./data/../data/").stem(1)] == ["images/1"] * 2


def test_images_that_differ_by_their_suffix_are_named_but_not_an_image_that_is_listed_twice(
    tmp_path,
):
    class Listed(Files):
        def pairs(self):
            return [*super().pairs(), super().pairs()[0]]

    assert len(Listed(root=files(tmp_path))) == 4
    save(tmp_path / "images" / "1.jpg", picture())
    with pytest.raises(
        DataError, match=r"images/1.jpg and .*images/1.png share the path 'images/1' but"
    ):
        Files(root=tmp_path)


def test_without_augmentation_is_a_copy_that_leaves_the_set_as_it_is(tmp_path):
    dataset = with_maps(augmented(files(tmp_path / "data")), tmp_path / "maps", numbered())
    plain = dataset.without_augmentation()
    assert plain[0]["extra"] == {} and np.array_equal(
        plain[0]["image"].permute(1, 2, 0), picture(0)
    )
    assert plain.samples is dataset.samples
    plain.extra["more"] = tmp_path
    assert list(dataset.extra) == ["map"] and dataset[0]["image"].shape == (3, 6, 6)


# --- stylised copies -----------------------------------------------------------------------------------------------


SPARE = 50  # seeds of the pictures that stand for stylised ones


def test_stylised_copies_replace_the_pictures_and_not_the_labels(tmp_path):
    dataset, names = Files(root=files(tmp_path / "data")), [f"images/{i}.png" for i in range(3)]
    copied = Files(root=tmp_path / "data", stylised=styled(tmp_path / "styled", names))
    for i in range(3):
        assert shows(dataset, i, i) and shows(copied, i, SPARE + i)
        assert torch.equal(dataset[i]["label"], copied[i]["label"]) and dataset.stem(
            i
        ) == copied.stem(i)
    assert shows(copied.without_augmentation(), 2, SPARE + 2)


def test_stylised_copies_may_lie_flat_have_other_suffixes_and_lie_below_the_root(tmp_path):
    mine(tmp_path, names=("x/a", "x/b"))
    styled(tmp_path / "other", ["a.png", "b.PNG", "c.png", "notes.txt.png"])
    dataset = Folder(root=tmp_path, classes=CLASSES, stylised="other")
    assert shows(dataset, 0, SPARE) and shows(dataset, 1, SPARE + 1)
    styled(
        tmp_path / "other", ["skip.png", "images/train/x/a.png"]
    )  # the full path comes before the bare name
    assert shows(Folder(root=tmp_path, classes=CLASSES, stylised="other"), 0, SPARE + 1)


def test_missing_stylised_copies_are_counted_and_named(tmp_path):
    files(tmp_path / "data", count=4)
    there = styled(tmp_path / "styled", ["images/0.png", "images/2.png"])
    says = (
        r"2 of 4 images have no stylised copy in .*styled, such as .*images/1.png, .*images/3.png"
    )
    with pytest.raises(DataError, match=says):
        Files(root=tmp_path / "data", stylised=there)
    with pytest.raises(
        DataError, match=r"Files: there is no folder .*data/nowhere of stylised images"
    ):
        Files(root=tmp_path / "data", stylised="nowhere")


def test_one_stylised_copy_for_two_images_is_an_error(tmp_path):
    mine(tmp_path / "data", names=("berlin/1", "ulm/1"))
    copies = styled(tmp_path / "styled", ["1.png"])
    with pytest.raises(
        DataError,
        match=r"berlin/1.jpg and .*ulm/1.jpg share the stylised copy .*styled/1.png; give",
    ):
        Folder(root=tmp_path / "data", classes=CLASSES, stylised=copies)


def test_two_stylised_copies_of_one_name_are_an_error(tmp_path):
    copies = styled(tmp_path / "styled", [f"images/{i}.png" for i in range(3)] + ["images/1.jpg"])
    says = r"styled/images/1.jpg and .*styled/images/1.png share the name 'images/1' .*; remove one"
    with pytest.raises(DataError, match=says):
        Files(root=files(tmp_path / "data"), stylised=copies)


def test_images_and_labels_that_are_missing_are_found_without_asking_for_each(tmp_path, monkeypatch):
    files(tmp_path, count=4)
    asked = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))
    Files(root=tmp_path)
    assert not asked
    (tmp_path / "labels" / "1.png").unlink()
    (tmp_path / "labels" / "2.png").unlink()
    (tmp_path / "labels" / "2.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"2 of 4 labels do not exist, such as .*1.png, .*2.png"):
        Files(root=tmp_path)


def test_a_stylised_copy_of_another_size_is_named(tmp_path):
    copies = styled(tmp_path / "styled", [f"images/{i}.png" for i in range(3)], (4, 6))
    with pytest.raises(DataError, match=r"styled/images/1.png is 6x4, .*data/labels/1.png is 12x8"):
        Files(root=files(tmp_path / "data"), stylised=copies)[1]
    unlabelled = Files(root=tmp_path / "data", stylised=copies, labels=False)
    with_maps(unlabelled, tmp_path / "maps", numbered())
    with pytest.raises(DataError, match=r"styled/images/1.png is 6x4, .*maps/images/1.png is 12x8"):
        unlabelled[1]


@pytest.mark.parametrize("size, kind", [((10, 10, 3), "uint8"), ((8, 12, 3), "float32"), ((8, 12, 4), "uint8")])
def test_a_set_whose_own_load_gives_something_else_is_named(tmp_path, monkeypatch, size, kind):
    data = Files(root=files(tmp_path))
    wrong = np.zeros(size, kind), np.zeros((8, 12), np.uint8)
    monkeypatch.setattr(data, "load", lambda index: wrong)
    with pytest.raises(DataError, match=rf"sample 1: the image is \({size[0]}, .* {kind}, its label"):
        data[1]
