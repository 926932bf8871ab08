"""Data sets on tiny files in their true formats: what is read, and what is said about files that are wrong."""

import importlib
import pkgutil
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import datasets
from datasets import check, folder
from datasets.base import (
    DataError,
    SegmentationData,
    read_ids,
    read_image,
    read_map,
)
from datasets.build import build_data
from datasets.camvid import CamVid
from datasets.folder import Folder, distinct_colors
from datasets.labelmefacade import LabelMeFacade
from datasets.sampler import StreamSampler, make_loader
from datasets.several import Several
from datasets.statistics import class_counts
from datasets.synthia import SUBSETS
from datasets.toy import DOMAINS, Toy, draw, draw_label
from datasets.transforms import Augment
from engine.build import build
from engine.config import load
from engine.errors import UserError
from engine.metrics import warnings_about
from engine.step import Batch
from tests.runs import ROOT, TINY

REAL = ROOT.parent / "shared" / "data" / "camvid"
FACADES = REAL.parent / "labelmefacade"
SIZE = (8, 12)  # height, width


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def picture(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def rows(*values):
    """A label whose rows repeat the values: ids, or colours."""
    columns = np.array(values, np.uint8)[np.arange(SIZE[0]) % len(values)]
    return np.repeat(columns[:, None], SIZE[1], axis=1)


def column(label):
    return label[:, 0].tolist()


class Files(SegmentationData):
    """Three classes, `images/*` beside `labels/*.png`."""

    CLASSES, PALETTE = ("a", "b", "c"), ((1, 0, 0), (2, 0, 0), (3, 0, 0))

    def pairs(self):
        return [
            (p, self.root / "labels" / f"{p.stem}.png")
            for p in sorted((self.root / "images").glob("*"))
        ]


def files(root, count=3, ids=(0, 1, 2, 255)):
    for i in range(count):
        save(root / "images" / f"{i}.png", picture(i))
        save(root / "labels" / f"{i}.png", rows(*ids))
    return root


# --- what all data sets share --------------------------------------------------------------------------------------


def test_a_sample_is_image_label_and_numbers(tmp_path):
    sample = Files(root=files(tmp_path))[(1, 17)]
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), picture(1))
    assert sample["label"].shape == SIZE and column(sample["label"])[:4] == [0, 1, 2, 255]
    assert sample["image"].dtype == sample["label"].dtype == torch.uint8
    assert type(sample["image"]) is type(sample["label"]) is torch.Tensor
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
    "root, says", [(None, "set data.root=PATH"), ("nowhere", r"no folder .*nowhere; set data.root")]
)
def test_a_missing_root_says_which_key_to_set(tmp_path, root, says):
    with pytest.raises(DataError, match=f"Files.*{says}"):
        Files(root=root and tmp_path / root)


def test_an_empty_folder_names_data_set_split_and_folder(tmp_path):
    with pytest.raises(DataError, match=rf"Files val: no images under {tmp_path}; see the layouts"):
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


def spaced(root, space, **options):
    return Files(root=root, label_space=space, **options)


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


def test_counts_of_classes_are_those_of_the_label_space(tmp_path):
    files(tmp_path / "data", count=1, ids=(0, 1, 2, 255))
    spaces = (
        {},
        {"x": ["a", "b"], "y": ["c"]},
        {"x": ["c"], "y": ["a", "b"]},
        {"x": ["a"], "y": ["b", "c"]},
    )
    counts = [
        class_counts(spaced(tmp_path / "data", space), tmp_path / "cache").tolist()
        for space in spaces * 2
    ]
    assert counts == [[[24, 24, 24]], [[48, 24]], [[24, 48]], [[24, 48]]] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 4


def classes_of_files():
    """Every class of data sets in the package."""
    names = [m.name for m in pkgutil.iter_modules(datasets.__path__)]
    members = [c for n in names for c in vars(importlib.import_module(f"datasets.{n}")).values()]
    return {c for c in members if isinstance(c, type) and issubclass(c, SegmentationData)}


def test_every_data_set_says_which_classes_are_scored():
    scored = {c.__name__: c.SCORED for c in classes_of_files() if c.SCORED}
    assert scored == {
        "LabelMeFacade": ("Sky", "Building", "Road", "Pavement", "Tree", "Car"),
        "Synthia": tuple(SUBSETS["mIoU16"]),
    }
    assert Toy(length=1).SCORED == () and {*scored["LabelMeFacade"]} < {*LabelMeFacade.CLASSES}


