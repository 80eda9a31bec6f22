"""The JSON lines that a child process writes and the supervisor reads, over an inherited pipe.

One event is one line. The supervisor believes the events, and end of file, before it believes an exit status: launchers
change statuses, and a killed process writes nothing more.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

EVENTS_FD = "JOB_EVENTS_FD"
"""Environment variable with the number of the pipe's writing end."""


class Stopped(StrEnum):
    """Why an attempt ended."""

    FINISHED = "finished"
    BUDGET = "budget"
    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    CRASHED = "crashed"


class Phase(StrEnum):
    """What a trainer is busy with."""

    LOAD = "load"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SAVE = "save"
    SAMPLE = "sample"


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Progress(_Event):
    """What a stage is doing; `total` is None while it is unknown."""

    event: Literal["progress"] = "progress"
    text: str
    done: int | None = None
    total: int | None = None


class Warned(_Event):
    event: Literal["warned"] = "warned"
    text: str


class Fetched(_Event):
    """The base model lies on this machine."""

    event: Literal["fetched"] = "fetched"
    model_dir: Path
    revision: str | None
    """Commit of a Hub model; None for a local one."""


class Need(BaseModel):
    """Room that a run will take on a disk."""

    model_config = ConfigDict(frozen=True)

    setting: str
    """What moves it to another disk."""
    folder: str
    what: str
    num_bytes: int


class Checked(_Event):
    """One of the questions before a run is answered."""

    event: Literal["checked"] = "checked"
    name: str
    found: str = ""
    exit_status: int = 0
    message: str = ""
    """Why it failed."""
    needs: tuple[Need, ...] = ()
    clock_seconds: float | None = None
    """How far a server's clock is ahead of ours."""


class Loaded(_Event):
    """The model is in memory, ready to train."""

    event: Literal["loaded"] = "loaded"
    device: str
    """The GPU's name, or "cpu"."""
    num_parameters: int
    num_trainable: int
    dtype: str


class Ordered(_Event):
    """In which order the examples come, and so how many tokens all steps have together."""

    event: Literal["ordered"] = "ordered"
    num_tokens: int | None
    """None when TRAIN_ARGS draws them in an order of its own."""
    sample_seconds: float
    """How long the samples at the end will take."""


class Measured(_Event):
    """What the first micro-batch of an attempt kept."""

    event: Literal["measured"] = "measured"
    rows: int
    length: int
    """Tokens of its longest row."""
    saved_bytes: int
    """Kept by autograd from the forward pass for the backward pass."""
    peak_allocated_bytes: int | None
    """Of the first step on a GPU."""


class Stepped(_Event):
    """Some optimizer steps are done: one object of metrics.jsonl."""

    event: Literal["stepped"] = "stepped"
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    """Tokens seen since the run began, padding not counted."""
    seconds: float
    """Training time since this attempt's first step began."""
    memory_bytes: int | None = None
    """GPU memory reserved, or resident memory on a CPU."""


class Evaluated(_Event):
    event: Literal["evaluated"] = "evaluated"
    step: int
    eval_loss: float


class Saved(_Event):
    """A whole checkpoint lies in the local folder."""

    event: Literal["saved"] = "saved"
    step: int
    path: Path
    seconds: float


class Answer(BaseModel):
    """What one checkpoint says to a prompt."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    step: int
    """0 is the base model."""
    text: str
    score: float | None = None
    """0 to 1; None where nothing was expected."""
    reason: str = ""
    """Why it is not 1."""


class Answered(_Event):
    """One prompt answered by the base model and by each kept checkpoint, in order of their steps."""

    event: Literal["answered"] = "answered"
    prompt: str
    scorer: str | None = None
    answers: tuple[Answer, ...]


class Ended(_Event):
    """The last word of a trainer that ends on its own terms."""

    event: Literal["ended"] = "ended"
    stopped: Stopped
    step: int
    peak_memory_bytes: int
    """Largest GPU memory reserved, or resident memory on a CPU."""
    chosen_step: int | None = None
    """Step of the checkpoint that became the adapter; None when nothing was chosen."""
    chosen_by: str | None = None
    """eval_loss, score or last: what decided."""


class Failed(_Event):
    """The last word of a child that fails on purpose."""

    event: Literal["failed"] = "failed"
    exit_status: int
    message: str
    stopped: Stopped = Stopped.CRASHED
    phase: Phase | None = None
    """Where a trainer ran out of memory."""
    step: int | None = None
    """The last completed step when memory ran out; the step that showed that the run diverged."""
    first_step: int | None = None
    """First step of the window that diverged: a checkpoint before it is sound, and its steps are the ones to skip."""
    examples: tuple[tuple[str, int], ...] = ()
    """(source, row) of what those steps trained on, the last steps first when there are too many to name."""


Event = Annotated[
    Progress | Warned | Fetched | Checked | Loaded | Ordered | Measured | Stepped | Evaluated | Saved | Answered | Ended | Failed,
    Field(discriminator="event"),
]
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


class EventWriter:
    """Writes events to the pipe; without one, to nowhere (a stage called by hand).

    Args:
        only_last: leave out all but the last word, because another rank tells the rest.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, fd: int | None, *, only_last: bool = False) -> None:
        self._fd, self._only_last = fd, only_last
        self.shield: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered around each write: a signal's exception in the middle would tear the line."""
        self.written_at = time.monotonic()

    def write(self, event: Event) -> None:
        if self._fd is None or (self._only_last and not isinstance(event, Ended | Failed)):
            return
        line = event.model_dump_json().encode() + b"\n"
        with self.shield(), self._lock:
            while line:
                line = line[os.write(self._fd, line) :]
            self.written_at = time.monotonic()


def read_events(pipe: TextIO) -> Iterator[Event]:
    """Yield events until end of file; a last line cut short by a kill is left out."""
    for line in pipe:
        if not line.endswith("\n"):
            return
        yield _ADAPTER.validate_json(line)


def metrics_row(event: Stepped, eval_loss: float | None = None) -> dict[str, Any]:
    """The object that metrics.jsonl keeps of a step."""
    row: dict[str, Any] = json.loads(event.model_dump_json(exclude={"event", "num_steps"}))
    return row if eval_loss is None else {**row, "eval_loss": eval_loss}
