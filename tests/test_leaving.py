"""What becomes of a pod when the job ends, seen from outside: real processes, RunPod over HTTP."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Job
from runpod_server import RunPodServer

from job.leaving import Leaving, is_off_machine

POD = "pod4711"


def wait_until_it_is(server: RunPodServer, status: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while POD in server.pods and server.pods[POD].status != status:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"the pod still is {server.pods[POD].status}"
        time.sleep(0.1)


def leave(process: subprocess.Popen[str]) -> tuple[int, str]:
    """End a process that waits for its pod to vanish."""
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_a_run_that_is_done_ends_its_pod_and_keeps_its_exit_status(job: Job) -> None:
    with RunPodServer() as runpod:
        runpod.add_pod(POD)
        settings = {**runpod.environ(POD), "RUNPOD_API_KEY": runpod.api_key, "ON_FINISH": "terminate", "MAX_STEPS": "2"}
        process = job.start("run", **settings)
        wait_until_it_is(runpod, "EXITED", process)
        status, output = leave(process)
        assert (job.kept / "DONE").exists() and status == 0, output
        # What it made lies on the pod's own disk, so the pod is stopped and not deleted.
        assert runpod.pods[POD].status == "EXITED" and runpod.api_key not in output
        # Started again, as RunPod does with a container that ends, it trains nothing and ends its pod once more.
        runpod.pods[POD].status = "RUNNING"
        process = job.start("run", **settings)
        wait_until_it_is(runpod, "EXITED", process)
        status, output = leave(process)
        assert status == 0 and "already done" in output and "training" not in output


def test_a_wrong_setting_does_not_leave_the_pod_billing(job: Job) -> None:
    with RunPodServer() as runpod:
        runpod.add_pod(POD)
        settings = {"RUNPOD_API_KEY": runpod.api_key, "ON_FINISH": "stop", "FAIL_GRACE_MINUTES": "0", "LEARNING_RATE": "much"}
        process = job.start("run", **runpod.environ(POD), **settings)
        wait_until_it_is(runpod, "EXITED", process)
        _, output = leave(process)
        assert "LEARNING_RATE=much" in output and not job.kept.exists()


def test_a_bug_or_a_misspelt_command_does_not_leave_the_pod_billing_either(job: Job) -> None:
    (job.folder / "m").mkdir(parents=True)
    (job.folder / "m" / "config.json").write_bytes(b"\xff\xfe\x00")
    with RunPodServer() as runpod:
        for arguments, settings in ((("runn",), {}), (("run",), {"MODEL_ID": "./m", "RUN_ID": ""})):
            runpod.add_pod(POD)
            keys = {"RUNPOD_API_KEY": runpod.api_key, "ON_FINISH": "stop", "FAIL_GRACE_MINUTES": "0"}
            process = job.start(*arguments, **runpod.environ(POD), **keys, **settings)
            wait_until_it_is(runpod, "EXITED", process)
            leave(process)


def test_other_commands_and_other_machines_are_left_alone(job: Job) -> None:
    with RunPodServer() as runpod:
        runpod.add_pod(POD)
        settings = {"RUNPOD_API_KEY": runpod.api_key, "ON_FINISH": "stop", "FAIL_GRACE_MINUTES": "0", "LEARNING_RATE": "much"}
        assert job.run("check", **runpod.environ(POD), **settings)[0] == 2
        (job.folder / "m").mkdir(parents=True)
        (job.folder / "m" / "config.json").write_bytes(b"\xff\xfe\x00")
        bug = {**settings, "LEARNING_RATE": "0.1", "MODEL_ID": "./m", "RUN_ID": ""}
        assert job.run("check", **runpod.environ(POD), **bug)[0] == 1
        status, output = job.run("history", "--json", str(job.folder / "nowhere"), **runpod.environ(POD), **settings)
        assert status == 2 and "nowhere" in output, "the word after --json is the place, and no value of it"
        assert job.run("history", "--html", **runpod.environ(POD), **settings)[0] == 2
        assert job.run("run", **{**runpod.environ(POD), **settings, "ON_FINISH": "exit"})[0] == 2
        assert job.run("run", **settings)[0] == 2
        assert runpod.pods[POD].status == "RUNNING" and not runpod.log


@pytest.mark.parametrize(
    ("uri", "environ", "expected"),
    [
        ("s3://bucket/x", {}, True),
        ("/runs", {}, False),
        ("/runs", {"RUNPOD_VOLUME_ID": "vol"}, False),  # a volume is there, and this is not on it
        ("/proc/not/there", {"RUNPOD_VOLUME_ID": "vol"}, True),
        ("/dev/shm/runs", {"RUNPOD_VOLUME_ID": "vol"}, False),  # a file system, and it goes with the pod
    ],
)
def test_what_outlives_the_pod_is_on_s3_or_on_a_network_volume(uri: str, environ: dict[str, str], expected: bool) -> None:
    assert is_off_machine(uri, environ) is expected


@pytest.mark.parametrize(("asked", "expected"), [("stop", "stop"), ("terminate", "terminate"), ("", "exit"), ("halt", "stop")])
def test_the_environment_decides_while_the_settings_are_wrong(asked: str, expected: str) -> None:
    assert Leaving.from_environ({"ON_FINISH": asked}, {}).finish.on_finish == expected
    assert Leaving.from_environ({}, {"ON_FINISH": asked}).finish.on_finish == expected


def test_a_grace_that_is_no_number_stops_the_pod_all_the_same(tmp_path: Path) -> None:
    leaving = Leaving.from_environ({"ON_FINISH": "terminate", "FAIL_GRACE_MINUTES": "soon"}, {})
    assert leaving.finish.on_finish == "stop" and leaving.finish.fail_grace_minutes == 15.0
