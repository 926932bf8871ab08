"""A run of two stages may be killed at any moment: before each change of a checkpoint or of stored labels its folder is
copied, as a kill would leave it, and a run that goes on from the copy must end the same."""

import functools
import os
import shutil
from pathlib import Path

import pytest

from tests.runs import SERVER, TINY_UDA, assert_same_state, last, run, work
from tests.soak import STORED

CALLS = ("replace", "unlink", "remove", "rename", "rmdir")
OVERRIDES = (
    *STORED,
    "train.iters=2",
    "data.workers=0",
    "data.augment.crop=[25, 37]",
    "data.train.size=[32, 48]",
    "data.target.length=3",
    "data.monitor={name: none}",
    "data.val={name: none}",
    "data.test={}",
    "eval.pictures=0",
    "checkpoint={every: 1, keep: 1}",
)


def copied(folder, copies, arguments, output):
    """In a process of its own: the script, with a copy of its folder before each change of what a resumed run needs."""
    changes = []

    def wrap(name, function):
        @functools.wraps(function)
        def call(path, *args, **kwargs):
            what = " ".join(str(argument) for argument in (path, *args))
            if ".pt" in what or "maps" in what or kwargs.get("dir_fd") is not None:
                shutil.copytree(folder, Path(copies) / str(len(changes)))
                changes.append(f"{name} {what}")
            return function(path, *args, **kwargs)

        setattr(os, name, call)

    for name in CALLS:
        wrap(name, getattr(os, name))
    work(0, 1, "0", False, TINY_UDA, arguments, output, None)
    (Path(copies) / "changes.txt").write_text("\n".join(changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "copies").mkdir()
    arguments = [TINY_UDA, f"folder={folder / 'run'}", *OVERRIDES]
    places = [str(folder / name) for name in ("run", "copies")]
    process = SERVER.Process(target=copied, args=(*places, arguments, str(folder / "output.txt")))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    return folder / "copies", last(folder / "run")


@pytest.mark.parametrize("part", range(4))
def test_a_kill_at_every_change_of_a_checkpoint_loses_nothing(tmp_path, whole, part):
    copies, expected = whole
    changes = (copies / "changes.txt").read_text().splitlines()
    assert len(changes) >= 8 and any("stage_source" in change for change in changes), changes
    for number in range(part, len(changes), 4):
        folder = tmp_path / str(number)
        shutil.copytree(copies / str(number), folder)
        code, output = run(folder, *OVERRIDES, config=TINY_UDA)
        assert code == 0, (changes[number], output)
        found = last(folder)
        assert_same_state(found, expected)
        assert found["step"] == expected["step"], changes[number]
        assert not list(folder.glob("*.tmp.*")), changes[number]
