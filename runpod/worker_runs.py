"""The runs of one worker: a request in, its answer out.

Requests for the same run share one start of it; another run waits until the GPU is free. What is not handled: what RunPod does
with an answer, and a second handler on the same machine (the job's own lock refuses that).
"""

import asyncio
import os
import platform
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import answer
from job_process import MARGIN_SECONDS, JobProcess, job_environ
from lease import SECONDS, Lease, TakenError
from place import check_place, default_output, open_run
from request_input import read_input

from job.errors import JobError, PreemptedError, SettingsError
from job.keep.mirror import is_whole
from job.keep.store import hurried
from job.redaction import Redactor, guessed_secrets
from job.settings import Configuration, default_run_id, read_settings, result_fingerprint

Listener = Callable[[dict[str, Any]], None]


class Runs:
    """All that this worker has under way.

    Args:
        environ: the worker's environment.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._redact = Redactor(guessed_secrets(environ))
        self._under_way: dict[str, _Run] = {}
        self._gpu: asyncio.Lock | None = None
        self._is_leaving = False

    async def answer(self, given: object, on_progress: Listener) -> dict[str, Any]:
        """Do what a request asks for; cancelled, it stops the run unless another request waits for it too.

        Args:
            given: the request's `input`.
            on_progress: told how far the run is, after each line of its log.
        """
        try:
            texts, configuration, is_asked_for = await asyncio.to_thread(self._read, given)
            settings = configuration.settings
            run_id = settings.keep.run_id
            if run_id is None:
                run_id = await asyncio.to_thread(default_run_id, settings)
            check_place(settings, self._environ, is_asked_for=is_asked_for)
            run = _Run(run_id, texts, configuration, self._environ)
        except SettingsError as error:
            return answer.refused(error.problems)
        except JobError as error:
            return answer.failed(error.exit_status, self._redact(str(error)))
        except OSError as error:  # a local model or data set that cannot be read
            return answer.failed(2, self._redact(f"{error.filename}: {error.strerror}"), refresh=False)
        except Exception as bug:  # the SDK would send its traceback as it is
            print(self._redact(traceback.format_exc()), flush=True)
            return answer.failed(1, self._redact(f"{type(bug).__name__}: {bug}"))
        if self._is_leaving:
            return answer.failed(PreemptedError.exit_status, "this worker is going away; nothing was started", run_id=run_id)
        if self._gpu is None:
            self._gpu = asyncio.Lock()
        under_way = self._under_way.setdefault(run.store.uri, run)
        if under_way is run:
            run.begin(self._gpu, lambda: self._under_way.pop(run.store.uri, None))
        elif under_way.fingerprint != run.fingerprint:
            rule = f"RUN_ID={run_id}: this worker trains that run, with other settings; wait for it, or choose another RUN_ID"
            return answer.refused([rule])
        return await under_way.wait(on_progress)

    def stop_all(self) -> None:
        """The machine goes away: every run saves a checkpoint, and its requests are answered with what to do next."""
        self._is_leaving = True
        for run in self._under_way.values():
            run.stop()

    def _read(self, given: object) -> tuple[dict[str, str], Configuration, bool]:
        """Settings, and whether the request itself says where the results go."""
        texts, configuration = read_input(given, self._environ)
        if more := default_output(self._environ, configuration.settings):
            return {**texts, **more}, read_settings(self._environ, {**texts, **more}), False
        return texts, configuration, "OUTPUT_URI" in texts


class _Run:
    """One start of one run, for any number of requests."""

    def __init__(self, run_id: str, texts: Mapping[str, str], configuration: Configuration, environ: Mapping[str, str]) -> None:
        settings = configuration.settings
        self._run_id, self._grace_seconds = run_id, settings.keep.grace_seconds
        self.fingerprint = result_fingerprint(settings)
        self.store = open_run(settings, environ, run_id)
        worker = environ.get("RUNPOD_POD_ID") or f"{platform.node()}-{os.getpid()}"
        seconds = float(environ.get("LEASE_SECONDS") or SECONDS)
        self._lease = Lease(self.store, settings.keep.work_dir.expanduser() / "lease", worker=worker, seconds=seconds)
        self._process = JobProcess(job_environ(environ, texts), grace_seconds=self._grace_seconds, on_progress=self._tell)
        self._redact = Redactor(guessed_secrets(environ))
        self._listeners: list[Listener] = []
        self._task: asyncio.Task[dict[str, Any]] | None = None
        self._is_stopping = self._is_started = False

    def begin(self, gpu: asyncio.Lock, on_end: Callable[[], object]) -> None:
        self._task = asyncio.create_task(self._do(gpu))
        self._task.add_done_callback(lambda _: on_end())

    async def wait(self, on_progress: Listener) -> dict[str, Any]:
        """The answer to one more request for it."""
        assert self._task is not None
        self._listeners.append(on_progress)
        try:
            return dict(await asyncio.shield(self._task))  # the SDK takes keys out of what it gets
        except asyncio.CancelledError:
            self._listeners.remove(on_progress)
            if not self._listeners:
                self.stop()
                await self._end()
            raise

    def stop(self) -> None:
        """Have a checkpoint saved, and end."""
        self._is_stopping = True
        if self._is_started:
            self._process.stop()
        elif self._task is not None:
            self._task.cancel()

    async def _end(self) -> None:
        """Wait for the end, also when cancelled once more: the job is given no longer than its grace."""
        assert self._task is not None
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._grace_seconds + 2 * MARGIN_SECONDS
        while not self._task.done() and loop.time() < ends:
            with suppress(asyncio.CancelledError):
                await asyncio.wait({self._task}, timeout=ends - loop.time())

    def _tell(self, progress: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener({"run_id": self._run_id, **progress})

    async def _do(self, gpu: asyncio.Lock) -> dict[str, Any]:
        try:
            if gpu.locked():
                self._tell({"doing": "waiting for another run on this worker's GPU"})
            async with gpu:
                if await asyncio.to_thread(self._is_done):
                    return await asyncio.to_thread(answer.done, self._run_id, self.store, already=True)
                self._tell({"doing": "asking whether another worker is at this run"})
                try:
                    await self._lease.take()
                    return await self._train()
                finally:
                    await self._lease.give_back()
        except asyncio.CancelledError:
            if not self._is_stopping:  # the event loop ends
                raise
            return await self._failed(PreemptedError.exit_status, "stopped before it began")
        except TakenError as error:
            what_next = "submit again when that worker is done: the run continues, or its report is returned"
            return await self._failed(error.exit_status, str(error), refresh=False, what_next=what_next)
        except JobError as error:
            return await self._failed(error.exit_status, self._redact(str(error)))
        except Exception as bug:
            print(self._redact(traceback.format_exc()), flush=True)
            return await self._failed(1, self._redact(f"{type(bug).__name__}: {bug}"))

    async def _train(self) -> dict[str, Any]:
        self._is_started = True
        running = asyncio.create_task(self._process.run())
        losing = asyncio.create_task(self._lease.lost())
        await asyncio.wait({running, losing}, return_when=asyncio.FIRST_COMPLETED)
        has_lost = losing.done() and not running.done()
        if has_lost:
            self._process.stop()
        try:
            status = await running
        finally:
            losing.cancel()
        if status == 0:
            return await asyncio.to_thread(answer.done, self._run_id, self.store, already=False)
        reason = self._process.reason()
        if has_lost:
            reason = f"another worker has taken this run over; {reason}"
        elif self._is_stopping and status < 0:
            how = "before it had begun" if status == -signal.SIGTERM else "after GRACE_SECONDS; the last checkpoint is kept"
            status, reason = PreemptedError.exit_status, f"stopped {how}"
        return await self._failed(status, reason)

    async def _failed(self, status: int, reason: str | None, **more: Any) -> dict[str, Any]:
        return await asyncio.to_thread(partial(answer.failed, status, reason, run_id=self._run_id, store=self.store, **more))

    def _is_done(self) -> bool:
        store = hurried(self.store)
        return answer.DONE in store.list(answer.DONE) and is_whole(store, answer.ADAPTER)
