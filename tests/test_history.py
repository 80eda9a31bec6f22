"""The history of many runs: every count against a known truth, whatever state the records are in."""

import ast
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from browser import Browser, find_browser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_records import HAPPENINGS, REASONS, Records, TrueRun, make_records
from s3_server import BUCKET, S3Server

from job import speeds, trained
from job.deliver.history import read as history_module
from job.deliver.history.figures import ADVICE, Figures
from job.deliver.history.outcomes import LIVE_SECONDS, Outcome
from job.deliver.history.page import render_page, web_address, write_page
from job.deliver.history.read import History, read_history, redacted, run_history
from job.deliver.history.records import AttemptFile, ReportFile, curve_speed, parse_record, plain, without_particulars
from job.deliver.history.runs import SURVIVED, Run, make_run
from job.deliver.history.show import runs_table, show_history
from job.deliver.history.words import WORDS
from job.errors import MachineError, NetworkError, SettingsError
from job.events import Stopped
from job.keep.s3 import S3Store, Transfer
from job.keep.store import FolderStore

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
NUM_RUNS = 200
SCRIPT = "<script>alert(1)</script>"


def write(records: Records, root: Path) -> FolderStore:
    for name, content in records.files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return FolderStore(root)


@pytest.fixture(scope="module")
def records() -> Records:
    return make_records(seed=11, count=NUM_RUNS)


@pytest.fixture(scope="module")
def history(records: Records, tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("history")
    return read_history(write(records, folder / "runs"), folder / "scratch")


def attempts_of(runs: Sequence[TrueRun]) -> list[tuple[str, float | None, float | None]]:
    return [one for run in runs for one in zip(run.attempts, run.seconds, run.costs, strict=True)]


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-6, abs=1e-6)


def check_runs(history: History, records: Records) -> None:
    found = {run.folder: run for run in history.runs}
    assert set(found) == {run.folder for run in records.runs}
    for true in records.runs:
        run = found[true.folder]
        assert (run.folder, str(run.outcome)) == (true.folder, true.outcome)
        assert (run.folder, [str(attempt.outcome) for attempt in run.attempts]) == (true.folder, true.attempts)
        assert [attempt.seconds for attempt in run.attempts] == [near(value) for value in true.seconds], true
        assert [attempt.cost_usd for attempt in run.attempts] == [near(value) for value in true.costs], true
        assert run.cost_usd == near(None if None in true.costs or not true.costs else sum(filter(None, true.costs))), true
        assert (run.folder, set(run.survived)) == (true.folder, true.survived)
        assert (run.model, run.data, run.eval_loss) == (true.model, [true.dataset], near(true.loss)), true
        assert run.reason == true.reason or (true.reason is None and run.outcome not in ("published", "finished")), true


def check_counts(figures: Figures, runs: Sequence[TrueRun]) -> None:
    over = [run for run in runs if run.is_over]
    finished = [run for run in over if run.is_finished]
    resumable = [run for run in over if run.outcome in ("budget", "preempted", "network", "not_published")]
    assert (figures.num_runs, figures.num_ended, figures.num_finished) == (len(runs), len(over), len(finished))
    assert figures.num_resumable == len(resumable) and figures.num_failed == len(over) - len(finished) - len(resumable)
    assert figures.num_running == sum(run.outcome == "running" for run in runs)
    assert figures.num_unreadable == sum(run.outcome == "unreadable" for run in runs)
    assert figures.finished_share == near(len(finished) / len(over))
    assert {str(name): number for name, number in figures.outcomes.items()} == Counter(run.outcome for run in runs)
    attempts = attempts_of(runs)
    ended = [end for end, _, _ in attempts if end not in ("running", "unreadable")]
    assert (figures.num_attempts, figures.num_attempts_ended) == (len(attempts), len(ended))
    assert figures.attempts_finished_share == near(ended.count("finished") / len(ended))
    assert {str(name): number for name, number in figures.attempt_outcomes.items()} == Counter(
        ending for ending, _, _ in attempts
    )
    assert figures.hours == near(sum(seconds or 0 for _, seconds, _ in attempts) / 3600)
    assert figures.cost_usd == near(sum(cost or 0 for _, _, cost in attempts))
    assert figures.num_unpriced == sum(cost is None for _, _, cost in attempts)
    assert figures.survived == Counter(what for run in finished for what in run.survived)
    assert figures.num_survived == sum(bool(run.survived) for run in finished)
    assert sum(period.num_ended for period in figures.trend) == sum(bool(run.attempts) for run in over)
    assert sum(period.num_finished for period in figures.trend) == len(finished)


