"""A small Hugging Face Hub in memory: real HTTP on 127.0.0.1, repositories that a test can seed, break and inspect.

    with HubServer() as hub:
        oid = hub.add_repo("dataset", "tester/chats", {"train.jsonl": b"{}"})
        hub.fail("POST", "/commit/", status=503)
        run_child(env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test"})  # the client reads HF_ENDPOINT at import
        assert "README.md" in hub.files("model", "tester/adapter")

Every upload is "regular", whatever its size, but for files that `lfs_suffixes` names: a client that sends those needs
HF_HUB_DISABLE_XET=1.

Does not handle: Xet, pull requests, tags, Spaces, organisations, repository names without an owner, listings in several
pages, redirects to a CDN.

Sources: what huggingface_hub 2.4.0 and datasets 5.2.0 send and read; huggingface.js issue 945 (gated repositories list
their files to anybody); huggingface_hub pull request 2389 (it is the client, not the Hub, that avoids empty commits); what the
Hub refuses in a card's metadata: espnet_model_zoo pull request 102, hub-docs modelcard.md, datasets pull request 4827.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote

from hub_cards import card_data, card_errors

Kind = Literal["model", "dataset"]
Files = Mapping[str, bytes]  # a tree: content by path
Headers = Mapping[str, str]
Answer = tuple[int, bytes, Headers]


class Request(NamedTuple):  # a line of the log, written before the answer is sent
    method: str
    path: str  # as sent: quoted, with the query
    status: int  # 0: the connection was closed in the middle of the answer
    has_authorization: bool
    num_bytes: int = 0  # of the body that was sent


class Commit(NamedTuple):
    oid: str
    message: str
    files: Files  # the whole tree after this commit


@dataclass
class Repo:
    url: str
    private: bool
    gated: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # oldest commit first, never empty
    readers: set[str] = field(default_factory=set)  # users with access to what is private or gated, besides the owner
    claimed: dict[str, int] = field(default_factory=dict)  # sizes that the listing gives instead of the files' own

    def history(self, revision: str) -> list[Commit]:
        """Return the commits that lead to a branch or a full oid, oldest first."""
        for name, commits in self.branches.items():
            for number, commit in enumerate(commits, 1):
                if revision == commit.oid or (revision == name and number == len(commits)):
                    return commits[:number]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, message: str, files: Files) -> str:
        commits = self.branches.setdefault(branch, [])
        # The number makes a commit that changes nothing a new one; the content keeps two servers' commits apart.
        identity = (len(commits), message, sorted((path, blob_oid(data)) for path, data in files.items()))
        commits.append(Commit(hashlib.sha1(repr(identity).encode()).hexdigest(), message, files))
        return commits[-1].oid


@dataclass
class Fault:
    """What becomes of the next request that it names."""

    method: str
    path_regex: str
    answer: Answer | None = None  # instead of the real one; None: the real one
    reset: bool = False  # the answer is lost halfway
    cut: bool = False  # the connection breaks halfway through the request, which takes no effect
    hang_seconds: float = 0.0  # before the answer
    action: Callable[[], object] | None = None  # called before the request is answered


class Refusal(Exception):
    """An answer that is an error; the client turns `code` into the class of its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Headers | None = None) -> None:
        super().__init__(message)
        known = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = as_json({"error": message}, status, known)


