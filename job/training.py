"""Prepared data in, a trained adapter out: the trainer is started from the newest whole checkpoint until it has finished.

What a trainer cannot do about its own end is done here: after running out of memory it is started again with a leaner layout,
after a divergence from a sound checkpoint with a lower learning rate, after a hang once more. What was learned about memory and
divergence goes into the ledger, so an attempt on another machine starts there.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from job.deliver.finish import ADAPTER
from job.deliver.record import Record
from job.display import Display
from job.errors import DivergedError, JobError, NetworkError, PlanError
from job.events import Ended, Evaluated, Event, Failed, Saved, Stepped, Stopped
from job.foresight import Foresight
from job.keep.budget import Budget
from job.keep.checkpoints import (
    CHECKPOINTS,
    MANIFEST,
    DamagedError,
    best_step,
    drop_after,
    get_folder,
    restore_latest,
    step_name,
    store_losses,
)
from job.keep.interval import learned_interval_seconds
from job.keep.ledger import Ledger
from job.keep.mirror import Mirror
from job.keep.store import MissingError, Store
from job.plan.forecast import Plan
from job.plan.hardware import find_devices, one_gpu
from job.plan.retreat import MAX_ROLLBACKS, Fit, Rollback, leaner, roll_back
from job.settings import Settings, result_fingerprint
from job.stopping import LAST_SECONDS, StopRequest
from job.supervise import ChildFailedError
from job.train.spec import TrainSpec

MAX_HANGS = 1
CPU_ENVIRON = {"TORCHDYNAMO_DISABLE": "1"}  # compiling for a CPU takes longer than it saves in the short runs one does there

StartChild = Callable[..., None]


class Training:
    """The train stage of one attempt.

    Args:
        start_child: runs a stage in a process of its own, as `Stages` does; raises ChildFailedError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        work: Path,
        environ: Mapping[str, str],
        display: Display,
        stop: StopRequest,
        record: Record,
        ledger: Ledger,
        budget: Budget,
        foresight: Foresight,
        start_child: StartChild,
    ) -> None:
        self._settings, self._store, self._work, self._environ = settings, store, work, environ
        self._display, self._stop, self._record, self._ledger = display, stop, record, ledger
        self._budget, self._foresight, self._start_child = budget, foresight, start_child
        self._checkpoints = work / "checkpoints"
        self._mirror = self._new_mirror()
        self._rollback = self._learned_rollback()
        self._num_hangs = self._num_steps = 0
        self._is_trained = False  # all steps are done: what is left is cheap, and is not lost to the budget

    def run(self, data_dir: Path, plan: Plan) -> None:
        """Train to the last step.

        Raises:
            ChildFailedError: the trainer ended otherwise, and starting it again would not help.
        """
        gpus = find_devices(self._environ)
        if not gpus:
            self._display.say("warning: no GPU found; training on the CPU is slow")
        fit, self._num_steps = self._first_fit(plan), plan.num_steps
        while True:
            try:
                self._start(data_dir, plan, fit, num_gpus=len(gpus))
                break
            except ChildFailedError as failure:
                if self._is_trained and failure.stopped is Stopped.BUDGET:  # asked for while it did the last step
                    continue
                self._raise_if_stopped(failure)
                with self._stop.at_once():
                    fit = self._recover(failure, fit, has_gpu=bool(gpus))
        self._stop.limit(None)
        with self._stop.at_once():
            self._ledger.record(last_step=self._record.last_step)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Saved):
            self._mirror.offer(event.step)
            if event.seconds > 0:
                self._ledger.remember("save_seconds", event.seconds)
            if uploads := list(self._mirror.seconds.values()):
                self._ledger.remember("upload_seconds", max(uploads[-3:]))
        if isinstance(event, (Stepped, Saved, Evaluated, Ended)):
            self._watch_end(event.step)

    def confirm(self) -> None:
        """The newest checkpoint is in the store, or NetworkError."""
        left = max(0.0, self._stop.seconds_left(self._settings.keep.grace_seconds) - LAST_SECONDS)  # for record and report
        self._mirror.finish(left, stopped=self._stop.is_asked)

    def _watch_end(self, step: int) -> None:
        """Lift the budget when nothing is left to train after this step: it is the last, or held-out losses rose for too long."""
        patience = self._settings.train.early_stopping_patience
        self._is_trained = step >= self._num_steps or (patience is not None and self._record.num_losses_since_best >= patience)
        self._stop.limit(None if self._is_trained else self._budget)

    def _new_mirror(self) -> Mirror:
        return Mirror(
            self._store,
            self._checkpoints,
            keep=self._settings.keep.save_total_limit,
            warn=self._display.say,
            before=self._record.put_metrics,
        )

    def _learned_rollback(self) -> Rollback:
        """Of earlier attempts with the same hyperparameters: whoever lowers the learning rate starts anew."""
        learned = self._ledger.learned("rollback")
        if not isinstance(learned, dict) or learned.get("settings") != result_fingerprint(self._settings):
            return Rollback()
        return Rollback.model_validate({name: value for name, value in learned.items() if name != "settings"})

    def _first_fit(self, plan: Plan) -> Fit:
        planned = plan.fit
        learned = self._ledger.learned("fit")
        if learned is None:
            return planned
        fit = Fit.model_validate(learned)
        effective = fit.micro_batch * fit.gradient_accumulation_steps
        if fit.micro_batch > planned.micro_batch or effective != plan.micro_batch * plan.gradient_accumulation_steps:
            return planned  # the user has asked for less, or for another batch, since
        self._display.say(f"memory ran out before with more: micro-batch {fit.micro_batch} x {fit.gradient_accumulation_steps}")
        return fit

    def _start(self, data_dir: Path, plan: Plan, fit: Fit, *, num_gpus: int) -> None:
        keep = self._settings.keep
        with self._stop.at_once():
            resume_from = restore_latest(self._store, self._checkpoints, lambda text: self._display.say(f"warning: {text}"))
            if self._settings.train.early_stopping_patience is not None:
                self._bring_best()
            first_step = int(resume_from.name.removeprefix("step-")) if resume_from else 0
            if self._ledger.current.first_step is None:
                self._ledger.record(first_step=first_step, last_step=first_step)
            self._record.rewind(first_step)
            self._watch_end(first_step)
        if first_step:
            self._display.say(f"continuing after step {first_step} of {plan.num_steps}")
        shutil.rmtree(self._work / ADAPTER, ignore_errors=True)
        self._foresight.begin(micro_batch=fit.micro_batch, activation_checkpointing=fit.activation_checkpointing)
        spec = TrainSpec(
            model=self._settings.model,
            lora=self._settings.lora,
            train=self._settings.train,
            system_prompt=self._settings.data.system_prompt,
            model_dir=self._record.model_dir,
            data_dir=data_dir,
            checkpoints_dir=self._checkpoints,
            adapter_dir=self._work / ADAPTER,
            scratch_dir=self._work / "trainer",
            resume_from=resume_from,
            micro_batch=fit.micro_batch,
            gradient_accumulation_steps=fit.gradient_accumulation_steps,
            num_steps=plan.num_steps,
            save_interval_seconds=learned_interval_seconds(self._ledger) if keep.save_interval == "auto" else keep.save_interval,
            save_steps=keep.save_steps,
            expect_gpu=num_gpus > 0,
            is_shuffled=self._settings.data.order == "shuffle",
            activation_checkpointing=fit.activation_checkpointing,
            activation_offloading=fit.activation_offloading,
            learning_rate_scale=self._rollback.learning_rate_scale,
            skip_steps=self._rollback.skip_steps,
        )
        tracker = ("WANDB_API_KEY",) if "wandb" in str(self._settings.train.train_args.get("report_to")) else ()
        device = one_gpu(self._environ, num_gpus, self._display.say) if num_gpus else CPU_ENVIRON
        self._start_child(
            "train",
            spec,
            allowed=tracker,
            environ={**device, "HF_HUB_OFFLINE": "1"},
            hang_seconds=keep.hang_seconds,
        )

    def _bring_best(self) -> None:
        """The trainer may end at once with the best checkpoint, which an attempt on another machine has saved."""
        best = best_step(store_losses(self._store, self._work / "mirror"))
        if best is None or (self._checkpoints / step_name(best) / MANIFEST).is_file():
            return
        try:
            get_folder(self._store, f"{CHECKPOINTS}/{step_name(best)}", self._checkpoints / step_name(best))
        except (MissingError, DamagedError) as error:
            self._tell(f"the checkpoint with the lowest held-out loss, of step {best}, is gone ({error})")

    def _raise_if_stopped(self, failure: ChildFailedError) -> None:
        """A run that would have gone on but for a signal or the budget is stopped, and not out of memory, diverged or hung."""
        if not self._stop.is_asked():
            return
        if failure.stopped in (Stopped.OUT_OF_MEMORY, Stopped.DIVERGED) or failure.has_hung:
            error = self._stop.error(f"before it: {failure.error}")
            raise ChildFailedError(error, self._stop.stopped, failed=failure.failed) from failure
        raise failure

    def _recover(self, failure: ChildFailedError, fit: Fit, *, has_gpu: bool) -> Fit:
        """Make the next start different, or raise."""
        if failure.stopped is Stopped.OUT_OF_MEMORY:
            return self._retreat(failure, fit, has_gpu=has_gpu)
        if failure.stopped is Stopped.DIVERGED and failure.failed is not None:
            self._roll_back(failure, failure.failed)
            return fit
        if failure.has_hung and self._num_hangs < MAX_HANGS:
            self._num_hangs += 1
            self._keep_stacks()
            self._tell(f"{failure.error}; its stacks are in stacks.txt of the run; starting it again")
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
        self._note("fit", next_fit.model_dump())
        self._tell(f"out of memory: continuing with {_describe(next_fit)}, the same examples per step")
        return next_fit

    def _roll_back(self, failure: ChildFailedError, failed: Failed) -> None:
        last_step = failed.step or 1
        first_step = failed.first_step or last_step
        rollback = roll_back(self._rollback, first_step=first_step, last_step=last_step)
        if rollback is None:
            named = ", ".join(f"{source} row {row}" for source, row in failed.examples[:8]) or "not known"
            error = DivergedError(f"{failure.error}; {MAX_ROLLBACKS} roll-backs did not help; these examples were in it: {named}")
            raise ChildFailedError(error, Stopped.DIVERGED, failed=failed) from failure
        try:  # nothing may be uploading what is deleted
            self._mirror.finish(self._settings.keep.grace_seconds)
        except NetworkError as error:
            self._display.say(f"warning: {error}")
        drop_after(self._store, self._checkpoints, first_step - 1)
        self._mirror = self._new_mirror()
        self._rollback = rollback
        self._note("rollback", {**rollback.model_dump(mode="json"), "settings": result_fingerprint(self._settings)})
        self._tell(
            f"diverged at step {last_step}: back to the last checkpoint before step {first_step}, learning rate x "
            f"{rollback.learning_rate_scale:g}, steps {first_step}-{last_step} are skipped"
        )

    def _note(self, name: str, value: Any) -> None:
        try:
            self._ledger.note(name, value)
        except JobError as error:  # this attempt knows it all the same
            self._display.say(f"warning: {error}")

    def _tell(self, text: str) -> None:
        self._display.say(text)
        self._note("happenings", self._record.happened(text))

    def _keep_stacks(self) -> None:
        stacks = self._work / "trainer" / "stacks.txt"
        try:
            self._store.put(stacks, "stacks.txt")
        except (JobError, OSError) as error:
            self._display.say(f"warning: the stacks are not in the store: {error}")


def _describe(fit: Fit) -> str:
    parts = [f"micro-batch {fit.micro_batch} x {fit.gradient_accumulation_steps}"]
    if fit.activation_checkpointing:
        parts.append("activations recomputed")
    if fit.activation_offloading:
        parts.append("activations in host memory")
    return ", ".join(parts)