def check_endings(figures: Figures, runs: Sequence[TrueRun]) -> None:
    charged: dict[str, list[tuple[float | None, float | None]]] = {}
    for run in runs:
        for end, seconds, cost in zip(run.attempts, run.seconds, run.costs, strict=True):
            what = end if run.is_finished or run.outcome == "running" else run.outcome
            charged.setdefault(what, []).append((seconds, cost))
    for done in ("finished", "published", "running"):
        charged.pop(done, None)
    endings = {str(ending.outcome): ending for ending in figures.endings}
    assert set(endings) == set(charged) | {run.outcome for run in runs if not run.is_finished and run.outcome != "running"}
    for what, parts in charged.items():
        counted = endings[what]
        assert counted.num_runs == sum(run.outcome == what for run in runs)
        assert counted.num_attempts == len(parts)
        assert counted.hours == near(sum(seconds or 0 for seconds, _ in parts) / 3600)
        assert counted.cost_usd == near(sum(cost or 0 for _, cost in parts))
        assert counted.num_unpriced == sum(cost is None for _, cost in parts)
        told = sum(run.outcome == what and run.reason is not None for run in runs)
        if told:
            assert counted.reasons[0].num_runs == told, "reasons that differ in numbers, paths and digests only are one"


def check_comparisons(figures: Figures, runs: Sequence[TrueRun]) -> None:
    alike: dict[tuple[str, str, int], list[TrueRun]] = {}
    for run in runs:
        if run.is_finished and run.loss is not None:
            alike.setdefault((run.model, run.dataset, run.settings["train"]["seed"]), []).append(run)
    groups = sorted(sorted(run.loss or 0 for run in those) for those in alike.values() if len(those) > 1)
    assert sorted([run.eval_loss for run in group.runs] for group in figures.best) == groups and groups
    for group in figures.best:
        best = min((run for run in runs if run.is_finished and run.loss == group.runs[0].eval_loss), key=lambda run: run.folder)
        assert (group.model, group.data, group.runs[0].run_id) == (best.model, [best.dataset], best.folder)
        rates = next((one for one in group.differences if one.setting == "LEARNING_RATE"), None)
        assert "PER_DEVICE_TRAIN_BATCH_SIZE" not in {one.setting for one in group.differences}, "it changes no result"
        for value in rates.values if rates else ():
            those = [
                run.loss
                for run in alike[group.model, group.data[0], _seed(group.runs[0].run_id, runs)]
                if f"{run.settings['train']['learning_rate']:g}" == f"{float(value.value):g}"
            ]
            assert (value.num_runs, value.lowest_loss) == (len(those), min(filter(None, those)))
    paces: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.gpu and run.tokens_per_second:
            paces.setdefault((run.gpu, run.model), []).append(run.tokens_per_second)
    found = {(speed.gpu, speed.model): (speed.num_runs, speed.median) for speed in figures.speeds}
    assert found == {key: (len(rates), near(median(rates))) for key, rates in paces.items()}
    ratios = [run.memory_ratio for run in runs if run.is_finished and run.memory_ratio]
    memory = next(forecast for forecast in figures.forecasts if forecast.what == "memory_bytes")
    assert (memory.num_runs, memory.median) == (len(ratios), near(median(ratios)))
    assert [forecast.what for forecast in figures.forecasts] == ["memory_bytes"], "what was never planned is left out"


def _seed(folder: str, runs: Sequence[TrueRun]) -> int:
    return next(int(run.settings["train"]["seed"]) for run in runs if run.folder == folder)


def check_unread(history: History, records: Records) -> None:
    names = {unread.name for unread in history.unread}
    assert records.unread <= names <= records.unread | records.may_be_unread


