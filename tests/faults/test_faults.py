"""One real fault of each kind, in a real run; `python -m tests.soak` has the others, and random ones.

What must be true stands beside each fault in tests/soak.py: how the run ends, what it says, and what it leaves.
"""

import threading

import pytest

from engine.errors import UserError
from engine.log import Log
from tests import soak
from tests.runs import Forked

KINDS = (
    "truncated picture, 2 workers",
    "NaN loss, train_dg",
    "NaN gradient",
    "an error in one of 2 ranks",
    "the loaders of a killed run",
    "full disk while training",
    "nobody reads the output",
    "SIGTERM in training, loaders of a server",
    "SIGHUP in training",
    "second SIGTERM",
    "SIGTERM in preparation",
    "SIGINT in validation, to all",
    "SIGTERM in the report",
    "a run folder in use",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return soak.copy(tmp_path_factory.mktemp("faults") / "repository")


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_fails_ends_and_leaves_what_it_should(name, tmp_path, repository, monkeypatch):
    # The suite meets machines that take five times as long; `python -m tests.soak` holds the 10 s.
    monkeypatch.setattr(soak, "LIMIT", 30.0)
    try:
        soak.cause(name, tmp_path, repository=repository, popen=Forked)
    except soak.Skip as reason:
        pytest.skip(str(reason))


def test_every_function_that_causes_a_fault_is_in_the_suite():
    functions = {fault: run.func for fault, run in soak.FAULTS.items()}
    left = set(functions.values()) - {functions[name] for name in KINDS}
    assert {function.__name__ for function in left} == {"full_disk", "killed_rank"}


def test_a_full_disk_is_said_once_not_by_the_thread_of_tensorboard_too(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    log = Log(tmp_path)
    writer = log.writer._get_file_writer().event_writer._async_writer._worker

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._record_writer, "write", full)
    with pytest.raises(UserError, match=r"could not write the log in .*No space left"):
        for step in range(1, 100):
            log.scalars({"train/loss": 1.0}, step)
            writer.join(0.1)
    assert not capfd.readouterr().err
    monkeypatch.setattr(log.writer, "close", lambda: None)  # its thread has ended
    log.close()

    other = threading.Thread(target=lambda: 1 / 0)  # errors of ours keep their traceback
    other.start()
    other.join()
    assert "ZeroDivisionError" in capfd.readouterr().err
