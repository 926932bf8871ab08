"""What data sets share, each on tiny files in its official format: labels that are not read,
classes that are ignored, lists, configurations.
"""

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import datasets
from datasets import acdc, bdd100k, check, cityscapes, cocostuff, gta5, synthia
from datasets.acdc import ACDC
from datasets.ade20k import ADE20K
from datasets.base import DataError, SegmentationData
from datasets.bdd100k import BDD100K
from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.cocostuff import CocoStuff10k, CocoStuff164k
from datasets.dark_zurich import DarkZurich
from datasets.folder import Folder
from datasets.gta5 import GTA5
from datasets.labelmefacade import LabelMeFacade
from datasets.mapillary import Mapillary
from datasets.statistics import class_counts
from datasets.synthia import SUBSETS, Synthia
from datasets.toy import Toy
from datasets.voc import VOC
from engine.build import build
from engine.config import load
from engine.errors import UserError
from tests.datasets.files import CLASSES, LAYOUTS, laid_out, shows, styled
from tests.datasets.published import (
    AS_CAMVID,
    COCO_IDS,
    IN_CAMVID,
    city_frame,
    drawn_frame,
    drive_frame,
    game_frame,
    grey,
    photo,
    picture,
    row,
    scene,
    stems,
    vista,
    voc_image,
    voc_list,
    weather_frame,
    zurich_frame,
)
from tests.runs import ROOT


def test_the_lists_of_data_sets_may_begin_with_a_byte_order_mark(tmp_path):
    lists = {
        CamVid: ("lists/mine.txt", {"images/a.jpg", "labels/a.png"}, "mine", {}),
        GTA5: ("lists/mine.txt", {"images/a.png", "labels/a.png"}, "mine", {}),
        VOC: ("ImageSets/Segmentation/mine.txt", {"JPEGImages/a.jpg", "SegmentationClass/a.png"}, "mine", {}),
        Folder: ("lists/mine.txt", {"images/a.jpg", "labels/a.png"}, "mine",
                 {"classes": ["x"], "list": "lists/{split}.txt", "image_dir": "images", "label_dir": "labels"}),
    }  # fmt: skip
    for cls, (listing, files, split, options) in lists.items():
        root = tmp_path / cls.__name__
        for name in [listing, *files]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        (root / listing).write_bytes(b"\xef\xbb\xbfa\r\n")
        assert len(cls(root=root, split=split, **options)) == 1, cls
        (root / listing).write_bytes("a\n".encode("utf-16"))
        with pytest.raises(UserError, match=r"mine\.txt is not text in UTF-8 but in UTF-16"):
            cls(root=root, split=split, **options)


@pytest.mark.parametrize("data, write", [(GTA5, game_frame), (Synthia, drawn_frame)])
def test_all_is_every_image_and_lists_are_splits(tmp_path, data, write):
    for stem in ("0003", "0001", "0002"):
        write(tmp_path, stem)
    assert (
        stems(data(root=tmp_path))
        == stems(data(root=tmp_path, split="all"))
        == ["0001", "0002", "0003"]
    )
    with pytest.raises(
        DataError, match=rf"{data.__name__} has no split 'train' and no list .*; there are: all$"
    ):
        data(root=tmp_path, split="train")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "few.txt").write_text("0003\n\n0001\n")
    few = data(root=tmp_path, split="few")
    assert stems(few) == ["0003", "0001"] and few.samples[0][1].name == "0003.png"
    with pytest.raises(DataError, match=r"no split 'train' and no list .*; there are: all, few$"):
        data(root=tmp_path, split="train")
    (tmp_path / "lists" / "few.txt").write_text("0003\n0009\n")
    with pytest.raises(DataError, match=r"1 of 2 images do not exist, such as .*0009.png"):
        data(root=tmp_path, split="few")
    for label in tmp_path.rglob("L*/0002.png" if data is Synthia else "labels/0002.png"):
        label.unlink()
    with pytest.raises(DataError, match=r"1 of 3 labels do not exist, such as .*/0002.png"):
        data(root=tmp_path)


# --- what all of them share ------------------------------------------------------------------------------------------


WRITERS = {
    Cityscapes: lambda root: city_frame(root, "ulm_000000_000019"),
    GTA5: lambda root: game_frame(root, "00001"),
    Synthia: lambda root: drawn_frame(root, "0000001"),
    ACDC: lambda root: [
        weather_frame(root, c, "GP1_frame_000001", split="train") for c in acdc.CONDITIONS
    ],
    BDD100K: lambda root: drive_frame(root, "a", newer=True, split="train"),
    Mapillary: lambda root: vista(root, split="training"),
}


