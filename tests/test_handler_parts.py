"""Parts of the serverless handler: where results may go, what the job gets and says, and how it is ended."""

import asyncio
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import answer
import pytest
from job_process import JobProcess, job_environ
from place import check_place, default_output

from job.errors import MachineError
from job.keep.store import open_store
from job.settings import Settings, read_settings

NEEDED = {"MODEL_ID": "owner/model", "DATASETS": "owner/data"}
QUEUE = {"RUNPOD_WEBHOOK_GET_JOB": "http://queue/job-take/w1?key=planted"}
MOUNTED = "/proc"
"""A mount that every machine has: nothing is written there."""


def settings(**given: str) -> Settings:
    return read_settings({**NEEDED, **given}, {}).settings


@pytest.mark.parametrize(
    ("output_uri", "environ", "is_asked_for"),
    [
        ("s3://bucket/runs", QUEUE, False),
        (f"{MOUNTED}/runs", {**QUEUE, "VOLUME_ROOT": MOUNTED}, False),
        ("/nowhere/runs", QUEUE, True),
        ("/nowhere/runs", {}, False),
    ],
)
def test_results_that_outlive_the_worker_or_are_wanted_there_are_let_through(
    output_uri: str, environ: dict[str, str], is_asked_for: bool
) -> None:
    check_place(settings(OUTPUT_URI=output_uri), environ, is_asked_for=is_asked_for)


@pytest.mark.parametrize(
    ("output_uri", "environ", "is_asked_for"),
    [
        ("/runpod-volume/runs", QUEUE, True),
        ("/workspace/runs", QUEUE, True),
        ("/nowhere/runs", {**QUEUE, "VOLUME_ROOT": "/nowhere"}, True),
        ("/nowhere/runs", QUEUE, False),
        ("runs", QUEUE, False),
    ],
)
def test_results_that_would_go_with_the_worker_are_refused(output_uri: str, environ: dict[str, str], is_asked_for: bool) -> None:
    with pytest.raises(MachineError, match=r"not mounted.*attach a network volume"):
        check_place(settings(OUTPUT_URI=output_uri), environ, is_asked_for=is_asked_for)


def test_without_output_uri_a_worker_writes_to_its_volume_and_a_laptop_to_runs() -> None:
    assert default_output(QUEUE, settings()) == {"OUTPUT_URI": "/runpod-volume/runs"}
    assert default_output({**QUEUE, "VOLUME_ROOT": "/v/"}, settings()) == {"OUTPUT_URI": "/v/runs"}
    assert default_output(QUEUE, settings(OUTPUT_URI="s3://b/x")) == default_output({}, settings()) == {}


def test_the_job_gets_the_requests_settings_and_nothing_of_the_queue() -> None:
    worker = {**QUEUE, "RUNPOD_AI_API_KEY": "planted", "RUNPOD_WEBHOOK_PING": "planted", "ON_FINISH": "terminate", "SEED": "1"}
    environ = job_environ({**worker, "HF_TOKEN": "token", "PYTHONPATH": "/elsewhere"}, {"SEED": "2", "ON_FINISH": "stop"})
    assert "planted" not in " ".join(environ.values()) and environ["RUNPOD_WEBHOOK_GET_JOB"], "it is still a serverless worker"
    assert (environ["SEED"], environ["HF_TOKEN"], environ["ON_FINISH"]) == ("2", "token", "exit")
    assert environ["PYTHONPATH"].endswith("/elsewhere")


