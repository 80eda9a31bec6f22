"""What was uploaded, and whether the Hub holds it; and an upload that does not stop the thread that waits for it."""

import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
BEAT_SECONDS = 5.0
HASHED_BYTES = 2**30
"""Files up to this size are compared by their content, which takes a second or two; larger ones by their size."""


class IncompleteError(Exception):
    """The Hub does not hold what was uploaded."""


def files_of(folder: Path, ignore: Iterable[str]) -> dict[str, Path]:
    """The files that `upload_folder` sends, by their names on the Hub."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = filter_repo_objects(names, ignore_patterns=[*ignore, *DEFAULT_IGNORE_PATTERNS])
    return {name: folder / name for name in kept}


def check_upload(api: Any, repo_id: str, revision: str, files: dict[str, Path]) -> None:
    """Compare what the Hub lists with the files here, in one request.

    Raises:
        IncompleteError: names what is missing or different.
    """
    found = {entry.path: entry for entry in api.get_paths_info(repo_id, list(files), revision=revision)}
    wrong = [name for name, path in files.items() if not _is_same(path, found.get(name))]
    if wrong:
        raise IncompleteError(f"after the upload the Hub does not hold {', '.join(wrong)} as it is here")


def _is_same(path: Path, entry: Any) -> bool:
    """Whether an entry of the Hub's listing describes this file; large files are listed with their sha256, others as in git."""
    if entry is None or entry.size != (size := path.stat().st_size):
        return False
    if size > HASHED_BYTES or (entry.lfs is None and entry.xet_hash):  # a listing may know a large file by its Xet hash alone
        return True
    with path.open("rb") as file:
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == hashlib.file_digest(file, "sha256").hexdigest())
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest())


def in_background(work: Callable[[], T], idle: Callable[[], None]) -> T:
    """Call `work` in a thread of its own and `idle` every few seconds until it is done; returns or raises what it does.

    The thread dies with the process: what `idle` raises, or a signal, ends the waiting at once.
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="publish", daemon=True).start()
    while not done.wait(BEAT_SECONDS):
        idle()
    if errors:
        raise errors[0]
    return results[0]
