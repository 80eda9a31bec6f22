"""Figures in, the words that people read out; for the screen and for the page alike."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath

from job.deliver.history.figures import WORST_FAILURES, Ending, Figures
from job.deliver.history.groups import Compared, Difference, Forecast
from job.deliver.history.outcomes import Outcome
from job.deliver.history.runs import Run

WORDS = {
    Outcome.PUBLISHED: "published",
    Outcome.FINISHED: "finished",
    Outcome.NOT_PUBLISHED: "not published (6)",
    Outcome.BUDGET: "budget (8)",
    Outcome.PREEMPTED: "preempted (75)",
    Outcome.NETWORK: "network (75)",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.DIVERGED: "diverged (7)",
    Outcome.DATA: "data (3)",
    Outcome.SETTINGS: "settings (2)",
    Outcome.NO_FIT: "does not fit (4)",
    Outcome.MACHINE: "machine (5)",
    Outcome.CRASHED: "crashed (1)",
    Outcome.VANISHED: "vanished",
    Outcome.UNREADABLE: "unreadable",
    Outcome.RUNNING: "running",
}
"""With the exit status, where one belongs to it."""
_SURVIVED = {
    "out_of_memory": "ran out of memory",
    "diverged": "diverged",
    "hung": "hung",
    "preempted": "had a machine taken away",
    "vanished": "lost a machine without a word",
    "budget": "reached a budget that was raised",
    "crashed": "crashed",
    "unreadable": "had an attempt of which nothing is known",
}
_FORECASTS = {"memory_bytes": "memory", "seconds": "time", "cost_usd": "cost"}
MOST_NAMES = 3


def tone(outcome: Outcome) -> str:
    """good, wait, bad, live or unknown."""
    if outcome.is_finished:
        return "good"
    if outcome.is_resumable:
        return "wait"
    return {Outcome.RUNNING: "live", Outcome.UNREADABLE: "unknown"}.get(outcome, "bad")


def headline(figures: Figures) -> list[str]:
    """How it went, in a few sentences."""
    lines = []
    if figures.finished_share is not None and figures.failed_share is not None:
        parts = [f"{figures.num_finished:,} finished ({figures.finished_share:.0%})"]
        if figures.num_resumable:
            parts.append(f"{figures.num_resumable:,} can be continued ({figures.num_resumable / figures.num_ended:.0%})")
        parts.append(f"{figures.num_failed:,} failed ({figures.failed_share:.0%}; aim for less than {WORST_FAILURES:.0%})")
        lines.append(f"{plural(figures.num_ended, 'run')} ended: {', '.join(parts)}")
    if more := [
        text
        for number, text in (
            (figures.num_running, f"{plural(figures.num_running, 'run')} still going on"),
            (figures.num_unreadable, f"{plural(figures.num_unreadable, 'run')} without a readable end"),
        )
        if number
    ]:
        lines.append(f"not counted in that: {', '.join(more)}")
    if figures.attempts_finished_share is not None:
        lines.append(
            f"{plural(figures.num_attempts_ended, 'attempt')} ended: {figures.num_attempts_finished:,} finished "
            f"({figures.attempts_finished_share:.0%})"
        )
    text = f"spent: {hours(figures.hours)} hours, {dollars(figures.cost_usd, figures.num_unpriced, figures.num_attempts)}"
    if figures.endings:
        lost = f"{hours(sum(ending.hours for ending in figures.endings))} hours, {ending_cost(figures.endings)}"
        text += f"; of that, on runs that did not finish and attempts that failed: {lost}"
    lines.append(text)
    return lines


def survived_lines(figures: Figures) -> list[str]:
    """What finished runs went on from."""
    return [
        f"{plural(number, 'run')} {_SURVIVED.get(what, f'ended an attempt as {what}')} and finished all the same"
        for what, number in figures.survived.items()
    ]


def unread_line(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return f"{plural(len(names), 'record')} could not be read, or not all of it: {', '.join(names[:MOST_NAMES])}{more}"


def forecast_line(forecast: Forecast) -> str:
    name = _FORECASTS.get(forecast.what, forecast.what)
    span = "" if forecast.num_runs == 1 else f", {forecast.lowest:.2f} to {forecast.highest:.2f}"
    return f"{name}: {forecast.median:.2f} x what was planned (median of {plural(forecast.num_runs, 'run')}{span})"


def difference_line(difference: Difference) -> str:
    """Facts only: the lowest loss that went with each value."""
    told = [f"{value.value}: {value.lowest_loss:.3f} ({plural(value.num_runs, 'run')})" for value in difference.values[:6]]
    more = f"; {len(difference.values) - 6} more values" if len(difference.values) > 6 else ""
    return f"{difference.setting} {'; '.join(told)}{more}"


def compared_settings(run: Compared) -> str:
    """As they could be set again."""
    told = " ".join(f"{name}={value}" for name, value in run.settings.items() if value != "not set")
    return f"{told or 'no difference'} (diverged on the way)" if run.has_diverged else told or "no difference"


def ending_cost(endings: Sequence[Ending]) -> str:
    attempts, unpriced = sum(ending.num_attempts for ending in endings), sum(ending.num_unpriced for ending in endings)
    return dollars(sum(ending.cost_usd for ending in endings), unpriced, attempts)


def dollars(known: float, num_unpriced: int, num_attempts: int) -> str:
    """A sum of which some parts may not be known: unknown is never 0."""
    if num_unpriced >= num_attempts:
        return "cost not known"
    if num_unpriced == 0:
        return usd(known)
    return f"{usd(known)} and {plural(num_unpriced, 'attempt')} of unknown cost"


def usd(value: float | None) -> str:
    return "?" if value is None else f"${value:,.2f}"


def hours(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def run_hours(run: Run) -> str:
    return hours(None if run.seconds is None else run.seconds / 3600)


def loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def day(value: datetime | None) -> str:
    return "" if value is None else f"{value:%Y-%m-%d}"


def short_model(model: str | None) -> str:
    return PurePath(model).name if model else "?"


def short_data(names: Sequence[str]) -> str:
    """The first data set without its folder and address, and how many more."""
    if not names:
        return "?"
    first = PurePath(names[0].partition("?")[0]).name or names[0]
    return first if len(names) == 1 else f"{first} +{len(names) - 1}"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def cut_front(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
