"""A report in, what its page says in words out: the outcome, the key figures, plan beside actual, and what happened when.

What is not handled here: the settings (`settings_table.py`), the curves (`charts.py`) and how it all looks (`report.html.jinja`).
"""

from dataclasses import dataclass
from datetime import datetime

from job.deliver.page.wording import (
    UNKNOWN,
    aware,
    count,
    dollars,
    duration,
    is_known,
    loss,
    perplexity,
    quantity,
    short_count,
    size,
    spelled,
)
from job.deliver.report import Report
from job.events import Stopped
from job.plan import show

_OUTCOMES = {
    Stopped.FINISHED: ("good", "Finished", "The training ran to its end."),
    Stopped.BUDGET: ("warn", "Stopped by the budget", "A checkpoint is kept: raise the budget and start it again to go on."),
    Stopped.PREEMPTED: ("warn", "Interrupted", "The job was told to stop. A restart continues from the last checkpoint."),
    Stopped.OUT_OF_MEMORY: ("bad", "Out of memory", "No layout of a step was left that would fit."),
    Stopped.DIVERGED: ("bad", "Diverged", "The loss grew beyond repair, and rolling back did not help."),
    Stopped.CRASHED: ("bad", "Failed", "The run ended before its time."),
}
_QUANTITIES = {"memory_bytes": "peak memory", "seconds": "time", "num_tokens": "tokens", "cost_usd": "cost"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the run ended."""

    tone: str
    """good, warn or bad."""
    title: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One key figure."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One line of the timeline."""

    at: datetime
    tone: str
    """start, good, warn, bad or note."""
    text: str
    step: int | None = None
    after: str = ""
    """Time since the first start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One quantity as it was planned, foretold by the first steps, and as it came."""

    name: str
    planned: str
    reforecast: str
    actual: str
    to_plan: str
    to_reforecast: str
    is_far_off: bool


def outcome(report: Report) -> Outcome:
    tone, title, text = _OUTCOMES[report.stopped]
    if report.stopped is Stopped.FINISHED and report.exit_status:
        tone, title = "warn", "Finished, with something left to do"
        if report.exit_status == 6:
            title, text = "Finished, not published", "The adapter is safe in the store; `publish` tries again."
    return Outcome(tone=tone, title=title, text=text)


def tiles(report: Report) -> list[Tile]:
    """The figures that a reader looks for first."""
    actual = report.actual
    num_attempts = len(report.attempts)
    planned_steps = report.plan.num_steps if report.plan else None
    price = actual.cost_usd
    shown = [
        Tile(name="time", value=duration(actual.seconds), detail=f"in {num_attempts} attempt{'' if num_attempts == 1 else 's'}"),
        Tile(
            name="cost",
            value=UNKNOWN if price == "unknown" else dollars(price),
            detail="set GPU_HOURLY_RATE" if price == "unknown" else _rates(report),
        ),
        Tile(name="steps", value=count(actual.num_steps), detail=f"of {count(planned_steps)} planned" if planned_steps else ""),
        Tile(name="tokens", value=short_count(actual.num_tokens), detail=_pace(report)),
        *_losses(report),
        Tile(
            name="peak memory",
            value=size(actual.peak_memory_bytes),
            detail=f"of {size(report.plan.memory_bytes)}" if report.plan and report.plan.memory_bytes else "",
        ),
        Tile(name="device", value=actual.device or UNKNOWN),
    ]
    if is_known(actual.energy_kwh):
        shown.append(Tile(name="energy", value=f"{actual.energy_kwh:.3g} kWh", detail="of the GPUs alone"))
    return shown


def _rates(report: Report) -> str:
    prices = sorted({one.price_usd_per_hour for one in report.attempts if one.price_usd_per_hour is not None})
    return "at " + " and ".join(f"${price:,.2f}" for price in prices) + " an hour" if 0 < len(prices) < 3 else ""


def _pace(report: Report) -> str:
    again = report.reforecast
    if again is None or not is_known(again.seconds_per_token) or again.seconds_per_token <= 0:
        return ""
    return f"{short_count(1 / again.seconds_per_token)} a second at first"


def _losses(report: Report) -> list[Tile]:
    """Before and after, of the chosen checkpoint, else of the last measurement."""
    if not report.evaluations:
        return [Tile(name="held-out loss", value="not measured")]
    first, last = report.evaluations[0], report.evaluations[-1]
    after = last.get("eval_loss")
    if report.chosen is not None and report.chosen.eval_loss is not None:
        after = report.chosen.eval_loss
    before = first.get("eval_loss") if first.get("step") == 0 else None
    shown = loss(after) if before is None else f"{loss(before)} → {loss(after)}"
    known = {one.step: one.perplexity for one in report.candidates}
    base, chosen = known.get(0), report.chosen.perplexity if report.chosen else None
    detail = f"perplexity {perplexity(base)} → {perplexity(chosen)}" if base is not None and chosen is not None else ""
    return [Tile(name="held-out loss", value=shown, detail=detail)]


def comparison(report: Report) -> list[Row]:
    """Rows of which anything is known."""
    rows = []
    for one in report.comparison:
        if one.actual is None and one.planned_low is None and one.reforecast is None:
            continue
        low, high = quantity(one.what, one.planned_low), quantity(one.what, one.planned_high)
        ratio = one.ratio_to_reforecast if one.ratio_to_reforecast is not None else one.ratio_to_plan
        rows.append(
            Row(
                name=_QUANTITIES.get(one.what, spelled(one.what)),
                planned="not known" if one.planned_low is None else low if low == high else f"{low} to {high}",
                reforecast="not known" if one.reforecast is None else quantity(one.what, one.reforecast),
                actual="not known" if one.actual is None else quantity(one.what, one.actual),
                to_plan=_times(one.ratio_to_plan),
                to_reforecast=_times(one.ratio_to_reforecast),
                is_far_off=is_known(ratio) and ratio is not None and not 0.75 <= ratio <= 1.25,
            )
        )
    return rows


def memory_parts(report: Report) -> str:
    """What the planned peak is made of; empty when it was not planned."""
    if report.plan is None or report.plan.memory is None:
        return ""
    parts = show.memory_parts(report.plan.memory)
    return ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts if num_bytes)


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f} ×" if ratio is not None and is_known(ratio) else "–"


