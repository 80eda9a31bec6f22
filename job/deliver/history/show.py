"""A history in, tables on a console out; what matters most comes last, where a terminal stops."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from job.deliver.history import words
from job.deliver.history.figures import Ending, Figures
from job.deliver.history.groups import BestRun, Speed
from job.deliver.history.runs import Run

if TYPE_CHECKING:
    from job.deliver.history.read import History

MOST_RUNS, MOST_REASONS, MOST_GROUPS, MOST_COMPARED, MOST_SPEEDS = 40, 3, 5, 5, 20
MOST_CHARACTERS = 200
"""Of a reason: the JSON and the page have it whole."""
_STYLES = {"good": "green", "wait": "yellow", "bad": "red", "live": "cyan", "unknown": "dim"}


def show_history(history: "History", console: Console) -> None:
    """Print the newest runs, why others failed, what was learned, and the sum of it."""
    if not history.runs:
        _say(console, f"no runs in {history.uri}")
        _show_unread(history, console)
        return
    figures = history.figures
    _print(console, runs_table(history.runs[:MOST_RUNS]))
    if len(history.runs) > MOST_RUNS:
        _say(console, f"and {len(history.runs) - MOST_RUNS:,} older ones: --html FILE and --json show all", "dim")
    if figures.endings:
        _title(console, "what ended the others")
        _print(console, endings_table(figures.endings))
    for group in figures.best[:MOST_GROUPS]:
        _show_best(group, console)
    if len(figures.best) > MOST_GROUPS:
        _say(console, f"{len(figures.best) - MOST_GROUPS:,} more models and data sets with runs to compare: --html FILE", "dim")
    if figures.speeds:
        _title(console, "pace")
        _print(console, speeds_table(figures.speeds[:MOST_SPEEDS]))
    _show_sum(history, figures, console)


def runs_table(runs: Sequence[Run]) -> Table:
    """One row a run."""
    table = _table(
        ("run", False), ("began", False), ("model", False), ("data", False), ("steps", True), ("loss", True), ("tries", True),
        ("hours", True), ("cost", True), ("outcome", False),
    )  # fmt: skip
    for run in runs:
        table.add_row(
            Text(words.cut_front(run.folder, 32)),
            words.day(run.started),
            Text(words.cut(words.short_model(run.model), 22)),
            Text(words.cut(words.short_data(run.data), 18)),
            "" if run.num_steps is None else f"{run.num_steps:,}",
            words.loss(run.eval_loss),
            str(len(run.attempts)),
            words.run_hours(run),
            words.usd(run.cost_usd),
            Text(words.WORDS[run.outcome], style=_STYLES[words.tone(run.outcome)]),
        )
    return table


def endings_table(endings: Sequence[Ending]) -> Table:
    """One row a way not to finish, with its most frequent reasons and what to do."""
    table = _table(("", False), ("runs", True), ("tries", True), ("hours", True), ("cost", True), wide="reasons, and what to do")
    for ending in endings:
        text = Text()
        for reason in ending.reasons[:MOST_REASONS]:
            text.append(f"{reason.num_runs} x " if ending.num_runs > 1 else "", "bold")
            text.append(f"{words.cut(reason.example, MOST_CHARACTERS)}\n")
        if len(ending.reasons) > MOST_REASONS:
            text.append(f"{len(ending.reasons) - MOST_REASONS} more reasons\n", "dim")
        text.append(f"→ {ending.advice}", "italic")
        table.add_row(
            Text(words.WORDS[ending.outcome], style=_STYLES[words.tone(ending.outcome)]),
            str(ending.num_runs),
            str(ending.num_attempts),
            words.hours(ending.hours),
            words.ending_cost([ending]).replace(" and ", "\nand ").replace(" of unknown", "\nof unknown"),
            text,
        )
    return table


def speeds_table(speeds: Sequence[Speed]) -> Table:
    """One row a GPU and model."""
    table = _table(("GPU", False), ("model", False), ("tokens/s", True), ("from", True), ("to", True), ("runs", True))
    for speed in speeds:
        numbers = (f"{value:,.0f}" for value in (speed.median, speed.lowest, speed.highest))
        table.add_row(Text(speed.gpu), Text(words.short_model(speed.model)), *numbers, str(speed.num_runs))
    return table


def _show_best(group: BestRun, console: Console) -> None:
    _title(
        console,
        f"{words.short_model(group.model)} on {words.short_data(group.data)}: {len(group.runs)} finished runs with the same "
        "held-out data",
    )
    table = _table(("run", False), ("loss", True), ("hours", True), ("cost", True), wide="settings in which they differ")
    for place, run in enumerate(group.runs[:MOST_COMPARED]):
        table.add_row(
            Text(words.cut_front(run.run_id, 32)),
            words.loss(run.eval_loss),
            words.hours(None if run.seconds is None else run.seconds / 3600),
            words.usd(run.cost_usd),
            Text(words.compared_settings(run)),
            style="bold green" if place == 0 else None,
        )
    _print(console, table)
    for difference in group.differences:
        _say(console, f"lowest loss with {words.difference_line(difference)}")


def _show_sum(history: "History", figures: Figures, console: Console) -> None:
    if figures.forecasts:
        _title(console, "forecasts")
        for forecast in figures.forecasts:
            _say(console, words.forecast_line(forecast))
    _title(console, history.uri)
    for line in words.survived_lines(figures):
        _say(console, line, "green")
    _show_unread(history, console)
    for number, line in enumerate(words.headline(figures)):
        _say(console, line, "" if number else "bold")


def _show_unread(history: "History", console: Console) -> None:
    if history.unread:
        names = [f"{unread.name} ({unread.why})" for unread in history.unread]
        _say(console, words.unread_line([words.cut(name, MOST_CHARACTERS) for name in names]), "yellow")


def _table(*columns: tuple[str, bool], wide: str | None = None) -> Table:
    """A table of narrow columns, and one at the end that takes the rest."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, is_number in columns:
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    if wide:
        table.add_column(wide, overflow="fold")
    return table


def _title(console: Console, text: str) -> None:
    _say(console, "")
    _say(console, text, "bold underline")


def _say(console: Console, text: str, style: str = "") -> None:
    """A line; where there is no terminal it is not broken, for a search through a log."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def _print(console: Console, table: RenderableType) -> None:
    console.print(table, soft_wrap=False)
