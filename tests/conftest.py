"""What every test starts from: one thread, a fixed seed, the usual signal handlers."""

import signal

import pytest
import torch

from engine import process


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    # A script that a test calls in this process must not end the tests with it.
    monkeypatch.setattr(process, "end_by_force", lambda code, seconds: None)
    monkeypatch.setattr(process, "kill_loaders", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # the training scripts install their own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
