"""A history in, one page of HTML out that asks for nothing else: no scripts, no requests, light and dark.

All that a record, a model or a user wrote is escaped.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from job.deliver.history import words
from job.deliver.history.figures import WORST_FAILURES, Figures
from job.deliver.history.outcomes import Outcome
from job.errors import Problem, SettingsError

if TYPE_CHECKING:
    from job.deliver.history.read import History

MOST_REASONS, MOST_COMPARED, MOST_GROUPS = 8, 8, 30
MOST_LABELS = 13
"""Columns of the trend that get a date and a number; more would run into each other."""
TONES = ("good", "wait", "bad", "unknown", "live")


def write_page(history: "History", path: Path) -> None:
    """Write the page under a temporary name, then rename it.

    Raises:
        SettingsError: it cannot be written there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(render_page(history), "utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        rule, way_out = f"cannot be written ({error.strerror or error})", "name a file in a folder that exists"
        raise SettingsError([Problem(setting="--html", value=str(path), rule=rule, way_out=way_out)]) from error


def render_page(history: "History") -> str:
    """The page as text."""
    figures = history.figures
    return _template().render(
        history=history,
        figures=figures,
        words=words,
        tiles=_tiles(figures),
        mix=_mix(figures),
        columns=_columns(figures),
        worst=WORST_FAILURES,
        most_reasons=MOST_REASONS,
        most_compared=MOST_COMPARED,
        most_groups=MOST_GROUPS,
        web_address=web_address,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("job.deliver.history", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        day=words.day,
        hours=words.hours,
        loss=words.loss,
        share=_share,
        usd=words.usd,
        model=words.short_model,
        data=words.short_data,
    )
    return environment.get_template("history.html.jinja")


def web_address(url: str | None) -> str | None:
    """An address that may be linked: a record could name a script."""
    return url if url and url.startswith("https://") else None


def _tiles(figures: Figures) -> list[tuple[str, str, str, str]]:
    """(tone, name, value, detail) of the key figures."""
    lost = words.ending_cost(figures.endings)
    tiles = [("none", "runs", f"{figures.num_runs:,}", f"{words.plural(figures.num_attempts, 'attempt')}")]
    if figures.finished_share is not None and figures.failed_share is not None:
        is_fine = figures.failed_share < WORST_FAILURES
        tiles += [
            ("good", "finished", _share(figures.finished_share), f"{figures.num_finished:,} of {figures.num_ended:,} that ended"),
            (
                "good" if is_fine else "bad",
                "failed",
                _share(figures.failed_share),
                f"{figures.num_failed:,} runs; aim for less than {WORST_FAILURES:.0%}",
            ),
            (
                "wait" if figures.num_resumable else "none",
                "can be continued",
                f"{figures.num_resumable:,}",
                "nothing of them is lost",
            ),
        ]
    if figures.num_running:
        tiles.append(("live", "running", f"{figures.num_running:,}", "now"))
    spent = words.usd(figures.cost_usd) if figures.num_unpriced < figures.num_attempts else "unknown"
    tiles.append(("none", "spent", spent, _spent_detail(figures)))
    if figures.endings:
        tiles.append(("none", "spent without a result", f"{words.hours(sum(one.hours for one in figures.endings))} h", lost))
    return tiles


def _spent_detail(figures: Figures) -> str:
    detail = f"{words.hours(figures.hours)} hours"
    if 0 < figures.num_unpriced < figures.num_attempts:
        detail += f", and {words.plural(figures.num_unpriced, 'attempt')} of unknown cost"
    return detail


def _mix(figures: Figures) -> list[tuple[str, str, int, float]]:
    """(tone, word, runs, percent) of each outcome, the good ones first."""
    ordered = sorted(figures.outcomes.items(), key=lambda item: (TONES.index(words.tone(item[0])), -item[1]))
    return [
        (words.tone(outcome), words.WORDS[Outcome(outcome)], number, 100 * number / figures.num_runs)
        for outcome, number in ordered
    ]


def _columns(figures: Figures) -> list[dict[str, object]]:
    """The trend, as percents that add up to 100; of many columns only some are named, on a narrow screen half of those."""
    every = -(-len(figures.trend) // MOST_LABELS)
    is_monthly = all(period.begin.day == 1 for period in figures.trend)
    last = len(figures.trend) - 1
    return [
        {
            "label": (f"{period.begin:%b %Y}" if is_monthly else f"{period.begin:%d %b}") if (last - index) % every == 0 else "",
            "is_minor": (last - index) // every % 2 == 1,
            "good": 100 * period.num_finished / period.num_ended,
            "wait": 100 * (period.num_ended - period.num_finished - period.num_failed) / period.num_ended,
            "bad": 100 * period.num_failed / period.num_ended,
            "period": period,
        }
        for index, period in enumerate(figures.trend)
    ]


def _share(value: float) -> str:
    return f"{value:.0%}"
