"""What every test starts from: one thread, a fixed seed, the usual signal handlers."""

import signal

import pytest
import torch

from engine import process


def usual_signals():
    """The training scripts install handlers; nohup and shells let their background jobs ignore some."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    usual_signals()
    # A script that a test calls in this process must not end the tests with it.
    monkeypatch.setattr(process, "end_by_force", lambda code, seconds: None)
    monkeypatch.setattr(process, "kill_loaders", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    usual_signals()
