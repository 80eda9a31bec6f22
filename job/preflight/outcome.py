"""Checks in, their results out: all at the same time, and whose fault comes first."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from job.errors import JobError, NetworkError, Problem, SettingsError
from job.events import Need

WARNING = "warning: "
"""How a check's text begins when the run may go on and somebody should know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a check found, and the room that the run will take by it."""

    text: str
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the table: a check passed when there is no error."""

    name: str
    found: str = ""
    """A few words; begin with `warning: ` when somebody should know."""
    error: JobError | None = None
    needs: tuple[Need, ...] = ()

    @property
    def is_warning(self) -> bool:
        return self.error is None and self.found.startswith(WARNING)


Check = Callable[[], "str | Found"]


def judge(name: str, check: Check) -> Result:
    """Do a check; a JobError becomes its result, anything else is a bug and passes."""
    try:
        found = check()
    except JobError as error:
        return Result(name=name, error=error)
    return Result(name=name, found=found) if isinstance(found, str) else Result(name=name, found=found.text, needs=found.needs)


def start(checks: Mapping[str, Check]) -> Callable[[float | None], list[Result]]:
    """Begin each check in a thread of its own; the function returned waits for so many seconds and gives the results in order.

    The threads are daemons: one that hangs outlives neither a signal nor the process.
    """
    answers: queue.Queue[tuple[str, Result | BaseException]] = queue.Queue()

    def work(name: str, check: Check) -> None:
        try:
            answers.put((name, judge(name, check)))
        except BaseException as bug:  # raised where the results are asked for
            answers.put((name, bug))

    for name, check in checks.items():
        threading.Thread(target=work, args=(name, check), daemon=True).start()
    begun = time.monotonic()

    def collect(patience_seconds: float | None = None) -> list[Result]:
        results: dict[str, Result] = {}
        while len(results) < len(checks):
            left = None if patience_seconds is None else max(begun + patience_seconds - time.monotonic(), 0.0)
            try:
                name, answer = answers.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(answer, BaseException):
                raise answer
            results[name] = answer
        late = NetworkError(f"no answer within {patience_seconds or 0:g} seconds; start again when the network is well")
        return [results.get(name) or Result(name=name, error=late) for name in checks]

    return collect


def first_error(errors: Sequence[JobError]) -> JobError | None:
    """The error to exit with: all settings' problems together, else data, plan, machine, and the network last."""
    settings = [error for error in errors if isinstance(error, SettingsError)]
    if settings:
        problems: list[Problem | str] = [problem for error in settings for problem in error.problems]
        return SettingsError(list({str(problem): problem for problem in problems}.values()))
    return min(errors, key=lambda error: error.exit_status, default=None)  # the order of blame is that of the statuses


def raise_first(results: Sequence[Result]) -> None:
    """Raise what the results amount to, if any of them is an error."""
    error = first_error([result.error for result in results if result.error is not None])
    if error is not None:
        raise error


def summary(results: Sequence[Result]) -> list[str]:
    """What a run says of the checks: warnings, failures beside the one that it ends with, one line when all is fine."""
    first = first_error([result.error for result in results if result.error is not None])
    lines = [f"{result.found.removeprefix(WARNING)}" for result in results if result.is_warning]
    lines = [f"{WARNING}{line}" for line in lines]
    if first is None:
        return [*lines, f"all {len(results)} checks passed: {', '.join(result.name for result in results)}"]
    told = first.problems if isinstance(first, SettingsError) else (first,)
    failed = [result for result in results if result.error is not None]
    is_told = {id(item) for item in told}
    others = [
        result
        for result in failed
        if not (isinstance(result.error, SettingsError) and isinstance(first, SettingsError)) and id(result.error) not in is_told
    ]
    return [*lines, *(f"{result.name}: {result.error}" for result in others)]
