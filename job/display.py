"""What a person sees while the job runs: a live line at a terminal, else one plain line a stage and a JSON line a step.

Long work is never silent for more than 15 seconds.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from job.events import Answered, Evaluated, Event, Loaded, Saved, Stepped, Warned
from job.events import Progress as Doing

QUIET_SECONDS = 15.0
MAX_EXPONENT = 100.0
"""e to the power of more is told to nobody."""
LOG_WIDTH = 130
"""Columns of a table where there is no terminal that would say its width."""


class Display:
    """Shows events on standard error; standard output stays free for results."""

    def __init__(self, *, usd_per_hour: float | None, redact: Callable[[str], str]) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = sys.stderr.isatty()
        self._usd_per_hour, self.redact = usd_per_hour, redact
        self._usd_before = 0.0
        self._expected, self._seconds_left = "", None  # type: tuple[str, float | None]
        self._limit_usd: float | None = None
        self._doing, self._doing_since = "starting", time.monotonic()
        self._last_shown = self._started = time.monotonic()
        self._tokens_before: tuple[int, float] | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, note="")

    def count_from(self, usd_before: float, limit_usd: float | None, *, usd_per_hour: float | None) -> None:
        """Show the cost with that of earlier attempts, and of how much."""
        self._usd_before, self._limit_usd, self._usd_per_hour = usd_before, limit_usd, usd_per_hour

    def expect(self, note: str, seconds_left: float) -> None:
        """What is left of the run, shown with the next step."""
        self._expected, self._seconds_left = note, seconds_left

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(self.redact(text), markup=False)
        self._last_shown = time.monotonic()

    def table(self, table: Table) -> None:
        """A table that stays; its texts come redacted."""
        console = self._console if self._live else Console(stderr=True, highlight=False, width=LOG_WIDTH)
        console.print(table, soft_wrap=False)
        self._last_shown = time.monotonic()

    def stage(self, text: str) -> None:
        """A new stage begins."""
        self._doing, self._doing_since = text, time.monotonic()
        self._progress.update(self._task, description=self.redact(text), note="")
        if not self._live:
            self.say(text)

    def show(self, event: Event) -> None:
        """Show what a child process reports."""
        match event:
            case Doing():
                self.stage(event.text)
            case Warned():
                self.say(f"warning: {event.text}")
            case Loaded():
                share = event.num_trainable / event.num_parameters
                self.say(
                    f"model loaded on {event.device} in {event.dtype}: {event.num_parameters:,} parameters, "
                    f"{event.num_trainable:,} trained ({share:.2%})"
                )
            case Stepped():
                self._show_step(event)
            case Evaluated():
                perplexity = f", perplexity {math.exp(event.eval_loss):,.2f}" if event.eval_loss < MAX_EXPONENT else ""
                self.say(f"step {event.step}: held-out loss {event.eval_loss:.4f}{perplexity}")
            case Saved():
                self._doing_since = time.monotonic()
                self.say(f"step {event.step}: checkpoint saved")
            case Answered():
                pass  # the summary at the end shows them side by side

    def heartbeat(self) -> None:
        """Call often; says what is going on when nothing was said for a while."""
        if not self._live and time.monotonic() - self._last_shown >= QUIET_SECONDS:
            self.say(f"{self._doing} ({time.monotonic() - self._doing_since:.0f} s)")

    def _show_step(self, event: Stepped) -> None:
        self._doing, self._doing_since = "training", time.monotonic()
        speed = ""
        if self._tokens_before is not None and event.seconds > self._tokens_before[1]:
            rate = (event.num_tokens - self._tokens_before[0]) / (event.seconds - self._tokens_before[1])
            speed = f"{rate:,.0f} tokens/s"
        else:
            self._tokens_before = (event.num_tokens, event.seconds)
        cost, cost_usd = "", None
        if self._usd_per_hour:
            cost_usd = self._usd_before + self._usd_per_hour * (time.monotonic() - self._started) / 3600
            cost = f"${cost_usd:.2f}"
            cost += f" of ${self._limit_usd:.2f}" if self._limit_usd else ""
        note = "  ".join(part for part in (f"loss {event.loss:.3f}", speed, cost) if part)
        note += f"  {self._expected}" if self._expected else ""
        self._progress.update(self._task, description="training", completed=event.step, total=event.num_steps, note=note)
        if not self._live:
            row = json.loads(event.model_dump_json(exclude={"event"}))
            if cost_usd is not None:
                row |= {"cost": cost, "cost_usd": round(cost_usd, 4)}
            if self._seconds_left is not None:
                row["seconds_left"] = round(self._seconds_left)
            self._console.print(json.dumps(row), markup=False, soft_wrap=True)
            self._last_shown = time.monotonic()
