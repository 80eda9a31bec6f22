"""How a run ended in; out, the rented machine stopped or terminated as ON_FINISH asks, so that it bills no longer.

RunPod starts a container again whose process has ended: a pod that is left running after its job costs money until somebody
looks. So this is the last act of `run`, whatever came before; it never raises, and changes no exit status.

Not handled: other providers than RunPod, whose machines end with their job or by their own rules; RunPod's serverless workers
and the later nodes of its clusters, which belong to somebody else.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from job.deliver.pod import PodError, Verb, end_pod
from job.errors import BudgetError, PublishError

Action = Literal["exit", "stop", "terminate"]
CONSOLE = "https://console.runpod.io/pods"
KEEP_FILE = Path("/tmp/keep-this-pod")
GOOD_ENDS = (0, PublishError.exit_status, BudgetError.exit_status)
"""What is trained is in the store: nobody has to look at the machine."""

LAST_SECONDS = 60.0
"""How long RunPod may take to kill the container after it has agreed; ended sooner, the container may be started again."""
TRY_AGAIN_SECONDS = 300.0
HEARTBEAT_SECONDS = 300.0
NOTIFY_AGAIN_SECONDS = 3600.0
_TICK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What becomes of the machine."""

    action: Action
    has_grace: bool = False
    """Whether somebody may want to look at it before."""
    why: str = ""
    """Why it is not what ON_FINISH says."""


def choose_action(*, on_finish: str, exit_status: int, output_is_off_machine: bool, has_signal: bool) -> Choice:
    """Decide what becomes of the machine.

    `terminate` destroys the pod's own disks, so it needs a good end whose results lie elsewhere; else it becomes `stop`.

    Args:
        on_finish: ON_FINISH.
        has_signal: whether somebody is already ending the process or its machine, and so decides.
    """
    if on_finish == "exit":
        return Choice(action="exit")
    if has_signal:
        return Choice(action="exit", why="the run was stopped by a signal, and who sent it decides about the machine")
    if exit_status not in GOOD_ENDS:
        why = "only a run that has ended well gives its disk away" if on_finish == "terminate" else ""
        return Choice(action="stop", has_grace=True, why=why)
    if on_finish == "terminate" and not output_is_off_machine:
        return Choice(action="stop", why="OUTPUT_URI is on the pod's own disk, which would go with it")
    return Choice(action="terminate" if on_finish == "terminate" else "stop")


def is_own_pod(environ: Mapping[str, str]) -> bool:
    """Whether this is a RunPod pod that is ours to end: no serverless worker, and of a cluster only the first node."""
    is_pod = bool(environ.get("RUNPOD_POD_ID")) and not environ.get("RUNPOD_WEBHOOK_GET_JOB")
    return is_pod and environ.get("NODE_RANK", "") in ("", "0")


