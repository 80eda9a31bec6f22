"""Copies finished checkpoints to the store while training goes on, in one thread of the supervisor.

Training never waits: when the store is slow, older checkpoints that are still waiting are passed over for the newest one, so
at most one waits. One that could not be stored is tried again until a newer one takes its place. `finish` confirms that the
newest is in the store.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from job.errors import JobError, NetworkError
from job.keep.checkpoints import (
    CHECKPOINTS,
    MANIFEST,
    STORED,
    best_step,
    delete_folder,
    discard,
    local_losses,
    local_steps,
    put_folder,
    step_name,
    store_losses,
    surplus_steps,
)
from job.keep.store import Store

MAX_WAIT_SECONDS = 30.0
"""Longest pause before a checkpoint that could not be stored is tried again; the first is one second."""


class Mirror:
    """One thread between the local checkpoints and the store.

    Args:
        store: the run's folder in the store.
        folder: where the trainer puts whole checkpoints.
        keep: the newest so many checkpoints are kept, and the one with the lowest held-out loss; here and in the store.
        warn: told when a checkpoint could not be stored; it is tried again all the same.
        before: called in this thread before each checkpoint is stored, for what must not be older than it.
        patience_seconds: how long `finish` keeps trying when the store does not answer and it has no deadline of its own: a
            machine that waits two minutes costs less than one that loads the model again.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        keep: int,
        warn: Callable[[str], None],
        before: Callable[[], None] = lambda: None,
        patience_seconds: float = 120.0,
    ) -> None:
        self._store, self._folder, self._keep, self._warn, self._before = store, folder, keep, warn, before
        self._patience_seconds = patience_seconds
        self.seconds: dict[int, float] = {}
        """How long each stored checkpoint took to be stored, by step."""
        self._wake = threading.Condition()
        self._wanted: int | None = None
        self._deadline: float | None = None
        """Set by `finish`: when the thread gives up."""
        self._in_haste = False
        self._error: Exception | None = None
        self._losses: dict[int, float | None] = {}
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """A whole checkpoint of this step lies in the local folder."""
        with self._wake:
            self._wanted = step
            self._wake.notify()

    def settle(self, step: int) -> None:
        """Wait until the checkpoint of this step is in the store, while the work goes on afterwards.

        Raises:
            NetworkError: it is not there in time.
        """
        deadline = time.monotonic() + self._patience_seconds
        if not self._is_stored(step):
            self.offer(step)
        while not self._is_stored(step):
            if time.monotonic() > deadline:
                raise NetworkError(f"OUTPUT_URI={self._store.uri}: checkpoint {step} was not stored in time ({self._error})")
            time.sleep(0.1)

    def finish(self, timeout_seconds: float | None = None, *, stopped: Callable[[], bool] = lambda: True) -> None:
        """Wait until the newest checkpoint is in the store, and stop.

        Args:
            timeout_seconds: what is left when the machine goes away; an upload of an older checkpoint is then given up for
                the newest.
            stopped: whether it goes away, asked five times a second; `timeout_seconds` counts from then on.

        Raises:
            NetworkError: it is not there in time, or the store does not answer; the local copy stays.
            SettingsError, MachineError: what the store said about it.
        """
        newest = max(local_steps(self._folder), default=None)
        with self._wake:
            if self._deadline is None:
                self._deadline = time.monotonic() + self._patience_seconds
                if newest is not None and newest not in self.seconds:
                    self._wanted = newest
        while self._thread.is_alive():
            with self._wake:
                if timeout_seconds is not None and not self._in_haste and stopped():
                    self._deadline, self._in_haste = time.monotonic() + timeout_seconds, True
                self._wake.notify()
                if self._in_haste and time.monotonic() >= self._deadline:
                    break
            self._thread.join(0.2)
        if newest is None or self._is_stored(newest):
            return
        name = f"OUTPUT_URI={self._store.uri}: checkpoint {newest}"
        if self._thread.is_alive() or self._error is None:
            raise NetworkError(f"{name} was not stored in time; it is kept in {self._folder}")
        if isinstance(self._error, JobError):
            raise self._error
        raise NetworkError(f"{name} is not stored ({self._error}); it is kept in {self._folder}") from self._error

    def _run(self) -> None:
        failures, told = 0, ""
        while (step := self._next(failures)) is not None:
            try:
                self._store_step(step)
                failures = 0
            except _PassedOverError:
                continue
            except Exception as error:  # whatever it is, the next checkpoint must be tried
                failures += 1
                self._error = error
                text = f"checkpoint {step} is not in the store yet: {error}"
                if text != told:
                    told = text
                    self._tell(text)

    def _next(self, failures: int) -> int | None:
        """The step to store; None when it is time to end."""
        with self._wake:
            if failures:
                tried = self._wanted
                until = time.monotonic() + min(2.0 ** (failures - 1), MAX_WAIT_SECONDS)
                was_finishing = self._deadline is not None
                while (rest := until - time.monotonic()) > 0 and self._wanted == tried:
                    if self._deadline is not None and not was_finishing:
                        break  # `finish` was called: one more try at once
                    if self._deadline is not None and self._is_hopeless():
                        return None
                    self._wake.wait(rest)
            self._wake.wait_for(lambda: self._wanted is not None or self._deadline is not None)
            return None if self._is_late() else self._wanted

    def _is_hopeless(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or not isinstance(self._error, NetworkError)

    def _is_late(self) -> bool:
        """Whether `finish` has given up on this thread: another may be at work, so nothing is touched any more."""
        return self._in_haste and self._deadline is not None and time.monotonic() >= self._deadline

    def _store_step(self, step: int) -> None:
        begun = time.monotonic()
        path = self._folder / step_name(step)
        try:
            if not (self._is_stored(step) and is_whole(self._store, f"{CHECKPOINTS}/{path.name}")):
                self._call_before()
                put_folder(self._store, path, f"{CHECKPOINTS}/{path.name}", between=lambda: self._check_haste(step))
                (path / STORED).touch()
        except BaseException:
            if not (path / MANIFEST).is_file():  # deleted meanwhile, by a roll-back or for room: nothing to try again
                self._forget(step)
            raise
        self.seconds[step] = time.monotonic() - begun
        self._forget(step)
        if self._in_haste:
            return
        try:
            self._tidy(step)
        except JobError as error:  # the checkpoint is safe; what is left over goes with the next one
            self._tell(f"old checkpoints could not be tidied up: {error}")

    def _call_before(self) -> None:
        try:
            self._before()
        except JobError:
            raise
        except Exception as error:  # a fault in what goes beside a checkpoint must not cost the checkpoint
            self._tell(f"what goes with a checkpoint could not be stored: {type(error).__name__}: {error}")

    def _tidy(self, step: int) -> None:
        """Keep the newest and the best, after this step was stored."""
        self._losses = in_store = store_losses(self._store, self._folder.parent / "mirror", self._losses)
        for newer in [other for other in in_store if other > step]:
            # The run continued from an older one, because this one is damaged or the run rolled back.
            delete_folder(self._store, f"{CHECKPOINTS}/{step_name(newer)}")
            del in_store[newer]
        here = {older: loss for older, loss in local_losses(self._folder).items() if older <= step}
        in_store.update({older: loss for older, loss in here.items() if older in in_store})
        best = best_step({**in_store, **here})
        if best is not None and best not in in_store and not self._is_busy():  # it was passed over for a newer one
            put_folder(self._store, self._folder / step_name(best), f"{CHECKPOINTS}/{step_name(best)}")
            (self._folder / step_name(best) / STORED).touch()
            in_store[best] = here[best]
        for old in surplus_steps(in_store, self._keep):
            delete_folder(self._store, f"{CHECKPOINTS}/{step_name(old)}")
            del in_store[old]
        # Never one that may be the trainer's newest: `here` ends with this step.
        for old in surplus_steps({**in_store, **here}, self._keep):
            if old in here:
                discard(self._folder / step_name(old))

    def _is_stored(self, step: int) -> bool:
        """Whether the local copy bears the mark, which goes when the trainer writes it anew."""
        return (self._folder / step_name(step) / STORED).is_file()

    def _is_busy(self) -> bool:
        with self._wake:
            return self._wanted is not None or self._in_haste

    def _check_haste(self, step: int) -> None:
        with self._wake:
            if self._is_late() or (self._in_haste and self._wanted is not None and self._wanted > step):
                raise _PassedOverError

    def _forget(self, step: int) -> None:
        with self._wake:
            if self._wanted == step:
                self._wanted = None

    def _tell(self, text: str) -> None:
        with suppress(Exception):  # a display that is gone must not end the thread
            self._warn(text)


class _PassedOverError(Exception):
    """The machine goes away, and a newer checkpoint waits."""


def is_whole(store: Store, name: str) -> bool:
    """Whether the store holds a whole folder of this name."""
    return f"{name}/{MANIFEST}" in store.list(f"{name}/{MANIFEST}")
