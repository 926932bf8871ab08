"""What README and the configurations promise: commands that exist, examples that load, networks that can be built."""

import re
from pathlib import Path

import pytest
import torch

from engine.config import load, read_yaml
from models.build import build_segmentor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BASES = sorted((ROOT / "configs" / "base").glob("*.yaml"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_second_command_is_what_ci_runs():
    command = next(block for block in blocks("bash") if "pytest" in block)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt pytest pytest-xdist && pytest -n 2" in command
    assert "pip install -q -r requirements.txt pytest pytest-xdist && pytest -n 2" in ci


def test_nothing_needs_a_window():
    """The usual opencv-python needs the system's libGL for its windows, and servers have none."""
    packages = ("", "datasets/", "engine/", "losses/", "models/**/", "benchmarks/")
    files = [path for package in packages for path in ROOT.glob(f"{package}*.py")]
    code = "".join(path.read_text("utf-8") for path in files)
    assert "cv2.resize(" in code and not re.findall(r"cv2\.(imshow|\w*Window|waitKey)", code)
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert "opencv-python-headless" in requirements and "opencv-python" not in requirements


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:configs|docs|benchmarks)/[\w/.]+\.(?:yaml|png|md)", README)))
)
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists() or path == "configs/mine.yaml"


def contains(whole, part):
    """Is every key of `part` in `whole` with the same value?"""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and contains(whole[key], part[key]) for key in part
        )
    return whole == part


def test_the_configuration_that_the_readme_explains_is_the_real_one():
    printed = read_yaml(blocks("yaml")[0], "README")
    printed.pop("base")
    real = load(ROOT / "configs" / "camvid" / "resnet18_cbp_occl.yaml")
    assert all(contains(real[key], value) for key, value in printed.items()), printed


def test_the_recipe_for_own_data_loads(tmp_path):
    recipe = next(block for block in blocks("yaml") if "configs/mine.yaml" in block)
    (tmp_path / "mine.yaml").write_text(recipe.replace("[base/", f"[{ROOT}/configs/base/"))
    cfg = load(tmp_path / "mine.yaml")
    assert (
        cfg.data.train["classes"] == ["field", "water", "forest"] and cfg.data.val["split"] == "val"
    )


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.name)
def test_what_experiments_start_from_loads_and_its_network_can_be_built(path):
    cfg = load(path)
    with torch.device("meta"):
        build_segmentor(cfg.model, [str(k) for k in range(19)], pretrained=False)
