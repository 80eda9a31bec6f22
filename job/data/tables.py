"""Parquet and Arrow files in, record batches out, in order and each about a chunk in size.

Pictures and other values inside pass through as they are; nothing is decoded.
"""

from collections.abc import Iterator
from typing import IO

from job.data.chunks import CHUNK_BYTES, CHUNK_ROWS, Piece
from job.data.files import DataFile, unreadable

_BUFFER_BYTES = 2**20


def read_parquet(file: DataFile, stream: IO[bytes]) -> Iterator[Piece]:
    import pyarrow.parquet

    # A read buffer keeps memory flat however large the row groups are; over a network each column comes in one piece.
    # (Reading ahead is pyarrow's default since 26 at the latest, and has no use for the buffer: it reads whole row groups.)
    buffer_bytes = 0 if file.is_remote else _BUFFER_BYTES
    with pyarrow.parquet.ParquetFile(stream, buffer_size=buffer_bytes, pre_buffer=file.is_remote) as parquet:
        num_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups))
        row_bytes = num_bytes // max(parquet.metadata.num_rows, 1)
        batch_size = min(max(CHUNK_BYTES // max(row_bytes, 1), 1), CHUNK_ROWS)
        for batch in parquet.iter_batches(batch_size, columns=list(file.columns) if file.columns else None):
            yield "arrow", batch


def read_arrow(file: DataFile, stream: IO[bytes]) -> Iterator[Piece]:
    """An IPC stream, or an IPC file, which is a stream between a mark and a footer."""
    import pyarrow

    if not stream.peek(1):  # type: ignore[attr-defined]
        return
    if stream.peek(8)[:6] == b"ARROW1":  # type: ignore[attr-defined]
        stream.read(8)
    with pyarrow.ipc.open_stream(stream) as reader:
        for batch in reader:
            batch.validate(full=True)  # damaged offsets would crash the process later
            yield "arrow", batch


def count_rows(file: DataFile) -> int | None:
    """The number of rows where the file tells it without being read; None elsewhere."""
    import pyarrow.parquet

    try:
        with file.open() as raw:
            if file.compression:
                return None
            if file.format == "parquet":
                with pyarrow.parquet.ParquetFile(raw) as parquet:
                    return int(parquet.metadata.num_rows)
            if file.format == "arrow" and (path := getattr(raw, "name", None)):
                with pyarrow.memory_map(str(path)) as mapped:
                    mapped.seek(8 if raw.read(6) == b"ARROW1" else 0)
                    return sum(int(batch.num_rows) for batch in pyarrow.ipc.open_stream(mapped))
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(file, error) from error
    return None
