"""S3 and web addresses in, whole files in a cache folder out.

A download lands under a temporary name beside a note of its version, goes on from the byte where it broke off (also in
another process), and gets its own name when it is whole. A whole file is used again only while the server names the same
version of it. Who only wants a look reads parts of a file and keeps nothing. Hub data sets are read by hub.py.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from job.data.ranges import FIRST_BYTES, MOST_BYTES, TooFarError, open_ranges
from job.errors import DataError, NetworkError
from job.settings.dataset_spec import DatasetSpec, Where, is_pattern, pick_data_files

NUM_TRIES = 5
"""Tries in a row that bring nothing before a server is given up: with the waits between, 8 to 12 seconds."""
CONNECT_SECONDS, READ_SECONDS = 10, 30
_BLOCK_BYTES = 2**20
_Result = TypeVar("_Result")


def hurry() -> None:
    """From now on a server is given up after one more try, in this whole process: it only has a look."""
    global NUM_TRIES, CONNECT_SECONDS, READ_SECONDS
    NUM_TRIES, CONNECT_SECONDS, READ_SECONDS = 2, 5, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server has for us."""

    version: str
    """Tells this content from other content under the same address; empty where the server cannot tell."""
    offset: int
    num_bytes: int | None
    """Size of the whole, where the server says it."""
    blocks: Iterator[bytes]
    """The content from `offset` on."""


Ask = Callable[[int, str], AbstractContextManager[Answer]]
"""Ask for the content from an offset on, if it still is of that version; the answer may begin at 0 nevertheless."""


def insist(action: Callable[[], _Result], progress: Callable[[], int] = lambda: 0) -> _Result:
    """Do what may raise NetworkError, again and again until it succeeds or NUM_TRIES in a row brought no progress."""
    best, since = progress(), 1

    def is_stuck(state: RetryCallState) -> bool:
        nonlocal best, since
        if (now := progress()) > best:
            best, since = now, state.attempt_number
        return state.attempt_number - since >= NUM_TRIES - 1

    tries = Retrying(
        retry=retry_if_exception_type(NetworkError),
        stop=is_stuck,
        wait=wait_exponential_jitter(multiplier=0.5, max=8, jitter=0.5),
        reraise=True,
    )
    return tries(action)


def list_remote(spec: DatasetSpec) -> dict[str, int | None]:
    """The addresses of the files of an S3 or web data set, sorted, with their sizes where a listing tells them.

    Raises:
        DataError: there is none, or access is refused.
    """
    bucket, _, key = spec.where.removeprefix("s3://").partition("/")
    if spec.kind is not Where.S3 or not (is_pattern(key) or key.endswith("/") or not key):
        return {spec.where: None}
    prefix = key.partition("*")[0]
    folder = prefix[: prefix.rfind("/") + 1]
    found: dict[str, int] = {}
    with _s3_errors(spec):
        for page in _s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            found |= {item["Key"].removeprefix(folder): int(item["Size"]) for item in page.get("Contents", ())}
    names = [name for name in found if not is_pattern(key) or fnmatchcase(name, key.removeprefix(folder))]
    chosen = pick_data_files(names, spec.format)
    if not chosen:
        raise DataError(f"DATASETS={spec}: no data files there; {listing(list(found))}")
    return {f"s3://{bucket}/{folder}{name}": found[name] for name in chosen}


def listing(names: list[str]) -> str:
    """What exists, in a few words."""
    shown = ", ".join(sorted(names)[:10])
    return f"it holds {shown}{f' and {len(names) - 10} more' if len(names) > 10 else ''}" if names else "nothing is there at all"


def fetch(spec: DatasetSpec, address: str, cache_dir: Path) -> Path:
    """Download a file, or find that the cache has it.

    Raises:
        DataError: the address does not exist, or access is refused.
        NetworkError: the server did not answer, or broke off, several times without progress.
    """
    name = address.partition("?")[0].rsplit("/", 1)[-1][-100:]
    target = cache_dir / "downloads" / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    ask = _s3(spec, address) if spec.kind is Where.S3 else _http(spec, address)
    partial = target.with_name(target.name + ".partial")

    def download() -> None:
        num_bytes, version = _size(partial), _note(partial)
        with ask(num_bytes, version) as answer:
            if answer.version and answer.version == _note(target) and _size(target) == answer.num_bytes:
                return
            _note_path(partial).write_text(answer.version, "utf-8")
            with partial.open("ab" if answer.offset else "wb") as file:
                for block in answer.blocks:
                    file.write(block)
        if answer.num_bytes is not None and _size(partial) != answer.num_bytes:
            raise NetworkError(f"DATASETS={spec}: the server broke off after {_size(partial)} of {answer.num_bytes} bytes")
        _note_path(target).unlink(missing_ok=True)  # never the new note beside the old content
        partial.replace(target)
        _note_path(partial).replace(_note_path(target))

    insist(download, lambda: _size(partial))
    return target


def look(spec: DatasetSpec, address: str) -> tuple[Callable[[], IO[bytes]], int | None]:
    """What opens a stream over a file where it lies, and its size (None: the server does not say it); nothing is kept.

    Raises:
        DataError: the address does not exist, or access is refused.
        NetworkError: the server did not answer after several tries.
    """
    fetch_part = _s3_part if spec.kind is Where.S3 else _http_part
    first, num_bytes = insist(lambda: fetch_part(spec, address, 0, FIRST_BYTES))
    if num_bytes is None:  # no end that could be sought from: what comes in one piece is all that is looked at
        first, _ = insist(lambda: fetch_part(spec, address, 0, MOST_BYTES))
        return (lambda: io.BytesIO(first)), None

    def part(start: int, stop: int) -> bytes:
        return first[start:stop] or insist(lambda: fetch_part(spec, address, start, stop))[0]

    return (lambda: open_ranges(num_bytes, part)), num_bytes


