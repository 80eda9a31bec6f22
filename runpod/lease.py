"""One run has one worker: a file in the run's store says whose it is, and is written anew while that worker lives.

The clocks of two workers may differ, so life is a sign that changes while one looks on. Counted as signs are this file and the
newest record of the ledger, which a pod or any other machine keeps too. What is not handled: a store that shows a write only
after more than SETTLE_SECONDS.
"""

import asyncio
import json
import time
import uuid
from contextlib import suppress
from pathlib import Path

from job.errors import JobError, MachineError
from job.keep.ledger import ATTEMPTS, Attempt
from job.keep.store import MissingError, Store, read_text, write_text

LEASE = "lease.json"
SECONDS = 45.0
"""A worker without a sign of life for so long is dead. The ledger beats every 10 s (job/stages.py), a slow store later."""
SETTLE_SECONDS = 2.0
"""Two workers that begin at the same moment: whose name stands in the file after this has the run."""
OLD_SECONDS = 600.0
"""A sign from so long ago is no life, whatever the two clocks say: nobody has to look on."""


class TakenError(MachineError):
    """Another worker is at this run."""


class Lease:
    """Of one run.

    Args:
        store: the run's own folder.
        worker: this worker's name; what it left behind itself is nobody's.
        seconds: how long a silent worker counts as alive.
    """

    def __init__(self, store: Store, scratch: Path, *, worker: str, seconds: float = SECONDS) -> None:
        self._store, self._scratch, self._worker, self._seconds = store, scratch, worker, seconds
        self._token = uuid.uuid4().hex
        self.beat_seconds = seconds / 5

    async def take(self) -> None:
        """Have the run, or raise TakenError; looks on for `seconds` where it is not clear that another worker is dead."""
        signs = await asyncio.to_thread(self._signs)
        ends = time.monotonic() + self._seconds
        while signs and time.monotonic() < ends:
            await asyncio.sleep(min(self.beat_seconds, 5.0))
            now = await asyncio.to_thread(self._signs)
            if now and now != signs:
                raise self._taken("is at this run")
            signs = now
        await asyncio.to_thread(self._write)
        await asyncio.sleep(min(SETTLE_SECONDS, self.beat_seconds))
        if not await asyncio.to_thread(self._is_ours):
            raise self._taken("began this run at the same moment")

    async def lost(self) -> None:
        """Show life until another worker has taken the run; the store may be away for a while."""
        while True:
            await asyncio.sleep(self.beat_seconds)
            with suppress(JobError):
                if (await asyncio.to_thread(self._read)).get("token", self._token) != self._token:
                    return
                await asyncio.to_thread(self._write)

    async def give_back(self) -> None:
        """Nobody has to look on after this."""
        with suppress(JobError):
            if await asyncio.to_thread(self._is_ours):
                await asyncio.to_thread(self._store.delete, LEASE)

    def _taken(self, what: str) -> TakenError:
        holder = self._read().get("worker", "unknown")
        return TakenError(f"another worker ({holder}) {what} ({self._store.uri}); wait for its result, or cancel it")

    def _signs(self) -> tuple[str, str] | None:
        """What changes while another worker lives; None where there is none, or none that can be alive."""
        lease, attempt = self._read(), self._newest_attempt()
        is_own = lease.get("worker") == self._worker
        dates = [] if is_own or "at" not in lease else [float(lease["at"])]
        if attempt is not None and attempt.stopped is None and not is_own:
            dates.append(attempt.ended.timestamp())
        if not dates or max(dates) < time.time() - OLD_SECONDS:
            return None
        return str(sorted(lease.items())), "" if attempt is None else attempt.model_dump_json()

    def _newest_attempt(self) -> Attempt | None:
        names = sorted(name for name in self._store.list(f"{ATTEMPTS}/") if name.endswith(".json"))
        if not names:
            return None
        try:
            return Attempt.model_validate_json(read_text(self._store, names[-1], self._scratch))
        except (MissingError, ValueError):
            return None

    def _read(self) -> dict[str, str | float]:
        try:
            lease = json.loads(read_text(self._store, LEASE, self._scratch))
        except (MissingError, ValueError):
            return {}
        return lease if isinstance(lease, dict) and isinstance(lease.get("at"), (int, float)) else {}

    def _is_ours(self) -> bool:
        return self._read().get("token") == self._token

    def _write(self) -> None:
        lease = {"worker": self._worker, "token": self._token, "at": time.time()}
        write_text(self._store, LEASE, json.dumps(lease), self._scratch)
