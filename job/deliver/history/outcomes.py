"""The attempts of a run and its report in; how each of them, and the run, ended, out."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from job.deliver.history.records import AttemptFile, ReportFile

LIVE_SECONDS = 180.0
"""An attempt gives a sign of life every 10 seconds; one that was silent for longer is lost, or its network is."""
FAST_CLOCK = timedelta(days=1)
"""A sign of life from a future beyond this is no sign of life, but a wrong clock."""
NO_REPORT = "there is no report of it"


class Outcome(StrEnum):
    """How a run or an attempt ended."""

    PUBLISHED = "published"
    """Finished, and its adapter is on the Hub."""
    FINISHED = "finished"
    """Finished, and its adapter is in the store."""
    NOT_PUBLISHED = "not_published"
    """Trained and in the store; the Hub did not take it (6)."""
    BUDGET = "budget"
    """MAX_COST_USD or MAX_HOURS was reached (8)."""
    PREEMPTED = "preempted"
    """A signal took the machine away (75)."""
    NETWORK = "network"
    """The store or the Hub did not answer (75)."""
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    DATA = "data"
    """Unreadable data, or too few examples (3)."""
    SETTINGS = "settings"
    """A wrong setting or a refused credential (2)."""
    NO_FIT = "no_fit"
    """It does not fit (4)."""
    MACHINE = "machine"
    """This machine could not run it (5)."""
    CRASHED = "crashed"
    """Anything else that ended it, a bug most likely (1)."""
    VANISHED = "vanished"
    """Its record never ended: the machine was lost, or the process was killed."""
    UNREADABLE = "unreadable"
    """It happened; its records do not say how it ended."""
    RUNNING = "running"

    @property
    def is_finished(self) -> bool:
        return self in (Outcome.PUBLISHED, Outcome.FINISHED)

    @property
    def is_resumable(self) -> bool:
        """Stopped with all that was trained in the store: the same command goes on."""
        return self in (Outcome.NOT_PUBLISHED, Outcome.BUDGET, Outcome.PREEMPTED, Outcome.NETWORK)

    @property
    def is_known(self) -> bool:
        """Whether it is over, and known how."""
        return self not in (Outcome.RUNNING, Outcome.UNREADABLE)


_STOPPED = {
    "finished": Outcome.FINISHED,
    "budget": Outcome.BUDGET,
    "preempted": Outcome.PREEMPTED,
    "out_of_memory": Outcome.OUT_OF_MEMORY,
    "diverged": Outcome.DIVERGED,
}
_STATUS = {
    2: Outcome.SETTINGS,
    3: Outcome.DATA,
    4: Outcome.NO_FIT,
    5: Outcome.MACHINE,
    6: Outcome.NOT_PUBLISHED,
    7: Outcome.DIVERGED,
    8: Outcome.BUDGET,
    75: Outcome.NETWORK,
}


class Attempt(BaseModel):
    """One start of a run; what is not known is None."""

    model_config = ConfigDict(frozen=True)

    number: int
    outcome: Outcome
    started: datetime | None
    ended: datetime | None
    """The last sign of life."""
    seconds: float | None
    cost_usd: float | None
    machine: str | None
    last_step: int | None


def judge_attempts(files: dict[int, AttemptFile | None], now: datetime) -> list[Attempt]:
    judged = []
    for number, file in sorted(files.items()):
        if file is None or not file.has_time:
            file, outcome, seconds = file or AttemptFile(), Outcome.UNREADABLE, None
        else:
            assert file.started is not None and file.ended is not None
            seconds = max((file.ended - file.started).total_seconds(), 0.0)  # a clock may be set back
            outcome = _STOPPED.get(file.stopped, Outcome.CRASHED) if file.stopped else Outcome.VANISHED
            if not file.stopped and number == max(files) and _is_live(file.ended, now):
                outcome = Outcome.RUNNING
        price = file.price_usd_per_hour
        judged.append(
            Attempt(
                number=number,
                outcome=outcome,
                started=file.started,
                ended=file.ended,
                seconds=seconds,
                cost_usd=None if price is None or seconds is None else seconds / 3600 * price,
                machine=file.machine,
                last_step=file.last_step,
            )
        )
    return judged


def _is_live(ended: datetime | None, now: datetime) -> bool:
    return ended is not None and -FAST_CLOCK < now - ended < timedelta(seconds=LIVE_SECONDS)


def judge(report: ReportFile | None, attempts: Sequence[Attempt], *, is_done: bool, now: datetime) -> tuple[Outcome, str | None]:
    """How the run ended, and why.

    Args:
        report: None as well when it is of an attempt before the last one.
    """
    last = attempts[-1] if attempts else None
    if report is not None and report.exit_status == 6:
        return Outcome.NOT_PUBLISHED, report.reason
    if is_done:
        is_live = last is not None and last.outcome is Outcome.RUNNING
        return (Outcome.RUNNING, None) if is_live else (Outcome.FINISHED, None)
    ended = last.outcome if last else Outcome.UNREADABLE
    if report is not None:
        ended = _STOPPED.get(report.stopped or "") or _STATUS.get(report.exit_status or 0, Outcome.CRASHED)
    if ended is Outcome.FINISHED:  # trained, and the marker that comes after the delivery is not there
        if last is not None and last.outcome.is_known and last.outcome not in (Outcome.FINISHED, Outcome.VANISHED):
            return last.outcome, NO_REPORT  # the delivery failed, and so did the report of that
        if last is not None and _is_live(last.ended, now):
            return Outcome.RUNNING, None
        return Outcome.VANISHED, "trained, and lost while the adapter was delivered"
    if report is not None:
        return ended, report.reason
    if last is None:
        return Outcome.UNREADABLE, "no record says how it ended"
    if ended is Outcome.VANISHED:
        step = f" after step {last.last_step}" if last.last_step else ""
        return ended, f"the record of attempt {last.number} breaks off{step}: its machine was lost, or it was killed"
    if ended is Outcome.UNREADABLE:
        return ended, f"the record of attempt {last.number} cannot be read"
    return ended, None if ended is Outcome.RUNNING else NO_REPORT
