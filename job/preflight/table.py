"""The results of all checks in, one table out."""

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from job.errors import JobError
from job.preflight.outcome import Result

MOST_CHARACTERS = 400
"""Of a cell: some messages list all that there is. The error that the command ends with is shown whole below the table."""


def results_table(results: Sequence[Result], redact: Callable[[str], str]) -> Table:
    """A line for each check: its name, what was found, and what to do."""
    table = Table("check")
    table.add_column("result", overflow="fold", ratio=1)
    table.add_column("what to do", overflow="fold", ratio=1)
    for result in results:
        if result.error is not None:
            found, way_out = _halves(result.error)
            table.add_row(result.name, Text(_short(redact(f"failed: {found}")), style="red"), Text(_short(redact(way_out))))
        elif result.is_warning:
            table.add_row(result.name, Text(_short(redact(result.found)), style="yellow"), "")
        else:
            table.add_row(result.name, Text(_short(redact(f"fine: {result.found}"))), "")
    return table


def _halves(error: JobError) -> tuple[str, str]:
    """What is wrong, and the way out, which comes last in each of our messages."""
    lines = [line.partition("; ") for line in str(error).splitlines()]
    return "\n".join(wrong for wrong, _, _ in lines), "\n".join(way_out for _, _, way_out in lines)


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