def test_the_made_up_runs_have_every_outcome_and_every_damage(records: Records) -> None:
    assert {run.outcome for run in records.runs} == {str(outcome) for outcome in Outcome}
    assert len(records.unread) > 8 and records.may_be_unread


def test_every_run_is_told_as_it_was(history: History, records: Records) -> None:
    check_runs(history, records)


def test_every_count_is_right(history: History, records: Records) -> None:
    check_counts(history.figures, records.runs)
    check_endings(history.figures, records.runs)
    check_comparisons(history.figures, records.runs)


def test_damaged_records_are_named_and_others_programs_files_are_not(history: History, records: Records) -> None:
    check_unread(history, records)


def test_the_newest_run_comes_first(history: History) -> None:
    started = [run.started for run in history.runs if run.started]
    assert started == sorted(started, reverse=True) and len(started) > 100
    assert history.runs[-1].started is None, "a run without a date is last"


def test_an_s3_store_says_the_same(server: S3Server, tmp_path: Path) -> None:
    records = make_records(seed=5, count=26)
    for name, content in records.files.items():
        server.client.put_object(Bucket=BUCKET, Key=f"team/runs/{name}", Body=content)
    history = read_history(S3Store(BUCKET, "team/runs", server.credentials), tmp_path)
    check_runs(history, records)
    check_counts(history.figures, records.runs)
    check_endings(history.figures, records.runs)
    check_unread(history, records)
    assert read_history(S3Store(BUCKET, "team/none", server.credentials), tmp_path).runs == []


def test_a_store_that_cannot_be_read_says_so_itself(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the bucket does not exist"):
        read_history(S3Store("no-such-bucket", "", server.credentials), tmp_path)
    away = Transfer(num_attempts=1, timeout_seconds=1, connect_seconds=1)
    with pytest.raises(NetworkError):
        read_history(S3Store(BUCKET, "", {**server.credentials, "endpoint_url": "http://127.0.0.1:9"}, transfer=away), tmp_path)
    with pytest.raises(SettingsError, match="there is no such folder"):
        read_history(FolderStore(tmp_path / "none"), tmp_path)


def test_a_record_that_the_disk_does_not_give_costs_no_other(tmp_path: Path) -> None:
    store = write(make_records(seed=1, count=3), tmp_path / "runs")
    report = tmp_path / "runs/run-0001/report.json"
    report.unlink()
    report.symlink_to(report)
    history = read_history(store, tmp_path / "scratch")
    assert [unread.why for unread in history.unread if "run-" in unread.name] == [
        "cannot be read (Too many levels of symbolic links)"
    ]
    assert [str(run.outcome) for run in sorted(history.runs, key=lambda run: run.folder)] == [
        "published",
        "finished",
        "not_published",
    ]


def test_a_full_disk_of_this_machine_is_not_taken_for_a_damaged_record(server: S3Server, tmp_path: Path) -> None:
    class FullDisk(S3Store):
        def get(self, name: str, path: Path) -> None:
            raise MachineError(f"WORK_DIR: cannot write {path} (No space left on device)")

    server.client.put_object(Bucket=BUCKET, Key="full/r/report.json", Body=b"{}")
    with pytest.raises(MachineError, match="No space left"):
        read_history(FullDisk(BUCKET, "full", server.credentials), tmp_path)


def test_an_empty_prefix_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    store = FolderStore(tmp_path / "runs")
    assert run_history(store, scratch=tmp_path, html=None, as_json=False, redact=str) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'runs'}\n"
    assert run_history(store, scratch=tmp_path, html=tmp_path / "h.html", as_json=True, redact=str) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == [] and "no runs here" in (tmp_path / "h.html").read_text()


