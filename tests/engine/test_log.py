"""Averages of the log."""

import torch

from engine.log import Averages


def test_averages_are_means_since_the_last_look():
    averages = Averages()
    for value in (1.0, 2.0):
        averages.add({"train/loss": torch.tensor(value), "train/loss_occl": torch.tensor(3.0)})
    assert averages.take() == {"train/loss": 1.5, "train/loss_occl": 3.0} and averages.take() == {}
