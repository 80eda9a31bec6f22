"""One record per start of a run, kept current while it runs, so that time and money of a lost machine are still counted."""

import platform
import re
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from job.errors import JobError, NetworkError
from job.events import Stopped
from job.keep.store import MissingError, Store, read_bytes, write_text

ATTEMPTS = "attempts"
JOIN_SECONDS = 10.0
"""How long a record waits for the one before it; a store that takes longer is as good as away."""
_NAME = re.compile(rf"{ATTEMPTS}/([0-9]+)\.json")


class Attempt(BaseModel):
    """One start of a run. Times are UTC; `ended` is the last sign of life, and `stopped` is None while it may still run.

    Fields that a later version added are passed over.
    """

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    started: datetime
    ended: datetime
    machine: str
    price_usd_per_hour: float | None
    first_step: int | None = None
    """Last step done before this attempt's first one: 0 for a fresh start."""
    last_step: int | None = None
    stopped: Stopped | None = None
    notes: dict[str, JsonValue] = Field(default_factory=dict)
    """What this attempt learned that the next should know, such as a micro-batch that fits."""
    is_unreadable: bool = False
    """Stands for a record that is there and cannot be read: that it happened is known, its time and cost are not."""

    @field_validator("stopped", mode="before")
    @classmethod
    def _known_reason(cls, value: object) -> object:
        """A reason that only a later version knows is still an end."""
        return Stopped.CRASHED if isinstance(value, str) and value not in set(Stopped) else value

    @property
    def seconds(self) -> float:
        return max((self.ended - self.started).total_seconds(), 0.0)  # a clock may be set back


class Ledger:
    """The attempts of one run, in its store."""

    def __init__(self, store: Store, scratch: Path, *, price_usd_per_hour: float | None, started: datetime | None = None) -> None:
        self._store, self._scratch = store, scratch
        records = _read_records(store, scratch)
        self.past = list(records.values())
        self._name = f"{ATTEMPTS}/{max(records, default=0) + 1:04d}.json"
        now = datetime.now(UTC)
        self.current = Attempt(
            started=started or now, ended=now, machine=platform.node(), price_usd_per_hour=price_usd_per_hour, stopped=None
        )
        self._tried_at = 0.0
        self._was_written = False
        self._beating: threading.Thread | None = None

    @property
    def attempts(self) -> list[Attempt]:
        return [*self.past, self.current]

    def counted(self) -> list[Attempt]:
        """All attempts, the current one up to now and not to its last sign of life."""
        return [*self.past, self.current.model_copy(update={"ended": datetime.now(UTC)})]

    def beat(self, every_seconds: float, last_step: int | None = None) -> None:
        """Keep the record current without waiting for the store, which may be slow or away for a while."""
        changes = {"ended": datetime.now(UTC)} | ({} if last_step is None else {"last_step": last_step})
        self.current = self.current.model_copy(update=changes)
        if time.monotonic() - self._tried_at < every_seconds or (self._beating and self._beating.is_alive()):
            return
        self._tried_at = time.monotonic()
        self._beating = threading.Thread(target=self._write_quietly, name="ledger", daemon=True)
        self._beating.start()

    def record(self, **changes: object) -> None:
        """Note what changed and write the record.

        Raises:
            JobError: the store does not take it. When it only does not answer, this is raised at the first record and at
                the one that says why the attempt stopped; between them the next beat tries again.
        """
        if self._beating:
            self._beating.join(JOIN_SECONDS)
        self.current = self.current.model_copy(update={**changes, "ended": datetime.now(UTC)})
        self._tried_at = time.monotonic()
        try:
            self._write()
        except NetworkError:
            if not self._was_written or changes.get("stopped") is not None:
                raise

    def note(self, name: str, value: JsonValue) -> None:
        """Record something that later attempts should know."""
        self.record(notes={**self.current.notes, name: value})

    def remember(self, name: str, value: JsonValue) -> None:
        """Like `note`, written with the next record or beat."""
        self.current = self.current.model_copy(update={"notes": {**self.current.notes, name: value}})

    def learned(self, name: str) -> JsonValue:
        """The newest value of a note, of this attempt or an earlier one; None when there is none."""
        return next((attempt.notes[name] for attempt in reversed(self.attempts) if name in attempt.notes), None)

    def _write_quietly(self) -> None:
        with suppress(JobError):  # the next beat tries again, and the end of the attempt tells
            self._write()

    def _write(self) -> None:
        write_text(self._store, self._name, self.current.model_dump_json(indent=1), self._scratch / "ledger")
        self._was_written = True


def read_attempts(store: Store, scratch: Path) -> list[Attempt]:
    """All attempts on record, oldest first; one whose machine vanished counts as crashed.

    A record that is cut short or garbled stops nothing: an attempt with `is_unreadable`, no time and no price takes its
    place, so the number of attempts is right, the time is a lower bound, and the cost is unknown.
    """
    return list(_read_records(store, scratch).values())


def _read_records(store: Store, scratch: Path) -> dict[int, Attempt]:
    """Attempts by number; a number on record is never given again, readable or not."""
    records: dict[int, Attempt] = {}
    for name in sorted(store.list(f"{ATTEMPTS}/")):
        match = _NAME.fullmatch(name)
        if not match:
            continue
        try:
            attempt = Attempt.model_validate_json(read_bytes(store, name, scratch))
        except MissingError:  # deleted since it was listed
            continue
        except ValidationError:
            before = max(records, default=None)
            when = datetime.now(UTC) if before is None else records[before].ended
            attempt = Attempt(started=when, ended=when, machine="unknown", price_usd_per_hour=None, is_unreadable=True)
        records[int(match[1])] = attempt if attempt.stopped else attempt.model_copy(update={"stopped": Stopped.CRASHED})
    return dict(sorted(records.items()))


def cost_usd(attempts: list[Attempt]) -> float | None:
    """Dollars over all attempts; None as soon as the price or the time of one is unknown."""
    if any(attempt.price_usd_per_hour is None or attempt.is_unreadable for attempt in attempts):
        return None
    return least_cost_usd(attempts)


def least_cost_usd(attempts: list[Attempt]) -> float:
    """Dollars over the attempts whose price and time are known: what a budget has spent at least."""
    return sum(attempt.seconds / 3600 * (attempt.price_usd_per_hour or 0.0) for attempt in attempts)
