"""entrypoint.sh in a root file system of its own: which command becomes which process, and where results and downloads go.

Needs Linux with user namespaces, where anyone may mount; `make image-test` does the same in the real image.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

COMMANDS = ("run", "plan", "check", "prepare", "evaluate", "publish", "history", "recipes", "settings", "bench", "submit")
STAND_IN = '#!/bin/sh\necho "started: $*"\nenv\n'
"""Of `python`: says what it was asked and told."""
NEW_ROOT = """
set -eu
root=$1 mounts=$2 read_only=$3
shift 3
mount --bind "$root" "$root"
for name in usr bin sbin lib lib64 proc dev; do
    if [ -L "/$name" ]; then
        ln -sfn "$(readlink "/$name")" "$root/$name"
    elif [ -d "/$name" ]; then
        mkdir -p "$root/$name"
        mount --rbind "/$name" "$root/$name"
    fi
done
for folder in $mounts; do
    mkdir -p "$root$folder"
    mount -t tmpfs none "$root$folder"
done
[ -z "$read_only" ] || mount -o remount,bind,ro "$root$read_only"
exec chroot "$root" "$@"
"""
SERVERLESS = {"RUNPOD_WEBHOOK_GET_JOB": "https://api.example/job-take"}

Start = Callable[..., dict[str, str]]


@pytest.fixture(scope="session")
def can_mount() -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces (unshare -rm)")


@pytest.fixture
def root(tmp_path: Path, can_mount: None) -> Path:
    """What the image has: the job's folder, `python` on the PATH, and the programs of a small Debian."""
    root = tmp_path / "root"
    for folder in ("job/runpod", "venv", "tmp", "root"):
        (root / folder).mkdir(parents=True)
    shutil.copy2(ROOT / "entrypoint.sh", root / "job")
    (root / "venv/python").write_text(STAND_IN)
    (root / "venv/python").chmod(0o755)
    return root


@pytest.fixture
def start(root: Path) -> Start:
    """Start the entrypoint; returns what the process that came of it was told, and as `started` and `said` what was printed.

    Its arguments: the container's, the folders that are mounted, one that is read-only (`/`: the image), and the environment.
    """

    def start(*arguments: str, mounts: tuple[str, ...] = (), read_only: str = "", **environ: str) -> dict[str, str]:
        given = {"PATH": "/venv:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", **environ}
        command = ["env", "-i", *(f"{name}={value}" for name, value in given.items())]
        command += ["sh", "-c", 'cd /job; exec ./entrypoint.sh "$@"', "-", *arguments]
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", NEW_ROOT, "-", str(root), " ".join(mounts), read_only, *command],
            capture_output=True,
            text=True,
            timeout=60,
        )
        told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        started = [line.removeprefix("started: ") for line in done.stdout.splitlines() if line.startswith("started: ")]
        return {**told, "started": started[0] if started else "", "said": done.stderr, "status": str(done.returncode)}

    return start


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_job_is_the_jobs(command: str, start: Start) -> None:
    told = start(command, "--json")
    assert told["started"] == f"-m job {command} --json", told["said"]
    assert told["PYTHONPATH"] == "/job"


@pytest.mark.parametrize(
    ("arguments", "environ", "started"),
    [
        ((), {}, "-m job run"),
        (("--max-length", "512"), {}, "-m job run --max-length 512"),
        (("train",), {}, "-m job run"),
        (("smoke", "--max-steps", "2"), {}, "-m job run --max-steps 2"),
        ((), SERVERLESS, "/job/runpod/handler.py"),
        (("serve", "--rp_serve_api"), {}, "/job/runpod/handler.py --rp_serve_api"),
        (("run",), SERVERLESS, "-m job run"),
        (("rnu",), {}, "-m job rnu"),  # which names the nearest and knows what becomes of the machine
        (("python", "-c", "pass"), {}, "-c pass"),
    ],
)
def test_what_a_container_is_started_with_becomes_one_process(
    arguments: tuple[str, ...], environ: dict[str, str], started: str, start: Start
) -> None:
    told = start(*arguments, **environ)
    assert told["started"] == started, told["said"]
    assert told.get("RECIPE", "") == ("smoke" if arguments[:1] == ("smoke",) else "")


def test_an_exit_status_is_not_touched(start: Start) -> None:
    assert start("sh", "-c", "exit 75")["status"] == "75"


@pytest.mark.parametrize("place", ["/runpod-volume", "/workspace", "/data", "/mnt"])
def test_a_mounted_volume_gets_results_and_downloads(place: str, start: Start) -> None:
    told = start(mounts=(place,))
    assert (told["OUTPUT_URI"], told["HF_HOME"]) == (f"{place}/runs", f"{place}/.cache/huggingface"), told["said"]


def test_sagemaker_copies_results_alone_to_s3(start: Start) -> None:
    told = start("train", mounts=("/opt/ml/checkpoints",))
    assert told["OUTPUT_URI"] == "/opt/ml/checkpoints/runs" and "HF_HOME" not in told


