"""A report in, the points of its curves out: only finite numbers, in order.

What is not handled here: how they look (`charts.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any, TypeGuard

from job.deliver.page.wording import aware
from job.deliver.report import Report
from job.keep.ledger import cost_usd

Point = tuple[float, float]
LARGEST = 3.4e38
"""float32's; what lies beyond is no measurement, and breaks the arithmetic of an axis."""
SMOOTHED_FROM = 40
"""Points; fewer show their course by themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """What a run had cost by when."""

    points: list[Point]
    """(hours since the first start, sum so far): two an attempt, its start and its end."""
    attempts: list[Point]
    """(start, end) in the same hours."""
    is_usd: bool
    """Else hours, because a price is not known."""
    limit: float | None
    """MAX_COST_USD, or MAX_HOURS where hours are summed."""


def curve(rows: Sequence[dict[str, float | None]] | Sequence[dict[str, float]], name: str) -> list[Point]:
    """(step, value) of every row that has one."""
    points = []
    for row in rows:
        if is_drawable(step := row.get("step")) and is_drawable(value := row.get(name)):
            points.append((step, value))
    return sorted(points)


def is_drawable(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < LARGEST  # neither is NaN


def smoothed(points: list[Point]) -> list[Point]:
    """Medians of a window around each point, then their means: one outlier leaves no bump."""
    reach = max(2, len(points) // 60)
    values = [value for _, value in points]
    medians = [median(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]
    means = []
    for at in range(len(medians)):
        window = medians[max(0, at - reach) : at + reach + 1]
        means.append(math.fsum(window) / len(window))
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def restarts(report: Report) -> list[int]:
    """Steps from which a later attempt continued."""
    return sorted({attempt.first_step for attempt in report.attempts[1:] if attempt.first_step})


def speeds(report: Report) -> list[Point]:
    """(step, tokens a second) between logged steps of one attempt; the step before a restart is no begin."""
    borders = restarts(report)
    rows = [
        (step, num_tokens, seconds)
        for row in report.curve
        if is_drawable(step := row.get("step"))
        if is_drawable(num_tokens := row.get("num_tokens")) and is_drawable(seconds := row.get("seconds"))
    ]
    points = []
    for before, after in pairwise(rows):
        num_tokens, took = after[1] - before[1], after[2] - before[2]
        is_restart = took <= 0 or any(before[0] <= border < after[0] for border in borders)
        if not is_restart and num_tokens > 0 and is_drawable(speed := num_tokens / took):
            points.append((after[0], speed))
    return sorted(points)


def spending(report: Report) -> Spending | None:
    """What the attempts cost over the wall clock, or how long they took; None when no time has passed."""
    attempts = sorted((one for one in report.attempts if not one.is_unreadable), key=lambda one: aware(one.started))
    if not attempts:
        return None
    begin = aware(attempts[0].started)
    is_usd = cost_usd(report.attempts) is not None
    sum_so_far, end_before = 0.0, 0.0
    points, bands = [], []
    for attempt in attempts:
        took = max(_hours(aware(attempt.started), aware(attempt.ended)), 0.0)  # a clock may be set back
        start = max(_hours(begin, aware(attempt.started)), end_before)
        bands.append((start, start + took))
        points.append((start, sum_so_far))
        sum_so_far += took * (attempt.price_usd_per_hour or 0.0) if is_usd else took
        points.append((start + took, sum_so_far))
        end_before = start + took
    if end_before <= 0 or not all(is_drawable(value) for _, value in points):
        return None
    limit = setting(report, "budget", "max_cost_usd" if is_usd else "max_hours")
    return Spending(points=points, attempts=bands, is_usd=is_usd, limit=limit)


def setting(report: Report, section: str, name: str) -> float | None:
    """A number among the settings; None when it is not set, or not known to the version that wrote the report."""
    values: Any = report.settings.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not is_drawable(value):
        return None
    return float(value)


def _hours(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds() / 3600