class Program:
    """A program in the place of the job's."""

    def __init__(self, folder: Path) -> None:
        (folder / "job").mkdir()
        self.file, self.told = folder / "job" / "__main__.py", list[dict[str, Any]]()

    def process(self, text: str, **seconds: float) -> JobProcess:
        self.file.write_text(text, "utf-8")
        return JobProcess(dict(os.environ), on_progress=self.told.append, **{"grace_seconds": 5.0, **seconds})

    def run(self, text: str) -> tuple[int, str | None]:
        process = self.process(text)
        return asyncio.run(process.run()), process.reason()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)  # where `python -m job` looks first
    return Program(tmp_path)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("training\nwarning: x\nfailed: DATASETS=x: too few;\n  see above", "DATASETS=x: too few;\n  see above"),
        ("stopped: first\ntraining\nstopped: by a signal", "by a signal"),
        ("checking\nSEED=s: wrong; mend it\nHF_TOKEN: is needed; set it", "SEED=s: wrong; mend it\nHF_TOKEN: is needed; set it"),
        ("Traceback (most recent call last):\n  File x\nValueError: y", "ValueError: y"),
        ("", None),
        ("an end without a line end \xff" + "x" * 5000, "an end without a line end \xff" + "x" * (2000 - 27)),
    ],
)  # fmt: skip
def test_the_reason_is_the_jobs_last_words(program: Program, said: str, reason: str | None) -> None:
    assert program.run(f"import sys\nsys.stderr.write({said!r})\nsys.exit(3)") == (3, reason)


def test_progress_is_the_logged_steps_and_what_is_being_done(program: Program) -> None:
    step = '{"step": 3, "num_steps": 9, "loss": NaN, "seconds_left": 70, "cost_usd": 0.5, "cost": "$0.50"}'
    program.run(f"print('fetching x')\nprint({step!r})\nprint('[1]')\nprint('{{')\nprint('saving')")
    assert program.told[0] == {"doing": "fetching x"}
    after = {"step": 3, "num_steps": 9, "loss": None, "eta_seconds": 70, "cost_usd": 0.5}
    assert program.told[1] == {"doing": "training", **after} and program.told[-1] == {"doing": "saving", **after}


def test_a_job_that_does_not_stop_is_killed_when_its_grace_is_over_and_signalled_once(program: Program) -> None:
    process = program.process(
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True))\nprint('ready', flush=True)\n"
        "while True: time.sleep(0.1)",
        grace_seconds=0.5,
        margin_seconds=0.5,
    )

    async def story() -> int:
        running = asyncio.create_task(process.run())
        while not program.told:
            await asyncio.sleep(0.02)
        process.stop()
        await asyncio.sleep(0.2)
        process.stop()
        return await running

    begun = time.monotonic()
    assert asyncio.run(story()) == -9 and 1 < time.monotonic() - begun < 20
    assert [one["doing"] for one in program.told] == ["ready", "heard"]


def test_a_job_that_is_stopped_while_it_starts_does_not_run(program: Program) -> None:
    async def story() -> int:
        process = program.process("import time\ntime.sleep(60)")
        running = asyncio.create_task(process.run())
        await asyncio.sleep(0)
        process.stop()
        return await asyncio.wait_for(running, 20)

    assert asyncio.run(story()) == -15


@pytest.mark.parametrize("status", [1, 2, 3, 4, 5, 6, 7, 8, 75, -9])
def test_every_status_is_a_failed_job_that_says_what_to_do(tmp_path: Path, status: int) -> None:
    told = answer.failed(status, "the reason", run_id="r", store=open_store(str(tmp_path)))
    assert f"exit status {status}: the reason; " in told["error"] and len(told["what_next"]) > 10
    assert told["submit_again"] == (status in (5, 75, -9)) and told.get("refresh_worker", False) == (status in (1, 5, -9))


def test_an_answer_stays_small_whatever_the_run_has_written(tmp_path: Path) -> None:
    report = {"exit_status": 0, "samples": ["x" * 10**6], "evaluations": [{"step": 1}] * 5000, "actual": {"cost_usd": math.nan}}
    (tmp_path / "report.json").write_text(json.dumps(report), "utf-8")
    told = answer.done("r", open_store(str(tmp_path)), already=False)
    assert len(str(told)) < 5000 and told["report"]["actual"] == {"cost_usd": None}
    assert len(answer.refused(["x" * 10**6] * 3)["error"]) <= answer.MAX_CHARACTERS + 1
    assert sys.getsizeof(str(answer.failed(1, "x" * 10**6))) < 10 * answer.MAX_CHARACTERS
