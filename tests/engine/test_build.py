"""Building: what a component is given, and mistakes that are named."""

import sys

import pytest

from engine import build as building
from engine.build import build
from engine.config import ConfigError

PARTS = """
from typing import Annotated, Literal
import torch

class Simple:
    def __init__(self, *, width: int = 8, rate: float = 0.5, mode: Literal["soft", "hard"] = "soft", crop: list = (),
                 path: str | None = None, num_classes=None, seed=0):
        self.options = dict(width=width, rate=rate, mode=mode, crop=crop, path=path, num_classes=num_classes, seed=seed)

class Needs:
    def __init__(self, *, length: float, num_classes):
        self.length, self.num_classes = length, num_classes

class Picky:
    def __init__(self, *, size: int = 1):
        if size < 1:
            raise ValueError(f"size must be positive, not {size}")

class Base:
    def __init__(self, *, root, split: Annotated[str, "[1, 9]"] = "train", seed=0):
        self.options = dict(root=root, split=split, seed=seed)

class Derived(Base):
    def __init__(self, *, time: Literal["day", "night"] = "day", **options):
        super().__init__(**options)

class Closed(Base):
    def __init__(self, *, root):
        super().__init__(root=root)

class Bare(torch.nn.Module):
    pass

def function():
    pass
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A package `parts` with the module `parts.thing`, allowed for components during one test."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "thing.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(building, "PACKAGES", (*building.PACKAGES, "parts"))
    yield "parts"
    for name in [name for name in sys.modules if name.split(".")[0] == "parts"]:
        del sys.modules[name]


def test_build_passes_options_and_only_the_context_that_is_asked_for(parts):
    made = build(parts, {"name": "thing.Simple", "width": 3}, num_classes=11, in_channels=64)
    assert (
        made.options["width"] == 3
        and made.options["num_classes"] == 11
        and made.options["rate"] == 0.5
    )
    assert (
        build(parts, {"name": "thing.Simple", "num_classes": 5}, num_classes=11).options[
            "num_classes"
        ]
        == 5
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "think.Simple"}, "parts has no module 'think'; did you mean 'thing'"),
        ({"name": "zzz.Simple"}, "parts has no module 'zzz'; known here: thing"),
        ({"name": "thing.Simpel"}, r"parts\.thing has no class 'Simpel'; did you mean 'Simple'"),
        (
            {"name": "thing.function"},
            r"parts\.thing has no class 'function'; known here: Simple, Needs",
        ),
        (
            {"name": "thing.Simple", "widht": 3},
            r"thing\.Simple has no option 'widht'; did you mean 'width'",
        ),
        (
            {"name": "thing.Simple", "width": "wide"},
            r"thing\.Simple: option 'width' must be an int, not 'wide'",
        ),
        ({"name": "thing.Simple", "width": 2.0}, "'width' must be an int, not 2.0"),
        ({"name": "thing.Simple", "width": True}, "'width' must be an int, not true"),
        ({"name": "thing.Simple", "rate": "two"}, "'rate' must be a float, not 'two'"),
        (
            {"name": "thing.Simple", "mode": "sofft"},
            "'mode' must be soft or hard, not 'sofft'",
        ),
        ({"name": "thing.Simple", "crop": 3}, "'crop' must be a list, not 3"),
        ({"name": "thing.Simple", "path": 3}, "'path' must be a string or null, not 3"),
        ({"name": "thing.Needs"}, r"thing\.Needs needs the options length, num_classes"),
        ({"name": "thing.Needs", "num_classes": 3}, r"thing\.Needs needs the option length"),
        ({"name": "thing.Derived", "root": "x", "options": 3}, "has no option 'options'"),
        ({"name": "thing.Derived", "root": "x", "slpit": "a"}, "did you mean 'split'"),
        ({"name": "thing.Derived", "root": "x", "zz": 1}, "known here: root, split, seed, time"),
        ({"name": "thing.Derived", "root": "x", "split": ""}, "'split' must be a string of length"),
        ({"name": "thing.Derived", "time": "night"}, r"thing\.Derived needs the option root"),
        ({"name": "thing.Closed", "root": "x", "split": "val"}, "has no option 'split'"),
        ({"name": "thing.Bare", "kwargs": 3}, r"thing\.Bare has no option 'kwargs'"),
        ({"name": "thing.Picky", "size": 0}, r"thing\.Picky: size must be positive, not 0"),
        ({"width": 3}, "parts: a component needs 'name: module.Class'"),
        ({"name": 3}, "parts: a component needs 'name: module.Class'"),
        ("thing.Simple", "parts: a component needs 'name: module.Class', got 'thing.Simple'"),
        ({"name": "none"}, "names no component of parts"),
    ],
)
def test_a_component_that_cannot_be_built_says_why(parts, spec, message):
    with pytest.raises(ConfigError, match=message):
        build(parts, spec)


@pytest.mark.parametrize(
    "options", [{"rate": 2}, {"mode": "hard"}, {"crop": [1, 2]}, {"path": None}, {"path": "x"}]
)
def test_options_of_the_annotated_type_are_accepted(parts, options):
    assert build(parts, {"name": "thing.Simple", **options}).options.items() >= options.items()


def test_a_constructor_with_options_gets_those_of_its_base_and_the_context(parts):
    made = build(parts, {"name": "thing.Derived", "split": "val"}, root="x", seed=3, strides=[4])
    assert made.options == {"root": "x", "split": "val", "seed": 3}


def test_a_class_without_a_constructor_needs_no_options(parts):
    assert type(build(parts, {"name": "thing.Bare"}, num_classes=3)).__name__ == "Bare"


@pytest.mark.parametrize(
    "package, name, message",
    [
        ("models.classifiers", "linaer.Linear", "no module 'linaer'; did you mean 'linear'"),
        ("models.classifiers", "linear.Lineer", "no class 'Lineer'; did you mean 'Linear'"),
        ("losses", "os.system", "losses has no module 'os'"),
        ("losses", "..evil.X", "must be 'module.Class' of the package losses"),
        ("losses", "a.b.c", "must be 'module.Class'"),
        ("losses", "occl", "must be 'module.Class'"),
        ("losses", "occl.OCCL()", "must be 'module.Class'"),
        ("os", "path.PurePath", "must be 'module.Class'"),
        ("engine", "config.Config", "must be 'module.Class'"),
    ],
)
def test_only_classes_of_our_packages_can_be_named(package, name, message):
    with pytest.raises(ConfigError, match=message):
        build(package, {"name": name})


@pytest.mark.parametrize(
    "package, spec, message",
    [
        (
            "models.classifiers",
            {"name": "cbp.CBP", "length": "two"},
            r"cbp\.CBP: option 'length' must be a float above 0, not 'two'",
        ),
        (
            "models.backbones",
            {"name": "resnet.ResNet", "depth": 20},
            "'depth' must be 18, 34, 50, 101 or 152, not 20",
        ),
        (
            "losses",
            {"name": "occl.OCCL", "temprature": 0.07},
            "has no option 'temprature'; did you mean 'temperature'",
        ),
        ("losses", {"name": "occl.OCCL"}, "occl.OCCL needs the option num_classes"),
        (
            "losses",
            {"name": "occl.OCCL", "temperature": 0},
            "'temperature' must be a float above 0",
        ),
        (
            "losses",
            {"name": "cross_entropy.CrossEntropy", "ohem": 7},
            r"'ohem' .* in \[0, 1\], not 7",
        ),
        (
            "datasets",
            {"name": "transforms.Augment", "crop": [0, 5]},
            r"'crop\.0' must be an int in",
        ),
        (
            "datasets",
            {"name": "transforms.Augment", "crop": [5]},
            "'crop' must be a list of length 2",
        ),
        (
            "datasets",
            {"name": "transforms.Augment", "crop": [5, 5], "scale": [2, 0.5]},
            r"scale must be \[low, high\], not \[2, 0\.5\]",
        ),
        (
            "datasets",
            {"name": "transforms.Augment", "crop": [5, 5], "flip": 3},
            r"'flip' .*, not 3",
        ),
        (
            "datasets",
            {"name": "toy.Toy", "length": 0},
            r"'length' must be an int in \[1, 1000000\]",
        ),
        ("datasets", {"name": "toy.Toy", "length": 10**12}, "'length' must be an int in"),
        ("datasets", {"name": "toy.Toy", "size": [0, 0]}, r"'size\.0' must be an int in"),
        (
            "datasets",
            {"name": "toy.Toy", "augment": {"name": "x.Y"}},
            "'augment' must be a Callable",
        ),
        ("datasets", {"name": "toy.Toy", "seed": -1}, "'seed' must be an int in"),
        ("datasets", {"name": "base.DataError"}, "has no class 'DataError'"),
        (
            "datasets",
            {"name": "mixers.ColorBlur", "color": [1]},
            "'color' must be a list of length 4",
        ),
        (
            "models.prototypes",
            {"name": "centroids.Centroids", "momentum": 5},
            r"in \[0, 1\), not 5",
        ),
        (
            "models.classifiers",
            {"name": "cbp.CBP", "length": 0},
            "'length' must be a float above 0",
        ),
        (
            "models.decoders",
            {"name": "fcn.FCN", "width": 10**9},
            r"'width' must be an int in \[1, 16384",
        ),
        (
            "models.decoders",
            {"name": "daformer.DAFormer", "rates": []},
            "'rates' must be a list of length",
        ),
        ("models.backbones", {"name": "mit.MiT", "drop_path": 1.0}, r"'drop_path' .* in \[0, 1\)"),
    ],
)
def test_mistakes_in_real_components(package, spec, message):
    with pytest.raises(ConfigError, match=message):
        build(package, spec)


@pytest.mark.parametrize(
    "package, spec, face",
    [
        ("datasets", {"name": "mixers.ClassMix"}, "SegmentationData"),
        ("datasets", {"name": "transforms.Augment", "crop": [4, 4]}, "SegmentationData"),
        ("datasets", {"name": "toy.Toy"}, "Augment"),
        ("datasets", {"name": "style.FDA"}, "Mixer"),
        ("datasets", {"name": "mixers.ClassMix"}, "Style"),
        ("losses", {"name": "self_training.TeacherConfidence"}, "Loss"),
        ("losses", {"name": "entropy.Entropy"}, "Labeler"),
        ("losses", {"name": "occl.OCCL"}, "Labeler"),
    ],
)
def test_a_part_in_the_place_of_another_kind_is_an_error(package, spec, face):
    with pytest.raises(
        ConfigError, match=rf"{spec['name']} is no {face}: it belongs to another key"
    ):
        build(package, spec, face, num_classes=3)
