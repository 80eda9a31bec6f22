"""Preparation on a real cluster of two worker processes: the same bytes as here, whoever is killed on the way."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_prepare import many_pairs, numbered_rows, pair, prepare_in, tree_digest, write_jsonl

from job.data import cluster
from job.errors import DataError, MachineError, NetworkError
from job.settings import DataSettings

pytest.importorskip("distributed")
from dask_cluster import DaskCluster, Recorder

IMPORTABLE = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
ENGLISH = (
    "the a this that is was will be not and or but with from about into over under water house road light morning evening winter "
    "summer people children friends teacher doctor bread coffee music paper window garden river mountain small large green blue"
)
WORDS = ENGLISH.split()
SIGNATURE = "X-Amz-Signature=0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with DaskCluster(tmp_path_factory.mktemp("cluster")) as started:
        started.start_worker()
        started.start_worker()
        started.wait_for(2)
        yield started


@pytest.fixture
def workers(two_workers: DaskCluster) -> DaskCluster:
    """Two of them, whatever became of those of an earlier test."""
    while len(two_workers.workers) < 2:
        two_workers.start_worker()
    two_workers.wait_for(2)
    return two_workers


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversations with duplicates and faults, text in a packed file, and a table; several shards of each."""
    folder, chosen = tmp_path_factory.mktemp("sources"), random.Random(7)
    said = [" ".join(chosen.choices(WORDS, k=25)) for _ in range(1150)]
    talk = [pair(f"What do you say, number {number}?", text) for number, text in enumerate(said)]
    talk += [*talk[:40], *(pair(row["prompt"], row["completion"] + " indeed") for row in talk[50:90])]
    talk += [{"prompt": 3}] * 5  # type: ignore[dict-item]  # malformed
    talk += [pair(f"Was ist das, {number}?", "Das ist leider nicht auf Englisch und bleibt darum nicht.") for number in range(9)]
    write_jsonl(folder / "talk.jsonl", talk)
    lines = (f"{' '.join(chosen.choices(WORDS, k=12))} {number}\n" for number in range(1300))
    (folder / "text.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    cells = [f"Soru {number}?,Bu sorunun cevabı kısa ve açık: {number} numaralı yol." for number in range(120)]
    (folder / "table.csv").write_text("\n".join(["prompt,completion", *cells, *cells[:30]]), "utf-8")
    return {path.name.partition(".")[0]: path for path in folder.iterdir()}


def start_preparing(out: Path, data: Path, address: str) -> "subprocess.Popen[bytes]":
    """A coordinator as a process of its own."""
    program = (
        "import sys, pathlib, test_prepare\n"
        "out, data, address = sys.argv[1:]\n"
        "test_prepare.prepare_in(pathlib.Path(out), data, prepare_on=address, eval_fraction=0)"
    )
    return subprocess.Popen([sys.executable, "-c", program, out, data, address], env=os.environ | {"PYTHONPATH": IMPORTABLE})


def json_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# The same bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"dedup": "near", "language": "tr,en", "keep_dropped": True, "mask_pii": True},
        {"mix": "interleave", "max_samples": 300, "order": "length", "max_length": 60, "overlong": "truncate"},
        {"max_tokens": 60_000, "eval_fraction": 0},
    ],
    ids=["near duplicates and languages", "interleaved", "up to a number of tokens"],
)
def test_a_cluster_makes_the_same_bytes_as_this_machine(
    workers: DaskCluster, sources: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    datasets = (sources["talk"], f"{sources['text']}?split=train[100:]", f"{sources['table']}?weight=2&limit=140")
    here = prepare_in(tmp_path / "here", *datasets, **changes)
    made_before = len(workers.made())
    there = prepare_in(tmp_path / "there", *datasets, **changes, prepare_on=workers.address)
    assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")
    assert there == here and here.num_train > 200
    assert {worker for _, worker in workers.made()[made_before:]} == {worker for _, worker in workers.made()}, "one was idle"
    if "dedup" in changes:
        assert {"duplicate", "near_duplicate", "malformed", "wrong_language"} <= here.sources[0].dropped.keys()
        assert here.num_eval > 0 and here.sources[2].num_kept > 100


def test_rows_of_the_held_out_data_are_found_on_a_cluster_too(
    workers: DaskCluster, sources: dict[str, Path], tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", json_rows(sources["talk"])[:40])
    for name, address in (("here", None), ("there", workers.address)):
        tally = prepare_in(tmp_path / name, sources["talk"], eval_datasets=str(held_out), prepare_on=address)
        assert tally.sources[1].dropped["contaminated"] >= 30
    assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")


def test_a_worker_with_several_threads_makes_the_same_bytes(two_workers: DaskCluster, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(6500))
    with DaskCluster(tmp_path / "cluster") as other:
        other.start_worker("--nthreads", "4")
        prepare_in(tmp_path / "there", path, prepare_on=other.address)
    prepare_in(tmp_path / "here", path)
    assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")


# Somebody dies


def test_a_worker_that_is_killed_costs_only_its_chunks(workers: DaskCluster, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(12_500))
    before = len(workers.made())
    out = tmp_path / "out"
    child = start_preparing(out, path, workers.address)
    wait_until(lambda: len(workers.made()) > before)
    workers.kill(workers.workers[0])
    workers.start_worker()
    assert child.wait(120) == 0
    shards = Counter(key for key, _ in workers.made()[before:])
    assert len(shards) == 13 and sum(shards.values()) <= 13 + 4, "more is made again than what the dead one had"
    prepare_in(tmp_path / "here", path, eval_fraction=0)
    assert tree_digest(out) == tree_digest(tmp_path / "here")


def test_a_coordinator_that_is_killed_continues_and_no_finished_shard_is_made_twice(workers: DaskCluster, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(12_500))
    out = tmp_path / "out"
    shards = out / "shards"
    before = len(workers.made())
    for num_shards in (2, 6):
        child = start_preparing(out, path, workers.address)
        wait_until(lambda wanted=num_shards: len(list(shards.glob("*.arrow"))) >= wanted)
        child.kill()
        child.wait()
    num_whole = len(list(shards.glob("*.arrow")))
    assert 6 <= num_whole < 13
    assert start_preparing(out, path, workers.address).wait(120) == 0
    # Each start of the coordinator has a name of its own before a shard's digest.
    made = Counter(key.rpartition("-")[2] for key, _ in workers.made()[before:])
    assert len(made) == 13
    assert sum(made.values()) <= 13 + 2 * (2 * 2 + 1), "what two kills may have cost: all that was under way then"
    assert sum(count == 1 for count in made.values()) >= num_whole - 4
    prepare_in(tmp_path / "here", path, eval_fraction=0)
    assert tree_digest(out) == tree_digest(tmp_path / "here")


def test_what_was_begun_here_is_finished_there_and_the_other_way_round(workers: DaskCluster, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(3500))

    def prepare_too_few(folder: Path, **changes: Any) -> dict[str, int]:
        with pytest.raises(DataError, match="MIN_SAMPLES"):
            prepare_in(folder, path, min_samples=9999, **changes)
        return {shard.name: shard.stat().st_mtime_ns for shard in (folder / "shards").iterdir()}

    before = len(workers.made())
    begun = prepare_too_few(tmp_path / "begun here")
    assert prepare_too_few(tmp_path / "begun here", prepare_on=workers.address) == begun and len(begun) == 4
    assert len(workers.made()) == before
    begun = prepare_too_few(tmp_path / "begun there", prepare_on=workers.address)
    assert len(workers.made()) == before + 4
    assert prepare_too_few(tmp_path / "begun there") == begun


def test_a_scheduler_that_goes_away_is_a_network_error_and_another_one_continues(
    two_workers: DaskCluster, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(6500))
    out = tmp_path / "out"
    with DaskCluster(tmp_path / "first") as first:
        first.start_worker()

        def kill() -> None:
            wait_until(lambda: len(list(out.glob("shards/*.arrow"))) >= 2)
            first.kill(first.scheduler)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(NetworkError, match=r"PREPARE_ON=tcp://.* went away .* the shards made so far are kept"):
            prepare_in(out, path, prepare_on=first.address)
        killer.join()
    kept, before = len(list(out.glob("shards/*.arrow"))), len(two_workers.made())
    prepare_in(out, path, prepare_on=two_workers.address)
    assert kept >= 2 and len(two_workers.made()) - before == 7 - kept
    prepare_in(tmp_path / "here", path)
    assert tree_digest(out) == tree_digest(tmp_path / "here")


# What does not work is said


def test_an_address_where_nobody_listens_is_a_network_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(9))
    with pytest.raises(NetworkError, match=r"PREPARE_ON=tcp://127.0.0.1:9: no scheduler answers there"):
        prepare_in(tmp_path / "out", path, prepare_on="tcp://127.0.0.1:9")


def test_workers_that_run_another_program_or_none_are_refused_before_they_get_a_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(30))
    other = tmp_path / "other"
    shutil.copytree(ROOT / "job", other / "job")
    with (other / "job/data/near.py").open("a") as file:
        file.write("THRESHOLD = 0.7\n")
    for place, problem in ((other, "has this program [0-9a-f]+, and this job"), (tmp_path, "cannot import this program .*'job'")):
        with DaskCluster(tmp_path / f"cluster of {place.name}") as foreign:
            foreign.start_worker(PYTHONPATH=str(place))
            foreign.wait_for(1)
            with pytest.raises(MachineError, match=f"PREPARE_ON.*{problem}.*start the workers from the image"):
                prepare_in(tmp_path / "out", path, prepare_on=foreign.address)
            assert foreign.made() == []


