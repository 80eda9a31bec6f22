"""Publishing over real HTTP: whatever a Hub does on the way, what is published is published once, or the reason is told."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path

import pytest
from hub_server import Commit, HubServer
from huggingface_hub import constants
from huggingface_hub.hf_api import RepoFile

from job.deliver.hub.publish import Patience, ensure_repo, publish_folder
from job.deliver.hub.upload import IncompleteError, check_upload
from job.deliver.report import Publication
from job.errors import PublishError, SettingsError
from job.keep.checkpoints import seal
from job.settings import PublishSettings

TOKEN = "hf_test"
REPO = "tester/tuned"
QUICK = Patience(first_wait_seconds=0.02, longest_wait_seconds=5.0, timeout_seconds=10.0)
CARD = "---\nlibrary_name: peft\nlicense: mit\n---\n# Adapter\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({TOKEN: "tester"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # as HF_ENDPOINT does at import
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_text(CARD, "utf-8")
    (path / "adapter_config.json").write_text("{}", "utf-8")
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 400)
    (path / "sub/notes.txt").write_text("notes", "utf-8")
    seal(path, 3)
    return path


def push(hub: HubServer, folder: Path, patience: Patience = QUICK, **options: object) -> Publication:
    settings = PublishSettings.model_validate({"hub_model_id": REPO} | {k: v for k, v in options.items() if k.startswith("hub_")})
    tell = options.get("tell", lambda text: None)
    assert callable(tell)
    return publish_folder(folder, REPO, settings, TOKEN, message="r: step 3", patience=patience, tell=tell)


def commits(hub: HubServer, branch: str = "main") -> list[Commit]:
    """Ours and other people's, without the first, which makes the repository."""
    return hub.repos["model", REPO].branches[branch][1:]


def tried(hub: HubServer, part: str = "/commit/") -> list[int]:
    return [request.status for request in hub.requests if part in request.path]


def refused(hub: HubServer, folder: Path, patience: Patience = QUICK) -> str:
    with pytest.raises(PublishError) as caught:
        push(hub, folder, patience)
    assert caught.value.exit_status == 6
    text = str(caught.value)
    assert text.startswith(f"HUB_MODEL_ID={REPO}: the adapter could not be published") and "\n" not in text
    assert "`python -m job publish`" in text and TOKEN not in text
    return text


def test_a_folder_becomes_one_commit_in_a_private_repository_without_its_manifest(hub: HubServer, folder: Path) -> None:
    publication = push(hub, folder)
    [commit] = commits(hub)
    assert (publication.commit, commit.message, publication.url) == (commit.oid, "r: step 3", f"{hub.url}/{REPO}")
    assert hub.repos["model", REPO].private
    files = {path: data for path, data in commit.files.items() if path != ".gitattributes"}
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "sub/notes.txt"}
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_a_second_time_makes_no_commit_and_a_change_makes_one(hub: HubServer, folder: Path) -> None:
    first = push(hub, folder)
    assert push(hub, folder) == first and len(commits(hub)) == 1
    (folder / "sub/notes.txt").write_text("more", "utf-8")
    assert push(hub, folder).commit == commits(hub)[1].oid


def test_another_branch_gets_it_and_main_does_not(hub: HubServer, folder: Path) -> None:
    push(hub, folder, hub_revision="candidate/1")
    assert commits(hub) == [] and len(commits(hub, "candidate/1")) == 1
    push(hub, folder, hub_revision="candidate/1")
    assert len(commits(hub, "candidate/1")) == 1


def test_a_public_repository_is_made_when_it_is_asked_for_and_an_existing_one_stays_as_it_is(
    hub: HubServer, folder: Path
) -> None:
    push(hub, folder, hub_private_repo=False)
    assert not hub.repos["model", REPO].private
    push(hub, folder, hub_private_repo=True)
    assert not hub.repos["model", REPO].private


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *((path, 500) for path in ("repos/create", "/revision/main", "validate-yaml", "/preupload/", "/commit/", "/paths-info/")),
        *(("/commit/", status) for status in (502, 503, 504, 429, 408)),
    ],
)
def test_a_server_that_fails_twice_is_asked_again_and_gets_it_once(hub: HubServer, folder: Path, path: str, status: int) -> None:
    method = "GET" if "revision" in path else "POST"
    hub.fail(method, path, status=status, times=2)
    told: list[str] = []
    publication = push(hub, folder, tell=told.append)
    assert [commit.oid for commit in commits(hub)] == [publication.commit]
    assert len(told) == 2 and all(f"the Hub is not well: it answered {status}; trying again in" in text for text in told)
    assert tried(hub, path)[:3] == [status, status, 200]


