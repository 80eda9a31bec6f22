"""What outlives the machine: one contract for both stores, folders that are whole or absent, and the ledger."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from job.errors import NetworkError, SettingsError
from job.events import Stopped
from job.keep.checkpoints import (
    DamagedError,
    check,
    delete_folder,
    get_folder,
    list_steps,
    put_folder,
    restore_latest,
    seal,
    step_name,
)
from job.keep.ledger import Ledger, cost_usd
from job.keep.mirror import Mirror, is_whole
from job.keep.store import MissingError, Store, open_store, read_text, within, write_text

KEYS = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}


@pytest.fixture(scope="module")
def s3_client() -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **KEYS)
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    client = request.getfixturevalue("s3_client")
    endpoint = client.meta.endpoint_url
    return open_store(f"s3://bucket/{tmp_path.name}", credentials={**KEYS, "endpoint_url": endpoint})


def make_folder(path: Path, step: int, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text, "utf-8")
    seal(path, step)
    return path


def test_names_that_are_listed_can_be_got(store: Store, tmp_path: Path) -> None:
    for name in ("a", "deep/er/b.json", "deep/c", "sp ace/ünï-code+=&.txt"):
        write_text(store, name, name, tmp_path)
    assert sorted(store.list()) == ["a", "deep/c", "deep/er/b.json", "sp ace/ünï-code+=&.txt"]
    assert list(store.list("deep/")) == ["deep/c", "deep/er/b.json"]
    assert list(store.list("dee")) == ["deep/c", "deep/er/b.json"]
    assert [read_text(store, name, tmp_path) for name in store.list()] == list(store.list())


def test_a_missing_name_is_missing_and_deleting_it_is_no_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        store.get("nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    store.delete("nothing")
    assert list(store.list()) == []


def test_putting_again_replaces(store: Store, tmp_path: Path) -> None:
    write_text(store, "a", "one", tmp_path)
    write_text(store, "a", "two", tmp_path)
    assert read_text(store, "a", tmp_path) == "two"
    store.delete("a")
    assert list(store.list()) == []


def test_a_folder_of_the_store_sees_only_its_own_files(store: Store, tmp_path: Path) -> None:
    write_text(within(store, "run"), "a", "inside", tmp_path)
    assert list(store.list()) == ["run/a"]
    assert list(within(store, "run").list()) == ["a"]
    assert list(within(store, "ru").list()) == []


def test_more_than_a_thousand_names_are_all_listed(s3_client: Any) -> None:
    for number in range(1005):
        s3_client.put_object(Bucket="bucket", Key=f"many/{number:04d}", Body=b"")
    store = open_store("s3://bucket/many", credentials={**KEYS, "endpoint_url": s3_client.meta.endpoint_url})
    assert len(list(store.list())) == 1005


def test_a_bucket_that_does_not_exist_is_a_wrong_setting_and_not_an_empty_store(s3_client: Any) -> None:
    store = open_store("s3://nowhere/x", credentials={**KEYS, "endpoint_url": s3_client.meta.endpoint_url})
    with pytest.raises(SettingsError, match="OUTPUT_URI=s3://nowhere/x"):
        list(store.list())


def test_a_store_that_does_not_answer_is_a_network_error(tmp_path: Path) -> None:
    store = open_store("s3://bucket/x", credentials={**KEYS, "endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(NetworkError):
        write_text(store, "a", "text", tmp_path)


def test_a_whole_folder_comes_back_the_same(store: Store, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / step_name(7), 7, a="one", b="two")
    put_folder(store, folder, "checkpoints/step-000007")
    assert list_steps(store) == [7] and is_whole(store, "checkpoints/step-000007")
    manifest = get_folder(store, "checkpoints/step-000007", tmp_path / "back")
    assert manifest.step == 7 and (tmp_path / "back/a").read_text() == "one"
    delete_folder(store, "checkpoints/step-000007")
    assert list(store.list()) == []


def test_a_folder_without_its_manifest_is_absent(store: Store, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / step_name(7), 7, a="one")
    put_folder(store, folder, "checkpoints/step-000007")
    store.delete("checkpoints/step-000007/manifest.json")
    assert list_steps(store) == [] and not is_whole(store, "checkpoints/step-000007")
    with pytest.raises(MissingError):
        get_folder(store, "checkpoints/step-000007", tmp_path / "back")
    assert restore_latest(store, tmp_path / "new machine", pytest.fail) is None


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(["a", "b", "manifest.json"]), share=st.floats(0, 1, exclude_max=True), flip=st.booleans())
def test_any_damage_to_any_file_is_seen(tmp_path_factory: pytest.TempPathFactory, name: str, share: float, flip: bool) -> None:
    folder = make_folder(tmp_path_factory.mktemp("x") / step_name(1), 1, a="some text" * 3, b="other")
    content = bytearray((folder / name).read_bytes())
    place = int(share * len(content))
    if flip and name != "manifest.json":  # a bit of the manifest's white space changes nothing
        content[place] ^= 1
    else:
        del content[place:]
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=rf"/{re.escape(name)} is"):
        check(folder)


def test_the_newest_whole_checkpoint_is_restored_and_damage_is_told(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        put_folder(
            store, make_folder(tmp_path / "old" / step_name(step), step, a=f"state {step}"), f"checkpoints/{step_name(step)}"
        )
    write_text(store, "checkpoints/step-000030/a", "damaged", tmp_path)
    told: list[str] = []
    restored = restore_latest(store, tmp_path / "new", told.append)
    assert restored == tmp_path / "new/step-000020"
    assert (restored / "a").read_text() == "state 20"
    assert len(told) == 1 and "step-000030/a" in told[0]


def test_a_local_checkpoint_that_is_newer_than_the_store_is_used(store: Store, tmp_path: Path) -> None:
    put_folder(store, make_folder(tmp_path / "old" / step_name(10), 10, a="x"), "checkpoints/step-000010")
    local = make_folder(tmp_path / "new" / step_name(12), 12, a="y")
    assert restore_latest(store, tmp_path / "new", pytest.fail) == local


class SlowStore:
    """A store whose every upload takes a while."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store, self._seconds, self.uri = store, seconds, store.uri
        self.put_names: list[str] = []

    def put(self, path: Path, name: str) -> None:
        time.sleep(self._seconds)
        self.put_names.append(name)
        self._store.put(path, name)

    def get(self, name: str, path: Path) -> None:
        self._store.get(name, path)

    def list(self, prefix: str = "") -> Iterator[str]:
        return self._store.list(prefix)

    def delete(self, name: str) -> None:
        self._store.delete(name)


