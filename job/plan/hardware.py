"""Which GPUs this machine has, asked of the driver and not of torch, which takes seconds to import."""

import subprocess
from collections.abc import Callable, Mapping


def find_gpus(environ: Mapping[str, str]) -> list[str]:
    """Names of the GPUs, in the driver's order; empty without a driver, or when CUDA_VISIBLE_DEVICES hides them all."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [name.strip() for name in answer.stdout.splitlines() if name.strip()]


def one_gpu(environ: Mapping[str, str], num_gpus: int, warn: Callable[[str], None]) -> dict[str, str]:
    """Variables that show the trainer one GPU: several in one process would split each batch in a way TRL refuses."""
    asked = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [device for device in asked if device] or [str(number) for number in range(num_gpus)]
    if len(visible) <= 1:
        return {}
    warn(f"warning: {len(visible)} GPUs found, one is used; the others would idle at your expense")
    return {"CUDA_VISIBLE_DEVICES": visible[0]}
