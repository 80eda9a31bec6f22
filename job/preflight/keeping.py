"""The place of the results: whether the store takes and gives, and whether a volume is really there."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from job.errors import MachineError, Problem, SettingsError
from job.keep.store import MissingError, Store, read_text, write_text

WRITE = "write (s3:PutObject)"
VOLUME_ROOTS = ("/runpod-volume", "/workspace", "/data", "/mnt")
"""Where volumes are mounted by custom: RunPod's serverless workers and pods, `docker run -v` of our README, everybody else."""
CONTAINER_VARIABLES = ("RUNPOD_POD_ID", "KUBERNETES_SERVICE_HOST")
CONTAINER_FILES = (Path("/.dockerenv"), Path("/run/.containerenv"))


def check_store(store: Store, scratch: Path) -> str:
    """Write, read, list and delete a small file, and judge each.

    Raises:
        SettingsError: names every right that the credentials lack, or says once what is wrong with all of them.
        NetworkError: the store does not answer.
        MachineError: its disk is full or read-only, this machine's clock is wrong, or it forgets what was written.
    """
    name, text, begun = ".preflight", f"may be deleted ({os.getpid()})", time.monotonic()
    checks: dict[str, Callable[[], object]] = {
        WRITE: lambda: write_text(store, name, text, scratch),
        "read (s3:GetObject)": lambda: _expect(store, _text_of(store, name, scratch) == text),
        "list (s3:ListBucket)": lambda: _expect(store, name in store.list(name)),
        "delete (s3:DeleteObject)": lambda: store.delete(name),
    }
    refused: dict[str, SettingsError] = {}
    for right, check in checks.items():
        try:
            check()
        except SettingsError as error:
            refused[right] = error
        except MachineError:
            if WRITE not in refused:  # else nothing is there to be read or listed
                raise
    is_one_reason = len(refused) > 1 and len({str(error) for error in refused.values()}) == 1
    if is_one_reason or len(refused) == len(checks):  # the key, the bucket or the region, and no single right
        raise next(iter(refused.values()))
    if refused:
        way_out = "give the credentials this right, or others to the job; a run needs all four"
        problems = [
            Problem(setting="OUTPUT_URI", value=store.uri, rule=f"the credentials may not {right}", way_out=way_out)
            for right in refused
        ]
        raise SettingsError(problems) from next(iter(refused.values()))
    return f"writes, reads, lists, deletes; {time.monotonic() - begun:.1f} s"


def is_container(environ: Mapping[str, str]) -> bool:
    """Whether what is written outside of volumes goes when this process goes."""
    return any(environ.get(name) for name in CONTAINER_VARIABLES) or any(path.exists() for path in CONTAINER_FILES)


def check_volume(folder: Path, environ: Mapping[str, str], mounts: str, *, in_container: bool) -> str:
    """Say which mount a results' folder lies on.

    Args:
        folder: OUTPUT_URI, with links resolved; need not exist yet.
        mounts: the text of /proc/self/mountinfo.

    Raises:
        MachineError: in a container, a folder where a volume belongs lies on the container's own disk.
    """
    points = {Path(_unescaped(line.split()[4])) for line in mounts.splitlines() if len(line.split()) > 4}
    point = max(
        (point for point in points if folder.is_relative_to(point)), key=lambda point: len(point.parts), default=Path("/")
    )
    roots = (*VOLUME_ROOTS, environ.get("VOLUME_ROOT") or VOLUME_ROOTS[0])
    if in_container and point == Path("/") and any(folder.is_relative_to(root) for root in roots):
        raise MachineError(
            f"OUTPUT_URI={folder}: the volume is not mounted, and results would vanish with the container; mount it there, or "
            "name another OUTPUT_URI: a mounted folder, s3://bucket/prefix, or a folder elsewhere if that is what you want"
        )
    if in_container and point == Path("/"):
        return "on the container's own disk, as OUTPUT_URI says"
    return f"on the disk mounted at {point}"


def _unescaped(text: str) -> str:
    """A path as the kernel writes it: blanks and the like are octal."""
    return text.encode().decode("unicode_escape").encode("latin-1").decode("utf-8", "replace") if "\\" in text else text


def _expect(store: Store, is_kept: bool) -> None:
    if not is_kept:
        raise MachineError(f"OUTPUT_URI={store.uri}: what was written is not what is read back; use another store")


def _text_of(store: Store, name: str, scratch: Path) -> str | None:
    try:
        return read_text(store, name, scratch)
    except (MissingError, UnicodeDecodeError):
        return None
