"""Attempts and limits in, the seconds that may still be spent out: MAX_COST_USD and MAX_HOURS over all attempts of a run.

A run stops early enough that saving, storing, the report and publishing are paid from the budget too. What is not handled:
the machine's time before Python starts and after it ends (pulling the image, being deleted).
"""

import math
from collections.abc import Sequence

from job.errors import BudgetError, Problem, SettingsError
from job.events import Event, Loaded, Ordered, Stepped
from job.keep.interval import SAVE_SECONDS
from job.keep.ledger import Attempt, Ledger, least_cost_usd
from job.settings import BudgetSettings

END_SECONDS = 4.0
"""From the decision to the end of the process, without saving and storing: it is taken once a second, the trainer takes up to
two to end, report and record take one on S3 (1.5 to 2.9 in all on two busy cores, 2026-11-24, n=3)."""
DISK_BYTES_PER_SECOND, NETWORK_BYTES_PER_SECOND = 50e6, 25e6
"""Assumed until a save and an upload were measured: a network volume, and 200 Mbit/s."""
REQUEST_SECONDS = 1.0
"""An upload's requests, whatever its size: eight files on a store far away."""
UPLOAD_SECONDS = 10.0
"""Assumed while not even the size of a checkpoint is known: 250 MB."""
PUBLISH_SECONDS = 10.0
"""Copying and hashing an adapter, its card, and the Hub's answers to a commit; the upload comes on top."""
BYTES_PER_PARAMETER, ADAPTER_BYTES_PER_PARAMETER = 12, 4
"""A checkpoint holds a trained parameter and Adam's two moments in fp32; an adapter the parameter alone."""
UPLOADS = 2
"""An older checkpoint may be on its way when the last one is saved."""
RESERVE = "budget_reserve_seconds"
"""The ledger's note of what was kept back when the budget stopped an attempt: no later start may keep back less, or it would
load the model only to stop again."""


def spent_seconds(attempts: Sequence[Attempt]) -> float:
    return sum(attempt.seconds for attempt in attempts)


def seconds_left(
    attempts: Sequence[Attempt], limits: BudgetSettings, price_usd_per_hour: float | None, reserve_seconds: float = 0.0
) -> float:
    """Seconds until the first limit is reached, without those kept back; infinite without a limit, negative when it is passed.

    Args:
        attempts: all of the run's, the current one up to now. One without a known price costs nothing here.
        price_usd_per_hour: of this machine; without it MAX_COST_USD does not count.
    """
    left = math.inf
    if limits.max_hours is not None:
        left = limits.max_hours * 3600 - spent_seconds(attempts)
    if limits.max_cost_usd is not None and price_usd_per_hour is not None:
        left = min(left, (limits.max_cost_usd - least_cost_usd(list(attempts))) / price_usd_per_hour * 3600)
    return left - reserve_seconds


def reserve_seconds(
    *,
    save_seconds: float | None,
    upload_seconds: float | None,
    step_seconds: float = 0.0,
    num_trained: int | None = None,
    publishes: bool = False,
) -> float:
    """What saving, storing, publishing and ending will take.

    Args:
        save_seconds, upload_seconds: as measured; None when they were not.
        step_seconds: a stop may have to wait for the part of a step that is under way.
        num_trained: trained parameters, which say how large a checkpoint is.
    """
    checkpoint_bytes = None if num_trained is None else num_trained * BYTES_PER_PARAMETER
    if save_seconds is None:
        save_seconds = SAVE_SECONDS if checkpoint_bytes is None else checkpoint_bytes / DISK_BYTES_PER_SECOND
    if upload_seconds is None:
        upload_seconds = UPLOAD_SECONDS
        if checkpoint_bytes is not None:
            upload_seconds = REQUEST_SECONDS + checkpoint_bytes / NETWORK_BYTES_PER_SECOND
    seconds = save_seconds + UPLOADS * upload_seconds + step_seconds + END_SECONDS
    if publishes:
        seconds += PUBLISH_SECONDS + (num_trained or 0) * ADAPTER_BYTES_PER_PARAMETER / NETWORK_BYTES_PER_SECOND
    return seconds


