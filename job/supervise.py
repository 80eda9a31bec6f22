"""The keeper of child processes: starts one, reads its events, passes a stop on, and judges how it ended.

Imports no torch. A child that is killed leaves end of file on its pipe; a supervisor that is killed closes the child's
standard input, and the child ends itself.
"""

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from job.errors import JobError, MachineError, error_for_status
from job.events import Ended, Event, Failed, Stopped
from job.processes import Processes
from job.redaction import redact_model
from job.stopping import StopRequest
from job.train.trackers import CREDENTIALS

STACKS_SECONDS = 2.0
"""How long a process that hangs may take to write its stacks."""

SECRET_NAMES = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RUNPOD_API_KEY",
    "WANDB_API_KEY",
    "WEBHOOK_URL",
    *CREDENTIALS,
)

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""Libraries' own bars and remarks would tear our lines apart; set one of these to hear them again."""


PLACE_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"),
)
"""An engine's word on which of several processes this is: libraries would wait for the others in stages that have none."""


def child_environ(environ: Mapping[str, str], secrets: Mapping[str, str], allowed: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment without a credential, but for those that this child needs."""
    hidden = {*SECRET_NAMES, *(f"{name}_FILE" for name in SECRET_NAMES), *PLACE_NAMES}
    kept = {name: value for name, value in environ.items() if name not in hidden}
    quiet = {name: kept.get(name, value) for name, value in QUIET.items()}
    return kept | quiet | {name: secrets[name] for name in allowed if name in secrets}


class ChildFailedError(Exception):
    """A child ended without doing its work.

    Args:
        error: what to exit with when nothing can be done about it.
        failed: its last word, when it had one.
        has_hung: it was silent for too long and was killed.
    """

    def __init__(self, error: JobError, stopped: Stopped, *, failed: Failed | None = None, has_hung: bool = False) -> None:
        self.error, self.stopped, self.failed, self.has_hung = error, stopped, failed, has_hung
        super().__init__(str(error))


def run_child(
    stage: str,
    spec: BaseModel,
    *,
    folder: Path,
    environ: Mapping[str, str],
    stop: StopRequest,
    grace_seconds: float,
    on_event: Callable[[Event], None],
    on_idle: Callable[[], None],
    redact: Callable[[str], str] = str,
    on_output: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    hang_seconds: float | None = None,
    ranks: Sequence[Mapping[str, str]] = ({},),
    is_pointless: Callable[[], bool] = lambda: False,
) -> None:
    """Run a stage in a process of its own until it ends.

    Args:
        stage: fetch, prepare or train.
        spec: its settings, written to `folder` as JSON.
        environ: its whole environment.
        stop: asked every second; a child that is to stop gets one SIGTERM, whoever asks.
        grace_seconds: how long a stopping child may take before it is killed.
        on_event: called in this thread with each event.
        on_idle: called about once a second.
        redact: applied to all texts of its events, whatever a library put into them.
        on_output: called in a thread with each line that the child prints, tracebacks too.
        hang_seconds: without an event for so long, the child writes down its stacks (SIGUSR1) and is killed.
        ranks: what each of several processes has in its environment beside `environ`; the first one's events count.
        is_pointless: asked about once a second; then the processes are killed.

    Raises:
        ChildFailedError: carries the error to exit with, and why the attempt stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec_file = folder / f"{stage}.json"
    spec_file.write_text(spec.model_dump_json(indent=1), "utf-8")
    is_stopping = False
    heard_at, has_hung, kills_before = time.monotonic(), False, _num_oom_kills()
    processes = Processes(stage, spec_file, [{**environ, **rank} for rank in ranks], on_output)
    try:
        for event in processes:
            if event is not None:
                heard_at = time.monotonic()
                on_event(redact_model(event, redact))
            if hang_seconds is not None and not has_hung and time.monotonic() - heard_at > hang_seconds:
                has_hung = True
                processes.signal(signal.SIGUSR1)
                time.sleep(STACKS_SECONDS)
                processes.kill()
            if stop.is_asked() and not is_stopping:
                is_stopping = True
                processes.signal(signal.SIGTERM)
            if is_pointless() or (is_stopping and stop.seconds_left(grace_seconds) <= 0):
                processes.kill()
            on_idle()
        statuses = processes.wait()
    finally:
        processes.put_away()
    deciding = processes.deciding
    last = processes.last[deciding]
    last = None if last is None else redact_model(last, redact)
    if has_hung and not isinstance(last, (Ended, Failed)):
        message = f"HANG_SECONDS={hang_seconds:g}: the {stage} process was silent for longer and was killed"
        raise ChildFailedError(MachineError(message), Stopped.CRASHED, has_hung=True)
    out_of_memory = _num_oom_kills() > kills_before
    _judge(stage, statuses[deciding], last, stop, is_stopping=is_stopping, out_of_host_memory=out_of_memory)


def _num_oom_kills() -> int:
    """How often the kernel has killed a process of this container, or of this machine, for memory."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError):
            for line in path.read_text("utf-8").splitlines():
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
    return 0


def _judge(
    stage: str, status: int, last: Event | None, stop: StopRequest, *, is_stopping: bool, out_of_host_memory: bool
) -> None:
    """Believe the last event before the status."""
    if isinstance(last, Failed):
        if last.stopped is Stopped.PREEMPTED and stop.stopped is Stopped.BUDGET:
            raise ChildFailedError(stop.error(), Stopped.BUDGET, failed=last)
        raise ChildFailedError(error_for_status(last.exit_status, last.message), last.stopped, failed=last)
    if isinstance(last, Ended) and last.stopped is Stopped.PREEMPTED:
        left = f"the checkpoint of step {last.step} is saved" if last.step else "no step was completed"
        raise ChildFailedError(stop.error(left), stop.stopped)
    if status == 0 and (stage not in ("train", "evaluate") or isinstance(last, Ended)):
        return
    if is_stopping:
        if status == -signal.SIGTERM:  # it had not yet begun to listen
            raise ChildFailedError(stop.error(), stop.stopped)
        left = f"the {stage} process did not stop in time and was killed; the last checkpoint is kept"
        raise ChildFailedError(stop.error(left), stop.stopped)
    if status == -signal.SIGKILL:
        message = f"the {stage} process was killed from outside; start again to continue"
        if out_of_host_memory:
            message = (
                f"the {stage} process was killed by the kernel: the machine's memory (not the GPU's) was full; take a machine "
                "with more memory and start again to continue"
            )
        raise ChildFailedError(MachineError(message), Stopped.CRASHED)
    raise ChildFailedError(JobError(f"the {stage} process ended with status {status} and no last word"), Stopped.CRASHED)
