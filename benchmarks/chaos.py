"""A run that is killed, stopped, cut off from its store and robbed of checkpoints ends with an undisturbed run's adapter.

    python benchmarks/chaos.py [--kills 50] [--seed 7] [--json FILE]

The real command trains a tiny model on the CPU, with OUTPUT_URI on an S3 server behind a proxy. Each event strikes in a chosen
phase, at a random moment that what the job prints or stores leads to; after each the job is started anew in an empty folder,
as on another machine. When a run has met an event in every phase it is left to finish, and the next one begins. Claimed, each
time:

- The exit status is the event's own: 75 after SIGTERM or with the store away, 5 when the trainer alone was killed.
- No process is left over, and every checkpoint in the store that has a manifest is whole.
- The next start continues from the newest whole checkpoint in the store.
- SIGKILL loses the steps since the last save, SAVE_STEPS at most, and those that were saved and not yet in the store.
- SIGTERM and the trainer's death lose nothing that was done, or saved, while the store answers.
- In the end the adapter's sha256, and the loss, gradient norm, rate and tokens of every step are those of the undisturbed run.

Memory that runs out and losses that are not finite change the course on purpose, so they have runs of their own. After the first
the losses agree within 1e-3 (without dropout, whose masks depend on the micro-batch); after the second the run ends with finite
ones. Prints a table and a line of JSON; the status is 1 when a claim does not hold. 50 events take about a quarter of an hour
on two cores. What is not covered: GPUs, several ranks.
"""

import argparse
import hashlib
import json
import math
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # run as a file, from anywhere

import psutil  # noqa: E402
from conftest import Job, small_run, write_conversations, write_tiny_model  # noqa: E402
from fault_proxy import ALWAYS, Fault  # noqa: E402
from s3_server import BUCKET, KEYS, S3Server, s3_server  # noqa: E402

RUN_ID = "r"
NUM_STEPS, SAVE_STEPS, EVAL_STEPS = 160, 5, 10
COURSE = {
    "EFFECTIVE_BATCH_SIZE": "8",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "4",
    "LORA_DROPOUT": "0.1",
    "LEARNING_RATE": "0.002",
    "NUM_TRAIN_EPOCHS": "300",
    "EVAL_FRACTION": "0.2",
    "EVAL_STEPS": str(EVAL_STEPS),
    "SAVE_STEPS": str(SAVE_STEPS),
    "GRACE_SECONDS": "60",
}
BEFORE, TRAINING, AFTER = ("fetch", "prepare", "load"), ("train", "evaluate", "save", "upload"), "deliver"
OUTAGES, DAMAGES = ("refused", "reset", "503", "slow"), ("truncated", "flipped bit", "deleted file", "no manifest")
KINDS = {
    **dict.fromkeys(BEFORE, ("kill", "term", "trainer killed", "refused", "reset", "503")),
    **dict.fromkeys(TRAINING, ("kill", "term", "trainer killed", *OUTAGES, *DAMAGES)),
    AFTER: ("kill", "term", "refused", "kill", "503", "term"),
}
WAIT_SECONDS = 240.0


@dataclass(kw_only=True)
class Event:
    """What happens, and when: in this phase, so many steps after the start, then after a delay."""

    kind: str
    phase: str
    steps: int = 0
    delay_seconds: float = 0.0
    outage_seconds: float = 2.0
    fault: str = ""
    """JOB_FAULT of the attempt: one that hangs at a step makes the moment exact."""
    stored: int = 0
    """Wait until a checkpoint of this step is in the store."""
    hold: str = ""
    """A part of the name that is being stored when it happens, and does not get through."""


