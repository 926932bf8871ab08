"""eval.py, predict.py and benchmarks/reproduce.py on a checkpoint of the smallest run."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import predict
import train_supervised
import train_uda
from benchmarks import reproduce
from datasets.toy import Toy
from engine import checkpoint
from engine.errors import UserError
from tests.runs import TINY_UDA
from tests.test_uda import METHODS

TINY = str(Path(__file__).parent / "tiny.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folder of two training steps."""
    folder = tmp_path_factory.mktemp("run")
    train_supervised.main([TINY, f"folder={folder}", "train.iters=2", "checkpoint.every=1"])
    return folder


def result(folder, name="toy", checkpoint_name="best"):
    return json.loads((folder / f"eval_{checkpoint_name}" / f"{name}.json").read_text())


def test_a_run_folder_holds_what_the_readme_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert {
        "config.yaml",
        "log.txt",
        "scalars.jsonl",
        "best.pt",
        "step_0000002.pt",
        "results.json",
        "eval",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    results = json.loads((trained / "results.json").read_text())
    assert {"seed", "iters", "device", "command", "commit", "seconds"} <= set(results)
    assert "mIoU" in results["results"]["toy"]
    assert "IoU" in (trained / "log.txt").read_text()


def test_eval_repeats_the_number_that_training_reported(trained):
    evaluation.main([str(trained / "step_0000002.pt")])
    reported = json.loads((trained / "eval" / "toy.json").read_text())
    assert result(trained, checkpoint_name="step_0000002")["matrix"] == reported["matrix"]


def test_a_test_set_without_labels_is_an_error_and_not_a_table_of_nothing(trained):
    with pytest.raises(
        UserError, match=r"^data.test.toy has labels: false, .*; to label pictures use predict.py$"
    ):
        evaluation.main([str(trained / "best.pt"), "data.test.toy.labels=false"])


def test_eval_writes_tables_and_pictures_for_several_data_sets(trained, capsys):
    night = "data.test.night={name: toy.Toy, domain: night, split: test, length: 2, size: [48, 64]}"
    evaluation.main([str(trained / "best.pt"), night])
    output = capsys.readouterr().out
    assert (
        "toy: 3 images, whole image, student" in output
        and "night: 2 images" in output
        and "Bicyclist" in output
    )
    for name in ("toy", "night"):
        content = result(trained, name)
        rows = list(csv.reader((trained / "eval_best" / f"{name}.csv").open()))
        assert rows[0] == ["class", "IoU", "Acc", "F1"] and len(rows) == 12
        assert sum(map(sum, content["matrix"])) == content["images"] * 48 * 64
        assert Image.open(trained / "eval_best" / f"{name}_confusion.png").size[0] > 200
        assert (trained / "eval_best" / f"{name}_0000.png").exists()


def test_eval_options_change_the_protocol_and_say_so(trained, capsys):
    path = str(trained / "best.pt")
    evaluation.main([path, "eval.mode=slide", "eval.crop=[32, 32]", "eval.stride=[16, 24]"])
    slide = result(trained)
    evaluation.main([path, "eval.scales=[0.75, 1.0]", "eval.flip=true"])
    several = result(trained)
    evaluation.main([path, "eval.weights=teacher"])
    teacher = result(trained)
    assert (
        slide["protocol"] == "sliding [32, 32] / [16, 24]"
        and several["protocol"] == "whole image, scales [0.75, 1.0], flip"
    )
    assert teacher["weights"] == "teacher"
    assert len({json.dumps(r["matrix"]) for r in (slide, several, teacher)}) == 3


def test_eval_of_a_checkpoint_with_other_classes_names_both_numbers(trained, tmp_path):
    saved = checkpoint.load(trained / "best.pt")
    torch.save(saved | {"classes": ["one", "two"]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"2 .*cbp|does not fit|11 classes"):
        evaluation.main([str(tmp_path / "other.pt")])


def test_eval_of_another_network_lists_the_keys(trained):
    with pytest.raises(
        UserError, match=r"does not fit Segmentor.*missing \(backbone\.layer1\.0\.conv3"
    ):
        evaluation.main([str(trained / "best.pt"), "model.backbone.depth=50"])


def test_eval_of_a_data_set_with_other_classes_names_both(trained, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.jpg")
    Image.new("L", (8, 8)).save(tmp_path / "labels" / "a.png")
    spec = f"{{name: folder.Folder, root: {tmp_path}, image_dir: images, label_dir: labels, classes: [one, two]}}"
    with pytest.raises(UserError, match=r"data\.test\.mine has 2 classes .* was trained with 11"):
        evaluation.main([str(trained / "best.pt"), f"data.test.mine={spec}"])


def test_eval_refuses_an_untrusted_pickle(tmp_path):
    torch.save({"format": 1, "model": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"pathlib.*is not loaded"):
        evaluation.main([str(tmp_path / "evil.pt")])


def test_eval_needs_a_teacher_to_report_one(trained, tmp_path):
    saved = checkpoint.load(trained / "best.pt")
    del saved["teacher"]
    torch.save(saved, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="has no teacher"):
        evaluation.main([str(tmp_path / "plain.pt"), "eval.weights=teacher"])


def test_predict_labels_a_folder_of_pictures_of_any_kind(trained, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "city").mkdir(parents=True)
    Image.fromarray(rng.integers(0, 255, (40, 57, 3), dtype=np.uint8)).save(
        tmp_path / "in" / "a.jpg"
    )
    Image.fromarray(rng.integers(0, 255, (33, 48), dtype=np.uint8)).save(
        tmp_path / "in" / "city" / "grey.png"
    )
    predict.main([str(trained / "best.pt"), str(tmp_path / "in"), str(tmp_path / "out")])
    for name, size in (("a.png", (57, 40)), ("city/grey.png", (48, 33))):
        ids = Image.open(tmp_path / "out" / "ids" / name)
        colors = Image.open(tmp_path / "out" / "colors" / name)
        assert ids.mode == "L" and ids.size == size and np.array(ids).max() < 11
        assert colors.mode == "P" and np.array_equal(np.array(colors), np.array(ids))
        assert colors.getpalette()[:3] == list(checkpoint.load(trained / "best.pt")["palette"][0])
        assert Image.open(tmp_path / "out" / "overlays" / name).size == size


def test_predict_on_a_folder_without_pictures_says_so(trained, tmp_path):
    with pytest.raises(UserError, match="there are no pictures"):
        predict.main([str(trained / "best.pt"), str(tmp_path), str(tmp_path / "out")])


# --- domain adaptation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Run folder of a source stage and a stage of BCL, two steps each, and what the console said."""
    folder = tmp_path_factory.mktemp("adapted")
    monitor = "data.monitor={name: toy.Toy, domain: real, split: val, length: 2, size: [48, 64]}"
    train_uda.main(
        [
            TINY_UDA,
            f"folder={folder}",
            *METHODS["BCL"],
            "train.iters=2",
            "checkpoint.every=2",
            monitor,
        ]
    )
    return folder


def test_an_adaptation_ends_with_before_and_after(adapted):
    results = json.loads((adapted / "results.json").read_text())
    log = (adapted / "log.txt").read_text()
    assert "toy: before and after adaptation" in log and "before    after   change" in log
    evaluation.main([str(adapted / "stage_source.pt")])
    assert result(adapted, checkpoint_name="stage_source")["summary"] == results["before"]["toy"]
    evaluation.main([str(adapted / "step_0000004.pt")])
    assert result(adapted, checkpoint_name="step_0000004")["summary"] == results["results"]["toy"]
    assert (
        results["IoU"]["toy"]["Road"] == result(adapted, checkpoint_name="step_0000004")["IoU"][3]
    )
    width, height = Image.open(adapted / "eval" / "toy_before_after.png").size
    assert width > 4 * 200 and height > 192


def test_the_command_line_overrides_what_a_stage_sets(adapted):
    cfg = evaluation.load_network(
        adapted / "step_0000004.pt", ["uda.mixer={name: mixers.ClassMix}"]
    )[1]
    assert (
        cfg.uda.mixer == {"name": "mixers.ClassMix"}
        and cfg.uda.labelers[0]["name"] == "bcl.StaticLabels"
    )


def test_pseudo_labels_are_exported_with_their_settings(adapted):
    path = adapted / "step_0000004.pt"
    evaluation.main([str(path), "export=pseudo_labels"])
    folder = adapted / "eval_step_0000004" / "pseudo_labels" / "toy"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["labeler"]["name"] == "bcl.StaticLabels" and settings["images"] == 3
    assert (
        settings["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        and settings["classes"][3] == "Road"
    )
    labels = [np.array(Image.open(p)) for p in sorted(folder.rglob("*.png"))]
    truth = [
        Toy(domain="real", split="test", length=3, size=[48, 64])[i]["label"].numpy()
        for i in range(3)
    ]
    kept = np.stack(labels) != 255
    assert (
        len(labels) == 3
        and Image.open(next(folder.rglob("*.png"))).mode == "P"
        and kept.any()
        and not kept.all()
    )
    right = (np.stack(labels) == np.stack(truth))[kept].mean()
    assert settings["pseudo/share"] == pytest.approx(100 * kept.mean())
    assert settings["pseudo/accuracy"] == pytest.approx(100 * right)


def test_any_checkpoint_exports_with_a_labeler_without_state(trained):
    labeler = "uda.labelers=[{name: self_training.StoredConfidence, threshold: 0.0}]"
    evaluation.main([str(trained / "best.pt"), "export=pseudo_labels", labeler])
    folder = trained / "eval_best" / "pseudo_labels" / "toy"
    assert json.loads((folder / "settings.json").read_text())["pseudo/share"] == 100.0
    with pytest.raises(UserError, match=r"no labeler: set uda\.labelers="):
        evaluation.main([str(trained / "best.pt"), "export=pseudo_labels"])
    with pytest.raises(UserError, match="whose fitted state it needs"):
        spec = "uda.labelers=[{name: bcl.StaticLabels}]"
        evaluation.main([str(trained / "best.pt"), "export=pseudo_labels", spec])
    with pytest.raises(UserError, match="export must be pseudo_labels, not labels"):
        evaluation.main([str(trained / "best.pt"), "export=labels"])


def test_labels_are_measured_when_they_are_made(adapted):
    lines = [json.loads(line) for line in (adapted / "scalars.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "pseudo/accuracy" in line]
    assert len(measured) == 1 and measured[0]["step"] == 2 and 0 < measured[0]["pseudo/share"] < 100
    assert "% labelled" in (adapted / "log.txt").read_text()


# --- benchmarks/reproduce.py ---------------------------------------------------------------------------------------

GRID = """
name: small
seeds: [0, 1]
common: [train.iters=2, checkpoint.every=1, log.every=1]
scalars: [train/loss]
rows:
  plain: {{config: {tiny}, set: [losses.occl.weight=0]}}
  "CBP + OCCL": {{config: {tiny}}}
  once: {{config: {tiny}, seeds: [1], set: [train.iters=1]}}
"""


def test_a_grid_runs_resumes_skips_and_ends_in_a_table(tmp_path, monkeypatch):
    grid = tmp_path / "small.yaml"
    grid.write_text(GRID.format(tiny=TINY))
    options = [f"folder={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "runs=2", "threads=1"]
    monkeypatch.chdir(Path(TINY).parent.parent)
    reproduce.main([str(grid), *options])
    content = json.loads((tmp_path / "out" / "small.json").read_text())
    assert [(run["row"], run["seed"]) for run in content["runs"]] == [
        ("plain", 0),
        ("CBP + OCCL", 0),
        ("plain", 1),
        ("CBP + OCCL", 1),
        ("once", 1),
    ]
    table = (tmp_path / "out" / "small.md").read_text()
    assert (
        "| CBP + OCCL | 2 |" in table
        and "±" in table
        and "| once | 1 |" in table
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
        tmp_path / "runs" / "small" / "once" / "seed1" / "results.json"
    ).unlink()  # as if it had been interrupted
    todo = [
        job
        for job in reproduce.jobs(reproduce.load_grid(grid, options))
        if not (job[2] / "results.json").exists()
    ]
    assert [(row, seed) for row, seed, _, _ in todo] == [("once", 1)] and "resume=auto" in todo[0][
        3
    ]
    reproduce.main([str(grid), *options, "table"])
    assert "| once | 0 | not yet run |" in (tmp_path / "out" / "small.md").read_text()


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    grid = tmp_path / "bad.yaml"
    grid.write_text(
        f"name: bad\ncommon: [train.iters=1]\nrows:\n"
        f"  wrong: {{config: {TINY}, set: [optimizer.lrr=1]}}\n  right: {{config: {TINY}}}\n"
    )
    monkeypatch.chdir(Path(TINY).parent.parent)
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        reproduce.main(
            [str(grid), f"folder={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "threads=1"]
        )
    assert "did you mean 'optimizer.lr'?" in capsys.readouterr().out
    assert "| wrong | 0 | not yet run |" in (tmp_path / "out" / "bad.md").read_text()


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
    assert "1 runs wait for rows that failed" in capsys.readouterr().out


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


def test_an_unknown_grid_key_is_an_error(tmp_path):
    (tmp_path / "g.yaml").write_text("name: x\nrowss: {}\n")
    with pytest.raises(UserError, match="unknown key 'rowss'"):
        reproduce.load_grid(tmp_path / "g.yaml", [])


def test_scripts_without_arguments_print_how_to_use_them():
    for script in ("train_supervised.py", "eval.py", "predict.py"):
        result = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, cwd=Path(TINY).parent.parent
        )
        assert (
            result.returncode == 1
            and f"python {script}" in result.stderr
            and "Traceback" not in result.stderr
        )


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
    text = reproduce.markdown(grid, *reproduce.collect(grid))
    assert "| linear | 2 | 5.00 | 2.00 | 0.50 | 0.50 | 15.00 | 90.00 | 101.50 |" in text
    assert "| CBP | 1 | 0.00 | 2.00 | 0.50 | - | 10.00 | 90.00 | 101.50 |" in text
    assert "| unseen | 0 |" in text and "Rarest in training: Pole; commonest: Sky, Road" in text


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
    table = {"a to b, plain": {"b": {4: {"mIoU": 10.0}}}, "a to b, TMT": {"b": {4: {"mIoU": 12.5}}}}
    text = markdown(grid, table | {"a": {"a": {4: {"mIoU": 1.0}}}}, [])
    assert "| a to b | 10.00 | 12.50 |" in text and "| mean of 1 pairs | 10.00 | 12.50 |" in text
    assert text.count("| not yet run | not yet run |") == 5
