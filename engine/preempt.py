"""SIGTERM and SIGINT: finish the step, save, leave. A second signal leaves at once."""

import signal

from engine import distributed


class Preemption:
    """Holds the flag that the signals set; every process agrees on it at the end of a step."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.received:
            raise SystemExit(128 + number)
        self.received = number

    def requested(self):
        """True on all processes once one of them has received a signal."""
        return distributed.any_process(self.received)
