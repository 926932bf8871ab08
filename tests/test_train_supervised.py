"""The training script as a user runs it: resume, signals, several processes, precisions, degenerate batches,
mistakes."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_supervised
from datasets.build import build_data, count_classes
from engine import checkpoint, distributed, precision, report
from engine.config import ConfigError, load
from engine.errors import UserError
from engine.log import claim, release
from engine.process import signals
from engine.run import Run
from losses.cross_entropy import median_frequency
from losses.occl import OCCL
from tests.runs import (
    ROOT,
    SCRIPTS,
    TINY,
    TINY_DG,
    TINY_UDA,
    Forked,
    assert_same_state,
    command,
    last,
    leaves,
    run,
    scalars,
    train,
)

# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_six_steps_equal_three_and_a_new_process_and_three(tmp_path, workers):
    straight = train(tmp_path / "straight")
    code, output = run(
        tmp_path / "parts", "train.iters=6", f"data.workers={workers}", "checkpoint.every=3"
    )
    assert code == 0, output
    for path in checkpoint.list_steps(tmp_path / "parts")[:1]:
        path.unlink()  # as if the queue had killed the run after step 3
    code, output = run(tmp_path / "parts", f"data.workers={workers}")
    assert code == 0 and "goes on from" in output and "step_0000003.pt" in output, output
    assert_same_state(last(tmp_path / "straight"), last(tmp_path / "parts"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            *(leaves(last(tmp_path / f)["rng"]).values() for f in ("straight", "parts"))
        )
    )
    resumed = scalars(tmp_path / "parts")
    assert list(resumed) == [1, 2, 3, 4, 5, 6]
    assert [resumed[step]["train/loss"] for step in resumed] == [
        straight[step]["train/loss"] for step in straight
    ]


def test_a_finished_run_trains_no_further_and_reports_again(tmp_path):
    train(tmp_path / "run", "train.iters=2")
    before = last(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(tmp_path / "run", "train.iters=2")
    assert_same_state(before, last(tmp_path / "run"))
    assert (tmp_path / "run" / "results.json").exists()


def test_a_saved_configuration_runs_alone(tmp_path):
    first = train(tmp_path / "a", "train.iters=2", "losses.occl.weight=0.5")
    train_supervised.main([str(tmp_path / "a" / "config.yaml"), f"folder={tmp_path / 'b'}"])
    assert first[2]["train/loss"] == scalars(tmp_path / "b")[2]["train/loss"]


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    train(tmp_path / "run", "train.iters=1")
    with pytest.raises(ValueError, match=r"optimizer\.lr 0\.001 -> 0\.1.*another folder"):
        train(tmp_path / "run", "train.iters=1", "optimizer.lr=0.1")
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(tmp_path / "run", "resume=none")


# --- early stop, and the configuration shown -------------------------------------------------------

PATIENT = ("eval.every=1", "eval.patience=2", "optimizer.lr=1e-12", "train.iters=9")
PATIENT += ("model.frozen_bn=[backbone, decoder]",)  # nothing changes between validations
PATIENT += ("eval.pictures=0", "data.val.length=1", "data.test.toy.length=1", "train.batch_size=2")


def test_patience_ends_a_run_that_gets_no_better_and_reports_the_best(tmp_path):
    steps = train(tmp_path / "run", *PATIENT)
    assert [*steps] == [1, 2, 3]  # the first validation is the best one, two more wait
    assert last(tmp_path / "run")["waited"] == 2
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert results["step"] == best["step"] == 1 and results["best_val"] == best["best"]
    # The same command neither goes on nor changes anything.
    before = last(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert train(tmp_path / "run", *PATIENT) == steps
    assert_same_state(before, last(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 1
    # A run that was killed after step 2 ends at the same step, and more patience lets it go on.
    train(tmp_path / "parts", *PATIENT, "checkpoint.every=1", "train.iters=2")
    assert last(tmp_path / "parts")["waited"] == 1
    parts = train(tmp_path / "parts", *PATIENT, "checkpoint.every=1", "eval.patience=3")
    assert [*parts] == [1, 2, 3, 4] and last(tmp_path / "parts")["waited"] == 3


def test_the_network_that_patience_reports_is_that_of_best_pt(tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.4, 0.3, 0.1])
    monkeypatch.setattr(train_supervised, "validate", lambda *arguments: next(scores))
    reported = []
    monkeypatch.setattr(report, "report", lambda network, *rest: reported.append(network) or {})
    train(tmp_path / "run", "eval.every=1", "eval.patience=2")
    assert last(tmp_path / "run")["step"] == 4
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert best["step"] == 2 and best["model"].keys() == reported[0].state_dict().keys()
    for name, value in reported[0].state_dict().items():
        assert torch.equal(value, best["model"][name]), name


@pytest.mark.parametrize(
    "script, override",
    [
        (TINY, "data.val={name: none}"),
        (TINY, "eval.every=0"),
        (TINY_UDA, "eval.every=1"),
    ],
)
def test_patience_that_could_not_work_is_refused(tmp_path, script, override):
    with pytest.raises(ConfigError, match=r"eval\.patience"):
        train(tmp_path, "eval.every=1", "eval.patience=1", override, config=script)


@pytest.mark.parametrize("config", [TINY, TINY_UDA, TINY_DG])
def test_show_prints_the_merged_configuration_and_ends(tmp_path, capsys, config):
    SCRIPTS[config].main([config, f"folder={tmp_path / 'run'}", "--show", "optimizer.lr=0.5"])
    assert not (tmp_path / "run").exists()
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    told = load(tmp_path / "shown.yaml")
    assert told == load(config, ["optimizer.lr=0.5", f"folder={tmp_path / 'run'}"])
    assert told.optimizer.lr == 0.5 and told.schedule.power == 0.9  # a default


# --- signals -------------------------------------------------------------------------------------------------------


def start_and_wait(folder, name, *overrides):
    """Start a run in the background and wait until its folder has a file -> process, its output."""
    output = folder.parent / f"{name}.output.txt"
    with open(output, "w") as file:
        process = Forked(command(folder, *overrides), stdout=file)
    deadline = time.time() + 120
    while not (folder / name).exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, output.read_text()
    return process, output


def test_sigterm_finishes_the_step_saves_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "run"
    options = ("train.iters=2000", "checkpoint.every=5000")
    process, output = start_and_wait(folder, "scalars.jsonl", *options, "data.workers=1")
    while not scalars(folder):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: the loader process too
    process.wait(60)
    assert process.returncode == 0 and "saved at step" in output.read_text(), output.read_text()
    stopped = last(folder)["step"]
    assert 0 < stopped < 2000 and not (folder / "results.json").exists()
    process, _ = start_and_wait(folder, "scalars.jsonl", *options)
    while stopped + 1 not in scalars(folder):
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_kill_in_the_middle_of_saving_leaves_the_earlier_checkpoint(tmp_path):
    folder = tmp_path / "run"
    options = ("train.iters=100000", "checkpoint.every=1", "checkpoint.keep=2")
    process, _ = start_and_wait(folder, "step_0000002.pt", *options)
    for _ in range(2000):  # a save is under way whenever a temporary file lies there
        if list(folder.glob("*.tmp.*")):
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()
    path, found = checkpoint.find(SimpleNamespace(folder=folder, resume="auto"))
    assert found["step"] >= 2 and path.name == f"step_{found['step']:07d}.pt"
    checkpoint.tidy(folder, found["step"])
    assert not list(folder.glob("*.tmp.*"))


# --- several processes ---------------------------------------------------------------------------------------------


EXACT = (
    "model.frozen_bn=[backbone, decoder]",
    "model.decoder.dropout=0.0",
    "train.iters=3",
    "checkpoint.every=1",
)
EXACT += (
    "optimizer={name: SGD, lr: 1e-3, head_lr_factor: 1.0, momentum: 0.9}",
    "schedule.warmup=0",
)


@pytest.mark.parametrize("losses", ["all", "cross-entropy"])
def test_two_processes_equal_one(tmp_path, losses):
    """float64: after one step SGD's momentum is the gradient; three data-dependent steps, uneven ignored pixels and
    shards."""
    options = [
        *EXACT,
        *(
            ["losses.occl.weight=0", "model.classifier={name: linear.Linear}"]
            if losses != "all"
            else []
        ),
    ]
    for name, processes in (("one", 1), ("two", 2)):
        code, output = run(tmp_path / name, *options, processes=processes, double=True)
        assert code == 0, output
    for step in (1, 3):
        one, two = (
            checkpoint.load(tmp_path / name / f"step_{step:07d}.pt") for name in ("one", "two")
        )
        assert one["model"]["decoder.join.0.weight"].dtype == torch.float64
        assert_same_state(one, two, 1e-10, ("model", "teacher", "prototypes", "optimizer"))
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for step in (1, 2, 3):
        for key in ("train/loss", "train/loss_cross_entropy", "train/loss_occl", "train/grad_norm"):
            assert one[step][key] == pytest.approx(two[step][key], rel=0, abs=1e-10), (step, key)
    matrices = [
        json.loads((tmp_path / name / "eval" / "toy.json").read_text())["matrix"]
        for name in ("one", "two")
    ]
    assert matrices[0] == matrices[1] and sum(map(sum, matrices[0])) > 0


def test_accumulating_equals_one_batch_for_cross_entropy_prototypes_and_metrics(tmp_path):
    options = [*EXACT, "losses=[{name: cross_entropy.CrossEntropy}]"]
    for name, accumulate in (("one", 1), ("two", 2)):
        code, output = run(tmp_path / name, *options, f"train.accumulate={accumulate}", double=True)
        assert code == 0, output
    assert_same_state(
        last(tmp_path / "one"),
        last(tmp_path / "two"),
        1e-10,
        ("model", "teacher", "prototypes", "optimizer"),
    )
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert all(
        one[s]["train/loss"] == pytest.approx(two[s]["train/loss"], rel=0, abs=1e-10) for s in one
    )
    matrices = [
        json.loads((tmp_path / name / "eval" / "toy.json").read_text())["matrix"]
        for name in ("one", "two")
    ]
    assert matrices[0] == matrices[1]


def test_automatic_class_weights_come_from_the_labels_of_the_training_set(tmp_path):
    cfg = load(TINY, [f"data.cache={tmp_path}"])
    data = build_data(cfg)
    weights = median_frequency(count_classes(data.train, cfg))
    named = ", ".join(f"{c}: {float(w)!r}" for c, w in zip(data.train.CLASSES, weights))
    options = ("train.iters=2", f"data.cache={tmp_path}")
    auto, given, none = (
        train(tmp_path / name, *options, f"losses.cross_entropy.class_weights={weights}")
        for name, weights in (("auto", "auto"), ("given", f"{{{named}}}"), ("none", "none"))
    )
    for step in (1, 2):
        a, b, c = (run[step]["train/loss_cross_entropy"] for run in (auto, given, none))
        assert a == b != c


def test_accumulated_occl_is_the_mean_over_micro_batches(tmp_path):
    """Centroids couple the pixels of a micro-batch, so 2 x 2 is the mean of two losses over 2, not the loss over 4."""
    only = ("losses=[{name: occl.OCCL}]", *EXACT, "train.iters=1")
    code, output = run(tmp_path / "two", *only, "train.accumulate=2", double=True)
    assert code == 0, output
    code, output = run(
        tmp_path / "first",
        *only,
        "train.batch_size=2",
        "train.iters=2",
        "optimizer.lr=1e-30",
        double=True,
    )
    assert code == 0, output
    halves = scalars(
        tmp_path / "first"
    )  # at learning rate 0 steps 1 and 2 are the two micro-batches
    mean = (halves[1]["train/loss"] + halves[2]["train/loss"]) / 2
    assert scalars(tmp_path / "two")[1]["train/loss"] == pytest.approx(mean, rel=0, abs=1e-10)


def stop_the_second(log, rank):
    """In the second process: SIGTERM once the log has a line."""

    def stop():
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1:
        threading.Thread(target=stop, daemon=True).start()


def test_sigterm_to_one_of_two_processes_stops_both(tmp_path):
    folder = tmp_path / "run"
    before = functools.partial(stop_the_second, folder / "scalars.jsonl")
    options = ("train.iters=100000", "checkpoint.every=100000")
    code, output = run(folder, *options, processes=2, before=before)
    assert code == 0, output
    assert last(folder)["step"] > 0 and len(last(folder)["rng"]) == 2


# --- precision and degenerate batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_on_the_cpu(tmp_path, precision):
    values = train(
        tmp_path / "run",
        f"precision={precision}",
        "train.iters=4",
        "data.train.length=4",
        "data.augment.crop=[33, 41]",
        "optimizer.lr=3e-3",
        "model.channels_last=true",
    )
    assert values[4]["train/loss_cross_entropy"] < values[1]["train/loss_cross_entropy"]
    assert all(
        v.dtype == torch.float32
        for v in last(tmp_path / "run")["prototypes"].values()
        if v.is_floating_point()
    )
    assert ("train/amp_scale" in values[4]) == (precision == "fp16")


def test_a_step_that_fp16_skips_leaves_teacher_and_prototypes_alone(tmp_path, monkeypatch):
    original = precision.make_scaler
    scaler = {}

    def overflowing(device, precision):
        scaler["it"] = torch.amp.GradScaler(
            device.type, init_scale=2.0**120
        )  # every gradient overflows
        return scaler["it"]

    monkeypatch.setattr(precision, "make_scaler", overflowing)
    train(tmp_path / "run", "precision=fp16", "train.iters=1", "checkpoint.every=1")
    monkeypatch.setattr(precision, "make_scaler", original)
    state = last(tmp_path / "run")
    assert state["teacher"]["updates"] == 0 and not state["prototypes"]["centroids.seen"].any()
    assert scaler["it"].get_scale() < 2.0**120


@pytest.mark.parametrize("value", [255, 3])
def test_all_ignored_and_single_class_batches_train_on(tmp_path, monkeypatch, value):
    original = train_supervised.Batch.load

    def uniform_labels(batch, device):
        batch = original(batch, device)
        batch.label.fill_(value)
        return batch

    monkeypatch.setattr(train_supervised.Batch, "load", uniform_labels)
    values = train(tmp_path / "run", "train.iters=3")
    assert all(abs(values[step]["train/loss"]) < float("inf") for step in values)
    assert (values[1]["train/loss"] == 0) == (value == 255)
    assert all(
        v.isfinite().all()
        for v in last(tmp_path / "run")["model"].values()
        if v.is_floating_point()
    )


# --- what is not finite ----------------------------------------------------------------------------------------------


def finite(state):
    return all(v.isfinite().all() for v in leaves(state).values() if torch.is_tensor(v))


@pytest.mark.parametrize(
    ("where", "precision", "every"),
    [
        ("loss", "fp32", 1),
        ("loss", "bf16", 4),
        ("gradient", "fp32", 4),
        ("gradient", "bf16", 1),
        ("image", "fp32", 1),
        ("image", "bf16", 4),
    ],
)
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(
    tmp_path, monkeypatch, where, precision, every
):
    """Step 3 of 6; the log and the checkpoints, every so many steps, see it then or later."""
    options = (f"precision={precision}", f"log.every={every}", f"checkpoint.every={every}")
    options += ("checkpoint.keep=10", "eval.every=0")
    plant(monkeypatch, where, 2)
    met = []  # torchrun ends all processes with the first that leaves
    file = tmp_path / "run" / "debug_step_0000003.pt"
    monkeypatch.setattr(distributed, "barrier", lambda: met.append(file.is_file()))
    with pytest.raises(UserError, match=r"step 3: .* is (nan|inf)\. It was not taken") as failure:
        train(tmp_path / "run", *options)
    assert met[-1]
    assert "checkpoints before are intact" in str(failure.value)
    debug = checkpoint.load(tmp_path / "run" / "debug_step_0000003.pt")
    assert finite(debug["model"]) and finite(debug["teacher"]) and finite(debug["prototypes"])
    steps = [int(path.stem[5:]) for path in checkpoint.list_steps(tmp_path / "run")]
    assert steps == [2, 1] * (every == 1)
    # What it holds is the state before the step, as a run has it that is not disturbed.
    monkeypatch.undo()
    train(tmp_path / "whole", *options, "checkpoint.every=2")
    before = checkpoint.load(tmp_path / "whole" / "step_0000002.pt")
    for state in (debug, before):
        state["optimizer"] = state["optimizer"]["state"]  # rates are those of the step
    assert_same_state(debug, before)
    assert all(
        torch.equal(a, b) for a, b in zip(*(leaves(s["rng"]).values() for s in (debug, before)))
    )
    assert debug["batch"]["train"]["sample"].tolist() == [8, 9, 10, 11]
    # It can be replayed: the fault again with what caused it, and the rest of the run without.
    replay = (
        *options,
        "checkpoint.every=100",
        f"resume={tmp_path / 'run' / 'debug_step_0000003.pt'}",
    )
    plant(monkeypatch, where, 2)
    with pytest.raises(UserError, match="step 3: "):
        train(tmp_path / "again", *replay)
    monkeypatch.undo()
    train(tmp_path / "run", *replay)
    assert_same_state(last(tmp_path / "run"), last(tmp_path / "whole"))


def plant(monkeypatch, where, step):
    """Make one step of OCCL not finite: its value, its gradient alone, or the picture that it comes from."""
    forward, load = OCCL.forward, train_supervised.Batch.load

    def planted(self, record):
        loss = forward(self, record)
        if record.number != step:
            return loss
        if where == "loss":
            return loss * torch.nan
        if where == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    def poisoned(batch, device):
        batch = load(batch, device)
        if batch.numbers[0] == 4 * step:
            batch.image[0, 0, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(OCCL, "forward", planted)
    if where == "image":
        monkeypatch.setattr(train_supervised.Batch, "load", poisoned)


def poison_the_second(rank):
    """In the second process: OCCL is infinite in the second step."""
    forward = OCCL.forward

    def planted(self, step):
        loss = forward(self, step)
        bad = step.number == 1 and rank == 1
        return (loss * 0 + torch.tensor(torch.inf)).detach() + loss * 0 if bad else loss

    OCCL.forward = planted


def test_two_processes_agree_that_one_of_them_was_not_finite(tmp_path):
    options = ("checkpoint.every=1", "log.every=3")
    code, output = run(tmp_path / "run", *options, processes=2, before=poison_the_second)
    assert code == 1 and output.count("NonFinite: step 2: loss_occl is inf") == 2, output
    assert finite(last(tmp_path / "run")["model"]) and last(tmp_path / "run")["step"] == 1


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """A gradient that is finite, times a learning rate that is not sensible."""
    options = ("optimizer={name: SGD, lr: 1e38}", "schedule.warmup=0", "train.iters=1")
    options += ("losses.cross_entropy.weight=1000",)
    with pytest.raises(UserError, match=r"step 1: model\.\S+ is not finite.*optimizer\.lr"):
        train(tmp_path / "run", *options)
    assert not checkpoint.list_steps(tmp_path / "run") and not (tmp_path / "run/best.pt").exists()
    assert not (tmp_path / "run" / "results.json").exists()


# --- resume=PATH, and what a run leaves -------------------------------------------------------------------------------


def test_a_named_checkpoint_goes_on_and_nothing_that_is_there_is_lost(tmp_path):
    folder, path = tmp_path / "run", tmp_path / "run" / "step_0000003.pt"
    train(folder)
    old = last(folder)
    other = (f"resume={path}", "optimizer.lr=1e-4", "checkpoint.keep=1", "checkpoint.every=100")
    other += ("optimizer.weight_decay=0.5",)
    train(folder, *other)
    assert last(folder)["config"]["optimizer"]["lr"] == 1e-4 and last(folder)["step"] == 6
    groups = last(folder)["optimizer"]["param_groups"]  # trained with, not only told
    assert {group["base_lr"] for group in groups} == {1e-4, 2e-4}
    assert max(group["weight_decay"] for group in groups) == 0.5
    assert_same_state(checkpoint.load(folder / "abandoned" / "step_0000006.pt"), old)
    # The queue starts the same command again: it goes on from what it wrote, though PATH is gone by now.
    assert not path.exists()
    before = last(folder)
    train(folder, *other)
    assert_same_state(last(folder), before)
    # Who goes back a second time loses nothing either.
    torch.save(old | {"step": 3}, path)
    train(folder, *other, "optimizer.lr=1e-5")
    assert_same_state(checkpoint.load(folder / "abandoned" / "step_0000006.pt"), old)
    assert_same_state(checkpoint.load(folder / "abandoned1" / "step_0000006.pt"), before)


def test_the_best_network_of_the_run_that_was_left_is_not_that_of_the_new_one(tmp_path):
    """Neither in its folder nor in another one."""
    folder = tmp_path / "run"
    train(folder, "eval.every=1", "checkpoint.every=1")
    path, best = folder / "step_0000003.pt", checkpoint.load(folder / "best.pt")
    torch.save(checkpoint.load(path) | {"best": 100.0}, path)
    again = (f"resume={path}", "eval.every=1", "eval.patience=1", "optimizer.lr=1e-12")
    train(tmp_path / "other", *again)
    train(folder, *again)
    assert checkpoint.load(folder / "abandoned" / "best.pt")["step"] == best["step"]
    for place in (tmp_path / "other", folder):
        own = checkpoint.load(place / "best.pt")
        assert own["step"] >= 4 and own["best"] < 100
        results = json.loads((place / "results.json").read_text())
        assert results["step"] >= 4 and results["best_val"] == own["best"]


def test_a_run_without_best_pt_reports_its_last_network(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_light", lambda *_: None)  # the disk was full
    train(tmp_path, *PATIENT)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == last(tmp_path)["step"] < 9


@pytest.mark.parametrize("config", [TINY, TINY_UDA])
def test_a_named_checkpoint_that_the_stages_do_not_lead_to_is_one_sentence(tmp_path, config):
    train(tmp_path / "run", "eval.pictures=0", config=config)
    path = checkpoint.list_steps(tmp_path / "run")[0]
    shorter = ["train.iters=2"]
    if config == TINY_UDA:
        shorter += ["stages=[{name: adapt}]", "stages=[{name: source, iters: 4}, {name: adapt}]"]
    for override in shorter:
        with pytest.raises(UserError, match=r"is at step 6, in stage [12]: .* do not lead there"):
            train(tmp_path / "again", override, f"resume={path}", config=config)
        assert not (tmp_path / "again" / "results.json").exists()


def test_a_damaged_newest_checkpoint_costs_no_good_one(tmp_path):
    train(tmp_path, "train.iters=3")
    (tmp_path / "step_0000005.pt").write_bytes(b"damaged")
    train(tmp_path, "train.iters=4", "checkpoint.keep=1")
    assert [path.name for path in checkpoint.list_steps(tmp_path)] == ["step_0000004.pt"]
    assert (tmp_path / "abandoned" / "step_0000005.pt").read_bytes() == b"damaged"


def test_a_longer_run_goes_on_also_when_the_queue_asks_again(tmp_path):
    folder = tmp_path / "run"
    train(folder, "train.iters=3")
    train(folder, "train.iters=5", "checkpoint.every=1")
    checkpoint.list_steps(folder)[0].unlink()  # killed at step 4
    train(folder, "train.iters=5", "checkpoint.every=1")
    assert list(scalars(folder)) == [1, 2, 3, 4, 5]


def test_other_data_than_the_checkpoints_is_named(tmp_path):
    folder = tmp_path / "run"
    train(folder, "train.iters=2")
    with pytest.raises(ValueError, match=r"data\.train"):
        train(folder, "train.iters=2", "data.train.length=9")
    saved = last(folder)
    torch.save(saved | {"data": {"train": [8, "0123456789abcdef"]}}, folder / "step_0000002.pt")
    with pytest.raises(UserError, match=r"8 images then, 10 now.*resume="):
        train(folder, "train.iters=2")
    train(folder, "train.iters=3", f"resume={folder / 'step_0000002.pt'}")


def test_a_damaged_line_of_the_scalars_is_dropped(tmp_path):
    folder = tmp_path / "run"
    train(folder, "train.iters=3")
    whole = (folder / "scalars.jsonl").read_text()
    (folder / "scalars.jsonl").write_text(whole + '{"step": 3, "train/lo')
    train(folder, "train.iters=5")
    assert list(scalars(folder)) == [1, 2, 3, 4, 5]


def test_log_txt_has_the_loss_the_rate_the_pace_and_the_time_that_is_left(tmp_path):
    train(tmp_path / "run", "train.iters=2")
    lines = [
        line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if " step " in line
    ]
    pattern = (
        r"\S+ \S+ step 2/2  loss \d+\.\d{4}  lr \d\.\d\de-\d\d  \d+\.\d{3} s/step  "
        r"\d+\.\d images/s  \d+% waiting  \d+\.\d\d GiB  eta 00:00:00"
    )
    assert re.fullmatch(pattern, lines[1]), lines


@pytest.mark.parametrize("step", [2, 4])
def test_a_validation_that_a_signal_prevents_is_made_up_for(tmp_path, monkeypatch, step):
    options = ("eval.every=2", "train.iters=4", "checkpoint.every=100")
    train(tmp_path / "whole", *options)
    log = Run.log

    def interrupted(self, *arguments):
        signals.received = signal.SIGTERM if self.done == step - 1 else signals.received
        log(self, *arguments)

    monkeypatch.setattr(Run, "log", interrupted)
    train(tmp_path / "parts", *options)
    assert last(tmp_path / "parts")["step"] == step and last(tmp_path / "parts")["pending"]
    assert (tmp_path / "parts" / "best.pt").exists() == (step > 2)
    monkeypatch.undo()
    train(tmp_path / "parts", *options)
    ends = [last(tmp_path / name) for name in ("parts", "whole")]
    assert ends[0]["best"] == ends[1]["best"] and not ends[0]["pending"]
    assert_same_state(*ends)
    best = [checkpoint.load(tmp_path / name / "best.pt") for name in ("parts", "whole")]
    assert best[0]["step"] == best[1]["step"]
    assert_same_state(*best, keys=("model", "teacher", "prototypes"))


def test_a_signal_while_the_last_step_is_saved_leaves_before_the_report(tmp_path, monkeypatch):
    save = Run.save

    def interrupted(self):
        save(self)
        signals.received = signal.SIGTERM if self.final else signals.received

    monkeypatch.setattr(Run, "save", interrupted)
    train(tmp_path / "run", "train.iters=2", "eval.pictures=0")
    assert last(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "results.json").exists()
    assert "SIGTERM: saved at step 2" in (tmp_path / "run" / "log.txt").read_text()
    monkeypatch.undo()
    train(tmp_path / "run", "train.iters=2", "eval.pictures=0")
    assert (tmp_path / "run" / "results.json").is_file()


# --- fine-tuning ---------------------------------------------------------------------------------------------------


def test_a_run_goes_from_the_classes_of_camvid_to_three_others_and_on(tmp_path, capsys):
    quick = ["train.iters=1", "eval.pictures=0", "data.val={name: none}"]
    train(tmp_path / "camvid", *quick)
    start = checkpoint.list_steps(tmp_path / "camvid")[0]
    given = checkpoint.load(start)
    space = "{ground: [Road, Pavement], wheels: [Car, Bicyclist], sky: [Sky]}"
    three = [f"data.{name}.label_space={space}" for name in ("train", "test.toy")]
    three += [f"model.init={start}", "optimizer.lr=1e-12", *quick]
    train(tmp_path / "three", *three)
    saved, text = last(tmp_path / "three"), capsys.readouterr().out
    assert saved["classes"] == ["ground", "wheels", "sky"] and len(given["classes"]) == 11
    assert "here ground, wheels, sky: the classifier is left out." in text
    assert "missing  2 keys: classifier.prototypes (2), which keep their initial values" in text
    for key in ("backbone.conv1.weight", "decoder.convs.0.0.weight", "decoder.join.0.weight"):
        torch.testing.assert_close(saved["model"][key], given["model"][key], rtol=0, atol=1e-8)
    assert saved["model"]["classifier.prototypes.vectors"].shape == (3, 16)
    start.unlink()  # what goes on no longer needs it
    assert [*train(tmp_path / "three", *three, "train.iters=2")] == [1, 2]


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_classes_of_test_and_training_data_must_agree(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.jpg")
    Image.new("L", (8, 8)).save(tmp_path / "labels" / "a.png")
    spec = f"{{name: folder.Folder, root: {tmp_path}, image_dir: images, label_dir: labels, classes: [one, two]}}"
    with pytest.raises(
        ValueError, match=r"data\.test\.mine has 2 classes \(one, two\) and data\.train has 11"
    ):
        train(tmp_path / "run", f"data.test.mine={spec}")


def test_too_few_feature_channels_for_cbp_names_both_numbers(tmp_path):
    with pytest.raises(
        ValueError, match=r"cbp\.CBP: 11 classes need at least 11 feature channels.*has 8"
    ):
        train(tmp_path / "run", "model.decoder.width=8")


def test_batch_that_does_not_divide_names_the_numbers(tmp_path):
    with pytest.raises(
        ValueError, match=r"batch_size 4 does not divide into 1 processes x 3 micro-batches"
    ):
        train(tmp_path / "run", "train.accumulate=3")


def test_a_mistake_ends_the_script_with_one_line_and_no_traceback(tmp_path):
    arguments = command(tmp_path / "run", "optimizer.lrr=1")
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?" in result.stderr


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(tmp_path):
    folder = tmp_path / "run"
    train(folder, "train.iters=1")
    (folder / "step_0000002.pt.tmp.1").write_text("a save of the first run")
    claim(folder)
    code, output = run(folder, "train.iters=1")
    release(folder)
    assert code != 0 and f"another run is writing to {folder}" in output
    assert (folder / "step_0000002.pt.tmp.1").exists()
    code, output = run(folder, "train.iters=1")
    assert code == 0 and not (folder / "step_0000002.pt.tmp.1").exists(), output


@pytest.mark.parametrize("name", ["file/run", "r" * 300])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write the run folder .*{name}"):
        train(tmp_path / name)


def test_processes_predict_with_the_batch_statistics_that_are_saved(tmp_path):
    """Each of two processes predicts one of two images: a run that only reports again must say the same."""
    options = (
        "data.test.toy={name: toy.Toy, domain: real, split: test, length: 2, size: [32, 48]}",
        "data.augment.crop=[25, 37]",
        "train.iters=4",
        "train.teacher=0.5",
        "eval.pictures=0",
    )
    results = []
    for _ in range(2):
        code, output = run(tmp_path / "run", *options, processes=2)
        assert code == 0 and "broadcast_buffers" not in output, output
        results.append(json.loads((tmp_path / "run" / "results.json").read_text()))
        (tmp_path / "run" / "results.json").unlink()
    assert results[0]["IoU"] == results[1]["IoU"]
    assert results[0]["results"]["toy"]["mIoU"] > 0


@pytest.mark.parametrize(
    "config, loss, has",
    [
        (TINY, "{name: entropy.Entropy}", "'target', only for source"),
        (TINY_UDA, "{name: cross_entropy.CrossEntropy, view: strong}", "'strong', only for source"),
        (TINY_DG, "{name: entropy.Entropy}", "'target', only for source"),
    ],
)
def test_a_view_that_the_step_lacks_is_one_sentence(tmp_path, config, loss, has):
    with pytest.raises(
        UserError, match=f"for {has}.*: give the loss or the prototypes another view"
    ):
        train(tmp_path / "run", f"losses=[{loss}]", config=config)


OTHERS = {
    "model.decoder.width=12": r"'model' .*: \d+ keys match; \d+ of another shape \(decoder",
    "model.classifier.name=linear.Linear": r"'model' .*: .* missing \(classifier.* unexpected",
    "prototypes.centroids.name=none": r"'prototypes' .*: .* unexpected \(centroids",
    "optimizer.name=SGD": "'optimizer' .*: its options are others",
    "optimizer.weight_decay=0": "",
    "train.teacher=0.9": "'teacher' .*: there is none",
}


def test_a_checkpoint_of_another_network_is_one_sentence(tmp_path):
    path = tmp_path / "one" / "step_0000001.pt"
    train(path.parent, "train.iters=1", "train.teacher=0")
    for number, (option, says) in enumerate(OTHERS.items()):
        options = ("train.teacher=0", option, f"resume={path}", "train.iters=1")
        says = rf"{path} cannot be resumed from, its {says}.*configuration" if says else ""
        with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
            train(tmp_path / str(number), *options)


def test_a_checkpoint_of_another_script_is_one_sentence(tmp_path):
    for config, other in ((TINY_UDA, TINY), (TINY, TINY_UDA)):
        folder = tmp_path / Path(config).stem
        train(folder, "train.iters=1", config=config)
        newest = checkpoint.list_steps(folder)[0]
        with pytest.raises(UserError, match=f"{newest} cannot be resumed from: .* wrote it"):
            train(tmp_path / "again", f"resume={newest}", config=other)


def test_subsets_of_other_classes_are_found_before_the_training(tmp_path):
    options = ("train.iters=1", "eval.subsets={top: [grass]}")
    with pytest.raises(UserError, match=r"eval\.subsets\.top names the class 'grass'"):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_what_a_kill_leaves_of_a_report_is_removed_by_the_next(tmp_path):
    train(tmp_path / "run", "train.iters=1")
    left = [tmp_path / "run" / "eval" / f".toy.123.tmp.{end}" for end in ("json", "csv", "png")]
    mine = tmp_path / "run" / "eval" / ".notes.tmp.txt"
    for path in (*left, mine):
        path.write_text("cut")
    train(tmp_path / "run", "train.iters=1")
    assert not any(path.exists() for path in left) and mine.exists()


@pytest.mark.parametrize(
    "crop, options",
    [
        (8, ["train.batch_size=1", "model.decoder={name: deeplabv3plus.DeepLabV3Plus, width: 12}"]),
        (16, ["model.backbone={name: mit.MiT, size: b0, weights: none}"]),
    ],
)
def test_crops_too_small_for_the_network_are_one_sentence(tmp_path, crop, options):
    says = rf"cannot take \d x {crop}x{crop} pixels .*: set a larger data\.augment\.crop"
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", f"data.augment.crop=[{crop}, {crop}]", *options)
