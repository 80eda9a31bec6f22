"""Prepared data in, a trained adapter out: the trainer is started from the newest whole checkpoint until it has finished.

What a trainer cannot do about its own end is done here: after running out of memory it is started again with a leaner layout,
after a divergence from a sound checkpoint with a lower learning rate, after a hang once more. What was learned about memory and
divergence goes into the ledger, so an attempt on another machine starts there.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from job.assignment import CPU_ENVIRON, assign
from job.deliver.finish import ADAPTER
from job.deliver.record import Record
from job.display import Display
from job.errors import DivergedError, JobError, NetworkError, PlanError
from job.events import Ended, Evaluated, Event, Failed, Saved, Stepped, Stopped
from job.foresight import Foresight
from job.keep.budget import Budget
from job.keep.checkpoints import drop_after, restore_latest
from job.keep.interval import learned_interval_seconds
from job.keep.kept import bring_kept
from job.keep.ledger import Ledger
from job.keep.mirror import Mirror
from job.keep.store import Store, write_text
from job.plan.forecast import Plan
from job.plan.hardware import find_devices, one_gpu
from job.plan.retreat import MAX_ROLLBACKS, Fit, Rollback, leaner, roll_back
from job.settings import Settings, result_fingerprint
from job.stopping import LAST_SECONDS, StopRequest
from job.supervise import ChildFailedError
from job.train.trackers import TRACKERS, TrackerFiles, new_tracker_id, tracker_environ

MAX_HANGS = 1

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
        run_id: str,
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
        self._run_id = run_id
        self._display, self._stop, self._record, self._ledger = display, stop, record, ledger
        self._budget, self._foresight, self._start_child = budget, foresight, start_child
        self._checkpoints = work / "checkpoints"
        self._tracker_files = TrackerFiles(store, work / TRACKERS, work / "mirror")
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
        try:
            self._tracker_files.put()
        except JobError as error:
            self._display.say(f"warning: {error}")

    def _put_curves(self) -> None:
        self._record.put_metrics()
        self._tracker_files.put()

    def _tracker_environ(self) -> dict[str, str]:
        key = self._settings.secrets.wandb_api_key
        environ = {**self._environ, **({"WANDB_API_KEY": key.get_secret_value()} if key else {})}
        return tracker_environ(self._settings.train.report_to, environ, self._work / TRACKERS)

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
            before=self._put_curves,
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
            self._bring_kept()
            if "trackio" in self._settings.train.report_to:
                self._tracker_files.restore()
            if self._settings.train.report_to and self._ledger.learned("tracker_id") is None:
                self._note("tracker_id", new_tracker_id(self._run_id))
            first_step = int(resume_from.name.removeprefix("step-")) if resume_from else 0
            if self._ledger.current.first_step is None:
                self._ledger.record(first_step=first_step, last_step=first_step)
            self._record.rewind(first_step)
            self._watch_end(first_step)
        if first_step:
            self._display.say(f"continuing after step {first_step} of {plan.num_steps}")
        shutil.rmtree(self._work / ADAPTER, ignore_errors=True)
        self._foresight.begin(micro_batch=fit.micro_batch, activation_checkpointing=fit.activation_checkpointing)
        interval = learned_interval_seconds(self._ledger) if keep.save_interval == "auto" else keep.save_interval
        spec = assign(
            self._settings,
            run_id=self._run_id,
            tracker_id=str(self._ledger.learned("tracker_id") or self._run_id),
            work=self._work,
            model_dir=self._record.model_dir,
            data_dir=data_dir,
            resume_from=resume_from,
            num_steps=plan.num_steps,
            fit=fit,
            rollback=self._rollback,
            save_interval_seconds=interval,
            expect_gpu=num_gpus > 0,
        )
        trackers = self._tracker_environ()
        device = one_gpu(self._environ, num_gpus, self._display.say) if num_gpus else CPU_ENVIRON
        self._start_child(
            "train",
            spec,
            allowed=(),
            environ={**trackers, **device, "HF_HUB_OFFLINE": "1"},
            hang_seconds=keep.hang_seconds,
        )

    def _bring_kept(self) -> None:
        """What the trainer may choose from at the end, and attempts on another machine have saved."""
        evaluate, patience = self._settings.evaluate, self._settings.train.early_stopping_patience
        wants_all = evaluate.select_by == "score" or bool(evaluate.eval_prompts)
        if wants_all or patience is not None or (evaluate.select_by == "eval_loss" and self._settings.train.eval_steps):
            scratch = self._work / "mirror"
            bring_kept(self._store, self._checkpoints, scratch=scratch, only_best=not wants_all, warn=self._tell)

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
            write_text(self._store, "stacks.txt", stacks.read_text("utf-8", "replace"), self._work)
        except (JobError, OSError) as error:
            self._display.say(f"warning: the stacks are not in the store: {error}")


def _describe(fit: Fit) -> str:
    parts = [f"micro-batch {fit.micro_batch} x {fit.gradient_accumulation_steps}"]
    if fit.activation_checkpointing:
        parts.append("activations recomputed")
    if fit.activation_offloading:
        parts.append("activations in host memory")
    return ", ".join(parts)
