"""The trainer's events in, what is left of the run out: from the first measured steps on they take the place of the plan."""

import time
from datetime import UTC, datetime

from job.display import Display
from job.errors import JobError
from job.events import Evaluated, Event, Loaded, Measured, Ordered, Saved, Stepped
from job.keep.ledger import Ledger, least_cost_usd
from job.plan.footprint import Footprint
from job.plan.forecast import Plan
from job.plan.memory import MemoryEstimate, estimate_memory
from job.plan.progress import Pace, Reforecast

END_SECONDS = 3.0
"""After the last step: the adapter to disk and store, report, without samples (tiny models on two cores, 2026-11: 2 to 4)."""
GIB = 2**30


class Foresight:
    """Follows one attempt.

    Args:
        plan: with counted data.
        footprint: what `plan` was made with.
        optimizer: transformers' name.
        eval_steps: EVAL_STEPS; None when the held-out loss is measured at the start and the end only.
        has_eval: whether anything is held out.
    """

    def __init__(
        self,
        plan: Plan,
        footprint: Footprint | None,
        *,
        longest_tokens: int,
        optimizer: str,
        eval_steps: int | None,
        has_eval: bool,
        ledger: Ledger,
        display: Display,
    ) -> None:
        self.plan = plan
        self.memory_factor: float | None = None
        """What the first micro-batch really took, over what was predicted; None until it is done."""
        self._footprint, self._longest, self._optimizer = footprint, longest_tokens, optimizer
        self._eval_steps, self._has_eval = eval_steps, has_eval
        self._ledger, self._display = ledger, display
        self._pace = self._new_pace()
        self._memory_bytes: int | None = None
        self._end_seconds = END_SECONDS
        self._heard_at = time.monotonic()
        self._rows = plan.micro_batch
        self._recomputes = plan.activation_checkpointing is True
        learned = ledger.learned("reforecast")
        self.reforecast = Reforecast.model_validate(learned) if isinstance(learned, dict) else None

    @property
    def tokens_per_second(self) -> float | None:
        return self._pace.tokens_per_second

    @property
    def num_measured(self) -> int:
        """Steps that the pace goes by."""
        return self._pace.num_measured

    def begin(self, *, micro_batch: int, activation_checkpointing: bool | None) -> None:
        """A trainer is started, perhaps with another layout than before."""
        self._rows = micro_batch
        if activation_checkpointing is not None:
            self._recomputes = activation_checkpointing
        self._pace = self._new_pace()

    def on_event(self, event: Event) -> None:
        if isinstance(event, Ordered):
            self._end_seconds = END_SECONDS + event.sample_seconds
            if event.num_tokens is not None:
                self.plan = self.plan.model_copy(update={"num_tokens": event.num_tokens})
                self._pace.num_tokens = event.num_tokens
        elif isinstance(event, Measured):
            self._take_measure(event)
        elif isinstance(event, Evaluated):
            self._pace.evaluated(time.monotonic() - self._heard_at)
        elif isinstance(event, Saved):
            self._pace.interrupted()
        elif isinstance(event, Stepped):
            self._step(event)
        if isinstance(event, (Loaded, Stepped, Evaluated, Saved)):
            self._heard_at = time.monotonic()

    def _new_pace(self) -> Pace:
        return Pace(num_steps=self.plan.num_steps, num_tokens=self.plan.num_tokens)

    def _take_measure(self, event: Measured) -> None:
        if self._footprint is None:
            return
        memory = self._estimate(self._footprint, event.rows, event.length)
        self.memory_factor = event.saved_bytes / max(memory.activations_bytes, 1)
        if event.peak_allocated_bytes is not None:
            coming = memory.activations_bytes + memory.logits_bytes + memory.transient_bytes
            steady = memory.peak_bytes - memory.reserved_bytes - coming
            self.memory_factor = max(event.peak_allocated_bytes - steady, 1) / max(coming, 1)
        longest = self._estimate(self._footprint, self._rows, self._longest).corrected(self.memory_factor)
        self._memory_bytes = longest.peak_bytes
        told = (
            f"the first micro-batch kept {event.saved_bytes / GIB:.3f} GiB for its backward pass, "
            f"{memory.activations_bytes / GIB:.3f} predicted"
        )
        self._display.say(f"{told}: {longest.peak_bytes / GIB:.1f} GiB are expected at the longest example")
        if self.plan.memory_bytes is not None and longest.safe_peak_bytes > self.plan.memory_bytes:
            self._display.say(
                f"warning: the longest examples may need up to {longest.safe_peak_bytes / GIB:.1f} GiB of "
                f"{self.plan.memory_bytes / GIB:.1f}; if they do, the run goes on with smaller micro-batches"
            )

    def _estimate(self, footprint: Footprint, rows: int, length: int) -> MemoryEstimate:
        return estimate_memory(
            footprint,
            rows=rows,
            length=length,
            activation_checkpointing=self._recomputes,
            optimizer=self._optimizer,
            on_gpu=self.plan.gpu is not None,
            num_devices=self.plan.num_devices,
            parallel=self.plan.parallel,
        )

    def _step(self, event: Stepped) -> None:
        self._pace.step(step=event.step, num_tokens=event.num_tokens, seconds=event.seconds)
        self._pace.num_evaluations_left = self._evaluations_left(event.step)
        left = self._pace.seconds_left(self._end_seconds)
        if left is None:
            return
        seconds, cost = self._totals(left)
        note = f"{_duration(left)} left"
        if cost is not None:
            note += f", ${cost:.2f} in all"
        if (middle := _middle(self.plan)) is not None:
            note += f" ({seconds / middle:.2f} x the plan)"
        elif self.reforecast is not None:
            note += f" ({seconds / self.reforecast.seconds:.2f} x the first estimate)"
        self._display.expect(note, left)
        if self.reforecast is None and self._pace.is_known():
            self.reforecast = Reforecast(
                at_step=event.step,
                seconds=round(seconds, 1),
                cost_usd=None if cost is None else round(cost, 4),
                num_tokens=self.plan.num_tokens,
                memory_bytes=self._memory_bytes,
                seconds_per_token=self._pace.seconds_per_token or 0.0,
            )
            try:
                self._ledger.remember("reforecast", self.reforecast.model_dump(mode="json"))
            except JobError as error:
                self._display.say(f"warning: {error}")
            self._display.say(f"from the first {event.step} steps: {_duration(seconds)} in all, {note}")

    def _totals(self, seconds_left: float) -> tuple[float, float | None]:
        """Seconds and dollars of all attempts, the end of the run included."""
        past, current = self._ledger.past, self._ledger.current
        this = (datetime.now(UTC) - current.started).total_seconds() + seconds_left
        seconds = sum(attempt.seconds for attempt in past) + this
        if current.price_usd_per_hour is None:
            return seconds, None
        return seconds, least_cost_usd(list(past)) + this / 3600 * current.price_usd_per_hour

    def _evaluations_left(self, step: int) -> int:
        if not self._has_eval:
            return 0
        last = self.plan.num_steps
        if not self._eval_steps:
            return 1
        between = last // self._eval_steps - step // self._eval_steps
        return between + (1 if last % self._eval_steps else 0)


def _middle(plan: Plan) -> float | None:
    if plan.seconds_low is None or plan.seconds_high is None:
        return None
    return (plan.seconds_low + plan.seconds_high) / 2


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
