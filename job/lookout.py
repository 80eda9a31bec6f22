"""A question to the store that is asked every few seconds beside something that takes long, in a thread of its own."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from job.errors import JobError

LOOK_SECONDS = 3.0
"""Between two looks: two requests, which cost a dollar in five weeks on S3."""


class Lookout:
    """Asks whether something has come, as long as the block lasts; a store that does not answer is asked again."""

    def __init__(self, has_come: Callable[[], bool]) -> None:
        self._has_come, self._left = has_come, threading.Event()
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
        self.has_seen = False
        self._seen_at = 0.0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join(LOOK_SECONDS)

    def _run(self) -> None:
        while not self._left.wait(LOOK_SECONDS):
            with suppress(JobError):
                self.has_seen = self._has_come()
            if self.has_seen:
                self._seen_at = time.monotonic()
                return

    @property
    def seconds_since(self) -> float:
        """Since it has come."""
        return time.monotonic() - self._seen_at if self._seen_at else 0.0
