"""Requests of one worker that meet: who shares a start, who stops it, and what they are told while none has begun."""

import asyncio
import json
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from lease import LEASE
from worker_runs import Runs

GIVEN = {"MODEL_ID": "owner/model", "DATASETS": "owner/data", "RUN_ID": "r"}
JOIN_SECONDS = 1.0
"""How long a second request may take to be read and to join."""


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A request whose start looks on for a while: another worker has been at the run, and may be dead."""
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r" / LEASE).write_text(json.dumps({"worker": "w1", "token": "t", "at": time.time()}), "utf-8")
    return {**GIVEN, "OUTPUT_URI": str(tmp_path / "runs"), "WORK_DIR": str(tmp_path / "work")}


@pytest.fixture
def runs() -> Runs:
    return Runs({"RUNPOD_POD_ID": "w2", "LEASE_SECONDS": "60"})


async def until_told(told: list[dict[str, Any]]) -> None:
    while not any("another worker" in one["doing"] for one in told):
        await asyncio.sleep(0.02)


def play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def test_a_shared_run_goes_on_until_its_last_request_is_cancelled(runs: Runs, given: dict[str, Any]) -> None:
    async def story() -> None:
        told: list[dict[str, Any]] = []
        first = asyncio.create_task(runs.answer(given, told.append))
        await until_told(told)
        second = asyncio.create_task(runs.answer(given, told.append))
        await asyncio.sleep(JOIN_SECONDS)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.sleep(JOIN_SECONDS)
        assert not second.done() and len(told) == 1, "one start for both"
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second

    play(story())


def test_a_machine_that_goes_away_answers_all_it_has_and_starts_nothing_more(
    runs: Runs, given: dict[str, Any], tmp_path: Path
) -> None:
    async def story() -> None:
        told: list[dict[str, Any]] = []
        both = [asyncio.create_task(runs.answer(given, told.append)) for _ in range(2)]
        await until_told(told)
        runs.stop_all()
        late = await runs.answer({**given, "RUN_ID": "other"}, told.append)
        for answer in (*await asyncio.gather(*both), late):
            assert answer["exit_status"] == 75 and answer["submit_again"] and "refresh_worker" not in answer
        assert "going away; nothing was started" in late["error"] and not (tmp_path / "runs/other").exists()

    play(story())


def test_a_request_with_other_settings_for_a_run_under_way_is_refused(runs: Runs, given: dict[str, Any]) -> None:
    async def story() -> None:
        told: list[dict[str, Any]] = []
        first = asyncio.create_task(runs.answer(given, told.append))
        await until_told(told)
        other = await runs.answer({**given, "SEED": 7}, told.append)
        assert other["exit_status"] == 2 and "RUN_ID=r" in other["error"] and "other settings" in other["error"]
        same = asyncio.create_task(runs.answer({**given, "GPU_HOURLY_RATE": 2}, told.append))
        await asyncio.sleep(JOIN_SECONDS)
        assert not same.done(), "what changes no result is no other run"
        first.cancel()
        same.cancel()

    play(story())


def test_data_that_the_worker_does_not_have_is_told_before_anything_starts(runs: Runs, given: dict[str, Any]) -> None:
    async def story() -> None:
        answer = await runs.answer({**given, "RUN_ID": None, "DATASETS": "/nowhere/x.jsonl"}, lambda _: None)
        assert answer["exit_status"] == 2 and "/nowhere/x.jsonl" in answer["error"] and "refresh_worker" not in answer

    play(story())
