"""Events of a run in, its metrics and its report out: what is known of a run, over all its attempts."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import JsonValue

from job.data.tally import Tally
from job.deliver.compare import compare
from job.deliver.report import MAX_CURVE, Candidate, Chosen, Happening, Report, Sample, count_actual, find_versions
from job.errors import JobError
from job.events import Answered, Ended, Evaluated, Event, Fetched, Loaded, Stepped, Stopped, metrics_row
from job.keep.checkpoints import best_step
from job.keep.ledger import Attempt, Ledger
from job.keep.store import MissingError, Store, read_json_lines, read_text, write_text
from job.plan.forecast import Plan
from job.plan.progress import Reforecast
from job.settings import Settings

REPORT, METRICS = "report.json", "metrics.jsonl"
MAX_EXPONENT = 700.0
"""e to the power of more is no float."""


class Record:
    """Grows with each event; belongs to one attempt, and takes over what earlier ones wrote."""

    def __init__(self, settings: Settings, run_id: str, store: Store, work: Path) -> None:
        self._settings, self._run_id, self._store, self._work = settings, run_id, store, work
        self._rows: dict[int, dict[str, float]] = {}
        self._answered: list[Answered] = []
        self._happenings: list[Happening] = []
        self._device: str | None = None
        self._peak_memory_bytes: int | None = None
        self._chosen_step: int | None = None
        self._chosen_by: str | None = None
        self._ended_step = 0
        self.model_dir = Path()
        self.revision: str | None = None
        self.plan: Plan | None = None
        self.reforecast: Reforecast | None = None
        self.memory_factor: float | None = None
        self.tally: Tally | None = None

    @property
    def last_step(self) -> int | None:
        """The newest step that was logged."""
        return max((step for step, row in self._rows.items() if "loss" in row), default=None)

    @property
    def last_row(self) -> dict[str, float]:
        """The newest logged step, as in metrics.jsonl; empty before the first."""
        return {} if self.last_step is None else self._rows[self.last_step]

    @property
    def last_eval_loss(self) -> float | None:
        return next((row["eval_loss"] for _, row in sorted(self._rows.items(), reverse=True) if "eval_loss" in row), None)

    @property
    def num_losses_since_best(self) -> int:
        """How often the held-out loss was measured since it was lowest; the untrained model's does not count."""
        losses: dict[int, float | None] = {
            step: row["eval_loss"] for step, row in self._rows.items() if step and "eval_loss" in row
        }
        best = best_step(losses)
        return 0 if best is None else sum(step > best for step in losses)

    def add(self, event: Event) -> None:
        match event:
            case Fetched():
                self.model_dir, self.revision = event.model_dir, event.revision
            case Loaded():
                self._device = event.device
            case Stepped():
                self._rows.setdefault(event.step, {}).update(metrics_row(event))
            case Evaluated():
                self._rows.setdefault(event.step, {"step": event.step})["eval_loss"] = event.eval_loss
            case Answered():
                self._answered.append(event)
            case Ended():
                self._peak_memory_bytes = max(self._peak_memory_bytes or 0, event.peak_memory_bytes)
                self._ended_step = event.step
                self._chosen_step, self._chosen_by = event.chosen_step, event.chosen_by

    def follow(self, plan: Plan, reforecast: Reforecast | None, memory_factor: float | None) -> None:
        """Take over what is foreseen now."""
        self.plan, self.reforecast, self.memory_factor = plan, reforecast, memory_factor

    def happened(self, text: str) -> list[JsonValue]:
        """Something that whoever reads the report should know; returns all of this attempt, to be noted in the ledger."""
        self._happenings.append(Happening(at=datetime.now(UTC), step=self.last_step, text=text))
        return [happening.model_dump(mode="json") for happening in self._happenings]

    def rewind(self, first_step: int) -> None:
        """Take over the steps up to the checkpoint that is continued from, of this attempt or of earlier ones."""
        if first_step and not self._rows:
            self._load_metrics()
        self._rows = {step: row for step, row in self._rows.items() if step <= first_step}

    def _load_metrics(self) -> None:
        try:
            rows, _ = read_json_lines(self._store, METRICS, self._work)  # a line that a dying machine cut short is left out
        except MissingError:
            return
        self._rows = {row["step"]: row for row in rows}

    def put_metrics(self) -> None:
        if not self._rows:
            return
        rows = sorted(dict(self._rows).items())  # a copy: the mirror's thread calls this while steps come in
        write_text(self._store, METRICS, "".join(json.dumps(row) + "\n" for _, row in rows), self._work / "metrics")

    def report(self, ledger: Ledger, stopped: Stopped, error: JobError | None) -> Report:
        """What is known now; of training that an earlier attempt finished, what that one reported."""
        outcome = {
            "stopped": stopped,
            "exit_status": 0 if error is None else error.exit_status,
            "reason": None if error is None else str(error),
            "attempts": ledger.attempts,
            "happenings": _happenings(ledger.past) + self._happenings,
        }
        if not self._rows and (past := self._past_report()) is not None:
            return past.model_copy(update={**outcome, "actual": past.actual.model_copy(update=_time_and_cost(ledger))})
        rows = [row for _, row in sorted(self._rows.items())]
        steps = [row for row in rows if "loss" in row]
        evaluations = [{"step": row["step"], "eval_loss": row["eval_loss"]} for row in rows if "eval_loss" in row]
        last_step = max(self._ended_step, int(steps[-1]["step"]) if steps else 0)  # the last step may have been skipped
        chosen = last_step if self._chosen_step is None else self._chosen_step
        actual = count_actual(
            ledger.attempts,
            num_tokens=int(steps[-1]["num_tokens"]) if steps else 0,
            num_steps=last_step,
            peak_memory_bytes=self._peak_memory_bytes,
            device=self._device,
        )
        candidates = find_candidates(evaluations, self._answered, chosen)
        picked = next(one for one in candidates if one.step == chosen)
        return Report(
            run_id=self._run_id,
            plan=self.plan,
            reforecast=self.reforecast,
            memory_factor=self.memory_factor,
            comparison=compare(
                self.plan,
                self.reforecast,
                seconds=actual.seconds,
                num_tokens=actual.num_tokens,
                peak_memory_bytes=actual.peak_memory_bytes,
                cost_usd=None if actual.cost_usd == "unknown" else actual.cost_usd,
            ),
            actual=actual,
            data=self.tally,
            curve=thinned(rows),
            evaluations=evaluations,
            candidates=candidates,
            chosen=Chosen(**picked.model_dump(), by=self._chosen_by or "last") if error is None else None,
            publication=None,
            samples=find_samples(self._answered, chosen),
            model={"id": self._settings.model.model_id, "revision": self.revision},
            settings=self._settings.without_secrets(),
            versions=find_versions(),
            **outcome,
        )

    def _past_report(self) -> Report | None:
        try:
            return Report.model_validate_json(read_text(self._store, REPORT, self._work))
        except (MissingError, ValueError):
            return None


