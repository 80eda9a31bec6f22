"""The checks before a run, one by one: what each finds, what it refuses, what it asks and what it leaves alone."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Job, small_run
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st

from job.data import peek
from job.data.peek import glimpse
from job.errors import DataError, JobError, MachineError, NetworkError, PlanError, SettingsError
from job.events import Need
from job.keep.store import open_store
from job.plan.hardware import Device
from job.preflight import Result, check_everything, raise_first, results_table, summary
from job.preflight.clock import Clock, check_clock
from job.preflight.gpus import check_gpus
from job.preflight.keeping import check_volume, is_container
from job.preflight.outcome import Found, judge, start
from job.preflight.room import check_room, checkpoint_needs, existing_parent
from job.settings import DatasetSpec, ModelSettings, Settings, read_settings
from job.stopping import StopRequest

TOKEN = "hf_plantedtoken0123456789"


# Results and whose fault comes first.


ERRORS: tuple[JobError, ...] = (
    SettingsError(["A=1: wrong; mend it"]),
    SettingsError(["B=1: wrong; mend it"]),
    DataError("data; mend it"),
    PlanError("plan; mend it"),
    MachineError("machine; mend it"),
    NetworkError("network; mend it"),
)


@given(st.lists(st.sampled_from(ERRORS), min_size=1))
def test_the_settings_are_blamed_first_all_together_and_the_network_last(errors: list[JobError]) -> None:
    results = [Result(name=str(number), error=error) for number, error in enumerate(errors)]
    with pytest.raises(JobError) as raised:
        raise_first([Result(name="passed", found="fine"), *results])
    assert raised.value.exit_status == min(error.exit_status for error in errors)
    settings = {problem for error in errors if isinstance(error, SettingsError) for problem in error.problems}
    if settings:
        assert isinstance(raised.value, SettingsError) and set(raised.value.problems) == settings
        assert len(raised.value.problems) == len(settings), "nothing is told twice"
    told = str(raised.value) + "\n".join(summary(results))
    assert all(str(error) in told for error in errors)


def test_a_run_says_one_line_when_all_is_fine_and_warnings_beside_it() -> None:
    lines = summary([Result(name="a", found="1"), Result(name="b", found="warning: old driver")])
    assert lines == ["warning: old driver", "all 2 checks passed: a, b"]


def test_the_table_shows_what_is_wrong_and_what_to_do_without_a_secret() -> None:
    from rich.console import Console

    results = [
        Result(name="store", found="writes"),
        Result(name="GPU", found="warning: old"),
        Result(name="data", error=DataError("DATASETS=x?sig=hush: gone; look there\nDATASETS=y: odd; mend it")),
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table(results, lambda text: text.replace("hush", "***")))
    text = console.export_text()
    assert "fine: writes" in text and "warning: old" in text and "sig=***" in text and "hush" not in text
    line = next(line for line in text.splitlines() if "failed" in line)
    assert "look there" in line and "mend it" in text


def test_checks_run_at_the_same_time_and_a_late_one_is_the_networks_fault() -> None:
    barrier, never = threading.Barrier(2, timeout=10), threading.Event()

    def meet() -> str:
        barrier.wait()
        return "met"

    begun = time.monotonic()
    results = start({"one": meet, "two": meet, "late": lambda: str(never.wait())})(1.0)
    assert [result.found for result in results[:2]] == ["met", "met"]
    assert isinstance(results[2].error, NetworkError) and time.monotonic() - begun < 5


def test_a_bug_in_a_check_is_no_refusal() -> None:
    def bug() -> str:
        raise KeyError("x")

    with pytest.raises(KeyError):
        start({"bug": bug})(None)
    assert judge("found", lambda: Found(text="3")).found == "3"


# The clock.


@pytest.mark.parametrize(("ahead", "is_wrong"), [(0.0, False), (-299.0, False), (301.0, True), (-4000.0, True)])
def test_a_clock_may_be_five_minutes_off(ahead: float, is_wrong: bool) -> None:
    if not is_wrong:
        assert "within" in check_clock(ahead)
        return
    with pytest.raises(MachineError, match=f"{abs(ahead):,.0f} seconds {'behind' if ahead > 0 else 'ahead'}"):
        check_clock(ahead)


def test_the_largest_difference_of_the_dates_counts_and_nonsense_does_not() -> None:
    clock = Clock()
    for date in (None, "", "yesterday", "Thu, 01 Jan 1970 00:00:00"):
        clock.read(date)
    assert clock.ahead_seconds is None
    clock.note(3.0)
    clock.note(-8.0)
    clock.note(5.0)
    assert clock.ahead_seconds == -8.0


# Volumes.

OVERLAY = "1 0 0:30 / / rw - overlay overlay rw\n2 1 0:40 / /proc rw - proc proc rw\n"
MOUNTED = OVERLAY + "3 1 8:1 /x /workspace rw - ext4 /dev/sda rw\n4 1 8:1 /x /my\\040disk rw - ext4 /dev/sda rw\n"


@pytest.mark.parametrize(
    ("folder", "mounts", "environ", "in_container", "is_refused"),
    [
        ("/workspace/runs/r", OVERLAY, {}, True, True),
        ("/workspace/runs/r", MOUNTED, {}, True, False),
        ("/workspace/runs/r", OVERLAY, {}, False, False),
        ("/workspaces/r", OVERLAY, {}, True, False),
        ("/runpod-volume/r", MOUNTED, {}, True, True),
        ("/data", OVERLAY, {}, True, True),
        ("/results/r", OVERLAY, {}, True, False),
        ("/results/r", OVERLAY, {"VOLUME_ROOT": "/results"}, True, True),
        ("/my disk/r", MOUNTED, {"VOLUME_ROOT": "/my disk"}, True, False),
        ("/data/r", "", {}, True, True),
    ],
)
def test_a_volume_that_is_not_mounted_is_refused_in_a_container(
    folder: str, mounts: str, environ: dict[str, str], in_container: bool, is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(MachineError, match=r"OUTPUT_URI=.*not mounted"):
            check_volume(Path(folder), environ, mounts, in_container=in_container)
    else:
        assert check_volume(Path(folder), environ, mounts, in_container=in_container)


def test_a_pod_is_a_container() -> None:
    assert is_container({"RUNPOD_POD_ID": "x"})


# Disks.


def test_what_is_needed_on_one_disk_is_added_up(tmp_path: Path) -> None:
    import shutil

    free = shutil.disk_usage(tmp_path).free
    half = Need(setting="HF_HOME", folder=str(tmp_path / "not/yet"), what="the base model", num_bytes=free * 6 // 10)
    assert "needed" in check_room([half], tmp_path)
    other = Need(setting="OUTPUT_URI", folder=str(tmp_path), what="4 checkpoints", num_bytes=free * 6 // 10)
    with pytest.raises(MachineError, match=r"WORK_DIR=.* and HF_HOME and OUTPUT_URI: .*free.*the base model .* 4 checkpoints"):
        check_room([half, other], tmp_path)
    assert existing_parent(tmp_path / "a/b/c") == tmp_path


def test_checkpoints_count_on_each_disk_and_those_that_are_there_do_not(tmp_path: Path, tiny_model: Path) -> None:
    settings = settings_for(tiny_model, tmp_path, SAVE_TOTAL_LIMIT="2")
    work, kept = tmp_path / "work", tmp_path / "kept"
    (work / "checkpoints/step-000001").mkdir(parents=True)
    (work / "checkpoints/step-000001/a").write_bytes(b"0" * 50)
    needs = checkpoint_needs(settings, work, kept, 100)
    assert [(need.setting, need.num_bytes) for need in needs] == [("WORK_DIR", 250), ("OUTPUT_URI", 300)]
    assert checkpoint_needs(settings, work, None, 100)[1:] == [] == checkpoint_needs(settings, work, kept, None)


# GPUs.


def device(name: str = "NVIDIA H100 80GB HBM3", driver: str = "580.65.06", capability: float = 9.0) -> Device:
    return Device(name=name, memory_bytes=80 * 2**30, driver=driver, compute_capability=capability)


def model(**settings: Any) -> ModelSettings:
    return ModelSettings(model_id="owner/name", **settings)


@pytest.mark.parametrize(
    ("gpu", "settings", "error"),
    [
        (None, {"load_in_8bit": True, "load_in_4bit": False}, "LOAD_IN_8BIT=1"),
        (None, {"attn_implementation": "flash_attention_2"}, "ATTN_IMPLEMENTATION=flash_attention_2"),
        (device("Tesla V100-SXM2-32GB", capability=7.0), {}, "V100.*7.5"),
        (device("Quadro P6000", driver="470.1", capability=6.1), {}, "driver 470.1"),
        (device("NVIDIA GeForce RTX 4090", "570.1", 8.9), {}, "driver 570.1.*580"),
        (device("NVIDIA A100-SXM4-80GB", "530.1", 8.0), {}, "driver 530.1"),
        (device("NVIDIA A100-SXM4-80GB", "550.1", 8.0), {}, "driver 550.1.*cuda-compat"),
        (device("Tesla T4", capability=7.5), {"dtype": "bfloat16"}, "DTYPE=bfloat16"),
        (device("Tesla T4", capability=7.5), {"attn_implementation": "flash_attention_2"}, "ATTN_IMPLEMENTATION"),
        (device(), {"attn_implementation": "flash_attention_2"}, "flash_attn"),
    ],
)
def test_a_gpu_that_cannot_do_what_is_asked_is_refused(gpu: Device | None, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(JobError, match=error):
        check_gpus(model(**settings), [gpu] if gpu else [], compat_folders=())


@pytest.mark.parametrize(
    ("gpu", "settings", "found"),
    [
        (None, {}, "none found"),
        (None, {"dtype": "bfloat16"}, "none found"),
        (device(), {"dtype": "bfloat16"}, "H100.*80 GiB"),
        (device("Tesla T4", capability=7.5), {"dtype": "float16"}, "T4"),
        (device("an odd card", driver="", capability=0.0), {"dtype": "bfloat16"}, "odd card"),
    ],
)
def test_a_gpu_that_can_is_described(gpu: Device | None, settings: dict[str, Any], found: str) -> None:
    import re

    assert re.search(found, check_gpus(model(**settings), [gpu] if gpu else [], compat_folders=()))


def test_an_old_driver_will_do_in_a_data_centre_with_the_compatibility_libraries(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    old = device("NVIDIA A100-SXM4-80GB", "550.1", 8.0)
    assert check_gpus(model(), [old], compat_folders=(tmp_path,)).startswith("warning: driver 550.1")
    with pytest.raises(MachineError):
        check_gpus(model(), [device("NVIDIA GeForce RTX 4090", "550.1", 8.9)], compat_folders=(tmp_path,))


# Looking at data without downloading it.


class Ranges:
    """A web server that counts the bytes it sends; with or without ranges, with or without sizes."""

    def __init__(self, data: bytes, *, has_ranges: bool = True, tells_size: bool = True) -> None:
        self.num_sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range") if has_ranges else None
                start, stop = 0, len(data)
                if wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    start, stop = int(first), min(int(last) + 1, len(data))
                if wanted and start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                if tells_size:
                    self.send_header("Content-Length", str(stop - start))
                self.end_headers()
                for at in range(start, stop, 2**16):
                    try:
                        self.wfile.write(data[at : min(at + 2**16, stop)])
                    except OSError:  # it was only a look
                        return
                    outer.num_sent += 2**16

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "Ranges":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


ROW = {"prompt": "What follows 7? " * 20, "completion": "8 follows. " * 20}


def parquet(tmp_path: Path, num_rows: int) -> bytes:
    """One row group, with values that do not pack."""
    import pyarrow
    import pyarrow.parquet

    rows = {name: [os.urandom(500).hex() for _ in range(num_rows)] for name in ("prompt", "completion")}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet", row_group_size=num_rows)
    return (tmp_path / "rows.parquet").read_bytes()


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz", "rows.csv"])
def test_a_look_at_a_large_file_reads_little_of_it_and_keeps_nothing(tmp_path: Path, name: str, has_ranges: bool) -> None:
    import gzip

    if name.endswith("parquet"):
        data = parquet(tmp_path, 20_000)
    elif name.endswith("csv"):
        data = b"prompt,completion\n" + b"one,two\n" * 3_000_000
    else:
        data = (json.dumps(ROW).encode() + b"\n") * 40_000
        data = gzip.compress(data, 0) if name.endswith("gz") else data
    assert len(data) > 20e6
    with Ranges(data, has_ranges=has_ranges) as server:
        found = glimpse(DatasetSpec.parse(f"{server.url}/{name}"), tmp_path / "cache")
        if name.endswith("parquet") and not has_ranges:
            assert found.layout is None, "its end says where the columns are, and cannot be had"
        else:
            assert str(found.layout) == "prompt_completion (prompt, completion)"
        assert found.num_bytes == len(data)
        assert server.num_sent < 16e6, "not the whole file"
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_server_that_does_not_tell_the_size_is_looked_at_all_the_same(tmp_path: Path) -> None:
    with Ranges(json.dumps(ROW).encode() + b"\n", has_ranges=False, tells_size=False) as server:
        found = glimpse(DatasetSpec.parse(f"{server.url}/rows.jsonl"), tmp_path)
        assert found.layout is not None and found.num_bytes is None


def test_an_empty_file_on_the_web_has_no_rows(tmp_path: Path) -> None:
    with Ranges(b"") as server, pytest.raises(DataError, match="no rows"):
        glimpse(DatasetSpec.parse(f"{server.url}/rows.jsonl"), tmp_path)


def test_rows_that_lie_too_deep_are_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peek, "MOST_BYTES", 2**20)
    with Ranges(b"\n" * 20_000_000 + json.dumps(ROW).encode()) as server:
        assert glimpse(DatasetSpec.parse(f"{server.url}/rows.jsonl"), tmp_path).layout is None


def test_a_look_finds_the_shape_that_preparation_finds(tmp_path: Path) -> None:
    from job.data.peek import find_layout
    from job.data.sources import open_source

    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for number, row in enumerate(
        ({"conversation": turns}, {"turns": json.dumps(turns)}, {"text": "a"}, {"instruction": "a", "output": "b", "input": ""})
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n", "utf-8")
        spec = DatasetSpec.parse(f"{path}?split=train[:1]")
        assert glimpse(spec, tmp_path).layout == find_layout(spec, open_source(spec, tmp_path).chunks())


# The whole, against servers.


def settings_for(tiny_model: Path, folder: Path, **more: str) -> Settings:
    data = folder / "rows.jsonl"
    data.write_text(json.dumps(ROW) + "\n", "utf-8")
    environ = {"OUTPUT_URI": str(folder / "runs"), "WORK_DIR": str(folder / "work"), **small_run(tiny_model, data), **more}
    return read_settings(environ, {}).settings


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path, stop: StopRequest) -> Callable[..., dict[str, Result]]:
    """Does every check with settings on top of what is right; results by name."""

    def check(settings: dict[str, str] | None = None, environ: dict[str, str] | None = None, **options: Any) -> dict[str, Result]:
        made = settings_for(tiny_model, tmp_path, **(settings or {}))
        inherited = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        store = open_store(made.keep.output_uri)
        results = check_everything(
            made, store, tmp_path / "work/r", environ={**inherited, **(environ or {})}, stop=stop, **options
        )
        return {result.name: result for result in results}

    return check


def test_further_checks_plug_in(check: Callable[..., dict[str, Result]]) -> None:
    def refuse() -> str:
        raise PlanError("does not fit; take a larger GPU")

    results = check(more={"memory": lambda: "fits", "budget": refuse})
    assert results["memory"].found == "fits" and isinstance(results["budget"].error, PlanError)
    assert {"local disk", "store", "volume", "GPU", "base model", "data sets", "room"} <= results.keys()
    assert [name for name, result in results.items() if result.error] == ["budget"]


def test_what_costs_a_trial_is_not_waited_for_when_the_data_is_wrong(check: Callable[..., dict[str, Result]]) -> None:
    def stumble() -> str:
        raise FileNotFoundError("config.json")

    more = {"slow": lambda: str(threading.Event().wait()), "bug": stumble}
    results = check({"LANGUAGE": "klingon"}, more=more)
    assert isinstance(results["languages"].error, SettingsError)
    assert results["slow"].is_warning and results["bug"].is_warning and not results["slow"].error


def test_room_for_checkpoints_counts_what_the_caller_knows(check: Callable[..., dict[str, Result]]) -> None:
    error = check(checkpoint_bytes=10**15)["room"].error
    assert isinstance(error, MachineError) and "checkpoints" in str(error)


def test_a_run_that_goes_on_asks_for_nothing_that_it_does_not_need(check: Callable[..., dict[str, Result]]) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        environ = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        on_the_hub = {"DATASETS": "tester/none", "MODEL_ID": "tester/none", "HF_TOKEN": TOKEN}
        trained = check(on_the_hub, environ, has_data=True, is_trained=True)
        assert not any(result.error for result in trained.values()) and not hub.requests
        assert trained.keys() == {"local disk", "volume", "store", "room"}
        prepared = check(on_the_hub, environ, has_data=True)
        assert "data sets" not in prepared and isinstance(prepared["base model"].error, SettingsError)
        assert not any("datasets" in request.path for request in hub.requests)


def test_a_model_in_the_cache_will_do_when_the_network_is_down(tiny_model: Path, job: Job) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()} | {"pytorch_model.bin": b"0"}
    with HubServer({TOKEN: "tester"}) as hub:
        hub.add_repo("model", "tester/base", files)
        up = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "MODEL_ID": "tester/base"}
        fetch_model(job, up, tokenizer_only=True)
        down = {**up, "HF_ENDPOINT": "http://127.0.0.1:9"}
        assert job.run("check", **down)[0] == 75, "the tokenizer alone is not the model"
        status, output = job.run("check", **up)
        assert status == 0 and "to download" in output, output
        snapshot = fetch_model(job, up)
        status, output = job.run("check", **down)
        assert status == 0 and "taken from the cache" in output, output
        status, output = job.run("check", **up)
        assert status == 0 and "in the cache" in output, output
        assert fetch_model(job, down) == snapshot == fetch_model(job, {**up, "HF_HUB_OFFLINE": "1"})


def fetch_model(job: Job, settings: dict[str, str], *, tokenizer_only: bool = False) -> str:
    """The folder that fetching gives."""
    program = (
        "from pathlib import Path\nfrom job.events import EventWriter, Fetched\nfrom job.settings import ModelSettings\n"
        "from job.train.fetch import fetch\nfrom job.train.spec import FetchSpec\n"
        "class Tell(EventWriter):\n    def write(self, event):\n        isinstance(event, Fetched) and print(event.model_dir)\n"
        f"spec = FetchSpec(model=ModelSettings(model_id='tester/base'), models_dir=Path(), tokenizer_only={tokenizer_only})\n"
        "fetch(spec, Tell(None))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], env=job.environ(**settings), capture_output=True, text=True, check=True
    )
    return child.stdout.splitlines()[-1]


def test_a_hub_that_is_silent_is_given_up_and_a_signal_ends_the_wait(job: Job) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections stand, and nothing is ever answered
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "MODEL_ID": "tester/base",
        }
        settings["HF_HOME"] = str(job.folder / "hf")
        begun = time.monotonic()
        status, output = job.run("check", **settings)
        assert status == 75 and "MODEL_ID=tester/base" in output, output
        assert time.monotonic() - begun < 15
        process = job.start("check", **settings)
        time.sleep(2.5)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75 and "Traceback" not in output, output
        assert time.monotonic() - begun < 3


def test_a_check_takes_seconds_and_leaves_nothing_behind(job: Job) -> None:
    begun = time.monotonic()
    status, output = job.run("check", LANGUAGE="en")
    assert status == 0, output
    assert time.monotonic() - begun < 10
    assert [path for path in job.folder.rglob("*") if path.is_file() and path.name != "lid.176.ftz"] == []


def test_the_supervisor_keeps_none_of_what_the_checks_import() -> None:
    program = (
        "import sys, job.run, job.preflight\n"
        "print(*sorted({'torch', 'pyarrow', 'datasets', 'huggingface_hub', 'boto3', 'numpy'} & sys.modules.keys()))"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == ""
