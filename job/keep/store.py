"""A folder or an S3 prefix behind one small Protocol: files go in and come out under names.

Names are relative, `/`-separated, and round-trip: what `list` yields, `get` accepts. What is not handled: locking; one run
is written by one supervisor.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from job.errors import MachineError, NetworkError, Problem, SettingsError


class MissingError(Exception):
    """No file has this name. Raised for nothing else: a refused credential is not a missing file."""


class Store(Protocol):
    """Where a run is kept.

    Every method raises NetworkError when the store does not answer, SettingsError when it refuses the credentials, and
    MachineError when its own disk is full or read-only. A full local disk is an OSError.
    """

    uri: str

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store; afterwards `name` holds all of it or what it held before."""

    def get(self, name: str, path: Path) -> None:
        """Copy a file out; `path` appears whole or not at all. Raises MissingError."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the names that begin with `prefix`, in order."""

    def delete(self, name: str) -> None:
        """Remove a file; removing a missing one is no error."""


def open_store(uri: str, *, credentials: dict[str, str] | None = None) -> Store:
    """The store at a folder or `s3://bucket/prefix`; nothing is contacted yet.

    Args:
        uri: OUTPUT_URI.
        credentials: keyword arguments for boto3 (aws_access_key_id, ...); without them boto3 looks in its usual places.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix, credentials or {})
    return FolderStore(Path(uri).expanduser().absolute())


def within(store: Store, folder: str) -> Store:
    """The same store seen from one of its folders."""
    if isinstance(store, S3Store):
        return store.within(folder)
    assert isinstance(store, FolderStore)
    return FolderStore(store.root / folder)


def read_text(store: Store, name: str, scratch: Path) -> str:
    """The text of a small file. Raises MissingError."""
    path = scratch / f".read-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        store.get(name, path)
        return path.read_text("utf-8")
    finally:
        path.unlink(missing_ok=True)


def write_text(store: Store, name: str, text: str, scratch: Path) -> None:
    """Put a small text file."""
    path = scratch / f".write-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text(text, "utf-8")
        store.put(path, name)
    finally:
        path.unlink(missing_ok=True)


class FolderStore:
    """A folder, on a local disk or a mounted volume."""

    _PARTIAL = ".partial"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def put(self, path: Path, name: str) -> None:
        self._copy(path, self.root / name)

    def get(self, name: str, path: Path) -> None:
        source = self.root / name
        if not source.is_file():
            raise MissingError(name)
        self._copy(source, path)

    def list(self, prefix: str = "") -> Iterator[str]:
        # Only the deepest folder that the prefix names is walked.
        start = self.root / prefix.rpartition("/")[0]
        try:
            files = [path for path in start.rglob("*") if path.is_file() and path.suffix != self._PARTIAL]
        except OSError as error:
            raise MachineError(f"OUTPUT_URI={self.uri}: cannot be listed: {error.strerror or error}") from error
        names = (path.relative_to(self.root).as_posix() for path in files)
        yield from sorted(name for name in names if name.startswith(prefix))

    def delete(self, name: str) -> None:
        try:
            (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            raise MachineError(f"OUTPUT_URI={self.uri}: cannot delete {name}: {error.strerror or error}") from error
        with suppress(OSError):  # a folder with files left in it stays
            (self.root / name).parent.rmdir()

    def _copy(self, source: Path, target: Path) -> None:
        partial = target.with_name(target.name + self._PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
            partial.replace(target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise MachineError(f"OUTPUT_URI={self.uri}: cannot write {target}: {error.strerror or error}") from error


class S3Store:
    """A bucket and a prefix on any S3 service."""

    def __init__(self, bucket: str, prefix: str, credentials: dict[str, str], client: Any = None) -> None:
        self._bucket = bucket
        self._prefix = prefix.rstrip("/") + "/" if prefix else ""
        self._credentials = credentials
        self._client = client or _s3_client(credentials)
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")

    def within(self, folder: str) -> "S3Store":
        return S3Store(self._bucket, self._prefix + folder, self._credentials, self._client)

    def put(self, path: Path, name: str) -> None:
        with _Translate(self.uri, name):
            self._client.upload_file(str(path), self._bucket, self._prefix + name)

    def get(self, name: str, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Translate(self.uri, name):
            self._client.download_file(self._bucket, self._prefix + name, str(partial))
        partial.replace(path)

    def list(self, prefix: str = "") -> Iterator[str]:
        with _Translate(self.uri, prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(self._prefix)

    def delete(self, name: str) -> None:
        # One key at a time: RunPod's S3 has no batch delete (docs.runpod.io/storage/s3-api, 2026-08).
        with _Translate(self.uri, name):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


def _s3_client(credentials: dict[str, str]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import PartialCredentialsError

    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 5},
        # boto3 >= 1.36 adds CRC32 checksums by default; other services than AWS refuse them (boto/s3transfer#327).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.client("s3", config=config, **credentials)
    except (PartialCredentialsError, ValueError) as error:  # half a key, an endpoint without a scheme
        raise _refused("s3://", str(error), "check the AWS_* settings") from error


class _Translate:
    """Turns what boto3 raises into what the Store protocol promises."""

    _REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403", "401")

    def __init__(self, uri: str, name: str) -> None:
        self._uri, self._name = uri, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        from boto3.exceptions import Boto3Error, S3UploadFailedError
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
        )

        if isinstance(error, S3UploadFailedError):
            error = error.__cause__ or error.__context__ or error
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("404", "NoSuchKey"):
                raise MissingError(self._name) from error
            if code == "NoSuchBucket":
                raise _refused(self._uri, "the bucket does not exist", "create it, or correct the name") from error
            if code in self._REFUSED:
                raise _refused(self._uri, f"the store refuses the credentials ({code})", "check the AWS_* settings") from error
            raise NetworkError(f"OUTPUT_URI={self._uri}: the store answered {code} for {self._name}") from error
        if isinstance(error, ParamValidationError):
            raise _refused(self._uri, f"is not a valid address ({error})", "correct the bucket's name") from error
        if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            raise _refused(self._uri, "no credentials were found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        if isinstance(error, (BotoCoreError, Boto3Error)):
            raise NetworkError(f"OUTPUT_URI={self._uri}: {error}") from error


def _refused(uri: str, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting="OUTPUT_URI", value=uri, rule=rule, way_out=way_out)])
