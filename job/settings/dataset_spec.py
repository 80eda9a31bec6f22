"""One entry of `DATASETS`: text of the form `where[?option=value&...]` in, a frozen `DatasetSpec` out.

Nothing is opened here beyond asking whether a local path exists.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlencode

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

COLUMN_ROLES = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "system",
    "text",
)
"""Roles that a column can be given: `prompt=input&completion=solution`."""

FORMATS = ("jsonl", "json", "csv", "parquet", "txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


class Where(StrEnum):
    """The kinds of place that a data set can lie in."""

    HUB = "Hub data set"
    LOCAL = "local file"
    PACKAGE = "file inside an installed package"
    S3 = "S3 object"
    HTTP = "web address"


def split_list(text: str) -> list[str]:
    """Split on commas and line ends; blanks around an entry and empty entries are dropped."""
    return [entry for part in re.split(r"[,\n]", text) if (entry := part.strip())]


def data_suffixes(where: str) -> tuple[str | None, str | None]:
    """The (format, compression) that a file name promises; None where it promises none."""
    path = Path(where)
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression:
        path = path.with_suffix("")
    suffix = path.suffix.lower().lstrip(".")
    return (suffix if suffix in FORMATS else None), compression


def package_file(where: str) -> Path:
    """The file that `pkg:package/path` names.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
    """
    package, _, inside = where.removeprefix("pkg:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no package {package!r} is installed")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise FileNotFoundError(f"package {package!r} has no file {inside!r}")
    return path


class DatasetSpec(BaseModel):
    """Where a data set lies and how to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: PositiveInt | None = None
    """Rows read at most, from the start."""
    format: Literal["jsonl", "json", "csv", "parquet", "txt"] | None = None
    """Only needed when the name does not say it."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What one row of a text file is, in the words of the `datasets` library."""
    columns: Annotated[dict[str, str], Field(default_factory=dict)]
    """Role -> column name, for columns that are not named after their role."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `where?option=value&...`.

        Raises:
            ValueError: an unknown option, a wrong value, or a local path that does not exist.
        """
        where, _, query = text.partition("?")
        pairs = parse_qsl(query, keep_blank_values=True)
        options = [name for name in cls.model_fields if name not in ("where", "columns")]
        known = [*options, *COLUMN_ROLES]
        if where.startswith(("http://", "https://")):
            foreign = [(name, value) for name, value in pairs if name not in known]
            where += "?" + urlencode(foreign) if foreign else ""
            pairs = [(name, value) for name, value in pairs if name in known]
        for name, _value in pairs:
            if name not in known:
                nearest = get_close_matches(name, known, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"known options: {', '.join(known)}"
                raise ValueError(f"{where} has an unknown option {name!r} ({hint})")
        try:
            spec = cls(
                where=where,
                columns={name: value for name, value in pairs if name in COLUMN_ROLES},
                **{name: value for name, value in pairs if name in options},
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{where}: option {first['loc'][0]}={first['input']}: {first['msg']}") from None
        spec._check_exists()
        return spec

    @property
    def kind(self) -> Where:
        if self.where.startswith("pkg:"):
            return Where.PACKAGE
        if self.where.startswith("s3://"):
            return Where.S3
        if self.where.startswith(("https://", "http://")):
            return Where.HTTP
        looks_like_a_path = self.where.startswith((".", "/", "~")) or any(data_suffixes(self.where))
        if looks_like_a_path or Path(self.where).exists():
            return Where.LOCAL
        return Where.HUB

    @property
    def local_path(self) -> Path:
        """The file of a local or packaged data set."""
        return package_file(self.where) if self.kind is Where.PACKAGE else Path(self.where).expanduser()

    def _check_exists(self) -> None:
        if self.kind is Where.PACKAGE:
            try:
                path = package_file(self.where)
            except FileNotFoundError as error:
                raise ValueError(f"{self.where}: {error}") from None
            if not path.is_file():
                raise ValueError(f"{self.where}: is a folder, and a data set is one file")
        elif self.kind is Where.LOCAL and not self.local_path.is_file():
            what = "is a folder, and a data set is one file" if self.local_path.is_dir() else "no such file"
            raise ValueError(f"{self.where}: {what} (looked in {Path.cwd()})")
        elif self.kind is Where.HUB and not _HUB_ID.match(self.where):
            raise ValueError(f"{self.where} is neither a file nor a Hub id (name or owner/name)")
        readable_by_name = self.kind is Where.HUB or self.format or data_suffixes(self.where.partition("?")[0])[0]
        if not readable_by_name:
            raise ValueError(f"{self.where}: the name does not say the format (add ?format= one of {', '.join(FORMATS)})")

    def __str__(self) -> str:
        default = DatasetSpec(where=self.where, columns={})
        options: Iterable[tuple[str, object]] = (
            (name, getattr(self, name))
            for name in DatasetSpec.model_fields
            if name not in ("where", "columns") and getattr(self, name) != getattr(default, name)
        )
        query = urlencode([*options, *self.columns.items()])
        separator = "&" if "?" in self.where else "?"  # a web address may have parameters of its own
        return f"{self.where}{separator}{query}" if query else self.where