@pytest.mark.parametrize("place", ["/runpod-volume", "/workspace", "/data"])
@pytest.mark.parametrize("environ", [{}, SERVERLESS])
def test_a_folder_where_a_volume_belongs_is_not_a_volume(place: str, environ: dict[str, str], root: Path, start: Start) -> None:
    (root / place.strip("/")).mkdir()
    told = start(**environ)
    assert told["started"] and not {"OUTPUT_URI", "HF_HOME"} & told.keys()


def test_a_serverless_worker_without_its_volume_is_given_no_other_place(root: Path, start: Start) -> None:
    (root / "runpod-volume").mkdir()
    for environ in ({}, {"VOLUME_ROOT": "/runpod-volume"}):
        told = start(read_only="/", **SERVERLESS, **environ)
        assert told["started"] == "/job/runpod/handler.py"
        assert "OUTPUT_URI" not in told and not told["said"]


def test_models_that_runpod_has_cached_are_used(start: Start) -> None:
    again = "mkdir -p /runpod-volume/huggingface-cache/hub; unset HF_HOME; exec /job/entrypoint.sh env"
    told = start("sh", "-c", again, mounts=("/runpod-volume",), **SERVERLESS)
    assert told["HF_HOME"] == "/runpod-volume/huggingface-cache" and told["OUTPUT_URI"] == "/runpod-volume/runs"


def test_the_named_volume_counts_before_all_others(start: Start) -> None:
    told = start(mounts=("/runpod-volume", "/checkpoint"), VOLUME_ROOT="/checkpoint/")
    assert (told["OUTPUT_URI"], told["HF_HOME"]) == ("/checkpoint/runs", "/checkpoint/.cache/huggingface")


def test_a_named_volume_that_is_missing_is_not_replaced_by_another(start: Start) -> None:
    told = start(mounts=("/data",), VOLUME_ROOT="/checkpoint")  # so the job says that it is not there
    assert told["OUTPUT_URI"] == "/checkpoint/runs" and "HF_HOME" not in told


def test_a_volume_that_cannot_be_written_is_named_and_not_passed_over(start: Start) -> None:
    told = start(mounts=("/data",), read_only="/data")
    assert told["OUTPUT_URI"] == "/data/runs" and "HF_HOME" not in told


@pytest.mark.parametrize("line", ["{}=/elsewhere", "  export {} = '/elsewhere'"])
@pytest.mark.parametrize("name", ["OUTPUT_URI", "HF_HOME"])
def test_the_env_files_word_counts_before_a_guess(name: str, line: str, root: Path, start: Start) -> None:
    (root / "job/.env").write_text(f"# {name}=x\nMODEL_ID=m\n{line.format(name)}\n")
    assert name not in start(mounts=("/data",)), "what is exported wins over the env file"
    (root / "job/.env").rename(root / "job/other.env")
    assert name in start(mounts=("/data",))
    assert name not in start(mounts=("/data",), JOB_ENV_FILE="/job/other.env")


def test_an_empty_setting_is_no_setting(root: Path, start: Start) -> None:
    (root / "job/.env").write_text("OUTPUT_URI=\n")
    assert start(mounts=("/data",), HF_HOME="")["OUTPUT_URI"] == "/data/runs"


def test_the_environments_word_counts(start: Start) -> None:
    told = start(mounts=("/data",), OUTPUT_URI="s3://bucket/runs", HF_HOME="/data/hub", WORK_DIR="/data/work", HOME="/")
    assert (told["OUTPUT_URI"], told["HF_HOME"], told["WORK_DIR"]) == ("s3://bucket/runs", "/data/hub", "/data/work")


def test_without_a_home_that_can_be_written_all_work_goes_to_tmp(start: Start) -> None:
    told = start(mounts=("/tmp", "/data"), read_only="/")
    assert told["WORK_DIR"] == "/tmp/qlora-job" and told["LOGNAME"]
    assert told["XDG_CACHE_HOME"].startswith("/tmp/") and told["TRITON_CACHE_DIR"].startswith("/tmp/")
    told = start(mounts=("/data",))
    assert not {"WORK_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"} & told.keys()


def test_a_run_that_goes_with_its_container_is_told(start: Start) -> None:
    told = start(mounts=("/tmp",), read_only="/")
    assert told["OUTPUT_URI"] == "/tmp/qlora-job/runs"
    assert "no volume is mounted" in told["said"]
    assert not start("settings", mounts=("/tmp",), read_only="/")["said"]


def test_runpods_folder_does_not_hide_runpods_sdk() -> None:
    """PYTHONPATH has /job in it: a package /job/runpod would be found before the SDK, a folder without __init__.py is not."""
    assert not (ROOT / "runpod/__init__.py").exists()
    assert os.access(ROOT / "entrypoint.sh", os.X_OK)
