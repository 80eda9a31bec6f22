"""Rows come in whole, in order and in chunks of the same make, from files of every format in folders, S3 and the web."""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hub_server import HubServer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from job.data import files as data_files
from job.data import remote
from job.data.chunks import MAX_DEPTH, Chunk, pack_chunks, read_chunk
from job.data.formats import read_pieces
from job.data.reasons import Reason
from job.data.sources import open_source
from job.errors import DataError, NetworkError
from job.settings.dataset_spec import DatasetSpec
from job.settings.identity import data_identity

BAD, BIG = Reason.UNREADABLE, Reason.OVERSIZED


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


ROWS = [
    pair('Quote "this", please?', "A line,\nand another."),
    pair("Pusula nedir?", "Yön gösterir. 🧭"),
    *(pair(f"Question {number}?", f"Answer {number}.") for number in range(5)),
]


def as_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows: Sequence[Mapping[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Mapping[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), buffer, **options)
    return buffer.getvalue()


def as_arrow(rows: Sequence[Mapping[str, Any]], new: Callable[..., Any] = pyarrow.ipc.new_stream) -> bytes:
    buffer, table = io.BytesIO(), pyarrow.Table.from_pylist([dict(row) for row in rows])
    with new(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Sequence[Mapping[str, str]]], bytes]] = {
    "jsonl": as_jsonl,
    "ndjson": as_jsonl,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "arrow": as_arrow,
    "parquet": as_parquet,
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def chunks_of(where: Path | str, cache: Path = Path("/nowhere")) -> list[Chunk]:
    return list(open_source(DatasetSpec.parse(str(where)), cache).chunks())


def rows_of(where: Path | str, cache: Path = Path("/nowhere")) -> list[Any]:
    row, rows = 0, list[Any]()
    for chunk in chunks_of(where, cache):
        assert chunk.first_row == row
        items = list(read_chunk(chunk))
        assert len(items) == chunk.num_rows > 0
        row, rows = row + len(items), rows + items
    return rows


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Formats


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix != "parquet"])
def test_every_format_and_packing_holds_the_same_rows(tmp_path: Path, suffix: str, packing: str) -> None:
    assert rows_of(written(tmp_path / f"rows.{suffix}{packing}", PACKINGS[packing](FORMATS[suffix](ROWS)))) == ROWS


def test_parquet_holds_them_too_and_is_refused_inside_gzip(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "rows.parquet", as_parquet(ROWS))) == ROWS
    with pytest.raises(DataError, match="parquet file inside gzip"):
        rows_of(written(tmp_path / "rows.parquet.gz", gzip.compress(as_parquet(ROWS))))


def test_an_arrow_file_is_read_like_an_arrow_stream(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "rows.arrow", as_arrow(ROWS, pyarrow.ipc.new_file))) == ROWS


def test_what_the_datasets_library_saved_is_read_without_its_own_notes(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert rows_of(tmp_path / "saved") == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, suffix: str) -> None:
    assert rows_of(written(tmp_path / f"rows.{suffix}", b"\xef\xbb\xbf" + FORMATS[suffix](ROWS))) == ROWS


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (as_jsonl(ROWS), ROWS),
        (b"{broken\n" + as_jsonl(ROWS), [BAD, *ROWS]),
        (json.dumps({"version": 2, "data": ROWS, "n": [1, 2]}).encode(), ROWS),
        (json.dumps({"version": {"a": [{}]}, "data": ROWS}, indent=2).encode(), ROWS),
        (json.dumps(ROWS[0]).encode(), ROWS[:1]),
        (json.dumps(ROWS[0], indent=2).encode(), ROWS[:1]),
        (json.dumps({"messages": [{"role": "user"}]}, indent=2).encode(), [{"messages": [{"role": "user"}]}]),
        (json.dumps({"messages": [{"role": "user"}]}).encode(), [{"messages": [{"role": "user"}]}]),
        (b'[{"a": 1.5, "b": 123456789012345678901234567890}, 7, {"a": 1e400}]', None),
    ],
)
def test_what_goes_by_the_name_of_json_is_read(tmp_path: Path, text: bytes, rows: list[Any] | None) -> None:
    expected = [{"a": 1.5, "b": 123456789012345678901234567890}, BAD, {"a": float("inf")}] if rows is None else rows
    assert rows_of(written(tmp_path / "rows.json", text)) == expected


def test_a_json_object_with_two_lists_of_rows_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", json.dumps({"train": ROWS, "test": ROWS}).encode())
    with pytest.raises(DataError, match=r"several lists of objects \(train, test\)"):
        rows_of(path)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_text_file_is_cut_into_lines_paragraphs_or_not_at_all(tmp_path: Path, packing: str, mark: bytes) -> None:
    path = written(tmp_path / f"book.txt{packing}", PACKINGS[packing](mark + "one\r\n two\n\n \nüç\n".encode()))
    assert rows_of(path) == [{"text": "one"}, {"text": "two"}, {"text": "üç"}]
    assert rows_of(f"{path}?sample_by=paragraph") == [{"text": "one\n two"}, {"text": "üç"}]
    assert rows_of(f"{path}?sample_by=document") == [{"text": "one\n two\n\n \nüç\n"}]