class Budget:
    """The limits of one run, and what its attempts have spent of them."""

    def __init__(self, limits: BudgetSettings, ledger: Ledger) -> None:
        self._limits, self._ledger = limits, ledger
        self._loaded: Loaded | None = None
        self._stepped: Stepped | None = None
        self._step_seconds = self._answer_seconds = 0.0

    @property
    def limit_usd(self) -> float | None:
        return self._limits.max_cost_usd

    @property
    def spent_before_usd(self) -> float:
        """Of the attempts before this one, at least."""
        return least_cost_usd(self._ledger.past)

    def add(self, event: Event) -> None:
        """Learn from the trainer how large a checkpoint and how long a step is."""
        if isinstance(event, Loaded):
            self._loaded, self._stepped = event, None
        elif isinstance(event, Ordered):
            self._answer_seconds = event.sample_seconds
        elif isinstance(event, Stepped):
            before, self._stepped = self._stepped, event
            if before is not None and event.step > before.step:
                self._step_seconds = (event.seconds - before.seconds) / (event.step - before.step)

    def seconds_left(self, *, keeps_reserve: bool = True) -> float:
        """Seconds until the run has to stop; with `keeps_reserve=False`, until the limit itself."""
        price = self._ledger.current.price_usd_per_hour
        return seconds_left(self._ledger.counted(), self._limits, price, self.reserve_seconds() if keeps_reserve else 0.0)

    def reserve_seconds(self) -> float:
        """What is kept back now: while the model is not loaded there is nothing to save."""
        if self._loaded is None:
            return END_SECONDS
        has_steps = self._stepped is not None or bool(self._ledger.current.first_step)
        # The answers come after the last step, and are not stopped for the budget any more: what they take is kept back too.
        return self._answer_seconds + reserve_seconds(
            save_seconds=self._measured("save_seconds"),
            upload_seconds=self._measured("upload_seconds"),
            step_seconds=self._step_seconds,
            num_trained=self._loaded.num_trainable,
            publishes=has_steps and self._limits.publish_on_budget,
        )

    def keep_back(self) -> str:
        """Note how much is kept back for the end that is decided now; returns the reason for it."""
        self._ledger.remember(RESERVE, round(self.reserve_seconds(), 3))
        return self.reached()

    def check_start(self) -> None:
        """Refuse a start whose end is reached already.

        Raises:
            SettingsError: MAX_COST_USD is set, and what this machine costs is not known.
            BudgetError: nothing is left, or not more than the last attempt kept back when it stopped.
        """
        limit = self._limits.max_cost_usd
        if limit is not None and self._ledger.current.price_usd_per_hour is None:
            rule, way_out = "the price of this machine is not known", "set GPU_HOURLY_RATE, or use MAX_HOURS instead"
            raise SettingsError([Problem(setting="MAX_COST_USD", value=f"{limit:.10g}", rule=rule, way_out=way_out)])
        kept_back = self._ledger.past[-1].notes.get(RESERVE) if self._ledger.past else None
        reserve = max(END_SECONDS, float(kept_back) if isinstance(kept_back, (int, float)) else 0.0)
        if self.seconds_left(keeps_reserve=False) <= reserve:
            raise BudgetError(f"{self.reached()}; nothing is started; {self.progress()}; {WAY_OUT}")

    def warning(self) -> str | None:
        """That some of what was spent is not known, when it matters."""
        if self._limits.max_cost_usd is None and self._limits.max_hours is None:
            return None
        num_unreadable = sum(attempt.is_unreadable for attempt in self._ledger.past)
        num_priceless = sum(attempt.price_usd_per_hour is None and not attempt.is_unreadable for attempt in self._ledger.past)
        parts = []
        if num_unreadable:
            parts.append(f"the record of {num_unreadable} attempt(s) is not readable")
        if num_priceless and self._limits.max_cost_usd is not None:
            parts.append(f"the price of {num_priceless} attempt(s) is not known")
        return f"{' and '.join(parts)}: the budget counts what is known, and more was spent" if parts else None

    def reached(self) -> str:
        """The limit that comes first, with what is spent of it."""
        setting, spent = self._first()
        rest = ", and the rest is for saving and ending" if self.seconds_left(keeps_reserve=False) > 0 else ""
        return f"{setting}: the budget is reached, {spent} spent in all attempts{rest}"

    def overrun(self) -> str | None:
        """By how much the limit is exceeded; None when it is not."""
        if (left := self.seconds_left(keeps_reserve=False)) >= 0:
            return None
        setting, spent = self._first()
        return f"{setting}: the budget is exceeded by {-left:.0f} s ({spent} spent): training was over, and was not thrown away"

    def progress(self) -> str:
        """How far the run has come."""
        steps = max((attempt.last_step or 0 for attempt in self._ledger.attempts), default=0)
        return f"{steps} steps are trained" if steps else "nothing was trained yet"

    def _first(self) -> tuple[str, str]:
        attempts, limits = self._ledger.counted(), self._limits
        price = self._ledger.current.price_usd_per_hour
        by_cost = seconds_left(attempts, limits.model_copy(update={"max_hours": None}), price)
        by_time = seconds_left(attempts, limits.model_copy(update={"max_cost_usd": None}), price)
        if by_cost <= by_time:
            return f"MAX_COST_USD={limits.max_cost_usd:.10g}", f"${least_cost_usd(attempts):.2f}"
        seconds = spent_seconds(attempts)
        return f"MAX_HOURS={limits.max_hours:.10g}", f"{seconds / 3600:.2f} hours" if seconds > 360 else f"{seconds:.0f} s"

    def _measured(self, note: str) -> float | None:
        value = self._ledger.learned(note)
        return float(value) if isinstance(value, (int, float)) else None


WAY_OUT = "raise it and start again to continue"