def test_a_server_that_goes_on_failing_is_asked_as_often_as_told_and_no_more(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=500, times=100)
    text = refused(hub, folder)
    assert "the Hub is not well: it answered 500" in text
    assert tried(hub) == [500] * QUICK.tries, "the library's own tries do not multiply ours"
    assert commits(hub) == []


@pytest.mark.parametrize("path", ["repos/create", "/preupload/", "/commit/", "/paths-info/"])
def test_a_connection_that_breaks_before_or_after_the_server_took_it_makes_one_commit(
    hub: HubServer, folder: Path, path: str
) -> None:
    hub.fail("POST", path, cut=True)
    hub.fail("POST", path, reset=True)
    publication = push(hub, folder)
    assert [commit.oid for commit in commits(hub)] == [publication.commit]
    assert tried(hub, path)[:2] == [0, 0]


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_again(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/commit/", reset=True)
    assert [commit.oid for commit in commits_after(hub, folder)] == [commits(hub)[0].oid]
    assert tried(hub) == [0], "what it took is seen before it is sent again"


def commits_after(hub: HubServer, folder: Path) -> list[Commit]:
    push(hub, folder)
    return commits(hub)


def test_a_server_that_is_silent_is_given_up_and_asked_again(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/preupload/", hang_seconds=1.5)
    hub.fail("POST", "/commit/", hang_seconds=1.5)  # took it, and does not say so
    begun = time.monotonic()
    push(hub, folder, QUICK._replace(timeout_seconds=0.3))
    assert len(commits(hub)) == 1
    assert time.monotonic() - begun < 6
    assert "not well: it does not answer" in refused_when_silent(hub, folder)


def refused_when_silent(hub: HubServer, folder: Path) -> str:
    (folder / "sub/notes.txt").write_text("other", "utf-8")
    hub.fail("POST", "/preupload/", hang_seconds=0.5, times=2)
    return refused(hub, folder, QUICK._replace(timeout_seconds=0.2, tries=2))


@pytest.mark.parametrize("form", ["seconds", "date", "ratelimit"])
def test_what_the_hub_asks_to_wait_is_waited_for(hub: HubServer, folder: Path, form: str) -> None:
    forms = {
        "seconds": {"Retry-After": "1"},
        "date": {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)},
        "ratelimit": {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
    }
    hub.fail("POST", "/commit/", status=429, headers=forms[form])
    begun = time.monotonic()
    push(hub, folder)
    assert 0.5 < time.monotonic() - begun < 4
    assert tried(hub) == [429, 200] and len(commits(hub)) == 1


def test_what_the_hub_asks_to_wait_is_not_waited_for_beyond_a_limit(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "3600"})
    begun = time.monotonic()
    assert "it answered 429 and asks to wait 3600 s" in refused(hub, folder)
    assert time.monotonic() - begun < 3 and tried(hub) == [429]


def test_by_default_a_sane_wait_is_honoured_and_a_long_one_is_not() -> None:
    assert 60 <= Patience().longest_wait_seconds <= 300
    assert sum(Patience().first_wait_seconds * 2**n for n in range(Patience().tries - 1)) < 120


def test_nothing_is_tried_again_where_the_hub_may_not_be_asked(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    begun = time.monotonic()
    assert "HF_HUB_OFFLINE" in refused(hub, folder, Patience(first_wait_seconds=3.0))
    assert time.monotonic() - begun < 3 and hub.requests == []


def expire(hub: HubServer) -> Callable[[], object]:
    return lambda: hub.tokens.clear()


@pytest.mark.parametrize("path", ["repos/create", "/preupload/", "/commit/"])
def test_a_token_that_expires_on_the_way_is_told_at_once_and_not_tried_again(hub: HubServer, folder: Path, path: str) -> None:
    hub.before("POST", path, expire(hub))
    text = refused(hub, folder)
    assert "does not accept HF_TOKEN" in text and "make a new one with write permission" in text
    assert tried(hub, path) == [401]
    hub.tokens[TOKEN] = "tester"
    push(hub, folder)
    assert len(commits(hub)) == 1


def test_a_token_that_may_only_read_is_told_at_once(hub: HubServer, folder: Path) -> None:
    hub.add_repo("model", REPO, {})
    hub.roles[TOKEN] = "read"
    text = refused(hub, folder)
    assert "403" in text and "write permission" in text
    assert len(tried(hub, "/preupload/")) == 1 and commits(hub) == []


def test_what_is_too_large_is_told_at_once(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=413)
    assert "413: this is more than it takes at once" in refused(hub, folder)
    assert tried(hub) == [413]


def test_metadata_that_the_hub_refuses_is_told_in_its_words_and_not_tried_again(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mine\n---\n", "utf-8")
    assert '"license" must be one of' in refused(hub, folder)
    assert tried(hub, "validate-yaml") == [400] and commits(hub) == []


@pytest.mark.parametrize("path", ["/preupload/", "/commit/", "/paths-info/"])
def test_a_repository_that_is_deleted_on_the_way_is_made_again_and_gets_it_once(hub: HubServer, folder: Path, path: str) -> None:
    push(hub, folder)
    (folder / "sub/notes.txt").write_text("more", "utf-8")
    hub.before("POST", path, lambda: hub.repos.pop(("model", REPO)))
    publication = push(hub, folder)
    assert [commit.oid for commit in commits(hub)] == [publication.commit]
    assert hub.repos["model", REPO].private and commits(hub)[0].files["sub/notes.txt"] == b"more"


def test_a_repository_that_is_deleted_and_may_not_be_made_again_is_told(hub: HubServer, folder: Path) -> None:
    def delete() -> None:
        del hub.repos["model", REPO]
        hub.roles[TOKEN] = "read"

    hub.before("POST", "/commit/", delete)
    text = refused(hub, folder)
    assert "403" in text and ("model", REPO) not in hub.repos
    assert tried(hub) == [404] and tried(hub, "repos/create") == [200, 403]


def test_a_branch_that_is_deleted_on_the_way_is_made_again(hub: HubServer, folder: Path) -> None:
    hub.before("POST", "/commit/", lambda: hub.repos["model", REPO].branches.pop("candidate"))
    push(hub, folder, hub_revision="candidate")
    assert len(commits(hub, "candidate")) == 1


def test_somebody_elses_commit_meanwhile_stays_and_ours_comes_after_it(hub: HubServer, folder: Path) -> None:
    hub.before("POST", "/commit/", lambda: hub.add_commit("model", REPO, {"theirs.txt": b"theirs"}))
    publication = push(hub, folder)
    theirs, ours = commits(hub)
    assert tried(hub) == [412, 200] and ours.oid == publication.commit
    assert theirs.message == "update" and ours.files["theirs.txt"] == b"theirs"


def test_somebody_who_pushes_all_the_time_is_told(hub: HubServer, folder: Path) -> None:
    for number in range(20):
        hub.before("POST", "/commit/", partial(hub.add_commit, "model", REPO, {"n": str(number).encode()}))
    assert "412: somebody else pushes" in refused(hub, folder)
    assert tried(hub) == [412] * QUICK.tries


def spoil(hub: HubServer, path: str, data: bytes | None) -> None:
    """Change what the newest commit holds, as a Hub with a damaged disk would."""
    newest = hub.repos["model", REPO].branches["main"][-1]
    assert isinstance(newest.files, dict)
    if data is None:
        del newest.files[path]
    else:
        newest.files[path] = data


@pytest.mark.parametrize("data", [None, b"", b"{ ", b"[]"])
def test_what_the_hub_does_not_hold_after_all_is_sent_again(hub: HubServer, folder: Path, data: bytes | None) -> None:
    hub.before("POST", "/paths-info/", lambda: spoil(hub, "adapter_config.json", data))
    push(hub, folder)
    assert commits(hub)[-1].files["adapter_config.json"] == b"{}"
    assert len(commits(hub)) == 2 and len(tried(hub, "/paths-info/")) == 2


def test_what_the_hub_never_holds_is_not_called_published(hub: HubServer, folder: Path) -> None:
    for _ in range(20):
        hub.before("POST", "/paths-info/", lambda: spoil(hub, "adapter_config.json", None))
    assert "the Hub does not hold adapter_config.json as it is here" in refused(hub, folder)


def test_the_proof_is_one_request(hub: HubServer, folder: Path) -> None:
    push(hub, folder)
    assert len(tried(hub, "/paths-info/")) == 1
    assert len(hub.requests) == 6  # create, parent, card, preupload, commit, proof


def test_large_files_are_compared_by_their_sha256(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs_suffixes = (".safetensors",)
    first = push(hub, folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert hub.large == {hashlib.sha256(weights).hexdigest(): weights}
    assert push(hub, folder) == first and len(commits(hub)) == 1
    hub.before("POST", "/paths-info/", lambda: spoil(hub, "adapter_model.safetensors", b"\0" * len(weights)))
    push(hub, folder)
    assert hub.files("model", REPO)["adapter_model.safetensors"] == weights and len(commits(hub)) == 2


def test_waiting_is_told_of_every_few_seconds_and_ends_when_told(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.deliver.hub import upload

    monkeypatch.setattr(upload, "BEAT_SECONDS", 0.1)
    hub.fail("POST", "/commit/", hang_seconds=3.0)
    beats = 0

    def idle() -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            raise KeyboardInterrupt

    begun = time.monotonic()
    settings = PublishSettings(hub_model_id=REPO)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(folder, REPO, settings, TOKEN, message="m", idle=idle, patience=QUICK)
    assert time.monotonic() - begun < 2
    for thread in threading.enumerate():
        if thread.name == "publish":
            thread.join(10)


def test_the_librarys_own_client_is_as_it_was_afterwards(hub: HubServer, folder: Path) -> None:
    from huggingface_hub.utils import get_session

    push(hub, folder)
    assert type(get_session()).__name__ == "Client" and get_session().timeout.read is None


class Listing:
    """A Hub that lists one file; `xet` as one that knows its large files by their Xet hashes."""

    def __init__(self, entry: dict[str, object]) -> None:
        self.entry = entry

    def get_paths_info(self, repo_id: str, paths: list[str], revision: str) -> list[RepoFile]:
        return [RepoFile(path=paths[0], **self.entry)]


@pytest.mark.parametrize(
    ("entry", "is_same"),
    [
        ({"size": 3, "oid": "pointer", "xetHash": "abc"}, True),
        ({"size": 4, "oid": "pointer", "xetHash": "abc"}, False),
        ({"size": 3, "oid": "pointer"}, False),
        ({"size": 3, "oid": "p", "xetHash": "x", "lfs": {"size": 3, "pointerSize": 1, "oid": "wrong"}}, False),
    ],
)
def test_a_file_that_is_listed_by_its_xet_hash_is_compared_by_its_size(
    entry: dict[str, object], is_same: bool, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with nullcontext() if is_same else pytest.raises(IncompleteError, match="does not hold a as it is here"):
        check_upload(Listing(entry), REPO, "main", {"a": tmp_path / "a"})


def test_the_merged_models_repository_can_be_made_before_training_too(hub: HubServer) -> None:
    settings = PublishSettings(hub_model_id=REPO, publish_merged=True)
    ensure_repo(settings, TOKEN, repo_id=settings.merged_target, setting="HUB_MERGED_MODEL_ID")
    assert hub.repos["model", f"{REPO}-merged"].private and ("model", REPO) not in hub.repos
    with pytest.raises(SettingsError, match="HUB_MERGED_MODEL_ID=other/x: the token may not write there"):
        ensure_repo(settings, TOKEN, repo_id="other/x", setting="HUB_MERGED_MODEL_ID")