def finish_machine(
    *,
    on_finish: str,
    fail_grace_minutes: float,
    exit_status: int,
    environ: Mapping[str, str],
    api_key: str | None,
    output_is_off_machine: bool,
    say: Callable[[str], None],
    is_stopped: Callable[[], bool],
    notify: Callable[[str], None],
    keep_file: Path = KEEP_FILE,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Stop or terminate the pod that this runs on, as ON_FINISH asks; anywhere else do nothing.

    Returns at once when there is nothing to do, or some time after RunPod has agreed: by then the process is dead. As long as
    RunPod does not agree, it stays and tries again, until a signal comes.

    Args:
        on_finish: ON_FINISH.
        fail_grace_minutes: FAIL_GRACE_MINUTES, how long a failed run's pod waits for somebody to look at it.
        exit_status: the one that the process ends with.
        api_key: RUNPOD_API_KEY; None leaves `runpodctl`.
        output_is_off_machine: whether what OUTPUT_URI names outlives the pod.
        say: shows a line.
        is_stopped: whether a signal asked the process to end.
        notify: tells somebody who does not look at the screen.
        keep_file: while it exists, the pod is kept.
    """
    try:
        if not is_own_pod(environ):
            return
        pod = environ["RUNPOD_POD_ID"]
        choice = choose_action(
            on_finish=on_finish,
            exit_status=exit_status,
            output_is_off_machine=output_is_off_machine,
            has_signal=is_stopped(),
        )
        if choice.why:
            kept = "is left as it is" if choice.action == "exit" else "is stopped, not terminated"
            say(f"ON_FINISH={on_finish}: pod {pod} {kept}: {choice.why}")
        if choice.action == "exit":
            return
        ending = _Ending(pod, choice.action, environ, api_key, say, is_stopped, notify, keep_file, sleep, clock)
        grace_seconds = fail_grace_minutes * 60 if choice.has_grace else 0.0
        if ending.wait_for_somebody(exit_status, grace_seconds):
            ending.end()
        if is_stopped():
            say(f"a signal came: pod {pod} is left to who sent it")
    except Exception as error:  # a bug here is no reason to end otherwise than the run did
        with suppress(Exception):
            doubt = f"{type(error).__name__}; the pod may still be billing, stop it by hand: {CONSOLE}"
            say(f"warning: ON_FINISH={on_finish}: {doubt}")


class _Ending:
    """The end of one pod."""

    def __init__(
        self,
        pod: str,
        verb: Verb,
        environ: Mapping[str, str],
        api_key: str | None,
        say: Callable[[str], None],
        is_stopped: Callable[[], bool],
        notify: Callable[[str], None],
        keep_file: Path,
        sleep: Callable[[float], object],
        clock: Callable[[], float],
    ) -> None:
        self._pod, self._verb, self._environ, self._api_key = pod, verb, environ, api_key
        self._say, self._is_stopped, self._notify = say, is_stopped, notify
        self._keep_file, self._sleep, self._clock = keep_file, sleep, clock
        self._will = f"pod {pod} {'stops' if verb == 'stop' else 'is terminated'}"
        self._said_at = clock()

    def wait_for_somebody(self, exit_status: int, grace_seconds: float) -> bool:
        """Wait out the grace, and the keep file; False: a signal came."""
        to_keep = f"to keep it, make a file on it: touch {self._keep_file}"
        if grace_seconds > 0:
            when = f"{self._will} in {grace_seconds / 60:g} minutes (FAIL_GRACE_MINUTES)"
            self._tell(f"THE RUN FAILED with exit status {exit_status}: {when}")
            self._tell(f"to look at it: RunPod's web terminal, or SSH; {to_keep}")
            self._notify(f"the run failed with exit status {exit_status}: {when}; {to_keep}")
            ends = self._clock() + grace_seconds
            if not self._wait(grace_seconds, lambda: f"{self._will} in {(ends - self._clock()) / 60:.0f} minutes; {to_keep}"):
                return False
        if self._keep_file.exists():
            kept = f"{self._keep_file} keeps pod {self._pod}, WHICH IS BILLING; {self._will} when you delete that file"
            self._tell(kept)
            while self._keep_file.exists():
                if not self._wait(_TICK_SECONDS, lambda: kept):
                    return False
        return not self._is_stopped()

    def end(self) -> None:
        """Have RunPod end the pod, however long it takes; returns when it has, and at a signal."""
        notified_at: float | None = None
        sleep = partial(self._wait, heartbeat=lambda: f"{self._will}: still asking RunPod")
        while True:
            try:
                way = end_pod(self._verb, environ=self._environ, api_key=self._api_key, sleep=sleep, is_stopped=self._is_stopped)
            except PodError as error:
                if self._is_stopped():
                    return
                alarm = f"POD {self._pod} IS STILL BILLING, {self._verb} it by hand: {CONSOLE}"
                self._tell(f"{alarm} ({error})")
                if notified_at is None or self._clock() - notified_at >= NOTIFY_AGAIN_SECONDS:
                    notified_at = self._clock()
                    self._notify(f"{alarm} ({error})")
                # It stays: the container of a process that ends is started again, and so a job that fails, for ever.
                if not self._wait(TRY_AGAIN_SECONDS):
                    return
                continue
            self._tell(f"{self._will}: RunPod has agreed (asked through {way})")
            if notified_at is not None:
                self._notify(f"{self._will} after all")
            if self._wait(LAST_SECONDS):
                self._tell(f"RunPod agreed {LAST_SECONDS:g} seconds ago and this process still runs; look at {CONSOLE}")
            return

    def _tell(self, text: str) -> None:
        self._say(text)
        self._said_at = self._clock()

    def _wait(self, seconds: float, heartbeat: Callable[[], str] | None = None) -> bool:
        """Let time pass; False as soon as a signal came."""
        ends = self._clock() + seconds
        while not self._is_stopped():
            left = ends - self._clock()
            if left <= 0:
                return True
            self._sleep(min(left, _TICK_SECONDS))
            if heartbeat is not None and self._clock() - self._said_at >= HEARTBEAT_SECONDS:
                self._tell(heartbeat())
        return False
