"""Which GPUs this machine has, and which ones can be rented.

The machine's own are asked of the driver (`nvidia-smi`) and not of torch, which takes seconds to import; what is known of a
card by its name lies in `gpus.json`, a source at each.
"""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

GIB = 2**30
OLDEST_CAPABILITY = 7.5
"""CUDA 13 has left Volta and older ones behind (docs.nvidia.com/cuda, release notes of 13.0)."""
_QUERY = "name,memory.total,driver_version,compute_cap"


class Device(BaseModel):
    """One GPU of this machine, as its driver describes it."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory_bytes: int
    """All of it; what other processes hold is not taken off."""
    driver: str
    compute_capability: float
    """8.0 and newer computes in bfloat16; 0 when the driver is too old to say."""


class Gpu(BaseModel):
    """A kind of GPU, of which a machine may have several."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory_bytes: int
    """Of one of them, as its driver reports it."""
    peak_flops: float | None
    """Dense 16-bit tensor operations a second, fp32 accumulation; None when nobody has told us of this card."""
    compute_capability: float


def find_devices(environ: Mapping[str, str]) -> list[Device]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES shows, in the driver's order; empty without a driver."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    devices = [_parse(line) for line in answer.stdout.splitlines() if line.strip()]
    if visible is None:
        return devices
    numbers = [int(part) for part in visible.split(",") if part.strip().isdigit()]
    return [devices[number] for number in numbers if number < len(devices)] or devices


def _parse(line: str) -> Device:
    name, memory, driver, capability = (*(part.strip() for part in line.split(",")), "", "", "")[:4]
    return Device(
        name=name,
        memory_bytes=int(float(memory) * 2**20) if memory.replace(".", "").isdigit() else 0,
        driver=driver,
        compute_capability=float(capability) if capability.replace(".", "").isdigit() else 0.0,
    )


def one_gpu(environ: Mapping[str, str], num_gpus: int, warn: Callable[[str], None]) -> dict[str, str]:
    """Variables that show the trainer one GPU: several in one process would split each batch in a way TRL refuses."""
    asked = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [device for device in asked if device] or [str(number) for number in range(num_gpus)]
    if len(visible) <= 1:
        return {}
    warn(f"warning: {len(visible)} GPUs found, one is used; the others would idle at your expense")
    return {"CUDA_VISIBLE_DEVICES": visible[0]}


@cache
def known_gpus() -> tuple[Gpu, ...]:
    """The cards of `gpus.json`, the smallest memory first."""
    return tuple(sorted((gpu for gpu, _ in _table()), key=lambda gpu: (gpu.memory_bytes, gpu.name)))


def find_gpu(name: str) -> Gpu | None:
    """The known card of this name, as we, its driver or RunPod call it; case and "NVIDIA" do not matter."""
    wanted = _plain(name)
    return next((gpu for gpu, names in _table() if wanted in names), None)


def gpu_of(device: Device) -> Gpu:
    """What is known of a card of this machine; its own memory counts, and its speed is None when it is in no table."""
    known = find_gpu(device.name)
    return Gpu(
        name=known.name if known else device.name,
        memory_bytes=device.memory_bytes or (known.memory_bytes if known else 0),
        peak_flops=known.peak_flops if known else None,
        compute_capability=device.compute_capability or (known.compute_capability if known else 0.0),
    )


def slowest_of(devices: Sequence[Device]) -> Gpu | None:
    """What several cards can be counted on for: the least of each; None without any."""
    if not devices:
        return None
    gpus = [gpu_of(device) for device in devices]
    speeds = [gpu.peak_flops for gpu in gpus if gpu.peak_flops is not None]
    least = min(gpus, key=lambda gpu: gpu.memory_bytes)
    slowest = {
        "peak_flops": min(speeds) if len(speeds) == len(gpus) else None,
        "compute_capability": min(gpu.compute_capability for gpu in gpus),
    }
    return least.model_copy(update=slowest)


def host_memory_bytes() -> int:
    """What a process may use here: the container's limit, or the machine's memory."""
    total = int(psutil.virtual_memory().total)
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            text = path.read_text("utf-8").strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


@cache
def _table() -> tuple[tuple[Gpu, frozenset[str]], ...]:
    rows = json.loads((Path(__file__).parent / "gpus.json").read_text("utf-8"))["gpus"]
    found = []
    for row in rows:
        teraflops = row.get("bf16_tflops") or row.get("fp16_tflops")
        gpu = Gpu(
            name=row["name"],
            memory_bytes=round(row["memory_gib"] * GIB),
            peak_flops=teraflops * 1e12 if teraflops else None,
            compute_capability=float(row["compute_capability"]),
        )
        found.append((gpu, frozenset(_plain(name) for name in (row["name"], *row["aliases"]))))
    return tuple(found)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("nvidia", "").replace("geforce", "").replace("-", " ").split())
