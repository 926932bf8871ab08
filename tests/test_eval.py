"""eval.py on a checkpoint of the smallest run, and the script that was adapted."""

import csv
import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train_supervised
import train_uda
from datasets.toy import Toy
from engine import checkpoint
from engine.errors import UserError
from tests.runs import TINY, TINY_UDA
from tests.test_train_uda import METHODS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folder of two training steps."""
    folder = tmp_path_factory.mktemp("run")
    train_supervised.main([TINY, f"folder={folder}", "train.iters=2", "checkpoint.every=1"])
    return folder


def result(folder, name="toy", of="best"):
    return json.loads((folder / f"eval_{of}" / f"{name}.json").read_text())


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
    assert result(trained, of="step_0000002")["matrix"] == reported["matrix"]


NIGHT = "data.test.night={name: toy.Toy, domain: night, split: test, length: 2, size: [48, 64]}"


def test_a_test_set_without_labels_is_an_error_and_not_a_table_of_nothing(trained):
    with pytest.raises(
        UserError, match=r"^data.test.toy has labels: false, .*; to label pictures use predict.py$"
    ):
        evaluation.main([str(trained / "best.pt"), "data.test.toy.labels=false"])


def test_subsets_of_other_classes_are_found_before_labels_are_counted(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "class_counts", pytest.fail)
    arguments = [str(trained / "best.pt"), "eval.subsets={top: [grass]}", "diagnostics=true"]
    with pytest.raises(UserError, match=r"eval\.subsets\.top names the class 'grass'"):
        evaluation.main(arguments)


def test_eval_writes_tables_and_pictures_for_several_data_sets(trained, capsys):
    evaluation.main([str(trained / "best.pt"), NIGHT])
    output = capsys.readouterr().out
    assert (
        "toy: 3 images, whole image, student" in output
        and "night: 2 images" in output
        and "Bicyclist" in output
    )
    (folder,) = trained.glob("eval_best_data-*")
    for name in ("toy", "night"):
        content = json.loads((folder / f"{name}.json").read_text())
        rows = list(csv.reader((folder / f"{name}.csv").open()))
        assert rows[0] == ["class", "IoU", "Acc", "F1"] and len(rows) == 12
        assert sum(map(sum, content["matrix"])) == content["images"] * 48 * 64
        assert content["overrides"]["data.test.night"]["domain"] == "night"
        assert Image.open(folder / f"{name}_confusion.png").size[0] > 200
        assert (folder / f"{name}_0000.png").exists()


def test_each_protocol_has_a_folder_of_its_own_and_says_so(trained):
    path = str(trained / "step_0000002.pt")
    slide = ["eval.mode=slide", "eval.crop=[32, 32]", "eval.stride=[16, 24]"]
    protocols = {
        "": [],
        "_crop32-32_slide_stride16-24": slide,
        "_flip_scales0.75-1": ["eval.scales=[0.75, 1.0]", "eval.flip=true"],
        "_teacher": ["eval.weights=teacher"],
    }
    results = {}
    for name, overrides in protocols.items():
        evaluation.main([path, *overrides, "eval.pictures=0", "data.workers=1"])
        results[name] = result(trained, of=f"step_0000002{name}")
    told = [
        (each["protocol"], each["weights"], len(each["overrides"])) for each in results.values()
    ]
    assert told == [
        ("whole image", "student", 0),
        ("sliding [32, 32] / [16, 24]", "student", 3),
        ("whole image, scales [0.75, 1.0], flip", "student", 2),
        ("whole image", "teacher", 1),
    ]
    assert len({json.dumps(each["matrix"]) for each in results.values()}) == 4
    for name, before in results.items():  # after all of them, and in another order
        assert result(trained, of=f"step_0000002{name}") == before
    evaluation.main([path, *slide[::-1], "eval.pictures=0"])
    assert len([*trained.glob("eval_step_0000002*")]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export=pseudo_labels", "diagnostics=true"], "evaluates nothing: leave out the other"),
        (["folder=elsewhere"], "writes beside the checkpoint: leave out folder="),
        (["nowhere.pt"], "^there is no file nowhere.pt$"),
        ([NIGHT.replace("domain: night", "domian: night")], r"^data\.test\.night: toy\.Toy has no"),
    ],
)
def test_what_eval_cannot_do_is_said_before_anything_is_evaluated(
    trained, monkeypatch, arguments, message
):
    monkeypatch.setattr(evaluation, "report", pytest.fail)
    with pytest.raises(UserError, match=message):
        evaluation.main([str(trained / "best.pt"), *arguments])


def test_numbers_that_differ_late_have_folders_of_their_own():
    names = {evaluation.protocol_name({"seed": seed}) for seed in (1234567, 1234568)}
    assert names == {"_seed1234567", "_seed1234568"}


def test_diagnostics_add_files_and_leave_the_result_alone(trained, monkeypatch):
    folder, arguments = trained / "eval_step_0000001", [str(trained / "step_0000001.pt")]
    cache = f"data.cache={trained}/cache"
    for more in ([], ["diagnostics=true", cache]):
        monkeypatch.setattr(sys, "argv", ["eval.py", *arguments, *more])
        before = (folder / "toy.json").read_bytes() if more else None
        evaluation.main([*arguments, *more])
    assert (folder / "toy.json").read_bytes() == before and (folder / "diagnostics.json").exists()
    changed = before.replace(b'"images": 3', b'"images": 4')
    (folder / "toy.json").write_bytes(changed)
    evaluation.main(arguments)  # another number is written
    assert result(trained, of="step_0000001")["images"] == 3


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, ""),
        ({"eval.flip": True, "eval.scales": [0.75, 1, 1.25]}, "_flip_scales0.75-1-1.25"),
        ({"eval.flip": False}, "_no-flip"),
        ({"eval.short_side": 720, "precision": "bf16"}, "_short_side720_bf16"),
        ({"eval.mode": "../../x y"}, "_..-..-x-y"),
        ({"data.root": "/data", "data.test.a": {"name": "b.B"}}, "_data-[0-9a-f]{8}"),
        ({"eval.subsets.mine": ["Car"], "eval.flip": True}, "_flip_eval-[0-9a-f]{8}"),
        ({"eval.scales": [1 + i / 100 for i in range(40)]}, "_[0-9a-f]{8}"),
    ],
)
def test_the_name_of_a_protocol_is_short_and_legal(changes, name):
    assert re.fullmatch(name, evaluation.protocol_name(changes))
    moved = {key: [0.5] if key == "eval.scales" else f"{value}2" for key, value in changes.items()}
    assert not changes or evaluation.protocol_name(moved) != evaluation.protocol_name(changes)


def test_a_table_over_sets_calls_nothing_unseen_that_was_trained_on(trained, adapted, capsys):
    for path in (trained / "best.pt", adapted / "step_0000004.pt"):
        evaluation.main([str(path), NIGHT, "eval.pictures=0"])
        table = next(path.parent.glob(f"eval_{path.stem}_*/domains.txt")).read_text().splitlines()
        assert [line.split()[1:] for line in table[:1]] == [["toy", "night", "mean"]]
        first, second, mean = map(float, table[1].split()[1:])
        assert len(table) == 2 and mean == pytest.approx((first + second) / 2, abs=0.011)
    assert "unseen" not in capsys.readouterr().out


def test_tables_of_other_checkpoints_do_not_overwrite_each_other(trained):
    paths = [str(trained / f"step_000000{step}.pt") for step in (1, 2)]
    for those in (paths, [*paths, str(trained / "best.pt")]):
        evaluation.main([*those, "eval.pictures=0"])
    tables = sorted(map(len, (t.read_text().splitlines() for t in trained.rglob("domains_*.txt"))))
    assert tables == [3, 4]


def test_a_set_without_labels_is_not_scored(trained):
    spec = NIGHT.replace("{", "{labels: false, ")
    with pytest.raises(UserError, match=r"data\.test\.night"):
        evaluation.main([str(trained / "best.pt"), spec])


def edited(trained, path, **changes):
    """A copy of the checkpoint with other entries."""
    torch.save(checkpoint.load(trained / "best.pt") | changes, path)
    return str(path)


@pytest.mark.parametrize("kind", ["absolute", "parent"])
@pytest.mark.parametrize("more", [(), ("export=pseudo_labels",)], ids=["report", "export"])
def test_a_strangers_checkpoint_neither_deletes_nor_writes_outside(trained, tmp_path, kind, more):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    cfg = checkpoint.load(trained / "best.pt")["config"]
    name = str(victim) if kind == "absolute" else "../../../victim"
    cfg["data"]["test"] = {name: cfg["data"]["test"]["toy"]}
    cfg["uda"]["labelers"] = [{"name": "self_training.StoredConfidence", "threshold": 0.0}]
    (tmp_path / "shared").mkdir()
    path = edited(trained, tmp_path / "shared" / "x.pt", config=cfg)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="name"):
        evaluation.main([path, *more])
    assert sorted(tmp_path.rglob("*")) == before and (victim / "thesis.txt").read_text() == "mine"


def test_weights_and_scores_that_are_not_finite_are_no_result(trained, tmp_path):
    model = checkpoint.load(trained / "best.pt")["model"]
    name = next(key for key in model if key.startswith("decoder") and key.endswith("weight"))
    for value, message in (
        (float("nan"), f"weights {name} are not finite"),
        (3e38, "3 of 3 images"),
    ):
        model[name] = torch.full_like(model[name], value)
        path = edited(trained, tmp_path / "broken.pt", model=model)
        with pytest.raises(UserError, match=message):
            evaluation.main([path])
    assert not [*tmp_path.rglob("*.json")]


def test_eval_of_a_checkpoint_with_other_classes_names_both_numbers(trained, tmp_path):
    saved = checkpoint.load(trained / "best.pt")
    two = {"classes": ["one", "two"], "palette": saved["palette"][:2]}
    torch.save(saved | two, tmp_path / "other.pt")
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
    assert result(adapted, of="stage_source")["summary"] == results["before"]["toy"]
    evaluation.main([str(adapted / "step_0000004.pt")])
    assert result(adapted, of="step_0000004")["summary"] == results["results"]["toy"]
    assert results["IoU"]["toy"]["Road"] == result(adapted, of="step_0000004")["IoU"][3]
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
    folder = next(trained.glob("eval_best_uda-*")) / "pseudo_labels" / "toy"
    assert json.loads((folder / "settings.json").read_text())["pseudo/share"] == 100.0
    gone = "prototypes.centroids={name: none}"
    with pytest.raises(UserError, match="prototypes"):
        evaluation.main([str(trained / "best.pt"), "export=pseudo_labels", gone, labeler])
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


@pytest.mark.parametrize(
    "script", ["train_supervised", "train_uda", "train_dg", "eval", "predict", "export"]
)
def test_scripts_without_arguments_print_how_to_use_them(script, monkeypatch):
    path = Path(TINY).parent.parent / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert f"python {script}.py" in left.value.code  # a text: printed, exit code 1
