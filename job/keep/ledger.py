"""One record per start of a run, kept current while it runs, so that time and money of a lost machine are still counted."""

import json
import platform
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from job.errors import JobError
from job.events import Stopped
from job.keep.store import Store, read_text, write_text

ATTEMPTS = "attempts"


class Attempt(BaseModel):
    """One start of a run. Times are UTC; `ended` is the last sign of life, and `stopped` is None while it may still run."""

    model_config = ConfigDict(frozen=True)

    started: datetime
    ended: datetime
    machine: str
    price_usd_per_hour: float | None
    first_step: int | None = None
    """Last step done before this attempt's first one: 0 for a fresh start."""
    last_step: int | None = None
    stopped: Stopped | None = None

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()


class Ledger:
    """The attempts of one run, in its store."""

    def __init__(self, store: Store, scratch: Path, *, price_usd_per_hour: float | None) -> None:
        self._store, self._scratch = store, scratch
        self.past = read_attempts(store, scratch)
        now = datetime.now(UTC)
        self.current = Attempt(
            started=now, ended=now, machine=platform.node(), price_usd_per_hour=price_usd_per_hour, stopped=None
        )
        self._written = 0.0
        self._beating: threading.Thread | None = None

    @property
    def attempts(self) -> list[Attempt]:
        return [*self.past, self.current]

    def beat(self, every_seconds: float, last_step: int) -> None:
        """Keep the record current without waiting for the store, which may be slow or away for a while."""
        self.current = self.current.model_copy(update={"last_step": last_step, "ended": datetime.now(UTC)})
        if time.monotonic() - self._written < every_seconds or (self._beating and self._beating.is_alive()):
            return
        self._written = time.monotonic()
        self._beating = threading.Thread(target=self._write_quietly, name="ledger", daemon=True)
        self._beating.start()

    def record(self, **changes: object) -> None:
        """Note what changed and write the record."""
        if self._beating:
            self._beating.join()
        self.current = self.current.model_copy(update={**changes, "ended": datetime.now(UTC)})
        self._write()

    def _write_quietly(self) -> None:
        with suppress(JobError):  # the next beat tries again, and the end of the attempt tells
            self._write()

    def _write(self) -> None:
        name = f"{ATTEMPTS}/{len(self.past) + 1:04d}.json"
        write_text(self._store, name, self.current.model_dump_json(indent=1), self._scratch / "ledger")
        self._written = time.monotonic()


def read_attempts(store: Store, scratch: Path) -> list[Attempt]:
    """All attempts on record, oldest first; one whose machine vanished counts as crashed."""
    attempts = []
    for name in store.list(f"{ATTEMPTS}/"):
        attempt = Attempt.model_validate(json.loads(read_text(store, name, scratch)))
        attempts.append(attempt if attempt.stopped else attempt.model_copy(update={"stopped": Stopped.CRASHED}))
    return attempts


def cost_usd(attempts: list[Attempt]) -> float | None:
    """Dollars over all attempts; None as soon as the price of one is unknown."""
    costs = [
        None if attempt.price_usd_per_hour is None else attempt.seconds / 3600 * attempt.price_usd_per_hour
        for attempt in attempts
    ]
    return None if None in costs else sum(cost for cost in costs if cost is not None)