def find_candidates(evaluations: list[dict[str, float]], answered: list[Answered], chosen: int) -> list[Candidate]:
    """The base model and every checkpoint that was answered with, and the chosen one, in order of their steps."""
    losses = {int(row["step"]): row["eval_loss"] for row in evaluations}
    scores: dict[int, list[float]] = {}
    for one in answered:
        for answer in one.answers:
            known = scores.setdefault(answer.step, [])
            known += [] if answer.score is None else [answer.score]
    return [
        Candidate(
            step=step,
            eval_loss=(loss := losses.get(step)),
            perplexity=round(math.exp(loss), 4) if loss is not None and loss < MAX_EXPONENT else None,
            score=round(fmean(scores[step]), 4) if scores.get(step) else None,
        )
        for step in sorted({0, *scores, chosen})
    ]


def find_samples(answered: list[Answered], chosen: int) -> list[Sample]:
    """Each prompt with what the base model and the adapter say to it."""
    samples = []
    for one in answered:
        texts = {answer.step: answer.text for answer in one.answers}
        samples.append(
            Sample(
                prompt=one.prompt,
                before=texts.get(0, ""),
                after=texts.get(chosen, one.answers[-1].text if one.answers else ""),
                scorer=one.scorer,
                answers=list(one.answers),
            )
        )
    return samples


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_CURVE rows, evenly spread, with the last one; `evaluations` has every held-out loss."""
    stride = -(-len(rows) // MAX_CURVE)  # rounded up
    if stride <= 1:
        return rows
    return [row for index, row in enumerate(rows) if (len(rows) - 1 - index) % stride == 0]


def _happenings(attempts: list[Attempt]) -> list[Happening]:
    noted = (attempt.notes.get("happenings") for attempt in attempts)
    return [Happening.model_validate(one) for notes in noted if isinstance(notes, list) for one in notes]


def _time_and_cost(ledger: Ledger) -> dict[str, object]:
    actual = count_actual(ledger.attempts, num_tokens=0, num_steps=0, peak_memory_bytes=None, device=None)
    return actual.model_dump(include={"seconds", "cost_usd"})