def test_runs_are_found_at_any_depth_and_a_single_run_by_its_own_folder(tmp_path: Path) -> None:
    whole = Records()
    for team in ("a", "b/c"):
        part = make_records(seed=2, count=4)
        whole.files |= {f"{team}/{name}": content for name, content in part.files.items()}
    found = read_history(write(whole, tmp_path / "all"), tmp_path / "scratch").runs
    assert sorted(run.folder for run in found) == sorted(f"{team}/run-{n:04d}" for team in ("a", "b/c") for n in range(4))
    inside = tmp_path / "all/a/run-0001/notes/report.json"
    inside.parent.mkdir()
    inside.write_bytes((tmp_path / "all/a/run-0001/report.json").read_bytes())
    assert len(read_history(FolderStore(tmp_path / "all"), tmp_path / "scratch").runs) == 8, "what lies in a run is no other run"
    (one,) = read_history(FolderStore(tmp_path / "all/a/run-0001"), tmp_path / "scratch").runs
    assert (one.run_id, one.outcome) == ("run-0001", Outcome.FINISHED)


def judge(now: datetime = NOW, is_done: bool = False, report: dict[str, Any] | None = None, **attempt: Any) -> Run:
    """One run with one attempt that ended an hour before."""
    file = {"started": "2026-06-01T10:00:00Z", "ended": "2026-06-01T11:00:00Z", "price_usd_per_hour": 1.0, **attempt}
    parsed = None if report is None else ReportFile.model_validate({"attempts": [file], **report})
    attempts = {1: AttemptFile.model_validate(file)} if attempt.get("stopped", "") != "no record" else {}
    return make_run("r", report=parsed, attempts=dict(attempts), settings=None, is_done=is_done, now=now)


def test_a_run_is_running_while_it_gave_a_sign_of_life_in_the_last_three_minutes() -> None:
    last = datetime(2026, 6, 1, 11, tzinfo=UTC)
    for seconds, outcome in ((0, "running"), (LIVE_SECONDS - 1, "running"), (LIVE_SECONDS + 1, "vanished"), (-3600, "running")):
        assert judge(last + timedelta(seconds=seconds)).outcome == outcome
    assert judge(last - timedelta(days=2)).outcome == "vanished", "a clock that is days ahead is no sign of life"


def test_a_report_of_an_earlier_attempt_does_not_say_how_the_run_ended() -> None:
    told = {"stopped": "preempted", "exit_status": 75, "reason": "stopped by a signal"}
    assert judge(report=told, stopped="preempted").outcome == "preempted"
    file = AttemptFile.model_validate({"started": "2026-06-01T11:00:00Z", "ended": "2026-06-01T11:59:00Z"})
    report = ReportFile.model_validate({**told, "attempts": [{"stopped": "preempted"}]})
    both = {1: AttemptFile.model_validate({"started": NOW, "ended": NOW, "stopped": "preempted"}), 2: file}
    for now, outcome in ((NOW, "running"), (NOW + timedelta(hours=1), "vanished")):
        run = make_run("r", report=report, attempts=dict(both), settings=None, is_done=False, now=now)
        assert run.outcome == outcome and "stopped by a signal" not in (run.reason or "")


def test_what_is_trained_and_never_delivered_is_lost_and_not_finished() -> None:
    trained = {"stopped": "finished", "exit_status": 0}
    assert judge(report=trained, stopped="finished").outcome == "vanished"
    assert judge(report=trained, stopped="finished", is_done=True).outcome == "finished"
    assert judge(datetime(2026, 6, 1, 11, 1, tzinfo=UTC), report=trained, stopped="finished").outcome == "running"
    refused = {**trained, "exit_status": 6, "reason": "the Hub refuses the token"}
    assert judge(report=refused, stopped="finished").outcome == "not_published"
    assert judge(report=refused, stopped="finished", is_done=True).outcome == "not_published", "a later publish that failed"


def test_a_delivery_that_failed_is_told_although_its_report_was_never_written(tmp_path: Path) -> None:
    attempt = {
        "started": "2026-06-01T10:00:00Z",
        "ended": "2026-06-01T11:00:00Z",
        "price_usd_per_hour": 1.0,
        "stopped": "finished",
    }
    files = {"r/report.json": {"stopped": "finished", "exit_status": 0, "attempts": [attempt]}}
    files["r/attempts/0001.json"] = {**attempt, "stopped": "preempted"}
    (run,) = read_history(Held({name: json.dumps(one).encode() for name, one in files.items()}), tmp_path).runs
    assert (run.outcome, run.reason) == ("preempted", "there is no report of it")