def _http_part(spec: DatasetSpec, address: str, start: int, stop: int) -> tuple[bytes, int | None]:
    """The bytes from start to stop, and the size of the whole; a server that knows no ranges is read up to there."""
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    with _http_errors(spec), closing(_get(spec, address, headers)) as answer:
        if answer.status_code == 416:
            return b"", 0
        offset, total = _content_range(answer)
        if start - offset > MOST_BYTES:
            raise TooFarError
        data = bytearray()
        for block in answer.raw.stream(2**16, decode_content=False):
            data += block
            if len(data) >= stop - offset:
                break
    return bytes(data[start - offset : stop - offset]), int(total) if total and total.isdecimal() else None


def _s3_part(spec: DatasetSpec, address: str, start: int, stop: int) -> tuple[bytes, int | None]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    with _s3_errors(spec):
        num_bytes = int(_s3_client().head_object(Bucket=bucket, Key=key)["ContentLength"])
        if start >= num_bytes:
            return b"", num_bytes
        answer = _s3_client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        with closing(answer["Body"]) as body:
            return bytes(body.read()), num_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + ".version")


def _note(path: Path) -> str:
    return _note_path(path).read_text("utf-8") if path.exists() and _note_path(path).exists() else ""


def _http(spec: DatasetSpec, address: str) -> Ask:
    @contextmanager
    def ask(offset: int, version: str) -> Iterator[Answer]:
        headers = {"Accept-Encoding": "identity"}
        etag, modified, _ = json.loads(version) if version else (None, None, None)
        # Only a strong tag promises the same bytes.
        if offset and (same := etag if etag and not etag.startswith("W/") else modified):
            headers |= {"Range": f"bytes={offset}-", "If-Range": same}
        with _http_errors(spec), closing(_get(spec, address, headers)) as answer:
            etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
            start, total = _content_range(answer)
            num_bytes = int(total) if total and total.isdecimal() else None
            yield Answer(
                version=json.dumps([etag, modified, num_bytes]) if etag or modified else "",
                offset=start,
                num_bytes=num_bytes,
                blocks=answer.raw.stream(_BLOCK_BYTES, decode_content=False),  # a packed file stays packed
            )

    return ask


def _get(spec: DatasetSpec, address: str, headers: Mapping[str, str]) -> Any:
    import requests

    answer = requests.get(address, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS), headers=dict(headers))
    status = answer.status_code
    if status == 416 and answer.headers.get("Content-Range") == "bytes */0":
        return answer  # an empty file has no first byte
    if status in (408, 416, 429) or status >= 500:
        answer.close()
        raise NetworkError(f"DATASETS={spec}: the server answered {status}")
    if status >= 400:
        answer.close()
        advice = "check that it may be read without signing in" if status in (401, 403) else "check the address"
        raise DataError(f"DATASETS={spec}: the server answered {status}; {advice}")
    return answer


def _content_range(answer: Any) -> tuple[int, str | None]:
    """Where the answer begins, and the size of the whole as the server writes it."""
    if answer.status_code != 206:
        return 0, answer.headers.get("Content-Length")
    part, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    return int(part.partition("-")[0]), total


@contextmanager
def _http_errors(spec: DatasetSpec) -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except (requests.exceptions.InvalidURL, requests.TooManyRedirects) as error:
        raise DataError(f"DATASETS={spec}: {error}; check the address") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise NetworkError(f"DATASETS={spec}: {error}") from error


def _s3(spec: DatasetSpec, address: str) -> Ask:
    bucket, _, key = address.removeprefix("s3://").partition("/")

    @contextmanager
    def ask(offset: int, version: str) -> Iterator[Answer]:
        with _s3_errors(spec):
            head = _s3_client().head_object(Bucket=bucket, Key=key)
            etag, num_bytes = head["ETag"], int(head["ContentLength"])
            now = json.dumps([etag, str(head.get("LastModified")), num_bytes])
            start = offset if version == now and offset <= num_bytes else 0

            def blocks() -> Iterator[bytes]:
                if start < num_bytes:
                    wanted = {"Range": f"bytes={start}-"} if start else {}
                    answer = _s3_client().get_object(Bucket=bucket, Key=key, IfMatch=etag, **wanted)
                    with closing(answer["Body"]) as body:
                        yield from body.iter_chunks(_BLOCK_BYTES)

            yield Answer(version=now, offset=start, num_bytes=num_bytes, blocks=blocks())

    return ask


def _s3_client() -> Any:
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": min(3, NUM_TRIES - 1), "mode": "standard"}
    return boto3.client("s3", config=Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries))


@contextmanager
def _s3_errors(spec: DatasetSpec) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

    try:
        yield
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= 500 or status in (412, 429):  # 412: it changed while it was read
            raise NetworkError(f"DATASETS={spec}: S3 answered {status} {code}") from error
        advice = "check the address" if status == 404 else "check the address and the AWS_* settings"
        raise DataError(f"DATASETS={spec}: S3 answered {status} {code}; {advice}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise DataError(f"DATASETS={spec}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except ParamValidationError as error:
        raise DataError(f"DATASETS={spec}: {str(error).splitlines()[-1]}; check the address") from error
    except BotoCoreError as error:
        raise NetworkError(f"DATASETS={spec}: {error}") from error