def test_a_format_option_and_a_packing_that_the_name_does_not_say_are_understood(tmp_path: Path) -> None:
    assert rows_of(f"{written(tmp_path / 'rows', as_csv(ROWS))}?format=csv") == ROWS
    assert rows_of(written(tmp_path / "rows.jsonl", gzip.compress(as_jsonl(ROWS)))) == ROWS


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    frames = [PACKINGS[".zst"](as_jsonl(part) + b"\n") for part in (ROWS[:3], ROWS[3:])]
    assert rows_of(written(tmp_path / "rows.jsonl.zst", b"".join(frames))) == ROWS


# Chunks

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
some_rows = st.lists(st.fixed_dictionaries({"a": cells, "b": cells}), min_size=1, max_size=30)


def naive_csv(data: bytes) -> list[Any]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def naive_jsonl(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.split(b"\n")]


NAIVE: dict[str, Callable[[bytes], list[Any]]] = {
    "csv": naive_csv,
    "jsonl": naive_jsonl,
    "json": json.loads,
    "parquet": lambda data: pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist(),
    "arrow": lambda data: pyarrow.ipc.open_stream(data).read_all().to_pylist(),
}


@given(rows=some_rows, suffix=st.sampled_from(sorted(NAIVE)), max_rows=st.integers(1, 40), max_bytes=st.integers(1, 300))
@hypothesis_settings(max_examples=150, deadline=None)
def test_chunks_of_any_size_hold_what_a_plain_reader_reads(
    rows: list[dict[str, str]], suffix: str, max_rows: int, max_bytes: int
) -> None:
    data = FORMATS[suffix](rows)
    file = data_files.DataFile(label="DATASETS=x", format=suffix, compression=None, open=lambda: io.BytesIO(data))
    chunks = list(pack_chunks(read_pieces(file), max_rows=max_rows, max_bytes=max_bytes))
    assert [row for chunk in chunks for row in read_chunk(chunk)] == NAIVE[suffix](data)
    assert all(0 < chunk.num_rows <= max_rows for chunk in chunks)
    assert [chunk.first_row for chunk in chunks] == [sum(c.num_rows for c in chunks[:n]) for n in range(len(chunks))]
    again = list(pack_chunks(read_pieces(file), max_rows=max_rows, max_bytes=max_bytes))
    assert [chunk.digest for chunk in chunks] == [chunk.digest for chunk in again]


def test_a_chunk_has_a_thousand_rows_or_four_mebibytes(tmp_path: Path) -> None:
    small = written(tmp_path / "small.jsonl", b'{"a": 1}\n' * 2500)
    assert [chunk.num_rows for chunk in chunks_of(small)] == [1000, 1000, 500]
    for name, data in (
        ("large.jsonl", as_jsonl([{"a": "x" * 2**20}] * 10)),
        ("large.parquet", as_parquet([{"a": f"{n}" * 2**20} for n in range(10)])),
    ):
        chunks = chunks_of(written(tmp_path / name, data))
        assert 3 <= len(chunks) <= 6 and max(len(chunk.payload) for chunk in chunks) < 6 * 2**20


def test_a_digest_tells_the_content_and_not_the_place() -> None:
    chunk = Chunk(first_row=0, num_rows=1, form="json", payload=b"x")
    assert len(chunk.digest) == 16
    assert replace(chunk, first_row=9).digest == chunk.digest
    assert chunk.digest not in (replace(chunk, form="text").digest, replace(chunk, payload=b"y").digest)


def test_reading_a_large_file_holds_a_few_chunks_and_never_the_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "y" * 1000}).encode()
    path = written(tmp_path / "rows.jsonl", (line + b"\n") * 60_000)
    source = open_source(DatasetSpec.parse(str(path)), tmp_path)
    assert next(source.chunks()) == next(source.chunks())  # each call begins at the start
    tracemalloc.start()
    num_rows = sum(chunk.num_rows for chunk in source.chunks())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 60_000 and peak_bytes < 16 * 2**20