def test_every_data_set_takes_another_label_space(tmp_path):
    options = {"folder.Folder": {"classes": CLASSES}, "acdc.ACDC": {"condition": "fog"}}
    for name in LAYOUTS:
        laid_out(tmp_path / name, name)
        spec = {"name": name, "labels": False, **options.get(name, {})}
        own = build("datasets", spec, root=str(tmp_path / name), seed=0).CLASSES
        space = {"last": [own[-1]], "none": [], "others": list(own[:-1])}
        made = build("datasets", {**spec, "label_space": space}, root=str(tmp_path / name), seed=0)
        assert made.CLASSES == ("last", "none", "others") and made.SCORED[-1] == "others", name


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


def test_folder_colours_are_read_before_the_label_space(tmp_path):
    save(tmp_path / "images" / "train" / "a.jpg", picture())
    save(tmp_path / "labels" / "train" / "a.png", rows((9, 0, 0), (0, 9, 0), (0, 0, 0)))
    options = {"classes": ["x", "y"], "palette": [[9, 0, 0], [0, 9, 0]], "color_labels": True}
    data = Folder(root=tmp_path, label_space={"v": ["y"], "u": ["x"]}, **options)
    assert column(data[0]["label"])[:3] == [1, 0, 255] and data.PALETTE == ((0, 9, 0), (9, 0, 0))


# --- augmentation is a function of (seed, sample) ------------------------------------------------------------------


def augmented(root, seed=0):
    return Files(
        root=root, seed=seed, augment=Augment(crop=[6, 6], color=[0.4, 0.4, 0.4, 0.1], blur=0.5)
    )


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


def test_a_labelled_sample_counts_its_pixels_after_the_augmentation(tmp_path):
    files(tmp_path, ids=(0, 1, 0, 255))
    assert Files(root=tmp_path)[0]["pixels"].tolist() == [48, 24, 0, 24]
    data = Files(root=tmp_path, augment=Augment(crop=[20, 30], scale=[1, 1]))
    counts = data[(0, 3)]["pixels"]  # padded
    assert counts.tolist() == [48, 24, 0, 24 + 600 - 96] and counts.dtype == torch.int64
    assert "pixels" not in Files(root=tmp_path, labels=False)[0]
    space = {"x": ["b", "c"], "w": ["a"]}
    assert Files(root=tmp_path, label_space=space)[0]["pixels"].tolist() == [24, 48, 24]


def test_samples_count_their_pixels(tmp_path):
    batch = default_collate([Files(root=files(tmp_path))[i] for i in range(2)])
    assert batch["pixels"].tolist() == [[24] * 4] * 2
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


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"size": [0, 8]}, {"size": [8]}, {"size": "ab"}]
)
def test_toy_sets_need_images_and_pixels(options):
    with pytest.raises(UserError, match=r"^toy.Toy: option '(length|size)[.\d]*' must be a"):
        build("datasets", {"name": "toy.Toy", **options})


# --- maps that belong to the images --------------------------------------------------------------------------------


def with_maps(dataset, folder, maps, name="map"):
    """Store a map of every sample under its stem and hand the folder to the data set."""
    for index, values in enumerate(maps):
        save(folder / f"{dataset.stem(index)}.png", values)
    dataset.extra[name] = folder
    return dataset


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


def styled(root, names, size=SIZE):
    for i, name in enumerate(names):
        save(root / name, picture(SPARE + i, size))
    return str(root)


def shows(dataset, index, seed):
    return np.array_equal(dataset[index]["image"].permute(1, 2, 0), picture(seed))


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


def test_a_stylised_copy_of_another_size_is_named(tmp_path):
    copies = styled(tmp_path / "styled", [f"images/{i}.png" for i in range(3)], (4, 6))
    with pytest.raises(DataError, match=r"styled/images/1.png is 6x4, .*data/labels/1.png is 12x8"):
        Files(root=files(tmp_path / "data"), stylised=copies)[1]
    unlabelled = Files(root=tmp_path / "data", stylised=copies, labels=False)
    with_maps(unlabelled, tmp_path / "maps", numbered())
    with pytest.raises(DataError, match=r"styled/images/1.png is 6x4, .*maps/images/1.png is 12x8"):
        unlabelled[1]


