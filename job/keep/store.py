"""A folder or an S3 prefix behind one small Protocol: files go in and come out under names.

Names are relative, `/`-separated, and round-trip: what `list` yields, `get` accepts; `.partial` is no part of one.
What is not handled: locking; one run is written by one supervisor.
"""

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from job.errors import DISK_ERRORS, MachineError


class MissingError(Exception):
    """No file has this name. Raised for nothing else: a refused credential is not a missing file."""


class Store(Protocol):
    """Where a run is kept.

    Every method raises NetworkError when the store does not answer or slows us down for too long, SettingsError when it
    refuses the credentials or there is no such bucket, and MachineError when a disk is full or read-only (the store's or
    this machine's) or this machine's clock is wrong.
    """

    uri: str
    redact: Callable[[str], str]
    """What every text passes before it is put; files go as they are."""

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store; afterwards `name` holds all of it or what it held before.

        Raises FileNotFoundError when there is no such local file.
        """

    def get(self, name: str, path: Path) -> None:
        """Copy a file out; `path` appears whole or not at all. Raises MissingError."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the names that begin with `prefix`, in order."""

    def delete(self, name: str) -> None:
        """Remove a file; removing a missing one is no error."""


def open_store(uri: str, *, credentials: dict[str, str] | None = None, redact: Callable[[str], str] = str) -> Store:
    """The store at a folder or `s3://bucket/prefix`; nothing is contacted yet.

    Args:
        uri: OUTPUT_URI.
        credentials: keyword arguments for boto3 (aws_access_key_id, ...); without them boto3 looks in its usual places.
        redact: applied to every text that is put.
    """
    if uri.startswith("s3://"):
        from job.keep.s3 import S3Store

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix, credentials or {}, redact=redact)
    return FolderStore(Path(uri).expanduser().absolute(), redact=redact)


def within(store: Store, folder: str) -> Store:
    """The same store seen from one of its folders, which belongs to one writer: what a killed one left half-written goes."""
    if isinstance(store, FolderStore):
        return FolderStore(store.root / folder, is_own=True, redact=store.redact)
    from job.keep.s3 import S3Store

    assert isinstance(store, S3Store)
    return store.within(folder)


def hurried(store: Store, on_date: Callable[[str | None], None] = lambda _: None) -> Store:
    """The same store for who only asks whether it is there: it is given up after one more try.

    Args:
        on_date: called with the `Date` of each answer of a server.
    """
    if isinstance(store, FolderStore):
        return store
    from job.keep.s3 import S3Store

    return store.hurried(on_date) if isinstance(store, S3Store) else store


def read_text(store: Store, name: str, scratch: Path) -> str:
    """The text of a small file. Raises MissingError, and UnicodeDecodeError (a ValueError) when it is no text."""
    return read_bytes(store, name, scratch).decode("utf-8")


def read_bytes(store: Store, name: str, scratch: Path) -> bytes:
    """The content of a small file. Raises MissingError."""
    with _scratch_file(scratch) as path:
        store.get(name, path)
        return path.read_bytes()


def read_json_lines(store: Store, name: str, scratch: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many lines were none: cut short or garbled. Raises MissingError."""
    rows, num_unreadable = [], 0
    for line in read_bytes(store, name, scratch).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_unreadable += 1
    return rows, num_unreadable


def write_text(store: Store, name: str, text: str, scratch: Path) -> None:
    """Put a small text file."""
    with _scratch_file(scratch) as path:
        path.write_text(store.redact(text), "utf-8")
        store.put(path, name)


@contextmanager
def _scratch_file(folder: Path) -> Iterator[Path]:
    """A name of its own for each call: the mirror, the ledger and the main thread do this at the same time."""
    path = folder / f".text-{os.getpid()}-{uuid.uuid4().hex}"
    with local_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def local_disk(path: Path) -> Iterator[None]:
    """Turns a full or read-only local disk into MachineError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise MachineError(f"WORK_DIR: cannot write {path} ({error.strerror}); free the disk, or name another folder") from error


class FolderStore:
    """A folder, on a local disk or a mounted volume.

    Files are written below `.partial` and renamed, so what a kill leaves half-written is in no listing and in one place.
    """

    _PARTIAL = ".partial"
    _DEAD_SECONDS = 600.0
    """A half-written file that nothing was added to for so long is from a process that was killed."""

    def __init__(self, root: Path, *, is_own: bool = False, redact: Callable[[str], str] = str) -> None:
        self.root, self.redact = root, redact
        self.uri = str(root)
        self._has_left_over = is_own

    def put(self, path: Path, name: str) -> None:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such local file", str(path))
        self._clear_left_over()
        partial = self.root / self._PARTIAL / uuid.uuid4().hex
        target = self.root / name
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise self._failed(f"cannot write {name}", error) from error

    def get(self, name: str, path: Path) -> None:
        source = self.root / name
        try:
            with source.open("rb"):
                pass
        except (FileNotFoundError, IsADirectoryError):
            raise MissingError(name) from None
        except OSError as error:
            if isinstance(error, NotADirectoryError) and self.root.is_dir():  # a file lies where a folder would
                raise MissingError(name) from None
            raise self._failed(f"cannot read {name}", error) from error
        partial = path.with_name(f"{path.name}.partial")
        try:
            with local_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _copy(source, partial)
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def list(self, prefix: str = "") -> Iterator[str]:
        def fail(error: OSError) -> None:
            # A folder that may not be read is not an empty one; one that is gone (or was never made) is.
            if not isinstance(error, FileNotFoundError):
                raise self._failed("cannot be listed", error) from error

        # Only the deepest folder that the prefix names is walked.
        start = self.root / prefix.rpartition("/")[0]
        names = []
        for parent, folders, files in os.walk(start, onerror=fail):
            folders[:] = [folder for folder in folders if folder != self._PARTIAL]
            names += [(Path(parent) / file).relative_to(self.root).as_posix() for file in files]
        yield from sorted(name for name in names if name.startswith(prefix))

    def delete(self, name: str) -> None:
        path = self.root / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, NotADirectoryError) and self.root.is_dir():
                return
            raise self._failed(f"cannot delete {name}", error) from error
        with suppress(OSError):  # a folder with files left in it stays
            for parent in path.relative_to(self.root).parents[:-1]:
                (self.root / parent).rmdir()

    def _failed(self, what: str, error: OSError) -> MachineError:
        return MachineError(
            f"OUTPUT_URI={self.uri}: {what} ({error.strerror or error}); free or mount the volume, or name another folder"
        )

    def _clear_left_over(self) -> None:
        """Before the first write. What is young may belong to a live process: `check` runs beside `run`."""
        if not self._has_left_over:
            return
        self._has_left_over = False
        for path in (self.root / self._PARTIAL).glob("*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > self._DEAD_SECONDS:
                    path.unlink()


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())  # a rename may reach the disk before the bytes do


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network volumes refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