def test_the_mirror_never_makes_training_wait_and_ends_with_the_newest(store: Store, tmp_path: Path) -> None:
    slow, local = SlowStore(store, 0.1), tmp_path / "local"
    mirror = Mirror(slow, local, keep=2, warn=pytest.fail)
    begun = time.monotonic()
    for step in range(1, 9):
        make_folder(local / step_name(step), step, a="x")
        mirror.offer(step)
    assert time.monotonic() - begun < 0.2 * 8, "offering waited for the store"
    mirror.finish()
    assert list_steps(store)[0] == 8 and len(list_steps(store)) <= 2
    assert len(slow.put_names) < 16, "checkpoints that waited were passed over for the newest"
    assert {path.name for path in local.iterdir()} >= {step_name(8)}


def test_a_ledger_counts_every_attempt_and_one_that_vanished_as_crashed(store: Store, tmp_path: Path) -> None:
    first = Ledger(store, tmp_path, price_usd_per_hour=3600.0)
    first.record(first_step=0)
    time.sleep(0.2)
    first.record(last_step=5)  # and then the machine is gone
    second = Ledger(store, tmp_path, price_usd_per_hour=3600.0)
    second.record(stopped=Stopped.FINISHED)
    assert [attempt.stopped for attempt in second.attempts] == [Stopped.CRASHED, Stopped.FINISHED]
    assert second.attempts[0].last_step == 5
    assert cost_usd(second.attempts) == pytest.approx(sum(attempt.seconds for attempt in second.attempts))
    assert (cost_usd(second.attempts) or 0) >= 0.2
    assert len(list(store.list("attempts/"))) == 2


def test_cost_is_unknown_as_soon_as_one_price_is(store: Store, tmp_path: Path) -> None:
    Ledger(store, tmp_path, price_usd_per_hour=None).record()
    assert cost_usd(Ledger(store, tmp_path, price_usd_per_hour=1.0).attempts) is None


def test_the_ledger_is_plain_json(store: Store, tmp_path: Path) -> None:
    Ledger(store, tmp_path, price_usd_per_hour=1.5).record(first_step=3)
    record = json.loads(read_text(store, "attempts/0001.json", tmp_path))
    assert record["first_step"] == 3 and record["price_usd_per_hour"] == 1.5 and record["stopped"] is None