LAYOUTS = {
    "acdc.ACDC": "rgb_anon/fog/train/GP1/1_rgb_anon.png",
    "ade20k.ADE20K": "images/train/1.jpg",
    "bdd100k.BDD100K": "images/10k/train/1.jpg",
    "camvid.CamVid": "images/train/1.png",
    "cityscapes.Cityscapes": "leftImg8bit/train/ulm/1_leftImg8bit.png",
    "cocostuff.CocoStuff10k": "images/train/1.jpg",
    "cocostuff.CocoStuff164k": "images/train/1.jpg",
    "dark_zurich.DarkZurich": "rgb_anon/train/night/GOPR1/1_rgb_anon.png",
    "folder.Folder": "images/train/1.jpg",
    "gta5.GTA5": "images/1.png",
    "labelmefacade.LabelMeFacade": "images/train/1.jpg",
    "mapillary.Mapillary": "training/images/1.jpg",
    "synthia.Synthia": "RGB/1.png",
    "voc.VOC": "JPEGImages/1.jpg",
}


def laid_out(root, name):
    """One picture in the layout of a data set, and the list that VOC needs."""
    save(root / LAYOUTS[name], picture())
    if name == "voc.VOC":
        (root / "ImageSets" / "Segmentation").mkdir(parents=True)
        (root / "ImageSets" / "Segmentation" / "train.txt").write_text("1")


def test_every_data_set_of_files_reads_stylised_copies(tmp_path):
    own = {f"{c.__module__[9:]}.{c.__name__}" for c in classes_of_files()}
    assert own - {"base.SegmentationData", "toy.Toy"} == {*LAYOUTS}
    options = {"folder.Folder": {"classes": CLASSES}, "acdc.ACDC": {"condition": "fog"}}
    for name, path in LAYOUTS.items():
        root = tmp_path / name
        laid_out(root, name)
        copies = styled(root / "new", [Path(path).with_suffix(".png")])
        spec = {"name": name, "labels": False, "stylised": copies, **options.get(name, {})}
        assert shows(build("datasets", spec, root=str(root), seed=0), 0, SPARE), name


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


# --- CamVid --------------------------------------------------------------------------------------------------------


def test_camvid_segnet_layout_maps_eleven_to_ignore(tmp_path):
    save(tmp_path / "train" / "0006R0_f00930.png", picture())
    save(tmp_path / "trainannot" / "0006R0_f00930.png", rows(0, 10, 11))
    dataset = CamVid(root=tmp_path)
    assert len(dataset) == 1 and column(dataset[0]["label"])[:3] == [0, 10, 255]


def original(root, stem, *colors):
    save(root / "701_StillsRaw_full" / f"{stem}.png", picture())
    save(root / "LabeledApproved_full" / f"{stem}_L.png", rows(*colors))


def test_camvid_original_layout_groups_colours(tmp_path):
    road, markings, sidewalk, bus, void = (
        (128, 64, 128),
        (128, 0, 192),
        (0, 0, 192),
        (192, 128, 192),
        (0, 0, 0),
    )
    original(tmp_path, "0006R0_f00930", road, markings, sidewalk, bus, void)
    assert column(CamVid(root=tmp_path)[0]["label"])[:5] == [3, 3, 4, 8, 255]


def test_camvid_original_layout_splits_by_sequence_and_frame(tmp_path):
    splits = {
        "train": [
            "0001TP_008520",
            "0006R0_f00930",
            "0016E5_00390",
            "0016E5_07920",
            "0016E5_08000",
            "0016E5_08190",
        ],
        "val": ["0016E5_07959", "0016E5_07961", "0016E5_08159"],
        "test": ["0001TP_008550", "Seq05VD_f00000"],
    }
    for stem in (stem for stems in splits.values() for stem in stems):
        original(tmp_path, stem, (0, 0, 0))
    for split, stems in splits.items():
        assert [image.stem for image, _ in CamVid(root=tmp_path, split=split).samples] == stems


