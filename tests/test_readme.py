"""What README, docs/ and the configurations promise: files, links, commands and names that exist,
examples that load, networks that can be built."""

import ast
import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from engine.accepted import check_sections
from engine.config import ConfigError, defaults, load, override, read_yaml
from eval import OWN
from models.build import build_segmentor
from tests.runs import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BASES = sorted((ROOT / "configs" / "base").glob("*.yaml"))
PACKAGES = ("datasets", "losses", "models")
# What a reader writes, and what stands for any name.
INVENTED = {
    "configs/mine.yaml",
    "configs/mine_dino.yaml",
    "benchmarks/grids/NAME.yaml",
    "tests/A/test_B.py",
    "module.Class",
}
pages = pytest.mark.parametrize("page", PAGES)


def blocks(language, text=README):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [block for name, block in found if name == language]


def expanded(path):
    """models/{a,b}.py -> models/a.py, models/b.py."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def files_named(text):
    """Paths of the tree, as far as they are written out."""
    found = re.findall(
        r"(?<![\w/])(?:configs|docs|benchmarks|engine|models|losses|datasets|tests)/[\w/.{},-]*\w",
        text,
    )
    return {path for name in found for path in expanded(name)}


def anchors(text):
    """What GitHub makes of the headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    """Links to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        if not path.is_file() or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            broken.append(link)
    return broken


def missing_files(text):
    return {path for path in files_named(text) if not (ROOT / path).exists()} - INVENTED


def classes(package):
    """{module.Class} of the files below a package, read and not imported."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield f"{path.stem}.{node.name}"


COMPONENTS = {name for package in PACKAGES for name in classes(package)}


def missing_components(text):
    named = set(re.findall(r"(?:`|name: |name=|, )([a-z]\w*\.[A-Z]\w+)(?![\w.=])", text))
    return named - COMPONENTS - INVENTED


def options(pattern):
    """Keywords of all constructors in these files, and what every entry of `losses` has."""
    arguments = (
        node.args.kwonlyargs
        for path in ROOT.glob(pattern)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    return {argument.arg for found in arguments for argument in found} | {"name", "weight"}


def missing_keys(text):
    """Keys with their section in front, such as model.classifier.length, that do not exist."""
    schema = defaults()
    text = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)  # attributes of objects
    named = re.findall(
        r"(?<![\w./-])(data|model|uda|dg|train|optimizer|schedule|eval|log|checkpoint)\.([a-z]\w*)",
        text,
    )
    missing = {
        f"{a}.{b}"
        for a, b in named
        if b not in (*schema[a], "py", "yaml", "txt", "md", "pt2", "onnx")
    }
    for part, key in re.findall(r"model\.(backbone|decoder|classifier)\.([a-z]\w*)", text):
        missing |= {f"model.{part}.{key}"} if key not in options(f"models/{part}s/*.py") else set()
    for loss, key in re.findall(r"losses\.([a-z]\w*)\.([a-z]\w*)", text):
        missing |= {f"losses.{loss}.{key}"} if key not in options(f"losses/{loss}.py") else set()
    return missing


def commands(text):
    """Words of every command of ours in the bash blocks."""
    for block in blocks("bash", text):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words and words[0] in ("python", "torchrun"):
                    yield words


def wrong_commands(text):
    """Commands whose script, module, configuration or overrides are not there, with the reason."""
    wrong = []
    for words in commands(text):
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if place is None and "venv" not in words:
            module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
            if importlib.util.find_spec(module) is None:
                wrong.append(f"{module}: no such module")
            continue
        if place is None:
            continue
        script, first, *rest = words[place:]
        try:
            assert (ROOT / script).is_file(), f"{script}: no such file"
            overrides = [
                word
                for word in rest
                if "=" in word and not word.startswith((*OWN, "probabilities="))
            ]
            if script.startswith("train_") and first not in ("CONFIG", "configs/mine.yaml"):
                check_sections(load(ROOT / first, overrides), Path(script).stem)
            else:
                override({}, overrides)
        except (AssertionError, ConfigError) as error:
            wrong.append(f"{script} {first}: {error}")
    return wrong


# --- all pages ------------------------------------------------------------------------------------


@pages
def test_links_lead_to_files_and_headings(page):
    assert not broken_links(page, PAGES[page])


@pages
def test_files_that_a_page_names_exist(page):
    assert not missing_files(PAGES[page])


@pages
def test_components_and_keys_that_a_page_names_exist(page):
    assert not missing_components(PAGES[page])
    assert not missing_keys(PAGES[page])


@pages
def test_commands_run_what_exists_with_keys_that_exist(page):
    assert not wrong_commands(PAGES[page])


@pages
def test_yaml_blocks_of_a_page_can_be_read(page):
    for block in blocks("yaml", PAGES[page]):
        assert isinstance(read_yaml(block, page), dict)


@pytest.mark.parametrize(
    "check, text, found",
    [
        (lambda text: broken_links("docs/data.md", text), "[a](results.md#nothing)", True),
        (lambda text: broken_links("docs/data.md", text), "[a](nothing.md)", True),
        (lambda text: broken_links("docs/data.md", text), "[a](results.md#networks)", False),
        (missing_files, "`losses/{occl,nothing}.py`", True),
        (missing_components, "`occl.Nothing`", True),
        (missing_components, "{name: nothing.OCCL}", True),
        (missing_keys, "`model.nothing.length=2`", True),
        (missing_keys, "`model.classifier.nothing=2`", True),
        (missing_keys, "`model.classifier.length=2`", False),
        (missing_keys, "`losses.occl.nothing=2`", True),
        (missing_keys, "`losses.occl.category=2`", False),
        (wrong_commands, "```bash\npython train_nothing.py CONFIG\n```", True),
        (wrong_commands, "```bash\npython -m benchmarks.nothing\n```", True),
        (wrong_commands, "```bash\npython train_uda.py configs/toy/uda_no.yaml\n```", True),
        (wrong_commands, "```bash\npython eval.py CHECKPOINT eval.flop=true\n```", True),
        (wrong_commands, "```bash\npython eval.py CHECKPOINT eval.flip=true\n```", False),
    ],
)
def test_the_checks_find_what_is_wrong(check, text, found):
    assert bool(check(text)) == found


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", PAGES[page])
        found = {((ROOT / page).parent / link).resolve() for link in links}
        waiting += [p for p in PAGES if ROOT / p in found and p not in seen]
    assert seen == {*PAGES}