@dataclass(kw_only=True)
class Row:
    event: str
    phase: str
    status: int = 0
    reached: int | None = None
    saved: int | None = None
    """Newest checkpoint that the trainer had finished, or had started from."""
    stored: int = 0
    """Newest whole checkpoint in the store after the event."""
    resumed: int | None = None
    lost: int | None = None
    seconds: float = 0.0
    is_missed: bool = False
    """The job was done before the moment came."""
    problems: list[str] = field(default_factory=list)

    def claim(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            self.problems.append(otherwise)

    def __str__(self) -> str:
        numbers = (self.status, self.reached, self.saved, self.stored, self.resumed, self.lost)
        cells = "".join(f"{'-' if number is None else number:>8}" for number in numbers)
        remark = "; ".join([*(["too late"] if self.is_missed else []), *self.problems])
        return f"{self.event:22} {self.phase:9}{cells}{self.seconds:8.1f}  {remark}".rstrip()


HEADER = f"{'event':22} {'phase':9}" + "".join(
    f"{name:>8}" for name in ("status", "reached", "saved", "stored", "resumed", "lost", "seconds")
)


class Attempt:
    """One process of the job, and what it has printed so far."""

    def __init__(self, job: Job, work: Path, fault: str) -> None:
        self.work = work
        self.process = job.start("run", WORK_DIR=str(work), JOB_FAULT=fault)
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.saved: list[int] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith('{"step"'):
                self.steps.append(json.loads(line)["step"])
            elif found := re.match(r"step (\d+): checkpoint saved", line):
                self.saved.append(int(found[1]))

    def has_said(self, words: str) -> bool:
        return any(line.startswith(words) for line in list(self.lines))

    def wait_for(self, is_it: Callable[[], object]) -> bool:
        """False when the process ended before."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_it():
            if self.process.poll() is not None:
                return bool(is_it())
            if time.monotonic() > deadline:
                self.kill_everything()
                raise TimeoutError(f"waited in vain; the last lines: {self.lines[-5:]}")
            time.sleep(0.003)
        return True

    def kill_everything(self) -> None:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            for process in [first, *first.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def kill_stage(self) -> None:
        """Kill the process of the stage that is under way: the trainer, when it trains."""

        def kill_one() -> bool:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(self.process.pid).children():
                    if "job.child" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                        process.kill()
                        return True
            return False

        self.wait_for(kill_one)

    def end(self) -> int:
        try:
            status = self.process.wait(WAIT_SECONDS)
        except BaseException:
            self.kill_everything()
            raise
        self._reader.join(15.0)
        return status

    def left_over(self) -> list[int]:
        """Processes of this attempt that still live, after some time to end themselves."""

        def alive() -> list[int]:
            found = []
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.environ().get("WORK_DIR") == str(self.work) and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process.pid)
            return found

        deadline = time.monotonic() + 15.0
        while (found := alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


class Series:
    """One run and the events that it meets."""

    def __init__(
        self, name: str, server: S3Server, folder: Path, settings: Mapping[str, str], tell: Callable[[str], None] = print
    ) -> None:
        self.name, self._server, self._tell = name, server, tell
        self._folder, self._num_starts = folder / name, 0
        self._settings = {**settings, "OUTPUT_URI": f"s3://{BUCKET}/{name}", "RUN_ID": RUN_ID}
        self._job = Job(self._folder, self._settings)
        self.num_steps = int(settings["MAX_STEPS"])
        self.rows: list[Row] = []
        self._pending: list[Row] = []
        """Rows whose run was not continued yet."""
        self._damaged: set[int] = set()
        self._expected: int = 0

    # What lies in the store, read past the proxy.

    def names(self) -> list[str]:
        prefix = f"{self.name}/{RUN_ID}/"
        return [name.removeprefix(prefix) for name in self._server.names(prefix)]

    def read(self, name: str) -> bytes:
        body: bytes = self._server.client.get_object(Bucket=BUCKET, Key=f"{self.name}/{RUN_ID}/{name}")["Body"].read()
        return body

    def steps(self) -> list[int]:
        """Of the checkpoints with a manifest, newest first."""
        found = (re.fullmatch(r"checkpoints/step-(\d+)/manifest\.json", name) for name in self.names())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def broken_files(self, folder: str) -> list[str]:
        files = json.loads(self.read(f"{folder}/manifest.json"))["files"]
        there = set(self.names())
        good = {
            name
            for name, entry in files.items()
            if f"{folder}/{name}" in there and hashlib.sha256(self.read(f"{folder}/{name}")).hexdigest() == entry["sha256"]
        }
        return sorted(files.keys() - good)

    def attempts(self) -> list[str]:
        """Names of the ledger's records, oldest first."""
        return sorted(name for name in self.names() if name.startswith("attempts/"))

    def last_attempt(self) -> dict[str, Any]:
        attempt: dict[str, Any] = json.loads(self.read(names[-1])) if (names := self.attempts()) else {}
        return attempt

    def metrics(self) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in self.read("metrics.jsonl").splitlines()]
        return [{name: value for name, value in row.items() if name not in ("seconds", "memory_bytes")} for row in rows]

    def adapter(self) -> str:
        return hashlib.sha256(self.read("adapter/adapter_model.safetensors")).hexdigest()

    # What happens.

    def strike(self, event: Event) -> Row:
        """Start the job, let the event happen, and judge what is left."""
        row = Row(event=event.kind, phase=event.phase)
        self._server.proxy.clear()
        if event.phase == "upload":
            self._server.proxy.delay_seconds = 0.03
        if event.hold:
            self._server.proxy.add(Fault(kind="hang", method="PUT", path=event.hold, seconds=WAIT_SECONDS))
        begun, num_attempts = time.monotonic(), len(self.attempts())
        attempt = self.start(event.fault or self._brake(event))
        row.is_missed = not attempt.wait_for(lambda: self._is_moment(event, attempt))
        time.sleep(event.delay_seconds)
        is_done_before = attempt.process.poll() is not None
        status, expected = self._act(event, attempt)
        row.is_missed |= is_done_before
        row.status, row.seconds = status, time.monotonic() - begun
        row.claim(not (left := attempt.left_over()), f"processes {left} are left over")
        self._settle()
        self._judge(row, event, attempt, expected, is_new=len(self.attempts()) > num_attempts)
        if event.kind in DAMAGES and not row.is_missed:
            self._damage(event.kind, row)
        if "Traceback" in "".join(attempt.lines):
            row.problems.append("a traceback was printed")
        if row.problems:
            (self._folder / f"attempt-{self._num_starts}.log").write_text("".join(attempt.lines))
        self.rows.append(row)
        self._pending.append(row)
        if "adapter/manifest.json" in self.names():  # there is nothing to continue
            self._resume_at(self.num_steps)
        return row

    def finish(self, event: str = "undisturbed", expected: int = 0, fault: str = "") -> Row:
        """Let the run go on to its end."""
        self._server.proxy.clear()
        row = Row(event=event, phase="all")
        begun = time.monotonic()
        attempt = self.start(fault)
        row.status, row.seconds = attempt.end(), time.monotonic() - begun
        row.claim(row.status == expected, f"exit status {expected} was expected: {attempt.lines[-3:]}")
        row.claim(not (left := attempt.left_over()), f"processes {left} are left over")
        self._settle()
        first = self._first_step(attempt)
        row.reached, row.saved = (attempt.steps or [None])[-1], (attempt.saved or [None])[-1]  # type: ignore[list-item]
        row.stored = max(self.steps(), default=0)
        if first is not None:
            self._resume_at(first)
        row.claim(not self._server.unfinished_uploads(), "an upload was left unfinished")
        if expected == 0 and row.status == 0:
            row.claim("DONE" in self.names(), "there is no DONE")
            row.claim(not self.broken_files("adapter"), "the adapter in the store is damaged")
        self.rows.append(row)
        self._tell(str(row))
        return row

    def start(self, fault: str) -> Attempt:
        self._num_starts += 1
        return Attempt(self._job, self._folder / f"machine-{self._num_starts}", fault)

    def _brake(self, event: Event) -> str:
        """Training does not wait for a store that is away, and must not be over when that comes back."""
        return f"hang@{self._expected + event.steps + EVAL_STEPS + 2}" if event.kind in OUTAGES and event.phase != AFTER else ""

    def _is_moment(self, event: Event, attempt: Attempt) -> bool:
        steps = list(attempt.steps)
        if event.phase in ("fetch", "prepare", "load"):
            words = {"fetch": "fetching", "prepare": "preparing the data", "load": "loading the model"}
            return attempt.has_said(words[event.phase])
        if event.phase == AFTER:
            if event.steps % 2 and event.kind not in OUTAGES:
                return attempt.has_said("answering prompts")
            return self._was_put(event.hold or "/adapter/")
        if not steps or (event.stored and event.stored not in self.steps()):
            return False
        late = [step for step in steps if step >= steps[0] - 1 + event.steps]
        if event.phase == "upload":
            return bool(late) and self._was_put("/checkpoints/step-")
        every = {"train": 1, "evaluate": EVAL_STEPS, "save": SAVE_STEPS}[event.phase]
        return any(step % every == 0 for step in late)

    def _was_put(self, part: str) -> bool:
        start = f"PUT /{BUCKET}/{self.name}/{RUN_ID}"
        return any(request.startswith(start) and part in request for request in list(self._server.proxy.requests))

    def _act(self, event: Event, attempt: Attempt) -> tuple[int, tuple[int, ...]]:
        """Returns the exit status, and those that are right."""
        if event.kind == "kill" or event.kind in DAMAGES:
            attempt.kill_everything()
            return attempt.end(), (-signal.SIGKILL,)
        if event.kind == "term":
            attempt.process.terminate()
            return attempt.end(), (75,)
        if event.kind == "trainer killed":
            attempt.kill_stage()
            return attempt.end(), (5,)
        with self._outage(event.kind):
            if event.phase == AFTER:
                return attempt.end(), (75,)
            if event.phase != "load" and not attempt.wait_for(lambda: attempt.has_said("loading the model")):
                return attempt.end(), (75,)  # where nothing can go on without the store
            time.sleep(event.outage_seconds)
            if event.kind == "slow":  # it answers: nothing may be lost
                attempt.process.terminate()
                return attempt.end(), (75,)
        saved = max(attempt.saved, default=1)
        attempt.wait_for(lambda: max(self.steps(), default=0) >= saved)
        attempt.process.terminate()
        return attempt.end(), (75,)

    @contextmanager
    def _outage(self, kind: str) -> Iterator[None]:
        proxy = self._server.proxy
        if kind == "refused":
            proxy.stop()
        elif kind == "reset":
            proxy.add(Fault(kind="reset", times=ALWAYS))
        elif kind == "503":
            proxy.add(Fault(kind="error", code="SlowDown", times=ALWAYS))
        else:
            proxy.delay_seconds, proxy.bytes_per_second = 0.2, 200_000.0
        try:
            yield
        finally:
            proxy.clear()
            if kind == "refused":
                proxy.start()

    def _settle(self) -> None:
        """Wait for what a killed process had sent."""
        self._server.proxy.clear()
        deadline = time.monotonic() + 30.0
        while self._server.proxy.num_open and time.monotonic() < deadline:
            time.sleep(0.01)

    def _judge(self, row: Row, event: Event, attempt: Attempt, expected: tuple[int, ...], *, is_new: bool) -> None:
        first = self._first_step(attempt) if is_new or attempt.steps else None
        if first is not None:
            self._resume_at(first)
        row.reached = attempt.steps[-1] if attempt.steps else first
        row.saved = max([*attempt.saved, *([first] if first is not None else [])], default=None)
        if row.is_missed or (event.phase == AFTER and "DONE" in self.names()):
            expected = (*expected, 0)  # it struck when all was done, perhaps while the process ended
        right = " or ".join(str(status) for status in expected)
        row.claim(row.status in expected, f"exit status {right} was expected: {attempt.lines[-3:]}")
        steps = self.steps()
        for step in steps:
            if step not in self._damaged and (broken := self.broken_files(f"checkpoints/step-{step:06d}")):
                row.problems.append(f"checkpoint {step} in the store is damaged: {broken}")
        self._damaged &= set(steps)
        row.stored = self._expected = max((step for step in steps if step not in self._damaged), default=0)
        if row.reached is None or row.is_missed:
            return
        assert row.saved is not None
        if event.kind == "kill" or event.kind in DAMAGES:
            row.claim(row.reached - row.saved <= SAVE_STEPS, f"not saved for {row.reached - row.saved} steps")
        elif event.kind == "trainer killed":
            row.claim(row.stored == row.saved, "what was saved is not in the store")
            row.claim(row.reached - row.saved <= SAVE_STEPS, f"not saved for {row.reached - row.saved} steps")
        elif event.phase != AFTER and not (event.phase in BEFORE and event.kind in OUTAGES and not attempt.steps):
            row.claim(row.stored == row.reached, "a step that was done is not in the store")
            stopped = self.last_attempt().get("stopped")
            # "finished" when the signal came between the last step and the end of the delivery
            row.claim(stopped == "preempted" or row.reached == self.num_steps, f"the ledger says {stopped}")

    def _first_step(self, attempt: Attempt) -> int | None:
        """Where the attempt began to train; None when it did not come so far."""
        if attempt.steps:
            return attempt.steps[0] - 1
        first: int | None = self.last_attempt().get("first_step")
        return first

    def _resume_at(self, step: int) -> None:
        """The run went on after this step: what the events before it have lost is known."""
        for row in self._pending:
            row.resumed = step
            row.lost = None if row.reached is None else max(0, row.reached - step)
            self._tell(str(row))
        if self._pending and "adapter/manifest.json" not in self.names():
            last = self._pending[-1]
            last.claim(step == self._expected, f"continued after step {step}, not {self._expected}")
        self._pending = []

    def _damage(self, kind: str, row: Row) -> None:
        steps = [step for step in self.steps() if step not in self._damaged]
        if len(steps) < 2:
            row.event = "kill"  # there is none to fall back on: left whole
            return
        folder = f"{self.name}/{RUN_ID}/checkpoints/step-{steps[0]:06d}"
        client, key = self._server.client, f"{folder}/optimizer.pt"
        body = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        if kind == "truncated":
            client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body[: len(body) // 2]))
        elif kind == "flipped bit":
            body[len(body) // 2] ^= 1
            client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
        elif kind == "deleted file":
            client.delete_object(Bucket=BUCKET, Key=key)
        else:
            client.delete_object(Bucket=BUCKET, Key=f"{folder}/manifest.json")
        self._damaged.add(steps[0])
        row.stored = self._expected = steps[1]


def course(folder: Path, server: S3Server, num_steps: int = NUM_STEPS) -> dict[str, str]:
    """The settings of every run, with a model and data made in the folder."""
    made = small_run(write_tiny_model(folder / "tiny-llama"), write_conversations(folder / "conversations.jsonl", 256))
    return {
        **made,
        **COURSE,
        "MAX_STEPS": str(num_steps),
        "AWS_ENDPOINT_URL_S3": server.proxy.url,
        "AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": KEYS["aws_secret_access_key"],
        "AWS_REGION": KEYS["region_name"],
    }


def make_rounds(chance: random.Random) -> Iterator[list[Event]]:
    """Events for one run after another: one in every phase, each phase through all of its kinds in turn."""
    decks: dict[str, list[str]] = {}

    def event(phase: str) -> Event:
        if not decks.get(phase):
            decks[phase] = chance.sample(KINDS[phase], len(KINDS[phase]))
        longest = {"fetch": 1.5, "prepare": 3.0, "load": 3.0, "train": 0.2, "evaluate": 0.2, "save": 0.05, "upload": 0.5}
        return Event(
            kind=decks[phase].pop(),
            phase=phase,
            steps=chance.randint(1, 2 * SAVE_STEPS + 2),
            delay_seconds=chance.uniform(0, longest.get(phase, 0.3)),
            outage_seconds=chance.uniform(1, 4),
        )

    while True:
        middle = ["load", chance.choice(("fetch", "load")), *TRAINING]
        yield [event(phase) for phase in ("fetch", "prepare", *chance.sample(middle, len(middle)), AFTER)]


def compare(series: Series, reference: Series, row: Row) -> None:
    """The claims about the end of a run whose course nothing may change."""
    row.claim(series.adapter() == reference.adapter(), "the adapter differs from the undisturbed run's")
    mine, theirs = series.metrics(), reference.metrics()
    first = next((one for one, other in zip(mine, theirs, strict=False) if one != other), "the end")
    row.claim(mine == theirs, f"the metrics differ from {first} on")


def out_of_memory(make: Callable[..., Series], chance: random.Random) -> list[Series]:
    """Memory runs out at three moments, with a kill after each; then in a run that fits in no way.

    Without dropout: another micro-batch draws other masks, and the losses would only show those.
    """
    reference, series, end = make("memory-reference", LORA_DROPOUT="0"), make("memory", LORA_DROPOUT="0"), 0
    reference.finish("(undisturbed)")
    for point in chance.sample(["oom@{}", "oom-eval@{}", "oom-save@{}", "oom-update@{}", "oom-load@0"], 3):
        at = end + chance.randint(SAVE_STEPS, 3 * SAVE_STEPS)
        if "eval" in point or "save" in point:
            at += -at % EVAL_STEPS  # where there is an evaluation, and a save
        event = Event(
            kind="kill", phase="train", fault=point.format(at), steps=at - end + 15, delay_seconds=chance.uniform(0, 0.3)
        )
        row = series.strike(event)
        row.event = event.fault
        row.claim(row.is_missed or "fit" in series.last_attempt()["notes"], "nothing was learned about memory")
        end = max(series.steps(), default=0)
    row = series.finish()
    mine, theirs = series.metrics(), reference.metrics()
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(mine, theirs, strict=True) if "loss" in b]
    row.claim(max(differences) < 1e-3, "a loss differs by more than 1e-3")
    series._tell(f"{'':22} losses differ by {max(differences):.1e} at most")
    never = make("memory-never")
    never.finish("oom-above@0", 4, "oom-above@0")
    return [reference, series, never]


def divergence(make: Callable[..., Series], chance: random.Random) -> list[Series]:
    """A loss that is not finite, with a kill after the roll-back; then one that comes again and again."""
    series, at = make("nan"), chance.randint(15, 60)
    row = series.strike(Event(kind="kill", phase="train", fault=f"nan@{at}", steps=at + 15, delay_seconds=chance.uniform(0, 0.3)))
    row.event = f"nan@{at}"
    row.claim(at in series.last_attempt()["notes"].get("rollback", {}).get("skip_steps", ()), "the step is not skipped")
    row = series.finish()
    values = [value for one in series.metrics() for value in one.values()]
    row.claim(all(math.isfinite(value) for value in values), "a loss is not finite")
    row.claim(series.metrics()[-1]["step"] == series.num_steps, "the run is not at its end")
    never = make("nan-never")
    never.finish("nan again and again", 7, "nan@7*,nan@8*,nan@9*")
    return [series, never]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="events in the series that must end with the same adapter")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--folder", type=Path, help="work here and leave it, with what was printed where a claim fails")
    options = parser.parse_args()
    chance, begun = random.Random(options.seed), time.monotonic()
    finished: list[Series] = []

    def tell(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as name, s3_server() as server:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        settings = course(folder, server)

        def make(name: str, **changes: str) -> Series:
            return Series(name, server, folder, settings | changes, tell)

        tell(HEADER)
        reference = make("reference")
        reference.finish("(the undisturbed run)")
        rounds, num_left = make_rounds(chance), options.kills
        while num_left > 0:
            series = make(f"round-{len(finished) + 1}")
            finished.append(series)
            for event in next(rounds)[:num_left]:
                row = series.strike(event)
                num_left -= not row.is_missed
                if "DONE" in series.names():
                    break
            compare(series, reference, series.finish())
        finished += out_of_memory(make, chance)
        finished += divergence(make, chance)
        rows = [row for series in finished for row in series.rows]
    problems = [f"{row.event} in {row.phase}: {problem}" for row in rows for problem in row.problems]
    killed = [row.lost for row in rows if row.status == -signal.SIGKILL and row.lost is not None]
    stopped = [row.lost for row in rows if row.event == "term" and row.lost is not None]
    result = {
        "seed": options.seed,
        "events": len([row for row in rows if row.phase != "all" and not row.is_missed]),
        "statuses": dict(sorted(Counter(str(row.status) for row in rows).items())),
        "lost_steps_killed": {"max": max(killed, default=0), "mean": sum(killed) / max(len(killed), 1)},
        "lost_steps_sigterm": max(stopped, default=0),
        "seconds": round(time.monotonic() - begun),
        "problems": problems,
    }
    if options.json:
        options.json.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=1), "utf-8")
    print(json.dumps(result))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
