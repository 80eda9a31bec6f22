"""The records of one run in; how it ended, why, and what it took, out."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.deliver.history.outcomes import Attempt, Outcome, judge, judge_attempts
from job.deliver.history.records import AttemptFile, ReportFile, SettingsFile, curve_speed, parse_settings, plain

SURVIVED = (("out_of_memory", "out of memory:"), ("diverged", "diverged at step"), ("hung", "was silent for longer"))
"""What a happening tells of, and the words of training.py that it is known by."""


class Run(BaseModel):
    """What the history knows of a run; what is not known is None."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    folder: str
    """In the store, below what was asked for."""
    outcome: Outcome
    reason: str | None
    """Why it did not finish, in the words that it ended with."""
    started: datetime | None
    ended: datetime | None
    seconds: float | None
    """Of all attempts whose time is known."""
    cost_usd: float | None
    """Of all attempts; None as soon as the price or the time of one is not known."""
    attempts: list[Attempt]
    survived: list[str]
    """What it ran into and went on from: out_of_memory, diverged, hung, or how an earlier attempt ended."""
    model: str | None
    data: list[str]
    """The data sets trained on."""
    device: str | None
    num_steps: int | None
    num_tokens: int | None
    eval_loss: float | None
    """Held-out loss of the adapter."""
    url: str | None
    """Of the published adapter."""
    tokens_per_second: float | None
    """Over the logged steps, evaluations and saves included."""
    ratios: dict[str, float]
    """Actual over planned, by quantity: memory_bytes, seconds, num_tokens, cost_usd."""
    settings: dict[str, Any]
    """All settings of model, adapter, data and training, by section."""
    num_rows: list[int | None]
    """Rows of each data set, and examples held out: data that has changed since is other data."""


def make_run(
    folder: str,
    *,
    report: ReportFile | None,
    attempts: dict[int, AttemptFile | None],
    settings: SettingsFile | None,
    is_done: bool,
    now: datetime,
) -> Run:
    """Put the records of one run together.

    Args:
        folder: its name in the store.
        attempts: by number; None stands for one that is there and cannot be read.
        settings: as stored beside the report, which holds them too.
        is_done: whether the marker of a finished run is there.
    """
    files = _all_attempts(attempts, report)
    is_current = report is not None and report.is_ours and _speaks_of_last(report, files)
    judged = judge_attempts(files, now)
    outcome, reason = judge(report if is_current else None, judged, is_done=is_done, now=now)
    if report is not None and outcome is Outcome.FINISHED and report.publication:
        outcome = Outcome.PUBLISHED
    if judged and is_current and judged[-1].outcome is Outcome.CRASHED and outcome is not Outcome.NOT_PUBLISHED:
        judged[-1] = judged[-1].model_copy(update={"outcome": outcome})  # its own record says no more than "crashed"
    if report is not None and report.settings and parse_settings(report.settings).is_ours:
        settings = parse_settings(report.settings)
    settings = settings or SettingsFile()
    actual = report.actual if report else None
    times = [attempt.seconds for attempt in judged if attempt.seconds is not None]
    costs = [attempt.cost_usd for attempt in judged]
    starts = [attempt.started for attempt in judged if attempt.started]
    ends = [attempt.ended for attempt in judged if attempt.ended]
    steps = [attempt.last_step for attempt in judged if attempt.last_step is not None]
    return Run(
        run_id=(report.run_id if report else None) or plain(PurePath(folder).name),
        folder=plain(folder),
        outcome=outcome,
        reason=reason,
        started=min(starts, default=None),
        ended=max(ends, default=None),
        seconds=sum(times) if times else actual.seconds if actual else None,
        cost_usd=sum(cost for cost in costs if cost is not None) if costs and None not in costs else None,
        attempts=judged,
        survived=_survived(report, files, judged),
        model=settings.model_id or (report.model.id if report and report.model else None),
        data=_data_names(report, settings),
        device=(report.plan.gpu if report and report.plan else None) or (actual.device if actual else None),
        num_steps=(actual.num_steps if actual and is_current else None) or max(steps, default=None),
        num_tokens=actual.num_tokens if actual else None,
        eval_loss=_eval_loss(report),
        url=report.publication.url if report and report.publication else None,
        tokens_per_second=curve_speed(report.curve, [one.first_step or 0 for one in files.values() if one]) if report else None,
        ratios={
            row.what: row.ratio_to_plan for row in (report.comparison if report else None) or () if row.what and row.ratio_to_plan
        },
        settings={name: section for name, section in settings.model_dump().items() if section},
        num_rows=_num_rows(report),
    )


def _all_attempts(files: dict[int, AttemptFile | None], report: ReportFile | None) -> dict[int, AttemptFile | None]:
    """The attempts' own records; where one is gone or damaged, what the report says of it."""
    told = (report.attempts if report else None) or []
    if len(told) > len(files):
        return dict(enumerate(told, start=1))
    numbers = sorted(files)
    return {number: files[number] or (told[place] if place < len(told) else None) for place, number in enumerate(numbers)}


def _speaks_of_last(report: ReportFile, files: dict[int, AttemptFile | None]) -> bool:
    """Whether the report was written by the last attempt, and not by one before it."""
    if report.attempts:
        return len(report.attempts) >= len(files)
    last = files[max(files)] if files else None
    return last is None or last.stopped is not None


def _survived(report: ReportFile | None, files: dict[int, AttemptFile | None], attempts: Sequence[Attempt]) -> list[str]:
    happenings = list((report.happenings if report else None) or ())
    for file in files.values():
        happenings += (file.notes.happenings if file and file.notes else None) or ()
    texts = [happening.text or "" for happening in happenings]
    found = [name for name, words in SURVIVED if any(words in text for text in texts)]
    earlier = [str(attempt.outcome) for attempt in attempts[:-1] if not attempt.outcome.is_finished]
    return list(dict.fromkeys([*found, *earlier]))


def _data_names(report: ReportFile | None, settings: SettingsFile) -> list[str]:
    sources = (report.data.sources if report and report.data else None) or ()
    return [source.source for source in sources if source.source and not source.held_out] or settings.data_names


def _num_rows(report: ReportFile | None) -> list[int | None]:
    data = report.data if report else None
    return [*(source.num_rows for source in data.sources or ()), data.num_eval] if data else []


def _eval_loss(report: ReportFile | None) -> float | None:
    if report is None:
        return None
    if report.chosen is not None and report.chosen.eval_loss is not None:
        return report.chosen.eval_loss
    losses = [row.eval_loss for row in report.evaluations or () if row.eval_loss is not None]
    return losses[-1] if losses else None
