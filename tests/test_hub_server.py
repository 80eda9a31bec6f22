"""The Hub double against the real client: what it answers is what huggingface_hub and datasets understand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, IncompleteRead
from typing import Any

import pytest
from hub_server import HubServer

# HF_ENDPOINT is read at import, so the client lives in a child; imports take seconds, so there is one child for all.
CLIENT = """
import json, sys
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, told, (folder, old) = HfApi(), {}, sys.argv[1:]

def tell(name, action):
    try:
        told[name] = action()
    except Exception as error:
        told[name] = f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', '')}".strip()

def push(repo_id, **options):
    api.create_repo(repo_id, exist_ok=True, private=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **options).oid

tell("user", lambda: api.whoami()["name"])
tell("url", lambda: str(api.create_repo("tester/adapter", private=True)))
tell("url again", lambda: str(api.create_repo("tester/adapter", exist_ok=True)))
tell("not mine", lambda: api.create_repo("other/adapter"))
tell("commit", lambda: push("tester/adapter"))
tell("same commit", lambda: push("tester/adapter"))
path = snapshot_download("tester/adapter")
told["snapshot"] = sorted(str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file())
tell("missing file", lambda: hf_hub_download("tester/adapter", "missing.bin"))
tell("missing repository", lambda: api.model_info("tester/none"))
tell("missing revision", lambda: api.model_info("tester/adapter", revision="none"))
tell("private", lambda: api.model_info("tester/adapter", token=False))
tell("bad token", lambda: api.model_info("tester/adapter", token="hf_wrong"))
tell("gated, listed", lambda: [api.model_info("other/gated", token=False).gated, api.list_repo_files("other/gated")])
tell("gated, no token", lambda: hf_hub_download("other/gated", "config.json", token=False))
tell("gated, not accepted", lambda: hf_hub_download("other/gated", "config.json"))
tell("gated, accepted", lambda: Path(hf_hub_download("other/accepted", "config.json")).read_text())
tell("old rows", lambda: load_dataset("tester/chats", revision=old, split="train").to_list())
tell("rows", lambda: load_dataset("tester/chats", split="train").to_list())
tell("old stream", lambda: list(load_dataset("tester/chats", revision=old, split="train", streaming=True)))
tell("torn download", lambda: len(Path(hf_hub_download("other/accepted", "big.bin")).read_bytes()))
tell("branch", lambda: api.create_branch("tester/adapter", branch="checkpoints/1"))
tell("branch again", lambda: api.create_branch("tester/adapter", branch="checkpoints/1"))
tell("on branch", lambda: api.upload_file(path_or_fileobj=b"3", path_in_repo="step", repo_id="tester/adapter",
                                          revision="checkpoints/1").oid)
