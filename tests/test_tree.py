"""The rule of tests/__init__.py: a test file is named after the module or the folder that it tests."""

import pytest

from tests.runs import ROOT

EXCEPTIONS = {
    "faults/test_faults.py": "real faults in runs of every script",
    "faults/test_kills.py": "real faults in runs of every script",
    "test_accumulation.py": "what train.accumulate changes in every method",
    "test_combinations.py": "every labeler with every prototype",
    "test_parts.py": "what every part promises",
    "test_readme.py": "README.md and docs/",
    "test_tree.py": "this rule",
}


def sources(name):
    """Where the source of a test file may lie."""
    path = ROOT / name.replace("test_", "", 1)
    return path, path.with_name(f"_{path.name}"), path.with_suffix("")


def follows_the_rule(name):
    return any(path.is_file() or path.is_dir() for path in sources(name))


def test_every_test_file_names_its_source():
    names = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    strangers = {name.as_posix() for name in names if not follows_the_rule(name.as_posix())}
    assert len(names) > 80 and strangers == {*EXCEPTIONS}


@pytest.mark.parametrize(
    "name, follows",
    [
        ("models/classifiers/test_gmmseg.py", True),
        ("models/prototypes/test_sinkhorn.py", True),
        ("models/test_backbones.py", True),
        ("test_train_uda.py", True),
        ("test_gmmseg.py", False),
        ("losses/test_losses.py", False),
    ],
)
def test_modules_and_folders_are_sources(name, follows):
    assert follows_the_rule(name) == follows