def timeline(report: Report) -> list[Moment]:
    """Starts and ends of attempts and what happened between them, in order of time."""
    moments = []
    for number, attempt in enumerate(report.attempts, start=1):
        if attempt.is_unreadable:
            text = f"attempt {number}: its record cannot be read; its time and cost are not known"
            moments.append(Moment(at=aware(attempt.started), tone="warn", text=text))
            continue
        begun = f"attempt {number} starts on {attempt.machine}"
        if attempt.first_step:
            begun += f" and continues from step {attempt.first_step:,}"
        moments.append(Moment(at=aware(attempt.started), tone="start", text=begun, step=attempt.first_step))
        ended = max(aware(attempt.ended), aware(attempt.started))
        took = duration((ended - aware(attempt.started)).total_seconds())
        reason = attempt.stopped
        tone = "note" if reason is None else _OUTCOMES[reason][0]
        said = "last sign of life" if reason is None else _ENDS[reason]
        moments.append(Moment(at=ended, tone=tone, text=f"attempt {number}: {said} after {took}", step=attempt.last_step))
    for happening in report.happenings:
        moments.append(Moment(at=aware(happening.at), tone="note", text=happening.text, step=happening.step))
    order = {"start": 0, "note": 1}
    moments.sort(key=lambda one: (one.at, order.get(one.tone, 2)))
    first = moments[0].at if moments else None
    return [Moment(at=one.at, tone=one.tone, text=one.text, step=one.step, after=_since(first, one.at)) for one in moments]


_ENDS = {
    Stopped.FINISHED: "finished",
    Stopped.BUDGET: "stopped by the budget",
    Stopped.PREEMPTED: "interrupted",
    Stopped.OUT_OF_MEMORY: "out of memory",
    Stopped.DIVERGED: "diverged",
    Stopped.CRASHED: "ended without a word",
}


def _since(first: datetime | None, at: datetime) -> str:
    seconds = 0.0 if first is None else (at - first).total_seconds()
    return f"+{duration(seconds)}" if seconds else ""