def test_camvid_unknown_colour_names_colour_and_file(tmp_path):
    original(tmp_path, "0006R0_f00930", (128, 64, 128), (1, 2, 3))
    with pytest.raises(
        DataError, match=r"0006R0_f00930_L.png holds 1 colours .* such as \(1, 2, 3\)"
    ):
        CamVid(root=tmp_path)[0]


def with_lists(root):
    for split, stem in (
        ("train", "0001TP_006690"),
        ("train", "0006R0_f00930"),
        ("test", "Seq05VD_f00000"),
    ):
        save(root / "images" / split / f"{stem}.jpg", picture())
        save(root / "labels" / split / f"{stem}.png", rows(0, 10, 255))
    (root / "lists").mkdir()
    (root / "lists" / "train_dusk.txt").write_text("train/0001TP_006690\n")
    return root


def test_camvid_lists_are_splits(tmp_path):
    with_lists(tmp_path)
    assert [i.stem for i, _ in CamVid(root=tmp_path, split="train").samples] == [
        "0001TP_006690",
        "0006R0_f00930",
    ]
    dusk = CamVid(root=tmp_path, split="train_dusk")
    assert [i.stem for i, _ in dusk.samples] == ["0001TP_006690"]
    assert column(dusk[0]["label"])[:3] == [0, 10, 255]


def test_camvid_unknown_split_names_those_that_there_are(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no split 'dusk'; there are train, val, test and the lists \['train_dusk'\]",
    ):
        CamVid(root=with_lists(tmp_path), split="dusk")


@pytest.mark.skipif(not REAL.is_dir(), reason="the CamVid images are not here")
def test_camvid_real_data_has_the_published_numbers():
    counts = {"train": 367, "val": 101, "test": 233, "train_day": 305, "train_dusk": 62}
    assert {split: len(CamVid(root=REAL, split=split)) for split in counts} == counts
    sample = CamVid(root=REAL, split="val")[0]
    assert sample["image"].shape == (3, 360, 480) and set(sample["label"].unique().tolist()) <= {
        *range(11),
        255,
    }
    target = CamVid(root=REAL, split="train_dusk", labels=False)
    assert all(path is None for _, path in target.samples) and (target[0]["label"] == 255).all()


def test_camvid_can_be_read_in_another_label_space(tmp_path):
    road, bus, child, void = (128, 64, 128), (192, 128, 192), (192, 128, 64), (0, 0, 0)
    original(tmp_path, "0006R0_f00930", road, bus, child, void)
    space = {"thing": ["Car", "Pedestrian"], "animal": [], "ground": ["Road", "Pavement"]}
    data = CamVid(root=tmp_path, label_space=space)
    assert column(data[0]["label"])[:4] == [2, 0, 0, 255] and data.SCORED == ("thing", "ground")


# --- LabelMeFacade -------------------------------------------------------------------------------------------------


def facade(root, *ids, split="test"):
    save(root / "images" / split / "a.jpg", picture())
    save(root / "labels" / split / "a.png", rows(*ids))
    return root


def test_labelmefacade_has_six_of_the_classes_of_camvid(tmp_path):
    data = LabelMeFacade(root=facade(tmp_path, 0, 1, 3, 4, 5, 8, 255), split="test")
    assert column(data[0]["label"])[:7] == [0, 1, 3, 4, 5, 8, 255]
    assert (data.CLASSES, data.PALETTE) == (CamVid.CLASSES, CamVid.PALETTE)
    assert [data.CLASSES.index(name) for name in data.SCORED] == [0, 1, 3, 4, 5, 8]
    save(tmp_path / "labels" / "test" / "a.png", rows(0, 2, 11))
    with pytest.raises(DataError, match=r"a.png holds the ids \[2, 11\], which LabelMeFacade"):
        data[0]


def test_labelmefacade_missing_labels_and_splits_are_named(tmp_path):
    facade(tmp_path, 0)
    with pytest.raises(
        DataError, match=r"LabelMeFacade has no split 'val': the folders in .*images are test$"
    ):
        LabelMeFacade(root=tmp_path, split="val")
    (tmp_path / "labels" / "test" / "a.png").unlink()
    with pytest.raises(
        DataError, match=r"LabelMeFacade test: 1 of 1 labels do not exist, such as .*test/a.png"
    ):
        LabelMeFacade(root=tmp_path, split="test")
    assert LabelMeFacade(root=tmp_path, split="test", labels=False).samples[0][1] is None


