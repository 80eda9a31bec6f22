"""A pod in; its log line by line and, at its end, what the job said of itself and what became of the pod, out.

Not handled: what the store says of the run (outcome.py).
"""

import re
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from job.deliver.calls import CallError
from job.display import Display
from job.errors import InterruptedRunError
from job.renting.api import LogLine, RunPod, job_error
from job.renting.rent import ALIVE

QUIET_SECONDS = 10.0
"""Of a log, after which the pod itself is looked at."""
SETTLE_SECONDS = 3.0
"""Of a log that has told the end, before it is believed: a container that is started again begins within it."""
LOOK_SECONDS = 15.0
"""Between two looks at the pod, however much is logged."""
PAUSE_SECONDS = 2.0
LINES_BEFORE = 5000
"""As many as RunPod gives."""
GONE_SECONDS = 150.0
"""How long a pod whose job is done well may take to go: the job asks for it, and RunPod takes a while."""
_EXIT = re.compile(r"\s*the job ends with exit status (\d+)\s*")
_START = re.compile(r"\s*run \S+ in \S+\s*")
"""What the job says first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How it looked when there was nothing more to follow.

    Attributes:
        told: the exit status in the job's own last words; None when no such line was seen.
        pod: running (it bills), exited, error, or gone.
    """

    told: int | None
    pod: Literal["running", "exited", "error", "gone"]
    usd_per_hour: float = 0.0


class Following:
    """Of one pod.

    Args:
        on_line: is given each line once.
        clock: seconds that pass.
    """

    def __init__(
        self,
        runpod: RunPod,
        pod_id: str,
        *,
        display: Display,
        on_line: Callable[[LogLine], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runpod, self._pod_id, self._display, self._on_line, self._clock = runpod, pod_id, display, on_line, clock
        self._seen: deque[tuple[str, str]] = deque(maxlen=2 * LINES_BEFORE)
        self._last_id: str | None = None
        self._status = ""
        self._is_refused = False
        self.told: int | None = None

    def follow(self) -> End:
        """Show the log until the job has ended, or its pod.

        Raises:
            JobError: RunPod does not answer any more, or does not accept the key.
        """
        while True:
            begun = self._clock()
            pod = self.look()
            if pod is None or pod["status"] not in ALIVE:
                if pod is not None:
                    self._read(SETTLE_SECONDS)
                return self._end(pod)
            if pod["status"] != self._status:
                self._status = pod["status"]
                self._display.stage(f"pod {self._pod_id} is {self._status}")
            had_told = self.told is not None
            self._read(SETTLE_SECONDS if had_told else QUIET_SECONDS)
            if had_told and self.told is not None:
                return self._end(pod)
            self._display.heartbeat()
            self._runpod.sleep(max(0.0, PAUSE_SECONDS - (self._clock() - begun)))

    def wait_until_gone(self) -> End:
        """Wait for the end of a pod whose job is done well."""
        ends = self._clock() + GONE_SECONDS
        self._display.stage(f"waiting for pod {self._pod_id} to end")
        while (pod := self.look()) is not None and pod["status"] in ALIVE and self._clock() < ends:
            self._display.heartbeat()
            self._runpod.sleep(PAUSE_SECONDS)
        return self._end(pod)

    def look(self) -> dict[str, Any] | None:
        """The pod as RunPod describes it now; None when it is gone."""
        try:
            pod = self._runpod.pod(self._pod_id)
        except CallError as error:
            failure = job_error(error, f"pod {self._pod_id}")
            if isinstance(failure, InterruptedRunError):
                raise type(failure)(f"{failure}; THE POD MAY RUN ON, and bills") from error
            raise failure from error
        return None if pod is None or pod["status"] == "TERMINATED" else pod

    def _end(self, pod: dict[str, Any] | None) -> End:
        if pod is None:
            return End(told=self.told, pod="gone")
        kinds: dict[str, Literal["exited", "error"]] = {"EXITED": "exited", "ERROR": "error"}
        return End(told=self.told, pod=kinds.get(pod["status"], "running"), usd_per_hour=float(pod["cost"]))

    def _read(self, quiet_seconds: float) -> None:
        """Show what is new in the log; returns when nothing more comes for a while, and after a while anyhow."""
        ends = self._clock() + LOOK_SECONDS
        shown_already = Counter(self._seen)
        try:
            lines = self._runpod.logs(self._pod_id, last_id=self._last_id, num_before=LINES_BEFORE, quiet_seconds=quiet_seconds)
            for line in lines:
                if shown_already[line.id, line.text] > 0:  # the stream begins again with the last moment that it has told
                    shown_already[line.id, line.text] -= 1
                    continue
                had_told = self.told is not None
                self._take(line)
                if self._clock() > ends or (self.told is not None and not had_told):
                    return
        except CallError as error:
            if error.status in (401, 403) and not self._is_refused:
                self._is_refused = True
                self._display.say(f"warning: RunPod {error} when asked for the log; the pod itself is watched")

    def _take(self, line: LogLine) -> None:
        self._seen.append((line.id, line.text))
        self._last_id = line.id or None
        self._on_line(line)
        if line.source != "container":
            return
        if match := _EXIT.fullmatch(line.text):
            self.told = int(match[1])
        elif _START.fullmatch(line.text):
            self.told = None
