"""The GPUs that the driver shows in, whether the image's CUDA and the settings can use them out."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from job.errors import MachineError, Problem, SettingsError
from job.plan.hardware import Device
from job.preflight.outcome import WARNING
from job.settings import ModelSettings

DRIVER, COMPATIBLE_DRIVER = 580, 535
# CUDA 13 needs driver 580; with the cuda-compat libraries 535 and newer will do on data-centre cards
# (docs.nvidia.com/deploy/cuda-compatibility, forward compatibility, read 2026-11).
OLDEST, BFLOAT16 = 7.5, 8.0
# CUDA 13 dropped Maxwell, Pascal and Volta (CUDA 13.0 release notes); bfloat16 and flash attention came with Ampere.
COMPAT_FOLDERS = tuple(Path(folder) for folder in ("/usr/local/cuda/compat", "/usr/local/cuda-13.0/compat"))
_DATA_CENTRE = (
    "Tesla",
    "T4",
    "L4",
    "L40",
    "A2",
    "A10",
    "A16",
    "A30",
    "A40",
    "A100",
    "H100",
    "H200",
    "GH200",
    "B200",
    "GB200",
    "B300",
)


def check_gpus(
    model: ModelSettings,
    devices: Sequence[Device],
    *,
    num_used: int | None = None,
    parallel: str = "auto",
    compat_folders: Sequence[Path] = COMPAT_FOLDERS,
) -> str:
    """Judge the GPUs that will be used, which are the first.

    Args:
        num_used: trainer processes on this machine; None for one on each GPU.
        parallel: PARALLEL.

    Raises:
        MachineError: one is too old, or its driver is, or there is none and LOAD_IN_8BIT asks for one.
        SettingsError: NPROC_PER_NODE, PARALLEL, DTYPE or ATTN_IMPLEMENTATION asks for what they cannot do.
    """
    if not devices:
        if model.load_in_8bit:
            raise MachineError("LOAD_IN_8BIT=1: needs a GPU, and none was found; take a machine with one, or set LOAD_IN_8BIT=0")
        if model.attn_implementation == "flash_attention_2":
            raise _refused("ATTN_IMPLEMENTATION", "flash_attention_2", "needs a GPU, and none was found", "set sdpa")
        return "none found; training on the CPU is slow"
    used = devices if num_used is None else devices[:num_used]
    if num_used is not None and num_used > len(devices):
        have = "one GPU" if len(devices) == 1 else f"{len(devices)} GPUs"
        rule = f"each process needs a GPU of its own, and this machine has {have}"
        raise _refused("NPROC_PER_NODE", str(num_used), rule, f"set {len(devices)}, or take a machine with more")
    if parallel == "fsdp" and len(used) > 1 and model.load_in_8bit:
        raise _refused("PARALLEL", "fsdp", "bitsandbytes' 8-bit weights cannot be shared out", "set LOAD_IN_4BIT=1, or ddp")
    warnings = list(dict.fromkeys(filter(None, (_check_one(model, device, compat_folders) for device in used))))
    kinds = list(dict.fromkeys(device.name for device in used))
    least = min(used, key=lambda device: device.memory_bytes)
    if len(kinds) > 1:
        _check_mixed(model, used)
        warnings.append(f"{WARNING}{' and '.join(kinds)}: the slowest sets the pace, {_gib(least)} are counted on of each")
    if warnings:
        return "; ".join([warnings[0], *(text.removeprefix(WARNING) for text in warnings[1:])])
    several = f"{len(used)} x " if len(used) > 1 else ""
    idle = len(devices) - len(used)
    more = f", and {idle} more, which will be idle" if idle else ""
    return f"{several}{_name(least)}, {_gib(least)}, driver {least.driver or 'unknown'}{more}"


def _check_one(model: ModelSettings, device: Device, compat_folders: Sequence[Path]) -> str:
    """A warning, or nothing."""
    capability = device.compute_capability  # 0 when the driver is too old to tell
    name = _name(device)
    warning = _check_driver(device, compat_folders)
    if 0 < capability < OLDEST:
        raise MachineError(f"{name}: CUDA 13 needs {OLDEST} or newer (Turing, 2018); take a machine with a newer GPU")
    if 0 < capability < BFLOAT16 and model.dtype == "bfloat16":
        raise _refused("DTYPE", "bfloat16", f"the {name} computes it from {BFLOAT16:g} on", "set auto or float16")
    if model.attn_implementation == "flash_attention_2":
        if 0 < capability < BFLOAT16:
            rule = f"needs compute capability {BFLOAT16:g}, and this is a {name}"
            raise _refused("ATTN_IMPLEMENTATION", "flash_attention_2", rule, "set sdpa, or take a newer GPU")
        if find_spec("flash_attn") is None:
            rule = "its package flash_attn is not installed"
            raise _refused("ATTN_IMPLEMENTATION", "flash_attention_2", rule, "set sdpa, or install it into the image")
    return warning


def _check_mixed(model: ModelSettings, used: Sequence[Device]) -> None:
    """All ranks of a run compute in one format; `auto` would choose by each one's GPU."""
    older = [device for device in used if 0 < device.compute_capability < BFLOAT16]
    newer = [device for device in used if device.compute_capability >= BFLOAT16]
    if model.dtype == "auto" and older and newer:
        rule = f"would be float16 on the {older[0].name} and bfloat16 on the {newer[0].name} of the same run"
        raise _refused("DTYPE", "auto", rule, "set float16, or show the run GPUs of one kind (CUDA_VISIBLE_DEVICES)")


def _name(device: Device) -> str:
    return f"{device.name} (compute capability {device.compute_capability:g})" if device.compute_capability else device.name


def _gib(device: Device) -> str:
    return f"{device.memory_bytes / 2**30:.0f} GiB"


def _check_driver(device: Device, compat_folders: Sequence[Path]) -> str:
    """A warning, or nothing."""
    major = device.driver.partition(".")[0]
    if not major.isdecimal() or int(major) >= DRIVER:
        return ""
    words = device.name.replace("NVIDIA", "").replace("-", " ").split()
    is_data_centre = bool(words) and words[0] in _DATA_CENTRE
    has_compat = any(found for folder in compat_folders for found in folder.glob("libcuda.so*"))
    if int(major) >= COMPATIBLE_DRIVER and is_data_centre and has_compat:
        return (
            f"{WARNING}driver {device.driver} of the {device.name} is older than CUDA 13 ({DRIVER}); the cuda-compat libraries "
            "of this image should make up for it"
        )
    way_out = "update the driver, or take a machine with a newer one"
    if is_data_centre and int(major) >= COMPATIBLE_DRIVER:
        way_out += ", or install cuda-compat-13-0 (our image has it)"
    raise MachineError(f"driver {device.driver} of the {device.name}: CUDA 13 needs {DRIVER} or newer; {way_out}")


def _refused(setting: str, value: str, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting=setting, value=value, rule=rule, way_out=way_out)])
