"""Folders that are whole or absent: damage of every kind, what is kept, room on the disk, and how often to save."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fault_proxy import ALWAYS, Fault
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, S3Server

from job.errors import MachineError, NetworkError, SettingsError
from job.events import Stopped
from job.keep.checkpoints import (
    MANIFEST,
    STORED,
    DamagedError,
    best_step,
    check,
    drop_after,
    get_folder,
    list_steps,
    local_losses,
    local_steps,
    make_room,
    put_folder,
    restore_latest,
    seal,
    step_name,
    store_losses,
    surplus_steps,
)
from job.keep.interval import (
    DEFAULT_MEAN_SECONDS_BETWEEN_FAILURES,
    mean_seconds_between_failures,
    save_interval_seconds,
)
from job.keep.ledger import Attempt, Ledger, cost_usd, least_cost_usd, read_attempts
from job.keep.manifest import Manifest, parse_manifest
from job.keep.s3 import S3Store, Transfer
from job.keep.store import MissingError, Store, open_store, read_json_lines, write_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def s3(server: S3Server, tmp_path: Path) -> Iterator[S3Store]:
    quick = Transfer(num_attempts=1, timeout_seconds=1)
    yield S3Store(BUCKET, tmp_path.name, server.credentials, transfer=quick)
    server.proxy.clear()


def make_checkpoint(folder: Path, step: int, *, eval_loss: float | None = None, num_bytes: int = 0) -> Path:
    """With a file in a folder of its own, and one of `num_bytes` that take up disk."""
    path = folder / step_name(step)
    (path / "deep").mkdir(parents=True)
    (path / "adapter").write_text(f"state {step}", "utf-8")
    (path / "deep" / "optimizer").write_text(f"moments {step}", "utf-8")
    if num_bytes:
        (path / "large").write_bytes(os.urandom(num_bytes))
    seal(path, step, eval_loss=eval_loss)
    return path


def put_checkpoint(store: Store, folder: Path, step: int, *, eval_loss: float | None = None) -> None:
    put_folder(store, make_checkpoint(folder, step, eval_loss=eval_loss), f"checkpoints/{step_name(step)}")


# Damage.


def hostile(**changes: object) -> str:
    entry = {"num_bytes": 8, "sha256": hashlib.sha256(b"state 30").hexdigest()}
    return json.dumps({"step": 30, "files": {"adapter": entry}, **changes})


ENTRY = {"num_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "adapter truncated": lambda content: content[:-1],
    "adapter emptied": lambda content: b"",
    "adapter with a flipped bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "adapter deleted": lambda content: None,
    "deep/optimizer deleted": lambda content: None,
    "manifest.json truncated": lambda content: content[: len(content) // 2],
    "manifest.json emptied": lambda content: b"",
    "manifest.json garbled": lambda content: b"\xff\xfe\x00{",
    "manifest.json as a list": lambda content: b"[]",
    "manifest.json of another step": lambda content: content.replace(b'"step": 30', b'"step": 29'),
    "manifest.json with a name above": lambda content: hostile(files={"../x": ENTRY}).encode(),
    "manifest.json with a name above, later": lambda content: hostile(files={"a/../../x": ENTRY}).encode(),
    "manifest.json with an absolute name": lambda content: hostile(files={"/tmp/x": ENTRY}).encode(),
    "manifest.json with an empty name": lambda content: hostile(files={"": ENTRY}).encode(),
    "manifest.json with its own name": lambda content: hostile(files={"manifest.json": ENTRY}).encode(),
    "manifest.json with a name that is too long": lambda content: hostile(files={"x" * 300: ENTRY}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_in_the_store_is_skipped_for_the_one_before_it(store: Store, tmp_path: Path, damage: str) -> None:
    for step in (10, 20, 30):
        put_checkpoint(store, tmp_path / "old", step)
    name = f"checkpoints/step-000030/{damage.split()[0]}"
    store.get(name, tmp_path / "content")
    content = DAMAGES[damage]((tmp_path / "content").read_bytes())
    store.delete(name)
    if content is not None:
        (tmp_path / "content").write_bytes(content)
        store.put(tmp_path / "content", name)
    before = sorted(path for path in tmp_path.rglob("*") if "new" not in path.parts)
    told: list[str] = []
    restored = restore_latest(store, tmp_path / "new/checkpoints", told.append)
    assert restored == tmp_path / "new/checkpoints/step-000020"
    assert (restored / "deep/optimizer").read_text() == "moments 20"
    assert len(told) == 1 and re.search(r"step 30 is skipped: .*step-000030/", told[0])
    if content is None or "manifest" in damage or "adapter" in damage:
        assert damage.split()[0] in told[0]
    assert local_steps(tmp_path / "new/checkpoints") == [20]
    assert sorted(path for path in tmp_path.rglob("*") if "new" not in path.parts) == before, "a name left the folder"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"checkpoints"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_local_checkpoint_is_taken_from_the_store_instead(store: Store, tmp_path: Path, damage: str) -> None:
    put_checkpoint(store, tmp_path / "local", 20)
    put_checkpoint(store, tmp_path / "local", 30)
    path = tmp_path / "local/step-000030" / damage.split()[0]
    content = DAMAGES[damage](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    told: list[str] = []
    restored = restore_latest(store, tmp_path / "local", told.append)
    assert restored == tmp_path / "local/step-000030" and (restored / "adapter").read_text() == "state 30"
    assert check(restored).step == 30
    assert len(told) == 1 and "on this disk" in told[0]


def test_a_damaged_local_checkpoint_that_is_nowhere_else_does_not_stay_the_newest(store: Store, tmp_path: Path) -> None:
    put_checkpoint(store, tmp_path / "local", 20)
    (make_checkpoint(tmp_path / "local", 30) / "adapter").write_text("damaged", "utf-8")
    told: list[str] = []
    assert restore_latest(store, tmp_path / "local", told.append) == tmp_path / "local/step-000020"
    assert local_steps(tmp_path / "local") == [20] and len(told) == 1


@pytest.mark.parametrize("what", ["file", "manifest"])
def test_a_folder_in_the_place_of_a_file_is_damage(tmp_path: Path, what: str) -> None:
    path = make_checkpoint(tmp_path, 10)
    replaced = path / ("adapter" if what == "file" else MANIFEST)
    replaced.unlink()
    replaced.mkdir()
    with pytest.raises(DamagedError, match=replaced.name):
        check(path)
    assert restore_latest(open_store(str(tmp_path / "store")), tmp_path, lambda text: None) is None


def test_names_that_exclude_each_other_are_damage(store: Store, tmp_path: Path) -> None:
    write_text(store, "x/a", "", tmp_path)
    manifest = {"step": 1, "files": {"a": ENTRY, "a/b": ENTRY}}
    write_text(store, "x/manifest.json", json.dumps(manifest), tmp_path)
    with pytest.raises(DamagedError):
        get_folder(store, "x", tmp_path / "got")
    assert not (tmp_path / "got").exists()


NAME = st.lists(st.sampled_from(["a", "..", ".", "", "/", "b c", "\0", "manifest.json", "~", "\\", "%2e%2e"]), max_size=5)


@given(name=NAME.map("/".join) | st.text(max_size=20))
def test_no_name_in_a_manifest_leaves_its_folder(name: str) -> None:
    text = json.dumps({"step": 1, "files": {name: ENTRY}}).encode()
    try:
        manifest = parse_manifest(text, "x")
    except DamagedError:
        return
    folder = Path("/somewhere/folder")
    (only,) = manifest.files
    inside = os.path.normpath(folder / only)
    assert inside.startswith(f"{folder}/") and inside == str(folder / only) and only != MANIFEST


def test_checkpoints_with_strange_names_are_none(store: Store, tmp_path: Path) -> None:
    for name in ("step-abc", "step-10", "step-0000010", "step-", "step-٠٠٠٠١٠", "step--00010", "stop-000010"):
        write_text(store, f"checkpoints/{name}/manifest.json", "{}", tmp_path)
        (tmp_path / "local" / name).mkdir(parents=True)
        (tmp_path / "local" / name / MANIFEST).write_text("{}", "utf-8")
    write_text(store, "checkpoints/step-000010/deep/manifest.json", "{}", tmp_path)
    assert list_steps(store) == [] and local_steps(tmp_path / "local") == []
    assert restore_latest(store, tmp_path / "local", pytest.fail) is None


def test_an_older_manifest_and_a_newer_one_are_both_read() -> None:
    old = parse_manifest(b'{"step": 3, "files": {}}', "x")
    new = parse_manifest(b'{"step": 3, "files": {}, "eval_loss": 1.5, "from_the_future": {"a": [1]}}', "x")
    assert old == Manifest(step=3, files={}) and new.eval_loss == 1.5


@pytest.mark.parametrize("kind", ["error", "truncate"])
def test_a_store_that_fails_while_a_checkpoint_is_fetched_is_no_damage_and_leaves_no_half(
    server: S3Server, s3: S3Store, tmp_path: Path, kind: str
) -> None:
    put_checkpoint(s3, tmp_path / "old", 10)
    put_checkpoint(s3, tmp_path / "old", 20)
    fault = Fault(kind="error", code="AccessDenied") if kind == "error" else Fault(kind="truncate")
    fault.times, fault.method, fault.path = ALWAYS, "GET", "deep/optimizer"
    server.proxy.add(fault)
    with pytest.raises(SettingsError if kind == "error" else NetworkError):
        restore_latest(s3, tmp_path / "new", pytest.fail)
    assert local_steps(tmp_path / "new") == [] and not list((tmp_path / "new").glob("step-*"))
    server.proxy.clear()
    assert restore_latest(s3, tmp_path / "new", pytest.fail) == tmp_path / "new/step-000020"


class StopError(Exception):
    pass


@pytest.mark.parametrize("files_before", [0, 1, 2])
def test_a_stop_between_files_leaves_no_whole_folder_on_either_side(store: Store, tmp_path: Path, files_before: int) -> None:
    def stop_after(count: int) -> Callable[[], None]:
        left = iter(range(count))

        def between() -> None:
            if next(left, None) is None:
                raise StopError

        return between

    folder = make_checkpoint(tmp_path / "old", 10)
    with pytest.raises(StopError):
        put_folder(store, folder, "checkpoints/step-000010", between=stop_after(files_before))
    assert list_steps(store) == []
    put_folder(store, folder, "checkpoints/step-000010")
    if files_before < 2:
        with pytest.raises(StopError):
            restore_latest(store, tmp_path / "new", pytest.fail, between=stop_after(files_before))
        assert not list((tmp_path / "new").glob("step-*"))
    with pytest.raises(StopError):  # writing over a whole one: it is not whole in the meantime
        put_folder(store, folder, "checkpoints/step-000010", between=stop_after(files_before))
    assert list_steps(store) == []


def test_a_checkpoint_killed_at_any_moment_of_its_upload_is_whole_or_absent(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from job.keep.checkpoints import put_folder
        from job.keep.store import open_store
        store = open_store(sys.argv[1])
        print("go", flush=True)
        for count in range(10000):
            put_folder(store, Path(sys.argv[2]), "checkpoints/step-000010")
    """
    folder = make_checkpoint(tmp_path / "old", 10, num_bytes=2**20)
    for number in range(6):
        uri = str(tmp_path / f"store-{number % 3}")
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), uri, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "go\n"
        time.sleep(0.013 * (number + 1))
        child.kill()
        child.communicate()
        restored = restore_latest(open_store(uri), tmp_path / f"new-{number}", pytest.fail)
        assert restored is None or check(restored).step == 10


