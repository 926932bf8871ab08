"""What every test starts from: one thread, a fixed seed, the usual signal handlers."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # the training scripts install their own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
