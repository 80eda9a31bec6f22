"""What the supervisor does for trackers: their environment, and their files between this machine and the store.

Imports no tracker and no torch. What is not handled: trackio on a Hugging Face Space, which needs a token that may do more.
"""

import secrets
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from job.keep.store import Store, local_disk

PROJECT = "qlora-job"
"""Where runs go when the tracker's own variable names no project or experiment."""
TRACKERS = "trackers"
"""Folder in the run's place in the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracker:
    """What this module and preflight know of one tracker.

    Attributes:
        package: on PyPI.
        module: that shows whether it is there.
        credentials: variables that only a trainer with this tracker may see.
        defaults: variables that it gets when they are not set.
    """

    package: str
    module: str
    credentials: tuple[str, ...] = ()
    defaults: Mapping[str, str]


KNOWN: Mapping[str, Tracker] = {
    "tensorboard": Tracker(package="tensorboard", module="tensorboard", defaults={}),
    "wandb": Tracker(
        package="wandb",
        module="wandb",
        credentials=("WANDB_API_KEY",),
        # Its own code waits 90 seconds for the server, and for ever at the end, in an exit handler.
        defaults={"WANDB_PROJECT": PROJECT, "WANDB_FINISH_TIMEOUT": "30", "WANDB_SILENT": "true"},
    ),
    "trackio": Tracker(
        package="trackio",
        module="trackio",
        credentials=("TRACKIO_WRITE_TOKEN", "TRACKIO_SERVER_URL"),  # the address may hold the token
        defaults={"TRACKIO_STORAGE_MODE": "sqlite"},
    ),
    "mlflow": Tracker(
        package="mlflow-skinny",
        module="mlflow",
        credentials=("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_SECRET"),
        # Its own are 120 seconds and 7 times: a quarter of an hour for each row while the server is away.
        defaults={
            "MLFLOW_EXPERIMENT_NAME": PROJECT,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        },
    ),
}
CREDENTIALS = tuple(name for tracker in KNOWN.values() for name in tracker.credentials)
"""To be kept from every process that needs none of them."""


def new_tracker_id(run_id: str) -> str:
    """A name for a run that no other has, whatever the store: to be kept with the run, and given to all its attempts."""
    return f"{run_id[:50]}-{secrets.token_hex(4)}"  # wandb takes 64 characters


def tracker_environ(report_to: tuple[str, ...], environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Variables of the trainer, on top of its environment without credentials.

    Args:
        environ: the process's environment, credentials read from files included.
        folder: for what the trackers keep on this disk.
    """
    added: dict[str, str] = {}
    for name in report_to:
        tracker = KNOWN[name]
        added |= {variable: environ[variable] for variable in tracker.credentials if environ.get(variable)}
        added |= {variable: value for variable, value in tracker.defaults.items() if not environ.get(variable)}
    if environ.get("MLFLOW_EXPERIMENT_ID"):
        added.pop("MLFLOW_EXPERIMENT_NAME", None)
    if "trackio" in report_to:
        added["TRACKIO_DIR"] = str(folder / "trackio")
    return added


class TrackerFiles:
    """What trackers leave on this disk, and the store's copy of it.

    TensorBoard's events and what wandb wrote offline are one file or folder for each attempt, which no other writes to.
    Trackio's database is one for all attempts and goes from machine to machine.

    Args:
        store: the run's folder in the store.
        folder: the same as the trainer's.
        scratch: for copies on their way.
    """

    def __init__(self, store: Store, folder: Path, scratch: Path) -> None:
        self._store, self._folder, self._scratch = store, folder, scratch
        self._stored: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()  # the mirror's thread and the main one

    def restore(self) -> None:
        """Bring what an attempt on another machine has left, where it knows more than what lies here. Raises JobError."""
        for name in self._store.list(f"{TRACKERS}/trackio/"):
            here, copy = self._folder / name.removeprefix(f"{TRACKERS}/"), self._scratch / "trackio.db"
            if here.suffix != ".db":
                continue
            self._store.get(name, copy)
            if _num_rows(copy) > _num_rows(here):
                with local_disk(here):
                    here.parent.mkdir(parents=True, exist_ok=True)
                    for left_over in here.parent.glob(f"{here.name}-*"):  # its journal belongs to what is replaced
                        left_over.unlink()
                    copy.replace(here)
            copy.unlink(missing_ok=True)

    def put(self) -> None:
        """Store what has changed. Raises JobError."""
        with self._lock:
            for path in self._kept():
                name, state = path.relative_to(self._folder).as_posix(), _state(path)
                if self._stored.get(name) == state:
                    continue
                copy = self._scratch / f"{TRACKERS}-copy"  # the trainer goes on to write into the file itself
                with local_disk(copy):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    _copy(path, copy)
                self._store.put(copy, f"{TRACKERS}/{name}")
                copy.unlink()
                self._stored[name] = state

    def _kept(self) -> Iterator[Path]:
        """Not the logs of the libraries, and nothing that was sent already: they tell of this machine."""
        for pattern in ("tensorboard/**/*.tfevents.*", "wandb/offline-run-*/*.wandb", "trackio/*.db"):
            yield from sorted(path for path in self._folder.glob(pattern) if path.is_file() and not path.is_symlink())


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _copy(path: Path, copy: Path) -> None:
    if path.suffix != ".db":
        shutil.copyfile(path, copy)  # readers pass over a last record that is cut short
        return
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def _num_rows(database: Path) -> int:
    """Points of all curves; 0 for none, or for what is no database."""
    if not database.is_file():
        return 0
    try:
        with closing(sqlite3.connect(database)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM metrics").fetchone()[0])
    except sqlite3.DatabaseError:
        return 0