# Rubbish


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n[1]\nnull\n{"a": 2', [{"a": 1}, BAD, BAD, BAD, BAD]),
        ("a.jsonl", b'{"a": "\xff"}\n\0\0\n{"a": 1}', [BAD, BAD, {"a": 1}]),
        ("a.jsonl", b"[" * 100_000 + b'\n{"a": 1}', [BAD, {"a": 1}]),
        ("a.jsonl", b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", [BAD]),
        ("a.jsonl", b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", None),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", [BAD]),
        ("a.json", b'[{"a": ' + b"[" * 5000 + b"]" * 5000 + b'}, {"a": 1}]', [BAD, {"a": 1}]),
        (
            "a.csv",
            b"a,b\n1,2\n1,2,3\n4\n\n\xff,5\n6,7",
            [{"a": "1", "b": "2"}, BAD, {"a": "4", "b": None}, BAD, {"a": "6", "b": "7"}],
        ),
        ("a.csv", b"a,b,,\n1,2,,\n", [{"a": "1", "b": "2"}]),
        ("a.csv", b'a,b\n"x,1\ny,"z"\n3,4\n', [BAD, {"a": "3", "b": "4"}]),
        ("a.csv", b'a,b\n1,2\n3,"4\n', [{"a": "1", "b": "2"}, BAD]),
        ("a.txt", b"one\n\xff\ntwo", [{"text": "one"}, BAD, {"text": "two"}]),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n{"a": [null]}', [{"a": 1}, {"a": "x"}, {"a": [None]}]),
    ],
)
def test_a_bad_row_is_counted_and_those_around_it_are_read(tmp_path: Path, name: str, data: bytes, expected: Any) -> None:
    rows = rows_of(written(tmp_path / name, data))
    assert rows == expected if expected else isinstance(rows[0], dict)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b"", "no rows in it"),
        ("a.jsonl", b"\n \n", "no rows in it"),
        ("a.jsonl", b"\n <!DOCTYPE html><html>Sign in</html>", "looks like a web page"),
        ("a.csv", b"<html>503</html>", "looks like a web page"),
        ("a.parquet", b"<html>503</html>", "looks like a web page"),
        ("a.jsonl.gz", gzip.compress(b"<html>503</html>", mtime=0), "looks like a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("a.jsonl", b"PK\x03\x04 and so on", "zip archive"),
        ("a.csv", "a,b\n1,2".encode("utf-16"), "UTF-16"),
        ("a.json", b'[{"a": 1}, {"a"', "not valid JSON"),
        ("a.json", b"[this is none", "not valid JSON"),
        ("a.jsonl.gz", b"not packed", "cannot be read"),
        ("a.jsonl.zst", b"not packed", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(as_jsonl(ROWS), mtime=0)[:-12], "cannot be read"),
        ("a.jsonl.zst", PACKINGS[".zst"](as_jsonl(ROWS))[:-12], "cannot be read"),
        ("a.parquet", as_parquet(ROWS)[:-12], "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.arrow", as_arrow(ROWS)[:300], "cannot be read"),
        ("a.csv", b"a,b,a\n1,2,3\n", "column names appear twice"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n7,8\n', "quote in the row at line 3 is never closed"),
    ],
)
def test_a_file_of_rubbish_is_one_error_that_names_it(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    path = written(tmp_path / name, data)
    with pytest.raises(DataError, match=f"^DATASETS={re.escape(str(path))}.*{problem}"):
        rows_of(path)


def test_a_line_of_five_megabytes_is_a_row(tmp_path: Path) -> None:
    [row] = rows_of(written(tmp_path / "a.jsonl", json.dumps({"text": "x" * 5_000_000}).encode()))
    assert len(row["text"]) == 5_000_000


def test_a_line_above_the_limit_is_skipped_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"a": 2}\n')
    source = open_source(DatasetSpec.parse(str(path)), tmp_path)
    tracemalloc.start()
    rows = [row for chunk in source.chunks() for row in read_chunk(chunk)]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == [{"a": 1}, BIG, {"a": 2}]
    assert peak_bytes < 3 * data_files.MAX_ROW_BYTES  # a reader's buffers; the line itself is 100 MiB


@given(sizes=st.lists(st.integers(0, 12), max_size=8), ends=st.booleans(), max_bytes=st.integers(1, 8))
def test_exactly_the_lines_above_a_limit_are_skipped(sizes: list[int], ends: bool, max_bytes: int) -> None:
    data = b"\n".join(b"x" * size for size in sizes) + b"\n" * ends
    lines = data.splitlines(keepends=True)
    expected = [line if len(line.rstrip(b"\n")) <= max_bytes else None for line in lines]
    assert list(data_files.split_lines(io.BytesIO(data), max_bytes)) == expected


def test_a_hundred_thousand_columns_are_a_row(tmp_path: Path) -> None:
    row = {f"column {number}": "x" for number in range(100_000)}
    assert rows_of(written(tmp_path / "a.jsonl", as_jsonl([row]))) == [row]
    assert rows_of(written(tmp_path / "a.csv", as_csv([row]))) == [row]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_bomb_is_an_error_and_well_packed_data_is_none(compression: str) -> None:
    pack = gzip.compress if compression == "gzip" else PACKINGS[".zst"]
    bomb, fine = pack(bytes(2**24)), pack(as_jsonl(ROWS) * 1000)
    with pytest.raises(data_files.UnreadableFileError, match="unpacks to more than"):
        data_files.unpacked(io.BytesIO(bomb), compression, bomb_bytes=2**22).read()
    assert len(data_files.unpacked(io.BytesIO(bomb), compression).read()) == 2**24  # not large enough to hurt
    assert data_files.unpacked(io.BytesIO(fine), compression, bomb_bytes=2**10, bomb_ratio=2000).read()


