"""Copies finished checkpoints to the store while training goes on, in one thread of the supervisor.

Training never waits: when the store is slow, older checkpoints that are still waiting are passed over for the newest one.
`finish` confirms that the newest is in the store.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from job.errors import NetworkError
from job.keep.checkpoints import (
    CHECKPOINTS,
    MANIFEST,
    delete_folder,
    discard,
    list_steps,
    local_steps,
    put_folder,
    step_name,
)
from job.keep.store import Store


class Mirror:
    """One thread between the local checkpoints and the store.

    Args:
        store: the run's folder in the store.
        folder: where the trainer puts whole checkpoints.
        keep: checkpoints kept in the store.
        warn: told when a checkpoint could not be stored; the next one is tried all the same.
        before: called in this thread before each checkpoint is stored, for what must not be older than it.
    """

    def __init__(
        self, store: Store, folder: Path, *, keep: int, warn: Callable[[str], None], before: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._folder, self._keep, self._warn, self._before = store, folder, keep, warn, before
        self._wake = threading.Condition()
        self._wanted: int | None = None
        self._stored: int | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """A whole checkpoint of this step lies in the local folder."""
        with self._wake:
            self._wanted = step
            self._wake.notify()

    def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until the newest checkpoint is in the store, and stop.

        Raises:
            NetworkError: it is not there in time, or the store does not answer; the local copy stays.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        newest = max(local_steps(self._folder), default=None)
        if newest is None or self._stored == newest:
            return
        if self._thread.is_alive():
            raise NetworkError(f"OUTPUT_URI={self._store.uri}: checkpoint {newest} was not stored in time")
        self._store_step(newest)

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._wanted is None and not self._stopping:
                    self._wake.wait()
                step, self._wanted = self._wanted, None
            if step is None:
                return
            try:
                self._store_step(step)
            except Exception as error:  # whatever it is, the next checkpoint must be tried
                self._warn(f"checkpoint {step} is not in the store yet: {error}")

    def _store_step(self, step: int) -> None:
        path = self._folder / step_name(step)
        self._before()
        put_folder(self._store, path, f"{CHECKPOINTS}/{path.name}")
        self._stored = step
        for old in [older for older in list_steps(self._store) if older <= step][self._keep :]:
            delete_folder(self._store, f"{CHECKPOINTS}/{step_name(old)}")
        # Only this thread deletes local copies, and never one that may be the trainer's newest.
        for old in local_steps(self._folder)[self._keep :]:
            if old < step:
                discard(self._folder / step_name(old))


def is_whole(store: Store, name: str) -> bool:
    """Whether the store holds a whole folder of this name."""
    return f"{name}/{MANIFEST}" in store.list(f"{name}/{MANIFEST}")
