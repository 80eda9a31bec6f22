"""A folder of files that is whole or absent, on disk and in a store.

`manifest.json` lists every file with its size and sha256. It is written last and deleted first, so a folder with a manifest
is complete, and a folder without one is no checkpoint. The same rule keeps the prepared data and the adapter.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from job.keep.store import MissingError, Store, read_text

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True)

    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a whole folder holds."""

    model_config = ConfigDict(frozen=True)

    step: int
    files: dict[str, FileEntry]


class DamagedError(Exception):
    """A folder lacks a file or holds another one than its manifest says; the message names the file."""


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def seal(folder: Path, step: int) -> None:
    """Write the manifest of a folder whose files are complete, after all of them reached the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = FileEntry(num_bytes=path.stat().st_size, sha256=digest)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(Manifest(step=step, files=files).model_dump_json(indent=1), "utf-8")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)


def check(folder: Path) -> Manifest:
    """Compare every file with the manifest.

    Raises:
        DamagedError: names the first file that is missing or different.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{folder.name}/{MANIFEST} is missing") from None
    except (ValidationError, UnicodeDecodeError):
        raise DamagedError(f"{folder.name}/{MANIFEST} is not readable") from None
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder.name}/{name} is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise DamagedError(f"{folder.name}/{name} is damaged ({path.stat().st_size} of {entry.num_bytes} bytes)")
    return manifest


def discard(folder: Path) -> None:
    """Delete a local folder, manifest first."""
    with suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def put_folder(store: Store, folder: Path, name: str) -> None:
    """Copy a sealed folder into the store, manifest last."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text("utf-8"))
    for file in [*manifest.files, MANIFEST]:
        store.put(folder / file, f"{name}/{file}")


def get_folder(store: Store, name: str, folder: Path) -> Manifest:
    """Copy a folder out of the store and check every file.

    Raises:
        MissingError: the store holds no whole folder of this name.
        DamagedError: a file is missing or different; what was copied is deleted again.
    """
    discard(folder)
    manifest = _read_manifest(store, name, folder.parent)
    try:
        for file in [*manifest.files, MANIFEST]:
            store.get(f"{name}/{file}", folder / file)
        return check(folder)
    except MissingError as error:
        discard(folder)
        raise DamagedError(f"{error} is missing in {store.uri}") from None
    except DamagedError:
        discard(folder)
        raise


def delete_folder(store: Store, name: str) -> None:
    """Delete a folder from the store, manifest first."""
    store.delete(f"{name}/{MANIFEST}")
    for file in list(store.list(f"{name}/")):
        store.delete(file)


def list_steps(store: Store) -> list[int]:
    """Steps of the whole checkpoints in the store, newest first."""
    names = (name.split("/") for name in store.list(f"{CHECKPOINTS}/step-"))
    steps = {int(parts[1].removeprefix("step-")) for parts in names if len(parts) == 3 and parts[2] == MANIFEST}
    return sorted(steps, reverse=True)


def local_steps(folder: Path) -> list[int]:
    """Steps of the local checkpoints that have a manifest, newest first."""
    found = (path.parent.name.removeprefix("step-") for path in folder.glob(f"step-*/{MANIFEST}"))
    return sorted((int(step) for step in found), reverse=True)


def restore_latest(store: Store, folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint, local or from the store, as a folder on this disk; None when there is none.

    A damaged one is skipped for the one before it, and `warn` is told which file was wrong.
    """
    for step in sorted({*local_steps(folder), *list_steps(store)}, reverse=True):
        path = folder / step_name(step)
        for attempt in _copies(store, path):
            try:
                attempt()
                return path
            except MissingError:
                continue
            except DamagedError as error:
                warn(f"checkpoint at step {step} is skipped: {error}")
    return None


def _copies(store: Store, path: Path) -> Iterator[Callable[[], object]]:
    """Ways to have this checkpoint on this disk, cheapest first."""
    if (path / MANIFEST).is_file():
        yield lambda: check(path)
    yield lambda: get_folder(store, f"{CHECKPOINTS}/{path.name}", path)


def _read_manifest(store: Store, name: str, scratch: Path) -> Manifest:
    text = read_text(store, f"{name}/{MANIFEST}", scratch)
    try:
        return Manifest.model_validate(json.loads(text))
    except (ValueError, ValidationError):
        raise DamagedError(f"{name}/{MANIFEST} is not readable") from None
