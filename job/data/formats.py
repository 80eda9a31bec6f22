"""The content of a data file in, its raw rows out, in order: JSON lines, JSON, CSV and plain text; tables.py has the rest.

Rows are split here and parsed elsewhere (chunks.py), except where only a parser can find their ends (CSV, JSON arrays).
Memory does not grow with the file.
"""

import csv
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import IO, Any

import ijson

from job.data.chunks import Piece
from job.data.files import MAX_ROW_BYTES, DataFile, UnreadableFileError, open_checked, split_lines, unreadable
from job.data.tables import read_arrow, read_parquet
from job.errors import DataError

_ROW_COLUMNS = ("messages", "conversations", "history", "tools")
"""Lists of objects that belong to one row; another list in a JSON object is the list of all rows."""

csv.field_size_limit(min(sys.maxsize, MAX_ROW_BYTES))  # the standard limit of 128 KiB is shorter than a long answer


class _OversizedLineError(Exception):
    """A line was skipped, because it is longer than a row may be."""


def read_pieces(file: DataFile) -> Iterator[Piece]:
    """Yield each raw row.

    Raises:
        DataError: the file cannot be read on; the message names it.
    """
    import pyarrow

    try:
        with file.open() as raw:
            yield from _PIECES[file.format](file, open_checked(file, raw))
    except ijson.JSONError as error:
        problem = str(error).splitlines()[0].removeprefix("b'") if str(error) else "cut short"
        raise DataError(f"{file.label}: cannot be read: not valid JSON: {problem}") from error
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pyarrow.ArrowException, UnreadableFileError) as error:
        raise unreadable(file, error) from error


def _line_pieces(file: DataFile, stream: IO[bytes]) -> Iterator[Piece]:
    form = "text" if file.format == "txt" else "json"
    for line in split_lines(stream):
        if line is None:
            yield form, None
        elif stripped := line.strip():
            yield form, stripped


def _text_pieces(file: DataFile, stream: IO[bytes]) -> Iterator[Piece]:
    if file.sample_by == "line":
        yield from _line_pieces(file, stream)
    elif file.sample_by == "document":
        document = stream.read(MAX_ROW_BYTES + 1)
        if len(document) > MAX_ROW_BYTES:
            yield "text", None
        elif document.strip():
            yield "text", document
    else:
        yield from (("text", paragraph) for paragraph in _paragraphs(split_lines(stream), MAX_ROW_BYTES))


def _paragraphs(lines: Iterator[bytes | None], max_bytes: int) -> Iterator[bytes | None]:
    paragraph, num_bytes = list[bytes](), 0
    for line in chain(lines, [b"\n"]):
        if line is None or line.strip():
            num_bytes += max_bytes + 1 if line is None else len(line)
            if num_bytes <= max_bytes and line:
                paragraph.append(line.rstrip(b"\r\n"))
            continue
        if num_bytes:
            yield b"\n".join(paragraph) if num_bytes <= max_bytes else None
        paragraph, num_bytes = [], 0


class _CsvLines:
    """Decoded lines for the csv module; an iterator that goes on after the errors that it raises."""

    def __init__(self, lines: Iterator[bytes | None]) -> None:
        self._lines = lines
        self.is_damaged = False
        """Whether a line since the last reset was not UTF-8."""

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        if (line := next(self._lines)) is None:
            raise _OversizedLineError
        try:
            return str(line, "utf-8")
        except UnicodeDecodeError:
            self.is_damaged = True
            return str(line, "utf-8", "replace")


def _csv_pieces(file: DataFile, stream: IO[bytes]) -> Iterator[Piece]:
    """Rows under the header; one with more cells than that has an unquoted comma somewhere, and cannot be trusted."""
    lines = _CsvLines(split_lines(stream))
    delimiter = file.delimiter or ("\t" if file.format == "tsv" else ",")
    if len(delimiter) != 1:
        raise UnreadableFileError(f"its cells are separated by {delimiter!r}; only single characters are supported")
    # strict: a quote that never closes is an error in its row, and the next line is read as a row again
    reader = csv.reader(lines, delimiter=delimiter, quotechar=file.quotechar, strict=True)
    try:
        header = list(file.columns) if file.columns else next((row for row in reader if row), [])
    except _OversizedLineError:
        raise UnreadableFileError("its header line is longer than a row may be") from None
    repeated = [name for name, count in Counter(header).items() if name and count > 1]
    if repeated:
        raise UnreadableFileError(f"column names appear twice ({', '.join(repeated[:5])}); rename them in the header")
    while True:
        lines.is_damaged = False
        first_line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _OversizedLineError:
            yield "json", None
            continue
        except csv.Error as error:
            if "field larger" in str(error):
                yield "json", None
            elif "unexpected end" in str(error) and reader.line_num > first_line:
                raise UnreadableFileError(f"a quote in the row at line {first_line} is never closed") from error
            else:
                yield "json", b""
            continue
        if cells:
            is_whole = len(cells) <= len(header) and not lines.is_damaged
            cells += [None] * (len(header) - len(cells))  # type: ignore[list-item]
            # Columns without a name are what is left of trailing commas.
            row = {name: cell for name, cell in zip(header, cells, strict=False) if name}
            yield "json", json.dumps(row).encode() if is_whole else b""


