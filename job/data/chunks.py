"""Chunks of raw rows: packed by a reader in the main process, parsed by whoever gets them, here or in a worker.

A chunk is cheap to make (no row is parsed for it), holds all that its rows need, and begins and ends at rows that depend
on nothing but the source's content.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from job.data.reasons import Reason

Row = Mapping[str, Any]
Piece = tuple[str, Any]
"""What a reader yields: a form and a row's bytes (None: too large to hold), or "arrow" and a RecordBatch."""

CHUNK_ROWS = 1_000
CHUNK_BYTES = 4 * 2**20
MAX_DEPTH = 200
"""Deeper nesting is unreadable: well below Python's recursion limit, so that every later stage can walk a row."""

_OVERSIZED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows that follow each other in a source, not yet parsed."""

    first_row: int
    """0-based index of its first row in the source."""
    num_rows: int
    form: str
    """How to parse the payload: `json` and `text` hold a document for each row, `arrow` is an IPC stream."""
    payload: bytes = field(repr=False)  # other programs log what they fail with

    @property
    def digest(self) -> bytes:
        """16 bytes that tell its content, wherever it stands."""
        return hashlib.blake2b(self.payload, digest_size=16, person=self.form.encode()).digest()


def read_chunk(chunk: Chunk) -> Iterator[Row | Reason]:
    """Parse each row; a row that cannot be read is the reason why: UNREADABLE or OVERSIZED."""
    if chunk.form == "arrow":
        yield from _read_arrow(chunk.payload)
        return
    parse = _parse_json if chunk.form == "json" else _parse_text
    start = 4 * chunk.num_rows
    for length in struct.unpack_from(f"<{chunk.num_rows}i", chunk.payload):
        if length == _OVERSIZED:
            yield Reason.OVERSIZED
            continue
        yield parse(chunk.payload[start : start + length])
        start += length


def pack_chunks(
    pieces: Iterable[Piece], *, first_row: int = 0, max_rows: int = CHUNK_ROWS, max_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Pack rows into chunks, each closed when it has `max_rows` or at least `max_bytes`, and where the form changes."""
    packed_form, rows, num_bytes = "", list[bytes | None](), 0
    for form, piece in pieces:
        if rows and (form != packed_form or len(rows) >= max_rows or num_bytes >= max_bytes):
            yield _packed(packed_form, rows, first_row)
            first_row, rows, num_bytes = first_row + len(rows), [], 0
        packed_form = form
        if form == "arrow":
            for batch in _halved(piece, max_rows, max_bytes):
                yield Chunk(first_row=first_row, num_rows=batch.num_rows, form=form, payload=_arrow_bytes(batch))
                first_row += batch.num_rows
        else:
            rows.append(piece)
            num_bytes += len(piece or b"")
    if rows:
        yield _packed(packed_form, rows, first_row)


def cut_pieces(pieces: Iterable[Piece], start: int, stop: int | None) -> Iterator[Piece]:
    """Only the rows from `start` up to, not including, `stop`; reads no further than that."""
    row = 0
    if stop is not None and stop <= start:
        return
    for form, piece in pieces:
        num_rows = piece.num_rows if form == "arrow" else 1
        first = max(start - row, 0)
        last = num_rows if stop is None else min(num_rows, stop - row)
        if first < last:
            yield form, piece.slice(first, last - first) if last - first < num_rows else piece
        row += num_rows
        if stop is not None and row >= stop:
            return


def _packed(form: str, rows: list[bytes | None], first_row: int) -> Chunk:
    lengths = [_OVERSIZED if row is None else len(row) for row in rows]
    payload = b"".join([struct.pack(f"<{len(rows)}i", *lengths), *(row for row in rows if row)])
    return Chunk(first_row=first_row, num_rows=len(rows), form=form, payload=payload)


def _halved(batch: Any, max_rows: int, max_bytes: int) -> Iterator[Any]:
    if batch.num_rows <= 1 or (batch.num_rows <= max_rows and batch.nbytes <= max_bytes):
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _halved(batch.slice(0, half), max_rows, max_bytes)
    yield from _halved(batch.slice(half), max_rows, max_bytes)


def _arrow_bytes(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _read_arrow(payload: bytes) -> Iterator[Row | Reason]:
    import pyarrow

    with pyarrow.ipc.open_stream(payload) as reader:
        for batch in reader:
            try:
                yield from batch.to_pylist()
            except (ValueError, TypeError, OverflowError, KeyError, pyarrow.ArrowException):
                # One value has no Python form (bad UTF-8, a time with nanoseconds): only its row is lost.
                yield from (_arrow_row(batch, index) for index in range(batch.num_rows))


def _arrow_row(batch: Any, index: int) -> Row | Reason:
    import pyarrow

    try:
        row: Row = batch.slice(index, 1).to_pylist()[0]
    except (ValueError, TypeError, OverflowError, KeyError, pyarrow.ArrowException):
        return Reason.UNREADABLE
    return row


def _parse_json(data: bytes) -> Row | Reason:
    try:
        row = json.loads(str(data, "utf-8"))
    except (ValueError, RecursionError):
        return Reason.UNREADABLE
    if not isinstance(row, dict):
        return Reason.UNREADABLE
    # Counting brackets costs nothing beside parsing; most rows have fewer than could nest too deep.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_too_deep(row):
        return Reason.UNREADABLE
    return row


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _parse_text(data: bytes) -> Row | Reason:
    try:
        return {"text": str(data, "utf-8").replace("\r\n", "\n")}
    except UnicodeDecodeError:
        return Reason.UNREADABLE