def test_the_readme_is_a_door():
    assert len(README.splitlines()) <= 170 and len(README.split()) < 2000


def test_the_tree_is_the_one_that_the_docs_draw():
    tree = next(block for block in blocks("", PAGES["docs/extending.md"]) if "configs/" in block)
    scripts, configs, *_ = tree.splitlines()
    drawn = {*re.findall(r"^([a-z]+)/", tree, re.M), *re.findall(r"\w+\.py", scripts)}
    sources = {path.parts[len(ROOT.parts)] for path in ROOT.glob("[a-z]*/**/*.py")}
    sources |= {path.name for path in ROOT.glob("*.py")} - {"conftest.py"}
    assert drawn == sources - {"data", "runs"} | {"configs", "docs"}
    folders = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert {*re.findall(r"([a-z]+)/(?=[, ]|$)", configs)} == folders | {"configs"}


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_means_over_seeds_are_those_of_the_measured_tables(page):
    pair = r"(\d+\.\d+) ± (\d+\.\d+)"
    tables = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.md"))
    measured = torch.tensor([[float(x) for x in row] for row in re.findall(pair, tables)])
    printed = [[float(x) for x in row] for row in re.findall(pair, PAGES[page])]
    assert len(printed) > 10
    for row in printed:
        assert ((measured - torch.tensor(row)).abs() < 0.0501).all(1).any(), row


def test_every_grid_has_a_page_that_names_it():
    text = "".join(PAGES.values())
    assert not [p.name for p in (ROOT / "benchmarks/grids").glob("*.yaml") if p.stem not in text]


# --- commands and examples ------------------------------------------------------------------------


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


def contains(whole, part):
    """Is every key of `part` in `whole` with the same value, of a list every entry in its place?"""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and contains(whole[key], part[key]) for key in part
        )
    if isinstance(part, list) and isinstance(whole, list):
        return len(whole) == len(part) and all(contains(a, b) for a, b in zip(whole, part))
    return whole == part


def test_the_recipes_of_the_data_page_load_and_build(tmp_path):
    """Own data for adaptation, and a head on a frozen DINOv2 or DINOv3."""
    base = f"{ROOT}/configs/base/"
    mine, adapt, dinov2, dinov3 = blocks("yaml", PAGES["docs/data.md"])[:4]
    own, more = read_yaml(mine, "mine"), read_yaml(adapt, "adapt")
    own["base"], own["data"] = more["base"], own["data"] | more["data"]
    texts = {"uda": yaml.dump(own), "dino": dinov2, "dinov3": f"base: dino.yaml\n{dinov3}"}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(re.sub(r"\bbase/", base, text))
    uda = load(tmp_path / "uda.yaml")
    check_sections(uda, "train_uda")
    assert uda.data.target["classes"] == uda.data.train["classes"] and len(uda.stages) == 2
    for name in ("dino", "dinov3"):
        cfg = load(tmp_path / f"{name}.yaml")
        check_sections(cfg, "train_supervised")
        cfg.model.backbone["weights"] = "none"
        with torch.device("meta"):
            network = build_segmentor(cfg.model, cfg.data.train["classes"], pretrained=False)
        assert network.backbone.strides[0] in (14, 16) and network.decoder.channels == 256
        assert not any(p.requires_grad for p in network.backbone.parameters())


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_the_configuration_that_a_page_explains_is_the_real_one(page):
    printed = read_yaml(blocks("yaml", PAGES[page])[0], page)
    printed.pop("base")
    real = load(ROOT / "configs" / "camvid" / "resnet18_cbp_occl.yaml")
    assert len(printed) >= 4
    assert all(contains(real[key], value) for key, value in printed.items()), printed


def test_the_loop_of_the_readme_is_that_of_the_script():
    """Line by line and in order; what it leaves out, it says."""
    lines = (ROOT / "train_supervised.py").read_text("utf-8").splitlines()
    script = iter([line.strip() for line in lines])
    for line in blocks("python")[0].splitlines():
        assert line.strip() in script, line


def test_the_recipe_for_own_data_loads(tmp_path):
    recipe = next(b for b in blocks("yaml", PAGES["docs/data.md"]) if "configs/mine.yaml" in b)
    (tmp_path / "mine.yaml").write_text(recipe.replace("[base/", f"[{ROOT}/configs/base/"))
    cfg = load(tmp_path / "mine.yaml")
    assert (
        cfg.data.train["classes"] == ["field", "water", "forest"] and cfg.data.val["split"] == "val"
    )


def test_the_loss_that_the_docs_print_is_the_real_one():
    printed = blocks("python", PAGES["docs/extending.md"])[0]
    assert printed == (ROOT / "losses" / "focal.py").read_text("utf-8")


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.name)
def test_what_experiments_start_from_loads_and_its_network_can_be_built(path):
    cfg = load(path)
    with torch.device("meta"):
        build_segmentor(cfg.model, [str(k) for k in range(19)], pretrained=False)