class _Bounded:
    """Reads through, and fails when more than a row may have was read since the last row ended."""

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self._stream, self._max_bytes, self.num_bytes = stream, max_bytes, 0

    def read(self, size: int = -1) -> bytes:
        if self.num_bytes > self._max_bytes:
            raise UnreadableFileError(f"one of its rows is larger than {self._max_bytes:,} bytes; save it as JSON lines")
        data = self._stream.read(size)
        self.num_bytes += len(data)
        return data


def _json_pieces(file: DataFile, stream: IO[bytes]) -> Iterator[Piece]:
    """A list of objects, an object with such a list in it, one object, or JSON lines that go by the name of .json."""
    while (start := stream.peek(1)[:1]).isspace():  # type: ignore[attr-defined]
        stream.read(1)
    bounded = _Bounded(stream, MAX_ROW_BYTES)
    if start == b"[":
        rows = ijson.items(bounded, "item")
    elif not start or (not file.field and _is_one_row_a_line(file)):
        yield from _line_pieces(file, stream)
        return
    elif key := _find_row_list(file):
        rows = _rows_in_object(bounded, key, may_be_several=bool(file.field))
    else:
        yield "json", stream.read(MAX_ROW_BYTES)  # _find_row_list has seen that it is not larger
        return
    for row in rows:
        bounded.num_bytes = 0
        yield "json", _as_json(row)


def _is_one_row_a_line(file: DataFile) -> bool:
    """Whether the first line is an object of its own, and not one that holds all rows."""
    with file.open() as raw:
        lines = split_lines(open_checked(file, raw))
        first = next((line for line in lines if line is None or line.strip()), None)
        try:
            value = json.loads(first or b"")
        except (ValueError, RecursionError):
            second = next((line for line in lines if line is None or line.strip()), b"")
            return first is not None and (second or b"").lstrip().startswith(b"{")
        holds_rows = isinstance(value, dict) and any(_is_row_list(key, item) for key, item in value.items())
        return not holds_rows or any(line is None or line.strip() for line in lines)


def _is_row_list(key: str, value: Any) -> bool:
    return key not in _ROW_COLUMNS and isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _find_row_list(file: DataFile) -> str | None:
    """The key of the first list of objects in a JSON object; None where the object itself is a row."""
    with file.open() as raw:
        for key, _ in _watch_lists(ijson.parse(_Bounded(open_checked(file, raw), MAX_ROW_BYTES))):
            if key and file.field in (None, key) and (file.field or key not in _ROW_COLUMNS):
                return key
    if file.field:
        raise UnreadableFileError(f"it has no list of objects under the key {file.field!r}")
    return None


def _watch_lists(events: Iterator[tuple[str, str, Any]]) -> Iterator[tuple[str | None, tuple[str, str, Any]]]:
    """Each event, with the key of a list of objects at the top where the event begins that list's first object."""
    depth, previous = 0, ("", "", None)
    for event in events:
        depth += (event[1] in ("start_map", "start_array")) - (event[1] in ("end_map", "end_array"))
        begins = event[1] == "start_map" and previous[1] == "start_array" and depth == 3
        yield (previous[0] if begins else None), event
        previous = event


def _rows_in_object(stream: _Bounded, wanted: str, *, may_be_several: bool) -> Iterator[Any]:
    lists = list[str]()

    def watched() -> Iterator[tuple[str, str, Any]]:
        for key, event in _watch_lists(ijson.parse(stream)):
            if key:
                lists.append(key)
            yield event

    yield from ijson.items(watched(), f"{wanted}.item")
    if len(lists) > 1 and not may_be_several:
        raise UnreadableFileError(f"it holds several lists of objects ({', '.join(lists)}); save one of them as JSON lines")


def _as_json(row: Any) -> bytes:
    try:
        return json.dumps(row, default=float).encode()  # numbers with a fraction come as Decimal
    except (ValueError, RecursionError):
        return b""


_PIECES: dict[str, Callable[[DataFile, IO[bytes]], Iterator[Piece]]] = {
    "jsonl": _line_pieces,
    "json": _json_pieces,
    "csv": _csv_pieces,
    "tsv": _csv_pieces,
    "txt": _text_pieces,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
