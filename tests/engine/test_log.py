"""What a run leaves in its log: averages, figures, texts, the size of its network, a profile."""

import json
import re
import shlex
import subprocess
import sys
import time

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config import load
from engine.log import LAYOUT, SETTLED, Averages, Log, claim, facts, profiled, release, summary
from models.build import build_segmentor
from tests.runs import TINY, train

CPU = torch.device("cpu")


def test_averages_are_means_since_the_last_look():
    averages = Averages()
    for value in (1.0, 2.0):
        averages.add({"train/loss": torch.tensor(value), "train/loss_occl": torch.tensor(3.0)})
    assert averages.take() == {"train/loss": 1.5, "train/loss_occl": 3.0} and averages.take() == {}


def test_a_profile_of_so_many_steps_is_written_once_and_every_step_is_made(tmp_path):
    def steps(count):
        for number in profiled(range(20), count, tmp_path, CPU):
            yield number
            torch.ones(()).neg()

    path = tmp_path / "profile.pt.trace.json"
    assert [*steps(0)] == [*range(20)] and not path.exists()
    seen = [(number, path.exists()) for number in steps(3)]
    assert seen == [(number, number > SETTLED + 3) for number in range(20)]
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("cat") == "cpu_op"]
    assert names.count("aten::neg") == 3
    path.write_text("the first")
    assert [*steps(3)] == [*range(20)] and path.read_text() == "the first"


def test_a_run_says_how_long_it_waited_for_its_data(tmp_path, monkeypatch):
    given = torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data

    def slow(self):
        time.sleep(0.2)
        return given(self)

    loader = torch.utils.data.dataloader._SingleProcessDataLoaderIter
    small = ["data.val={name: none}", "data.test.toy.length=1", "eval.pictures=0"]
    with monkeypatch.context() as context:
        context.setattr(loader, "_next_data", slow)
        lines = train(tmp_path / "run", "train.iters=3", "log.every=2", *small, config=TINY)
    for line, steps in ((lines[2], 2), (lines[3], 1)):
        seconds = steps * 4 / line["train/images_per_sec"]  # since the last line alone
        assert 0.2 * steps <= line["train/waiting"] * seconds < seconds


def told(folder):
    """The texts in the event files of a run: {tag: bytes}."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["tensors"]
    return {tag: events.Tensors(tag)[0].tensor_proto.string_val[0] for tag in tags}


def test_tensorboard_has_the_configuration_and_a_layout(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    log = Log(tmp_path)
    log.text("test/toy", "mIoU 12.00", 7)
    log.close()
    texts = told(tmp_path)
    assert b"seed: 3" in texts["configuration/text_summary"]
    assert b"mIoU 12.00" in texts["test/toy/text_summary"]
    layout = texts["custom_scalars__config__"]
    assert all(chart.encode() in layout for page in LAYOUT.values() for chart in page)


def test_the_charts_of_the_layout_have_the_tags_of_real_runs():
    patterns = [p for page in LAYOUT.values() for _, tags in page.values() for p in tags]
    tags = ("train/loss_occl", "train/lr_head", "val/mIoU", "val/aAcc", "val/IoU_Car")
    tags += ("pseudo/share", "pseudo/accuracy", "pseudo/share_Car", "pseudo/accuracy_Car")
    assert all(any(re.fullmatch(p, tag) for p in patterns) for tag in tags)


def test_the_size_of_a_network_is_told_part_by_part():
    cfg = load(TINY)
    network = build_segmentor(cfg.model, list("abc"), pretrained=False)
    network.backbone.requires_grad_(False)
    state = torch.get_rng_state()
    text = summary(network, {"crop": [32, 64]})
    assert torch.equal(state, torch.get_rng_state()) and network.training
    count = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.decoder.parameters())
    assert "backbone ResNet 0.68 M" in text and "classifier CBP 0.00 M" in text
    assert f"all {count / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained" in text
    # The first convolution alone: 64 filters of 3 x 7 x 7 at half the size.
    least = 64 * 3 * 7 * 7 * 16 * 32
    adds = float(re.search(r"([\d.]+) G multiply-adds for 32x64 pixels", text)[1]) * 1e9
    twice = float(re.search(r"([\d.]+) G mult", summary(network, {"size": [64, 64]}))[1]) * 1e9
    assert least < adds < 20 * least and abs(twice - 2 * adds) < 2e7


def test_without_a_known_size_only_parameters_are_told():
    network = build_segmentor(load(TINY).model, list("abc"), pretrained=False)
    assert summary(network, {}).endswith("M trained")


def test_a_folder_that_a_killed_run_leaves_a_moment_later_is_taken(tmp_path):
    # The kernel frees the memory of a killed process before its locks.
    holds = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    holds += "print(flush=True); time.sleep(0.5)"
    command = [sys.executable, "-c", holds, tmp_path / ".lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        claim(tmp_path)
        assert other.wait() == 0
    release(tmp_path)


def test_damaged_bytes_in_the_scalars_are_dropped_and_what_is_no_number_is_left_out(tmp_path):
    path = tmp_path / "scalars.jsonl"
    path.write_bytes(b'\xff\xfe\n{"step": 1, "val/mIoU": 3.0}\n')
    log = Log(tmp_path, 1)
    log.scalars({"val/mIoU": float("nan"), "train/loss": 1.0}, 2)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "val/mIoU": 3.0}, {"step": 2, "train/loss": 1.0}]


def test_the_command_of_a_run_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "data.val={name: none}"])
    assert shlex.split(facts(CPU)["command"]) == sys.argv
