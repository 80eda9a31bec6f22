"""The trainer's callback: steps, evaluations and checkpoints become events; time, signals and losses decide what comes next.

Of several ranks the first saves, and its signals stop the run at once: what it holds after a step, all of them hold. A signal to
another one is told to all with the losses of its next step. With weights that are shared among the ranks (fsdp), all stop so.
"""

import math
import time
from statistics import fmean
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from job.events import Evaluated, EventWriter, Phase, Progress, Saved, Stepped
from job.train.faults import Faults
from job.train.guards import DivergenceError, LossGuard
from job.train.preempt import StoppedError, StopSignal
from job.train.ranks import Ranks
from job.train.spec import TrainSpec
from job.train.state import OURS, Snapshot, save_checkpoint, saved_state, take_rng

BEAT_SECONDS = 10.0
"""A micro-batch that ends this long after the last event is told. No timer does it: what hangs must be silent."""


class Watch(TrainerCallback):
    """Knows the last completed step, and can save it whenever the run is stopped.

    Attributes:
        trainer: set once it is built, which needs its callbacks first.
        phase: what the trainer is busy with.
        step: the last completed one, of this attempt or of the checkpoint.
        is_updating: in the optimizer's step, when weights may be half updated.
        evaluations: held-out loss by step, of earlier attempts too.
    """

    def __init__(
        self, spec: TrainSpec, events: EventWriter, stop: StopSignal, faults: Faults, ranks: Ranks | None = None
    ) -> None:
        self._spec, self._events, self._stop, self._faults = spec, events, stop, faults
        self.ranks = ranks or Ranks()
        self._all_stop = False
        self.trainer: Any = None
        self.phase, self.is_updating = Phase.LOAD, False
        self.step, self.evaluations = 0, dict[int, float]()
        strategy = spec.train.train_args.get("train_sampling_strategy", "random")
        self._guard = LossGuard(has_scaler=False, is_shuffled=spec.is_shuffled and strategy == "random")
        if spec.resume_from is not None:
            state = saved_state(spec.resume_from)
            ours = state.stateful_callbacks[OURS]
            self.step = state.global_step
            self.evaluations = {int(step): loss for step, loss in ours["evaluations"].items()}
            self._guard.load(ours["guard"])
        self._snapshot: Snapshot | None = None
        self._saved_step, self._is_due = self.step, False
        self._started = self._saved_at = time.monotonic()
        self.last: Stepped | None = None
        self._losses: list[float] = []
        """Of the steps since the last Stepped event."""
        self._grad_norm = self._learning_rate = 0.0

    def lacks_evaluation(self) -> bool:
        """Whether the last attempt ended between a step and its evaluation."""
        every = self._spec.train.eval_steps
        return every is not None and self.step > 0 and self.step % every == 0 and self.step not in self.evaluations

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss, the earliest of equals; the untrained model does not count."""
        trained = [(loss, step) for step, loss in self.evaluations.items() if step > 0]
        return min(trained)[1] if trained else None

    @property
    def has_stopped_early(self) -> bool:
        """Whether the last EARLY_STOPPING_PATIENCE evaluations brought no lower loss."""
        patience, best = self._spec.train.early_stopping_patience, self.best_step
        return patience is not None and best is not None and sum(step > best for step in self.evaluations) >= patience

    def beat(self, text: str) -> None:
        if time.monotonic() - self._events.written_at > BEAT_SECONDS:
            self._events.write(Progress(text=text))

    # What follows is called by the Trainer, in this order.

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._guard.has_scaler = self.trainer.accelerator.scaler is not None
        self.phase = Phase.TRAIN
        self._started = self._saved_at = time.monotonic()
        if self.ranks.are_several and (not self.ranks.is_first or self._spec.parallel == "fsdp"):
            self._stop.hold()  # the first one may still need this one, for what it has begun or for its share of the weights
        self._stop.begin_steps()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop.check()
        self.ranks.throw_dice(args.seed, state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop.check()
        self.beat(f"in step {state.global_step + 1}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge the step before it is applied: what is saved later is never of a diverged step."""
        if not self.trainer.is_skipping:
            loss, self._grad_norm = self._agree(*self.trainer.take_loss_and_norm())
            self._learning_rate = float(self.trainer.lr_scheduler.get_last_lr()[0])
            self._guard.check(state.global_step + 1, loss, self._grad_norm)
            self._losses.append(loss)
        self._stop.hold()
        self.is_updating = True

    def _agree(self, loss: float, norm: float) -> tuple[float, float]:
        """The step's loss and gradient norm over all ranks; on the way they tell each other who was stopped and what is due.

        The norm is that of summed gradients, so every rank has the same; the first one's word counts, to the last bit.
        """
        if not self.ranks.are_several:
            return loss, norm
        is_first = float(self.ranks.is_first)
        words = [loss, norm * is_first, float(self._stop.received is not None), self._is_time_to_save() * is_first]
        loss, norm, num_stopped, num_due = self.ranks.total(words, self.trainer.args.device)
        self._all_stop, self._is_due = num_stopped > 0, self._is_due or num_due > 0
        return loss / self.ranks.num, norm

    def _is_time_to_save(self) -> bool:
        return not self._spec.save_steps and time.monotonic() - self._saved_at >= self._spec.save_interval_seconds

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._faults.strike("update", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        state.num_input_tokens_seen -= self.trainer.filler_tokens(self.step)
        self._snapshot = Snapshot(
            step=state.global_step,
            epoch=state.epoch,
            num_tokens=state.num_input_tokens_seen,
            num_flos=state.total_flos + self.trainer.current_flos,
            rng=take_rng(),
            guard=self._guard.state(),
        )
        self.is_updating = False
        if (measured := self.trainer.gauge.take()) is not None:
            self._events.write(measured)
        steps = self._spec.save_steps
        if (steps and state.global_step % steps == 0) or (not self.ranks.are_several and self._is_time_to_save()):
            self._is_due = True
        is_last = state.global_step >= state.max_steps
        if is_last or (self._is_due and not self._guard.is_suspicious):
            control.should_save = control.should_log = True
        if self._all_stop:
            raise StoppedError
        self._stop.release()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._report()
        if "eval_loss" not in logs:
            return
        loss = float(logs["eval_loss"])
        if not math.isfinite(loss):
            raise DivergenceError(f"the held-out loss is {loss}", first_step=self.step, step=self.step)
        with self._stop.shielded():
            self.evaluations[self.step] = loss
            self._events.write(Evaluated(step=self.step, eval_loss=loss))
        if self._snapshot is None:
            return
        if self.best_step == self.step and self._spec.evaluate.select_by != "last":
            control.should_save = True  # or the best one would not exist
        if self._spec.train.early_stopping_patience is not None:
            control.should_save = True
            control.should_training_stop = self.has_stopped_early

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop.check()
        self._faults.strike("eval", self.step)
        self.beat(f"evaluating after step {self.step}")

    # What follows is called by the trainer and by the process that runs it.

    def save(self) -> None:
        """Write the last completed step as a checkpoint, unless it is on the disk already; a signal waits."""
        snapshot, phase = self._snapshot, self.phase
        if snapshot is None or snapshot.step == self._saved_step:
            return
        begun = time.monotonic()
        with self._stop.shielded():
            self.phase = Phase.SAVE
            self._faults.strike("save", snapshot.step)
            self._report()
            path = save_checkpoint(
                self.trainer,
                snapshot,
                self.evaluations,
                scratch=self._spec.scratch_dir,
                folder=self._spec.checkpoints_dir,
            )
            self._saved_at, self._saved_step, self._is_due = time.monotonic(), snapshot.step, False
            if path is not None:
                self._events.write(Saved(step=snapshot.step, path=path, seconds=self._saved_at - begun))
            self.phase = phase

    def _report(self) -> None:
        """Write one event for the steps since the last one; none when all of them were skipped."""
        if not self._losses or self._snapshot is None:
            return
        losses, self._losses = self._losses, []
        self.last = Stepped(
            step=self._snapshot.step,
            num_steps=self._spec.num_steps,
            loss=fmean(losses),
            learning_rate=self._learning_rate,
            grad_norm=self._grad_norm,
            num_tokens=self._snapshot.num_tokens,
            seconds=time.monotonic() - self._started,
            memory_bytes=_memory_bytes(),
        )
        self._events.write(self.last)


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)
