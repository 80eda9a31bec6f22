"""An S3 server with a proxy in front of it, for the tests and benchmarks that break the way to the store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import boto3
from fault_proxy import FaultProxy
from moto.server import ThreadedMotoServer

KEYS = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
BUCKET = "bucket"


class S3Server:
    """`proxy.url` is the way that can be broken; `client` goes straight to the server."""

    def __init__(self, proxy: FaultProxy, client: Any) -> None:
        self.proxy, self.client = proxy, client
        self.credentials = {**KEYS, "endpoint_url": proxy.url}

    def names(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def unfinished_uploads(self) -> list[str]:
        return [upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A moto server with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # moto keeps its buckets for the life of the process: what an earlier test put there is not to be found here.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=10).close()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **KEYS)
    client.create_bucket(Bucket=BUCKET)
    try:
        with FaultProxy(host, port) as proxy:
            yield S3Server(proxy, client)
    finally:
        server.stop()
