"""Chunks to shards on several cores, results in order; nothing is left running behind.

Workers are forked with the tokenizer already loaded and die with this process. Few chunks wait at a time, so memory does not
grow with the source.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Protocol

from job.data.chunks import Chunk
from job.data.shards import Sharder, SourceRows
from job.errors import MachineError

Task = tuple[Chunk, SourceRows, Path]
_TICK_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # prctl(2)


class ShardMaker(Protocol):
    """Whoever turns chunks into shards."""

    def make(self, tasks: Iterable[Task]) -> Iterator[Path]:
        """Yield the shard of each task in order, as a file on this machine; stop iterating at any time."""
        ...


class Workers:
    """A pool of processes that run one `Sharder`; with one process the work is done in this one.

    Args:
        on_tick: called every few seconds while a shard is waited for.
    """

    def __init__(self, sharder: Sharder, num_processes: int, on_tick: Callable[[], None]) -> None:
        self._sharder, self._num_processes, self._on_tick = sharder, num_processes, on_tick
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        global _sharder
        if self._num_processes > 1:
            _sharder = self._sharder  # inherited by the fork, not pickled
            self._pool = ProcessPoolExecutor(
                self._num_processes, multiprocessing.get_context("fork"), initializer=start_worker, initargs=(os.getpid(),)
            )
            self._pool.submit(time.time).result()  # forks all of them now, before anything opens files or starts threads
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # a shard that was begun is of no use any more
                process.kill()
                process.join()

    def make(self, tasks: Iterable[Task]) -> Iterator[Path]:
        """Yield the shard of each task in order; stop iterating at any time.

        Raises:
            DataError: the chat template cannot be used at all.
            MachineError: a worker was killed, most likely for memory.
        """
        if self._pool is None:
            for chunk, source, path in tasks:
                yield self._sharder.make(chunk, source, path)
            return
        waiting: deque[Future[Path]] = deque()
        try:
            for chunk, source, path in tasks:
                waiting.append(self._pool.submit(_make, chunk, source, path))
                if len(waiting) > 2 * self._num_processes:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        except BrokenProcessPool as error:
            raise MachineError(
                "DATASET_NUM_PROC: a process that prepares data was killed, most likely for host memory; "
                "set DATASET_NUM_PROC=1 or take a machine with more memory, and start again to continue"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: "Future[Path]") -> Path:
        while True:
            try:
                return future.result(timeout=_TICK_SECONDS)
            except NotYet:
                if future.done():
                    raise
                self._on_tick()


_sharder: Sharder | None = None


def start_worker(parent: int) -> None:
    """Make a forked process one that dies with its parent; what was loaded before the fork stays shared."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # what was loaded before the fork is never garbage, and stays shared
    gc.set_threshold(100_000, 20, 20)  # rows are trees: collecting cycles at the usual pace costs a seventh of the time
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _make(chunk: Chunk, source: SourceRows, path: Path) -> Path:
    assert _sharder is not None
    return _sharder.make(chunk, source, path)
