"""Two workers and one run: who has it, who is refused, and when a dead one's is taken over."""

import asyncio
import json
import time
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from lease import LEASE, Lease, TakenError
from s3_server import BUCKET, S3Server

from job.events import Stopped
from job.keep.ledger import Ledger
from job.keep.s3 import S3Store
from job.keep.store import Store, open_store

SECONDS = 0.5


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def lease(store: Store, worker: str, seconds: float = SECONDS) -> Lease:
    return Lease(store, Path(store.uri).parent / worker, worker=worker, seconds=seconds)


async def alive(one: Lease, meanwhile: Coroutine[Any, Any, Any]) -> bool:
    """Do something while a worker shows life; returns whether it has lost the run."""
    losing = asyncio.create_task(one.lost())
    try:
        await meanwhile
        await asyncio.sleep(2 * one.beat_seconds)
        return losing.done()
    finally:
        losing.cancel()


async def refused(one: Lease) -> None:
    with pytest.raises(TakenError, match="w1"):
        await one.take()


def test_a_run_that_a_live_worker_has_is_refused(store: Store) -> None:
    async def story() -> None:
        first = lease(store, "w1")
        await first.take()
        assert not await alive(first, refused(lease(store, "w2")))
        await first.give_back()
        assert LEASE not in store.list()
        await lease(store, "w2").take()

    asyncio.run(story())


def test_the_same_holds_in_a_bucket(server: S3Server, tmp_path: Path) -> None:
    store = S3Store(BUCKET, "runs/r", server.credentials)

    async def story() -> None:
        first, second = (Lease(store, tmp_path / worker, worker=worker, seconds=5.0) for worker in ("w1", "w2"))
        await first.take()
        assert not await alive(first, refused(second))
        await first.give_back()
        assert server.names() == []
        await second.take()

    asyncio.run(story())


def test_a_silent_worker_is_looked_at_before_its_run_is_taken(store: Store) -> None:
    async def story() -> None:
        await lease(store, "w1").take()
        begun = time.monotonic()
        await lease(store, "w2").take()
        assert time.monotonic() - begun > SECONDS

    asyncio.run(story())


def test_a_worker_takes_what_it_left_behind_itself_at_once(store: Store) -> None:
    async def story() -> None:
        await lease(store, "w1").take()
        begun = time.monotonic()
        await lease(store, "w1").take()
        assert time.monotonic() - begun < SECONDS

    asyncio.run(story())


def test_of_several_that_begin_at_the_same_moment_one_has_the_run(store: Store) -> None:
    async def work(one: Lease, is_over: asyncio.Event) -> bool:
        try:
            await one.take()
        except TakenError:
            return False
        losing = asyncio.create_task(one.lost())
        await is_over.wait()
        return not losing.done()

    async def story() -> int:
        is_over = asyncio.Event()
        leases = [lease(store, f"w{number}", seconds=5.0) for number in range(4)]
        working = [asyncio.create_task(work(one, is_over)) for one in leases]
        while sum(one.done() for one in working) < 3:
            await asyncio.sleep(0.05)
        is_over.set()
        return sum(await asyncio.gather(*working))

    assert asyncio.run(asyncio.wait_for(story(), 60)) == 1


def test_a_worker_whose_run_was_taken_over_learns_it_and_leaves_the_lease_alone(store: Store) -> None:
    async def story() -> None:
        first, second = lease(store, "w1"), lease(store, "w2")
        await first.take()
        await second.take()
        assert await alive(first, asyncio.sleep(0))
        await first.give_back()
        assert LEASE in store.list()

    asyncio.run(story())


def test_a_lease_that_was_deleted_is_nobody_elses(store: Store) -> None:
    async def story() -> None:
        first = lease(store, "w1")
        await first.take()
        store.delete(LEASE)
        assert not await alive(first, asyncio.sleep(0))
        assert LEASE in store.list()

    asyncio.run(story())


@pytest.mark.parametrize("garbled", ["", "{", "[]", '{"at": "now"}', '{"worker": "w1"}'])
def test_a_garbled_lease_is_none(store: Store, tmp_path: Path, garbled: str) -> None:
    (tmp_path / "garbled").write_text(garbled, "utf-8")
    store.put(tmp_path / "garbled", LEASE)
    asyncio.run(asyncio.wait_for(lease(store, "w2").take(), SECONDS))


def test_a_machine_without_a_lease_that_keeps_its_record_current_is_alive(store: Store, tmp_path: Path) -> None:
    ledger = Ledger(store, tmp_path / "ledger", price_usd_per_hour=None)

    async def story() -> None:
        ledger.record()
        waiting = asyncio.create_task(lease(store, "w2").take())
        while not waiting.done():
            await asyncio.sleep(0.05)
            await asyncio.to_thread(ledger.record)
        with pytest.raises(TakenError):
            await waiting

    asyncio.run(story())


@pytest.mark.parametrize("how", ["stopped", "long ago"])
def test_a_record_that_is_ended_or_old_keeps_nobody_waiting(store: Store, tmp_path: Path, how: str) -> None:
    ledger = Ledger(store, tmp_path / "ledger", price_usd_per_hour=None)
    ledger.record(**({"stopped": Stopped.PREEMPTED} if how == "stopped" else {}))
    if how == "long ago":
        path = Path(store.uri) / "attempts/0001.json"
        old = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "ended": old}), "utf-8")
    asyncio.run(asyncio.wait_for(lease(store, "w2").take(), SECONDS))
