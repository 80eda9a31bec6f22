"""An opened data set in; its shape, as the first rows show it, out."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from job.data.chunks import Chunk, read_chunk
from job.data.files import DataFile
from job.data.ranges import TooFarError
from job.data.reasons import Reason
from job.data.shapes import Layout, detect_layout
from job.data.sources import open_source
from job.errors import DataError
from job.settings import DatasetSpec, Where

NUM_PEEKED = 50
MOST_BYTES = 32 * 2**20
"""Read of a remote file at most by who only has a look: one row of the largest kind fits, at 10 MB/s in three seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """What a look at a data set tells."""

    layout: Layout | None
    """None when its first rows lie too deep in it to be read for a look."""
    num_bytes: int | None
    """Size of its files, packed as they are; None where one is unknown, or where less than all is read."""


def find_layout(spec: DatasetSpec, chunks: Iterable[Chunk]) -> Layout:
    """The shape that the first rows of a data set show.

    Raises:
        DataError: none of them can be read, or they have no shape that we know.
    """
    first = islice((row for chunk in chunks for row in read_chunk(chunk)), NUM_PEEKED)
    rows = [row for row in first if not isinstance(row, Reason)]
    if not rows:
        raise DataError(f"DATASETS={spec}: no row of the first {NUM_PEEKED} can be read; check the file and its format")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return detect_layout(spec, columns, rows)


def glimpse(spec: DatasetSpec, cache_dir: Path) -> Glimpse:
    """Open a data set and look at its first rows; nothing is downloaded that is kept.

    Raises:
        DataError, NetworkError: as preparation would.
    """
    source = open_source(spec, cache_dir, only_look=True)
    if spec.kind in (Where.HUB, Where.S3, Where.HTTP):
        source = source.through(_bounded)
    try:
        layout = find_layout(spec, source.beginning(NUM_PEEKED))
    except TooFarError:
        layout = None
    return Glimpse(layout=layout, num_bytes=source.num_bytes)


def _bounded(file: DataFile) -> DataFile:
    # Not as remote: columns come in small pieces then, for the sake of a few rows.
    return replace(file, open=partial(_open_bounded, file), is_remote=False)


def _open_bounded(file: DataFile) -> IO[bytes]:
    return io.BufferedReader(cast("io.RawIOBase", _Bounded(file.open())))


class _Bounded(io.RawIOBase):
    """Reads through, up to MOST_BYTES."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._num_bytes = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._num_bytes += len(data)
        if self._num_bytes > MOST_BYTES:
            raise TooFarError
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