tell("deleted", lambda: api.delete_file("step", "tester/adapter", revision="checkpoints/1").oid)
tell("refused once", lambda: push("tester/refused"))
tell("answer lost", lambda: push("tester/lost"))
tell("raised", lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="tester/gone"))
told["left"] = api.list_repo_files("tester/gone")
tell("gone", lambda: api.delete_repo("tester/gone"))
print(json.dumps(told))
"""
CARD = b"---\nlibrary_name: peft\nbase_model: org/tiny\n---\n# Adapter\n"
FOLDER = {"README.md": CARD, "adapter_config.json": b"{}", "sub/adapter.safetensors": b"\0" * 1000}
OLD, NEW = b'{"text": "one"}\n', b'{"text": "one"}\n{"text": "two"}\n'
BIG = bytes(range(256)) * 4000


@dataclass
class Client:
    """What the child saw, and the server as the child left it."""

    hub: HubServer
    told: dict[str, Any]

    def statuses(self, method: str, part: str) -> list[int]:
        return [r.status for r in self.hub.requests if r.method == method and part in r.path]

    def oids(self, repo_id: str, branch: str = "main") -> list[str]:
        return [commit.oid for commit in self.hub.repos["model", repo_id].branches[branch]]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("folder")
    for path, data in FOLDER.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    with HubServer() as hub:
        old = hub.add_repo("dataset", "tester/chats", {"train.jsonl": OLD})
        hub.add_commit("dataset", "tester/chats", {"train.jsonl": NEW})
        hub.add_repo("model", "other/gated", {"config.json": b"{}"}, gated=True)
        hub.add_repo("model", "other/accepted", {"config.json": b"{}", "big.bin": BIG}, gated=True)
        hub.repos["model", "other/accepted"].readers.add("tester")
        hub.add_repo("model", "tester/gone", {"b": b""})
        hub.fail("GET", "/resolve/.*big.bin", reset=True)
        hub.fail("POST", "tester/refused/commit/", status=500)
        hub.fail("POST", "tester/gone/commit/", status=500)
        hub.fail("POST", "tester/lost/commit/", reset=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", CLIENT, str(folder), old]
        child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=home)
        assert child.returncode == 0, child.stderr
        yield Client(hub, json.loads(child.stdout.splitlines()[-1]))


def test_a_token_names_its_user_and_is_never_logged(client: Client) -> None:
    assert client.told["user"] == "tester"
    assert client.told["bad token"] == "HfHubHTTPError 401"
    assert {request.has_authorization for request in client.hub.requests} == {True, False}
    assert "hf_" not in repr(client.hub.requests)


def test_creating_a_repository_twice_gives_its_page_and_other_peoples_names_are_refused(client: Client) -> None:
    assert client.told["url"] == client.told["url again"] == f"{client.hub.url}/tester/adapter"
    assert client.hub.repos["model", "tester/adapter"].private
    assert client.told["not mine"] == "HfHubHTTPError 403"
    assert client.told["gone"] is None and ("model", "tester/gone") not in client.hub.repos


def test_an_uploaded_folder_is_one_commit_with_every_file_and_a_second_upload_is_none(client: Client) -> None:
    files = client.hub.files("model", "tester/adapter")
    assert {path: data for path, data in files.items() if path != ".gitattributes"} == FOLDER
    assert client.oids("tester/adapter")[1:] == [client.told["commit"]]
    assert client.told["same commit"] == client.told["commit"]
    assert client.told["snapshot"] == sorted(files)


def test_what_is_missing_is_told_apart(client: Client) -> None:
    assert client.told["missing file"] == "RemoteEntryNotFoundError 404"  # an EntryNotFoundError
    assert client.told["missing repository"] == "RepositoryNotFoundError 404"
    assert client.told["missing revision"] == "RevisionNotFoundError 404"
    assert client.told["private"] == "RepositoryNotFoundError 401"


def test_a_gated_repository_lists_its_files_and_keeps_their_content_for_accepted_users(client: Client) -> None:
    assert client.told["gated, listed"] == ["manual", ["config.json"]]
    assert client.told["gated, no token"] == "GatedRepoError 401"
    assert client.told["gated, not accepted"] == "GatedRepoError 403"
    assert client.told["gated, accepted"] == "{}"


def test_datasets_reads_the_head_and_a_pinned_revision_streaming_or_not(client: Client) -> None:
    assert client.told["rows"] == [{"text": "one"}, {"text": "two"}]
    assert client.told["old rows"] == client.told["old stream"] == [{"text": "one"}]


def test_a_branch_starts_at_main_and_goes_its_own_way(client: Client) -> None:
    assert client.told["branch"] is None and client.told["branch again"] == "HfHubHTTPError 409"
    ours = client.oids("tester/adapter", "checkpoints/1")
    assert ours == [*client.oids("tester/adapter"), client.told["on branch"], client.told["deleted"]]
    assert client.hub.files("model", "tester/adapter", client.told["on branch"])["step"] == b"3"
    assert client.hub.files("model", "tester/adapter", "checkpoints/1") == client.hub.files("model", "tester/adapter")


def test_upload_folder_repeats_a_refused_commit_and_publishes_once(client: Client) -> None:
    assert client.statuses("POST", "tester/refused/commit/") == [500, 200]
    assert client.oids("tester/refused")[1:] == [client.told["refused once"]]


def test_upload_file_raises_on_a_refused_commit_and_publishes_nothing(client: Client) -> None:
    assert client.told["raised"] == "HfHubHTTPError 500"
    assert client.statuses("POST", "tester/gone/commit/") == [500]
    assert client.told["left"] == ["b"]


def test_upload_folder_commits_twice_when_the_answer_is_lost_and_the_second_changes_nothing(client: Client) -> None:
    assert client.statuses("POST", "tester/lost/commit/") == [0, 200]
    first, second = client.oids("tester/lost")[1:]
    assert second == client.told["answer lost"] != first
    assert client.hub.files("model", "tester/lost", first) == client.hub.files("model", "tester/lost", second)


def test_a_torn_download_is_repeated(client: Client) -> None:
    assert client.told["torn download"] == len(BIG)
    assert client.statuses("GET", "big.bin")[0] == 0


def ask(hub: HubServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, str | None]:
    connection = HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, body, {"Authorization": "Bearer hf_test", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers["Content-Range"]
    finally:
        connection.close()


def test_a_range_gives_a_part_and_one_past_the_end_is_refused() -> None:
    with HubServer() as hub:
        hub.add_repo("model", "tester/a", {"f": b"0123456789"})
        assert ask(hub, "GET", "/tester/a/resolve/main/f", Range="bytes=2-4") == (206, b"234", "bytes 2-4/10")
        assert ask(hub, "GET", "/tester/a/resolve/main/f", Range="bytes=7-") == (206, b"789", "bytes 7-9/10")
        assert ask(hub, "GET", "/tester/a/resolve/main/f", Range="bytes=10-")[::2] == (416, "bytes */10")


def test_a_chunked_commit_on_an_old_parent_is_refused_and_one_on_the_head_is_taken() -> None:
    with HubServer(tokens={"hf_test": "tester"}) as hub:
        old = hub.add_repo("model", "tester/a", {"f": b"1"})
        new = hub.add_commit("model", "tester/a", {"f": b"2"})
        for parent, status in ((old, 412), (new, 200)):
            header = {"key": "header", "value": {"summary": "drop", "parentCommit": parent}}
            lines = [header, {"key": "deletedFile", "value": {"path": "f"}}]
            chunks = (json.dumps(line).encode() + b"\n" for line in lines)
            assert ask(hub, "POST", "/api/models/tester/a/commit/main", chunks)[0] == status
            assert hub.files("model", "tester/a") == ({} if status == 200 else {"f": b"2"})


def test_faults_hit_what_they_name_as_often_as_told_with_the_headers_given() -> None:
    with HubServer() as hub:
        hub.add_repo("model", "tester/a", {"f": b"0" * 100_000})
        hub.fail("GET", "/resolve/", status=429, times=2, headers={"Content-Range": "any header"})
        hub.fail("GET", "/resolve/", reset=True)
        assert ask(hub, "GET", "/api/models/tester/a")[0] == 200
        assert [ask(hub, "GET", "/tester/a/resolve/main/f")[::2] for _ in range(2)] == [(429, "any header")] * 2
        with pytest.raises(IncompleteRead):
            ask(hub, "GET", "/tester/a/resolve/main/f")
        assert ask(hub, "GET", "/tester/a/resolve/main/f")[0] == 200
        assert [request.status for request in hub.requests] == [200, 429, 429, 0, 200]
