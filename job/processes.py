"""One stage's processes, of which a training on several GPUs has one for each: started, heard, signalled and ended together.

They are started by us and not by torchrun: it closes the pipes that events come by, its exit status says nothing of theirs, and
a SIGTERM takes it 2.5 to 3.7 seconds, more than half of what a machine that goes away may give (torch 2.13, 2026-11). Restarts,
which it is for, are the supervisor's own affair.
"""

import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from job.events import EVENTS_FD, Ended, Event, Failed, read_events

OUTPUT_SECONDS = 2.0
"""How long the last lines of a child are waited for: a process that it left behind may hold the pipe open."""
PEERS_SECONDS = 30.0
"""How long the first one may take to save after another has failed, if it notices at all: a GPU waits for its peers for ever."""


class Processes:
    """The processes of one stage; the first one's events are the stage's.

    Args:
        environs: the whole environment of each.
        on_output: called in a thread with each line that one of them prints.
    """

    def __init__(
        self, stage: str, spec_file: Path, environs: Sequence[Mapping[str, str]], on_output: Callable[[str], None]
    ) -> None:
        self._queue: queue.Queue[tuple[int, Event | None]] = queue.Queue()
        self._error: Exception | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self.last: list[Event | None] = [None] * len(environs)
        """What each said last."""
        self._open = set(range(len(environs)))
        self._first_bad: int | None = None
        self._others_end = math.inf
        """When those that are left are killed."""
        try:
            for rank, environ in enumerate(environs):
                self._start(rank, [sys.executable, "-m", "job.child", stage, str(spec_file)], environ, on_output)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int, command: Sequence[str], environ: Mapping[str, str], on_output: Callable[[str], None]) -> None:
        reader, writer = os.pipe()
        process = subprocess.Popen(
            command,
            env={**environ, EVENTS_FD: str(writer)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            process_group=0,  # a Ctrl-C at the terminal reaches us alone, and we pass it on
        )
        os.close(writer)
        self._running.append(process)
        threading.Thread(target=self._read, args=(rank, reader), daemon=True).start()
        self._threads.append(threading.Thread(target=_pass_on, args=(process, on_output), name="output", daemon=True))
        self._threads[-1].start()

    def __iter__(self) -> "Processes":
        return self

    def __next__(self) -> Event | None:
        """The first process's events as they come, None after each second without one; ends when all have ended."""
        if not self._open:
            raise StopIteration
        if time.monotonic() > self._others_end:
            self.kill()
        try:
            rank, event = self._queue.get(timeout=1.0)
        except queue.Empty:
            return None
        if self._error:
            raise self._error
        if event is None:
            self._open.discard(rank)
            self._note_end(rank)
            return None
        self.last[rank] = event
        if isinstance(event, Failed):
            self._note_bad(rank)
        return event if rank == 0 else None

    def _note_end(self, rank: int) -> None:
        if not isinstance(self.last[rank], Ended):
            self._note_bad(rank)
        if rank == 0:  # what is to be saved is saved; what the others have begun waits for it
            self.kill()

    def _note_bad(self, rank: int) -> None:
        if self._first_bad is None:
            self._first_bad = rank
            self._others_end = time.monotonic() + PEERS_SECONDS

    @property
    def deciding(self) -> int:
        """Whose end is the stage's: the first one's, unless another failed before it and took it along."""
        return 0 if self._first_bad is None or isinstance(self.last[0], Ended) else self._first_bad

    def signal(self, number: signal.Signals) -> None:
        for process in self._running:
            process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self) -> list[int]:
        """The exit statuses, once all have ended."""
        return [process.wait() for process in self._running]

    def put_away(self) -> None:
        """Kill what still runs, and let the last lines come."""
        self.kill()
        self.wait()
        for thread in self._threads:
            thread.join(OUTPUT_SECONDS)

    def _read(self, rank: int, reader: int) -> None:
        try:
            with os.fdopen(reader, encoding="utf-8") as pipe:
                for event in read_events(pipe):
                    self._queue.put((rank, event))
        except Exception as error:  # handed to the thread that iterates
            self._error = error
        self._queue.put((rank, None))


def _pass_on(process: "subprocess.Popen[bytes]", on_output: Callable[[str], None]) -> None:
    """Read what a process prints, until it and its children have closed their end."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            on_output(line.decode("utf-8", "replace").rstrip("\r\n"))