class HubServer:
    """Serve from a daemon thread until the `with` block ends; the methods may be called from any thread."""

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = dict({"hf_test": "tester"} if tokens is None else tokens)  # token: user, who may write to user/*
        self.roles: dict[str, str] = {}  # token: role (read, write, fineGrained), where it is not write
        self.clock_offset_seconds = 0.0  # of the Date header
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lfs_suffixes: tuple[str, ...] = ()  # files that are uploaded by LFS
        self.large: dict[str, bytes] = {}  # what was uploaded by LFS, by its sha256
        self.lock = threading.RLock()  # guards all of these; held while a request is answered, not while it is sent
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()  # polls: a quick exit
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_repo(self, kind: Kind, repo_id: str, files: Files, private: bool = False, gated: bool = False) -> str:
        """Create or replace a repository: one commit on main with exactly `files`. Return its oid."""
        with self.lock:
            url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
            repo = self.repos[kind, repo_id] = Repo(url, private, gated)
            return repo.commit("main", "initial commit", dict(files))

    def add_commit(self, kind: Kind, repo_id: str, files: Files, revision: str = "main") -> str:
        """Add or replace `files` on a branch. Return the new oid."""
        with self.lock:
            repo = self.repos[kind, repo_id]
            return repo.commit(revision, "update", {**repo.branches[revision][-1].files, **files})

    def files(self, kind: Kind, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the tree at a branch or commit. Raises: KeyError (no such repository), Refusal (no such revision)."""
        with self.lock:
            return dict(self.repos[kind, repo_id].history(revision)[-1].files)

    def fail(
        self,
        method: str,
        path_regex: str,
        status: int = 500,
        times: int = 1,
        headers: Headers | None = None,
        reset: bool = False,
        cut: bool = False,
        hang_seconds: float = 0.0,
    ) -> None:
        """Break the next `times` requests of this method in whose path (with its query) the regex is found.

        They get `status` and change nothing; or they take full effect and lose their answer halfway (`reset`) or get it late
        (`hang_seconds`); or the connection breaks in the middle of what they send, and they change nothing (`cut`).
        """
        with self.lock:
            takes_effect = reset or hang_seconds > 0
            answer = None if takes_effect or cut else as_json({"error": "injected fault"}, status, headers)
            self.faults += [Fault(method, path_regex, answer, reset, cut, hang_seconds)] * times

    def before(self, method: str, path_regex: str, action: Callable[[], object]) -> None:
        """Call `action` when the next such request has come, and before it is answered as if nothing were."""
        with self.lock:
            self.faults.append(Fault(method, path_regex, action=action))


class _Handler(BaseHTTPRequestHandler):
    """One connection: the Hub's routes over the state of `hub`."""

    hub: HubServer
    protocol_version = "HTTP/1.1"  # the client keeps its connections open

    def _serve(self) -> None:
        fault = self._take_fault()
        if fault.cut:
            self._break_off()
            return
        self.body = self._read_body()
        with self.hub.lock:
            if fault.action:
                fault.action()
            reset = fault.reset
            try:
                status, body, headers = fault.answer or self._answer()
            except Refusal as refusal:
                status, body, headers = refusal.answer
            num_bytes = 0 if self.command == "HEAD" else len(body) // 2 if reset else len(body)
            facts = (0 if reset else status, "Authorization" in self.headers, num_bytes)
            self.hub.requests.append(Request(self.command, self.path, *facts))
        time.sleep(fault.hang_seconds)
        date = formatdate(time.time() + self.hub.clock_offset_seconds, usegmt=True)
        lines = "".join(f"{k}: {v}\r\n" for k, v in {"Content-Length": str(len(body)), "Date": date, **headers}.items())
        raw = f"HTTP/1.1 {status} -\r\n{lines}\r\n".encode() + (b"" if self.command == "HEAD" else body)
        with suppress(ConnectionError):  # a client that has given up
            self.wfile.write(raw[: len(raw) // 2] if reset else raw)
        self.close_connection |= reset

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _take_fault(self) -> Fault:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method == self.command and re.search(fault.path_regex, self.path):
                    self.hub.faults.remove(fault)
                    return fault
        return Fault("", "")

    def _break_off(self) -> None:
        """Read a little of what comes, then reset the connection."""
        self.rfile.read(min(64, int(self.headers.get("Content-Length", 0)) // 2))
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, 0, "Authorization" in self.headers))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: `hub.requests` is the log."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:size]  # without the line end
        self.rfile.readline()  # the empty line after the last chunk
        return body

    def _answer(self) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        if token and self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.role = self.hub.roles.get(token, "write")
        path, _, self.query = self.path.partition("?")
        parts = [unquote(part) for part in path.strip("/").split("/")]  # after the split: a revision may hold a slash
        kind: Kind = "dataset" if path.startswith(("/datasets/", "/api/datasets/")) else "model"
        match self.command, parts:
            case "GET", ["api", "whoami-v2"] if self.user:
                auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}
                return as_json({"type": "user", "name": self.user, "orgs": [], "auth": auth})
            case "POST", ["api", "validate-yaml"]:
                card = json.loads(self.body)
                found = card_errors(card["content"])
                return as_json({"errors": [{"message": text} for text in found], "warnings": []}, 400 if found else 200)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._access("model", f"{owner}/{name.removesuffix('.git')}", "write")
                return self._lfs_batch(json.loads(self.body))
            case "PUT", ["lfs", oid]:
                self.hub.large[oid] = self.body
                return 200, b"", {}
            case ("POST", ["api", "repos", "create"]) | ("DELETE", ["api", "repos", "delete"]):
                return self._create_or_delete(json.loads(self.body))
            case "GET", ["api", "models" | "datasets", owner, name, "auth-check", *what]:
                self._access(kind, f"{owner}/{name}", "write" if what == ["write"] else "content")
                return as_json({})
            case method, ["api", "models" | "datasets", owner, name, *rest]:
                repo = self._access(kind, f"{owner}/{name}", "write" if method == "POST" else "listing")
                return self._repo_api(repo, f"{owner}/{name}", rest)
            case "GET" | "HEAD", (["datasets", owner, name, "resolve", *rest] | [owner, name, "resolve", *rest]):
                return self._resolve(self._access(kind, f"{owner}/{name}", "content"), rest[0], "/".join(rest[1:]))
        raise Refusal(404, f"No such page: {self.command} {path}")

    def _access(self, kind: Kind, repo_id: str, want: Literal["listing", "content", "write"]) -> Repo:
        repo, owner = self.hub.repos.get((kind, repo_id)), repo_id.split("/")[0]
        inside = repo is not None and self.user in {owner, *repo.readers}
        if repo is None or (repo.private and not inside):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if want == "content" and repo.gated and not inside:
            raise Refusal(403 if self.user else 401, f"Access to {kind} {repo_id} is restricted", "GatedRepo")
        if want == "write" and (self.user != owner or self.role == "read"):
            raise Refusal(403 if self.user else 401, f"You don't have the rights to change {kind} {repo_id}")
        return repo

    def _create_or_delete(self, wanted: dict[str, Any]) -> Answer:
        kind, owner = wanted.get("type", "model"), wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        if self.command == "DELETE":
            self._access(kind, repo_id, "write")
            del self.hub.repos[kind, repo_id]
            return as_json({})
        if self.user is None or self.user != owner or self.role == "read":
            raise Refusal(403 if self.user else 401, f"You don't have the rights to create a {kind} under {owner}")
        if repo := self.hub.repos.get((kind, repo_id)):
            return as_json({"error": f"You already created this {kind} repo", "url": repo.url}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.add_repo(kind, repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        return as_json({"url": self.hub.repos[kind, repo_id].url, "name": repo_id})

    def _repo_api(self, repo: Repo, repo_id: str, rest: list[str]) -> Answer:
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                oid, _, files = repo.history(rest[1] if rest else "main")[-1]
                siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
                if "blobs=true" in self.query:
                    sizes = {path: len(data) for path, data in files.items()} | repo.claimed
                    siblings = [{"rfilename": p, "size": sizes[p], "blobId": blob_oid(b)} for p, b in files.items()]
                facts = {"id": repo_id, "sha": oid, "private": repo.private, "gated": repo.gated and "manual"}
                card = card_data(files.get("README.md", b"").decode())
                return as_json({**facts, "disabled": False, "tags": [], "siblings": siblings, "cardData": card})
            case "GET", ["tree", revision, *folders]:
                prefix = "".join(f"{folder}/" for folder in folders)
                listed = entries(repo.history(revision)[-1].files, self.hub.lfs_suffixes)
                inside = [entry for entry in listed if entry["path"].startswith(prefix)]
                if prefix and not inside:
                    raise Refusal(404, f"{prefix} does not exist on {revision}", "EntryNotFound")
                deep = "recursive=true" in self.query
                return as_json([e for e in inside if deep or "/" not in e["path"].removeprefix(prefix)])
            case "POST", ["paths-info", revision]:
                wanted = parse_qs(self.body.decode()).get("paths", [])
                listed = entries(repo.history(revision)[-1].files, self.hub.lfs_suffixes)
                return as_json([entry for entry in listed if entry["path"] in wanted])
            case "POST", ["preupload", revision]:
                listed = entries(repo.history(revision)[-1].files, self.hub.lfs_suffixes)
                oids = {entry["path"]: {"oid": entry.get("lfs", entry)["oid"]} for entry in listed}
                modes = [
                    (file["path"], "lfs" if file["path"].endswith(self.hub.lfs_suffixes or ("/",)) else "regular")
                    for file in json.loads(self.body)["files"]
                ]
                told = [{"path": p, "uploadMode": mode, "shouldIgnore": False, **oids.get(p, {})} for p, mode in modes]
                return as_json({"files": told})
            case "POST", ["commit", branch] if not self.query:  # a query asks for a pull request
                oid = self._commit(repo, branch, [json.loads(line) for line in self.body.splitlines()])
                return as_json({"success": True, "commitOid": oid, "commitUrl": f"{repo.url}/commit/{oid}"})
            case "POST", ["branch", branch]:
                if branch in repo.branches:
                    raise Refusal(409, f"Reference already exists: {branch}")
                repo.branches[branch] = repo.history(json.loads(self.body).get("startingPoint", "main"))
                return as_json({})
        raise Refusal(404, f"No such page: {self.command} {self.path}")

    def _commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> str:
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head, message = repo.branches[branch][-1], ""
        files = dict(head.files)
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                if value["path"] == "README.md" and (found := card_errors(files["README.md"].decode())):
                    raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(found)}")
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key != "deletedFile":
                raise Refusal(400, f"{key} is not supported by this server")
            elif files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        return repo.commit(branch, message, files)

    def _lfs_batch(self, wanted: dict[str, Any]) -> Answer:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                **({} if one["oid"] in self.hub.large else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}),
            }
            for one in wanted["objects"]
        ]
        return as_json({"transfer": "basic", "objects": objects})

    def _resolve(self, repo: Repo, revision: str, path: str) -> Answer:
        oid, _, files = repo.history(revision)[-1]
        if (data := files.get(path)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        headers = {"ETag": f'"{blob_oid(data)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return 200, data, headers
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if start >= stop:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return 206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}


def as_json(value: object, status: int = 200, headers: Headers | None = None) -> Answer:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}


def blob_oid(data: bytes) -> str:
    """Return git's name for a file's content: the client compares it with its own."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entries(files: Files, lfs_suffixes: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Describe every file and folder of a tree, sorted by path."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        found[path] = {"type": "file", "oid": blob_oid(data), "size": len(data), "path": path}
        if lfs_suffixes and path.endswith(lfs_suffixes):
            digest = hashlib.sha256(data).hexdigest()
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (digest.encode(), len(data))
            lfs = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
            found[path] |= {"oid": blob_oid(pointer), "lfs": lfs}
        for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
            found[folder] = {"type": "directory", "oid": blob_oid(folder.encode()), "size": 0, "path": folder}
    return [found[path] for path in sorted(found)]
