"""A small HTTP proxy that stands between a store and its client, and breaks what passes in the ways that networks do.

Each fault is for a number of requests that match; everything else passes unchanged. `stop` and `start` make the port refuse
connections and take them again.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

ALWAYS = 10**9
ERRORS = {
    "SlowDown": 503,
    "InternalError": 500,
    "AccessDenied": 403,
    "InvalidAccessKeyId": 403,
    "ExpiredToken": 400,
    "RequestTimeTooSkewed": 403,
    "PermanentRedirect": 301,
    "NotImplemented": 501,
    "404": 404,
}


@dataclass(kw_only=True)
class Fault:
    """One way to break requests."""

    kind: Literal["reset", "truncate", "hang", "close", "error"]
    """reset: in the middle of the request's body; truncate: half of the answer's body; hang: silence; close: no answer."""
    code: str = ""
    """Of an `error`: one of ERRORS."""
    method: str = ""
    path: str = ""
    """A part of the path and query."""
    times: int = 1
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 30.0
    """How long a `hang` lasts at most; `clear` ends it."""


class FaultProxy:
    """Forwards to `host:port`; use as a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.requests: list[str] = []
        """`METHOD path` of all that came."""
        self.delay_seconds = 0.0
        """Before each answer."""
        self.bytes_per_second = 0.0
        """Of a request's body; 0 is as fast as it goes."""
        self.clock_offset_seconds = 0.0
        """Of the Date in answers."""
        self._num_open = 0
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self._open = threading.Event()
        self.start()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
        self.requests.clear()
        self.delay_seconds = self.bytes_per_second = self.clock_offset_seconds = 0.0

    def start(self) -> None:
        self._open.set()
        self._server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused, and open ones end."""
        self._open.clear()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    @property
    def num_open(self) -> int:
        """Requests under way: what a killed client had sent to its end may still reach the server."""
        return self._num_open

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._num_open += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_open -= 1

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self._faults:
                if fault.times > 0 and fault.method in ("", method) and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def hang(self, fault: Fault) -> None:
        deadline = time.monotonic() + fault.seconds
        while time.monotonic() < deadline and fault in self._faults:
            time.sleep(0.05)

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was cut off is what this is for."""


def _handler(proxy: FaultProxy) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def handle_one_request(self) -> None:
            if proxy.is_open:
                super().handle_one_request()
            else:
                self.close_connection = True

        def _handle(self) -> None:
            with proxy.counted():
                self._pass_on()

        def _pass_on(self) -> None:
            fault = proxy.take(self.command, self.path)
            length = int(self.headers.get("Content-Length") or 0)
            if fault is not None and fault.kind == "reset":
                self.rfile.read(length // 2)
                self._reset()
                return
            body = self._read(length)
            time.sleep(proxy.delay_seconds)
            if not proxy.is_open or (fault is not None and fault.kind == "close"):
                self.close_connection = True
                return
            if fault is not None and fault.kind == "hang":
                proxy.hang(fault)
                self.close_connection = True
                return
            if fault is not None and fault.kind == "error":
                self._refuse(fault)
                return
            status, headers, answer = proxy.forward(self.command, self.path, body, dict(self.headers.items()))
            self._answer(status, headers, answer, cut=fault is not None)

        def _read(self, length: int) -> bytes:
            pieces = []
            while length:
                pieces.append(self.rfile.read(min(length, 2**16)))
                length -= len(pieces[-1])
                if not pieces[-1]:
                    raise ConnectionError
                if proxy.bytes_per_second:
                    time.sleep(len(pieces[-1]) / proxy.bytes_per_second)
            return b"".join(pieces)

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def _refuse(self, fault: Fault) -> None:
            code = fault.code
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self._answer(ERRORS[code], [("Content-Type", "application/xml"), *fault.headers], text, cut=False)

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool) -> None:
            has_body = self.command != "HEAD" and status not in (204, 304)
            self.send_response_only(status)
            names = {name.lower() for name, _ in headers}
            for name, value in headers:
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    if name.lower() == "date" and proxy.clock_offset_seconds:
                        value = self.date_time_string(time.time() + proxy.clock_offset_seconds)
                    self.send_header(name, value)
            if "date" not in names:
                self.send_header("Date", self.date_time_string())
            given = {name.lower(): value for name, value in headers}.get("content-length", "0")
            if status != 204:
                self.send_header("Content-Length", str(len(body)) if has_body else given)
            self.end_headers()
            if has_body:
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    return Handler