@pytest.mark.skipif(not FACADES.is_dir(), reason="the images of LabelMeFacade are not here")
def test_labelmefacade_real_data_has_the_published_shares(tmp_path):
    train, test = (LabelMeFacade(root=FACADES, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (60, 320) and max(test[0]["label"].shape) == 480
    counts = class_counts(train, tmp_path).sum(0)
    pixels = sum(train.load_label(i).size for i in range(60))
    assert (100 * counts / pixels).round(2).tolist() == [
        13.09,
        41.54,
        0,
        22.21,
        4.57,
        8.73,
        0,
        0,
        5.5,
        0,
        0,
    ]


# --- Folder --------------------------------------------------------------------------------------------------------

CLASSES = ["road", "building", "car"]


def mine(root, split="train", names=("a", "b"), ids=(0, 1, 2)):
    for i, name in enumerate(names):
        save(root / "images" / split / f"{name}.jpg", picture(i))
        save(root / "labels" / split / f"{name}.png", rows(*ids))
    return root


def test_folder_docstring_is_a_complete_example(tmp_path):
    mine(tmp_path, "train", ("berlin/1", "ulm/1"), (7, 11, 26, 27, 0, 255))
    mine(tmp_path, "val", ("c",), (11, 7, 27))
    example = folder.__doc__.split("\n\n")[1]
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(example))
    data = load(tmp_path / "mine.yaml", [f"data.root={tmp_path}"]).data
    augment = build("datasets", data.augment)
    train, val = (
        build("datasets", spec, root=data.root, seed=0, augment=None)
        for spec in (data.train, data.val)
    )
    assert train.CLASSES == val.CLASSES == tuple(CLASSES) and train.PALETTE[0] == (128, 64, 128)
    assert len(train) == 2 and column(train[0]["label"])[:6] == [0, 1, 2, 2, 255, 255]
    assert len(val) == 1 and column(val[0]["label"])[:3] == [1, 0, 2]
    train.augment = augment
    assert train[0]["image"].shape == (3, 256, 256)


def test_folder_without_options_reads_class_ids(tmp_path):
    dataset = Folder(root=mine(tmp_path, ids=(0, 2, 255)), classes=CLASSES)
    assert column(dataset[1]["label"])[:3] == [0, 2, 255]
    assert distinct_colors(3) == dataset.PALETTE


def test_folder_id_map_takes_ids_and_names_and_reports_what_is_not_listed(tmp_path):
    mine(tmp_path, ids=(0, 4, 5))
    dataset = Folder(root=tmp_path, classes=CLASSES, id_map={0: 255, 4: "car", 5: 1})
    assert column(dataset[0]["label"])[:3] == [255, 2, 1]
    with pytest.raises(DataError, match=r"a.png holds the ids \[5\]"):
        Folder(root=tmp_path, classes=CLASSES, id_map={0: 255, 4: "car"})[0]


def test_folder_colour_labels_use_the_palette_and_black_is_ignored(tmp_path):
    save(tmp_path / "images" / "train" / "a.jpg", picture())
    label = save(tmp_path / "labels" / "train" / "a.png", rows((9, 0, 0), (0, 9, 0), (0, 0, 0)))
    options = {"root": tmp_path, "color_labels": True}
    dataset = Folder(classes=["x", "y"], palette=[[9, 0, 0], [0, 9, 0]], **options)
    assert column(dataset[0]["label"])[:3] == [0, 1, 255]
    black = Folder(classes=["x", "y", "z"], palette=[[9, 0, 0], [0, 9, 0], [0, 0, 0]], **options)
    assert column(black[0]["label"])[:3] == [0, 1, 2]
    with pytest.raises(DataError, match=rf"{label} holds 1 colours .*\(0, 9, 0\)"):
        Folder(classes=["x"], palette=[[9, 0, 0]], **options)[0]


def test_folder_suffixes_may_be_long_several_and_in_one_folder(tmp_path):
    save(tmp_path / "all" / "a.png", picture())
    save(tmp_path / "all" / "a-mask.png", rows(0, 1))
    save(tmp_path / "all" / "b.JPG", picture())
    save(tmp_path / "all" / "b-mask.png", rows(1, 2))
    (tmp_path / "all" / "._b.JPG").write_bytes(b"left behind by a file manager")
    options = {
        "image_dir": "all",
        "label_dir": "all",
        "image_suffix": [".png", ".jpg"],
        "label_suffix": "-mask.png",
    }
    dataset = Folder(root=tmp_path, classes=CLASSES, **options)
    found = [(image.name, label.name) for image, label in dataset.samples]
    assert found == [("a.png", "a-mask.png"), ("b.JPG", "b-mask.png")]


def test_folder_list_chooses_and_orders_images(tmp_path):
    mine(tmp_path, "train", ("x/a", "x/b", "c"))
    (tmp_path / "train.txt").write_text("c\n\n  x/a  \n")
    options = {"root": tmp_path, "classes": CLASSES, "list": "{split}.txt"}
    assert [image.stem for image, _ in Folder(**options).samples] == ["c", "a"]
    (tmp_path / "train.txt").write_text("c\nx/a.jpg\n")
    with pytest.raises(
        DataError, match=r"1 of 2 names in train.txt have no image \*.jpg in images/train: x/a.jpg"
    ):
        Folder(**options)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(DataError, match=r"there is no list .*train.txt"):
        Folder(**options)


def test_folder_names_images_without_label_and_labels_without_image(tmp_path):
    mine(tmp_path, names=("a", "b", "c"))
    (tmp_path / "labels" / "train" / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images have no label \*.png in labels/train: b"):
        Folder(root=tmp_path, classes=CLASSES)
    assert len(Folder(root=tmp_path, classes=CLASSES, labels=False)) == 3
    (tmp_path / "images" / "train" / "a.jpg").unlink()
    (tmp_path / "images" / "train" / "b.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 2 labels have no image \*.jpg or \*.png in images/train: a"
    ):
        Folder(root=tmp_path, classes=CLASSES, image_suffix=[".jpg", ".png"])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"split": "val"}, r"no folder .*images/val"),
        (
            {"split": "val", "image_dir": "images/train"},
            r"split 'val' has no effect; put \{split\}",
        ),
        ({"classes": ["a", "a"]}, "different names; 'a' is repeated"),
        ({"classes": [1, 2]}, "'classes.0' must be a string"),
        ({"classes": ["yes", None]}, "'classes.1' must be a string"),
        ({"classes": ["a", ""]}, "'classes.1' must be a string of length 1"),
        ({"classes": []}, r"'classes' must be a list of length 1 to 253, .* not \[\]"),
        ({"classes": [f"class {i}" for i in range(254)]}, "'classes' must be .* 1 to 253"),
        ({"palette": [[1, 2, 3]]}, "palette must hold 3 colours, not 1"),
        ({"palette": [[1, 2, 3], [1, 2, 300], [0, 0, 0]]}, "'palette' must be .* null, not"),
        ({"color_labels": True}, "color_labels needs a palette"),
        ({"id_map": {0: "lorry"}}, r"0 'lorry'; classes: road, building, car, ignore"),
        ({"id_map": {"7": 0}}, r"id_map cannot make '7'"),
        ({"id_map": {0: 3}}, r"id_map cannot make 0 3"),
    ],
)
def test_folder_options_that_cannot_be_meant_are_named(tmp_path, options, says):
    spec = {"name": "folder.Folder", "classes": CLASSES, **options}
    with pytest.raises(UserError, match=f"Folder: .*{says}"):
        build("datasets", spec, root=mine(tmp_path))


