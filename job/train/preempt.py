"""SIGTERM and SIGINT, turned into an exception where the main thread stands, or into the end of the process.

While training, what stops is the step that is under way: the exception leaves forward, backward or the wait for data at once.
It is held back where a half-done thing would be left: in the optimizer's step, in a save, in the write of an event.
Imports no torch.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from job.errors import PreemptedError

ECHO_SECONDS = 1.0
"""A second signal this soon is the first one once more: engines signal a whole group, and the supervisor passes its own on."""


class StoppedError(BaseException):
    """The step under way is given up. Not an Exception: no library may swallow it with its own failures."""


class StopSignal:
    """Decides what a signal does; one for the process.

    At first a PreemptedError leaves the main thread. Between `begin_steps` and `end_steps` it is a StoppedError, and after
    `exit_at_once` the process ends where it stands.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._held = 0
        self._error: type[BaseException] = PreemptedError
        self._last_words: Callable[[str], None] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def exit_at_once(self, last_words: Callable[[str], None]) -> None:
        """From now on there is nothing to save: a signal writes these last words and ends the process.

        An exception would wait for the threads that load weights, or download them.
        """
        self._last_words = last_words
        self.check()

    def begin_steps(self) -> None:
        """From now on the work since the last completed step is given up, and what is before it kept."""
        self._last_words, self._error = None, StoppedError
        self.check()

    def hold(self) -> None:
        """Put off what a signal does until `release`; they nest."""
        self._held += 1

    def release(self) -> None:
        self._held -= 1
        self.check()

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Put off what a signal does until the block has ended."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are handled in the main thread alone
            return
        self.hold()
        try:
            yield
        finally:
            self.release()

    def check(self) -> None:
        """Stop now when a signal came while it was held back, or when somebody swallowed its exception."""
        if self.received is not None and self._held <= 0:
            self._act()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
            self.check()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            end_process(PreemptedError.exit_status)  # what is half written has no manifest

    def _act(self) -> None:
        message = f"stopped by {self.received}"
        if self._last_words is not None:
            self.hold()
            self._last_words(message)
            end_process(PreemptedError.exit_status)
        raise self._error(message)


def end_process(status: int) -> NoReturn:
    """End now, whatever threads are doing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
