"""RunPod's serverless worker: `python runpod/handler.py`. Requests from the queue in, runs of the job and their answers out.

The folder has no __init__.py and must get none: the SDK is called `runpod` too, and would not be found. Nothing heavy is
imported here; torch is in the job's own processes. Endpoint, requests and answers: docs/serverless.md.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `job`, wherever this is started
os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # at the SDK's default, DEBUG, it prints every request and every answer

try:
    from runpod import serverless
except ImportError:
    sys.exit("RunPod's SDK is missing: pip install -r requirements.txt -c requirements-runpod.txt runpod")

from worker_runs import Runs

from job.redaction import Redactor, guessed_secrets, redacted_streams

PROGRESS_SECONDS = 10.0
"""Least time between two updates of one request: each is a thread and a connection of its own (SDK 1.12)."""


class Worker:
    """Binds the runs to the SDK: cancels, signals, progress."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._runs = Runs(environ)
        self._has_queue = bool(environ.get("RUNPOD_WEBHOOK_POST_OUTPUT"))
        self._seconds = float(environ.get("PROGRESS_SECONDS") or PROGRESS_SECONDS)
        self._hears_signals = False

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """The SDK's handler. A coroutine, because only those can be cancelled while they work (SDK 1.12)."""
        self._hear_signals()
        return await self._runs.answer(job.get("input"), self._listener(job))

    def _listener(self, job: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        told_at = -self._seconds

        def tell(progress: dict[str, Any]) -> None:
            nonlocal told_at
            if self._has_queue and time.monotonic() - told_at >= self._seconds:
                told_at = time.monotonic()
                serverless.progress_update({"id": job["id"]}, progress)

        return tell

    def _hear_signals(self) -> None:
        """The SDK's own handlers only wait until the jobs are done, which takes hours; those are called after ours."""
        if self._hears_signals:
            return
        self._hears_signals = True
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number, before)

    def _on_signal(self, number: signal.Signals, before: Any) -> None:
        print(f"{number.name}: the runs save a checkpoint", flush=True)
        self._runs.stop_all()
        # In the local mode the SDK's own handler for Ctrl-C exits with 0 before the answer is there.
        if callable(before) and before is not getattr(serverless, "_signal_handler", None):
            before(number, None)


if __name__ == "__main__":  # the SDK's ping process may import this file
    sys.stdout, sys.stderr = redacted_streams(Redactor(guessed_secrets(os.environ)))
    serverless.start({"handler": Worker(os.environ).handle})
