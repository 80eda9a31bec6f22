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


def check_gpus(model: ModelSettings, devices: Sequence[Device], *, compat_folders: Sequence[Path] = COMPAT_FOLDERS) -> str:
    """Judge the GPU that will be used, which is the first.

    Raises:
        MachineError: it is too old, or its driver is, or there is none and LOAD_IN_8BIT asks for one.
        SettingsError: DTYPE or ATTN_IMPLEMENTATION asks for what it cannot do.
    """
    if not devices:
        if model.load_in_8bit:
            raise MachineError("LOAD_IN_8BIT=1: needs a GPU, and none was found; take a machine with one, or set LOAD_IN_8BIT=0")
        if model.attn_implementation == "flash_attention_2":
            raise _refused("ATTN_IMPLEMENTATION", "flash_attention_2", "needs a GPU, and none was found", "set sdpa")
        return "none found; training on the CPU is slow"
    device = devices[0]
    capability = device.compute_capability  # 0 when the driver is too old to tell
    name = f"{device.name} (compute capability {capability:g})" if capability else device.name
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
    more = f" and {len(devices) - 1} more, which will be idle" if len(devices) > 1 else ""
    return warning or f"{name}, {device.memory_bytes / 2**30:.0f} GiB, driver {device.driver or 'unknown'}{more}"


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
