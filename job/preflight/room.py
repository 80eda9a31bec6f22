"""This machine's disks: whether they can be written, and whether what a run will put there fits."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from job.errors import MachineError
from job.events import Need
from job.keep.checkpoints import CHECKPOINTS
from job.settings import Settings

_GB = 1e9


def check_work_dir(work: Path) -> str:
    """Write a file into a run's folder on this machine.

    Raises:
        MachineError: it cannot be made, or not be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / f".probe-{os.getpid()}"
        probe.write_text("may be deleted", "utf-8")
        probe.unlink()
    except OSError as error:
        raise MachineError(f"WORK_DIR={work}: cannot be written ({error.strerror}); name a folder on a local disk") from error
    return "WORK_DIR can be written"


def checkpoint_needs(settings: Settings, work: Path, store_folder: Path | None, checkpoint_bytes: int | None) -> list[Need]:
    """Room for the checkpoints that are kept and the one that is being written, here and in a store that is a folder.

    Args:
        work: the run's folder on this machine.
        store_folder: the run's folder in the store, when that is a folder.
        checkpoint_bytes: adapter and optimizer; None while that is unknown.
    """
    if checkpoint_bytes is None:
        return []
    number = settings.keep.save_total_limit + 1
    what = f"{number} checkpoints of {checkpoint_bytes / _GB:.2f} GB"
    places = [("WORK_DIR", work), *([("OUTPUT_URI", store_folder)] if store_folder else [])]
    # A run that goes on has some of them already.
    return [
        Need(
            setting=setting,
            folder=str(folder),
            what=what,
            num_bytes=max(number * checkpoint_bytes - _size(folder / CHECKPOINTS), 0),
        )
        for setting, folder in places
    ]


def check_room(needs: Iterable[Need], work: Path) -> str:
    """Compare what is needed on each disk with what is free on it.

    Raises:
        MachineError: names the setting, what is free, and what is needed for what.
    """
    by_disk: dict[int, list[tuple[Need, Path]]] = defaultdict(list)
    for need in (*needs, Need(setting="WORK_DIR", folder=str(work), what="", num_bytes=0)):
        folder = existing_parent(Path(need.folder))
        by_disk[folder.stat().st_dev].append((need, folder))
    texts = []
    for on_disk in by_disk.values():
        wanted = [need for need, _ in on_disk if need.num_bytes]
        needed, free = sum(need.num_bytes for need in wanted), shutil.disk_usage(on_disk[0][1]).free
        if needed > free:
            largest = max(wanted, key=lambda need: need.num_bytes)
            settings = " and ".join(dict.fromkeys([f"WORK_DIR={work}", *(need.setting for need in wanted)]))
            reasons = ", ".join(f"{need.what} {need.num_bytes / _GB:,.1f} GB ({need.setting})" for need in wanted)
            raise MachineError(
                f"{settings}: {free / _GB:,.1f} GB free on the disk of {largest.folder}, {needed / _GB:,.1f} GB needed: "
                f"{reasons}; free it, or name a folder on a larger disk in {largest.setting}"
            )
        texts.append(f"{free / _GB:,.0f} GB free, {needed / _GB:,.1f} needed")
    return "; ".join(dict.fromkeys(texts))


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
