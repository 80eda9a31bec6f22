"""How an attempt's trainer ended in, what the next start does otherwise out: a leaner layout after running out of memory, a lower
learning rate from a sound checkpoint after a divergence, the same once more after a hang.

What was learned goes into the ledger, so an attempt on another machine starts there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.deliver.record import Record
from job.display import Display
from job.errors import DivergedError, JobError, PlanError
from job.events import Failed, Stopped
from job.keep.ledger import Ledger
from job.keep.store import Store, write_text
from job.plan.forecast import Plan
from job.plan.retreat import MAX_ROLLBACKS, Fit, Rollback, leaner, relaid, roll_back
from job.settings import Settings, result_fingerprint
from job.supervise import ChildFailedError

MAX_HANGS = 1


class Recovery:
    """What one attempt gives up, and what those before it have.

    Args:
        rewind: deletes the checkpoints after a step, here and in the store.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        work: Path,
        display: Display,
        record: Record,
        ledger: Ledger,
        rewind: Callable[[int], None],
    ) -> None:
        self._settings, self._store, self._work = settings, store, work
        self._display, self._record, self._ledger, self._rewind = display, record, ledger, rewind
        self._num_hangs = 0
        self.rollback = self._learned_rollback()

    def _learned_rollback(self) -> Rollback:
        """Of earlier attempts with the same hyperparameters: whoever lowers the learning rate starts anew."""
        learned = self._ledger.learned("rollback")
        if not isinstance(learned, dict) or learned.get("settings") != result_fingerprint(self._settings):
            return Rollback()
        return Rollback.model_validate({name: value for name, value in learned.items() if name != "settings"})

    def first_fit(self, plan: Plan) -> Fit:
        """The layout that the plan has, or the leaner one that memory has forced before."""
        planned = plan.fit
        learned = self._ledger.learned("fit")
        if learned is None:
            return planned
        found = Fit.model_validate(learned)
        fit = relaid(found, num_devices=planned.num_devices, parallel=planned.parallel)
        if fit is None or fit.micro_batch > planned.micro_batch or fit.effective_batch_size != planned.effective_batch_size:
            return planned  # the user has asked for less, or for another batch, since
        self._display.say(f"memory ran out before with more: micro-batch {fit.micro_batch} x {fit.gradient_accumulation_steps}")
        return fit

    def next_fit(self, failure: ChildFailedError, fit: Fit, *, has_gpu: bool) -> Fit:
        """Make the next start different, or raise."""
        if failure.stopped is Stopped.OUT_OF_MEMORY:
            return self._retreat(failure, fit, has_gpu=has_gpu)
        if failure.stopped is Stopped.DIVERGED and failure.failed is not None:
            self._roll_back(failure, failure.failed)
            return fit
        if failure.has_hung and self._num_hangs < MAX_HANGS:
            self._num_hangs += 1
            self._keep_stacks()
            self.tell(f"{failure.error}; its stacks are in stacks.txt of the run; starting it again")
            return fit
        raise failure

    def _retreat(self, failure: ChildFailedError, fit: Fit, *, has_gpu: bool) -> Fit:
        asked = self._settings.train.activation_checkpointing
        is_checkpointing = fit.activation_checkpointing
        if is_checkpointing is None:
            is_checkpointing = asked is True or (asked == "auto" and has_gpu)
        next_fit = leaner(fit, is_checkpointing=is_checkpointing, can_offload=has_gpu)
        if next_fit is None:
            max_length, rank = self._settings.data.max_length, self._settings.lora.lora_r
            error = PlanError(
                f"{failure.error}; nothing is left to give up at micro-batch 1 with activations recomputed: "
                f"take a GPU with more memory, a smaller model, a lower MAX_LENGTH={max_length} or a lower LORA_R={rank}"
            )
            raise ChildFailedError(error, Stopped.OUT_OF_MEMORY, failed=failure.failed) from failure
        self.note("fit", next_fit.model_dump())
        self.tell(f"out of memory: continuing with {_describe(next_fit)}, the same examples per step")
        return next_fit

    def _roll_back(self, failure: ChildFailedError, failed: Failed) -> None:
        last_step = failed.step or 1
        first_step = failed.first_step or last_step
        rollback = roll_back(self.rollback, first_step=first_step, last_step=last_step)
        if rollback is None:
            named = ", ".join(f"{source} row {row}" for source, row in failed.examples[:8]) or "not known"
            error = DivergedError(f"{failure.error}; {MAX_ROLLBACKS} roll-backs did not help; these examples were in it: {named}")
            raise ChildFailedError(error, Stopped.DIVERGED, failed=failed) from failure
        self._rewind(first_step - 1)
        self.rollback = rollback
        self.note("rollback", {**rollback.model_dump(mode="json"), "settings": result_fingerprint(self._settings)})
        self.tell(
            f"diverged at step {last_step}: back to the last checkpoint before step {first_step}, learning rate x "
            f"{rollback.learning_rate_scale:g}, steps {first_step}-{last_step} are skipped"
        )

    def note(self, name: str, value: Any) -> None:
        try:
            self._ledger.note(name, value)
        except JobError as error:  # this attempt knows it all the same
            self._display.say(f"warning: {error}")

    def tell(self, text: str) -> None:
        self._display.say(text)
        self.note("happenings", self._record.happened(text))

    def _keep_stacks(self) -> None:
        stacks = self._work / "trainer" / "stacks.txt"
        try:
            write_text(self._store, "stacks.txt", stacks.read_text("utf-8", "replace"), self._work)
        except (JobError, OSError) as error:
            self._display.say(f"warning: the stacks are not in the store: {error}")


def _describe(fit: Fit) -> str:
    parts = [f"micro-batch {fit.micro_batch} x {fit.gradient_accumulation_steps}"]
    if fit.num_devices > 1:
        parts[0] += f" on each of {fit.num_devices} devices"
    if fit.activation_checkpointing:
        parts.append("activations recomputed")
    if fit.activation_offloading:
        parts.append("activations in host memory")
    return ", ".join(parts)
