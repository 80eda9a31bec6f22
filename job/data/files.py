"""One data file in, its content out as a stream: unpacked, and known not to be a web page, an archive or a bomb.

What the rows in it are is known to formats.py and tables.py.
"""

import codecs
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from job.errors import DISK_ERRORS, DataError

MAX_ROW_BYTES = 64 * 2**20
"""A row above this is skipped: about 16 million tokens, more than any model's context."""
BOMB_BYTES, BOMB_RATIO = 2**30, 200  # text packs 3 to 20 times, logs up to 100
_BLOCK_BYTES = 2**20


class UnreadableFileError(Exception):
    """A file is not what it should be; the message says what it is instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file that can be opened again and again, and how to read it."""

    label: str
    """Names the DATASETS entry and the file, for messages."""
    format: str
    compression: str | None
    open: Callable[[], IO[bytes]]
    """A stream at the file's start that can seek."""
    is_remote: bool = False
    """Whether each place that is read costs a round trip."""
    num_bytes: int | None = None
    """Its size, where that is known without a request of its own."""
    sample_by: str = "line"
    delimiter: str | None = None
    quotechar: str = '"'
    columns: tuple[str, ...] | None = None
    """Names for CSV columns where no header line gives them."""
    field: str | None = None
    """The key of the list of rows in a JSON object."""


def open_checked(file: DataFile, raw: IO[bytes]) -> IO[bytes]:
    """The unpacked content of `raw`, after a byte order mark, if its first bytes do not say that it is something else."""
    head = raw.read(8)
    raw.seek(0)
    compression = file.compression
    if head.startswith(b"PK\x03\x04"):
        raise UnreadableFileError("it is a zip archive; unpack it, or pack it with gzip or zstd")
    if file.format not in ("parquet", "arrow") and compression is None:
        compression = "gzip" if head.startswith(b"\x1f\x8b") else "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else None
    if file.format == "parquet" and compression:
        raise UnreadableFileError(f"a parquet file inside {compression} cannot be read in part; unpack it")
    data = unpacked(raw, compression) if compression else raw
    stream = data if isinstance(data, io.BufferedReader) else io.BufferedReader(cast("io.RawIOBase", data))
    start = stream.peek(512)[:512]
    beginning = start.removeprefix(codecs.BOM_UTF8).lstrip()[:30].lower()
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableFileError("it is a Git LFS pointer and not the data; run `git lfs pull`")
    if file.format != "txt" and beginning.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")):
        raise UnreadableFileError("it looks like a web page, perhaps the error page of a server; download the data again")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and file.format not in ("parquet", "arrow"):
        raise UnreadableFileError("it is UTF-16; save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


class _Unpacking(io.RawIOBase):
    """Reads through, and stops a file that unpacks to far more than any data would."""

    def __init__(self, packed: IO[bytes], content: Any, bomb_bytes: int, bomb_ratio: float) -> None:
        self._packed, self._content, self._num_bytes = packed, content, 0
        self._bomb_bytes, self._bomb_ratio = bomb_bytes, bomb_ratio

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._content.read(len(buffer))
        self._num_bytes += len(data)
        if self._num_bytes > self._bomb_bytes and self._num_bytes > self._bomb_ratio * self._packed.tell():
            raise UnreadableFileError(
                f"it unpacks to more than {self._num_bytes:,} bytes, over {self._bomb_ratio} times its size: "
                "no real data does; unpack it yourself if it is meant to be so"
            )
        buffer[: len(data)] = data
        return len(data)


def unpacked(packed: IO[bytes], compression: str, bomb_bytes: int = BOMB_BYTES, bomb_ratio: float = BOMB_RATIO) -> IO[bytes]:
    """The content of a gzip or zstd file, which ends in an error when it is cut short or a bomb."""
    import pyarrow  # its zstd reader says when a file is cut short; that of zstandard does not

    content = gzip.GzipFile(fileobj=packed) if compression == "gzip" else pyarrow.CompressedInputStream(packed, "zstd")
    return io.BufferedReader(_Unpacking(packed, content, bomb_bytes, bomb_ratio), _BLOCK_BYTES)


def split_lines(stream: IO[bytes], max_bytes: int = MAX_ROW_BYTES) -> Iterator[bytes | None]:
    """Yield each line with its end; None for one that is longer than `max_bytes`, which is never held whole."""
    while line := stream.readline(max_bytes + 2):
        if len(line) <= max_bytes + 1 and (line.endswith(b"\n") or len(line) <= max_bytes):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_BLOCK_BYTES)
        yield None


def unreadable(file: DataFile, error: Exception) -> Exception:
    """The error to raise for this one: a full or broken disk is not the file's fault."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error
    return DataError(f"{file.label}: cannot be read: {error}")
