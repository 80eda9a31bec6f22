"""What was planned, what the first steps foretold and what happened, side by side: a plan in, one row a quantity out."""

from pydantic import BaseModel, ConfigDict

from job.plan.forecast import Plan
from job.plan.progress import Reforecast

GIB = 2**30


class Comparison(BaseModel):
    """One quantity; what is not known is None."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    what: str
    """memory_bytes, seconds, num_tokens or cost_usd."""
    planned_low: float | None
    planned_high: float | None
    reforecast: float | None
    actual: float | None
    ratio_to_plan: float | None
    """Actual over the middle of what was planned."""
    ratio_to_reforecast: float | None


def compare(
    plan: Plan | None,
    reforecast: Reforecast | None,
    *,
    seconds: float,
    num_tokens: int,
    peak_memory_bytes: int | None,
    cost_usd: float | None,
) -> list[Comparison]:
    """Rows for memory, time, tokens and cost, in this order; empty without a plan."""
    if plan is None:
        return []
    memory = plan.memory
    again = reforecast
    return [
        _row(
            "memory_bytes",
            memory.peak_bytes if memory else None,
            memory.safe_peak_bytes if memory else None,
            again.memory_bytes if again else None,
            peak_memory_bytes,
            expected=memory.peak_bytes if memory else None,
        ),
        _row("seconds", plan.seconds_low, plan.seconds_high, again.seconds if again else None, seconds),
        _row("num_tokens", plan.num_tokens, plan.num_tokens, again.num_tokens if again else None, num_tokens),
        _row("cost_usd", plan.cost_usd_low, plan.cost_usd_high, again.cost_usd if again else None, cost_usd),
    ]


def comparison_lines(rows: list[Comparison]) -> list[str]:
    """For the screen; quantities of which there is nothing to compare are left out."""
    lines = []
    for row in rows:
        if row.actual is None or (row.planned_low is None and row.reforecast is None):
            continue
        name, scale, unit, digits = _UNITS[row.what]
        planned = "not known"
        if row.planned_low is not None and row.planned_high is not None:
            low, high = f"{row.planned_low / scale:,.{digits}f}", f"{row.planned_high / scale:,.{digits}f}"
            planned = low if low == high else f"{low} to {high}"
        again = "" if row.reforecast is None else f", {row.reforecast / scale:,.{digits}f} from the first steps"
        ratio = row.ratio_to_reforecast if row.ratio_to_reforecast is not None else row.ratio_to_plan
        told = "" if ratio is None else f" ({ratio:.2f} x)"
        lines.append(f"{name:<7} {planned} planned{again}, {row.actual / scale:,.{digits}f} {unit}{told}")
    return lines


_UNITS = {
    "memory_bytes": ("memory", GIB, "GiB in fact", 2),
    "seconds": ("time", 60.0, "minutes in fact", 1),
    "num_tokens": ("tokens", 1.0, "in fact", 0),
    "cost_usd": ("cost", 1.0, "US dollars in fact", 2),
}


def _row(
    what: str,
    low: float | None,
    high: float | None,
    reforecast: float | None,
    actual: float | None,
    *,
    expected: float | None = None,
) -> Comparison:
    if expected is None and low is not None and high is not None:
        expected = (low + high) / 2
    return Comparison(
        what=what,
        planned_low=low,
        planned_high=high,
        reforecast=reforecast,
        actual=actual,
        ratio_to_plan=_ratio(actual, expected),
        ratio_to_reforecast=_ratio(actual, reforecast),
    )


def _ratio(actual: float | None, other: float | None) -> float | None:
    return None if actual is None or not other else round(actual / other, 4)
