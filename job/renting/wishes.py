"""The flags of `submit` itself in, frozen `Wishes` out; all that is wrong with them at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from job.errors import Problem, SettingsError
from job.plan.hardware import find_gpu, known_gpus

FLAGS = (
    *("gpu", "num_gpus", "cloud", "image", "network_volume", "volume_disk", "secrets", "plain_secrets"),
    *("yes", "follow", "no_follow", "json"),
)
SWITCHES = ("YES", "FOLLOW", "NO_FOLLOW", "PLAIN_SECRETS")
IMAGE_VARIABLE = "SUBMIT_IMAGE"
"""No image is built in: one that is not yours would be given your secrets."""
MOUNT = "/workspace"
"""Where RunPod's own templates mount a volume; entrypoint.sh looks there."""
SMALLEST_DISK_GB = 10
"""Of a persistent mount, by the API's description."""
CONSOLE_STORAGE = "https://console.runpod.io/user/storage"
_REFERENCE = re.compile(r"\{\{\s*RUNPOD_SECRET_(\w+)\s*\}\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """How the pod is to be, beside what the run is."""

    image: str
    gpus: tuple[str, ...] = ()
    """Names to choose among; all when empty."""
    num_gpus: int = 1
    cloud: str = "SECURE"
    network_volume: str | None = None
    has_volume_disk: bool = False
    volume_disk_gb: int | None = None
    """None: as the forecast says."""
    references: Mapping[str, str]
    """Variable -> RunPod secret that holds its value."""
    sends_plain: bool = False
    """Whether secrets may go as plain text."""
    says_yes: bool = False
    follows: bool = True
    as_json: bool = False

    @property
    def has_mount(self) -> bool:
        return self.network_volume is not None or self.has_volume_disk


def read_wishes(own: Mapping[str, str], environ: Mapping[str, str]) -> Wishes:
    """Read the flags.

    Args:
        own: of the command, by lower-case name.

    Raises:
        SettingsError: names everything that is wrong.
    """
    problems: list[Problem | str] = []
    gpus = tuple(name for text in own.get("gpu", "").split(",") if (name := _gpu(text.strip(), problems)))
    image = own.get("image") or environ.get(IMAGE_VARIABLE) or ""
    if not image or image == "1":
        rule = "is required: the image of this job in a registry that RunPod reaches"
        way_out = f"docker build and push it, then --image NAME, or {IMAGE_VARIABLE}=NAME"
        problems.append(Problem(setting="--image", value=None, rule=rule, way_out=way_out))
    cloud = own.get("cloud", "secure").upper()
    if cloud not in ("SECURE", "COMMUNITY"):
        problems.append(Problem(setting="--cloud", value=own["cloud"], rule="no such cloud", way_out="secure or community"))
    num_gpus = _number("--num-gpus", own.get("num_gpus", "1"), 1, problems)
    volume, disk = own.get("network_volume"), own.get("volume_disk")
    if volume == "1":
        rule, way_out = "needs the id of a volume", f"{CONSOLE_STORAGE} lists yours"
        problems.append(Problem(setting="--network-volume", value=None, rule=rule, way_out=way_out))
    if volume and disk:
        rule, way_out = "a pod has one of the two", "leave one out"
        problems.append(
            Problem(setting="--volume-disk", value=None, rule=f"{rule}, and --network-volume is set", way_out=way_out)
        )
    size = None if disk in (None, "1") else _number("--volume-disk", str(disk), SMALLEST_DISK_GB, problems)
    references = _references(own.get("secrets", ""), problems)
    if "follow" in own and "no_follow" in own:
        problems.append(Problem(setting="--follow", value=None, rule="--no-follow is set too", way_out="leave one out"))
    if problems:
        raise SettingsError(problems)
    return Wishes(
        image=image,
        gpus=gpus,
        num_gpus=num_gpus,
        cloud=cloud,
        network_volume=volume,
        has_volume_disk=disk is not None,
        volume_disk_gb=size,
        references=references,
        sends_plain="plain_secrets" in own,
        says_yes="yes" in own,
        follows="no_follow" not in own,
        as_json="json" in own,
    )


def referenced(value: str) -> str | None:
    """The RunPod secret that a value stands for; None when it stands for itself."""
    match = _REFERENCE.fullmatch(value.strip())
    return match[1] if match else None


def _gpu(text: str, problems: list[Problem | str]) -> str | None:
    if not text:
        return None
    if (gpu := find_gpu(text)) is not None:
        return gpu.name
    names = [gpu.name for gpu in known_gpus()]
    near = get_close_matches(text, names, n=1, cutoff=0.4)
    way_out = (f"did you mean {near[0]}? " if near else "") + "`python -m job plan` lists those that are known"
    problems.append(Problem(setting="--gpu", value=text, rule="no such GPU is known", way_out=way_out))
    return None


def _number(flag: str, text: str, least: int, problems: list[Problem | str]) -> int:
    if text.isdigit() and int(text) >= least:
        return int(text)
    rule = f"must be a whole number, {least} or more"
    problems.append(Problem(setting=flag, value=text, rule=rule, way_out="correct it"))
    return least


def _references(text: str, problems: list[Problem | str]) -> dict[str, str]:
    found = {}
    for entry in (part.strip() for part in text.split(",") if part.strip()):
        name, _, secret = entry.partition("=")
        secret = referenced(secret) or secret
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and re.fullmatch(r"\w+", secret):
            found[name] = secret
            continue
        rule = "must be VARIABLE=secret, several with commas between"
        way_out = "name the secret as RunPod's console does"
        problems.append(Problem(setting="--secrets", value=name or "***", rule=rule, way_out=way_out))
    return found
