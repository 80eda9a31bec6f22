"""One entry of DATASETS in, its rows out in chunks and in order, whatever it lies in and however it is packed.

Nothing is read ahead: who stops early has downloaded no more than a little beyond. Memory does not grow with the source.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import IO

from job.data.chunks import Chunk, Piece, cut_pieces, pack_chunks
from job.data.files import DataFile
from job.data.formats import read_pieces
from job.data.hub import resolve_hub
from job.data.remote import fetch, list_remote, listing, look
from job.data.tables import count_rows
from job.errors import DataError
from job.settings.dataset_spec import FORMATS, DatasetSpec, SplitPart, Where, data_suffixes, parse_split


class Source:
    """An opened data set: its files are known to be there, and are read when chunks are asked for."""

    def __init__(self, spec: DatasetSpec, revision: str | None, splits: Mapping[str, Sequence[DataFile]]) -> None:
        self.spec = spec
        self.revision = revision
        """The commit of a Hub data set; None for everything else."""
        self.parts = [(splits[part.name], self._bounds(part, splits[part.name])) for part in parse_split(spec.split)]
        """Files, and which of their rows: from, up to."""

    def chunks(self) -> Iterator[Chunk]:
        """The rows; they are numbered from 0 in the source as it is cut by its split and limit.

        Raises:
            DataError: a file cannot be read, or there is no row at all; the message names the DATASETS entry.
            NetworkError: a server did not answer after several tries.
        """
        pieces = chain.from_iterable(_cut_files(files, start, stop) for files, (start, stop) in self.parts)
        return self._some(pack_chunks(cut_pieces(pieces, 0, self.spec.limit) if self.spec.limit else pieces))

    def beginning(self, num_rows: int) -> Iterator[Chunk]:
        """The first rows of its files, whatever its split and limit cut off: enough to see the columns.

        Raises:
            DataError, NetworkError: as `chunks`.
        """
        pieces = chain.from_iterable(read_pieces(file) for files, _ in self.parts for file in files)
        return self._some(pack_chunks(cut_pieces(pieces, 0, num_rows), max_rows=num_rows))

    def _some(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        is_empty = True
        for chunk in chunks:
            is_empty = False
            yield chunk
        if is_empty:
            raise DataError(f"DATASETS={self.spec}: no rows in it; check the file, its format and its split")

    def through(self, change: Callable[[DataFile], DataFile]) -> "Source":
        """The same data set, each of its files changed."""
        changed = copy(self)
        changed.parts = [([change(file) for file in files], bounds) for files, bounds in self.parts]
        return changed

    @property
    def num_bytes(self) -> int | None:
        """Size of its files, packed as they are; None where one is unknown, or where less than all is read."""
        sizes = [file.num_bytes for files, _ in self.parts for file in files]
        is_cut = self.spec.limit or any(part.start or part.stop for part in parse_split(self.spec.split))
        return None if is_cut or None in sizes else sum(size or 0 for size in sizes)

    def _bounds(self, part: SplitPart, files: Sequence[DataFile]) -> tuple[int, int | None]:
        """Row numbers of a slice; percentages and negative numbers need the number of rows."""
        num_rows: int | None = None
        if any(bound and ("%" in bound or "-" in bound) for bound in (part.start, part.stop)):
            counts = [count_rows(file) for file in files]
            if None in counts:
                raise DataError(
                    f"DATASETS={self.spec}: the number of rows is only known of parquet and local Arrow files; "
                    "cut by row numbers (train[:1000]) or with limit="
                )
            num_rows = sum(count for count in counts if count)
        stop = None if part.stop is None else _row_number(part.stop, num_rows)
        return _row_number(part.start or "0", num_rows), stop


def open_source(spec: DatasetSpec, cache_dir: Path, *, only_look: bool = False) -> Source:
    """Find the files of a data set, and make sure that the first of them can be had.

    Args:
        spec: where and what.
        cache_dir: where downloads from S3 and the web are kept.
        only_look: read files from S3 and the web where they lie, and keep nothing of them.

    Raises:
        DataError: there are none, or they may not be read; the message lists what exists.
        NetworkError: a server did not answer after several tries.
    """
    match spec.kind:
        case Where.HUB:
            return Source(spec, *resolve_hub(spec, cache_dir))
        case Where.S3 | Where.HTTP:
            opened = _looked_at if only_look else _remote_file
            files = [opened(spec, address, num_bytes, cache_dir) for address, num_bytes in list_remote(spec).items()]
            files[0].open().close()
        case _:
            found = spec.local_files()
            if not found:
                folder = spec.local_path
                names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
                raise DataError(
                    f"DATASETS={spec}: no data files there; {listing(names)}; "
                    f"data files end in .{', .'.join(FORMATS)} (also with .gz or .zst after that)"
                )
            files = [_local_file(spec, name, path, len(found)) for name, path in found.items()]
    return Source(spec, None, {"train": files})


def _local_file(spec: DatasetSpec, name: str, path: Path, num_files: int) -> DataFile:
    def opened() -> IO[bytes]:
        return path.open("rb")

    promised, compression = data_suffixes(name)
    return DataFile(
        label=f"DATASETS={spec}" + (f": {name}" if num_files > 1 else ""),
        format=spec.format or promised or "txt",
        compression=compression,
        open=opened,
        num_bytes=path.stat().st_size,
        sample_by=spec.sample_by,
    )


def _remote_file(spec: DatasetSpec, address: str, num_bytes: int | None, cache_dir: Path) -> DataFile:
    @cache
    def downloaded() -> Path:
        return fetch(spec, address, cache_dir)

    def opened() -> IO[bytes]:
        return downloaded().open("rb")

    promised, compression = data_suffixes(address.partition("?")[0])
    return DataFile(
        label=f"DATASETS={spec}" + (f": {address}" if address != spec.where else ""),
        format=spec.format or promised or "txt",
        compression=compression,
        open=opened,
        num_bytes=num_bytes,
        sample_by=spec.sample_by,
    )


def _looked_at(spec: DatasetSpec, address: str, num_bytes: int | None, cache_dir: Path) -> DataFile:
    looked = cache(partial(look, spec, address))
    file = _remote_file(spec, address, looked()[1] if num_bytes is None else num_bytes, cache_dir)
    return replace(file, open=lambda: looked()[0]())


def _cut_files(files: Sequence[DataFile], start: int, stop: int | None) -> Iterator[Piece]:
    """The rows of files that follow each other, from `start` to `stop`; files before it are not read where that can be."""
    skipped = 0
    rest = list(files)
    while start and rest and (num_rows := count_rows(rest[0])) is not None and skipped + num_rows <= start:
        skipped += num_rows
        rest = rest[1:]
    pieces = chain.from_iterable(read_pieces(file) for file in rest)
    return cut_pieces(pieces, start - skipped, None if stop is None else stop - skipped) if start or stop is not None else pieces


def _row_number(bound: str, num_rows: int | None) -> int:
    number = int(bound.removesuffix("%"))
    if num_rows is None:
        return number
    if bound.endswith("%"):
        number = round(number * num_rows / 100)  # to the nearest row, as the `datasets` library does
    return min(max(number + num_rows if number < 0 else number, 0), num_rows)
