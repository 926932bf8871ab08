"""Checkpoints survive kills and refuse what is unsafe."""

import argparse
import logging
import os
import random
import re
from pathlib import Path

import pytest
import torch

from engine import checkpoint, distributed, process, weights
from engine.config import Config
from engine.errors import UserError
from engine.weights import WeightsError
from tests.engine.damaged import network, truncate
from tests.fuzz.files import a_checkpoint


def find(folder, resume):
    """The checkpoint that a run goes on from, None for a fresh start."""
    path, saved = checkpoint.find(Config({"folder": str(folder), "resume": resume}))
    assert (path is None) == (saved is None)
    return saved


def content(step, **more):
    """The smallest checkpoint that a run can go on from."""
    states = {"model": {"w": torch.full((3,), float(step))}, "prototypes": {}, "scaler": {}}
    states["optimizer"] = {"state": {}, "param_groups": []}
    about = {"config": {}, "classes": ["a"], "palette": [[0, 0, 9]], "best": -1.0, "seconds": 0.0}
    return {"step": step, "rng": [checkpoint.rng_state()], **states, **about, **more}


def steps(folder):
    return [int(path.stem[5:]) for path in checkpoint.list_steps(folder)]


class Foreign:
    """A class that an untrusted file may name."""


def test_the_first_value_that_is_not_finite_is_named():
    state = network().state_dict() | {"updates": 3}
    assert checkpoint.first_nonfinite(state) is None
    for value in (float("nan"), float("inf")):
        broken = state | {name: state[name].clone() for name in ("1.running_mean", "2.weight")}
        broken["1.running_mean"][1] = broken["2.weight"][0, 0] = value
        assert checkpoint.first_nonfinite(broken) == "1.running_mean"


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="engine")
    return caplog


# --- writing -------------------------------------------------------------------------------------------------------


def test_save_and_load_are_bit_exact(tmp_path):
    bits = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    saved = content(3) | {
        "model": {
            "float32": torch.randn(64),
            "bf16": torch.randn(7).bfloat16(),
            "nan": torch.tensor([float("nan"), -0.0]),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999)}],
        },
        "rng": [{"torch": torch.get_rng_state()}],
        "prototypes": {
            "bits": bits.view(torch.float64).clone(),
            "seen": torch.tensor([True, False]),
            "count": bits,
        },
        "config": {
            "optimizer": {"lr": 1e-5},
            "losses": [{"name": "occl.OCCL"}],
            "data": {"root": None},
        },
    }
    checkpoint.save(tmp_path / "a.pt", saved)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded.pop("format") == checkpoint.FORMAT
    assert list(loaded) == list(saved) and loaded["config"] == saved["config"]
    for part in ("model", "prototypes"):
        for key, value in saved[part].items():
            same = loaded[part][key]
            assert same.dtype == value.dtype and torch.equal(
                same.view(torch.uint8), value.view(torch.uint8)
            ), key
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert torch.equal(loaded["rng"][0]["torch"], saved["rng"][0]["torch"])


