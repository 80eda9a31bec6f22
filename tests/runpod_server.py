"""A small RunPod in memory: API v2 for pods, templates and the catalogue, GraphQL for pods; real HTTP, faults, a log of requests.

    with RunPodServer() as runpod:
        runpod.add_pod("p1")
        runpod.fail("/v2/", status=429, headers={"Retry-After": "7"})
        finish_something(runpod.environ("p1"))
        assert runpod.pods["p1"].status == "EXITED"

Every answer of API v2 is checked against RunPod's own description before it is sent (runpod_shapes.json, an excerpt), and so is
every body that comes; one that is not so described is refused with 422, as RunPod does. What a made pod does is the test's to
say, in `on_create`. Does not handle: changing pods, serverless, clusters' endpoints, billing, pods' secrets.

Sources: openapi.json of Runpod REST 2.0.0; for GraphQL, what runpodctl 2.7 sends and expects.
"""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
TITLES = {
    **{400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found"},
    **{409: "Conflict", 422: "Unprocessable Entity", 429: "Too Many Requests"},
}
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
    method: str = ""
    detail: str = "a fault"


@dataclass(kw_only=True)
class Pod:
    status: str = "RUNNING"
    cost: float = 0.44
    cluster: str | None = None
    name: str = "qlora"
    made_of: dict[str, Any] = field(default_factory=dict)
    """The request that made it."""
    created_at: str = "2026-11-01T12:00:00Z"
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    """Of its log: (id, source, text)."""

    def write(self, text: str, *, source: str = "container", at: str | None = None) -> None:
        """Log lines; the id is the second, so several share one."""
        moment = at or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.lines += [(moment, source, line) for line in text.splitlines()]

    def describe(self, pod_id: str) -> dict[str, Any]:
        cluster = {} if self.cluster is None else {"cluster": {"id": self.cluster, "rank": 0}}
        return {
            "id": pod_id,
            "name": self.name,
            "image": self.made_of.get("image", "example.org/qlora:1"),
            "args": "",
            "disk": self.made_of.get("disk", 50),
            "ports": [],
            "env": self.made_of.get("env", {}),
            "registry": None,
            "status": self.status,
            "actions": ACTIONS[self.status],
            "mounts": self.made_of.get("mounts", {}) if self.made_of else {"persistent": {"size": 20, "path": "/workspace"}},
            "gpu": {"id": "NVIDIA GeForce RTX 4090", "count": 1},
            "cloud": self.made_of.get("cloud", "SECURE"),
            "dataCenterId": "US-KS-2",
            "cudaVersion": "13.0",
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": self.cost if self.status == "RUNNING" else 0.0,
            "locked": False,
            "globalNetworking": {"enabled": False},
            "runtime": {"uptime": 3600, "ports": []} if self.status == "RUNNING" else None,
            "createdAt": self.created_at,
            "startedAt": None if self.status == "PROVISIONING" else self.created_at,
            **cluster,
        }


@dataclass(kw_only=True)
class Gpu:
    """A row of the catalogue."""

    id: str
    memory: int
    secure: float
    community: float = 0.0
    availability: str = "HIGH"
    places: tuple[str, ...] = ("US-KS-2",)
    """Data centres that have some."""
    is_gone: bool = False
    """Rented by somebody else since the catalogue was read."""

    def describe(self) -> dict[str, Any]:
        places = [{"id": place, "name": place, "availability": self.availability} for place in self.places]
        return {
            "id": self.id,
            "name": self.id.removeprefix("NVIDIA ").removeprefix("GeForce "),
            "pool": None,
            "manufacturer": "AMD" if self.id.startswith("AMD") else "NVIDIA",
            "memory": self.memory,
            "secure": self.secure > 0,
            "community": self.community > 0,
            "price": {"secure": self.secure, "community": self.community},
            "maxCount": {"secure": 8 if self.secure else 0, "community": 4 if self.community else 0},
            "availability": self.availability,
            "dataCenters": places,
            "cudaVersions": [{"version": "13.0", "available": self.availability != "NONE"}],
        }


class RunPodServer:
    """Use as a context manager; `pods` and `log` are for the test to read."""

    def __init__(self, api_key: str = "planted/key+1") -> None:
        self.api_key = api_key
        self.pods: dict[str, Pod] = {}
        self.gpus: list[Gpu] = []
        self.volumes: dict[str, str] = {}
        """Network volume -> its data centre."""
        self.templates: list[dict[str, Any]] = []
        self.on_create: Callable[[str, Pod], object] = lambda pod_id, pod: None
        """Called with each pod that is made, before that is answered."""
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
        method: str = "",
        detail: str = "a fault",
    ) -> None:
        """Break the next requests whose path contains this, of one method or of any."""
        self._faults.append(
            Fault(path=path, status=status, kind=kind, headers=headers or {}, times=times, method=method, detail=detail)
        )

    def heal(self) -> None:
        self._faults.clear()

    def take(self, request: Request) -> Fault | None:
        with self._lock:
            self.log.append(request)
            for fault in self._faults:
                if fault.times > 0 and fault.path in request.path and fault.method in ("", request.method):
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
        if (found := self._collection(request, address.path, parse_qs(address.query))) is not None:
            return found
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

    def _collection(self, request: Request, path: str, query: Mapping[str, list[str]]) -> tuple[int, Any] | None:
        """The endpoints that are not one pod's; None where it is one."""
        body = json.loads(request.body) if request.body else {}
        match request.method, path:
            case "GET", "/v2/pods":
                return 200, {"pods": [pod.describe(name) for name, pod in self.pods.items() if pod.cluster is None]}
            case "POST", "/v2/pods":
                return self._create(body)
            case "GET", "/v2/templates":
                return 200, {"templates": self.templates}
            case "POST", "/v2/templates":
                if refused := wrong_body("CreateTemplateRequest", body):
                    return refused
                empty = {"args": "", "disk": 50, "mounts": {}, "ports": [], "env": {}, "registry": None, "serverless": False}
                more = {"public": False, "category": "NVIDIA", "startSsh": True, "startJupyter": True, "allowedCudaVersions": []}
                self.templates.append({"id": f"t{len(self.templates) + 1}", **empty, **more, **body})
                return 201, self.templates[-1]
            case "GET", "/v2/catalog/gpus":
                if "include" in query and "product" not in query:
                    return problem(400, "include=AVAILABILITY requires product")
                return 200, {"gpus": [gpu.describe() for gpu in self.gpus]}
        if (volume := re.fullmatch(r"/v2/network-volumes/([^/]+)", path)) and volume[1] in self.volumes:
            place = self.volumes[volume[1]]
            return 200, {"id": volume[1], "name": "volume", "size": 100, "dataCenter": place, "type": "STANDARD"}
        return None

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        if refused := wrong_body("CreatePodRequest", body):
            return refused
        gpu = next((gpu for gpu in self.gpus if gpu.id == body["gpu"]["id"]), None)
        mounts = body.get("mounts", {})
        if gpu is None or gpu.is_gone or gpu.availability == "NONE":
            return problem(400, "There are no instances currently available")
        if any(mount["volumeId"] not in self.volumes for mount in mounts.get("network", ())) or len(mounts) > 1:
            return problem(400, "mounts: no such network volume, or more than one kind of mount")
        price = gpu.secure if body.get("cloud", "SECURE") == "SECURE" else gpu.community
        with self._lock:
            pod_id = f"pod{len(self.pods) + 1:04d}"
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.pods[pod_id] = Pod(status="RUNNING", cost=price, name=body["name"], made_of=body, created_at=now)
        self.on_create(pod_id, self.pods[pod_id])
        return 201, self.pods[pod_id].describe(pod_id)

    def stream(self, request: Request, last_id: str | None) -> Iterator[bytes] | None:
        """The log of a pod as Server-Sent Events, for as long as its container runs; None where there is none."""
        address = urlsplit(request.path)
        match = re.fullmatch(r"/v2/pods/([^/]+)/logs", address.path)
        if match is None or request.authorization != f"Bearer {self.api_key}" or (pod := self.pods.get(match[1])) is None:
            return None
        tail = int(parse_qs(address.query).get("tail", ["100"])[0])
        first = max(0, len(pod.lines) - tail)
        if last_id is not None:  # from this point: what shares its moment comes again
            first = next((number for number, line in enumerate(pod.lines) if line[0] >= last_id), len(pod.lines))
        return self._events(match[1], pod, first)

    def _events(self, pod_id: str, pod: Pod, first: int) -> Iterator[bytes]:
        while True:
            for moment, source, line in pod.lines[first:]:
                data = json.dumps({"ts": moment, "source": source, "line": line})
                yield f"id: {moment}\ndata: {data}\n\n".encode()
                first += 1
            if pod.status not in ("STARTING", "RUNNING") or pod_id not in self.pods:
                return
            time.sleep(0.02)

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


