"""Chunks to shards on the workers of a Dask cluster, results in order: `workers.py` for more than one machine.

Reading, merging and writing stay on this machine, and so do all addresses and credentials: a worker gets rows and rules, and
gives a shard back, which lies beside the others here before it is merged. So the bytes are those of the local path, and a
preparation that was killed continues in the same way, there or here. Few chunks are on their way at a time, two a worker: that
bounds memory here, on the scheduler and on the workers. Dask itself gives the chunk of a worker that died to another one.

Not handled: starting a cluster (`dask scheduler`, `dask worker`), and a scheduler that goes away: the next start continues.
"""

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import dask
from distributed import Client, Future, KilledWorker, wait

from job.data.chunks import Chunk
from job.data.cluster_worker import Rules, RulesPlugin, made_with, make_remotely, unpacked
from job.data.shards import Sharder, SourceRows, is_made, write_shard
from job.data.tokens import Tokenizer
from job.data.workers import Task
from job.errors import MachineError, NetworkError, Problem, SettingsError
from job.settings import DataSettings

CONNECT_SECONDS = 30
NO_WORKER_SECONDS = 300.0
"""How long a cluster may be without any worker: machines that are being started take minutes."""
_TICK_SECONDS = 5.0
_FETCH_SECONDS = 60
"""For one shard, some megabytes: the worker that has it may die meanwhile, and another one makes it again."""
_PER_WORKER = 2
"""One chunk is worked on and one waits."""


class ClusterWorkers:
    """The workers of a cluster that run one `Sharder`.

    Args:
        on_tick: called every few seconds while a shard is waited for.
        say: told what is waited for before the first one.
    """

    def __init__(
        self,
        settings: DataSettings,
        sharder: Sharder,
        tokenizer: Tokenizer,
        on_tick: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        assert settings.prepare_on is not None
        self._address, self._sharder, self._on_tick, self._say = settings.prepare_on, sharder, on_tick, say
        rules = Rules(
            settings=settings.model_copy(update={"datasets": (), "eval_datasets": (), "prepare_on": None}),
            tokenizer=tokenizer,
            with_signatures=sharder.with_signatures,
            made_with=made_with(settings),
        )
        if type(tokenizer).__module__.startswith("transformers_modules"):
            rule = "this model's tokenizer has code of its own, which does not travel"
            raise self._unusable(rule, "leave it out, and the data is prepared on this machine")
        self._name = f"qlora-job-{blake2b(pickle.dumps(rules), digest_size=8).hexdigest()}"
        self._plugin = RulesPlugin(self._name, rules)
        self._client: Client | None = None
        self._num_workers, self._asked, self._last_seen = 0, 0.0, time.monotonic()

    def __enter__(self) -> "ClusterWorkers":
        # Chunks go with their tasks on purpose: what the scheduler holds survives a worker.
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GiB"})
        self._say(f"connecting to {self._address}")
        try:
            self._client = Client(self._address, timeout=CONNECT_SECONDS, name="qlora-job")
        except (OSError, ValueError, RuntimeError) as error:
            raise NetworkError(
                f"PREPARE_ON={self._address}: no scheduler answers there ({error}); start one, or leave it out"
            ) from error
        try:
            with self._translated():
                self._client.register_plugin(self._plugin, name=self._name)
                while self._count_workers() == 0:
                    self._say(f"{self._address} has no worker yet; waiting for one")
                    time.sleep(_TICK_SECONDS)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def make(self, tasks: Iterable[Task]) -> Iterator[Path]:
        """Yield the shard of each task in order; stop iterating at any time. One that is there already is not made again.

        Raises:
            DataError: the chat template cannot be used at all.
            MachineError: a chunk killed every worker that it was given to, or a worker runs another program.
            NetworkError: the scheduler went away, or all workers did.
        """
        waiting: deque[tuple[Path, Future | None]] = deque()
        try:
            for chunk, source, path in tasks:
                digest = self._sharder.digest(chunk, source)
                waiting.append((path, None if is_made(path, digest) else self._submit(chunk, source, digest)))
                if time.monotonic() - self._asked > _TICK_SECONDS:
                    self._count_workers()
                if len(waiting) > _PER_WORKER * max(self._num_workers, 1):
                    yield self._result(*waiting.popleft())
            while waiting:
                yield self._result(*waiting.popleft())
        finally:
            for _, future in waiting:
                if future is not None:
                    future.release()

    def _submit(self, chunk: Chunk, source: SourceRows, digest: str) -> Future:
        assert self._client is not None
        with self._translated():
            return self._client.submit(make_remotely, self._name, chunk, source, digest, key=f"{self._name}-{digest}", pure=False)

    def _result(self, path: Path, future: Future | None) -> Path:
        while future is not None:
            with self._translated():
                try:
                    wait(future, timeout=_TICK_SECONDS)
                    write_shard(path, unpacked(future.result(timeout=_FETCH_SECONDS)))
                    break
                except TimeoutError:
                    self._on_tick()
                    self._count_workers()
        return path

    def _count_workers(self) -> int:
        """How many there are; they come and go.

        Raises:
            NetworkError: there has been none for too long.
        """
        assert self._client is not None
        with self._translated():
            try:
                self._num_workers, self._asked = len(self._client.nthreads()), time.monotonic()
            except TimeoutError as error:  # not a matter of one chunk
                raise ConnectionError(str(error)) from error
        if self._num_workers:
            self._last_seen = self._asked
        elif self._asked - self._last_seen > NO_WORKER_SECONDS:
            raise NetworkError(
                f"PREPARE_ON={self._address}: the cluster has had no worker for {NO_WORKER_SECONDS:.0f} seconds; start some with "
                f"`dask worker {self._address} --nthreads 1` (the log of one that does not stay says why), and start again to "
                "continue"
            )
        return self._num_workers

    def _close(self) -> None:
        if self._client is None:
            return
        # Of a scheduler that is gone nothing is left to put away, nor of a worker that could not take the rules (KeyError).
        with suppress(OSError, TimeoutError, CancelledError, RuntimeError, KeyError):
            if self._client.status == "running":
                self._client.unregister_worker_plugin(self._name)
        with suppress(OSError, TimeoutError, CancelledError, RuntimeError):
            self._client.close(timeout=CONNECT_SECONDS)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What goes wrong between machines, as errors of ours."""
        try:
            yield
        except KilledWorker as error:
            raise MachineError(
                f"PREPARE_ON={self._address}: one chunk killed {error.allowed_failures + 1} workers, most likely for memory; "
                "start them with a higher --memory-limit, and start again to continue"
            ) from error
        except TimeoutError:
            raise
        except (OSError, CancelledError) as error:
            raise NetworkError(
                f"PREPARE_ON={self._address}: the scheduler went away ({type(error).__name__}); the shards made so far are kept: "
                "start again to continue"
            ) from error
        except Exception as error:
            if not isinstance(error, ImportError) and "ModuleNotFoundError" not in str(error):  # Dask may pass on its text alone
                raise
            raise MachineError(
                f"PREPARE_ON={self._address}: a worker cannot import this program ({error}); start the workers from the image "
                "that this job runs in"
            ) from error

    def _unusable(self, rule: str, way_out: str) -> SettingsError:
        return SettingsError([Problem(setting="PREPARE_ON", value=self._address, rule=rule, way_out=way_out)])
