"""A Dask cluster on this machine: a scheduler and workers as processes of their own, started by Dask's own command."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from conftest import ROOT
from distributed import Client, SchedulerPlugin

NAMES = ("PATH", "HOME", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")


class Counting(SchedulerPlugin):
    """Writes the key of every shard that a worker has made on a line of a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if start == "processing" and finish == "memory" and str(key).startswith("qlora-job-"):
            with Path(self._path).open("a") as file:
                file.write(f"{key} {kwargs.get('worker')}\n")


class DaskCluster:
    """As a context; its processes end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workers = folder, list[subprocess.Popen[bytes]]()
        self._made = folder / "made"
        self._file = folder / "scheduler.json"
        self.log = folder / "log"

    def __enter__(self) -> "DaskCluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        listen = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self._file))
        self.scheduler = self._start("scheduler", *listen, "--idle-timeout", "10 minutes")
        deadline = time.monotonic() + 120
        while not (told := self._told()) and time.monotonic() < deadline and self.scheduler.poll() is None:
            time.sleep(0.05)
        assert told, self.log.read_text()
        self.address: str = told["address"]
        with Client(self.address, set_as_default=False) as client:
            client.register_plugin(Counting(str(self._made)), name="counting")
        return self

    def _told(self) -> dict[str, Any]:
        """What the scheduler has written; nothing while it does."""
        try:
            told: dict[str, Any] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return told

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def start_worker(self, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        """One more worker, of one thread and without a keeper that would start it again; does not wait for it."""
        options = ("--nthreads", "1", "--no-nanny", "--death-timeout", "60", "--local-directory", str(self.folder))
        process = self._start("worker", self.address, *options, *arguments, **environ)
        self.workers.append(process)
        return process

    def wait_for(self, num_workers: int) -> None:
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(num_workers, timeout=60)

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process in self.workers:
            self.workers.remove(process)

    def made(self) -> list[tuple[str, str]]:
        """(key, worker) of every shard made so far, whoever wanted it."""
        lines = self._made.read_text().splitlines() if self._made.exists() else []
        return [(key, worker) for key, worker in (line.split(" ", 1) for line in lines)]

    def _start(self, *arguments: str, **environ: str) -> "subprocess.Popen[bytes]":
        inherited = {name: os.environ[name] for name in NAMES if name in os.environ}
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        own = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments, "--no-dashboard"],
                env={**inherited, **own, **environ},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )


class Recorder:
    """Stands before a scheduler and keeps all bytes that come from its clients."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").partition(":")
        self._upstream = (host, int(port))
        self.heard = bytearray()

    def __enter__(self) -> "Recorder":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                upstream = socket.create_connection(self._upstream)
                threading.Thread(target=self._pass_on, args=(client, upstream, self.heard), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(upstream, client, bytearray()), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, heard: bytearray) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(2**16):
                heard += data
                target.sendall(data)