def test_a_picture_column_passes_through_and_a_value_without_a_python_form_costs_one_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "image": {"bytes": b"\x89PNG", "path": "a.png"}}]
    assert rows_of(written(tmp_path / "a.parquet", as_parquet(rows))) == rows
    times = pyarrow.array([1, 1_000], pyarrow.timestamp("ns"))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": times, "b": [1, 2]}), buffer, version="2.6")
    first, second = rows_of(written(tmp_path / "b.parquet", buffer.getvalue()))
    assert second["b"] == 2 and (first is BAD or first["b"] == 1)
    texts = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": texts}), buffer)
    assert rows_of(written(tmp_path / "c.parquet", buffer.getvalue())) == [{"a": "fine"}, BAD]


def is_read_or_refused(where: str | Path, path: Path) -> bool:
    try:
        return all(isinstance(row, dict) or row in (BAD, BIG) for row in rows_of(where))
    except DataError as error:
        return str(error).startswith(f"DATASETS={path}")


@given(
    suffix=st.sampled_from(sorted({*FORMATS, "txt"})),
    packing=st.sampled_from(sorted(PACKINGS)),
    start=st.sampled_from(
        [b"", b"{", b"[", b'{"data": [', b'a,b\n"', b"\xef\xbb\xbf", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"]
    ),
    junk=st.binary(max_size=60) | st.text('{}[]",:\n1a', max_size=60).map(str.encode),
    sample_by=st.sampled_from(["line", "paragraph", "document"]),
    is_packed=st.booleans(),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_bytes_end_in_rows_reasons_or_an_error_that_names_the_entry(
    suffix: str, packing: str, start: bytes, junk: bytes, sample_by: str, is_packed: bool
) -> None:
    with TemporaryDirectory() as folder:
        data = start + junk
        path = written(Path(folder) / f"a.{suffix}{packing}", PACKINGS[packing](data) if is_packed else data)
        assert is_read_or_refused(f"{path}?sample_by={sample_by}", path)


@given(
    suffix=st.sampled_from(["parquet", "arrow", "jsonl.gz", "jsonl.zst", "json"]),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_a_damaged_file_ends_in_rows_reasons_or_an_error(suffix: str, damage: list[tuple[int, int]], cut: int) -> None:
    plain, _, packing = suffix.partition(".")
    data = bytearray(PACKINGS["." + packing if packing else ""](FORMATS[plain](ROWS)))
    for place, value in damage:
        data[place % len(data)] = value
    with TemporaryDirectory() as folder:
        path = written(Path(folder) / f"a.{suffix}", bytes(data[: len(data) - cut]))
        assert is_read_or_refused(path, path)


# Folders, patterns and slices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows 0 to 6, in files whose names sort so, among what is no data."""
    written(tmp_path / "data" / "a" / "1.jsonl", as_jsonl(ROWS[:2]))
    written(tmp_path / "data" / "a" / "2.csv.gz", gzip.compress(as_csv(ROWS[2:4])))
    written(tmp_path / "data" / "b.parquet", as_parquet(ROWS[4:6]))
    written(tmp_path / "data" / "c.json", json.dumps(ROWS[6:]).encode())
    for name in ("README.md", ".hidden.jsonl", ".cache/x.jsonl", "dataset_info.json", "script.py"):
        written(tmp_path / "data" / name, b"{}")
    return tmp_path / "data"


def test_a_folder_is_all_its_data_files_in_the_order_of_their_names(folder: Path) -> None:
    assert rows_of(folder) == ROWS
    assert rows_of(f"{folder}?format=csv") == ROWS[2:4]


@pytest.mark.parametrize(
    ("pattern", "rows"), [("a/*", ROWS[:4]), ("**/*.jsonl", ROWS[:2]), ("*.json", ROWS[6:]), ("*/*.csv.gz", ROWS[2:4])]
)
def test_a_pattern_is_the_files_that_it_matches(folder: Path, pattern: str, rows: list[Any]) -> None:
    assert rows_of(f"{folder}/{pattern}") == rows


def test_a_folder_and_a_pattern_inside_a_package_are_read() -> None:
    assert len(rows_of("pkg:job/samples")) > len(rows_of("pkg:job/samples/*.jsonl")) == 137 + 93


def test_a_folder_without_data_lists_what_it_holds(tmp_path: Path) -> None:
    written(tmp_path / "notes.md", b"x")
    with pytest.raises(DataError, match=r"no data files there; it holds notes\.md; data files end in \.jsonl"):
        rows_of(tmp_path)


def test_what_does_not_exist_is_refused_before_anything_is_opened(folder: Path) -> None:
    for where, problem in {
        f"{folder}/nothing/": "no such file",
        f"{folder}/*.tsv": "no such file",
        "pkg:job/samples/*.tsv": "has no file",
        f"{folder}/b.parquet?split=test": "only Hub data sets have splits",
        f"{folder}/b.parquet?split=train[:": "is no split",
        "owner/name?split=train[1]": "is no split",
        "owner/name?weight=0": "weight",
        "owner/name?weight=nan": "weight",
        "s3://bucket/folder": "does not say the format",
    }.items():
        with pytest.raises(ValueError, match=problem):
            DatasetSpec.parse(where)


def test_a_weight_reads_back_as_itself() -> None:
    spec = DatasetSpec.parse("owner/name?weight=0.25&history=h&tools=t")
    assert (spec.weight, spec.columns) == (0.25, {"history": "h", "tools": "t"})
    assert DatasetSpec.parse(str(spec)) == spec


numbers = st.none() | st.integers(0, 9)


@given(
    start=numbers, stop=numbers, limit=st.none() | st.integers(1, 9), suffix=st.sampled_from(sorted(FORMATS)), named=st.booleans()
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_slice_is_what_python_would_cut(
    start: int | None, stop: int | None, limit: int | None, suffix: str, named: bool
) -> None:
    expected = ROWS[start:stop][:limit]
    cut = f"{'train' if named else ''}[{'' if start is None else start}:{'' if stop is None else stop}]"
    with TemporaryDirectory() as name:
        path = written(Path(name) / f"rows.{suffix}", FORMATS[suffix](ROWS))
        where = f"{path}?split={cut}" + (f"&limit={limit}" if limit else "")
        if expected:
            assert rows_of(where) == expected
        else:
            with pytest.raises(DataError, match="no rows in it"):
                rows_of(where)


def test_a_slice_goes_across_files_and_leaves_whole_parquet_files_unread(folder: Path, tmp_path: Path) -> None:
    assert rows_of(f"{folder}?split=train[1:6]") == ROWS[1:6]
    for number in range(4):
        written(tmp_path / "parts" / f"{number}.parquet", as_parquet([{"a": number}] * 10))
    assert rows_of(f"{tmp_path / 'parts'}?split=train[25:31]") == [{"a": 2}] * 5 + [{"a": 3}]
    assert rows_of(f"{tmp_path / 'parts'}?split=train[:5]+train[38:]") == [{"a": 0}] * 5 + [{"a": 3}] * 2


@pytest.mark.parametrize(
    ("cut", "rows"),
    [("[:50%]", ROWS[:4]), ("[-2:]", ROWS[-2:]), ("[50%:-1]", ROWS[4:-1]), ("[:100%]", ROWS), ("[-99:1]", ROWS[:1])],
)
def test_percentages_and_negative_numbers_work_where_the_number_of_rows_is_known(
    tmp_path: Path, cut: str, rows: list[Any]
) -> None:
    for name, data in {
        "rows.parquet": as_parquet(ROWS),
        "rows.arrow": as_arrow(ROWS),
        "file.arrow": as_arrow(ROWS, pyarrow.ipc.new_file),
    }.items():
        assert rows_of(f"{written(tmp_path / name, data)}?split=train{cut}") == rows
    path = written(tmp_path / "rows.jsonl", as_jsonl(ROWS))
    with pytest.raises(DataError, match=r"cut by row numbers \(train\[:1000\]\) or with limit="):
        open_source(DatasetSpec.parse(f"{path}?split=train{cut}"), tmp_path)


def test_a_folder_counts_by_its_names_and_contents_and_not_by_where_it_lies(folder: Path) -> None:
    def identity(where: Path | str) -> str:
        return data_identity(DatasetSpec.parse(str(where)))

    before = identity(folder)
    moved = folder.rename(folder.parent / "elsewhere")
    assert identity(moved) == before != identity(f"{moved}?limit=3")
    written(moved / "README.md", b"another text")
    assert identity(moved) == before
    (moved / "b.parquet").rename(moved / "d.parquet")
    assert identity(moved) != before
    assert identity(f"{moved}/a/*") == identity(f"{moved}/a")
    written(moved / "a" / "1.jsonl", b"{}")
    assert identity(f"{moved}/a/*") != before


# The web

FAST = 0.02


class WebServer:
    """Serves one file with ranges, tags and faults, and remembers what was asked."""

    def __init__(self, body: bytes, *, etag: str | None = '"1"', ranges: bool = True) -> None:
        self.body, self.etag, self.ranges = body, etag, ranges
        self.faults = list[int | str]()  # a status, or "cut" to break off halfway
        self.asked = list[tuple[str, str | None]]()
        self.num_bytes_sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers["Range"]))
                fault = outer.faults.pop(0) if outer.faults else None
                if isinstance(fault, int):
                    self.send_error(fault)
                    return
                start = 0
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                if outer.ranges and wanted and self.headers["If-Range"] == outer.etag:
                    start = int(wanted[1])
                body = outer.body[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.body) - 1}/{len(outer.body)}")
                if outer.etag:
                    self.send_header("ETag", outer.etag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                sent = body[: len(body) // 2] if fault == "cut" else body
                outer.num_bytes_sent += len(sent)
                self.wfile.write(sent)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": FAST}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., WebServer]]:
    servers = list[WebServer]()

    def start(*arguments: Any, **options: Any) -> WebServer:
        servers.append(WebServer(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


Serve = Callable[..., WebServer]


def test_a_web_address_is_read_with_its_own_parameters_and_without_ours(tmp_path: Path, serve: Serve) -> None:
    server = serve(gzip.compress(as_jsonl(ROWS)))
    assert rows_of(f"{server.address}/rows.jsonl.gz?sig=a%2Fb&limit=3", tmp_path) == ROWS[:3]
    assert server.asked == [("/rows.jsonl.gz?sig=a%2Fb", None)]
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize(("etag", "ranges"), [('"1"', True), ('"1"', False), (None, False), ('W/"1"', True)])
def test_a_download_that_breaks_off_goes_on_where_it_can_and_starts_again_elsewhere(
    tmp_path: Path, serve: Serve, etag: str | None, ranges: bool
) -> None:
    body = as_csv([pair(f"{number}", "x" * 1000) for number in range(300)])
    server = serve(body, etag=etag, ranges=ranges)
    server.faults = [503, "cut"]
    assert len(rows_of(f"{server.address}/rows.csv", tmp_path)) == 300
    assert [wanted for _, wanted in server.asked][:2] == [None, None] and len(server.asked) == 3
    resumes = etag == '"1"' and ranges
    assert server.num_bytes_sent == (len(body) if resumes else len(body) + len(body) // 2)


def test_a_download_is_taken_up_by_the_next_process(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "NUM_TRIES", 1)
    body = as_csv([pair(f"{number}", "x" * 1000) for number in range(300)])
    server = serve(body)
    server.faults = ["cut"]
    with pytest.raises(NetworkError, match=r"DATASETS=.*rows.csv"):
        rows_of(f"{server.address}/rows.csv", tmp_path)
    assert len(rows_of(f"{server.address}/rows.csv", tmp_path)) == 300
    assert server.asked[1] == ("/rows.csv", f"bytes={len(body) // 2}-")
    # A part of another version is not gone on with.
    server.body, server.etag, server.faults = body.replace(b"x", b"z"), '"2"', ["cut"]
    with pytest.raises(NetworkError):
        rows_of(f"{server.address}/rows.csv", tmp_path)
    server.body, server.etag = body.replace(b"x", b"y"), '"3"'
    assert {row["completion"][0] for row in rows_of(f"{server.address}/rows.csv", tmp_path)} == {"y"}


def test_a_whole_download_is_used_again_while_the_server_names_the_same_version(tmp_path: Path, serve: Serve) -> None:
    server = serve(as_csv(ROWS))
    where = f"{server.address}/rows.csv"
    assert rows_of(where, tmp_path) == ROWS
    server.body = as_csv(list(reversed(ROWS)))  # a server that changes content under a tag: shows that the cache is used
    assert rows_of(where, tmp_path) == ROWS
    server.etag = '"2"'
    assert rows_of(where, tmp_path) == ROWS[::-1]


@pytest.mark.parametrize(("status", "advice"), [(404, "check the address"), (403, "without signing in")])
def test_a_refusal_is_an_error_that_is_not_tried_again(tmp_path: Path, serve: Serve, status: int, advice: str) -> None:
    server = serve(b"")
    server.faults = [status]
    with pytest.raises(DataError, match=f"the server answered {status}; .*{advice}"):
        open_source(DatasetSpec.parse(f"{server.address}/rows.csv"), tmp_path)
    assert len(server.asked) == 1


def test_a_server_that_stays_broken_or_away_is_a_network_error(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "NUM_TRIES", 2)
    server = serve(b"")
    server.faults = [500, 429]
    with pytest.raises(NetworkError, match="the server answered 429"):
        open_source(DatasetSpec.parse(f"{server.address}/rows.csv"), tmp_path)
    server.close()
    with pytest.raises(NetworkError, match=r"DATASETS=http"):
        open_source(DatasetSpec.parse(f"{server.address}/rows.csv"), tmp_path)


# S3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    yield client
    server.stop()


def test_an_object_a_prefix_and_a_pattern_on_s3_are_read(bucket: Any, tmp_path: Path) -> None:
    for key, data in {
        "sets/a/1.jsonl": as_jsonl(ROWS[:3]),
        "sets/a/2.csv.gz": gzip.compress(as_csv(ROWS[3:])),
        "sets/a/README.md": b"x",
        "sets/b.jsonl": b"{}",
    }.items():
        bucket.put_object(Bucket="data", Key=key, Body=data)
    assert rows_of("s3://data/sets/a/1.jsonl", tmp_path) == ROWS[:3]
    assert rows_of("s3://data/sets/a/", tmp_path) == ROWS
    assert rows_of("s3://data/sets/a/*.gz", tmp_path) == ROWS[3:]
    with pytest.raises(DataError, match=r"no data files there; it holds 1.jsonl, 2.csv.gz, README.md"):
        rows_of("s3://data/sets/a/*.parquet", tmp_path)
    bucket.put_object(Bucket="data", Key="sets/a/1.jsonl", Body=as_jsonl(ROWS[5:]))
    assert rows_of("s3://data/sets/a/1.jsonl", tmp_path) == ROWS[5:]


def test_an_s3_download_is_taken_up_at_its_byte_and_a_whole_one_used_again(bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket="data", Key="1.jsonl", Body=as_jsonl(ROWS))
    assert rows_of("s3://data/1.jsonl", tmp_path) == ROWS
    [target] = [path for path in (tmp_path / "downloads").iterdir() if path.suffix == ".jsonl"]
    note = target.with_name(target.name + ".version")
    target.write_bytes(as_jsonl(ROWS).replace(b"Pusula", b"PUSULA"))  # to be recognised
    assert rows_of("s3://data/1.jsonl", tmp_path)[1]["prompt"] == "PUSULA nedir?"
    partial = target.rename(target.with_name(target.name + ".partial"))
    partial.write_bytes(partial.read_bytes()[:150])
    note.rename(partial.with_name(partial.name + ".version"))
    assert [row["prompt"] for row in rows_of("s3://data/1.jsonl", tmp_path)][:3] == [
        ROWS[0]["prompt"],
        "PUSULA nedir?",
        "Question 0?",
    ]


def test_what_s3_refuses_is_an_error_that_says_what_to_do(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("s3://data/none.jsonl", "s3://none/none.jsonl", "s3://none/prefix/"):
        with pytest.raises(DataError, match=r"DATASETS=s3://.*S3 answered 404 .*; check the address"):
            open_source(DatasetSpec.parse(where), tmp_path)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="set AWS_ACCESS_KEY_ID"):
        open_source(DatasetSpec.parse("s3://data/1.jsonl"), tmp_path)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr(remote, "NUM_TRIES", 1)
    with pytest.raises(NetworkError, match=r"DATASETS=s3://data/1\.jsonl"):
        open_source(DatasetSpec.parse("s3://data/1.jsonl"), tmp_path)


# The Hub

# HF_ENDPOINT is read at import, so the reader lives in a child; imports take seconds, so there is one child for all.
HUB_READER = """
import json, sys, threading
from pathlib import Path
from job.data.chunks import read_chunk
from job.data.sources import open_source
from job.errors import JobError
from job.settings.dataset_spec import DatasetSpec

told = {}

def tell(name, where, cache):
    try:
        source = open_source(DatasetSpec.parse(where), Path(cache))
        opened = True
        told[name] = {"revision": source.revision, "opened": True}
        told[name]["rows"] = [row for chunk in source.chunks() for row in read_chunk(chunk)]
    except JobError as error:
        told.setdefault(name, {"opened": False}).update(error=f"{type(error).__name__}: {error}")

cases = json.loads(sys.argv[1])
slow = threading.Thread(target=tell, args=("down", cases.pop("down"), "down"))
slow.start()
for name, where in cases.items():
    tell(name, where, "cache")
slow.join()
print(json.dumps(told))
"""
CONFIGS = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.jsonl
  - split: test
    path: en/test.jsonl
- config_name: de
  data_files: de/*.jsonl
---
"""
SEMICOLONS = b"""---
configs:
- config_name: default
  sep: ";"
  data_files: rows.csv
---
"""
LINES = [{"number": number, "text": "x" * 10_000} for number in range(400)]  # 4 MB
HUB_CASES = {
    "head": "tester/chats",
    "pinned": "tester/chats?revision=OLD",
    "gone revision": "tester/chats?revision=none",
    "one split": "tester/configs?config=en&split=test",
    "both splits": "tester/configs?config=en&split=test+train[1:]",
    "shards": "tester/configs?config=en",
    "no config": "tester/configs",
    "wrong config": "tester/configs?config=fr",
    "wrong split": "tester/configs?config=en&split=dev",
    "delimiter": "tester/semicolons",
    "packed": "tester/packed",
    "parquet half": "tester/parquet?split=train[:50%]",
    "few": "other/large?limit=5",
    "all": "tester/torn",
    "busy": "tester/busy",
    "gated": "other/gated",
    "accepted": "other/accepted",
    "private": "other/private",
    "missing": "other/none",
    "script": "tester/script",
    "own script": "tester/loader",
    "pictures": "tester/pictures",
    "empty": "tester/empty",
    "refused": "tester/refused",
    "fails later": "tester/fails",
    "down": "tester/down",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, dict[str, Any]]]:
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server:
        old = server.add_repo("dataset", "tester/chats", {"train.jsonl": as_jsonl(ROWS[:1])})
        server.add_commit("dataset", "tester/chats", {"train.jsonl": as_jsonl(ROWS)})
        names = {"en/train-0.jsonl": ROWS[:2], "en/train-1.jsonl": ROWS[2:4], "en/test.jsonl": ROWS[4:], "de/a.jsonl": ROWS}
        server.add_repo("dataset", "tester/configs", {"README.md": CONFIGS} | {n: as_jsonl(r) for n, r in names.items()})
        server.add_repo("dataset", "tester/semicolons", {"README.md": SEMICOLONS, "rows.csv": as_csv(ROWS, ";")})
        server.add_repo("dataset", "tester/packed", {"data/train-0.jsonl.gz": gzip.compress(as_jsonl(ROWS))})
        server.add_repo("dataset", "tester/parquet", {"data/train-0.parquet": as_parquet(ROWS, row_group_size=2)})
        for name in ("other/large", "tester/torn"):
            server.add_repo("dataset", name, {"train.jsonl": as_jsonl(LINES)})
        for name in (
            "other/gated",
            "other/accepted",
            "other/private",
            "tester/busy",
            "tester/fails",
            "tester/down",
            "tester/refused",
        ):
            server.add_repo("dataset", name, {"train.jsonl": as_jsonl(ROWS)}, "private" in name, "gated" in name or "acc" in name)
        server.repos["dataset", "other/accepted"].readers.add("tester")
        server.add_repo("dataset", "tester/script", {"script.py": b"x"})
        server.add_repo("dataset", "tester/loader", {"build.py": b"x", "README.md": b"x"})
        server.add_repo("dataset", "tester/pictures", {"a.png": b"x"})
        server.add_repo("dataset", "tester/empty", {"notes.bin": b"x"})
        server.fail("GET", "torn/resolve/.*train.jsonl", reset=True, times=2)
        server.fail("GET", "/api/datasets/tester/busy", status=503)
        server.fail("HEAD", "tester/busy/resolve/.*train.jsonl", status=503)
        server.fail("GET", "tester/busy/resolve/.*train.jsonl", status=429)
        server.fail("GET", "tester/fails/resolve/.*train.jsonl", status=403)
        server.fail("HEAD", "tester/refused/resolve/.*train.jsonl", status=403)
        server.fail("GET", "tester/down", status=503, times=99)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
        cases = {name: where.replace("OLD", old) for name, where in HUB_CASES.items()}
        command = [sys.executable, "-c", HUB_READER, json.dumps(cases)]
        child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, cwd=home, check=False)
        assert child.returncode == 0, child.stderr
        yield server, json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("head", ROWS),
        ("pinned", ROWS[:1]),
        ("one split", ROWS[4:]),
        ("both splits", ROWS[4:] + ROWS[1:4]),
        ("shards", ROWS[:4]),
        ("delimiter", ROWS),
        ("packed", ROWS),
        ("parquet half", ROWS[:4]),
        ("few", LINES[:5]),
        ("all", LINES),
        ("busy", ROWS),
        ("accepted", ROWS),
    ],
)
def test_a_hub_data_set_is_read(hub: tuple[HubServer, dict[str, Any]], name: str, rows: list[Any]) -> None:
    assert hub[1][name].get("error") is None
    assert hub[1][name]["rows"] == rows


def test_the_commit_of_a_hub_data_set_is_told(hub: tuple[HubServer, dict[str, Any]]) -> None:
    server, told = hub
    old, new = (commit.oid for commit in server.repos["dataset", "tester/chats"].branches["main"])
    assert (told["pinned"]["revision"], told["head"]["revision"]) == (old, new)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone revision", "has no revision 'none'"),
        ("no config", "has several configs; add ?config= one of en, de"),
        ("wrong config", "has no config 'fr'; add ?config= one of en, de"),
        ("wrong split", "has no split 'dev'; the splits are train, test"),
        ("gated", "is gated; accept its licence on https://huggingface.co/datasets/other/gated, and set HF_TOKEN"),
        ("private", "or it is private and HF_TOKEN may not read it"),
        ("missing", "there is no such data set on the Hub"),
        ("script", "scripts are not supported; add ?revision=refs/convert/parquet"),
        ("own script", "scripts are not supported"),
        ("pictures", "of the kind 'imagefolder'"),
        ("refused", "the Hub answered 403: HF_TOKEN may not read it"),
        ("empty", "no data files there; it holds notes.bin"),
    ],
)
def test_what_the_hub_does_not_have_is_an_error_at_once(hub: tuple[HubServer, dict[str, Any]], name: str, problem: str) -> None:
    told = hub[1][name]
    assert told["error"].startswith(f"DataError: DATASETS={HUB_CASES[name].partition('?')[0]}") and problem in told["error"]
    assert not told["opened"]


def test_a_refusal_in_the_middle_is_a_data_error_and_a_hub_that_stays_down_a_network_error(
    hub: tuple[HubServer, dict[str, Any]],
) -> None:
    server, told = hub
    assert told["fails later"]["opened"] and told["fails later"]["error"].startswith("DataError: DATASETS=tester/fails")
    assert told["down"]["error"] == "NetworkError: DATASETS=tester/down: the Hub answered 503"
    assert sum("tester/down" in request.path for request in server.requests) == remote.NUM_TRIES


def test_only_what_is_needed_is_downloaded_and_what_came_before_a_reset_is_kept(hub: tuple[HubServer, dict[str, Any]]) -> None:
    server, _ = hub
    size = len(as_jsonl(LINES))

    def num_bytes(part: str) -> int:
        return sum(request.num_bytes for request in server.requests if request.method == "GET" and part in request.path)

    assert 50_000 < num_bytes("other/large/resolve") < size / 10
    assert size < num_bytes("tester/torn/resolve") < size + 20_000
    assert [r.status for r in server.requests if "torn/resolve" in r.path and r.method == "GET"][:3] == [0, 0, 206]
