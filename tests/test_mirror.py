"""Checkpoints on their way to a store that is slow, away, full or wrong, while training goes on."""

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_proxy import ALWAYS, Fault
from s3_server import BUCKET, S3Server

from job.errors import JobError, MachineError, NetworkError, SettingsError
from job.keep.checkpoints import (
    STORED,
    check,
    discard,
    drop_after,
    get_folder,
    list_steps,
    local_steps,
    make_room,
    put_folder,
    restore_latest,
    seal,
    step_name,
)
from job.keep.mirror import Mirror
from job.keep.s3 import S3Store, Transfer
from job.keep.store import Store, open_store, write_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def s3(server: S3Server, tmp_path: Path) -> Iterator[S3Store]:
    yield S3Store(BUCKET, tmp_path.name, server.credentials, transfer=Transfer(num_attempts=1, timeout_seconds=0.8))
    server.proxy.clear()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "work" / "checkpoints"


def make_checkpoint(folder: Path, step: int, eval_loss: float | None = None, num_bytes: int = 100) -> None:
    """As the trainer does it: written elsewhere, sealed, renamed."""
    written = folder.parent / "trainer" / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "adapter").write_bytes(step.to_bytes(4, "big") * (num_bytes // 4))
    (written / "trainer_state.json").write_text("{}", "utf-8")
    seal(written, step, eval_loss=eval_loss)
    discard(folder / step_name(step))
    folder.mkdir(parents=True, exist_ok=True)
    written.rename(folder / step_name(step))


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def is_stored(local: Path, step: int) -> Callable[[], bool]:
    return lambda: (local / step_name(step) / STORED).exists()


def test_training_never_waits_and_a_slow_store_gets_the_newest(server: S3Server, s3: S3Store, local: Path) -> None:
    server.proxy.delay_seconds = 0.1  # a checkpoint needs half a second
    mirror = Mirror(s3, local, keep=2, warn=pytest.fail)
    waited = 0.0
    for step in range(1, 21):
        make_checkpoint(local, step)
        begun = time.monotonic()
        mirror.offer(step)
        waited += time.monotonic() - begun
        time.sleep(0.05)
    mirror.finish()
    assert waited < 0.1, "offering waited for the store"
    assert list_steps(s3)[0] == 20 and len(list_steps(s3)) == 2
    assert 2 <= len(mirror.seconds) <= 8, "those that waited were passed over for the newest"
    assert all(0.2 < seconds < 5 for seconds in mirror.seconds.values())
    assert local_steps(local)[0] == 20 and len(local_steps(local)) <= 4


def test_a_store_that_was_away_for_a_while_has_the_newest_in_the_end(server: S3Server, s3: S3Store, local: Path) -> None:
    told: list[str] = []
    mirror = Mirror(s3, local, keep=2, warn=told.append)
    make_checkpoint(local, 1)
    mirror.offer(1)
    wait_until(is_stored(local, 1))
    server.proxy.stop()
    try:
        for step in (2, 3, 4):
            make_checkpoint(local, step)
            mirror.offer(step)
            wait_until(lambda step=step: any(f"checkpoint {step} " in text for text in told))  # type: ignore[misc]
    finally:
        server.proxy.start()
    make_checkpoint(local, 5)
    mirror.offer(5)
    wait_until(is_stored(local, 5))
    mirror.finish()
    assert list_steps(s3) == [5, 1] and sum("not in the store yet" in text for text in told) == 3
    assert restore_latest(s3, local.parent / "new", pytest.fail) == local.parent / "new/step-000005"


def test_a_checkpoint_that_could_not_be_stored_is_tried_again_without_a_newer_one(
    server: S3Server, s3: S3Store, local: Path
) -> None:
    told: list[str] = []
    server.proxy.add(Fault(kind="error", code="SlowDown", method="PUT", times=2))
    mirror = Mirror(s3, local, keep=2, warn=told.append)
    make_checkpoint(local, 1)
    mirror.offer(1)
    wait_until(is_stored(local, 1))
    assert list_steps(s3) == [1]
    assert len(told) == 1, "the same trouble is told once"
    mirror.finish()


def test_a_store_that_is_away_at_the_end_is_waited_for(server: S3Server, s3: S3Store, local: Path) -> None:
    mirror = Mirror(s3, local, keep=2, warn=lambda text: None, patience_seconds=30)
    server.proxy.stop()
    make_checkpoint(local, 1)
    mirror.offer(1)
    back = threading.Timer(1.5, server.proxy.start)
    back.start()
    mirror.finish()
    back.join()
    assert list_steps(s3) == [1]


def test_a_store_that_is_down_for_good_is_a_network_error_and_the_local_copy_stays(
    server: S3Server, s3: S3Store, local: Path
) -> None:
    mirror = Mirror(s3, local, keep=1, warn=lambda text: None, patience_seconds=1)
    server.proxy.stop()
    try:
        for step in (1, 2, 3):
            make_checkpoint(local, step)
            mirror.offer(step)
        begun = time.monotonic()
        with pytest.raises(NetworkError, match="OUTPUT_URI"):
            mirror.finish()
        assert time.monotonic() - begun < 5
        with pytest.raises(NetworkError):  # asked again, it answers at once
            mirror.finish()
        assert time.monotonic() - begun < 6
    finally:
        server.proxy.start()
    assert local_steps(local) == [3, 2, 1] and check(local / "step-000003").step == 3
    again = Mirror(s3, local, keep=1, warn=pytest.fail)  # the next start has it before it does anything else
    again.finish()
    assert list_steps(s3) == [3] and local_steps(local) == [3]


@pytest.mark.parametrize(
    ("code", "error"), [("AccessDenied", SettingsError), ("RequestTimeTooSkewed", MachineError), ("SlowDown", NetworkError)]
)
def test_what_the_store_refuses_at_the_end_is_said_at_once(
    server: S3Server, s3: S3Store, local: Path, code: str, error: type[JobError]
) -> None:
    server.proxy.add(Fault(kind="error", code=code, method="PUT", times=ALWAYS))
    mirror = Mirror(s3, local, keep=1, warn=lambda text: None, patience_seconds=0.5 if error is NetworkError else 60)
    make_checkpoint(local, 1)
    mirror.offer(1)
    begun = time.monotonic()
    with pytest.raises(error):
        mirror.finish()
    assert time.monotonic() - begun < 5
    assert list_steps(s3) == [] and local_steps(local) == [1]


@pytest.mark.parametrize("kind", ["reset", "close", "truncate", "hang"])
@pytest.mark.parametrize("path", ["adapter", "manifest.json", "list-type"])
def test_any_fault_of_one_request_costs_no_checkpoint(server: S3Server, s3: S3Store, local: Path, kind: str, path: str) -> None:
    fault = Fault(kind="reset", path=path, seconds=2)
    fault.kind = kind  # type: ignore[assignment]
    server.proxy.add(fault)
    mirror = Mirror(s3, local, keep=1, warn=lambda text: None)
    for step in (1, 2):
        make_checkpoint(local, step)
        mirror.offer(step)
    mirror.finish()
    assert list_steps(s3)[0] == 2
    get_folder(s3, "checkpoints/step-000002", local.parent / "got")


class Unlucky:
    """A store whose first uploads end with errors that nobody thought of."""

    def __init__(self, store: Store, errors: list[Exception]) -> None:
        self._store, self._errors, self.uri, self.redact = store, errors, store.uri, store.redact

    def put(self, path: Path, name: str) -> None:
        if self._errors:
            raise self._errors.pop(0)
        self._store.put(path, name)

    def get(self, name: str, path: Path) -> None:
        self._store.get(name, path)

    def list(self, prefix: str = "") -> Iterator[str]:
        return self._store.list(prefix)

    def delete(self, name: str) -> None:
        self._store.delete(name)


def test_no_exception_of_an_upload_ends_the_mirror(tmp_path: Path, local: Path) -> None:
    kept = open_store(str(tmp_path / "store"))
    errors = [RuntimeError("bug"), MemoryError(), FileNotFoundError("gone"), MachineError("full"), KeyError("x")]
    unlucky = Unlucky(kept, list(errors))
    told: list[str] = []

    def warn(text: str) -> None:
        told.append(text)
        raise ValueError("the display is gone, too")

    mirror = Mirror(unlucky, local, keep=1, warn=warn)
    for step, _ in enumerate(errors, start=1):
        make_checkpoint(local, step)
        mirror.offer(step)
        wait_until(lambda step=step: len(told) == step)  # type: ignore[misc]
    make_checkpoint(local, 9)
    mirror.offer(9)
    mirror.finish()
    assert list_steps(kept) == [9] and len(told) == len(errors)


def test_an_error_that_nobody_thought_of_at_the_end_is_told_as_not_stored(tmp_path: Path, local: Path) -> None:
    unlucky = Unlucky(open_store(str(tmp_path / "store")), [RuntimeError("bug") for _ in range(9)])
    mirror = Mirror(unlucky, local, keep=1, warn=lambda text: None)
    make_checkpoint(local, 1)
    with pytest.raises(NetworkError, match=r"checkpoint 1 is not stored \(bug\)"):
        mirror.finish()


def test_what_goes_beside_a_checkpoint_comes_first_and_its_faults_cost_no_checkpoint(tmp_path: Path, local: Path) -> None:
    kept = open_store(str(tmp_path / "store"))
    seen: list[list[int]] = []
    told: list[str] = []

    def before() -> None:
        seen.append(list_steps(kept))
        if len(seen) == 2:
            raise ZeroDivisionError

    mirror = Mirror(kept, local, keep=5, warn=told.append, before=before)
    for step in (1, 2):
        make_checkpoint(local, step)
        mirror.offer(step)
        wait_until(is_stored(local, step))
    mirror.finish()
    assert seen == [[], [1]] and list_steps(kept) == [2, 1] and len(told) == 1


# What is kept.


def store_all(mirror: Mirror, local: Path, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        make_checkpoint(local, step, loss)
        mirror.offer(step)
        wait_until(is_stored(local, step))


def test_the_newest_and_the_best_are_kept_here_and_in_the_store_over_restarts(store: Store, tmp_path: Path, local: Path) -> None:
    mirror = Mirror(store, local, keep=2, warn=pytest.fail)
    store_all(mirror, local, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5})
    mirror.finish()
    assert list_steps(store) == [5, 4, 2] and local_steps(local) == [5, 4, 2]
    elsewhere = tmp_path / "another machine" / "checkpoints"
    assert restore_latest(store, elsewhere, pytest.fail) == elsewhere / "step-000005"
    mirror = Mirror(store, elsewhere, keep=2, warn=pytest.fail)
    store_all(mirror, elsewhere, {6: 1.2, 7: 4.0, 8: 5.0})
    wait_until(lambda: list_steps(store) == [8, 7, 2])
    store_all(mirror, elsewhere, {9: 0.5, 10: 0.6, 11: None})
    mirror.finish()
    assert list_steps(store) == [11, 10, 9] and local_steps(elsewhere) == [11, 10, 9]


def test_the_best_is_stored_even_when_it_was_passed_over_for_a_newer_one(server: S3Server, s3: S3Store, local: Path) -> None:
    server.proxy.delay_seconds = 0.1
    mirror = Mirror(s3, local, keep=1, warn=pytest.fail)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        make_checkpoint(local, step, loss)
        mirror.offer(step)  # 2 waits for 1, and 3 takes its place
    mirror.finish()
    assert 2 not in mirror.seconds and list_steps(s3) == [3, 2] and local_steps(local) == [3, 2]


def test_a_damaged_checkpoint_ahead_in_the_store_goes_when_the_run_has_passed_on(
    store: Store, local: Path, tmp_path: Path
) -> None:
    mirror = Mirror(store, local, keep=2, warn=pytest.fail)
    store_all(mirror, local, {10: None, 20: None})
    mirror.finish()
    write_text(store, "checkpoints/step-000020/adapter", "damaged", tmp_path)
    elsewhere = tmp_path / "another machine" / "checkpoints"
    assert restore_latest(store, elsewhere, lambda text: None) == elsewhere / "step-000010"
    mirror = Mirror(store, elsewhere, keep=2, warn=pytest.fail)
    store_all(mirror, elsewhere, {15: None})
    mirror.finish()
    assert list_steps(store) == [15, 10]
    mirror = Mirror(store, elsewhere, keep=2, warn=pytest.fail)
    store_all(mirror, elsewhere, {20: None})
    mirror.finish()
    assert restore_latest(store, tmp_path / "third", pytest.fail) == tmp_path / "third/step-000020"


def test_a_roll_back_while_the_mirror_works_is_followed(server: S3Server, s3: S3Store, local: Path) -> None:
    mirror = Mirror(s3, local, keep=3, warn=lambda text: None)
    store_all(mirror, local, {1: None, 2: None})
    server.proxy.delay_seconds = 0.2
    make_checkpoint(local, 3)
    mirror.offer(3)
    time.sleep(0.1)
    drop_after(s3, local, 1)
    server.proxy.delay_seconds = 0
    store_all(mirror, local, {2: None})
    mirror.finish()
    assert list_steps(s3) == [2, 1] and local_steps(local) == [2, 1]


def test_tidying_up_that_is_refused_does_not_make_a_stored_checkpoint_unstored(
    server: S3Server, s3: S3Store, local: Path
) -> None:
    told: list[str] = []
    mirror = Mirror(s3, local, keep=1, warn=told.append)
    store_all(mirror, local, {1: None})
    server.proxy.add(Fault(kind="error", code="AccessDenied", method="DELETE", path="step-000001", times=ALWAYS))
    make_checkpoint(local, 2)
    mirror.offer(2)
    mirror.finish()
    assert list_steps(s3) == [2, 1] and len(told) == 1


def test_room_can_be_made_from_what_the_mirror_has_stored(store: Store, local: Path) -> None:
    mirror = Mirror(store, local, keep=5, warn=pytest.fail)
    store_all(mirror, local, {1: None, 2: None, 3: None})
    mirror.finish()
    with pytest.raises(MachineError):
        make_room(local, 10**18)
    assert local_steps(local) == [3] and list_steps(store) == [3, 2, 1]


# When the machine goes away.


def test_a_deadline_gives_up_an_older_upload_for_the_newest(server: S3Server, s3: S3Store, local: Path) -> None:
    s3 = S3Store(BUCKET, local.parent.parent.name, server.credentials)  # slow is not silent here
    mirror = Mirror(s3, local, keep=3, warn=pytest.fail)
    server.proxy.bytes_per_second = 2**20
    make_checkpoint(local, 1, num_bytes=2**20)
    mirror.offer(1)
    time.sleep(0.3)
    make_checkpoint(local, 2, num_bytes=1000)
    mirror.offer(2)
    mirror.finish(10)
    assert list_steps(s3) == [2]
    assert not any("step-000001/trainer_state" in request for request in server.proxy.requests)


def test_a_deadline_is_kept_when_the_store_hangs(server: S3Server, s3: S3Store, local: Path) -> None:
    server.proxy.add(Fault(kind="hang", method="PUT", times=ALWAYS, seconds=3))
    mirror = Mirror(s3, local, keep=3, warn=lambda text: None)
    make_checkpoint(local, 1)
    mirror.offer(1)
    begun = time.monotonic()
    with pytest.raises(NetworkError):
        mirror.finish(0.5)
    assert 0.3 < time.monotonic() - begun < 1.5


def test_a_stop_that_comes_while_the_end_is_confirmed_sets_a_deadline(server: S3Server, s3: S3Store, local: Path) -> None:
    server.proxy.add(Fault(kind="hang", method="PUT", times=ALWAYS, seconds=5))
    mirror = Mirror(s3, local, keep=3, warn=lambda text: None)
    make_checkpoint(local, 1)
    stopped_at = time.monotonic() + 0.6
    with pytest.raises(NetworkError):
        mirror.finish(0.5, stopped=lambda: time.monotonic() > stopped_at)
    assert 0.4 < time.monotonic() - stopped_at < 1.5


def test_a_process_that_gave_up_ends_although_the_upload_hangs(server: S3Server, local: Path, tmp_path: Path) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from job.errors import NetworkError
        from job.keep.mirror import Mirror
        from job.keep.s3 import S3Store
        mirror = Mirror(S3Store({BUCKET!r}, {tmp_path.name!r}, {server.credentials!r}), Path(sys.argv[1]), keep=1, warn=print)
        mirror.offer(1)
        time.sleep(0.5)
        try:
            mirror.finish(0.2)
        except NetworkError:
            print(time.time())
    """
    make_checkpoint(local, 1)
    server.proxy.add(Fault(kind="hang", method="PUT", times=ALWAYS, seconds=10))
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(local)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    ended = time.time()
    server.proxy.clear()
    assert child.returncode == 0, child.stderr
    assert ended - float(child.stdout) < 2, "its threads were waited for"


def test_a_mirror_with_nothing_to_do_ends_at_once(tmp_path: Path, local: Path) -> None:
    mirror = Mirror(open_store(str(tmp_path / "store")), local, keep=1, warn=pytest.fail)
    begun = time.monotonic()
    mirror.finish()
    assert time.monotonic() - begun < 1


def test_what_an_earlier_attempt_stored_is_not_sent_again(server: S3Server, s3: S3Store, local: Path) -> None:
    mirror = Mirror(s3, local, keep=1, warn=pytest.fail)
    store_all(mirror, local, {1: None})
    mirror.finish()
    server.proxy.requests.clear()
    Mirror(s3, local, keep=1, warn=pytest.fail).finish()
    assert not any(request.startswith("PUT") for request in server.proxy.requests)
    put_folder(s3, local / "step-000001", "checkpoints/step-000001")
    s3.delete("checkpoints/step-000001/manifest.json")  # somebody took it away since
    Mirror(s3, local, keep=1, warn=pytest.fail).finish()
    assert list_steps(s3) == [1]
