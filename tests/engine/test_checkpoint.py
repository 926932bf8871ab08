"""Checkpoints survive kills and refuse what is unsafe; foreign weights fit or say which keys do not."""

import argparse
import contextlib
import logging
import os
import re
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import checkpoint, distributed, weights
from engine.config import Config
from engine.errors import UserError
from engine.weights import WeightsError, load_into, load_pretrained


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


def truncate(path, size=None):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if size is None else size])


class Foreign:
    """A class that an untrusted file may name."""


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))


def test_the_first_value_that_is_not_finite_is_named():
    state = network().state_dict() | {"updates": 3}
    assert checkpoint.first_nonfinite(state) is None
    for value in (float("nan"), float("inf")):
        broken = state | {name: state[name].clone() for name in ("1.running_mean", "2.weight")}
        broken["1.running_mean"][1] = broken["2.weight"][0, 0] = value
        assert checkpoint.first_nonfinite(broken) == "1.running_mean"


def other_weights():
    """A state dict for `network` in which every value differs from the initial one."""
    return {key: torch.full_like(value, 7) for key, value in network().state_dict().items()}


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
    checkpoint.tidy(tmp_path, 1, "auto")
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


# --- foreign weights -----------------------------------------------------------------------------------------------


def wrap_as(name, state):
    prefixed = {f"module.{key}": value for key, value in state.items()}
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {}},
        "module": prefixed,
        "state_dict and module": {"state_dict": prefixed},
    }[name]


@pytest.mark.parametrize(
    "form", ["plain", "state_dict", "model", "module", "state_dict and module"]
)
def test_weights_are_unwrapped_loaded_and_reported(log, form):
    net = network()
    load_into(net, wrap_as(form, other_weights()), source="some weights")
    assert all((value == 7).all() for value in net.state_dict().values())
    assert "weights some weights: 8 keys loaded, 0 keep their initial values" in log.text


def test_every_kind_of_misfit_is_named_and_nothing_is_loaded():
    net, state = network(), other_weights()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    del state["0.bias"]
    state["fc.weight"] = torch.zeros(1)
    state["2.weight"] = torch.zeros(5, 3)
    with pytest.raises(WeightsError) as error:
        load_into(net, state, source="some weights")
    for part in (
        "some weights",
        "Sequential",
        "6 keys match",
        "1 missing (0.bias)",
        "1 unexpected (fc.weight)",
        "1 of another shape (2.weight (5, 3) -> (1, 3))",
        "allow_missing",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_each_misfit_alone_is_an_error(change):
    state = other_weights()
    if change == "missing":
        del state["0.weight"]
    else:
        state["3.weight" if change == "unexpected" else "0.bias"] = torch.zeros(9)
    with pytest.raises(WeightsError, match={"shape": "another shape"}.get(change, change)):
        load_into(network(), state, source="weights")


def test_what_may_be_missing_keeps_its_values_and_what_is_dropped_is_not_loaded(log):
    net, state = network(), other_weights()
    kept = net[2].weight.clone()
    state = {key: value for key, value in state.items() if key != "0.bias"} | {
        "fc.weight": torch.zeros(1),
        "2.weight": torch.ones(9),
    }
    load_into(
        net, state, source="weights", allow_missing=["0.b*", "2.*"], drop=["fc.*", "2.weight"]
    )
    assert torch.equal(net[2].weight, kept) and (net[0].weight == 7).all()
    assert "6 keys loaded, 2 keep their initial values (0.bias, 2.weight)" in log.text


def test_allow_missing_does_not_excuse_another_shape():
    with pytest.raises(WeightsError, match="of another shape"):
        load_into(
            network(),
            other_weights() | {"2.weight": torch.ones(9)},
            source="weights",
            allow_missing=["*"],
        )


def test_batch_counters_may_be_absent_on_either_side():
    state = {key: value for key, value in other_weights().items() if "num_batches" not in key}
    load_into(network(), state | {"9.num_batches_tracked": torch.tensor(1)}, source="weights")


# --- the option `weights` ------------------------------------------------------------------------------------------

URL = "https://example.org/net.pth"


def test_pretrained_none_changes_nothing(monkeypatch):
    net = network()
    before = net[0].weight.clone()
    load_pretrained(net, "none", URL)
    assert torch.equal(net[0].weight, before)


def test_pretrained_path_and_its_options(tmp_path):
    torch.save(other_weights() | {"fc.weight": torch.zeros(1)}, tmp_path / "a.pth")
    net = network()
    load_pretrained(net, str(tmp_path / "a.pth"), URL, drop=["fc.*"])
    assert (net[0].weight == 7).all()
    with pytest.raises(WeightsError, match=r"a\.pth.*unexpected \(fc\.weight\)"):
        load_pretrained(network(), str(tmp_path / "a.pth"), URL)
    with pytest.raises(WeightsError, match="there is no file imagnet"):
        load_pretrained(network(), "imagnet", URL)


def test_pretrained_imagenet_is_downloaded_once_and_read_like_any_file(tmp_path, monkeypatch):
    asked = []

    def download(url, target, hash_prefix):
        asked.append((url, hash_prefix))
        torch.save(other_weights(), target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(weights, "reach", lambda url: None)
    for url in (URL, "https://example.org/net-c867db91.pth"):
        for _ in range(2):
            net = network()
            load_pretrained(net, "imagenet", url)
            assert (net[0].weight == 7).all()
    assert asked == [(URL, None), ("https://example.org/net-c867db91.pth", "c867db91")]
    truncate(tmp_path / "checkpoints" / "net.pth")
    with pytest.raises(WeightsError, match=r"checkpoints/net\.pth is incomplete"):
        load_pretrained(network(), "imagenet", URL)


@pytest.mark.parametrize("fails", ["reach", "download"])
def test_a_download_that_fails_names_the_url_and_the_way_out(tmp_path, monkeypatch, fails):
    def fail(*options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reach, download = (fail, pytest.fail) if fails == "reach" else (lambda url: None, fail)
    monkeypatch.setattr(weights, "reach", reach)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    says = rf"{re.escape(URL)}.*no route to host.*weights=PATH.*weights=none"
    with pytest.raises(WeightsError, match=says):
        load_pretrained(network(), "imagenet", URL)


@pytest.mark.parametrize("code", [404, 0])
def test_a_server_answers_or_fails_within_seconds(monkeypatch, code):
    def answer(request, timeout):
        assert timeout <= 10 and request.method == "HEAD"
        raise urllib.error.HTTPError(URL, code, "", {}, None) if code else TimeoutError

    monkeypatch.setattr(weights, "urlopen", answer)
    with contextlib.nullcontext() if code else pytest.raises(OSError):
        weights.reach(URL)
