"""What runs have measured, for later forecasts: one small file in OUTPUT_URI for each model, GPU and run.

    <OUTPUT_URI>/.measured/<key>/<RUN_ID>.json    {"tokens_per_second", "gpu", "num_devices", "model", "num_steps"}

The key is made of everything that decides the speed and is known beforehand: model, GPU, bits, rank and length, and how many
GPUs, where they are more than one.
"""

import hashlib
import json
from pathlib import Path
from statistics import median
from typing import Any

from job.errors import JobError
from job.keep.store import MissingError, Store, read_text, write_text
from job.plan.forecast import bits_of
from job.plan.throughput import Speed
from job.settings import Settings

MEASURED = ".measured"
MIN_STEPS = 5
"""A run of fewer says nothing about the pace."""
MAX_RUNS = 20


def learned_speed(
    shared: Store, scratch: Path, settings: Settings, gpu: str, *, num_devices: int = 1, num_nodes: int = 1
) -> Speed | None:
    """The median pace of earlier runs of this model on this GPU; None without any, or when the store does not answer.

    Several devices that have not been measured together are told what one reached: `Speed.num_devices` says which it is.
    """
    found = _learned(shared, scratch, settings, gpu, num_devices, num_nodes)
    return found if found or num_devices == 1 else _learned(shared, scratch, settings, gpu, 1, 1)


def _learned(shared: Store, scratch: Path, settings: Settings, gpu: str, num_devices: int, num_nodes: int) -> Speed | None:
    speeds: list[float] = []
    try:
        for name in list(shared.list(f"{MEASURED}/{_key(settings, gpu, num_devices, num_nodes)}/"))[-MAX_RUNS:]:
            found = json.loads(read_text(shared, name, scratch))
            speeds.append(float(found["tokens_per_second"]))
    except (JobError, MissingError, ValueError, KeyError, TypeError):
        return None  # a forecast can do without; the check of the store tells what is wrong with it
    speeds = [speed for speed in speeds if speed > 0]
    if not speeds:
        return None
    where = f"{num_devices} x {gpu}" if num_devices > 1 else gpu
    source = f"measured in {len(speeds)} earlier run{'s' if len(speeds) > 1 else ''} of this model on {where}"
    return Speed(tokens_per_second=median(speeds), num_runs=len(speeds), source=source, num_devices=num_devices)


def remember_speed(
    shared: Store,
    scratch: Path,
    settings: Settings,
    *,
    gpu: str,
    run_id: str,
    tokens_per_second: float,
    num_steps: int,
    num_devices: int = 1,
    num_nodes: int = 1,
) -> None:
    """Write down this run's pace, if it was long enough to have one.

    Args:
        tokens_per_second: of all devices together.

    Raises:
        JobError: the store does not take it.
    """
    if num_steps < MIN_STEPS:
        return
    found = {
        "tokens_per_second": round(tokens_per_second, 3),
        "gpu": gpu,
        "num_devices": num_devices,
        "model": settings.model.model_id,
        "num_steps": num_steps,
    }
    write_text(shared, f"{MEASURED}/{_key(settings, gpu, num_devices, num_nodes)}/{run_id}.json", json.dumps(found), scratch)


def _key(settings: Settings, gpu: str, num_devices: int, num_nodes: int) -> str:
    parts: list[Any] = [
        Path(settings.model.model_id).name if settings.model.model_id.startswith(("/", ".", "~")) else settings.model.model_id,
        settings.model.model_revision,
        gpu,
        bits_of(settings.model),
        settings.lora.lora_r,
        settings.lora.lora_target_modules,
        settings.data.max_length,
    ]
    if num_devices > 1:  # what one has measured keeps its name
        parts.append([num_devices, num_nodes, settings.train.parallel])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