def test_default_palette_is_distinct_fixed_and_not_black(tmp_path):
    colors = np.array(distinct_colors(30))
    distance = np.abs(colors[:, None] - colors).max(-1) + 255 * np.eye(30, dtype=int)
    assert distance.min() >= 40 and (colors.max(1) >= 60).all()
    assert distinct_colors(30)[:7] == distinct_colors(7)
    assert len(set(distinct_colors(253))) == 253


# --- python -m datasets.check --------------------------------------------------------------------------------------


def configuration(root):
    text = """
    data:
      root: ROOT
      train: {name: folder.Folder, classes: [road, building, car]}
      val: {name: folder.Folder, split: val, classes: [road, building, car]}
      augment: {name: transforms.Augment, crop: [16, 16]}
      workers: 0
    """
    (root / "mine.yaml").write_text(textwrap.dedent(text).replace("ROOT", str(root)))
    return [str(root / "mine.yaml"), f"folder={root / 'run'}"]


def test_check_counts_and_draws(tmp_path, capsys):
    mine(mine(tmp_path, ids=(0, 0, 0, 1, 0, 0, 2, 1)), "val", ("c",), (0, 1, 2, 255))
    check.main(configuration(tmp_path))
    text = capsys.readouterr().out
    assert "train: Folder train, 2 images" in text and "12x8" in text and "problems: 0" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "road", "62.500%", "2"] in lines and ["1", "building", "25.000%", "2"] in lines
    assert ["255", "ignore", "25.000%", "1"] in lines and "never occur" not in text
    for name in ("train", "val", "augmented"):
        drawn = tmp_path / "run" / "check" / f"{name}.png"
        assert str(drawn) in text and read_image(drawn).std() > 10


