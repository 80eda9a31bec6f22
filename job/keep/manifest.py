"""The list of what a whole folder holds: its text in, checked names, sizes and sha256 out.

A manifest comes from a store that others can write to, so nothing in it is believed: a name that would leave the folder makes
the manifest unreadable.
"""

import math
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

MANIFEST = "manifest.json"
MAX_NAME_BYTES = 255  # of one file's name on Linux; ours have a tenth


class DamagedError(Exception):
    """A folder lacks a file or holds another one than its manifest says; the message names the file."""


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True)

    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a whole folder holds. Fields that a later version added are passed over."""

    model_config = ConfigDict(frozen=True)

    step: int
    files: dict[str, FileEntry]
    eval_loss: float | None = None
    """Held-out loss at this step; None when it was not measured there, or was not finite."""

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            leaves = path.is_absolute() or ".." in path.parts or path.as_posix() != name or name in (".", MANIFEST)
            if leaves or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError(f"{name[:80]!r} is no name of a file inside the folder")
        return files

    @field_validator("eval_loss")
    @classmethod
    def _check_loss(cls, loss: float | None) -> float | None:
        return loss if loss is not None and math.isfinite(loss) else None


def parse_manifest(text: bytes, name: str) -> Manifest:
    """Read a manifest; `name` is what the error calls it.

    Raises:
        DamagedError: it is cut short, garbled, no manifest, or names a file outside its folder.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DamagedError(f"{name} is not readable ({first['msg']})") from None