@pytest.mark.parametrize("data", WRITERS)
def test_unlabelled_targets_never_look_at_labels(tmp_path, data, monkeypatch):
    WRITERS[data](tmp_path)
    for path in [
        p for p in tmp_path.rglob("*.png") if {"gtFine", "labels", "GT", "gt"} & {*p.parts}
    ]:
        path.unlink()
    monkeypatch.setattr(cityscapes, "existing", None)  # a call would fail
    monkeypatch.setattr(gta5, "existing", None)
    monkeypatch.setattr(acdc, "existing", None)
    monkeypatch.setattr(bdd100k, "existing", None)
    unlabelled = data(root=tmp_path, labels=False)
    assert len(unlabelled) > 0 and all(label is None for _, label in unlabelled.samples)
    assert all(label is None for _, label in unlabelled.pairs())
    assert {*row(unlabelled)} == {255}


@pytest.mark.parametrize("data", WRITERS)
def test_all_of_them_can_ignore_classes(tmp_path, data):
    WRITERS[data](tmp_path)
    plain = row(data(root=tmp_path))
    assert (
        row(data(root=tmp_path, ignore=["road"])) == [255 if i == 0 else i for i in plain] != plain
    )


OTHERS = {
    ADE20K: ("training", scene),
    CocoStuff10k: (
        "train2014",
        lambda root: photo(root, "a", "train2014", range(172), suffix="_labelTrainIds"),
    ),
    CocoStuff164k: (
        "val2017",
        lambda root: photo(root, "a", "val2017", COCO_IDS, "stuffthingmaps"),
    ),
    VOC: ("train", lambda root: [voc_image(root, "a"), voc_list(root, "train", "a")]),
    DarkZurich: ("val", lambda root: zurich_frame(root, "val", "night", kind="labelTrainIds")),
}


@pytest.mark.parametrize("data", OTHERS)
def test_others_ignore_classes_and_never_look_at_labels_without_them(tmp_path, data):
    split, write = OTHERS[data]
    write(tmp_path)
    plain = row(data(root=tmp_path, split=split))
    assert row(data(root=tmp_path, split=split, ignore=[data.CLASSES[1]])) == [
        255 if i == 1 else i for i in plain
    ]
    assert 1 in plain and {*plain} >= {*range(len(data.CLASSES))}
    for path in tmp_path.rglob("*.png"):
        if "rgb_anon" not in path.parts:
            path.unlink()
    with pytest.raises(DataError, match="1 of 1 labels do not exist"):
        data(root=tmp_path, split=split)
    assert {*row(data(root=tmp_path, split=split, labels=False))} == {255}


def test_maps_to_another_label_space_compose_with_those_of_the_data_sets(tmp_path):
    for data in (BDD100K, Mapillary):
        WRITERS[data](tmp_path / data.__name__)
        own = row(data(root=tmp_path / data.__name__))
        assert row(data(root=tmp_path / data.__name__, label_space=AS_CAMVID)) == [
            255 if i == 255 else IN_CAMVID[i] for i in own
        ]


# --- configurations --------------------------------------------------------------------------------------------------


def configured(tmp_path, *bases):
    text = f"base: [{', '.join(str(ROOT / 'configs' / 'base' / f'{b}.yaml') for b in bases)}]\n"
    (tmp_path / "x.yaml").write_text(text)
    return load(tmp_path / "x.yaml", [])


def test_configurations_build_the_data_sets_that_they_name(tmp_path):
    for split in ("train", "val"):
        city_frame(tmp_path, "ulm_000000_000019", split=split)
    for condition in acdc.CONDITIONS:
        weather_frame(tmp_path, condition, "GP1_frame_000001")
    game_frame(tmp_path, "00001")
    drawn_frame(tmp_path, "0000001")
    found = {}
    for base in ("cityscapes", "gta5", "synthia", "acdc"):
        data = configured(tmp_path, base).data
        specs = {"train": data.train, "val": data.val, **data.test}
        for name, spec in specs.items():
            if spec["name"] != "none":
                assert spec["root"] == f"data/{base}"
                made = build("datasets", {**spec, "root": str(tmp_path)}, root=None, seed=0)
                found[base, name] = type(made), made.split, len(made)
    assert found == {
        ("cityscapes", "train"): (Cityscapes, "train", 1),
        ("cityscapes", "val"): (Cityscapes, "val", 1),
        ("cityscapes", "cityscapes"): (Cityscapes, "val", 1),
        ("gta5", "train"): (GTA5, "all", 1),
        ("synthia", "train"): (Synthia, "all", 1),
        **{("acdc", f"acdc_{condition}"): (ACDC, "val", 1) for condition in acdc.CONDITIONS},
    }
    conditions = {
        name: spec["condition"] for name, spec in configured(tmp_path, "acdc").data.test.items()
    }
    assert conditions == {f"acdc_{c}": c for c in acdc.CONDITIONS}


