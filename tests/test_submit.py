"""`python -m job submit` as a user meets it: a real process, a small RunPod over real HTTP, and a real run on a pod of it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Job, write_conversations, write_tiny_model
from runpod_server import ALWAYS, Gpu, Pod, RunPodServer
from s3_server import BUCKET, KEYS, S3Server

from job.data.tally import TALLY, SourceTally, Tally
from job.prepared import prepared_name
from job.settings import read_settings

CHEAP, FAST, OLD = "NVIDIA RTX A5000", "NVIDIA GeForce RTX 4090", "Tesla V100-PCIE-16GB"
SAID = "the job ends with exit status"
RUN = {
    "MODEL_ID": "pkg:lent/model",
    "DATASETS": "pkg:lent/chats.jsonl",
    "MAX_LENGTH": "128",
    "MAX_STEPS": "2",
    "EFFECTIVE_BATCH_SIZE": "4",
    "EVAL_FRACTION": "0",
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package with a model and data, as an image may have one: what laptop and pod see alike without a Hub."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "lent").mkdir()
    (folder / "lent/__init__.py").touch()
    write_tiny_model(folder / "lent/model")
    write_conversations(folder / "lent/chats.jsonl", 64)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def tally(packages: Path) -> tuple[str, str]:
    """(name in the store, text): the data as counted before, so that a forecast need not start a process to look at it."""
    source = SourceTally(source="lent", shape="prompt", revision=None, num_rows=64, num_kept=64, dropped={}, num_tokens=4000)
    counts = {"num_train": 64, "num_eval": 0, "num_train_tokens": 4000, "num_learned_tokens": 2000, "longest_tokens": 70}
    name = f"{prepared_name(read_settings(RUN, {}, folder=packages).settings)}/{TALLY}"
    return name, Tally(sources=[source], **counts).model_dump_json()


@pytest.fixture
def runpod() -> Iterator[RunPodServer]:
    with RunPodServer() as server:
        server.gpus = [
            Gpu(id=FAST, memory=24, secure=0.69, community=0.34),
            Gpu(id=CHEAP, memory=24, secure=0.27),
            Gpu(id=OLD, memory=16, secure=0.1),
            Gpu(id="NVIDIA L4", memory=24, secure=0.05, availability="NONE"),
            Gpu(id="AMD Instinct MI300X OAM", memory=192, secure=0.01),
        ]
        yield server


@pytest.fixture
def job(tmp_path: Path, packages: Path, tally: tuple[str, str], footprints: Path, runpod: RunPodServer) -> Job:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/footprints").symlink_to(footprints)
    name, text = tally
    (tmp_path / "runs/r" / name).parent.mkdir(parents=True)
    (tmp_path / "runs/r" / name).write_text(text, "utf-8")
    about_runpod = {"RUNPOD_REST_URL": f"{runpod.url}/v2", "RUNPOD_API_KEY": runpod.api_key}
    about_us = {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}", "SUBMIT_IMAGE": "example.org/me/qlora-job:1", "OUTPUT_URI": ""}
    return Job(tmp_path, {**RUN, **about_runpod, **about_us, "WORK_DIR": str(tmp_path / "work")})


def that_ends(status: int, *, says: str = "step 1", after: str = "EXITED") -> Callable[[str, Pod], None]:
    """What a made pod does: it logs, tells its end, and is then in that state."""

    def live(pod: Pod) -> None:
        pod.write("pulling the image", source="system")
        pod.write(f"run r in s3://bucket/r\n{says}\n{SAID} {status}")
        time.sleep(0.2)
        pod.status = after

    return lambda pod_id, pod: threading.Thread(target=live, args=(pod,), daemon=True).start()


def bodies(runpod: RunPodServer) -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in runpod.log if (request.method, request.path) == ("POST", "/v2/pods")]


def test_the_cheapest_run_is_rented_with_the_settings_and_ends_as_the_run_did(job: Job, runpod: RunPodServer) -> None:
    runpod.volumes["vol1"] = "US-KS-2"
    runpod.on_create = that_ends(7, says="loss is not finite")
    status, output = job.run("submit", "--network-volume", "vol1", "--yes", MAX_COST_USD="3", GPU_HOURLY_RATE="0.01")
    assert status == 7, output
    (body,) = bodies(runpod)
    env = body.pop("env")
    assert body == {
        "name": "qlora-r",
        "image": "example.org/me/qlora-job:1",
        "gpu": {"id": CHEAP, "count": 1, "minCudaVersion": "13.0"},
        "cloud": "SECURE",
        "disk": 20,
        "ports": [],
        "startSsh": False,
        "startJupyter": False,
        "mounts": {"network": [{"volumeId": "vol1", "path": "/workspace"}]},
        "dataCenterIds": ["US-KS-2"],
    }
    usual = {"RUN_ID": "r", "OUTPUT_URI": "/workspace/runs", "ON_FINISH": "terminate", "FAIL_GRACE_MINUTES": "15"}
    rate = env.pop("GPU_HOURLY_RATE")
    assert env == {**RUN, **usual, "MAX_COST_USD": "3"} and 0.27 < float(rate) < 0.29
    for part in (
        *("* RTX A5000", "RTX 4090", "loss is not finite", "[system] pulling", "is stopped; its disk is kept"),
        *("exit status 7 (by the job's last words", "GPU_HOURLY_RATE=0.01: RunPod's own price", "must have this package"),
    ):
        assert part in output, part
    assert not re.search("V100|L4 |MI300|a fault", output) and runpod.api_key not in output


def test_everything_that_a_pod_could_not_see_is_told_at_once_and_nothing_is_spent(
    job: Job, runpod: RunPodServer, tiny_model: Path, conversations: Path
) -> None:
    prompts = job.folder / "prompts.txt"
    prompts.write_text("What follows 1?\n", "utf-8")
    begun = time.monotonic()
    status, output = job.run(
        "submit", MODEL_ID=str(tiny_model), DATASETS=str(conversations), HF_TOKEN="hf_planted1234567890", HUB_MODEL_ID="me/a",
        EVAL_PROMPTS=str(prompts),
    )  # fmt: skip
    assert status == 2 and time.monotonic() - begun < 60, output
    told = [line for line in output.splitlines() if "lies on this machine" in line or "is a secret" in line]
    assert [line.partition("=")[0] for line in told] == ["MODEL_ID", "DATASETS", "EVAL_PROMPTS", "HF_TOKEN"], output
    assert "OUTPUT_URI: the pod's own disk goes with the pod" in output and "--network-volume ID" in output
    assert "--secrets VARIABLE=secret" in output and "hf_planted" not in output and not runpod.log


def test_without_a_yes_and_without_a_terminal_nothing_is_rented(job: Job, runpod: RunPodServer) -> None:
    status, output = job.run("submit", "--volume-disk", "--json")
    assert status == 2 and "--yes" in output and "Rent RTX A5000 at $0.27 an hour" in output, output
    assert not bodies(runpod) and not runpod.pods


def start_at_terminal(job: Job, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the job with a terminal as its standard input and error; returns it and our end of the terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "job", "submit", *arguments]
    environ = {**job.environ(), "TERM": "dumb", "COLUMNS": "400"}
    process = subprocess.Popen(
        command, env=environ, cwd=job.folder, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    return process, ours


def read_until(terminal: int, *words: str, seconds: float = 120) -> str:
    """What the terminal shows, until one of the words is in it, or its other end is closed."""
    shown, deadline = "", time.monotonic() + seconds
    while not any(word in shown for word in words):
        assert time.monotonic() < deadline, shown
        try:
            shown += os.read(terminal, 4096).decode("utf-8", "replace")
        except OSError:  # closed
            break
    return shown


def test_a_gpu_that_is_gone_meanwhile_gives_way_to_the_next_which_is_asked_for_again(job: Job, runpod: RunPodServer) -> None:
    runpod.gpus[1].is_gone = True
    process, terminal = start_at_terminal(job, "--volume-disk", "40", "--no-follow")
    shown = read_until(terminal, "[y/N]")
    assert "Rent RTX A5000" in shown and not bodies(runpod)
    os.write(terminal, b"y\n")
    shown = read_until(terminal, "[y/N]")
    assert "no instances currently available" in shown and "Rent RTX 4090" in shown
    os.write(terminal, b"\n")  # Enter is no
    shown = read_until(terminal, "never shown")
    assert process.wait(60) == 75 and "nothing is rented" in shown
    assert [body["gpu"]["id"] for body in bodies(runpod)] == [CHEAP] and not runpod.pods


def test_ctrl_c_leaves_the_pod_running_and_the_same_command_comes_back_to_it(job: Job, runpod: RunPodServer) -> None:
    runpod.on_create = lambda pod_id, pod: pod.write("run r in /workspace/runs/r\nstep 1")
    process = job.start("submit", "--volume-disk", "--yes")
    for line in process.stdout or ():
        if "step 1" in line:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and runpod.pods["pod0001"].status == "RUNNING", output
    for part in ("POD pod0001 RUNS ON", "python -m job submit", "runpodctl stop pod pod0001", "runpodctl remove pod pod0001"):
        assert part in output, (part, output)
    process = job.start("submit", "--volume-disk", "--yes", "--json")
    output = ""
    for line in process.stdout or ():
        output += line
        if '"found"' in line:
            that_ends(0)("pod0001", runpod.pods["pod0001"])
    status = process.wait(60)
    events = [json.loads(line) for line in output.splitlines() if line.startswith('{"event"')]
    assert status == 0 and [event["event"] for event in events if event["event"] != "log"] == ["found", "ended"], output
    assert [event["line"] for event in events if event.get("source") == "container"].count("step 1") == 2
    assert events[-1]["exit_status"] == 0 and events[-1]["pod_is"] == "exited" and len(bodies(runpod)) == 1


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ({"status": 401, "method": "GET"}, 2, "RunPod does not accept it (401); make a new one"),
        ({"status": 402, "method": "POST", "detail": "Insufficient balance"}, 4, "add credit"),
        ({"status": 422, "method": "POST", "detail": "image: not a reference"}, 2, "image: not a reference"),
        ({"status": 400, "method": "POST", "detail": "pod quota of 5 reached"}, 5, "pod quota of 5 reached"),
    ],
)
def test_each_refusal_of_runpod_is_one_clear_message(
    fault: dict[str, Any], status: int, said: str, job: Job, runpod: RunPodServer
) -> None:
    runpod.fail("/v2/", times=ALWAYS, **fault)
    found, output = job.run("submit", "--volume-disk", "--yes")
    assert found == status and said in output and "Traceback" not in output and not runpod.pods, output


def on_a_pod(
    job: Job, runpod: RunPodServer, python_path: str, processes: list[subprocess.Popen[str]]
) -> Callable[[str, Pod], None]:
    """What a made pod does when it runs the real job, with nothing but what it was sent and what a pod has."""

    def begin(pod_id: str, pod: Pod) -> None:
        folder = job.folder / pod_id
        folder.mkdir()
        own = {name: job.environ()[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS")} | {"PYTHONPATH": python_path}
        local = {"WORK_DIR": str(job.folder / "work"), "RUNPOD_API_KEY": runpod.api_key, "HF_HUB_OFFLINE": "1"}
        secrets = {
            "{{ RUNPOD_SECRET_key }}": KEYS["aws_access_key_id"],
            "{{ RUNPOD_SECRET_word }}": KEYS["aws_secret_access_key"],
        }
        sent = {name: secrets.get(value, value) for name, value in pod.made_of["env"].items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "job", "run"],
            env={**own, **runpod.environ(pod_id), **local, **sent},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)

        def log() -> None:
            for line in process.stdout or ():
                pod.write(line)

        threading.Thread(target=log, daemon=True).start()

    return begin


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Of pods; they go with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(30)


def bucket_settings(s3: S3Server) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"], "AWS_SECRET_ACCESS_KEY": KEYS["aws_secret_access_key"]}
    where = {"OUTPUT_URI": f"s3://{BUCKET}/q", "AWS_ENDPOINT_URL_S3": s3.proxy.url, "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, **where}


TO_BUCKET = ("submit", "--yes", "--secrets", "AWS_ACCESS_KEY_ID=key,AWS_SECRET_ACCESS_KEY={{ RUNPOD_SECRET_word }}")


def test_a_real_run_on_a_pod_that_is_refused_there_tells_its_status_and_stops_its_pod(
    job: Job, runpod: RunPodServer, server: S3Server, tally: tuple[str, str], processes: list[subprocess.Popen[str]]
) -> None:
    server.client.put_object(Bucket=BUCKET, Key=f"q/r/{tally[0]}", Body=tally[1].encode())
    runpod.on_create = on_a_pod(job, runpod, str(ROOT), processes)  # this image lacks the package with the model
    status, output = job.run(*TO_BUCKET, FAIL_GRACE_MINUTES="0", **bucket_settings(server))
    (body,) = bodies(runpod)
    assert status == 2 and "no package 'lent' is installed" in output and f"{SAID} 2" in output, output
    assert body["env"]["AWS_SECRET_ACCESS_KEY"] == "{{ RUNPOD_SECRET_word }}" and "mounts" not in body
    deadline = time.monotonic() + 60
    while runpod.pods["pod0001"].status != "EXITED":  # with the settings that were sent, the job has stopped it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # What is done already is not rented for.
    server.client.put_object(Bucket=BUCKET, Key="q/r/DONE", Body=b"{}")
    status, output = job.run(*TO_BUCKET, **bucket_settings(server))
    assert status == 0 and "already done" in output and len(bodies(runpod)) == 1, output


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FULL_POD_TEST"), reason="trains for a minute what other tests train too: FULL_POD_TEST=1")
def test_a_real_run_on_a_pod_trains_into_the_bucket_and_deletes_its_pod(
    job: Job,
    runpod: RunPodServer,
    server: S3Server,
    tally: tuple[str, str],
    packages: Path,
    processes: list[subprocess.Popen[str]],
) -> None:
    server.client.put_object(Bucket=BUCKET, Key=f"q/r/{tally[0]}", Body=tally[1].encode())
    runpod.on_create = on_a_pod(job, runpod, f"{ROOT}{os.pathsep}{packages}", processes)
    status, output = job.run(*TO_BUCKET, **bucket_settings(server))
    assert status == 0 and not runpod.pods, output
    for part in ("report ", f"{SAID} 0", "(by the job's last words", "pod pod0001 is deleted; nothing bills"):
        assert part in output, (part, output)
    assert {"q/r/DONE", "q/r/report.json"} <= set(server.names("q/"))
    report = json.loads(server.client.get_object(Bucket=BUCKET, Key="q/r/report.json")["Body"].read())
    assert 0.27 < report["attempts"][0]["price_usd_per_hour"] < 0.29


def test_the_script_in_the_folder_runpod_does_the_same(job: Job, runpod: RunPodServer) -> None:
    command = [sys.executable, str(ROOT / "runpod/submit.py"), "--cloud", "nowhere", "--gpu", "RTX 409"]
    done = subprocess.run(command, env=job.environ(SUBMIT_IMAGE=""), cwd=job.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not runpod.log
    for part in ("--cloud=nowhere", "did you mean RTX 4090?", "--image: is required"):
        assert part in done.stderr, done.stderr