def test_what_the_training_saves_consists_of_safe_types(tmp_path):
    """The optimiser's and the scaler's states too load without running code from the file."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    checkpoint.save(tmp_path / "a.pt", content(1) | state)
    assert checkpoint.load(tmp_path / "a.pt")["scaler"] == scaler.state_dict()


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, function):
    path = tmp_path / "step_0000001.pt"
    checkpoint.save(path, content(1))

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(function, fail)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} \(No space left.* GiB are free"):
        checkpoint.save(path, content(2))
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001.pt"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoint.save_step(tmp_path, content(1), keep=2)

    def kill(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_step(tmp_path, content(2), keep=2)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.tmp.*"))) == 1 and steps(tmp_path) == [1]
    assert find(tmp_path, "auto")["step"] == 1
    checkpoint.tidy(tmp_path, 1)
    assert not list(tmp_path.glob("*.tmp.*"))


def test_the_file_is_complete_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), real_fsync(file)))

    def replace(source, target):
        assert torch.load(source, weights_only=True)["step"] == 1 and not Path(target).exists()
        events.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(tmp_path / "a.pt", content(1))
    assert events == ["fsync", "replace"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_periodic_save_that_fails_is_a_warning_and_the_last_one_an_error(
    tmp_path, monkeypatch, log, error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    checkpoint.save_step(tmp_path, content(5), keep=1)
    assert (
        "step_0000005.pt" in log.text
        and str(error) in log.text
        and "training continues" in log.text
    )
    with pytest.raises(UserError, match=re.escape(str(error))):
        checkpoint.save_step(tmp_path, content(5), keep=1, final=True)
    assert not list(tmp_path.iterdir())


def test_only_the_newest_checkpoints_are_kept_and_other_files_stay(tmp_path):
    others = ["best.pt", "step_best.pt", "step_1.txt", "config.yaml"]
    for name in others:
        (tmp_path / name).write_text("")
    for step in (9, 100, 9_999_999, 10_000_000):
        checkpoint.save_step(tmp_path, content(step), keep=2)
    assert steps(tmp_path) == [10_000_000, 9_999_999]  # by number, not by name
    assert all((tmp_path / name).exists() for name in others)


def test_a_failed_save_removes_no_older_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_step(tmp_path, content(step), keep=2)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    checkpoint.save_step(tmp_path, content(3), keep=2)
    checkpoint.save(tmp_path / "best.pt", content(3), required=False)
    assert steps(tmp_path) == [2, 1] and len(list(tmp_path.iterdir())) == 2


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    checkpoint.save_step(tmp_path, content(1), keep=1)
    assert not list(tmp_path.iterdir())


# --- finding and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(tmp_path, log, size):
    for step in (1, 2, 3):
        checkpoint.save_step(tmp_path, content(step), keep=3)
    truncate(tmp_path / "step_0000003.pt", size)
    found = find(tmp_path, "auto")
    assert found["step"] == 2 and torch.equal(found["model"]["w"], torch.full((3,), 2.0))
    assert (
        "skipping" in log.text
        and "step_0000003.pt is incomplete" in log.text
        and "step_0000002.pt" not in log.text
    )


def test_without_a_usable_checkpoint_auto_starts_anew(tmp_path):
    assert find(tmp_path, "auto") is None
    assert find(tmp_path / "missing", "auto") is None
    (tmp_path / "step_0000001.pt").touch()
    assert find(tmp_path, "auto") is None


def test_none_starts_anew_but_never_into_the_folder_of_another_run(tmp_path):
    assert find(tmp_path, "none") is None
    checkpoint.save_step(tmp_path, content(1), keep=1)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} holds checkpoints.*folder="):
        find(tmp_path, "none")


def test_a_path_is_taken_as_it_is_and_must_exist(tmp_path):
    checkpoint.save_step(tmp_path / ".", content(1), keep=5)
    checkpoint.save_step(tmp_path / ".", content(2), keep=5)
    assert find(tmp_path, str(tmp_path / "step_0000001.pt"))["step"] == 1
    with pytest.raises(WeightsError, match=r"there is no file .*step_0000007\.pt"):
        find(tmp_path, str(tmp_path / "step_0000007.pt"))
    truncate(tmp_path / "step_0000002.pt")
    with pytest.raises(WeightsError, match=r"step_0000002\.pt is incomplete"):
        find(tmp_path, str(tmp_path / "step_0000002.pt"))


@pytest.mark.parametrize(
    "value, name",
    [(Path("x"), "PosixPath"), (argparse.Namespace(a=1), "Namespace"), (Foreign(), "Foreign")],
)
def test_a_file_that_could_run_code_is_refused_by_the_name_of_the_type(tmp_path, value, name):
    torch.save({"format": checkpoint.FORMAT, "step": 1, "args": value}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=rf"a\.pt.*{name}.*save its tensors alone: torch\.save"):
        checkpoint.load(tmp_path / "a.pt")


def test_an_unsafe_file_of_the_old_format_is_refused_too(tmp_path):
    torch.save({"args": Foreign()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"a\.pt.*more than tensors.*Foreign.*save its tensors"):
        weights.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE html><title>not found</title>",
        "version https://git-lfs.github.com/spec/v1\n",
        "x",
    ],
)
def test_a_web_page_or_a_pointer_is_not_advised_to_be_trusted(tmp_path, text):
    (tmp_path / "a.pth").write_text(text)
    with pytest.raises(WeightsError, match=r"a\.pth is incomplete or not a PyTorch file") as error:
        weights.read(tmp_path / "a.pth")
    assert "trust" not in str(error.value)


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, {"format": 99}, [1, 2], torch.zeros(2)])
def test_a_checkpoint_of_another_project_is_refused(tmp_path, foreign):
    torch.save(foreign, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt is not a checkpoint of this project"):
        checkpoint.load(tmp_path / "a.pt")


# --- random generators ---------------------------------------------------------------------------------------------


def test_the_random_generator_goes_on_where_it_was(tmp_path):
    checkpoint.save(tmp_path / "a.pt", content(1, rng=[checkpoint.rng_state()]))
    drawn = torch.rand(5)
    torch.manual_seed(99)
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert torch.equal(torch.rand(5), drawn)


def test_another_number_of_processes_is_a_warning(log):
    states = [checkpoint.rng_state()] * 2
    torch.rand(3)
    before = torch.get_rng_state()
    checkpoint.set_rng_state(states)
    assert "2 processes and there are 1 now" in log.text
    assert torch.equal(torch.get_rng_state(), before)


def test_find_takes_an_older_checkpoint_for_any_flip_in_the_newest(tmp_path, caplog):
    draw = random.Random(0)
    for step in (1, 2):
        checkpoint.save_step(tmp_path, a_checkpoint() | {"step": step}, keep=2)
    path, steps = tmp_path / "step_0000002.pt", []
    data = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        content = checkpoint.find(Config({"folder": tmp_path, "resume": "auto"}))[1]
        steps.append(content["step"])
        expected = a_checkpoint() | {"step": content["step"]}
        assert content.keys() == expected.keys()
        for part in ("model", "teacher", "prototypes"):
            assert all(torch.equal(content[part][key], x) for key, x in expected[part].items())
    assert {*steps} == {1, 2} and "step_0000002.pt is damaged" in caplog.text


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("at", [1, 2])
def test_a_signal_that_leaves_while_a_file_is_written_is_no_full_disk(
    at, required, tmp_path, monkeypatch
):
    written = torch.save

    class Interrupted:
        """PyTorch's writer may swallow the exit and raise an error of its own."""

        count = 0

        def write(self, data):
            self.count += 1
            if self.count == at:
                process.leave(129, "SIGHUP received")
            return len(data)

        def flush(self):
            pass

    monkeypatch.setattr(process, "end_by_force", lambda code, seconds: None)
    monkeypatch.setattr(process.signals, "code", None)
    monkeypatch.setattr(torch, "save", lambda content, file: written(content, Interrupted()))
    with pytest.raises(SystemExit) as caught:
        checkpoint.save(tmp_path / "last.pt", {"x": torch.zeros(10)}, required)
    assert caught.value.code == 129 and not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit) as caught:  # whatever comes of it, the first reason stays
        process.leave(1, "error: a file could not be written")
    assert caught.value.code == 129
