"""A short series of benchmarks/chaos.py: eight events, each at an exact place, then the adapter of an undisturbed run."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import ALWAYS, Fault
from s3_server import S3Server, s3_server

from benchmarks.chaos import Attempt, Event, Series, compare, course

# With a checkpoint every 5 steps and an evaluation every 10. A trainer that hangs is the one way to meet it at an exact step.
EVENTS = (
    Event(kind="term", phase="fetch"),
    Event(kind="kill", phase="prepare"),
    Event(kind="trainer killed", phase="load", fault="hang-load@0"),
    Event(kind="kill", phase="save", fault="hang-save@10", steps=10, stored=5),
    Event(kind="term", phase="train", fault="hang@14", steps=8),
    Event(kind="503", phase="save", fault="hang@22", steps=2, outage_seconds=1.0),
    Event(kind="flipped bit", phase="evaluate", fault="hang-eval@30", steps=9, stored=25),
    Event(kind="kill", phase="deliver", hold="/adapter/manifest.json"),
)
STATUSES = [75, -9, 5, -9, 75, 75, -9, -9]
REACHED = [None, None, 0, 10, 13, 21, 30, 40]
RESUMED = [0, 0, 0, 5, 13, 21, 21, 40]  # at the end only what remained to be delivered
"""The damaged checkpoint is of step 25, the one before it of 21, where SIGTERM came."""


@pytest.fixture
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_eight_events_in_eight_phases_leave_no_trace_in_the_adapter(server: S3Server, tmp_path: Path) -> None:
    settings = course(tmp_path, server, num_steps=40)
    series = Series("disturbed", server, tmp_path, settings)
    for event in EVENTS:
        series.strike(event)
    last = series.finish()
    reference = Series("undisturbed", server, tmp_path, settings)
    reference.finish()
    compare(series, reference, last)
    rows = series.rows + reference.rows
    assert [problem for row in rows for problem in row.problems] == []
    assert [row.status for row in rows] == [*STATUSES, 0, 0]
    assert [row.reached for row in series.rows] == [*REACHED, None]
    assert [row.resumed for row in series.rows] == [*RESUMED, None]
    assert [row.lost for row in series.rows[2:8]] == [0, 5, 0, 0, 9, 0]


def start(server: S3Server, folder: Path) -> Attempt:
    """A run that has come to step 8, and no further."""
    series = Series("cut-off", server, folder, {**course(folder, server), "GRACE_SECONDS": "3"})
    attempt = series.start("hang@9")
    assert attempt.wait_for(lambda: 8 in attempt.steps)
    return attempt


def test_a_silent_store_does_not_keep_a_process_that_was_told_to_stop(server: S3Server, tmp_path: Path) -> None:
    attempt = start(server, tmp_path)
    server.proxy.add(Fault(kind="hang", times=ALWAYS, seconds=3600))
    attempt.process.terminate()
    try:
        assert attempt.process.wait(60) == 75, "boto3 alone would try for five minutes"
    except subprocess.TimeoutExpired:
        attempt.kill_everything()
        raise


def test_what_failed_first_decides_the_exit_status_when_the_store_is_away_too(server: S3Server, tmp_path: Path) -> None:
    attempt = start(server, tmp_path)
    server.proxy.stop()
    attempt.kill_stage()
    assert attempt.end() == 5
