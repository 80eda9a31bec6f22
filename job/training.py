"""Prepared data in, a trained adapter out: the trainer is started from the newest whole checkpoint until it has finished.

What a trainer cannot do about its own end is done here: after running out of memory it is started again with a leaner layout,
after a divergence from a sound checkpoint with a lower learning rate, after a hang once more. What was learned about memory and
divergence goes into the ledger, so an attempt on another machine starts there.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from job.assignment import assign, rank_environs
from job.deliver.finish import ADAPTER
from job.deliver.record import Record
from job.display import Display
from job.errors import JobError, NetworkError, PreemptedError
from job.events import Ended, Evaluated, Event, Saved, Stepped, Stopped
from job.foresight import Foresight
from job.keep.budget import Budget
from job.keep.checkpoints import drop_after, restore_latest
from job.keep.interval import learned_interval_seconds
from job.keep.kept import bring_kept
from job.keep.ledger import Ledger
from job.keep.mirror import Mirror
from job.keep.store import Store
from job.lookout import Lookout
from job.orders import Order, find_left, give_order, new_id
from job.plan.forecast import Plan
from job.plan.hardware import find_devices
from job.plan.nodes import Nodes
from job.plan.retreat import Fit
from job.recovery import Recovery
from job.settings import Settings
from job.stopping import LAST_SECONDS, StopRequest
from job.supervise import ChildFailedError
from job.train.trackers import TRACKERS, TrackerFiles, new_tracker_id, tracker_environ

LEFT_SECONDS = 15.0
"""How long the trainer may take to save after another machine has left, if it notices at all."""

StartChild = Callable[..., None]


class Training:
    """The train stage of one attempt.

    Args:
        nodes: how its processes are spread over machines, of which this is the first.
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
        nodes: Nodes,
    ) -> None:
        self._settings, self._store, self._work, self._environ = settings, store, work, environ
        self._run_id = run_id
        self._display, self._stop, self._record, self._ledger = display, stop, record, ledger
        self._budget, self._foresight, self._start_child = budget, foresight, start_child
        self._nodes = nodes
        self._checkpoints = work / "checkpoints"
        self._tracker_files = TrackerFiles(store, work / TRACKERS, work / "mirror")
        self._mirror = self._new_mirror()
        self._num_steps = 0
        self._recovery = Recovery(
            settings, store=store, work=work, display=display, record=record, ledger=ledger, rewind=self._rewind
        )
        self._is_trained = False  # all steps are done: what is left is cheap, and is not lost to the budget

    def run(self, data_dir: Path, plan: Plan) -> None:
        """Train to the last step.

        Raises:
            ChildFailedError: the trainer ended otherwise, and starting it again would not help.
        """
        gpus = find_devices(self._environ)
        if not gpus:
            self._display.say("warning: no GPU found; training on the CPU is slow")
        fit, self._num_steps = self._recovery.first_fit(plan), plan.num_steps
        while True:
            try:
                self._start(data_dir, plan, fit, num_gpus=len(gpus))
                break
            except ChildFailedError as failure:
                if self._is_trained and failure.stopped is Stopped.BUDGET:  # asked for while it did the last step
                    continue
                self._raise_if_stopped(failure)
                with self._stop.at_once():
                    fit = self._recovery.next_fit(failure, fit, has_gpu=bool(gpus))
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

    def _rewind(self, last_step: int) -> None:
        """Delete the checkpoints after this step; nothing may be uploading what is deleted."""
        try:
            self._mirror.finish(self._settings.keep.grace_seconds)
        except NetworkError as error:
            self._display.say(f"warning: {error}")
        drop_after(self._store, self._checkpoints, last_step)
        self._mirror = self._new_mirror()

    def _start(self, data_dir: Path, plan: Plan, fit: Fit, *, num_gpus: int) -> None:
        keep = self._settings.keep
        with self._stop.at_once():
            resume_from = restore_latest(self._store, self._checkpoints, lambda text: self._display.say(f"warning: {text}"))
            self._bring_kept()
            if "trackio" in self._settings.train.report_to:
                self._tracker_files.restore()
            if self._settings.train.report_to and self._ledger.learned("tracker_id") is None:
                self._recovery.note("tracker_id", new_tracker_id(self._run_id))
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
            rollback=self._recovery.rollback,
            save_interval_seconds=interval,
            expect_gpu=num_gpus > 0,
            order_id=self._order(plan, fit, first_step) if self._nodes.num_nodes > 1 else "",
        )
        trackers = self._tracker_environ()
        start: Callable[..., None] = partial(
            self._start_child,
            "train",
            spec,
            allowed=(),
            environ={**trackers, "HF_HUB_OFFLINE": "1"},
            hang_seconds=keep.hang_seconds,
            ranks=rank_environs(self._nodes, self._environ, num_gpus=num_gpus, warn=self._display.say),
        )
        if self._nodes.num_nodes == 1:
            start()
        else:
            self._start_with_others(start)

    def _start_with_others(self, start: Callable[..., None]) -> None:
        """Other machines take part; without one of them nothing goes on, here neither.

        Raises:
            ChildFailedError: as the trainer does; that another machine is gone is a reason to start all of them again.
        """
        lookout = Lookout(lambda: bool(find_left(self._store)))
        try:
            with lookout:
                start(is_pointless=lambda: lookout.has_seen and lookout.seconds_since > LEFT_SECONDS)
        except ChildFailedError as failure:
            if failure.stopped is not Stopped.CRASHED or self._stop.is_asked():
                raise
            error = PreemptedError(f"another machine of this run has left ({failure.error}); start all again to continue")
            raise ChildFailedError(error, Stopped.PREEMPTED, failed=failure.failed) from failure

    def _order(self, plan: Plan, fit: Fit, first_step: int) -> str:
        """Have the other machines start too; returns the order's name."""
        order = Order(
            id=new_id(), resume_step=first_step or None, num_steps=plan.num_steps, fit=fit, rollback=self._recovery.rollback
        )
        with self._stop.at_once():
            if first_step:
                self._mirror.settle(first_step)  # it may be on this disk only
            give_order(self._store, order, self._work)
        return order.id

    def _bring_kept(self) -> None:
        """What the trainer may choose from at the end, and attempts on another machine have saved."""
        evaluate, patience = self._settings.evaluate, self._settings.train.early_stopping_patience
        wants_all = evaluate.select_by == "score" or bool(evaluate.eval_prompts)
        if wants_all or patience is not None or (evaluate.select_by == "eval_loss" and self._settings.train.eval_steps):
            scratch = self._work / "mirror"
            bring_kept(self._store, self._checkpoints, scratch=scratch, only_best=not wants_all, warn=self._recovery.tell)

    def _raise_if_stopped(self, failure: ChildFailedError) -> None:
        """A run that would have gone on but for a signal or the budget is stopped, and not out of memory, diverged or hung."""
        if not self._stop.is_asked():
            return
        if failure.stopped in (Stopped.OUT_OF_MEMORY, Stopped.DIVERGED) or failure.has_hung:
            error = self._stop.error(f"before it: {failure.error}")
            raise ChildFailedError(error, self._stop.stopped, failed=failure.failed) from failure
        raise failure
