"""A folder of files that is whole or absent, on disk and in a store, and the checkpoints among them.

`manifest.json` lists every file with its size and sha256. It is written last and deleted first, so a folder with a manifest
is complete, and a folder without one is no checkpoint. The same rule keeps the prepared data and the adapter.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from job.errors import MachineError
from job.keep.manifest import MANIFEST, DamagedError, FileEntry, Manifest, parse_manifest
from job.keep.store import MissingError, Store, read_bytes

__all__ = ["CHECKPOINTS", "MANIFEST", "DamagedError", "FileEntry", "Manifest"]

CHECKPOINTS = "checkpoints"
STORED = ".stored"
"""Lies in a local checkpoint that is in the store too; no part of the checkpoint."""
_STEP = re.compile(r"step-([0-9]{6,})")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def seal(folder: Path, step: int, *, eval_loss: float | None = None) -> None:
    """Write the manifest of a folder whose files are complete, after all of them reached the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, STORED)):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = FileEntry(num_bytes=path.stat().st_size, sha256=digest)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(Manifest(step=step, files=files, eval_loss=eval_loss).model_dump_json(indent=1), "utf-8")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)


def check(folder: Path) -> Manifest:
    """Compare every file with the manifest.

    Raises:
        DamagedError: names the first file that is missing or different.
    """
    manifest = _local_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    return manifest


def discard(folder: Path) -> None:
    """Delete a local folder, manifest first."""
    with suppress(OSError):  # there is none, or it is a folder
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def put_folder(store: Store, folder: Path, name: str, *, between: Callable[[], None] = lambda: None) -> None:
    """Copy a sealed folder into the store, manifest last.

    Args:
        between: called before each file; what it raises ends the copying, and the store holds no such folder then.
    """
    manifest = _local_manifest(folder)
    store.delete(f"{name}/{MANIFEST}")  # an older folder of this name is not whole while it is written over
    for file in [*manifest.files, MANIFEST]:
        between()
        store.put(folder / file, f"{name}/{file}")


def get_folder(store: Store, name: str, folder: Path, *, between: Callable[[], None] = lambda: None) -> Manifest:
    """Copy a folder out of the store and check every file as it comes.

    Args:
        between: called before each file; what it raises ends the copying.

    Raises:
        MissingError: the store holds no whole folder of this name.
        DamagedError: a file is missing or different. Whatever is raised, no half of the folder stays here.
    """
    discard(folder)
    manifest = read_manifest(store, name, folder.parent)
    try:
        for file, entry in manifest.files.items():
            between()
            store.get(f"{name}/{file}", folder / file)
            _check_file(folder, file, entry)
        store.get(f"{name}/{MANIFEST}", folder / MANIFEST)
    except MissingError as error:
        discard(folder)
        raise DamagedError(f"{error} is missing in {store.uri}") from None
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:  # no disk holds both `a` and `a/b`
        discard(folder)
        raise DamagedError(f"{name}/{MANIFEST} names files that exclude each other ({error.filename})") from None
    except BaseException:
        discard(folder)
        raise
    return manifest


def delete_folder(store: Store, name: str) -> None:
    """Delete a folder from the store, manifest first."""
    store.delete(f"{name}/{MANIFEST}")
    for file in list(store.list(f"{name}/")):
        store.delete(file)


def read_manifest(store: Store, name: str, scratch: Path) -> Manifest:
    """The manifest of a folder in the store. Raises MissingError and DamagedError."""
    return parse_manifest(read_bytes(store, f"{name}/{MANIFEST}", scratch), f"{name}/{MANIFEST}")


def list_steps(store: Store) -> list[int]:
    """Steps of the whole checkpoints in the store, newest first."""
    names = (name.split("/") for name in store.list(f"{CHECKPOINTS}/step-"))
    return _steps(parts[1] for parts in names if len(parts) == 3 and parts[2] == MANIFEST)


def local_steps(folder: Path) -> list[int]:
    """Steps of the local checkpoints that have a manifest, newest first."""
    return _steps(path.parent.name for path in folder.glob(f"step-*/{MANIFEST}"))


def local_losses(folder: Path) -> dict[int, float | None]:
    """Held-out loss of each local checkpoint, newest first; None where it is unknown."""
    losses: dict[int, float | None] = {}
    for step in local_steps(folder):
        try:
            losses[step] = _local_manifest(folder / step_name(step)).eval_loss
        except DamagedError:
            losses[step] = None
    return losses


