"""What runs have measured, for later forecasts: one small file in OUTPUT_URI for each model, GPU and run.

    <OUTPUT_URI>/.measured/<key>/<RUN_ID>.json    {"tokens_per_second", "gpu", "model", "num_steps"}

The key is made of everything that decides the speed and is known beforehand: model, GPU, bits, rank and length.
"""

import hashlib
import json
from pathlib import Path
from statistics import median

from job.errors import JobError
from job.keep.store import MissingError, Store, read_text, write_text
from job.plan.forecast import bits_of
from job.plan.throughput import Speed
from job.settings import Settings

MEASURED = ".measured"
MIN_STEPS = 5
"""A run of fewer says nothing about the pace."""
MAX_RUNS = 20


def learned_speed(shared: Store, scratch: Path, settings: Settings, gpu: str) -> Speed | None:
    """The median pace of earlier runs of this model on this GPU; None without any, or when the store does not answer."""
    speeds: list[float] = []
    try:
        for name in list(shared.list(f"{MEASURED}/{_key(settings, gpu)}/"))[-MAX_RUNS:]:
            found = json.loads(read_text(shared, name, scratch))
            speeds.append(float(found["tokens_per_second"]))
    except (JobError, MissingError, ValueError, KeyError, TypeError):
        return None  # a forecast can do without; the check of the store tells what is wrong with it
    speeds = [speed for speed in speeds if speed > 0]
    if not speeds:
        return None
    source = f"measured in {len(speeds)} earlier run{'s' if len(speeds) > 1 else ''} of this model on {gpu}"
    return Speed(tokens_per_second=median(speeds), num_runs=len(speeds), source=source)


def remember_speed(
    shared: Store, scratch: Path, settings: Settings, *, gpu: str, run_id: str, tokens_per_second: float, num_steps: int
) -> None:
    """Write down this run's pace, if it was long enough to have one.

    Raises:
        JobError: the store does not take it.
    """
    if num_steps < MIN_STEPS:
        return
    found = {
        "tokens_per_second": round(tokens_per_second, 3),
        "gpu": gpu,
        "model": settings.model.model_id,
        "num_steps": num_steps,
    }
    write_text(shared, f"{MEASURED}/{_key(settings, gpu)}/{run_id}.json", json.dumps(found), scratch)


def _key(settings: Settings, gpu: str) -> str:
    parts = [
        Path(settings.model.model_id).name if settings.model.model_id.startswith(("/", ".", "~")) else settings.model.model_id,
        settings.model.model_revision,
        gpu,
        bits_of(settings.model),
        settings.lora.lora_r,
        settings.lora.lora_target_modules,
        settings.data.max_length,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
