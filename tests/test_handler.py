"""The serverless handler as RunPod starts it: real SDK, a queue over HTTP or the SDK's own server, real runs, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, Job, small_run
from runpod_queue import QueueJob, RunPodQueue

from job.keep.ledger import Ledger
from job.keep.store import open_store

HANDLER = ROOT / "runpod" / "handler.py"
TOKEN = "hf_plantedtoken0123456789"
IN_INPUT = "planted-in-a-request-4711"


class Worker:
    """One process of the handler."""

    def __init__(self, folder: Path, environ: Mapping[str, str], *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"worker-{len(list(folder.glob('worker-*')))}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HANDLER), *arguments],
                env=dict(environ),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def children(self) -> list[int]:
        """The processes of the job that it has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = (path / "stat").read_text("utf-8").rpartition(")")[2].split()[1]
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except (OSError, IndexError):
                continue
            if int(parent) == self.process.pid and " -m job" in command:
                found.append(int(path.name))
        return found


@contextmanager
def worker(folder: Path, environ: Mapping[str, str], *arguments: str) -> Iterator[Worker]:
    started = Worker(folder, environ, *arguments)
    try:
        yield started
    finally:
        left = started.children()  # of a test that failed
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()
        for child in left:
            os.killpg(child, signal.SIGKILL)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    """A worker's environment: no setting but where it works, and a credential."""
    fixed = {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1", "LEASE_SECONDS": "2", "PROGRESS_SECONDS": "0.1"}
    environ = Job(tmp_path, {}).environ(**fixed)
    return {name: value for name, value in environ.items() if name not in ("OUTPUT_URI", "RUN_ID")}


def request(model: Path, data: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """A request for a small run, as JSON has its values."""
    given: dict[str, Any] = {
        **small_run(model, data),
        "MAX_STEPS": 12,
        "LEARNING_RATE": 1e-2,
        "EVAL_FRACTION": 0,
        "SAVE_STEPS": 100,
    }
    given.pop("HF_HUB_OFFLINE")
    return {**given, "DATASETS": [str(data)], "RUN_ID": "r", "OUTPUT_URI": str(folder / "runs"), "GPU_HOURLY_RATE": 2, **settings}


def error_of(job: QueueJob) -> str:
    assert job.result is not None and job.state == "FAILED", job
    return str(job.result["error"])


def attempts(folder: Path, run_id: str = "r") -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in sorted((folder / "runs" / run_id / "attempts").glob("*.json"))]


def checkpoints(folder: Path) -> list[int]:
    kept = (folder / "runs" / "r" / "checkpoints").glob("*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in kept)


def step_of(job: QueueJob) -> int:
    return max((one.get("step", 0) for one in job.progress), default=0)


def test_requests_that_cannot_work_are_answered_at_once_and_start_nothing(
    tmp_path: Path, base: dict[str, str], tiny_model: Path, conversations: Path
) -> None:
    good = request(tiny_model, conversations, tmp_path)
    volume = tmp_path / "volume"
    volume.mkdir()
    with RunPodQueue() as queue, worker(tmp_path, {**base, **queue.environ("w1"), "VOLUME_ROOT": str(volume)}) as started:
        bad = queue.submit({**good, "MAX_LENGHT": 5, "LEARNING_RATE": "fast", "LD_PRELOAD": "/x.so"})
        secret = queue.submit(
            {**good, "WANDB_API_KEY": IN_INPUT, "WEBHOOK_URL_FILE": "/x", "MODEL_ID": "hf_plantedinarequest0123"}
        )
        no_object = queue.submit("go")
        unmounted = queue.submit({name: value for name, value in good.items() if name != "OUTPUT_URI"})
        named = queue.submit({**good, "OUTPUT_URI": f"{volume}/mine"})

        errors = error_of(queue.wait(bad))
        assert "MAX_LENGHT=5: no setting has this name (input); did you mean MAX_LENGTH?" in errors
        assert "LEARNING_RATE=fast" in errors and "LD_PRELOAD" in errors, "all at once"
        errors = error_of(queue.wait(secret))
        assert all(f"{name}: " in errors for name in ("WANDB_API_KEY", "WEBHOOK_URL_FILE", "MODEL_ID")), errors
        assert "endpoint's environment" in errors
        assert "must be an object" in error_of(queue.wait(no_object))
        for job_id in (unmounted, named):
            job = queue.wait(job_id)
            assert f"OUTPUT_URI={volume}" in error_of(job) and "not mounted" in error_of(job)
            assert job.result is not None and job.result["stopPod"] and job.result["output"]["exit_status"] == 5

        alive = threading.Event()

        def beat() -> None:  # as a pod does that trains this run
            ledger = Ledger(open_store(str(tmp_path / "runs/r")), tmp_path / "scratch", price_usd_per_hour=None)
            while not alive.is_set():
                ledger.record()
                time.sleep(0.2)

        thread = threading.Thread(target=beat)
        thread.start()
        job = queue.wait(queue.submit(good))
        alive.set()
        thread.join()
        assert "another worker" in error_of(job) and "stopPod" not in (job.result or {})

        assert not started.children() and not (tmp_path / "runs/r/settings.json").exists() and not list(volume.iterdir())
        told = started.log + json.dumps([[one.result, one.progress] for one in queue.jobs.values()])
        assert queue.num_pings and started.process.poll() is None
    for text in (TOKEN, IN_INPUT, "hf_plantedinarequest0123", queue.api_key):
        assert text not in told
    assert str(conversations) not in started.log, "requests are not printed"


@pytest.mark.slow
def test_a_run_is_stopped_with_a_checkpoint_and_ends_in_requests_that_share_it(
    tmp_path: Path, base: dict[str, str], tiny_model: Path, conversations: Path
) -> None:
    given = request(tiny_model, conversations, tmp_path)
    faults = {"JOB_FAULT": "hang@5,hang@8"}  # where a stop finds the trainer
    with RunPodQueue() as queue, worker(tmp_path, {**base, **queue.environ("w1"), **faults}) as first:
        early = queue.submit(given)
        queue.wait(early, until=lambda job: first.children())
        queue.time_out(early)
        queue.wait(early, until=lambda _: not first.children())
        assert queue.jobs[early].state == "TIMED_OUT" and not checkpoints(tmp_path)

        cancelled = queue.submit(given)
        queue.wait(cancelled, until=lambda job: step_of(job) == 4)
        queue.cancel(cancelled)
        queue.wait(cancelled, until=lambda _: not first.children())
        assert queue.jobs[cancelled].state == "CANCELLED" and queue.jobs[cancelled].result is None
        assert checkpoints(tmp_path) == [4], "a cancelled trainer saves what it has"
        told = queue.jobs[cancelled].progress
        assert told[-1]["num_steps"] == 12 and told[-1]["loss"] > 0 and 0 < told[-1]["cost_usd"] < 2 and told[-1]["run_id"] == "r"
        assert any("preparing" in one["doing"] for one in told)

        stopped = queue.submit(given)
        queue.wait(stopped, until=lambda job: step_of(job) == 7)
        first.process.send_signal(signal.SIGTERM)
        job = queue.wait(stopped)
        assert "exit status 75" in error_of(job) and "submit the same request again" in error_of(job)
        assert job.result is not None and job.result["output"]["submit_again"] is True
        assert job.result["output"]["report"]["stopped"] == "preempted"
        assert checkpoints(tmp_path)[-1] == 7
        assert first.process.wait(20) == 0, "the worker ends when its job has"
    assert not (tmp_path / "runs/r/lease.json").exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", port)
    with worker(tmp_path, base, *arguments) as local, ThreadPoolExecutor() as pool:
        wait_for_port(int(port))
        url = f"http://127.0.0.1:{port}/runsync"
        both = [pool.submit(requests.post, url, json={"input": given}, timeout=200) for _ in range(2)]
        time.sleep(0.5)
        other = requests.post(url, json={"input": {**given, "SEED": 7}}, timeout=200).json()
        assert other["status"] == "FAILED" and "other settings" in other["error"]
        answers = [one.result().json() for one in both]
        assert {answer["status"] for answer in answers} == {"COMPLETED"}, [*answers, local.log]
        assert answers[0]["output"] == answers[1]["output"] and answers[0]["output"]["already_done"] is False
        assert answers[0]["output"]["report"]["actual"]["num_steps"] == 12
    starts = [(one["first_step"], one["stopped"]) for one in attempts(tmp_path)]
    assert starts[-3:] == [(0, "preempted"), (4, "preempted"), (7, "finished")], (
        "both requests had one start, from the checkpoint"
    )

    with RunPodQueue() as queue, worker(tmp_path, {**base, **queue.environ("w2"), "JOB_FAULT": "full@2"}) as second:
        job = queue.wait(queue.submit(given))
        assert job.state == "COMPLETED" and job.result is not None
        assert job.result["output"]["already_done"] is True and job.result["output"]["report"]["chosen"]["step"] == 12
        assert not job.progress and len(attempts(tmp_path)) == len(starts), "nothing was started for it"

        job = queue.wait(queue.submit({**given, "RUN_ID": "full"}))
        output = (job.result or {})["output"]
        assert "exit status 5: " in error_of(job) and "No space left" in error_of(job) and (job.result or {})["stopPod"]
        assert output["run_id"] == "full" and output["store"].endswith("runs/full") and output["report"]["exit_status"] == 5
        told_all = second.log + first.log + local.log + json.dumps([one.progress for one in queue.jobs.values()])
    assert TOKEN not in told_all and "Finished." in second.log and "DEBUG" not in second.log


def wait_for_port(port: int) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the local server did not start")


def test_the_local_mode_finds_the_sdk_and_loads_nothing_heavy(tmp_path: Path, base: dict[str, str]) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(HANDLER)!r}, '--test_input', '{{\"input\": {{\"MAX_LENGTH\": 0}}}}']\n"
        f"sys.path[0] = {str(HANDLER.parent)!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n    print('status', error.code)\n"
        "print('heavy', sorted({'torch', 'transformers', 'datasets', 'trl', 'peft', 'numpy'} & sys.modules.keys()))\n"
        "print(sys.modules['runpod'].__file__)"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=base, capture_output=True, text=True, check=False)
    assert "status 1" in child.stdout and "heavy []" in child.stdout, child.stdout + child.stderr
    assert "MAX_LENGTH=0: " in child.stdout and "MODEL_ID: is required" in child.stdout
    assert str(ROOT) + "/runpod" not in child.stdout.splitlines()[-1], "the SDK, and not the folder of this repository"
