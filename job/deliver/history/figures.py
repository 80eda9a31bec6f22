"""Runs in; how many finished, what ended the others and what that cost, out: counts and sums, no statistics beyond a median."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta

from pydantic import BaseModel, ConfigDict

from job.deliver.history.groups import BestRun, Forecast, Pace, Speed, best_runs, forecasts, paces
from job.deliver.history.outcomes import Attempt, Outcome
from job.deliver.history.records import without_particulars
from job.deliver.history.runs import Run

WORST_FAILURES = 0.2
"""Share of failed runs that a team should stay below: one in five."""
MOST_WEEKS = 26
"""A trend over more is told by the month."""
ADVICE = {
    Outcome.NOT_PUBLISHED: "`python -m job publish` with the same settings finishes it; HF_TOKEN must be allowed to write to "
    "HUB_MODEL_ID",
    Outcome.BUDGET: "raise MAX_COST_USD or MAX_HOURS and start again: it goes on from its checkpoint; `python -m job plan` tells "
    "hours and dollars before",
    Outcome.PREEMPTED: "start again with the same settings: it goes on from its checkpoint; an engine that retries status 75 "
    "does so by itself",
    Outcome.NETWORK: "start again when the store and the Hub answer; what was saved before is kept",
    Outcome.OUT_OF_MEMORY: "`python -m job plan` says which GPUs it fits on; a lower MAX_LENGTH or LORA_R, or more memory, makes "
    "it fit",
    Outcome.DIVERGED: "lower LEARNING_RATE (QLoRA's own runs use 1e-4 to 2e-4, arXiv 2305.14314, table 9), and look at the "
    "examples that are named",
    Outcome.DATA: "`python -m job prepare` makes the data without a GPU and says what becomes of every row: do it before one is "
    "rented",
    Outcome.SETTINGS: "`python -m job check` asks the store, the Hub and the model before a GPU second is paid for",
    Outcome.NO_FIT: "`python -m job plan` says beforehand what fits where, and what would make it fit",
    Outcome.MACHINE: "start again on another machine; `python -m job check` says in seconds what is wrong with this one",
    Outcome.CRASHED: "a bug, or a library's: the reason names it and the log has its traceback; start again to continue from the "
    "last checkpoint",
    Outcome.VANISHED: "start again: it goes on from its last checkpoint; an engine that restarts lost machines does so by "
    "itself, and a lower SAVE_INTERVAL loses less",
    Outcome.UNREADABLE: "what its folder holds is damaged, or was deleted in part; start it again to find out",
}


class Reason(BaseModel):
    """Reasons that differ in numbers, paths and digests only."""

    model_config = ConfigDict(frozen=True)

    pattern: str
    example: str
    """As the newest of these runs has it."""
    num_runs: int
    run_id: str
    """Of the newest of these runs."""


class Ending(BaseModel):
    """One way not to finish, and what it took.

    An attempt of a run that did not finish counts with what ended the run; an unfinished attempt of a run that finished or
    still runs counts with what ended the attempt. So each counts once.
    """

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    num_runs: int
    """That ended so."""
    num_attempts: int
    hours: float
    """Of the attempts whose time is known."""
    cost_usd: float
    """Of the attempts whose cost is known."""
    num_unpriced: int
    """Attempts whose cost is not known."""
    reasons: list[Reason]
    """The most frequent first."""
    advice: str


class Period(BaseModel):
    """Runs that ended within a week or a month."""

    model_config = ConfigDict(frozen=True)

    begin: date
    num_ended: int
    num_finished: int
    num_failed: int


class Figures(BaseModel):
    """What all runs together say. Shares are of the runs that are over and known how; None when there is none."""

    model_config = ConfigDict(frozen=True)

    num_runs: int
    num_running: int
    num_unreadable: int
    num_ended: int
    num_finished: int
    num_resumable: int
    """Stopped by the budget, a signal or the network, or not published: the same command goes on."""
    num_failed: int
    finished_share: float | None
    failed_share: float | None
    num_attempts: int
    num_attempts_ended: int
    num_attempts_finished: int
    attempts_finished_share: float | None
    outcomes: dict[Outcome, int]
    """Runs, the most frequent first."""
    attempt_outcomes: dict[Outcome, int]
    hours: float
    cost_usd: float
    """Of all attempts whose cost is known."""
    num_unpriced: int
    """Attempts whose cost is not known."""
    endings: list[Ending]
    """The most frequent first."""
    survived: dict[str, int]
    """Finished runs by what they went on from."""
    num_survived: int
    """Finished runs that went on from anything at all."""
    trend: list[Period]
    best: list[BestRun]
    speeds: list[Speed]
    forecasts: list[Forecast]


def count_figures(runs: Sequence[Run], measured: Iterable[Pace] = ()) -> Figures:
    """Count everything.

    Args:
        runs: the newest first.
        measured: what runs have written down of their pace.
    """
    ended = [run for run in runs if run.outcome.is_known]
    attempts = [attempt for run in runs for attempt in run.attempts]
    attempts_ended = [attempt for attempt in attempts if attempt.outcome.is_known]
    num_finished = sum(run.outcome.is_finished for run in ended)
    num_resumable = sum(run.outcome.is_resumable for run in ended)
    num_failed = len(ended) - num_finished - num_resumable
    num_attempts_finished = sum(attempt.outcome.is_finished for attempt in attempts_ended)
    survivors = [run for run in ended if run.outcome.is_finished and run.survived]
    return Figures(
        num_runs=len(runs),
        num_running=sum(run.outcome is Outcome.RUNNING for run in runs),
        num_unreadable=sum(run.outcome is Outcome.UNREADABLE for run in runs),
        num_ended=len(ended),
        num_finished=num_finished,
        num_resumable=num_resumable,
        num_failed=num_failed,
        finished_share=_share(num_finished, len(ended)),
        failed_share=_share(num_failed, len(ended)),
        num_attempts=len(attempts),
        num_attempts_ended=len(attempts_ended),
        num_attempts_finished=num_attempts_finished,
        attempts_finished_share=_share(num_attempts_finished, len(attempts_ended)),
        outcomes=dict(Counter(run.outcome for run in runs).most_common()),
        attempt_outcomes=dict(Counter(attempt.outcome for attempt in attempts).most_common()),
        hours=_hours(attempts),
        cost_usd=_known_usd(attempts),
        num_unpriced=_num_unpriced(attempts),
        endings=_count_endings(runs),
        survived=dict(Counter(what for run in survivors for what in run.survived).most_common()),
        num_survived=len(survivors),
        trend=_count_trend(ended),
        best=best_runs(runs),
        speeds=paces(runs, measured),
        forecasts=forecasts(runs),
    )


def _count_endings(runs: Sequence[Run]) -> list[Ending]:
    charged: dict[Outcome, list[Attempt]] = {}
    ended: dict[Outcome, list[Run]] = {}
    for run in runs:
        is_lost = not run.outcome.is_finished and run.outcome is not Outcome.RUNNING
        if is_lost:
            ended.setdefault(run.outcome, []).append(run)
        for attempt in run.attempts:
            what = run.outcome if is_lost else attempt.outcome
            if not what.is_finished and what is not Outcome.RUNNING:
                charged.setdefault(what, []).append(attempt)
    endings = [
        Ending(
            outcome=outcome,
            num_runs=len(those := ended.get(outcome, [])),
            num_attempts=len(attempts := charged.get(outcome, [])),
            hours=_hours(attempts),
            cost_usd=_known_usd(attempts),
            num_unpriced=_num_unpriced(attempts),
            reasons=_count_reasons(those),
            advice=ADVICE.get(outcome, ""),
        )
        for outcome in {**ended, **charged}
    ]
    return sorted(endings, key=lambda ending: (-ending.num_runs, -ending.hours, ending.outcome))


def _count_reasons(runs: Sequence[Run]) -> list[Reason]:
    alike: dict[str, list[Run]] = {}
    for run in runs:
        if run.reason:
            alike.setdefault(without_particulars(run.reason), []).append(run)
    reasons = [
        Reason(pattern=pattern, example=those[0].reason or "", num_runs=len(those), run_id=those[0].run_id)
        for pattern, those in alike.items()
    ]
    return sorted(reasons, key=lambda reason: -reason.num_runs)


def _count_trend(ended: Sequence[Run]) -> list[Period]:
    dated = [(run.ended, run) for run in ended if run.ended is not None]
    if not dated:
        return []
    first, last = min(when for when, _ in dated), max(when for when, _ in dated)
    begin = _week if last - first <= timedelta(weeks=MOST_WEEKS) else _month
    periods: dict[date, list[Run]] = {}
    for when, run in dated:
        periods.setdefault(begin(when), []).append(run)
    return [
        Period(
            begin=day,
            num_ended=len(those),
            num_finished=(finished := sum(run.outcome.is_finished for run in those)),
            num_failed=len(those) - finished - sum(run.outcome.is_resumable for run in those),
        )
        for day, those in sorted(periods.items())
    ]


def _week(when: datetime) -> date:
    return when.date() - timedelta(days=when.weekday()) if when.year > 1 else when.date()


def _month(when: datetime) -> date:
    return when.date().replace(day=1)


def _hours(attempts: Iterable[Attempt]) -> float:
    return sum(attempt.seconds or 0.0 for attempt in attempts) / 3600


def _known_usd(attempts: Iterable[Attempt]) -> float:
    return sum(attempt.cost_usd or 0.0 for attempt in attempts)


def _num_unpriced(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.cost_usd is None for attempt in attempts)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