def test_check_measures_the_classes_of_the_label_space(tmp_path, capsys):
    with_lists(tmp_path)
    space = "{up: [Sky], down: [Bicyclist], far: []}"
    (tmp_path / "c.yaml").write_text(
        f"data: {{workers: 0, val: {{name: camvid.CamVid, label_space: {space}}}}}"
    )
    check.main([str(tmp_path / "c.yaml"), f"data.root={tmp_path}", f"folder={tmp_path / 'run'}"])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "up", "37.500%", "2"] in lines and ["1", "down", "37.500%", "2"] in lines
    assert "never occur: far" in text and "problems: 0" in text


def test_check_takes_suspicious_labels_for_problems(tmp_path, capsys):
    for split in ("train", "val"):
        mine(tmp_path, split, ids=(0, 255, 255))
    arguments = configuration(tmp_path)
    two = [f"data.{key}.classes=[bg, fg]" for key in ("train", "val")]
    with pytest.raises(DataError, match=r"^4 problems in 4 samples; see above$"):
        check.main([*arguments, *two])
    text = capsys.readouterr().out
    assert "    val: classes that never occur: fg (1 of 2)\n    val: 62.5% of the pixels" in text
    assert text.count("need folder.Folder with id_map: {0: bg, 255: fg}") == 2
    mapped = [f"data.{key}.id_map={{0: bg, 255: fg}}" for key in ("train", "val")]
    check.main([*arguments, *two, *mapped])
    assert "never occur" not in capsys.readouterr().out
    with pytest.raises(DataError, match=r"data.val has labels: false"):
        check.main([*arguments, "data.val.labels=false"])


def test_check_says_which_pictures_it_reads(tmp_path, capsys):
    mine(mine(tmp_path), "val", ("c",))
    copies = styled(tmp_path / "new", ["a.png", "b.png"])
    check.main([*configuration(tmp_path), f"data.train.stylised={copies}"])
    assert f"2 stylised copies, such as {copies}/a.png" in capsys.readouterr().out


def test_check_collects_problems_names_them_and_fails(tmp_path, capsys):
    mine(mine(tmp_path, names=("a", "b", "c")), "val")
    save(tmp_path / "labels" / "train" / "b.png", rows(0, 9))
    save(tmp_path / "labels" / "val" / "a.png", np.zeros((5, 5)))
    with pytest.raises(DataError, match="2 problems in 5 samples"):
        check.main(configuration(tmp_path))
    text = capsys.readouterr().out
    assert text.count("problems: 1") == 2
    assert "train/b.png holds the ids [9]" in text and "val/a.png is 5x5" in text


def test_check_ends_with_one_line_for_mistakes(tmp_path, capfd, monkeypatch):
    for arguments, says in (
        (["missing.yaml"], "missing.yaml"),
        (configuration(tmp_path), "no folder"),
        ([*configuration(tmp_path), "data.train.clases=[a]"], "did you mean 'classes'"),
    ):
        monkeypatch.setattr("sys.argv", ["check", *arguments])
        with pytest.raises(SystemExit) as stopped:
            check.run(check.main, check.__doc__)
        said = capfd.readouterr().err
        assert re.match(f"error: .*{says}", said) and said.count("\n") == 1
        assert stopped.value.code == 1
