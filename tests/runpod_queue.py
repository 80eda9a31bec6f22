"""A small RunPod queue in memory: what a serverless worker asks and is asked for, real HTTP on 127.0.0.1.

    with RunPodQueue() as queue, start_worker(queue.environ("w1")):
        job = queue.submit({"MODEL_ID": ...}, timeout_seconds=600)
        assert queue.wait(job, seconds=60).state == "COMPLETED"

The worker's side is RunPod's: job-take and job-stop are held open, job-done takes progress and results, ping counts. The client's
side is methods. Does not handle: /run and /status over HTTP, several workers' scaling, TTL, webhooks, streams, batches.

Source: the worker's side of the SDK, runpod 1.12.0 (rp_job.py, rp_http.py, rp_ping.py, rp_scale.py).
"""

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

HOLD_SECONDS = 1.0
"""How long job-take and job-stop are held open; RunPod's are held longer."""
State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]


@dataclass(kw_only=True)
class QueueJob:
    """One request, and all that a worker said about it."""

    id: str
    input: Any
    timeout_seconds: float
    state: State = "IN_QUEUE"
    worker: str | None = None
    ends: float = float("inf")
    """When the execution timeout is over."""
    progress: list[Any] = field(default_factory=list)
    result: dict[str, Any] | None = None
    """What job-done got last: `output`, `error`, `stopPod`."""
    late_results: list[dict[str, Any]] = field(default_factory=list)
    """What a worker sent for a job that was over."""


class RunPodQueue:
    """Use as a context manager."""

    def __init__(self, api_key: str = "planted/queue+key") -> None:
        self.api_key = api_key
        self.jobs: dict[str, QueueJob] = {}
        self.num_pings = 0
        self.refused: list[str] = []
        """Requests without the right key."""
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._to_stop: dict[str, list[str]] = {}
        self._is_over = False
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    def __enter__(self) -> "RunPodQueue":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        assert not self.refused, self.refused

    def environ(self, worker: str) -> dict[str, str]:
        """What RunPod gives a worker; without the checks of its machine, which take a GPU and the internet."""
        address = f"http://127.0.0.1:{self._server.server_port}/v2/endpoint"
        return {
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_POD_ID": worker,
            "RUNPOD_AI_API_KEY": self.api_key,
            "RUNPOD_WEBHOOK_GET_JOB": f"{address}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{address}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{address}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def submit(self, given: Any, *, timeout_seconds: float = 600.0) -> str:
        """`/run`; returns the job's id."""
        with self._changed:
            job = QueueJob(id=f"job-{next(self._numbers)}", input=given, timeout_seconds=timeout_seconds)
            self.jobs[job.id] = job
            self._changed.notify_all()
        return job.id

    def cancel(self, job_id: str) -> None:
        """`/cancel`."""
        with self._changed:
            self._end(self.jobs[job_id], "CANCELLED")

    def time_out(self, job_id: str) -> None:
        """The execution timeout of a job that is worked on is over now."""
        with self._changed:
            self.jobs[job_id].ends = 0.0

    def wait(
        self, job_id: str, *, seconds: float = 240.0, until: Callable[[QueueJob], object] = lambda job: job.result
    ) -> QueueJob:
        """Wait until a job is over, or for something else of it."""
        job, ends = self.jobs[job_id], time.monotonic() + seconds
        with self._changed:
            while not until(job):
                left = ends - time.monotonic()
                assert left > 0 and job.result is None, f"{job_id} after {seconds:g} s or its end: {job}"
                self._changed.wait(min(left, 0.2))
        return job

    def take(self, worker: str) -> QueueJob | None:
        """The next job for a worker; None when there is none for a while."""
        ends = time.monotonic() + HOLD_SECONDS
        with self._changed:
            while not self._is_over and (left := ends - time.monotonic()) > 0:
                for job in self.jobs.values():
                    if job.state == "IN_QUEUE":
                        job.state, job.worker, job.ends = "IN_PROGRESS", worker, time.monotonic() + job.timeout_seconds
                        self._changed.notify_all()
                        return job
                self._changed.wait(left)
        return None

    def stops(self, worker: str) -> list[str]:
        """Ids of this worker's jobs that are cancelled or timed out since it last asked."""
        ends = time.monotonic() + HOLD_SECONDS
        with self._changed:
            while not self._is_over and (left := ends - time.monotonic()) > 0:
                for job in self.jobs.values():
                    if job.state == "IN_PROGRESS" and time.monotonic() > job.ends:
                        self._end(job, "TIMED_OUT")
                if ids := self._to_stop.pop(worker, []):
                    return ids
                self._changed.wait(min(left, 0.1))
        return []

    def done(self, job_id: str, said: dict[str, Any]) -> None:
        """A result, or progress."""
        with self._changed:
            job = self.jobs[job_id]
            if job.state != "IN_PROGRESS":
                job.late_results.append(said)
            elif said.get("status") == "IN_PROGRESS":
                job.progress.append(said["output"])
            else:
                job.result = said
                job.state = "FAILED" if "error" in said else "COMPLETED"
            self._changed.notify_all()

    def _end(self, job: QueueJob, state: State) -> None:
        if job.state == "IN_PROGRESS":
            self._to_stop.setdefault(job.worker or "", []).append(job.id)
        job.state = state
        self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a worker that was killed
            super().handle_error(request, client_address)


def _handler(queue: RunPodQueue) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            verb, worker, *_ = self._parts()
            if verb == "job-take":
                assert "job_in_progress" in parse_qs(urlsplit(self.path).query)
                job = queue.take(worker)
                self._answer(None if job is None else {"id": job.id, "input": job.input})
            elif verb == "job-stop":
                ids = queue.stops(worker)
                self._answer({"jobsToStop": ids} if ids else None)
            elif verb == "ping":
                queue.num_pings += 1
                self._answer({})

        def do_POST(self) -> None:
            verb, _, job_id = self._parts()
            assert verb == "job-done", verb

            def refuse(constant: str) -> None:
                raise ValueError(f"{constant} is no JSON")

            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])), parse_constant=refuse)
            queue.done(job_id, said)
            self._answer({})

        def _parts(self) -> list[str]:
            if self.headers["Authorization"] != queue.api_key:
                queue.refused.append(self.path)
            return urlsplit(self.path).path.split("/")[3:]

        def _answer(self, body: Mapping[str, Any] | None) -> None:
            data = b"" if body is None else json.dumps(body).encode()
            try:
                self.send_response(204 if body is None else 200)
                if body is not None:
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the worker is gone
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler
