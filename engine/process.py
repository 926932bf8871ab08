"""How a process ends: with one line and a code that is not 0, or the traceback of a fault of ours;
always, and soon.

A run stops gently at the first SIGTERM, SIGINT or SIGHUP while it trains: it finishes the step,
saves and leaves. At any other time, and at the second signal, it leaves at once. Its loader
processes ignore signals, since schedulers and terminals send them to every process of a run; they
end with their run, however that ends.
"""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

from engine import distributed
from engine.errors import UserError

# The disk, the file system or the reader of a pipe, and no fault of ours.
OUTSIDE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EPIPE,
    errno.ESTALE,
}
GRACE = 10.0  # seconds that a signal may find the process busy


def run(main, usage):
    """Run a script's main(arguments) and leave. `main` may return an exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(usage)
    signals.install()
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text of any encoding
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        leave(1, f"error{_process()}: {error}")
    except torch.OutOfMemoryError as error:
        leave(
            1,
            f"error{_process()}: {str(error).splitlines()[0]} What helps: lower train.batch_size, "
            "raise train.accumulate, take smaller crops or precision=bf16",
        )
    except SystemExit as error:
        leave(
            error.code if isinstance(error.code, int) else 1,
            error.code if isinstance(error.code, str) else "",
        )
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in OUTSIDE:
            leave(1, f"error{_process()}: {error}")
        if signals.code is None:
            traceback.print_exc()
        leave(1)
    if code:
        leave(code)
    kill_loaders()
    distributed.close()


def _process():
    return f" (process {distributed.rank()})" if distributed.world_size() > 1 else ""


def say(message):
    """Write a line to the standard error, also in a signal handler; nobody may be reading any
    more."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))


def leave(code, message=""):
    """End this process and its loaders: Python's way, or without it where a thread or a queue keeps
    it alive. The first call decides: a library that it interrupts may raise an error of its own."""
    if signals.code is not None:
        code, message = signals.code, ""
    signals.code = code
    if message:
        say(message)
    kill_loaders()
    end_by_force(code, 3.0)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(code)


def end_by_force(code, seconds):
    """After some seconds, if the process still runs."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def kill_loaders():
    """At exit Python would wait for them, and they ignore its SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch raises an error for each that ends
    killed, soon = multiprocessing.active_children(), time.monotonic() + 1
    for child in killed:
        child.kill()
    for child in killed:
        child.join(max(0, soon - time.monotonic()))
        free_memory(child.pid)


def free_memory(pid):
    """PyTorch takes the name of a batch's shared memory away once it is mapped; a loader that ends
    before that leaves the memory taken until the machine starts again."""
    for path in Path("/dev/shm").glob(f"torch_{pid}_*"):
        with contextlib.suppress(OSError):
            path.unlink()


def loaders(workers):
    """The option `data.workers` -> loader processes of this process. "auto": its share of the CPUs,
    one left for itself, from 1 to 8."""
    if workers != "auto":
        return workers
    able = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))  # on Linux alone
    share = len(able(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, share - 1))


def loader(worker):
    """`worker_init_fn` of every DataLoader."""
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)

    def follow():
        # Closed when the run is gone, whether this process is a fork of it or of a server.
        wait([multiprocessing.parent_process().sentinel])
        free_memory(os.getpid())
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Signals:
    """The signals that this process has received.

    Attributes:
        received: number of the first one, 0 for none.
        gentle: steps are running; the first signal lets the current one finish.
        slowest: seconds of the slowest step so far.
        writing: a checkpoint is being written, however long a slow disk takes.
        code: with which the process is leaving; None: it is not.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self):
        self.received, self.gentle, self.slowest, self.process = 0, False, 0.0, 0
        self.code, self.writing = None, False

    def install(self):
        """Handle them from now on; those that are ignored (nohup) stay so. Only the main thread
        can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.received, self.gentle, self.code = 0, False, None
        for number in self.NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        if self.process != os.getpid():
            self.process = os.getpid()
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def requested(self):
        """True on all processes once one of them has received a signal."""
        return distributed.any_process(self.received)

    def _handle(self, number, frame):
        if os.getpid() != self.process:
            os._exit(128 + number)  # a fork without a handler of its own
        name = signal.Signals(number).name
        if self.received or not self.gentle:
            leave(
                128 + number,
                f"{name} received{_process()}: left at once; the last checkpoint is complete",
            )
        self.received = number
        if distributed.is_main():
            say(f"\n{name} received: finishing the step, then saving")

    def _watch(self, reader):
        """A process that waits inside a library, for a process that is gone, never gets to its
        handler or to the end of its step."""
        while os.read(reader, 1)[0] not in self.NUMBERS:
            pass
        moved = time.monotonic()
        while time.monotonic() < moved + GRACE + 3 * self.slowest:
            time.sleep(0.2)
            if self.received and not self.gentle:  # the last step is done and saved
                return
            moved = time.monotonic() if self.writing else moved
        leave(
            128 + (self.received or signal.SIGTERM),
            f"a signal was received{_process()}, and nothing moved since",
        )


signals = Signals()
