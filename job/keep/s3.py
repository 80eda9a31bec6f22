"""The store on any S3 service, through boto3.

Large files go in parts, each retried on its own, and appear when the last one is in. Nothing here starts a thread: boto3's
own transfer threads are joined when the interpreter ends, so an upload that hangs would outlive a stop (a test shows it).
One connection carries some 80 MB/s ("Performance guidelines for Amazon S3" reckons with 85-90 MB/s).
"""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import JobError
from job.keep.s3_errors import refused, translated
from job.keep.store import MissingError, local_disk

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """How files travel."""

    multipart_bytes: int = 32 * MIB
    """Files from this size on go in parts."""
    part_bytes: int = 16 * MIB
    """What a reset costs again: 16 s at 1 MB/s. 10,000 parts (S3's limit) are 160 GB; beyond, boto3 takes larger ones."""
    num_attempts: int = 5
    """Per request. boto3 waits up to 1, 2, 4, 8 seconds in between, chosen at random below that."""
    timeout_seconds: float = 60.0
    """Silence on a connection before an attempt counts as failed."""
    connect_seconds: float = 10.0
    """The same before it stands."""


class S3Store:
    """A bucket and a prefix on any S3 service."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        credentials: dict[str, str],
        *,
        transfer: Transfer | None = None,
        client: Any = None,
        is_own: bool = False,
        redact: Callable[[str], str] = str,
    ) -> None:
        self.redact = redact
        self._bucket = bucket
        self._prefix = prefix.rstrip("/") + "/" if prefix else ""
        self._credentials = credentials
        self._transfer = transfer or Transfer()
        self._client = client or _s3_client(credentials, self._transfer)
        self._has_left_over = is_own
        self._lock = threading.Lock()
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")

    def within(self, folder: str) -> "S3Store":
        return S3Store(
            self._bucket,
            self._prefix + folder,
            self._credentials,
            transfer=self._transfer,
            client=self._client,
            is_own=True,
            redact=self.redact,
        )

    def hurried(self, on_date: Callable[[str | None], None]) -> "S3Store":
        """For a first look: gives up after one more try, and tells the `Date` of each answer."""
        transfer = Transfer(num_attempts=2, timeout_seconds=10.0, connect_seconds=5.0)
        store = S3Store(self._bucket, self._prefix, self._credentials, transfer=transfer, redact=self.redact)
        events = store._client.meta.events
        events.register("after-call.s3", lambda http_response, **_: on_date(http_response.headers.get("date")))
        return store

    def put(self, path: Path, name: str) -> None:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such local file", str(path))
        if path.stat().st_size >= self._transfer.multipart_bytes:
            self._abort_left_over()
        with translated(self.uri, name, may_miss=False):
            self._client.upload_file(str(path), self._bucket, self._prefix + name, Config=self._config())

    def get(self, name: str, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        try:
            with local_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with translated(self.uri, name):
                    # No HEAD request comes first (with checksums "when_required"): its refusals would have no body, and a
                    # missing bucket would look like a missing file.
                    self._client.download_file(self._bucket, self._prefix + name, str(partial), Config=self._config())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[str]:
        start: dict[str, str] = {}
        while True:
            page = self._list_page(prefix, start)
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(self._prefix)
            if not page.get("IsTruncated"):
                return
            start = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, name: str) -> None:
        # One key at a time: RunPod's S3 has no batch delete (docs.runpod.io/storage/s3-api, 2026-08).
        try:
            with translated(self.uri, name):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        except MissingError:  # some services say so; where there is none at all, a listing tells it
            next(self.list(name), None)

    def _list_page(self, prefix: str, start: dict[str, str]) -> Any:
        from botocore.exceptions import HTTPClientError
        from botocore.parsers import ResponseParserError

        for attempt in range(1, self._transfer.num_attempts + 1):
            with translated(self.uri, prefix or "the listing", may_miss=False):
                try:
                    return self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + prefix, **start)
                except (HTTPClientError, ResponseParserError):  # an answer cut short, which boto3 does not ask for again
                    if attempt == self._transfer.num_attempts:
                        raise
        raise AssertionError

    def _abort_left_over(self) -> None:
        """Before the first parts: parts of an upload that was killed are in no listing, and are billed for ever."""
        with self._lock:
            if not self._has_left_over:
                return
            self._has_left_over = False
            with suppress(MissingError, JobError), translated(self.uri, "unfinished uploads"):  # not every service lists them
                answer = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix)
                for upload in answer.get("Uploads", ()):
                    self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _config(self) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=self._transfer.multipart_bytes,
            multipart_chunksize=self._transfer.part_bytes,
            num_download_attempts=self._transfer.num_attempts,
            use_threads=False,
        )


def _s3_client(credentials: dict[str, str], transfer: Transfer) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=min(transfer.connect_seconds, transfer.timeout_seconds),
        read_timeout=transfer.timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": transfer.num_attempts},
        # boto3 >= 1.36 adds CRC32 checksums by default; other services than AWS refuse them (boto/s3transfer#327).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.client("s3", config=config, **credentials)
    except (BotoCoreError, ValueError) as error:  # half a key, an endpoint without a scheme, no such profile
        raise refused("s3://", str(error), "check the AWS_* settings") from error
