"""One entry of `DATASETS`: text of the form `where[?option=value&...]` in, a frozen `DatasetSpec` out.

Nothing is opened here: local paths are only asked whether they exist, and folders and patterns what they hold.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self
from urllib.parse import parse_qsl, unquote_plus, urlencode

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

MIN_SIGNATURE = 16
"""Characters; a shorter value in a web address is no credential."""
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
    "history",
    "tools",
)
"""Roles that a column can be given: `prompt=input&completion=solution`."""

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ALIASES = {"ndjson": "jsonl", "jsonlines": "jsonl", "text": "txt"}
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the `datasets` library writes beside its data."""
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_SPLIT = re.compile(r"^([^\[\]+]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")


class Where(StrEnum):
    """The kinds of place that a data set can lie in."""

    HUB = "Hub data set"
    LOCAL = "local file or folder"
    PACKAGE = "file or folder inside an installed package"
    S3 = "S3 object"
    HTTP = "web address"


class SplitPart(NamedTuple):
    """One term of a split: `train[10%:-5]`; bounds as in Python, None where open, with their `%`."""

    name: str
    start: str | None = None
    stop: str | None = None


def parse_split(text: str) -> tuple[SplitPart, ...]:
    """Read `name`, `name[start:stop]`, `[start:stop]` (of train) or several of them joined by `+`.

    Raises:
        ValueError: it is none of these.
    """
    parts = []
    for term in re.split(r"[+\s]+", text.strip()):  # a plus sign in an option reads as a blank
        if not (match := _SPLIT.match(term)):
            raise ValueError(f"{term!r} is no split; write name, name[start:stop] or name[:10%]")
        parts.append(SplitPart(match[1] or "train", match[2], match[3]))
    return tuple(parts)


def split_list(text: str) -> list[str]:
    """Split on commas and line ends; blanks around an entry and empty entries are dropped."""
    return [entry for part in re.split(r"[,\n]", text) if (entry := part.strip())]


def distinct_labels(specs: "Iterable[DatasetSpec]") -> list[str]:
    """The label of each data set; a second one of the same name gets a number."""
    seen: Counter[str] = Counter()
    labels = []
    for spec in specs:
        seen[spec.label] += 1
        labels.append(spec.label if seen[spec.label] == 1 else f"{spec.label} ({seen[spec.label]})")
    return labels


def data_suffixes(where: str) -> tuple[str | None, str | None]:
    """The (format, compression) that a file name promises; None where it promises none."""
    path = Path(where)
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression:
        path = path.with_suffix("")
    suffix = path.suffix.lower().lstrip(".")
    suffix = _ALIASES.get(suffix, suffix)
    return (suffix if suffix in FORMATS else None), compression


def package_file(where: str) -> Path:
    """The file or folder that `pkg:package/path` names.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
    """
    path = _package_path(where)
    if not path.exists():
        package, _, inside = where.removeprefix("pkg:").partition("/")
        raise FileNotFoundError(f"package {package!r} has no file {inside!r}")
    return path


def _package_path(where: str) -> Path:
    package, _, inside = where.removeprefix("pkg:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no package {package!r} is installed")
    return Path(next(iter(spec.submodule_search_locations))) / inside


def is_pattern(where: str) -> bool:
    """Whether a path is a pattern such as `data/*.jsonl`; a question mark begins the options, so it is none."""
    return "*" in where


def _match_pattern(path: Path) -> tuple[Path, Iterator[Path]]:
    """The folder before the first part with a star, and what the rest matches below it."""
    first = next(index for index, part in enumerate(path.parts) if "*" in part)
    root = Path(*path.parts[:first])
    return root, root.glob(str(Path(*path.parts[first:])))


