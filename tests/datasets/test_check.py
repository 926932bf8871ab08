"""python -m datasets.check: what it counts, draws and takes for a problem."""

import re
import textwrap

import numpy as np
import pytest

from datasets import check
from datasets.base import DataError, read_image
from tests.datasets.files import mine, rows, save, styled, with_lists


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
