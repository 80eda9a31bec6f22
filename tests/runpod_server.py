"""A small RunPod in memory: its API v2 and its GraphQL for pods, real HTTP on 127.0.0.1, with faults and a log of requests.

    with RunPodServer() as runpod:
        runpod.add_pod("p1")
        runpod.fail("/v2/", status=429, headers={"Retry-After": "7"})
        finish_something(runpod.environ("p1"))
        assert runpod.pods["p1"].status == "EXITED"

Every answer of API v2 is checked against RunPod's own description before it is sent (runpod_shapes.json, an excerpt), and so is
every body that comes. Does not handle: making, changing and listing pods, logs, serverless, clusters' endpoints, billing.

Sources: openapi.json of Runpod REST 2.0.0; for GraphQL, what runpodctl 2.7 sends and expects.
"""

import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

import jsonschema  # type: ignore[import-untyped]  # it comes with none

SHAPES = json.loads((Path(__file__).parent / "runpod_shapes.json").read_text("utf-8"))
ACTIONS = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
}
TITLES = {400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict", 429: "Too Many Requests"}
ALWAYS = 10**9


def check_shape(name: str, value: object) -> None:
    """Raise when RunPod's description of its API has it otherwise."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": SHAPES["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


class Request(NamedTuple):
    method: str
    path: str
    body: str
    authorization: str


@dataclass(kw_only=True)
class Fault:
    path: str
    status: int = 0
    kind: Literal["answer", "reset", "lost"] = "answer"
    """reset: nothing is done and nothing answered; lost: it is done, and the answer is lost."""
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass(kw_only=True)
class Pod:
    status: str = "RUNNING"
    cost: float = 0.44
    cluster: str | None = None

    def describe(self, pod_id: str) -> dict[str, Any]:
        cluster = {} if self.cluster is None else {"cluster": {"id": self.cluster, "rank": 0}}
        return {
            "id": pod_id,
            "name": "qlora",
            "image": "example.org/qlora:1",
            "args": "",
            "disk": 50,
            "ports": [],
            "env": {},
            "registry": None,
            "status": self.status,
            "actions": ACTIONS[self.status],
            "mounts": {"persistent": {"size": 20, "path": "/workspace"}},
            "gpu": {"id": "NVIDIA GeForce RTX 4090", "count": 1},
            "cloud": "SECURE",
            "dataCenterId": "US-KS-2",
            "cudaVersion": "13.0",
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": self.cost if self.status == "RUNNING" else 0.0,
            "locked": False,
            "globalNetworking": {"enabled": False},
            "runtime": {"uptime": 3600, "ports": []} if self.status == "RUNNING" else None,
            "createdAt": "2026-11-01T12:00:00Z",
            "startedAt": "2026-11-01T12:02:00Z",
            **cluster,
        }


class RunPodServer:
    """Use as a context manager; `pods` and `log` are for the test to read."""

    def __init__(self, api_key: str = "planted/key+1") -> None:
        self.api_key = api_key
        self.pods: dict[str, Pod] = {}
        self.log: list[Request] = []
        self.errors: list[BaseException] = []
        """What went wrong in the server itself, such as an answer that RunPod would not give."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    def __enter__(self) -> "RunPodServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert not self.errors, self.errors

    def stop(self) -> None:
        """From now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environ(self, pod: str) -> dict[str, str]:
        """What a pod of this RunPod has in its environment, as far as it matters; no `runpodctl` is on its PATH."""
        return {
            "RUNPOD_POD_ID": pod,
            "RUNPOD_REST_URL": f"{self.url}/v2",
            "RUNPOD_GRAPHQL_URL": f"{self.url}/graphql",
            "PATH": "/nonexistent",
        }

    def add_pod(self, pod: str, **fields: Any) -> None:
        self.pods[pod] = Pod(**fields)

    def fail(
        self,
        path: str,
        *,
        status: int = 0,
        kind: Literal["answer", "reset", "lost"] = "answer",
        headers: Mapping[str, str] | None = None,
        times: int = 1,
    ) -> None:
        """Break the next requests whose path contains this."""
        self._faults.append(Fault(path=path, status=status, kind=kind, headers=headers or {}, times=times))

    def heal(self) -> None:
        self._faults.clear()

    def take(self, request: Request) -> Fault | None:
        with self._lock:
            self.log.append(request)
            for fault in self._faults:
                if fault.times > 0 and fault.path in request.path:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> tuple[int, Any]:
        """(status, body); a body of None is no body."""
        address = urlsplit(request.path)
        if address.path == "/graphql":
            keys = {f"Bearer {key}" for key in parse_qs(address.query).get("api_key", [])}
            is_known = f"Bearer {self.api_key}" in {request.authorization, *keys}
            return self._graphql(json.loads(request.body)) if is_known else (401, {"errors": [{"message": "Unauthorized"}]})
        if request.authorization != f"Bearer {self.api_key}":
            return problem(401, "missing or invalid bearer token")
        match = re.fullmatch(r"/v2/pods/([^/]+)(/action)?", address.path)
        pod = self.pods.get(match[1]) if match else None
        if match is None or pod is None:
            return problem(404, "resource not found")
        if request.method == "GET":
            return 200, pod.describe(match[1])
        if pod.cluster is not None:
            return problem(409, "Pod belongs to a cluster and cannot be modified via the pod endpoints")
        action = "terminate"
        if match[2]:
            body = json.loads(request.body)
            check_shape("PodActionRequest", body)
            action = body["action"]
        if action not in ACTIONS[pod.status]:
            return problem(409, f"{action} is not valid for a pod that is {pod.status}")
        if action == "terminate":
            del self.pods[match[1]]
            return 204, None
        pod.status = {"stop": "EXITED", "start": "STARTING", "restart": "RUNNING"}[action]
        return 200, pod.describe(match[1])

    def _graphql(self, body: dict[str, Any]) -> tuple[int, Any]:
        query = re.sub(r"\s+", " ", body["query"])
        literal = re.search(r'podId: ?"([^"]+)"', query)
        pod_id = literal[1] if literal else body.get("variables", {}).get("podId")
        pod = self.pods.get(str(pod_id))
        if pod is None:
            return 200, {"errors": [{"message": "pod not found", "extensions": {"code": "BAD_USER_INPUT"}}], "data": None}
        if "podStop(" in query:
            pod.status = "EXITED"
            return 200, {"data": {"podStop": {"id": pod_id, "desiredStatus": "EXITED"}}}
        if "podTerminate(" in query:
            del self.pods[str(pod_id)]
            return 200, {"data": {"podTerminate": None}}
        if "costPerHr" in query:
            return 200, {"data": {"pod": {"costPerHr": pod.cost}}}
        return 200, {"errors": [{"message": "Cannot query that"}]}


def problem(status: int, detail: str) -> tuple[int, dict[str, Any]]:
    """An error as RFC 9457 and RunPod write it."""
    return status, {"title": TITLES.get(status, "Internal Server Error"), "status": status, "detail": detail}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Kept in `errors`; a connection that was reset is what this is for."""


def _handler(runpod: RunPodServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            try:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                request = Request(self.command, self.path, body, self.headers.get("Authorization", ""))
                fault = runpod.take(request)
                if fault is not None and fault.kind == "answer":
                    is_rest = self.path.startswith("/v2/")
                    self._answer(*(problem(fault.status, "a fault") if is_rest else (fault.status, {})), headers=fault.headers)
                    return
                answer = None if fault is not None and fault.kind == "reset" else runpod.answer(request)
                if fault is not None or answer is None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return
                self._answer(*answer)
            except OSError:  # the client is gone
                self.close_connection = True
            except Exception as error:  # the test shows it
                runpod.errors.append(error)
                raise

        def _answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
            is_good = status < 300
            if self.path.startswith("/v2/") and body is not None:
                check_shape("Pod" if is_good else "ErrorResponse", body)
            raw = b"" if body is None else json.dumps(body).encode()
            self.send_response_only(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if status != 204:
                is_problem = self.path.startswith("/v2/") and not is_good
                self.send_header("Content-Type", "application/problem+json" if is_problem else "application/json")
                self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        do_GET = do_POST = do_DELETE = _handle

    return Handler
