"""`python -m job run` in a process group of its own: an environment in; its progress, its exit status and its last words out.

What the job prints is redacted already; it is passed on as it comes, to the worker's log. A line of JSON is a logged step, any
other line says what is being done (job/display.py). The job is stopped as everywhere, by SIGTERM, and saves a checkpoint.
"""

import asyncio
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARGIN_SECONDS = 15.0
"""Beyond GRACE_SECONDS, which the trainer has for its checkpoint: the last upload, the report and WEBHOOK_URL."""
OUTPUT_SECONDS = 2.0
"""How long the last lines are waited for: a process that was left behind may hold the pipe open."""
MAX_LINES = 60
MAX_CHARACTERS = 2000
"""Of one line that is kept."""
MAX_BYTES = 1 << 20
"""Of one line that does not end."""
SDK_SECRETS = ("RUNPOD_AI_API_KEY", "RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_WEBHOOK_POST_STREAM", "RUNPOD_WEBHOOK_PING")
"""The queue's key and addresses: the job asks nothing there."""
_LAST_WORDS = re.compile(r"(?:failed|stopped): ")
_PROBLEM = re.compile(r"[A-Z][A-Z0-9_]{2,}(?:=.*)?: ")


def job_environ(environ: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, str]:
    """The job's whole environment: the worker's, a request's settings over it, and no word on what becomes of the machine."""
    kept = {name: value for name, value in environ.items() if name not in SDK_SECRETS}
    if "RUNPOD_WEBHOOK_GET_JOB" in kept:
        kept["RUNPOD_WEBHOOK_GET_JOB"] = "set"  # that this is a serverless worker is all that it says
    path = os.pathsep.join([str(ROOT), *([kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else [])])
    return {**kept, **texts, "ON_FINISH": "exit", "PYTHONPATH": path}


class JobProcess:
    """One start of the job.

    Args:
        environ: its whole environment.
        grace_seconds: GRACE_SECONDS.
        on_progress: called with what is known of it, after each line that says more.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        grace_seconds: float,
        on_progress: Callable[[dict[str, Any]], None],
        margin_seconds: float = MARGIN_SECONDS,
    ) -> None:
        self._environ, self._on_progress = dict(environ), on_progress
        self._seconds_to_stop = grace_seconds + margin_seconds
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._progress: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._is_asked = False

    async def run(self) -> int:
        """Run to the end, stopping it first when this is cancelled; returns the exit status, negative for a signal."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "job", "run"),
            env=self._environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        if self._is_asked:  # while it was started
            self._signal()
        reading = asyncio.create_task(self._read())
        try:
            return await self._process.wait()
        except asyncio.CancelledError:  # the event loop itself ends
            self.stop()
            await self._process.wait()
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it has left behind
            await asyncio.wait({reading}, timeout=OUTPUT_SECONDS)
            reading.cancel()

    def stop(self) -> None:
        """Ask for a checkpoint and the end; killed when the grace is over. Once: a second signal would cut the saving off."""
        if not self._is_asked:
            self._is_asked = True
            self._signal()

    def _signal(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._seconds_to_stop, self._kill)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def reason(self) -> str | None:
        """The job's own words on why it ended: its error, its wrong settings, or the end of a traceback."""
        lines = list(self._lines)
        for index in range(len(lines) - 1, -1, -1):
            if _LAST_WORDS.match(lines[index]):
                return "\n".join([_LAST_WORDS.sub("", lines[index], count=1), *lines[index + 1 :]])
        first = len(lines)
        while first and _PROBLEM.match(lines[first - 1]):
            first -= 1
        return "\n".join(lines[first:]) or (lines[-1] if lines else None)

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-MAX_BYTES:]
            for line in lines:
                self._hear(line.decode("utf-8", "replace"))
        if rest:
            self._hear(rest.decode("utf-8", "replace"))

    def _hear(self, line: str) -> None:
        print(line, flush=True)
        line = line.rstrip()[:MAX_CHARACTERS]
        if not line:
            return
        step = _step(line)
        if step is None:
            self._lines.append(line)
            self._progress["doing"] = line[:200]
        else:
            self._progress.update(step, doing="training")
        self._on_progress(dict(self._progress))


def _step(line: str) -> dict[str, Any] | None:
    """What a logged step says; None for another line. NaN, which RunPod's JSON does not know, becomes null."""
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    if not isinstance(row.get("step"), int) or not isinstance(row.get("num_steps"), int):
        return None
    told = {name: row.get(name) for name in ("step", "num_steps", "loss")}
    return told | {"eta_seconds": row.get("seconds_left"), "cost_usd": row.get("cost_usd")}