def pick_data_files(names: Iterable[str], file_format: str | None) -> list[str]:
    """Of the names in a folder, those of data files, sorted.

    With a format given, those of that format; if no name says it, those whose names say no format at all.
    """
    shown = [n for n in names if not any(part.startswith(".") for part in n.split("/")) and Path(n).name not in _NOT_DATA]
    promised = {name: data_suffixes(name)[0] for name in sorted(shown)}
    if file_format is None:
        return [name for name, promise in promised.items() if promise]
    chosen = [name for name, promise in promised.items() if promise == file_format]
    return chosen or [name for name, promise in promised.items() if promise is None]


class DatasetSpec(BaseModel):
    """Where a data set lies and how to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    config: str | None = None
    split: str = "train"
    """`train`, `train[:1000]`, `train[10%:20%]`, `train+test`; files and folders only have `train`."""
    revision: str | None = None
    limit: PositiveInt | None = None
    """Rows read at most, from the start."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of this set beside the others when they are mixed; 1 = as it is."""
    format: Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"] | None = None
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
        spec._check_split()
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
        looks_like_a_path = self.where.startswith((".", "/", "~")) or any(data_suffixes(self.where)) or is_pattern(self.where)
        if looks_like_a_path or Path(self.where).exists():
            return Where.LOCAL
        return Where.HUB

    @property
    def local_path(self) -> Path:
        """The file, folder or pattern of a local or packaged data set."""
        return _package_path(self.where) if self.kind is Where.PACKAGE else Path(self.where).expanduser()

    def local_files(self) -> dict[str, Path]:
        """The data files of a local or packaged data set by their names below its folder, sorted; may be empty."""
        path = self.local_path
        if path.is_file():
            return {path.name: path}
        root, found = _match_pattern(path) if is_pattern(str(path)) else (path, path.rglob("*"))
        names = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
        return {name: names[name] for name in pick_data_files(names, self.format)}

    def _check_split(self) -> None:
        try:
            parts = parse_split(self.split)
        except ValueError as error:
            raise ValueError(f"{self.where}: option split={self.split}: {error}") from None
        if self.kind is not Where.HUB and any(part.name != "train" for part in parts):
            raise ValueError(f"{self.where}: option split={self.split}: only Hub data sets have splits (train[:1000] may cut)")

    @property
    def signatures(self) -> set[str]:
        """Long values in a web address, as written and decoded: a presigned one carries its credential there."""
        if self.kind is not Where.HTTP:
            return set()
        written = [pair.partition("=")[2] for pair in self.where.partition("?")[2].split("&")]
        return {value for text in written for value in (text, unquote_plus(text)) if len(value) >= MIN_SIGNATURE}

    @property
    def label(self) -> str:
        """What it is called in everything that is written down: no folder of this machine, no parameters of an address."""
        if self.kind is Where.LOCAL:
            shown = Path(self.where).expanduser().absolute().name
        elif self.kind is Where.HTTP:
            shown = self.where.partition("?")[0]
        else:
            return str(self)
        return str(self.model_copy(update={"where": shown}))

    def _check_exists(self) -> None:
        if self.kind is Where.HUB:
            if not _HUB_ID.match(self.where):
                raise ValueError(f"{self.where} is neither a file nor a Hub id (name or owner/name)")
            return
        holds_many = self.kind is Where.S3 and (self.where.count("/") == 2 or self.where.endswith("/"))
        holds_many |= is_pattern(self.where)
        if self.kind in (Where.LOCAL, Where.PACKAGE):
            path = self._existing_path()
            holds_many |= path.is_dir()
        if not holds_many and not self.format and not data_suffixes(self.where.partition("?")[0])[0]:
            raise ValueError(f"{self.where}: the name does not say the format (add ?format= one of {', '.join(FORMATS)})")

    def _existing_path(self) -> Path:
        try:
            path = self.local_path
            found = any(_match_pattern(path)[1]) if is_pattern(str(path)) else path.exists()
            if not found and self.kind is Where.PACKAGE:
                package_file(self.where)
        except FileNotFoundError as error:
            raise ValueError(f"{self.where}: {error}") from None
        if not found:
            raise ValueError(f"{self.where}: no such file (looked in {Path.cwd()})")
        return path

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