def test_an_adapter_on_the_hub_makes_no_finished_run_of_one_that_failed_after_it() -> None:
    publication = {"url": "https://huggingface.co/o/a"}
    told = {"stopped": "finished", "exit_status": 6, "reason": "the merged model is refused", "publication": publication}
    assert judge(report=told, stopped="finished").outcome == "not_published"
    assert judge(report={**told, "exit_status": 0}, stopped="finished", is_done=True).outcome == "published"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', "[]", '"1.5 or so"'])
def test_a_loss_that_is_no_number_is_not_known(number: str) -> None:
    report, complaint = parse_record(ReportFile, f'{{"stopped": "finished", "chosen": {{"eval_loss": {number}}}}}'.encode())
    assert report is not None and report.chosen is not None and report.chosen.eval_loss is None
    assert complaint == "not as expected: eval_loss"


def test_an_adapter_that_was_published_at_the_budget_is_no_finished_run() -> None:
    told = {"stopped": "budget", "exit_status": 8, "publication": {"url": "https://huggingface.co/o/a", "step": 7}}
    run = judge(report=told, stopped="budget")
    assert (run.outcome, run.url) == ("budget", "https://huggingface.co/o/a")


def test_a_price_that_is_not_known_is_never_zero() -> None:
    run = judge(stopped="crashed", price_usd_per_hour=None)
    assert run.cost_usd is None and run.seconds == 3600
    assert judge(stopped="crashed", price_usd_per_hour=0).cost_usd == 0
    assert "?" in _shown_runs([run])


def _shown_runs(runs: list[Run]) -> str:
    console = Console(width=130, file=io.StringIO(), highlight=False)
    console.print(runs_table(runs))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_pace_leaves_out_what_lies_between_two_attempts() -> None:
    rows = [{"step": step, "num_tokens": step * 100, "seconds": step * 10.0} for step in (1, 2, 3)]
    later = [{"step": step, "num_tokens": step * 100, "seconds": 31.0 + (step - 4) * 10} for step in (4, 5)]
    assert curve_speed(rows, []) == pytest.approx(10)
    assert curve_speed(rows + later, [0, 3]) == pytest.approx(10), "the clock of a new attempt begins anew, here after more time"
    assert curve_speed(rows + later, []) == pytest.approx(400 / 31), "unless it did not"
    assert curve_speed(rows[:1], []) is None and curve_speed([1, None, {"step": "x"}], []) is None


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_reasons_of_one_kind_are_counted_together_and_those_of_two_kinds_are_not(reason: str) -> None:
    made = {without_particulars(REASONS[reason].format(number=n, hex=f"{n**9:016x}")) for n in (3, 77, 1234)}
    assert len(made) == 1
    others = {without_particulars(text.format(number=9, hex="00ff00ff")) for name, text in REASONS.items() if name != reason}
    assert not made & others


def test_reasons_that_name_other_files_are_of_one_kind() -> None:
    texts = ("row 3 of /data/mine/a.jsonl is empty", "row 77 of s3://bucket/key/b.parquet is empty", "row 5 of ~/c.csv is empty")
    assert {without_particulars(text) for text in texts} == {"row # of <path> is empty"}
    assert without_particulars("owner/name or LORA_R=16") == "owner/name or LORA_R=#", "a Hub id is no path"
    assert without_particulars("row 1, row 2, row 3, and row 9") == "row #, and row #"


def test_settings_and_words_of_other_modules_are_what_they_are_there() -> None:
    assert history_module._DONE.fullmatch(f"r/{trained.DONE}") and history_module._SPEED.fullmatch(f"{speeds.MEASURED}/k/r.json")
    strings = {
        node.value
        for node in ast.walk(
            ast.parse("\n".join((ROOT / f"job/{name}.py").read_text("utf-8") for name in ("training", "recovery", "supervise")))
        )
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for name, part in SURVIVED:
        assert any(part in text for text in strings), f"no happening of {name} has these words any more"
        assert part in HAPPENINGS[name]
    assert set(WORDS) == set(Outcome) and {str(stopped) for stopped in Stopped} <= {str(outcome) for outcome in Outcome}
    assert set(ADVICE) == {one for one in Outcome if one is not Outcome.RUNNING and not one.is_finished}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 1e308, "2026-06-01", "NaN"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(ReportFile.model_fields)) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
