"""One data set in, its rows out as plain dicts in order, whatever it lies in and however it is packed.

Remote files are downloaded whole to a cache first; Hub data sets go through the `datasets` library. Memory does not grow
with the number of rows, except for `.json` arrays, which are read whole.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from job.errors import DataError, NetworkError
from job.settings import DatasetSpec, Where, data_suffixes

Row = Mapping[str, Any]
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the standard limit of 128 KiB is shorter than a long answer


def open_rows(spec: DatasetSpec, cache_dir: Path) -> Iterator[Row | None]:
    """Yield each row of a data set in order; None stands for a row that could not be parsed.

    Args:
        spec: where and what; `spec.limit` ends the rows early.
        cache_dir: where downloads from S3 and the web are kept.

    Raises:
        DataError: the set cannot be read at all; the message names it.
        NetworkError: a server did not answer after several tries.
    """
    rows = _hub_rows(spec) if spec.kind is Where.HUB else _file_rows(spec, _local_file(spec, cache_dir))
    return islice(rows, spec.limit)


def peek_columns(rows: Iterator[Row | None], num_rows: int = 50) -> tuple[list[str], Iterator[Row | None]]:
    """The columns found in the first rows, and the same rows again from the start."""
    first = list(islice(rows, num_rows))
    columns: dict[str, None] = {}
    for row in first:
        columns.update(dict.fromkeys(row or ()))
    return list(columns), chain(first, rows)


def _local_file(spec: DatasetSpec, cache_dir: Path) -> Path:
    if spec.kind in (Where.LOCAL, Where.PACKAGE):
        return spec.local_path
    name = spec.where.partition("?")[0].rsplit("/", 1)[-1]
    path = cache_dir / "downloads" / f"{hashlib.sha256(spec.where.encode()).hexdigest()[:16]}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # A download lands under a temporary name: a file with its own name is whole.
    if spec.kind is Where.S3:
        _download_s3(spec, partial)
    else:
        _download_http(spec, partial)
    partial.replace(path)
    return path


def _download_s3(spec: DatasetSpec, path: Path) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    bucket, _, key = spec.where.removeprefix("s3://").partition("/")
    try:
        boto3.client("s3").download_file(bucket, key, str(path))
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "SlowDown" or error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
            raise NetworkError(f"DATASETS={spec}: S3 answered {code}") from error
        raise DataError(f"DATASETS={spec}: S3 answered {code}; check the address and the AWS_* settings") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise DataError(f"DATASETS={spec}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except BotoCoreError as error:
        raise NetworkError(f"DATASETS={spec}: {error}") from error


def _download_http(spec: DatasetSpec, path: Path) -> None:
    import requests

    broken_off = requests.exceptions.ChunkedEncodingError

    @retry(
        retry=retry_if_exception_type((requests.ConnectionError, requests.Timeout, broken_off, NetworkError)),
        stop=stop_after_attempt(4),
        wait=wait_exponential_jitter(initial=1, max=10),
        reraise=True,
    )
    def download() -> None:
        with requests.get(spec.where, stream=True, timeout=30) as answer:
            if answer.status_code >= 500 or answer.status_code == 429:
                raise NetworkError(f"DATASETS={spec}: the server answered {answer.status_code}")
            if answer.status_code >= 400:
                raise DataError(f"DATASETS={spec}: the server answered {answer.status_code}; check the address")
            with path.open("wb") as file:
                for block in answer.iter_content(1 << 20):
                    file.write(block)

    try:
        download()
    except requests.RequestException as error:
        raise NetworkError(f"DATASETS={spec}: {error}") from error


def _hub_rows(spec: DatasetSpec) -> Iterator[Row]:
    import datasets
    import httpx2  # huggingface_hub lets its connection errors through
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # HF_TOKEN is read by the library.
        yield from datasets.load_dataset(spec.where, spec.config, split=spec.split, revision=spec.revision, streaming=True)
    except HfHubHTTPError as error:
        if error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500):
            raise NetworkError(f"DATASETS={spec}: the Hub answered {error.response.status_code}") from error
        raise DataError(f"DATASETS={spec}: {error}") from error
    except (ConnectionError, TimeoutError, httpx2.HTTPError) as error:
        raise NetworkError(f"DATASETS={spec}: the Hub does not answer ({error})") from error
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise DataError(f"DATASETS={spec}: {error}") from error


def _file_rows(spec: DatasetSpec, path: Path) -> Iterator[Row | None]:
    suffix, compression = data_suffixes(spec.where.partition("?")[0])
    kind = spec.format or suffix
    try:
        if kind == "parquet":
            yield from _parquet_rows(path)
            return
        with ExitStack() as stack:
            raw: IO[bytes] = stack.enter_context(path.open("rb"))
            file = stack.enter_context(_decompressed(raw, compression))
            match kind:
                case "jsonl":
                    yield from _jsonl_rows(file)
                case "json":
                    yield from _json_rows(spec, file)
                case "csv":
                    yield from _csv_rows(file)
                case _:
                    yield from _text_rows(spec, file)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"DATASETS={spec}: cannot be read: {error}") from error


def _decompressed(file: IO[bytes], compression: str | None) -> IO[bytes]:
    if compression == "gzip":
        return cast("IO[bytes]", gzip.open(file))
    if compression == "zstd":
        import pyarrow  # its reader says when a file is cut short; that of zstandard does not

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file


def _jsonl_rows(file: IO[bytes]) -> Iterator[Row | None]:
    for line in file:
        if line.strip():
            yield _parsed(line)


def _csv_rows(file: IO[bytes]) -> Iterator[Row | None]:
    """Rows under the header; one with more cells than that has an unquoted comma somewhere, and cannot be trusted."""
    for row in csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")):
        yield None if None in row else row


def _json_rows(spec: DatasetSpec, file: IO[bytes]) -> Iterator[Row | None]:
    """A JSON array of objects, or JSON lines that go by the name of .json."""
    text = file.read().removeprefix(codecs.BOM_UTF8)
    if not text.lstrip().startswith(b"["):
        yield from _jsonl_rows(io.BytesIO(text))
        return
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"DATASETS={spec}: not valid JSON: {error}") from error
    for row in rows:
        yield row if isinstance(row, dict) else None


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _text_rows(spec: DatasetSpec, file: IO[bytes]) -> Iterator[Row]:
    text = io.TextIOWrapper(file, "utf-8-sig", errors="replace")
    if spec.sample_by == "document":
        yield {"text": text.read()}
        return
    if spec.sample_by == "line":
        yield from ({"text": line.strip()} for line in text if line.strip())
        return
    paragraph: list[str] = []
    for line in chain(text, ["\n"]):
        if line.strip():
            paragraph.append(line.rstrip("\n"))
        elif paragraph:
            yield {"text": "\n".join(paragraph)}
            paragraph = []