def test_configurations_can_be_joined(tmp_path):
    cfg = configured(tmp_path, "cityscapes", "synthia", "acdc")
    assert cfg.data.train == {"name": "synthia.Synthia", "split": "all", "root": "data/synthia"}
    assert cfg.data.val["name"] == "cityscapes.Cityscapes"
    assert {*cfg.data.test} == {"cityscapes", "acdc_fog", "acdc_night", "acdc_rain", "acdc_snow"}
    assert cfg.eval.subsets == synthia.SUBSETS
    assert configured(tmp_path, "cityscapes", "gta5").data.train == {
        "name": "gta5.GTA5",
        "split": "all",
        "root": "data/gta5",
    }


PHOTOGRAPHS = {
    "ade20k": lambda root: [scene(root), scene(root, "ADE_val_00000001", split="validation")],
    "cocostuff10k": lambda root: [
        photo(root, "a", split, range(172), suffix="_labelTrainIds")
        for split in ("train2014", "test2014")
    ],
    "voc": lambda root: [
        [voc_image(root, split), voc_list(root, split, split)] for split in ("train_aug", "val")
    ],
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_read_augmented_counted_and_drawn_as_configured(
    tmp_path, name, capsys, monkeypatch
):
    PHOTOGRAPHS[name](tmp_path / "data")
    monkeypatch.setattr(check, "tqdm", lambda items, **_: items)
    options = [f"data.root={tmp_path / 'data'}", f"folder={tmp_path / 'run'}", "data.workers=0"]
    check.main([str(ROOT / "configs" / "base" / f"{name}.yaml"), *options])
    printed, classes = (
        capsys.readouterr().out,
        {"ade20k": 150, "cocostuff10k": 171, "voc": 21}[name],
    )
    assert (
        printed.count("problems: 0") == 3
        and f" {classes - 1:3} " in printed
        and "never occur" not in printed
    )
    drawn = {path.name for path in (tmp_path / "run" / "check").iterdir()}
    assert drawn == {"train.png", "val.png", f"test.{name}.png", "augmented.png"}
    cfg = configured(tmp_path, name)
    sample = build(
        "datasets",
        cfg.data.train,
        root=str(tmp_path / "data"),
        augment=build("datasets", cfg.data.augment),
    )
    assert sample[0]["image"].shape == (3, 512, 512) and cfg.eval.short_side == 512


def test_counts_are_kept_apart_by_data_set_split_ids_and_label_space(tmp_path):
    """One folder that two readers can read, in two splits, with two meanings of its ids."""
    photo(tmp_path / "a", "x", "val2017", [1, 1, 12, 255])
    photo(tmp_path / "a", "y", "train2017", [1, 2, 12, 255])
    space = {"one": ["bicycle"], "others": [n for n in cocostuff.CLASSES if n != "bicycle"]}
    options = [
        (CocoStuff164k, {"split": "val2017"}, [0, 2]),
        (CocoStuff164k, {"split": "train2017"}, [0, 1, 1]),
        (CocoStuff164k, {"split": "val2017", "ignore": ["bicycle"]}, []),
        (CocoStuff164k, {"split": "val2017", "label_space": space}, [2, 1]),
        (BDD100K, {"split": "val"}, []),
    ]
    grey(tmp_path / "a" / "labels" / "val" / "x_train_id.png", [18, 255])
    picture(tmp_path / "a" / "images" / "val" / "x.jpg", 2)
    keys = set()
    for reader, keywords, starts in options * 2:
        data = reader(root=tmp_path / "a", **keywords)
        counts = class_counts(data, tmp_path / "cache")
        keys.add(data.label_key())
        assert (
            counts.shape == (1, len(data.CLASSES))
            and (counts[0, : len(starts)] == 4 * np.array(starts)).all()
        )
    assert len(keys) == len(options) == len([*(tmp_path / "cache").iterdir()])


# --- the classes of another label space ----------------------------------------------------------------------------


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


SPARE = 50  # seeds of the pictures that stand for stylised ones


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
