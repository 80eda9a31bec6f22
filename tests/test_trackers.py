"""Trackers: one curve for all attempts of a run, nothing of this machine in it, and no training that fails or waits for one."""

import json
import shutil
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trainer_child import Attempt, Training, losses_of, write_data

from job.errors import SettingsError
from job.events import Ended, Warned
from job.keep.store import FolderStore
from job.preflight.trackers import check_trackers
from job.settings import TrainSettings
from job.train.curves import STOP_SECONDS, _Line
from job.train.sinks import NOTHING, Tracked
from job.train.trackers import CREDENTIALS, KNOWN, TrackerFiles, new_tracker_id, tracker_environ

SECRET = "planted-credential"
Curve = list[tuple[int, float]]


def needs(name: str) -> Any:
    package = KNOWN[name].package
    return pytest.param(
        name, marks=pytest.mark.skipif(find_spec(KNOWN[name].module) is None, reason=f"{package} is not installed")
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model in a folder whose name is looked for."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("planted-folder") / "tiny"))


def tracked(folder: Path, model: Path, data: Path, name: str, **options: Any) -> tuple[Training, dict[str, str]]:
    """A run with one tracker, and what its trainer's environment has more."""
    trackers = folder / "trackers"
    environ = tracker_environ((name,), {"WANDB_API_KEY": SECRET}, trackers)
    train = {"eval_steps": 4, "report_to": (name,)}
    more = {
        "run_id": "r",
        "tracker_id": "r-0123",
        "trackers_dir": trackers,
        "save_steps": 4,
        "evaluate": {"eval_max_new_tokens": 1},
    }
    return Training(folder, model, data, train=train, **more, **options), {**environ, "WANDB_MODE": "offline"}


def tensorboard_curves(folder: Path) -> dict[str, Curve]:
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard" / "r"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(content: bytes) -> Iterator[bytes]:
    """What a `.wandb` file holds: LevelDB's log format behind seven bytes, in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for a header: the block's end is padding
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_curves(folder: Path) -> dict[str, Curve]:
    messages, curves = import_module("wandb.proto.wandb_internal_pb2"), dict[str, Curve]()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(content)
            row = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                curves.setdefault(name, []).append((row["train/global_step"], value))
    return curves


def trackio_curves(folder: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    connection = sqlite3.connect(folder / "trackio" / "qlora-job.db")
    runs = connection.execute("SELECT DISTINCT run_id, run_name FROM metrics").fetchall()
    assert [name for _, name in runs] == ["r-0123"], "one run for all attempts"
    for step, row in connection.execute("SELECT step, metrics FROM metrics ORDER BY id"):
        for name, value in json.loads(row).items():
            curves.setdefault(name, []).append((step, value))
    connection.close()
    return curves


READ: Mapping[str, Callable[[Path], dict[str, Curve]]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "trackio": trackio_curves,
}
LOCAL = [needs(name) for name in READ]


def assert_one_curve(name: str, training: Training, attempts: list[Attempt]) -> None:
    curves = READ[name](training.folder / "trackers")
    told = {step: values[0] for step, values in losses_of(attempts).items()}
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 15)), "each step once, in order"
    assert dict(curves["train/loss"]) == pytest.approx(told, abs=1e-4), "the Trainer's log has four digits"
    evaluations = {step: loss for one in attempts for step, loss in one.evaluations.items()}
    assert [step for step, _ in curves["eval/loss"]] == sorted(evaluations) == [0, 4, 8, 12, 14]
    assert dict(curves["eval/loss"]) == pytest.approx(evaluations, abs=1e-4)


@pytest.mark.parametrize("name", LOCAL)
def test_a_run_that_is_stopped_twice_is_one_curve_without_a_trace_of_this_machine(
    name: str, tmp_path: Path, model: Path, data: Path
) -> None:
    training, environ = tracked(tmp_path, model, data, name)
    attempts = list[Attempt]()
    for fault in ("term@3", "term-update@10"):
        attempts.append(training.start(fault=fault, environ=environ))
        status, last, output = attempts[-1].end()
        assert (status, isinstance(last, Ended)) == (75, True), output
    attempts.append(training.run(environ=environ))
    assert_one_curve(name, training, attempts)
    assert not [event for attempt in attempts for event in attempt.events if isinstance(event, Warned)]
    store = FolderStore(tmp_path / "store")
    TrackerFiles(store, tmp_path / "trackers", tmp_path / "scratch").put()
    files = {name: (store.root / name).read_bytes() for name in store.list()}
    assert len(files) == {"tensorboard": 3, "wandb": 3, "trackio": 1}[name]
    for content in files.values():
        assert not [planted for planted in (b"planted-folder", bytes(tmp_path), SECRET.encode()) if planted in content]


@pytest.mark.parametrize("name", [one for one in LOCAL if one.values != ("wandb",)])
def test_a_run_that_is_killed_is_one_curve_although_steps_are_done_again(
    name: str, tmp_path: Path, model: Path, data: Path
) -> None:
    training, environ = tracked(tmp_path, model, data, name)
    first = training.start(fault="hang@8", environ=environ)
    first.wait_for_step(7)
    time.sleep(1.0)  # trackio writes twice a second
    first.process.kill()
    assert first.end()[0] == -9 and training.steps() == [4]
    second = training.run(environ=environ)
    assert sorted(first.losses)[-1] == 7 and sorted(second.losses)[0] == 5
    assert_one_curve(name, training, [first, second])


def test_a_tracker_that_cannot_write_is_told_once_and_the_run_ends_as_usual(tmp_path: Path, model: Path, data: Path) -> None:
    pytest.importorskip("tensorboard")
    training, environ = tracked(tmp_path, model, data, "tensorboard")
    (tmp_path / "trackers").write_text("a file where the folder would be")
    attempt = training.run(environ=environ)
    warnings = [event.text for event in attempt.events if isinstance(event, Warned)]
    assert len(warnings) == 1 and warnings[0].startswith("REPORT_TO=tensorboard: gets no curve from this attempt (")
    assert sorted(attempt.losses) == list(range(1, 15))


@pytest.mark.parametrize("name", [needs("wandb"), needs("mlflow")])
def test_a_server_that_is_away_does_not_hold_up_the_training(name: str, tmp_path: Path, model: Path, data: Path) -> None:
    training, environ = tracked(tmp_path, model, data, name)
    away = "http://127.0.0.1:9"
    servers = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": away, "MLFLOW_TRACKING_URI": away}
    begun = time.monotonic()
    attempt = training.start(fault="term@6", environ={**environ, **servers})
    status, last, output = attempt.end()
    assert status == 75 and isinstance(last, Ended) and last.step == 5, output
    assert time.monotonic() - begun < 30


class Recorder:
    """A tracker that keeps rows in a list, and has a curve up to `last_step` already."""

    def __init__(self, last_step: int = NOTHING) -> None:
        self.last_step, self.steps, self.is_finished = last_step, list[tuple[int, str]](), False

    def open(self, run: Tracked) -> int:
        return self.last_step

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.steps.append((step, next(iter(row))))

    def close(self, *, is_finished: bool) -> None:
        self.is_finished = is_finished


class Hanging(Recorder):
    def open(self, run: Tracked) -> int:
        threading.Event().wait()
        return NOTHING


class Broken(Recorder):
    def log(self, row: Mapping[str, float], step: int) -> None:
        raise SystemExit(f"no {step}")


def line(sink: Recorder) -> _Line:
    run = Tracked(id="r-0123", name="r", project="p", folder=Path("nowhere"), config={}, first_step=0)
    made = _Line("wandb", sink, run)
    for step in range(1, 6):
        made.add({"loss": 1.0}, step)
        if step in (2, 4):
            made.add({"eval_loss": 1.0}, step)
    return made


def test_what_a_curve_has_already_is_not_sent_again() -> None:
    sink = Recorder(last_step=4)
    made = line(sink)
    made.end(is_finished=True)
    made.wait(10)
    assert sink.steps == [(4, "eval_loss"), (5, "loss")] and sink.is_finished and not made.told


def test_a_tracker_that_hangs_is_waited_for_only_so_long() -> None:
    made, begun = line(Hanging()), time.monotonic()
    made.end(is_finished=False)
    made.wait(0.2)
    assert time.monotonic() - begun < STOP_SECONDS and made.is_busy
    assert made.told == ["REPORT_TO=wandb: does not take the last rows in time; they are in metrics.jsonl of the run"]


def test_a_tracker_that_takes_no_row_is_told_once_and_asked_again() -> None:
    made = line(Broken())
    made.end(is_finished=True)
    made.wait(10)
    assert len(made.told) == 1 and made.told[0].startswith("REPORT_TO=wandb: did not take step 1 (SystemExit: no 1); ")


def database(path: Path, num_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE metrics (step INTEGER)")
    connection.executemany("INSERT INTO metrics VALUES (?)", [(step,) for step in range(num_rows)])
    connection.commit()
    connection.close()


def num_rows(path: Path) -> int:
    connection = sqlite3.connect(path)
    counted = int(connection.execute("SELECT COUNT(*) FROM metrics").fetchone()[0])
    connection.close()
    return counted


@pytest.mark.parametrize(("here", "in_store", "expected"), [(None, 5, 5), (3, 5, 5), (7, 5, 7), (7, None, 7)])
def test_the_longer_database_is_continued(here: int | None, in_store: int | None, expected: int, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    files = {name: TrackerFiles(store, tmp_path / name / "trackers", tmp_path / name / "scratch") for name in ("here", "there")}
    path = tmp_path / "here/trackers/trackio/p.db"
    if in_store is not None:
        database(tmp_path / "there/trackers/trackio/p.db", in_store)
        files["there"].put()
    if here is not None:
        database(path, here)
    files["here"].restore()
    assert num_rows(path) == expected
    files["here"].put()
    assert num_rows(store.root / "trackers/trackio/p.db") == expected


def test_only_what_has_changed_is_stored_again_and_never_a_log(tmp_path: Path) -> None:
    store, folder = FolderStore(tmp_path / "store"), tmp_path / "trackers"
    files = TrackerFiles(store, folder, tmp_path / "scratch")
    events, run = folder / "tensorboard/r/events.out.tfevents.1.host.2", folder / "wandb/offline-run-1-r/run-r.wandb"
    for path in (events, run, folder / "wandb/offline-run-1-r/logs/debug.log", folder / "wandb/run-2-r/run-r.wandb"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    files.put()
    stored = [f"trackers/{path.relative_to(folder)}" for path in (events, run)]
    assert list(store.list()) == stored
    (store.root / stored[0]).unlink()
    run.write_text("one and two")
    files.put()
    assert list(store.list()) == stored[1:] and (store.root / stored[1]).read_text() == "one and two"


def test_a_trainer_sees_the_credentials_of_its_own_trackers_alone() -> None:
    environ = {name: f"{SECRET} {name}" for name in CREDENTIALS}
    for name, tracker in KNOWN.items():
        added = tracker_environ((name,), environ, Path("folder"))
        assert {key for key in added if SECRET in added[key]} == set(tracker.credentials)
    assert not tracker_environ((), environ, Path("folder"))
    assert (
        tracker_environ(("mlflow",), {"MLFLOW_EXPERIMENT_ID": "3"}, Path("folder")).keys().isdisjoint({"MLFLOW_EXPERIMENT_NAME"})
    )


def test_a_tracker_id_is_no_other_runs_and_fits_wandb() -> None:
    ids = {new_tracker_id("r" * 96) for _ in range(50)}
    assert len(ids) == 50 and max(len(one) for one in ids) <= 64


def check(name: str, environ: dict[str, str], *, has_key: bool = False, **train: Any) -> str:
    return check_trackers(TrainSettings(report_to=(name,), train_args=train), environ, has_wandb_key=has_key)


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, KNOWN[name].module, None)
    with pytest.raises(SettingsError) as caught:
        check(name, {"MLFLOW_TRACKING_URI": "http://localhost"}, has_key=True)
    package = KNOWN[name].package
    assert str(caught.value).startswith(f"REPORT_TO={name}: the package {package} is not installed; `pip install ")


@pytest.mark.parametrize(
    ("name", "environ", "told"),
    [
        ("wandb", {}, "WANDB_API_KEY: is required by REPORT_TO=wandb; "),
        ("trackio", {"TRACKIO_SPACE_ID": "me/curves"}, "TRACKIO_SPACE_ID=me/curves: the trainer has no token"),
        ("trackio", {"TRACKIO_SERVER_URL": "https://example.com"}, "TRACKIO_WRITE_TOKEN: is required to write to"),
        ("mlflow", {}, "MLFLOW_TRACKING_URI: REPORT_TO=mlflow needs a tracking server"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, "MLFLOW_TRACKING_URI=sqlite:///mlflow.db: "),
    ],
)
def test_a_tracker_that_could_not_be_written_to_is_refused(
    name: str, environ: dict[str, str], told: str, everything_installed: None
) -> None:
    with pytest.raises(SettingsError) as caught:
        check(name, environ)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("wandb", {"WANDB_MODE": "offline"}),
        ("trackio", {}),
        ("trackio", {"TRACKIO_SERVER_URL": "https://example.com/?write_token=t"}),
        ("mlflow", {"MLFLOW_TRACKING_URI": "databricks"}),
        ("tensorboard", {}),
    ],
)
def test_a_tracker_that_can_be_written_to_passes(name: str, environ: dict[str, str], everything_installed: None) -> None:
    assert check(name, environ) == name


def test_what_trackers_do_not_get_is_said(everything_installed: None) -> None:
    found = check("wandb", {"WANDB_LOG_MODEL": "end", "WANDB_WATCH": "false"}, has_key=True)
    assert found.startswith("warning: WANDB_LOG_MODEL: trackers get curves only")


@pytest.fixture
def everything_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that are only looked for and not imported."""
    for tracker in KNOWN.values():
        if find_spec(tracker.module) is None:
            (tmp_path / "packages" / tracker.module).mkdir(parents=True)
            (tmp_path / "packages" / tracker.module / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
