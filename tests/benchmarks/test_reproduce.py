"""benchmarks/reproduce.py: a grid runs, resumes, keeps what was measured, and ends in a table."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import reproduce
from engine.errors import UserError
from tests.runs import TINY, Forked

GRID = """
name: small
seeds: [0, 1]
common: [train.iters=2, checkpoint.every=1, log.every=1]
scalars: [train/loss]
rows:
  plain: {{config: {tiny}, set: [losses.occl.weight=0]}}
  "CBP + OCCL": {{config: {tiny}, seeds: [1], set: [train.iters=1]}}
"""


def test_a_grid_runs_resumes_skips_and_ends_in_a_table(tmp_path, monkeypatch, capsys):
    grid = tmp_path / "small.yaml"
    grid.write_text(GRID.format(tiny=TINY))
    options = [f"folder={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "runs=2", "threads=1"]
    monkeypatch.chdir(Path(TINY).parent.parent)
    monkeypatch.setattr(reproduce.subprocess, "Popen", Forked)
    reproduce.main([str(grid), *options])
    content = json.loads((tmp_path / "out" / "small.json").read_text())
    assert [(run["row"], run["seed"]) for run in content["runs"]] == [
        ("plain", 0),
        ("plain", 1),
        ("CBP + OCCL", 1),
    ]
    # Where and how it ran is no part of what was measured: no path of a machine is published.
    assert {"folder", "out", "runs", "threads"}.isdisjoint(content["grid"])
    assert content["runs"][1]["command"].endswith("folder=runs/small/plain/seed1 resume=auto")
    table = (tmp_path / "out" / "small.md").read_text()
    assert (
        "| plain | 2 |" in table
        and "±" in table
        and "| CBP + OCCL | 1 |" in table
        and "seeds 0, 1" in table
    )
    values = [run["results"]["toy"]["mIoU"] for run in content["runs"] if run["row"] == "plain"]
    assert f"{sum(values) / 2:.2f}" in table
    ends = [run["scalars"]["train/loss"] for run in content["runs"] if run["row"] == "plain"]
    logged = [
        json.loads(line)
        for line in (tmp_path / "runs/small/plain/seed1/scalars.jsonl").read_text().splitlines()
    ]
    losses = [line["train/loss"] for line in logged if "train/loss" in line]
    assert len(losses) == 2 and ends[1] == [losses[0], losses[-1]]
    assert " to ".join(f"{sum(both) / 2:.3g}" for both in zip(*ends)) in table
    accuracies = [run["results"]["toy"]["mAcc"] for run in content["runs"] if run["row"] == "plain"]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    heads, cells = (
        next(row for row in reversed(rows) if row[0] == name) for name in ("| row", "| plain")
    )
    assert dict(zip(heads, cells))["mAcc"] == f"{sum(accuracies) / 2:.1f}"

    def never(*_, **__):
        raise AssertionError("`table` must not start a run")

    monkeypatch.setattr(reproduce.subprocess, "Popen", never)
    (
        tmp_path / "runs" / "small" / "CBP_OCCL" / "seed1" / "results.json"
    ).unlink()  # as if it had been interrupted
    todo = [
        job
        for job in reproduce.jobs(reproduce.load_grid(grid, options))
        if not (job[2] / "results.json").exists()
    ]
    assert [(row, seed) for row, seed, _, _ in todo] == [
        ("CBP + OCCL", 1)
    ] and "resume=auto" in todo[0][3]
    capsys.readouterr()
    reproduce.main([str(grid), *options, "table"])
    assert (tmp_path / "out" / "small.md").read_text() == table  # what was measured stays
    assert json.loads((tmp_path / "out" / "small.json").read_text())["runs"] == content["runs"]
    assert "1 earlier runs kept" in capsys.readouterr().out


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    grid = tmp_path / "bad.yaml"
    grid.write_text(
        f"name: bad\ncommon: [train.iters=1]\nrows:\n"
        f"  wrong: {{config: {TINY}, set: [optimizer.lrr=1]}}\n  right: {{config: {TINY}}}\n"
    )
    monkeypatch.chdir(Path(TINY).parent.parent)
    monkeypatch.setattr(reproduce.subprocess, "Popen", Forked)
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        reproduce.main(
            [str(grid), f"folder={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "threads=1"]
        )
    assert "did you mean 'optimizer.lr'?" in capsys.readouterr().out
    assert "| wrong | 0 | not yet run |" in (tmp_path / "out" / "bad.md").read_text()


def test_no_finished_run_leaves_the_measured_tables_as_they_are(tmp_path, monkeypatch, capsys):
    root = Path(TINY).parent.parent
    monkeypatch.chdir(root)
    committed = {
        p: p.read_bytes() for p in (root / "benchmarks" / "results").glob("camvid_short.*")
    }
    shutil.copytree(root / "benchmarks" / "results", tmp_path / "out")
    options = [f"folder={tmp_path / 'runs'}", f"out={tmp_path / 'out'}"]
    reproduce.main(["benchmarks/grids/camvid_short.yaml", *options, "table"])
    output = capsys.readouterr().out
    assert "| CBP + OCCL | 1 | 62.43 |" in output and "nothing was written" in output
    assert len(committed) == 2
    assert all((tmp_path / "out" / p.name).read_bytes() == was for p, was in committed.items())
    reproduce.main(
        ["benchmarks/grids/camvid_short.yaml", options[0], f"out={tmp_path / 'new'}", "table"]
    )
    assert not (tmp_path / "new").exists() and "|" not in capsys.readouterr().out


def test_a_new_run_replaces_its_row_and_seed_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "g.yaml").write_text(
        "name: g\nseeds: [0, 1]\nscalars: [loss]\n"
        "rows:\n  a: {config: a.yaml}\n  b: {config: b.yaml, set: [x=1]}\n"
    )
    facts = {"step": 3, "iters": 3, "seconds": 60, "device": "d", "torch": "t"}
    old = [
        facts | {"row": row, "seed": seed, "commit": commit, "results": {"toy": {"mIoU": 10.0}}}
        for row, seed, commit in (("a", 0, "old"), ("a", 1, "old"), ("gone", 0, "gone"))
    ]
    (tmp_path / "g.json").write_text(json.dumps({"grid": {}, "runs": old}))
    folder = tmp_path / "runs" / "g" / "a" / "seed1"
    folder.mkdir(parents=True)
    new = facts | {"commit": "new", "results": {"toy": {"mIoU": 20.0}}}
    (folder / "results.json").write_text(json.dumps(new))
    (folder / "scalars.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    options = [f"folder={tmp_path / 'runs'}", f"out={tmp_path}", "common+=[data.root=x]"]
    reproduce.main([str(tmp_path / "g.yaml"), *options, "table"])
    runs = json.loads((tmp_path / "g.json").read_text())["runs"]
    assert [(r["row"], r["seed"], r["commit"]) for r in runs] == [
        ("a", 0, "old"),
        ("gone", 0, "gone"),
        ("a", 1, "new"),
    ]
    text = (tmp_path / "g.md").read_text()
    assert "| a | 2 | 15.00 ± 7.07 | 2 to 2 |" in text and "| b | 0 | not yet run |" in text
    assert "gone" not in text and "g.yaml common+=[data.root=x]`. Commit new, old;" in text


def test_the_command_line_adds_to_a_list_of_the_grid(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text("name: g\ncommon: [a=1]\nrows: {}\n")
    assert reproduce.load_grid(path, ["common+=[b=2]"])["common"] == ["a=1", "b=2"]
    assert reproduce.load_grid(path, ["common=[b=2]"])["common"] == ["b=2"]
    for wrong in ("name+=[x]", "common+=b=2", "commom+=[x]"):
        with pytest.raises(UserError, match="adds to a list"):
            reproduce.load_grid(path, [wrong])


def python_jobs(folder, **codes):
    """Jobs (row, seed, folder, command) that run a line of Python each."""
    return [(row, 0, folder / row, [sys.executable, "-c", code]) for row, code in codes.items()]


def test_a_row_waits_for_the_row_it_starts_from(tmp_path):
    done = tmp_path / "done"
    late = f"import time; time.sleep(0.5); open({str(done)!r}, 'w')"
    todo = python_jobs(tmp_path, adapted=f"open({str(done)!r})", source=late)
    assert set(reproduce.execute(todo, 2, 1, {"adapted": "source"}).values()) == {0}
    done.unlink()
    assert sorted(reproduce.execute(todo, 2, 1, {}).values()) == [
        0,
        1,
    ]  # without it the order is that of the grid


def test_a_row_whose_start_failed_is_not_run(tmp_path, capsys):
    done = tmp_path / "done"
    todo = python_jobs(tmp_path, source="raise SystemExit(3)", adapted=f"open({str(done)!r}, 'w')")
    codes = reproduce.execute(todo, 2, 1, {"adapted": "source"})
    assert codes == {tmp_path / "source": 3, tmp_path / "adapted": 1} and not done.exists()
    assert "not run: adapted, seed 0, waits for 'source', which failed" in capsys.readouterr().out


def test_a_seed_stands_in_the_settings_of_a_row(tmp_path):
    rows = {"a": {"config": "c.yaml", "set": ["stages=[{init: runs/seed{seed}/x.pt}]"]}}
    grid = {
        "rows": rows,
        "seeds": [0, 7],
        "folder": tmp_path,
        "name": "g",
        "common": [],
        "threads": 0,
        "script": "s.py",
    }
    commands = [command for *_, command in reproduce.jobs(grid)]
    assert ["stages=[{init: runs/seed7/x.pt}]" in command for command in commands] == [False, True]


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("name: x\nrowss: {}", [], "unknown key 'rowss'; there are name, script"),
        ("rows: {}", [], "the grid has no name"),
        ("", [], "is no grid: it must be a mapping with name"),
        ("[a, b]", [], "is no grid"),
        ("name: x\nrows: [a, b]", [], "'rows' must be a mapping"),
        ("name: x\nrows: {a: c.yaml}", [], r"'rows\.a' must be a mapping, not 'c\.yaml'"),
        ("name: x\nrows: {a: {}}", [], "the row 'a' has no config"),
        ("name: x\nrows: {a: {config: c, sett: []}}", [], r"unknown key 'rows\.a\.sett'; there are config"),
        ("name: x\nrows: {a: {config: c, set: k=1}}", [], r"'rows\.a\.set' must be a list"),
        ("name: x\nrows: {a: {config: c, after: b}}", [], "row 'a': after names the row 'b'; there are a"),
        ("name: x\nrows: {a: {config: c}}", ["only=[b]"], "only names the row 'b'; there are a"),
        ("name: x", ["runs=0"], "'runs' must be an int"),
        ("name: x", ["runs=two"], "'runs' must be an int"),
        ("name: x", ["seeds=0"], "'seeds' must be a list"),
        ("name: x", ["common=x=1"], "'common' must be a list"),
        ("name: x\npairs: {set: {}}", [], "'pairs' must be"),
    ],
)
def test_what_a_grid_cannot_mean_is_named_before_anything_starts(tmp_path, text, overrides, says):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(UserError, match=f"g.yaml.*{says}"):
        reproduce.load_grid(tmp_path / "g.yaml", overrides)


def test_a_run_with_other_settings_is_not_taken_for_that_of_the_grid(tmp_path, monkeypatch):
    """One row alone; then a changed grid, a run in another place, a metric that there is not."""
    grid, folder = tmp_path / "g.yaml", tmp_path / "runs" / "g"
    grid.write_text("name: g\ncommon: ['x={a: 1}']\nrows:\n  a: {config: a.yaml}\n  b: {config: b.yaml}\n")
    started = []
    monkeypatch.setattr(reproduce, "execute", lambda todo, *_: started.extend(todo) or {})
    options = [f"folder={tmp_path / 'runs'}", f"out={tmp_path}"]
    reproduce.main([str(grid), *options, "only=[b]"])
    ((row, _, place, command),) = started
    assert row == "b" and place == folder / "b" / "seed0"
    facts = {"step": 3, "iters": 3, "seconds": 60, "commit": "c", "device": "d", "torch": "t"}
    facts |= {"results": {"toy": {"mIoU": 10.0}}, "seed": 0}
    for told in (shlex.join(command[1:]), " ".join(command[1:])):
        place.mkdir(parents=True, exist_ok=True)
        told = told.replace(f"folder={place}", "folder=/elsewhere data.root=/data threads=4")
        (place / "results.json").write_text(json.dumps(facts | {"command": told}))
        reproduce.main([str(grid), *options, "table"])
        with pytest.raises(UserError, match=r"b/seed0 holds a run of 'b', seed 0, .* \+ y=2\. Rem"):
            reproduce.main([str(grid), *options, "common+=[y=2]"])
    with pytest.raises(UserError, match="no summary has the metric 'IoU'; there are mIoU"):
        reproduce.main([str(grid), *options, "metric=IoU", "table"])
    assert "| b | 1 | 10.00 |" in (tmp_path / "g.md").read_text()


def test_the_table_shows_what_eval_found_in_the_class_vectors_of_the_runs(tmp_path):
    grid = {
        "name": "g",
        "folder": tmp_path,
        "seeds": [0, 1],
        "common": [],
        "threads": 0,
        "script": "s.py",
    }
    grid |= {
        "rows": {row: {"config": "c.yaml"} for row in ("linear", "CBP", "unseen")},
        "scalars": [],
    }
    grid |= {"metric": "mIoU", "pairs": None, "file": "g.yaml"}
    facts = {"step": 3, "iters": 3, "seconds": 60, "commit": "c", "device": "d", "torch": "t"}

    def write(row, seed, cs, correlation):
        folder = tmp_path / "g" / row / f"seed{seed}"
        (folder / "eval_step_0000003").mkdir(parents=True)
        content = facts | {"seed": seed, "results": {"toy": {"mIoU": 50.0}}}
        (folder / "results.json").write_text(json.dumps(content))
        groups = [
            {"classes": ["Pole"], "F1": 10.0 * (1 + seed)},
            {"classes": ["Sky", "Road"], "F1": 90.0},
        ]
        found = {"CS": cs, "CS_abs": 2.0, "max_cos": 0.5, "norm_pixels": correlation}
        found |= {
            "sets": {"toy": {"groups": groups, "pairs": {"Pole + Sky": None if seed else 101.5}}}
        }
        (folder / "eval_step_0000003" / "diagnostics.json").write_text(json.dumps(found))

    write("linear", 0, 4.0, 0.25), write("linear", 1, 6.0, 0.75), write("CBP", 0, -1e-6, None)
    text = reproduce.markdown(grid, reproduce.collect(grid))
    assert "| linear | 2 | 5.00 | 2.00 | 0.50 | 0.50 | 15.00 | 90.00 | 101.50 |" in text
    assert "| CBP | 1 | 0.00 | 2.00 | 0.50 | - | 10.00 | 90.00 | 101.50 |" in text
    assert "| unseen | 0 |" in text and "Rarest in training: Pole; commonest: Sky, Road" in text


def test_the_table_shows_how_far_eval_py_found_the_domains_apart(tmp_path):
    from benchmarks.reproduce import collect, markdown

    grid = {"name": "g", "script": "train_dg.py", "seeds": [0, 1], "metric": "mIoU", "common": []}
    grid |= {"folder": tmp_path, "file": "g.yaml", "threads": 0, "scalars": [], "pairs": None}
    grid["rows"] = {row: {"config": "c.yaml"} for row in ("control", "aligned")}
    facts = {"step": 3, "seconds": 60, "commit": "c", "device": "d", "torch": "t", "iters": 3}

    def write(row, seed, **spaces):
        folder = tmp_path / "g" / row / f"seed{seed}"
        (folder / "eval_step_0000003").mkdir(parents=True)
        content = facts | {"seed": seed, "results": {"toy": {"mIoU": 50.0}}}
        (folder / "results.json").write_text(json.dumps(content))
        spaces = {
            space: {"dusk": {"distance": value, "error": 0.5}} for space, value in spaces.items()
        }
        found = json.dumps({"source": "day", "spaces": spaces})
        (folder / "eval_step_0000003" / "domains.json").write_text(found)

    write("control", 0, features=1.5), write("control", 1, features=0.5)
    write("aligned", 0, features=0.25, joint=0.125)
    other = tmp_path / "g" / "aligned" / "seed1"  # tested on another domain
    (other / "eval_step_0000003").mkdir(parents=True)
    (other / "results.json").write_text(json.dumps(facts | {"seed": 1, "results": {"toy": {}}}))
    look = {"source": "day", "spaces": {"features": {"fog": {"distance": 2.0}}}}
    (other / "eval_step_0000003" / "domains.json").write_text(json.dumps(look))
    text = markdown(grid, collect(grid))
    assert "| row | seeds | dusk: distance | dusk: error | fog: distance |" in text
    assert "| control | 2 | 1.000 | 0.500 | - |" in text
    assert "| aligned | 2 | 0.250 | 0.500 | 2.000 |" in text
    joint = text.split("in the space joint, as seen from day")[1]
    assert "| aligned | 1 | 0.125 | 0.500 |" in joint and "control" not in joint


def test_pairs_make_a_row_for_every_ordered_pair_and_method_and_a_table_of_them(tmp_path):
    from benchmarks.reproduce import jobs, load_grid, markdown

    (tmp_path / "grid.yaml").write_text(
        "name: g\npairs:\n  sets:\n"
        + "".join(
            f"    {s}: {{train: {{name: toy.Toy, domain: {s}}}, test: {{name: toy.Toy}}}}\n"
            for s in ("a", "b", "c")
        )
        + "  first: {config: first.yaml}\n"
        "  methods: {plain: {config: p.yaml, set: ['init=runs/g/{first}/seed{seed}/x.pt']}, TMT: {config: t.yaml}}\n"
    )
    grid = load_grid(tmp_path / "grid.yaml", ["seeds=[4]"]) | {"file": "grid.yaml"}
    todo = {row: command for row, _, _, command in jobs(grid)}
    assert len(todo) == 3 + 6 * 2 and grid["rows"]["c to a, TMT"]["after"] == "c"
    command = todo["b to c, plain"]
    assert (
        "init=runs/g/b/seed4/x.pt" in command
        and 'data.train={"name": "toy.Toy", "domain": "c"}' in command
    )
    assert 'data.target={"name": "toy.Toy", "domain": "b"}' in command
    facts = {"seed": 4, "seconds": 60, "commit": "c", "device": "d", "torch": "t", "iters": 3}
    scores = {"a to b, plain": ("b", 10.0), "a to b, TMT": ("b", 12.5), "a": ("a", 1.0)}
    runs = [facts | {"row": row, "results": {b: {"mIoU": x}}} for row, (b, x) in scores.items()]
    text = markdown(grid, runs)
    assert "| a to b | 10.00 | 12.50 |" in text and "| mean of 1 pairs | 10.00 | 12.50 |" in text
    assert text.count("| not yet run | not yet run |") == 5
