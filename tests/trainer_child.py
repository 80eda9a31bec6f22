"""The trainer as the supervisor starts it: a process of its own, a specification, events over a pipe, real signals.

The processes are forked from a server that has imported torch already: each would need five seconds for that.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datasets import Dataset

from job import child
from job.events import EVENTS_FD, Ended, Evaluated, Event, Failed, Saved, Stepped, read_events
from job.keep.checkpoints import check, local_steps, step_name
from job.settings import EvaluateSettings, LoraSettings, ModelSettings, TrainSettings
from job.train.spec import TrainSpec

ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
os.environ.update(ENVIRON)  # the server inherits them, and the libraries read them when it imports them
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["job.train.trainer", "job.child"])

NUM_EXAMPLES = 26
"""With 8 to a step: epochs of 4 steps, the last one of 2 examples."""


def write_data(folder: Path) -> Path:
    """A prepared set of short examples of different lengths, some held out."""
    for name, first, count in (("train", 0, NUM_EXAMPLES), ("eval", 1000, 5)):
        rows = []
        for number in range(first, first + count):
            ids = [10 + (number * 7 + place * 3) % 200 for place in range(12 + number % 9)]
            rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:], "source": "made.jsonl", "row": number})
        Dataset.from_list(rows).save_to_disk(str(folder / name))
    return folder


def _run(stage: str, file: Path, printed: Path, events: Connection, stdin: Connection, environ: dict[str, str]) -> None:
    """What `python -m job.child STAGE` does."""
    os.setpgid(0, 0)
    os.environ.update(environ, **{EVENTS_FD: str(events.fileno())})
    with printed.open("w") as file_of_output:
        os.dup2(file_of_output.fileno(), 1)
        os.dup2(file_of_output.fileno(), 2)
    os.dup2(stdin.fileno(), 0)
    sys.stdin = os.fdopen(0)  # multiprocessing closed it
    os._exit(child.main(stage, file))


class Attempt:
    """One trainer process; its events as they come."""

    def __init__(self, spec: TrainSpec, folder: Path, environ: dict[str, str], stage: str = "train") -> None:
        rank = environ.get("RANK", "0")
        self.spec, self.events = spec, list[Event]()
        self._changed = threading.Condition()
        file = folder / f"train-{rank}.json"
        file.write_text(spec.model_dump_json(), "utf-8")
        self._printed = folder / f"printed-{rank}.txt"
        events, writer = _server.Pipe(duplex=False)
        stdin, self._alive = _server.Pipe(duplex=False)
        self.process = _server.Process(target=_run, args=(stage, file, self._printed, writer, stdin, environ))
        self.process.start()
        writer.close()
        stdin.close()
        self._reader = threading.Thread(target=self._read, args=(os.dup(events.fileno()),), daemon=True)
        events.close()
        self._reader.start()

    def _read(self, reader: int) -> None:
        with os.fdopen(reader, encoding="utf-8") as pipe:
            for event in read_events(pipe):
                with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, is_it: Callable[[Event], bool], seconds: float = 120) -> Event:
        """The first event that is it."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                for event in self.events:
                    if is_it(event):
                        return event
                assert self._reader.is_alive(), f"ended without it: {self.end()}"
                assert time.monotonic() < deadline, f"waited in vain: {self.events[-3:]}"
                self._changed.wait(1.0)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda event: isinstance(event, Stepped) and event.step >= step)

    def end(self, seconds: float = 120) -> tuple[int, Event | None, str]:
        """Wait for the end; returns (exit status, last event, what was printed)."""
        self.process.join(seconds)
        self._reader.join(seconds)
        self._alive.close()  # not before: the child would end with it
        status, last = self.process.exitcode, self.events[-1] if self.events else None
        assert status is not None, f"still runs; {last}"
        return status, last, f"{self._printed.read_text('utf-8')}{last}"

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stop(self) -> Ended:
        """SIGTERM, and what it says last."""
        self.signal(signal.SIGTERM)
        status, last, output = self.end()
        assert status == 75, output
        assert isinstance(last, Ended | Failed), output
        assert last.stopped == "preempted"
        return last  # type: ignore[return-value]

    @property
    def losses(self) -> dict[int, tuple[float, float, float, int]]:
        return {e.step: (e.loss, e.grad_norm, e.learning_rate, e.num_tokens) for e in self.events if isinstance(e, Stepped)}

    @property
    def evaluations(self) -> dict[int, float]:
        return {e.step: e.eval_loss for e in self.events if isinstance(e, Evaluated)}

    @property
    def saved(self) -> list[Saved]:
        return [event for event in self.events if isinstance(event, Saved)]


class Training:
    """A run in a folder of its own, which any number of attempts continue."""

    def __init__(self, folder: Path, model: Path, data: Path, **options: Any) -> None:
        self.folder, self._model, self._data, self._options = folder, model, data, options
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *, fault: str = "", environ: dict[str, str] | None = None, stage: str = "train", **changes: Any) -> Attempt:
        """Continue from the newest checkpoint, or begin."""
        return Attempt(self.spec(**changes), self.folder, {"JOB_FAULT": fault, **(environ or {})}, stage)

    def spec(self, **changes: Any) -> TrainSpec:
        """What the next attempt is told."""
        options = {**self._options, **changes}
        train = {"learning_rate": 0.01, "warmup_steps": 2, **options.pop("train", {})}
        lora = {"lora_dropout": 0.1, **options.pop("lora", {})}
        newest = local_steps(self.checkpoints)
        return TrainSpec(
            **{
                "model": ModelSettings(**{"model_id": str(self._model), **options.pop("model", {})}),
                "lora": LoraSettings(**lora),
                "train": TrainSettings(**train),
                "evaluate": EvaluateSettings(**{"eval_max_new_tokens": 4, **options.pop("evaluate", {})}),
                "system_prompt": None,
                "model_dir": self._model,
                "data_dir": self._data,
                "checkpoints_dir": self.checkpoints,
                "adapter_dir": self.folder / "adapter",
                "scratch_dir": self.folder / "trainer",
                "resume_from": self.checkpoints / step_name(newest[0]) if newest else None,
                "micro_batch": 2,
                "gradient_accumulation_steps": 4,
                "num_steps": 14,
                "save_interval_seconds": 1e6,
                "save_steps": None,
                "expect_gpu": False,
                **options,
            }
        )

    def run(self, **options: Any) -> Attempt:
        """An attempt that is to reach the end."""
        attempt = self.start(**options)
        status, last, output = attempt.end()
        assert status == 0, output
        assert isinstance(last, Ended) and last.stopped == "finished"
        return attempt

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of whole checkpoints, each checked; anything else in the folder is half of one."""
        steps = sorted(local_steps(self.checkpoints))
        assert [path.name for path in sorted(self.checkpoints.glob("*"))] == [step_name(step) for step in steps]
        for step in steps:
            assert check(self.checkpoints / step_name(step)).step == step
        return steps

    def state(self, step: int) -> dict[str, Any]:
        text = (self.checkpoints / step_name(step) / "trainer_state.json").read_text("utf-8")
        state: dict[str, Any] = json.loads(text)
        return state

    def adapter(self) -> str:
        return sha256((self.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses_of(attempts: Iterable[Attempt]) -> dict[int, tuple[float, float, float, int]]:
    """Losses of all attempts; a step that was done twice counts as it was done last."""
    return {step: values for attempt in attempts for step, values in attempt.losses.items()}
