"""What the trainer logs in, the same at each tracker of REPORT_TO out.

Each tracker works in a thread of its own: one that fails is told once and left behind, one that hangs is waited for only at the
end and only so long, and a signal never stops in the middle of one. What a curve has already is not sent again.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from job.events import Stepped
from job.settings import is_hub_id
from job.train.sinks import SINKS, Sink, Tracked
from job.train.spec import TrainSpec
from job.train.trackers import PROJECT

FINISH_SECONDS = 20.0
"""For what is left to be sent after the last step: less than a minute of GPU is worth more than the end of a curve."""
STOP_SECONDS = 2.0
"""The same when the machine goes away: RunPod gives some seconds in all."""
_OF_THE_ATTEMPT = ("train_runtime", "train_loss", "train_samples_per_second", "train_steps_per_second", "total_flos")
"""In the Trainer's last row; of a run that was resumed they tell nothing."""


class Curves(TrainerCallback):
    """The trackers of one attempt.

    Args:
        warn: told, in the main thread, when a tracker fails; called a few times at most.
    """

    def __init__(self, spec: TrainSpec, warn: Callable[[str], None]) -> None:
        self._warn, self._last_step = warn, _first_step(spec)
        self._lines = [_Line(name, SINKS[name](), _tracked(spec)) for name in spec.train.report_to]

    def close(self, *, is_finished: bool, last: Stepped | None = None) -> bool:
        """Wait until everything is sent, for a while; nothing is to be logged any more.

        Args:
            is_finished: the run has ended, and no other attempt continues it.
            last: of the last completed step, which the Trainer has not logged when a signal came right after it.

        Returns:
            Whether the process may end as usual: a library that still works would hold it up.
        """
        if last is not None and last.step > self._last_step:
            row = {"loss": last.loss, "grad_norm": last.grad_norm, "learning_rate": last.learning_rate}
            self._add(row, last.step)
        deadline = time.monotonic() + (FINISH_SECONDS if is_finished else STOP_SECONDS)
        for line in self._lines:
            line.end(is_finished=is_finished)
        for line in self._lines:
            line.wait(deadline - time.monotonic())
        self._tell()
        return not any(line.is_busy for line in self._lines)

    # What follows is called by the Trainer.

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        row = {name: float(value) for name, value in (logs or {}).items() if name not in _OF_THE_ATTEMPT}
        if "loss" in row or any(name.startswith("eval_") for name in row):
            self._add(row, state.global_step)
        self._tell()

    def _add(self, row: Mapping[str, float], step: int) -> None:
        if "loss" in row:
            self._last_step = step
        for line in self._lines:
            line.add(row, step)

    def _tell(self) -> None:
        for line in self._lines:
            while line.told:
                self._warn(line.told.pop(0))


class _Line:
    """One tracker's thread, which begins with the first row."""

    def __init__(self, name: str, sink: Sink, run: Tracked) -> None:
        self._name, self._sink, self._run = name, sink, run
        self.told: list[str] = []
        """To be said by the main thread: a word after the process's last one would be taken for it."""
        self._rows: queue.SimpleQueue[tuple[Mapping[str, float], int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_finished = self._has_failed = False

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def add(self, row: Mapping[str, float], step: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        if self.is_busy:
            self._rows.put((row, step))

    def end(self, *, is_finished: bool) -> None:
        self._is_finished = is_finished
        self._rows.put(None)

    def wait(self, seconds: float) -> None:
        if self._thread is None:
            return
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive() and not self._has_failed:
            self.told.append(f"REPORT_TO={self._name}: does not take the last rows in time; they are in metrics.jsonl of the run")

    def _work(self) -> None:
        try:
            last_step = self._sink.open(self._run)
        except (Exception, SystemExit) as error:
            self._fail("gets no curve from this attempt", error)
            return
        while (item := self._rows.get()) is not None:
            row, step = item
            if step < last_step or (step == last_step and "loss" in row):
                continue  # a step that is done again
            try:
                self._sink.log(row, step)
            except (Exception, SystemExit) as error:
                self._fail(f"did not take step {step}", error)
        try:
            self._sink.close(is_finished=self._is_finished)
        except (Exception, SystemExit) as error:
            self._fail("did not take the end", error)

    def _fail(self, what: str, error: BaseException) -> None:
        if not self._has_failed:
            self._has_failed = True
            text = " ".join(str(error).split())[:300]
            self.told.append(
                f"REPORT_TO={self._name}: {what} ({type(error).__name__}: {text}); the training goes on, and metrics.jsonl of "
                "the run has everything"
            )


def _first_step(spec: TrainSpec) -> int:
    return int(spec.resume_from.name.removeprefix("step-")) if spec.resume_from else 0


def _tracked(spec: TrainSpec) -> Tracked:
    arguments = spec.train.train_args
    return Tracked(
        id=spec.tracker_id or spec.run_id,
        name=str(arguments.get("run_name") or spec.run_id),
        project=str(arguments.get("project") or PROJECT),
        folder=spec.trackers_dir or spec.scratch_dir / "trackers",
        config=_config(spec),
        first_step=_first_step(spec),
    )


def _config(spec: TrainSpec) -> dict[str, Any]:
    """The settings that make the result, and the layout; what lies on this machine goes by its name alone."""
    settings = {
        **spec.model.model_dump(mode="json"),
        **spec.lora.model_dump(mode="json"),
        **spec.train.model_dump(mode="json", exclude={"train_args", "report_to"}),
        **spec.train.train_args,
        "max_steps": spec.num_steps,
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
    }
    named = {name: _without_folders(value) for name, value in settings.items() if value is not None}
    return {**named, "model_id": spec.model.model_id if is_hub_id(spec.model.model_id) else Path(spec.model.model_id).name}


def _without_folders(value: Any) -> Any:
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or ("/" in value and Path(value).exists())):
        return Path(value).name
    if isinstance(value, Mapping):
        return {name: _without_folders(inside) for name, inside in value.items()}
    return [_without_folders(inside) for inside in value] if isinstance(value, (list, tuple)) else value