def test_a_cluster_without_workers_is_waited_for_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", many_pairs(30))
    with DaskCluster(tmp_path / "cluster") as empty:
        monkeypatch.setattr(cluster, "_TICK_SECONDS", 0.2)
        monkeypatch.setattr(cluster, "NO_WORKER_SECONDS", 0.5)
        with pytest.raises(NetworkError, match=r"has had no worker for .* start some with `dask worker tcp://.*--nthreads 1`"):
            prepare_in(tmp_path / "out", path, prepare_on=empty.address)
        monkeypatch.setattr(cluster, "NO_WORKER_SECONDS", 60.0)
        threading.Timer(1.0, empty.start_worker).start()
        assert prepare_in(tmp_path / "out", path, prepare_on=empty.address).sources[0].num_kept == 30


@pytest.mark.parametrize(
    "address", ["head:8786", "http://head:8786", "tcp://head", "ray://head:10001", "tcp://user:secret@head:1"]
)
def test_an_address_that_is_no_schedulers_is_refused_with_the_settings(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be a scheduler's address \(tcp://host:8786"):
        DataSettings.model_validate({"datasets": "owner/name", "prepare_on": address})


# What travels


def test_no_credential_and_no_address_of_the_data_reaches_the_cluster(
    workers: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_jsonl(tmp_path / "secret-folder.jsonl", numbered_rows(30)).read_bytes()

    class _Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(rows)))
            self.end_headers()
            self.wfile.write(rows)

        def log_message(self, format: str, *args: object) -> None:
            pass

    secrets = {"HF_TOKEN": "hf_planted", "AWS_SECRET_ACCESS_KEY": "aws_planted", "WANDB_API_KEY": "wandb_planted"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server, Recorder(workers.address) as recorder:
        address = f"http://127.0.0.1:{server.server_port}/hidden/rows.jsonl?{SIGNATURE}"
        prepare_in(tmp_path / "out", f"{address},{tmp_path / 'secret-folder.jsonl'}", prepare_on=recorder.address)
        server.shutdown()
    heard = bytes(recorder.heard)
    assert b"Say 7." in heard, "the recorder hears what is sent"
    planted = [*secrets.values(), SIGNATURE.partition("=")[2], str(tmp_path)]
    assert [text for text in planted if text.encode() in heard] == []
    assert "Say 7." not in workers.log.read_text()