reports = st.dictionaries(st.sampled_from(sorted(ReportFile.model_fields)), json_values, max_size=12)
attempt_files = st.dictionaries(st.sampled_from(sorted(AttemptFile.model_fields)), json_values, max_size=8)


def as_bytes(value: Any) -> bytes:
    return re.sub(rb"\b1e\+?308\b", b"1e999", json.dumps(value, default=str).encode())


NASTY = (
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\0" * 64,
    b"\xff\xfe",
    b'{"run_id": "\\ud800"}',
    b"NaN",
    b"1e999",
    b'{"started": "9999-12-31T23:59:59-23:00", "ended": "0001-01-01T00:00:00+23:00"}',
)
hostile = st.binary(max_size=80) | st.builds(as_bytes, reports | attempt_files | json_values) | st.sampled_from(NASTY)


class Held:
    """A store that holds its files in memory."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.uri = files, "memory"
        self.redact: Callable[[str], str] = str

    def put(self, path: Path, name: str) -> None:
        self.files[name] = path.read_bytes()

    def get(self, name: str, path: Path) -> None:
        path.write_bytes(self.files[name])

    def list(self, prefix: str = "") -> Iterator[str]:
        yield from sorted(name for name in self.files if name.startswith(prefix))

    def delete(self, name: str) -> None:
        self.files.pop(name, None)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(report=hostile, attempt=hostile, second=hostile, asked=hostile, speed=hostile, is_done=st.booleans())
def test_no_bytes_in_any_record_raise(
    tmp_path: Path, report: bytes, attempt: bytes, second: bytes, asked: bytes, speed: bytes, is_done: bool
) -> None:
    files = {
        "r/report.json": report,
        "r/attempts/0001.json": attempt,
        "r/attempts/0002.json": second,
        "r/settings.json": asked,
        ".measured/k/r.json": speed,
        "s/report.json": second,
        "s/settings.json": report,
        **({"r/DONE": asked} if is_done else {}),
    }
    found = read_history(Held(files), tmp_path)
    assert found.runs
    check_outputs(found)


def check_outputs(history: History) -> None:
    """Everything that is made of it comes out whole."""
    assert json.loads(history.model_dump_json())["schema_version"] == 1
    assert all(math.isfinite(number) for number in numbers_in(history.model_dump()))
    show_history(history, Console(width=130, file=io.StringIO()))
    render_page(history).encode("utf-8")


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(one)
    elif isinstance(value, int | float):
        yield value


@given(content=st.builds(as_bytes, reports))
def test_a_field_that_is_not_as_expected_costs_no_other(content: bytes) -> None:
    whole = json.loads(content)
    whole["reason"] = "because"
    report, _ = parse_record(ReportFile, json.dumps(whole).encode())
    assert report is not None and report.reason == "because"


def hostile_history(tmp_path: Path) -> History:
    records = make_records(seed=3, count=18)
    text = json.dumps(SCRIPT + "\x1b[31m & \"quoted\" 'single'").encode()[1:-1]
    for name, content in records.files.items():
        for known in (
            b"mlabonne/FineTome-100k",
            b"Qwen/Qwen2.5-1.5B-Instruct",
            b"RTX 4090",
            b"the Hub refuses",
            b"illegal memory",
        ):
            content = content.replace(known, known + text)
        records.files[name] = content.replace(b"https://huggingface.co/o/", b"javascript:alert(1)//")
    records.files |= {f"{SCRIPT.replace('/', ' ')}/attempts/0001.json": b"{"}
    return read_history(write(records, tmp_path / "runs"), tmp_path / "scratch")


def test_texts_from_records_are_only_text_on_the_page_and_on_the_screen(tmp_path: Path) -> None:
    history = hostile_history(tmp_path)
    page = render_page(history)
    assert SCRIPT in history.model_dump_json() and "<script" not in page and "&lt;script" in page
    assert "javascript:" not in page and web_address("javascript:alert(1)") is None and web_address("https://x") == "https://x"
    assert not re.search(r"\son\w+=", page.split("</style>")[1].replace("&#34;", "")), "no handlers"
    console = Console(width=130, file=io.StringIO(), force_terminal=False)
    show_history(history, console)
    assert "\x1b" not in console.file.getvalue() and "\x1b" not in page  # type: ignore[attr-defined]


@given(st.text())
def test_a_plain_text_moves_no_cursor_and_turns_no_writing(text: str) -> None:
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain(text))
    assert plain(plain(text)) == plain(text) and len(plain(text)) <= 2001


def test_no_secret_comes_out_in_any_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = 's3cr<t>&"key\\' + "k" * 40
    records = make_records(seed=4, count=18)
    planted = json.dumps(secret).encode()[1:-1]
    for name, content in records.files.items():
        records.files[name] = content.replace(b"owner/", b"owner/" + planted).replace(b"CUDA error", planted)
    store = write(records, tmp_path / f"runs {'k' * 40}")

    def redact(text: str) -> str:
        return text.replace(secret, "***").replace("k" * 40, "***")

    for as_json in (False, True):
        run_history(store, scratch=tmp_path / "scratch", html=tmp_path / "h.html", as_json=as_json, redact=redact)
        told = capsys.readouterr()
        for text in (told.out, told.err.replace(str(tmp_path), ""), (tmp_path / "h.html").read_text("utf-8")):
            assert "kkkk" not in text and "s3cr" not in text
    assert "***" in redacted(read_history(store, tmp_path / "scratch"), redact).model_dump_json()


def test_what_is_printed_as_json_is_the_whole_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write(make_records(seed=6, count=30), tmp_path / "runs")
    run_history(store, scratch=tmp_path / "scratch", html=None, as_json=True, redact=str)
    told = History.model_validate_json(capsys.readouterr().out)
    assert told.runs == read_history(store, tmp_path / "scratch").runs and told.figures.num_runs == 30


def test_the_table_keeps_to_130_columns_without_a_terminal(records: Records, tmp_path: Path) -> None:
    store = write(records, tmp_path / "runs")
    with redirect_stdout(io.StringIO()) as out:
        run_history(store, scratch=tmp_path / "scratch", html=None, as_json=False, redact=str)
    lines = out.getvalue().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("run "))
    table = lines[first : first + 41]
    endings = lines[lines.index("what ended the others") + 1 :]
    for part in (table, endings[: endings.index("")]):
        assert all(len(line) <= 130 for line in part) and len(part) > 20
    assert len(table[0].split()) == 10
    assert f"and {len(records.runs) - 40} older ones" in out.getvalue()
    over = sum(run.is_over for run in records.runs)
    finished = sum(run.is_finished for run in records.runs)
    assert f"{over} runs ended: {finished} finished ({finished / over:.0%})" in out.getvalue()
    survivors = sum(run.is_finished and "out_of_memory" in run.survived for run in records.runs)
    assert f"{survivors} run{'s' if survivors > 1 else ''} ran out of memory and finished all the same" in out.getvalue()


def test_the_page_is_written_whole_or_not_at_all(history: History, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        write_page(history, tmp_path / "none" / "h.html")
    write_page(history, tmp_path / "h.html")
    assert [path.name for path in tmp_path.iterdir()] == ["h.html"]
    page = (tmp_path / "h.html").read_text("utf-8")
    assert page.split("All runs")[1].count("<tr><th>run-") == NUM_RUNS, "all runs are on it"
    assert (
        not re.search(r"(?:src|href)=[\"'](?!data:|https://huggingface)", page)
        and "@import" not in page
        and "<script" not in page
    )


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_the_page_fits_any_width_and_asks_for_nothing(tmp_path: Path) -> None:
    page = tmp_path / "h.html"
    write_page(hostile_history(tmp_path), page)
    with Browser() as browser:
        for width, is_dark in ((400, False), (400, True), (800, False), (1400, True)):
            browser.open(page, width=width, height=900, dark=is_dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.scripts.length") == 0
        assert browser.complaints == []
