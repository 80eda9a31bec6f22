"""A model's folder in; how much memory and disk merging takes there, and a refusal where this machine has less, out.

Weights are counted from the headers of their files: nothing is loaded. What is not handled: memory that others take meanwhile.
"""

import json
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import psutil

from job.errors import MachineError

MERGED_BYTES = 2
"""Of a parameter in bfloat16."""
MEMORY_FACTOR, DISK_FACTOR = 1.2, 1.1
"""On top of the weights: the adapter and one layer in float32 while it is merged (1.04 in all, measured on a Llama of 1.1B,
2026-11-24, n=1); the tokenizer and what a disk rounds up."""
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by its format's own rule."""
_GIB = 2**30


class Weights(NamedTuple):
    """What a model's folder holds."""

    num_parameters: int
    largest_file_bytes: int


def count_weights(model_dir: Path) -> Weights:
    """Count the parameters of a model in safetensors files; of others by their size, as if each took two bytes."""
    files = sorted(model_dir.glob("*.safetensors"))
    if files:
        num_parameters = sum(_count_parameters(file) for file in files)
    else:
        files = sorted(model_dir.glob("*.bin"))
        num_parameters = sum(file.stat().st_size for file in files) // MERGED_BYTES
    return Weights(num_parameters, max((file.stat().st_size for file in files), default=0))


def _count_parameters(file: Path) -> int:
    with file.open("rb") as opened:
        (num_bytes,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(min(num_bytes, MAX_HEADER_BYTES)))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def check_merge_room(
    model_dir: Path,
    target: Path,
    *,
    free_memory: Callable[[], int] | None = None,
    free_disk: Callable[[Path], int] | None = None,
) -> Weights:
    """Compare what merging takes with what is free; returns what was counted.

    Args:
        target: the folder that is to be made.
        free_memory: bytes that may be taken now; this machine's when not given.
        free_disk: bytes free where a folder lies.

    Raises:
        MachineError: memory or disk do not suffice.
    """
    weights = count_weights(model_dir)
    merged = MERGED_BYTES * weights.num_parameters
    counted = f"{weights.num_parameters:,} parameters"
    needed, free = merged * MEMORY_FACTOR + weights.largest_file_bytes, (free_memory or free_memory_bytes)()
    if needed > free:
        raise MachineError(
            f"PUBLISH_MERGED=1: merging {counted} on the CPU takes {needed / _GIB:.1f} GiB of host memory, and "
            f"{free / _GIB:.1f} GiB are free; choose a machine with more, or set PUBLISH_MERGED=0 and merge elsewhere"
        )
    needed, free = merged * DISK_FACTOR, (free_disk or _free_disk_bytes)(target.parent)
    if needed > free:
        raise MachineError(
            f"PUBLISH_MERGED=1: the merged model of {counted} takes {needed / _GIB:.1f} GiB of disk, and {free / _GIB:.1f} GiB "
            f"are free in {target.parent}; free some, name another WORK_DIR, or set PUBLISH_MERGED=0 and merge elsewhere"
        )
    return weights


def free_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this machine has free, or what the container may still take of it."""
    free = int(psutil.virtual_memory().available)
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed = int((cgroup / limit).read_text("utf-8"))
            taken = int((cgroup / used).read_text("utf-8"))
            lines = ((cgroup / limit).parent / "memory.stat").read_text("utf-8").splitlines()
            dropped_first = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cached} "))
        except (OSError, ValueError):  # not that version of cgroups, or `max`: no limit
            continue
        free = min(free, allowed - taken + dropped_first)
    return max(free, 0)


def _free_disk_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