def store_losses(store: Store, scratch: Path, known: Mapping[int, float | None] | None = None) -> dict[int, float | None]:
    """Held-out loss of each checkpoint in the store, newest first; None where it is unknown. `known` ones are not read again."""
    losses = dict(known or {})
    for step in (steps := list_steps(store)):
        if step not in losses:
            try:
                losses[step] = read_manifest(store, f"{CHECKPOINTS}/{step_name(step)}", scratch).eval_loss
            except (DamagedError, MissingError):
                losses[step] = None
    return {step: losses[step] for step in steps}


def best_step(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest held-out loss, the earliest of equals; None when no loss is known."""
    known = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def surplus_steps(losses: Mapping[int, float | None], keep: int) -> list[int]:
    """Steps beyond the newest `keep` and the best, oldest first."""
    kept = {*sorted(losses, reverse=True)[:keep], best_step(losses)}
    return sorted(step for step in losses if step not in kept)


def restore_latest(
    store: Store,
    folder: Path,
    warn: Callable[[str], None],
    *,
    at_most: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Path | None:
    """The newest undamaged checkpoint, local or from the store, as a folder on this disk; None when there is none.

    A damaged one is skipped for the one before it, and `warn` is told which file was wrong. A damaged local copy is deleted,
    or it would count as the newest checkpoint here; in the store it stays, for the fault may be this machine's.

    Args:
        at_most: newer steps are passed over.
        between: called before each file that is downloaded; what it raises ends the search.
    """
    for step in sorted({*local_steps(folder), *list_steps(store)}, reverse=True):
        if at_most is not None and step > at_most:
            continue
        path = folder / step_name(step)
        for where, get in _copies(store, path, between):
            try:
                manifest = get()
                if manifest.step != step:
                    raise DamagedError(f"{path.name}/{MANIFEST} is of step {manifest.step}")
                return path
            except MissingError:
                continue
            except DamagedError as error:
                discard(path)
                warn(f"checkpoint at step {step} is skipped: {where}, {error}")
    return None


def drop_after(store: Store, folder: Path, step: int) -> None:
    """Delete every checkpoint newer than a step, here and in the store: a run that rolls back has left their course."""
    for newer in local_steps(folder):
        if newer > step:
            discard(folder / step_name(newer))
    for newer in list_steps(store):
        if newer > step:
            delete_folder(store, f"{CHECKPOINTS}/{step_name(newer)}")


def make_room(folder: Path, needed_bytes: int) -> None:
    """Delete local checkpoints, oldest first, until so much disk is free.

    Only copies that are in the store as well are deleted, and never the newest whole one.

    Raises:
        MachineError: it still does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = local_steps(folder)
    for path in sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name)):
        if shutil.disk_usage(folder).free >= needed_bytes:
            return
        is_half = not (path / MANIFEST).exists()  # a deletion that a kill interrupted
        if is_half or ((path / STORED).exists() and path.name != step_name(whole[0])):
            discard(path)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise MachineError(
            f"WORK_DIR={folder}: {free / 1e9:.2f} GB free, a checkpoint needs {needed_bytes / 1e9:.2f}; free the disk, or name "
            "a larger one"
        )


def _steps(names: Iterable[str]) -> list[int]:
    matches = {name: _STEP.fullmatch(name) for name in names}
    steps = {int(match[1]) for name, match in matches.items() if match and step_name(int(match[1])) == name}
    return sorted(steps, reverse=True)


def _copies(store: Store, path: Path, between: Callable[[], None]) -> Iterator[tuple[str, Callable[[], Manifest]]]:
    """Where this checkpoint may be, and how to have it on this disk, cheapest first."""
    if (path / MANIFEST).exists():
        yield "on this disk", lambda: check(path)

    def get() -> Manifest:
        manifest = get_folder(store, f"{CHECKPOINTS}/{path.name}", path, between=between)
        (path / STORED).touch()
        return manifest

    yield "in the store", get


def _local_manifest(folder: Path) -> Manifest:
    name = f"{folder.name}/{MANIFEST}"
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), name)
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing") from None
    except OSError as error:  # a folder of that name, or a bad disk
        raise DamagedError(f"{name} is not readable ({error.strerror})") from None


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise DamagedError(f"{folder.name}/{name} is missing")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{folder.name}/{name} is not readable ({error.strerror})") from None
    if digest != entry.sha256:
        raise DamagedError(f"{folder.name}/{name} is damaged ({path.stat().st_size} of {entry.num_bytes} bytes)")
