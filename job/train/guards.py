"""What watches a running trainer: reports each step, saves on time, stops on a signal, and refuses a loss that is not finite."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from job.errors import DivergedError, PreemptedError
from job.events import Evaluated, EventWriter, Saved, Stepped
from job.keep.checkpoints import discard, seal, step_name
from job.train.spec import TrainSpec


class StopSignal:
    """SIGTERM and SIGINT: at once while nothing can be lost, at the end of the step while training."""

    def __init__(self) -> None:
        self.received = False
        self.wait_for_step = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = True
        if not self.wait_for_step:
            raise PreemptedError(f"stopped by {signal.Signals(number).name}")


class Watch(TrainerCallback):
    """Steps, evaluations and checkpoints become events; time and signals become checkpoints."""

    def __init__(self, spec: TrainSpec, events: EventWriter, stop: StopSignal) -> None:
        self._spec, self._events, self._stop = spec, events, stop
        self._started = self._saved = time.monotonic()
        self.last_evaluated: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = self._saved = time.monotonic()
        self._stop.wait_for_step = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop.wait_for_step = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps, interval = self._spec.save_steps, self._spec.save_interval_seconds
        due = state.global_step % steps == 0 if steps else time.monotonic() - self._saved >= interval
        if due or self._stop.received or state.global_step >= state.max_steps:
            control.should_save = True
            control.should_log = True  # the loss is checked in on_log, which comes before the save
        if self._stop.received:
            control.should_training_stop = True
            control.should_evaluate = False  # it would come before the save, and the grace may not last

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.last_evaluated = state.global_step
            self._events.write(Evaluated(step=state.global_step, eval_loss=logs["eval_loss"]))
        if "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._events.write(
            Stepped(
                step=state.global_step,
                num_steps=state.max_steps,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=norm,
                num_tokens=int(state.num_input_tokens_seen),
                seconds=time.monotonic() - self._started,
            )
        )
        # `nan > limit` is False: test for finiteness itself.
        # In float16 a gradient that overflows is part of the method: the scaler skips the step and halves its scale.
        if not (math.isfinite(loss) and (math.isfinite(norm) or args.fp16)):
            raise DivergedError(
                f"LEARNING_RATE={self._spec.train.learning_rate}: loss {loss}, gradient norm {norm} at step "
                f"{state.global_step} is not finite; lower LEARNING_RATE, the last checkpoint before it is kept"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Turn what the Trainer wrote into a whole checkpoint: manifest last, then one rename."""
        begun = time.monotonic()
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        target = self._spec.checkpoints_dir / step_name(state.global_step)
        (written / "README.md").unlink(missing_ok=True)  # peft's card, with this machine's path in it
        seal(written, state.global_step)
        discard(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        written.rename(target)
        self._saved = time.monotonic()
        self._events.write(Saved(step=state.global_step, path=str(target), seconds=self._saved - begun))


def saved_step(checkpoint: Path | None) -> int:
    """The optimizer step that a checkpoint holds; 0 without one."""
    if checkpoint is None:
        return 0
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return int(state["global_step"])


def clear_scratch(folder: Path) -> None:
    """Remove what a killed attempt left half written."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
