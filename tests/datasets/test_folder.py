"""Own data: ids, names, colours, suffixes, lists, and mistakes in them."""

import textwrap
from pathlib import Path

import numpy as np
import pytest

from datasets import folder
from datasets.base import DataError
from datasets.folder import Folder, distinct_colors
from engine.build import build
from engine.config import load
from engine.errors import UserError
from tests.datasets.files import CLASSES, column, mine, picture, rows, save


def test_folder_colours_are_read_before_the_label_space(tmp_path):
    save(tmp_path / "images" / "train" / "a.jpg", picture())
    save(tmp_path / "labels" / "train" / "a.png", rows((9, 0, 0), (0, 9, 0), (0, 0, 0)))
    options = {"classes": ["x", "y"], "palette": [[9, 0, 0], [0, 9, 0]], "color_labels": True}
    data = Folder(root=tmp_path, label_space={"v": ["y"], "u": ["x"]}, **options)
    assert column(data[0]["label"])[:3] == [1, 0, 255] and data.PALETTE == ((0, 9, 0), (9, 0, 0))


# --- Folder --------------------------------------------------------------------------------------------------------


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
    found = [(Path(image).name, Path(label).name) for image, label in dataset.samples]
    assert found == [("a.png", "a-mask.png"), ("b.JPG", "b-mask.png")]


def test_folder_list_chooses_and_orders_images(tmp_path):
    mine(tmp_path, "train", ("x/a", "x/b", "c"))
    (tmp_path / "train.txt").write_text("c\n\n  x/a  \n")
    options = {"root": tmp_path, "classes": CLASSES, "list": "{split}.txt"}
    assert [Path(image).stem for image, _ in Folder(**options).samples] == ["c", "a"]
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
        ({"classes": ["a", " "]}, "the class ' ' is no name"),
        ({"classes": []}, r"'classes' must be a list of length 1 to 253, .* not \[\]"),
        ({"classes": [f"class {i}" for i in range(254)]}, "'classes' must be .* 1 to 253"),
        ({"palette": [[1, 2, 3]]}, "palette must hold 3 colours, not 1"),
        ({"palette": [[1, 2, 3], [1, 2, 300], [0, 0, 0]]}, "'palette' must be .* null, not"),
        ({"color_labels": True}, "color_labels needs a palette"),
        ({"id_map": {0: "lorry"}}, r"0 'lorry'; classes: road, building, car, ignore"),
        ({"id_map": {"7": 0}}, r"id_map cannot make '7'"),
        ({"id_map": {0: 3}}, r"id_map cannot make 0 3"),
        ({"id_map": {0: True}}, r"id_map cannot make 0 True"),
        ({"id_map": {True: 0}}, r"id_map cannot make True 0"),
        ({"id_map": {0: ["road"]}}, r"id_map cannot make 0 \['road'\]"),
        ({"ignore": [["road"]]}, "'ignore.0' must be a string"),
        ({"image_suffix": [".jpg", 5]}, "'image_suffix' must be"),
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