# What is kept.


def test_at_most_limits_how_new_a_checkpoint_may_be(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        put_checkpoint(store, tmp_path / "old", step)
    assert restore_latest(store, tmp_path / "new", pytest.fail, at_most=29) == tmp_path / "new/step-000020"
    assert restore_latest(store, tmp_path / "new", pytest.fail, at_most=5) is None


def test_a_roll_back_drops_what_is_newer_here_and_in_the_store(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        put_checkpoint(store, tmp_path / "local", step)
    make_checkpoint(tmp_path / "local", 40)
    drop_after(store, tmp_path / "local", 20)
    assert list_steps(store) == [20, 10] and local_steps(tmp_path / "local") == [20, 10]
    assert not any("step-000030" in name for name in store.list())


def test_the_loss_of_each_checkpoint_is_read_from_its_manifest(store: Store, tmp_path: Path) -> None:
    losses = {10: 2.5, 20: None, 30: math.nan, 40: 1.5}
    for step, loss in losses.items():
        put_checkpoint(store, tmp_path / "local", step, eval_loss=loss)
    write_text(store, "checkpoints/step-000050/manifest.json", "garbled", tmp_path)
    found = {40: 1.5, 30: None, 20: None, 10: 2.5}
    assert list(local_losses(tmp_path / "local").items()) == list(found.items())
    assert list(store_losses(store, tmp_path / "scratch").items()) == [(50, None), *found.items()]
    assert best_step(found) == 40 and best_step({1: None}) is None and best_step({}) is None
    assert best_step({1: 0.5, 2: 0.5}) == 1


@given(losses=st.dictionaries(st.integers(0, 10**6), st.none() | st.floats(0, 10), max_size=12), keep=st.integers(1, 5))
def test_the_newest_and_the_best_are_never_surplus_and_nothing_else_is_left(losses: dict[int, float | None], keep: int) -> None:
    surplus = surplus_steps(losses, keep)
    left = sorted(losses.keys() - set(surplus), reverse=True)
    assert left[:keep] == sorted(losses, reverse=True)[:keep] and len(left) <= keep + 1
    assert best_step(losses) is None or best_step(losses) in left
    assert len(left) <= keep or left[-1] == best_step(losses)


# Room on the disk.


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a disk of 64 MB, or of this machine's own memory."""
    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / f"test-checkpoints-{os.getpid()}"
    path.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(path)], capture_output=True, check=False
    ).returncode
    yield path
    if mounted:
        subprocess.run(["umount", str(path)], check=True)
    shutil.rmtree(path)