def problem(status: int, detail: str, errors: list[str] | None = None) -> tuple[int, dict[str, Any]]:
    """An error as RFC 9457 and RunPod write it."""
    more = {"errors": errors} if errors else {}
    return status, {"title": TITLES.get(status, "Internal Server Error"), "status": status, "detail": detail, **more}


def shape_of(path: str, method: str) -> str:
    """What RunPod calls a good answer there."""
    path = urlsplit(path).path
    if path.startswith("/v2/network-volumes"):
        return "NetworkVolume"
    if path == "/v2/catalog/gpus":
        return "ListGpuTypesResponse"
    if path == "/v2/templates":
        return "Template" if method == "POST" else "ListTemplatesResponse"
    return "ListPodsResponse" if (method, path) == ("GET", "/v2/pods") else "Pod"


def wrong_body(name: str, body: object) -> tuple[int, dict[str, Any]] | None:
    """The refusal of a body that RunPod's description has otherwise."""
    try:
        check_shape(name, body)
    except jsonschema.ValidationError as error:
        return problem(422, "Request validation failed.", [f"{error.json_path}: {error.message}"])
    return None


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
                    self._answer(*(problem(fault.status, fault.detail) if is_rest else (fault.status, {})), headers=fault.headers)
                    return
                if fault is None and (events := runpod.stream(request, self.headers.get("Last-Event-ID"))) is not None:
                    self._stream(events)
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
                check_shape(shape_of(self.path, self.command) if is_good else "ErrorResponse", body)
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

        def _stream(self, events: Iterator[bytes]) -> None:
            self.send_response_only(200)
            for name, value in (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")):
                self.send_header(name, value)
            self.end_headers()
            for event in events:
                self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        do_GET = do_POST = do_DELETE = _handle

    return Handler
