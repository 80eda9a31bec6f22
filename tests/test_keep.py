"""What outlives the machine, in short: folders that are whole or absent, and the ledger."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, S3Server, s3_server

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
from job.keep.mirror import is_whole
from job.keep.store import MissingError, Store, open_store, read_text


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    credentials = request.getfixturevalue("server").credentials
    return open_store(f"s3://{BUCKET}/{tmp_path.name}", credentials=credentials)


def make_folder(path: Path, step: int, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text, "utf-8")
    seal(path, step)
    return path


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


def test_a_local_checkpoint_that_is_newer_than_the_store_is_used(store: Store, tmp_path: Path) -> None:
    put_folder(store, make_folder(tmp_path / "old" / step_name(10), 10, a="x"), "checkpoints/step-000010")
    local = make_folder(tmp_path / "new" / step_name(12), 12, a="y")
    assert restore_latest(store, tmp_path / "new", pytest.fail) == local


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