MB = 2**20


def test_room_is_made_from_the_oldest_copies_that_are_stored_and_no_further(disk: Path) -> None:
    for step in (10, 20, 30, 40):
        path = make_checkpoint(disk, step, num_bytes=8 * MB)
        if step != 20:
            (path / STORED).touch()
    (disk / "step-000005").mkdir()  # what a kill left of a deletion
    free = shutil.disk_usage(disk).free
    make_room(disk, free // 2)
    assert local_steps(disk) == [40, 30, 20, 10]
    make_room(disk, free + 4 * MB)
    assert local_steps(disk) == [40, 30, 20] and not (disk / "step-000005").exists()
    make_room(disk, free + 12 * MB)
    assert local_steps(disk) == [40, 20], "the one that is nowhere else stays"
    with pytest.raises(MachineError, match=r"WORK_DIR=.* GB free, a checkpoint needs"):
        make_room(disk, free + 40 * MB)
    assert local_steps(disk) == [40, 20], "the newest stays, stored or not"


def test_room_in_a_folder_that_is_not_there_yet_is_what_the_disk_has(tmp_path: Path) -> None:
    make_room(tmp_path / "new", 1)
    with pytest.raises(MachineError):
        make_room(tmp_path / "new", 10**18)


def test_a_checkpoint_from_the_store_is_known_to_be_stored(store: Store, tmp_path: Path) -> None:
    put_checkpoint(store, tmp_path / "old", 10)
    restored = restore_latest(store, tmp_path / "new", pytest.fail)
    assert restored is not None and (restored / STORED).exists()
    seal(restored, 10)
    assert STORED not in check(restored).files


# How often.


@pytest.mark.parametrize(
    ("cost", "mean", "interval"),
    [(5.0, 3600.0, 189.7), (0.0, 3600.0, 60.0), (0.01, 3600.0, 60.0), (100.0, 10**6, 1800.0), (1.0, math.inf, 1800.0)],
)
def test_the_interval_weighs_a_save_against_a_failure(cost: float, mean: float, interval: float) -> None:
    assert save_interval_seconds(cost, mean) == pytest.approx(interval, abs=0.1)


@settings(max_examples=30)
@given(cost=st.floats(0.5, 60), mean=st.floats(1800, 10**5))
def test_no_other_interval_loses_less(cost: float, mean: float) -> None:
    best = save_interval_seconds(cost, mean)

    def lost_share(interval: float) -> float:
        return cost / interval + interval / 2 / mean

    if 60 < best < 1800:
        assert lost_share(best) <= min(lost_share(best * factor) for factor in (0.5, 0.9, 1.1, 2))


def attempt(seconds: float, stopped: Stopped | None, **more: object) -> Attempt:
    started = datetime(2026, 1, 1, tzinfo=UTC)
    values = {"started": started, "ended": started + timedelta(seconds=seconds), "machine": "m", "price_usd_per_hour": 1.0}
    return Attempt.model_validate({**values, "stopped": stopped, **more})


def test_the_mean_between_failures_comes_from_the_history_and_one_default_failure() -> None:
    default = DEFAULT_MEAN_SECONDS_BETWEEN_FAILURES
    assert mean_seconds_between_failures([]) is None
    assert mean_seconds_between_failures([attempt(0, None)]) is None
    assert mean_seconds_between_failures([attempt(600, None)]) == default + 600, "a run without failures has none"
    assert mean_seconds_between_failures([attempt(60, Stopped.CRASHED)]) == (default + 60) / 2, "one does not set the pace"
    often = [attempt(900, Stopped.PREEMPTED) for _ in range(200)]
    assert mean_seconds_between_failures(often) == pytest.approx(900, rel=0.2)
    ours = [attempt(900, Stopped.OUT_OF_MEMORY), attempt(900, Stopped.FINISHED), attempt(900, Stopped.DIVERGED)]
    assert mean_seconds_between_failures(ours) == default + 2700, "what the machine is not to blame for is no failure of it"
    assert mean_seconds_between_failures([*often, attempt(0, Stopped.CRASHED, is_unreadable=True)]) == pytest.approx(
        mean_seconds_between_failures(often)
    )


# The ledger.


def test_a_record_that_cannot_be_read_stops_nothing_and_makes_the_cost_unknown(store: Store, tmp_path: Path) -> None:
    for count in range(4):
        Ledger(store, tmp_path, price_usd_per_hour=3600.0).record(last_step=count, stopped=Stopped.PREEMPTED)
    whole = cost_usd(read_attempts(store, tmp_path))
    store.get("attempts/0002.json", tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    for damaged in (content[:40], b"", b"\xff\x00", b"[]", b'{"started": "yesterday"}'):
        (tmp_path / "x").write_bytes(damaged)
        store.put(tmp_path / "x", "attempts/0002.json")
        found = read_attempts(store, tmp_path)
        assert [item.last_step for item in found] == [0, None, 2, 3]
        assert [item.is_unreadable for item in found] == [False, True, False, False]
        assert cost_usd(found) is None and whole is not None and 0 < least_cost_usd(found) < whole
    (tmp_path / "x").write_bytes(b"?")
    store.put(tmp_path / "x", "attempts/0004.json")
    write_text(store, "attempts/notes.txt", "not ours", tmp_path)
    Ledger(store, tmp_path, price_usd_per_hour=1.0).record(first_step=3)
    assert sorted(store.list("attempts/"))[-2:] == ["attempts/0005.json", "attempts/notes.txt"]
    assert len(read_attempts(store, tmp_path)) == 5


def test_a_number_that_is_missing_in_between_is_not_given_again(store: Store, tmp_path: Path) -> None:
    for _ in range(3):
        Ledger(store, tmp_path, price_usd_per_hour=1.0).record()
    store.delete("attempts/0002.json")
    Ledger(store, tmp_path, price_usd_per_hour=1.0).record()
    assert sorted(store.list()) == ["attempts/0001.json", "attempts/0003.json", "attempts/0004.json"]


def test_what_was_learned_last_is_what_counts(store: Store, tmp_path: Path) -> None:
    first = Ledger(store, tmp_path, price_usd_per_hour=1.0)
    assert first.learned("micro_batch") is None
    first.note("micro_batch", 8)
    first.note("offload", {"activations": True})
    first.note("micro_batch", 4)
    second = Ledger(store, tmp_path, price_usd_per_hour=1.0)
    second.record()
    third = Ledger(store, tmp_path, price_usd_per_hour=1.0)
    assert third.learned("micro_batch") == 4 and third.learned("offload") == {"activations": True}
    third.note("micro_batch", None)
    assert third.learned("micro_batch") is None and third.current.notes == {"micro_batch": None}


def test_a_record_of_a_later_version_is_read(store: Store, tmp_path: Path) -> None:
    record = json.loads(attempt(60, Stopped.CRASHED).model_dump_json())
    write_text(store, "attempts/0001.json", json.dumps({**record, "stopped": "teleported", "gpus": [1, 2]}), tmp_path)
    (found,) = read_attempts(store, tmp_path)
    assert found.stopped is Stopped.CRASHED and found.seconds == 60 and not found.is_unreadable


def test_a_clock_that_was_set_back_costs_nothing_instead_of_earning_money() -> None:
    assert attempt(-100, Stopped.CRASHED).seconds == 0 and cost_usd([attempt(-100, Stopped.CRASHED)]) == 0


def test_the_record_of_a_machine_that_vanished_is_no_older_than_the_beat(store: Store, server: S3Server, tmp_path: Path) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from job.keep.ledger import Ledger
        from job.keep.s3 import S3Store
        from job.keep.store import open_store
        keys = {server.credentials!r}
        uri = sys.argv[1]
        store = S3Store(*uri.removeprefix("s3://").split("/"), keys) if uri.startswith("s3://") else open_store(uri)
        ledger = Ledger(store, Path(sys.argv[2]), price_usd_per_hour=1.0)
        ledger.record(first_step=0)
        print("go", flush=True)
        step = 0
        while True:
            step += 1
            ledger.beat(0.2, step)
            time.sleep(0.02)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), store.uri, str(tmp_path / "scratch")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "go\n"
    time.sleep(1.2)
    child.kill()
    killed = datetime.now(UTC)
    child.communicate()
    (found,) = read_attempts(store, tmp_path)
    assert found.stopped is Stopped.CRASHED and (found.last_step or 0) > 5
    assert 0 <= (killed - found.ended).total_seconds() < 0.8


def test_a_beat_never_waits_for_a_store_that_is_slow_or_away(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    ledger = Ledger(s3, tmp_path, price_usd_per_hour=1.0)
    ledger.record(first_step=0)
    server.proxy.delay_seconds = 0.5
    begun = time.monotonic()
    for step in range(20):
        ledger.beat(0.0, step)
    server.proxy.stop()
    try:
        for step in range(20, 40):
            ledger.beat(0.0, step)
        assert time.monotonic() - begun < 0.6  # and most of that is the proxy's end
        ledger.note("micro_batch", 2)  # in the middle of a run: the next beat tries again
        with pytest.raises(NetworkError):
            ledger.record(stopped=Stopped.FINISHED)
    finally:
        server.proxy.start()
    server.proxy.delay_seconds = 0
    ledger.record(stopped=Stopped.FINISHED)
    (found,) = read_attempts(s3, tmp_path)
    assert found.last_step == 39 and found.notes == {"micro_batch": 2} and found.stopped is Stopped.FINISHED


def test_a_store_that_does_not_answer_at_the_start_is_told_at_the_start(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    ledger = Ledger(s3, tmp_path, price_usd_per_hour=1.0)
    server.proxy.stop()
    try:
        with pytest.raises(NetworkError):
            ledger.record()
    finally:
        server.proxy.start()


def test_lines_that_cannot_be_read_are_counted_and_the_others_kept(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'{"step": 1}\n{"st\n\xff\xff\n[1]\n{"step": 2}\n{"step": 3')
    store.put(tmp_path / "x", "metrics.jsonl")
    assert read_json_lines(store, "metrics.jsonl", tmp_path) == ([{"step": 1}, {"step": 2}], 4)
    with pytest.raises(MissingError):
        read_json_lines(store, "nothing", tmp_path)
