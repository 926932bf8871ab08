"""Averages of the log; figures that say where the time goes."""

import json
import time

import torch

from engine.log import SETTLED, Averages, profiled
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
