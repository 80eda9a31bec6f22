"""The end of a rented pod: which end it gets, by which way, when not at once, and what happens when no way leads there."""

import itertools
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from runpod_server import ALWAYS, RunPodServer, check_shape

from job.deliver.calls import LONGEST_WAIT_SECONDS
from job.deliver.machine import (
    HEARTBEAT_SECONDS,
    NOTIFY_AGAIN_SECONDS,
    TRY_AGAIN_SECONDS,
    choose_action,
    finish_machine,
    is_own_pod,
)
from job.deliver.pod import NUM_TRIES

STATUSES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 75)
OTHER_STATUSES = (130, 137, -9)
LONGEST_SILENCE_SECONDS = 600.0


class Story:
    """Time that passes when somebody waits, and all that was said, notified and done in it."""

    def __init__(self, keep_file: Path) -> None:
        self.now = 0.0
        self.said: list[tuple[float, str]] = []
        self.notified: list[tuple[float, str]] = []
        self.has_signal = False
        self.keep_file = keep_file
        self.events: list[tuple[float, Callable[[], object]]] = []
        """What happens at a time, in order."""

    def at(self, seconds: float, event: Callable[[], object]) -> None:
        self.events.append((seconds, event))

    def signal_at(self, seconds: float) -> None:
        self.at(seconds, lambda: setattr(self, "has_signal", True))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.said)

    def finish(self, environ: Mapping[str, str], **arguments: Any) -> None:
        wanted = {
            "on_finish": "stop",
            "fail_grace_minutes": 0.0,
            "exit_status": 0,
            "output_is_off_machine": True,
            "api_key": None,
        }
        finish_machine(
            **{**wanted, **arguments},
            environ=environ,
            say=lambda text: self.said.append((self.now, text)),
            is_stopped=lambda: self.has_signal,
            notify=lambda text: self.notified.append((self.now, text)),
            keep_file=self.keep_file,
            sleep=self.sleep,
            clock=lambda: self.now,
        )


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "keep-this-pod")


@pytest.fixture
def runpod() -> Iterator[RunPodServer]:
    with RunPodServer() as server:
        server.add_pod("p1")
        yield server


def calls(runpod: RunPodServer) -> list[str]:
    return [f"{request.method} {request.path}" for request in runpod.log]


REST_STOP, REST_DELETE, GRAPHQL = "POST /v2/pods/p1/action", "DELETE /v2/pods/p1", "POST /graphql"


def write_runpodctl(folder: Path, script: str) -> dict[str, str]:
    """A real `runpodctl` that notes its arguments and its key, and then does what a Python script says."""
    folder.mkdir()
    tool = folder / "runpodctl"
    notes = f"import json, os, sys\nwith open({str(folder / 'calls')!r}, 'a') as notes:\n"
    notes += "    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=notes)\n"
    tool.write_text(f"#!{sys.executable} -IS\n{notes}{script}\n", "utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return {"PATH": str(folder)}


def runpodctl_calls(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    import json

    path = folder / "calls"
    return [tuple(json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


# What is to be done


@pytest.mark.parametrize("status", [*STATUSES, *OTHER_STATUSES])
@pytest.mark.parametrize("on_finish", ["exit", "stop", "terminate"])
@pytest.mark.parametrize("is_off", [False, True])
@pytest.mark.parametrize("has_signal", [False, True])
def test_every_end_has_its_action(status: int, on_finish: str, is_off: bool, has_signal: bool) -> None:
    choice = choose_action(on_finish=on_finish, exit_status=status, output_is_off_machine=is_off, has_signal=has_signal)
    is_good = status in (0, 6, 8)
    if on_finish == "exit" or has_signal:
        expected = "exit"
    elif on_finish == "terminate" and is_good and is_off:
        expected = "terminate"
    else:
        expected = "stop"
    assert choice.action == expected
    assert choice.has_grace == (expected == "stop" and not is_good)
    assert bool(choice.why) == (choice.action != on_finish)


def test_a_pod_is_destroyed_in_three_of_all_cases() -> None:
    destroyed = [
        (status, is_off, has_signal)
        for status, on_finish, is_off, has_signal in itertools.product(
            [*STATUSES, *OTHER_STATUSES], ["exit", "stop", "terminate"], [False, True], [False, True]
        )
        if choose_action(on_finish=on_finish, exit_status=status, output_is_off_machine=is_off, has_signal=has_signal).action
        == "terminate"
    ]
    assert destroyed == [(0, True, False), (6, True, False), (8, True, False)]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"RUNPOD_POD_ID": ""}, False),
        ({"RUNPOD_POD_ID": "p1"}, True),
        ({"RUNPOD_POD_ID": "p1", "RUNPOD_WEBHOOK_GET_JOB": "https://x"}, False),
        ({"RUNPOD_POD_ID": "p1", "NUM_NODES": "2", "NODE_ADDR": "10.65.0.2", "NODE_RANK": "0"}, True),
        ({"RUNPOD_POD_ID": "p1", "NUM_NODES": "2", "NODE_ADDR": "10.65.0.3", "NODE_RANK": "1"}, False),
    ],
)
def test_only_a_pod_of_ones_own_is_ended(environ: dict[str, str], expected: bool) -> None:
    assert is_own_pod(environ) is expected


@pytest.mark.parametrize("extra", [{"RUNPOD_WEBHOOK_GET_JOB": "https://x"}, {"NODE_RANK": "1"}, {"RUNPOD_POD_ID": ""}])
def test_what_is_not_ones_own_pod_is_let_be(story: Story, runpod: RunPodServer, extra: dict[str, str]) -> None:
    story.finish({**runpod.environ("p1"), **extra}, api_key=runpod.api_key)
    assert (runpod.log, story.said, story.now) == ([], [], 0.0)


def test_exit_does_nothing_and_says_nothing(story: Story, runpod: RunPodServer) -> None:
    story.finish(runpod.environ("p1"), on_finish="exit", exit_status=3, fail_grace_minutes=15, api_key=runpod.api_key)
    assert (runpod.log, story.said, story.now) == ([], [], 0.0)


# The ways


@pytest.mark.parametrize("status", [0, 6, 8])
def test_a_good_end_stops_the_pod_at_once_through_the_api(story: Story, runpod: RunPodServer, status: int) -> None:
    story.finish(runpod.environ("p1"), exit_status=status, fail_grace_minutes=15, api_key=runpod.api_key)
    assert runpod.pods["p1"].status == "EXITED"
    assert calls(runpod) == [REST_STOP]
    assert story.said[0] == (0.0, "pod p1 stops: RunPod has agreed (asked through RunPod's API)")


def test_terminate_deletes_the_pod(story: Story, runpod: RunPodServer) -> None:
    story.finish(runpod.environ("p1"), on_finish="terminate", api_key=runpod.api_key)
    assert runpod.pods == {} and calls(runpod) == [REST_DELETE]


def test_a_pod_whose_disk_holds_the_output_is_stopped_instead_of_deleted(story: Story, runpod: RunPodServer) -> None:
    story.finish(runpod.environ("p1"), on_finish="terminate", output_is_off_machine=False, api_key=runpod.api_key)
    assert runpod.pods["p1"].status == "EXITED"
    assert "ON_FINISH=terminate: pod p1 is stopped, not terminated: OUTPUT_URI is on the pod's own disk" in story.text


def test_after_runpod_agrees_the_process_waits_a_minute_to_be_killed(story: Story, runpod: RunPodServer) -> None:
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert story.now == 60.0 and "this process still runs" in story.said[-1][1]


@pytest.mark.parametrize(("on_finish", "left"), [("stop", ["EXITED"]), ("terminate", [])])
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_tried_again_on_the_same_way(
    story: Story, runpod: RunPodServer, status: int, on_finish: str, left: list[str]
) -> None:
    runpod.fail("/v2/", status=status)
    story.finish(runpod.environ("p1"), on_finish=on_finish, api_key=runpod.api_key)
    assert calls(runpod) == [REST_STOP if on_finish == "stop" else REST_DELETE, GRAPHQL]
    assert story.said[0][0] == 0.0
    assert [pod.status for pod in runpod.pods.values()] == left


def test_a_busy_api_is_asked_again_when_it_says_so(story: Story, runpod: RunPodServer) -> None:
    runpod.fail("/v2/", status=429, headers={"Retry-After": "37"})
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert calls(runpod) == [REST_STOP, REST_STOP]
    assert 37 <= story.said[0][0] < 39


def test_a_busy_api_may_name_a_date(story: Story, runpod: RunPodServer) -> None:
    from email.utils import formatdate

    runpod.fail("/v2/", status=429, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)})
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert 27 <= story.said[0][0] <= 32 and calls(runpod) == [REST_STOP, REST_STOP]


@pytest.mark.parametrize("value", ["86400", "inf", "nan", "soon", "-5", "Wed, 32 Nov 2026 99:99:99 GMT"])
def test_no_retry_after_makes_it_wait_for_long(story: Story, runpod: RunPodServer, value: str) -> None:
    runpod.fail("/v2/", status=429, headers={"Retry-After": value})
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert story.said[0][0] <= LONGEST_WAIT_SECONDS and calls(runpod) == [REST_STOP, REST_STOP]


@pytest.mark.parametrize("broken", [{"status": 500}, {"status": 503}, {"kind": "reset"}])
def test_a_broken_api_is_tried_with_growing_waits_and_then_graphql(
    story: Story, runpod: RunPodServer, broken: dict[str, Any]
) -> None:
    runpod.fail("/v2/", times=ALWAYS, **broken)
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert calls(runpod) == [REST_STOP] * NUM_TRIES + [GRAPHQL]
    assert 1 + 2 + 4 <= story.said[0][0] <= 1 + 2 + 4 + NUM_TRIES
    assert runpod.pods["p1"].status == "EXITED" and "GraphQL" in story.text


@pytest.mark.parametrize("on_finish", ["stop", "terminate"])
def test_a_request_whose_answer_is_lost_counts_when_the_next_one_finds_it_done(
    story: Story, runpod: RunPodServer, on_finish: str
) -> None:
    runpod.fail("/v2/", kind="lost")
    story.finish(runpod.environ("p1"), on_finish=on_finish, api_key=runpod.api_key)
    assert GRAPHQL not in calls(runpod) and len(runpod.log) == 2
    assert story.notified == []


def test_not_found_to_the_first_request_is_a_key_of_somebody_else(story: Story, runpod: RunPodServer) -> None:
    story.signal_at(400)
    story.finish(runpod.environ("p2"), on_finish="terminate", api_key=runpod.api_key)
    assert [call for call in calls(runpod) if "/v2/" in call] == ["DELETE /v2/pods/p2"] * 2
    assert "POD p2 IS STILL BILLING" in story.text and "404 (resource not found)" in story.text


def test_a_pod_of_a_cluster_is_told_in_runpods_own_words(story: Story, runpod: RunPodServer) -> None:
    runpod.add_pod("p1", cluster="c1")
    runpod.fail("/graphql", status=403, times=ALWAYS)
    story.signal_at(10)
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert "409 (Pod belongs to a cluster" in story.text


@pytest.mark.parametrize("on_finish", ["stop", "terminate"])
def test_runpodctl_is_the_last_way(story: Story, runpod: RunPodServer, tmp_path: Path, on_finish: str) -> None:
    runpod.fail("/v2/", status=403, times=ALWAYS)
    runpod.fail("/graphql", status=403, times=ALWAYS)
    path = write_runpodctl(tmp_path / "bin", "print('pod \"p1\" stopped')")
    other = {"HF_TOKEN": "hf_planted", "AWS_SECRET_ACCESS_KEY": "planted"}
    story.finish({**runpod.environ("p1"), **other, **path}, on_finish=on_finish, api_key=runpod.api_key)
    ((arguments, environ),) = runpodctl_calls(tmp_path / "bin")
    assert arguments == ["stop" if on_finish == "stop" else "remove", "pod", "p1"]
    assert environ["RUNPOD_API_KEY"] == runpod.api_key and not other.keys() & environ.keys()
    assert "asked through runpodctl" in story.text


def test_without_a_key_only_runpodctl_is_asked(story: Story, runpod: RunPodServer, tmp_path: Path) -> None:
    path = write_runpodctl(tmp_path / "bin", "pass")
    story.finish({**runpod.environ("p1"), **path})
    assert runpod.log == []
    assert [arguments for arguments, _ in runpodctl_calls(tmp_path / "bin")] == [["stop", "pod", "p1"]]
    assert "RUNPOD_API_KEY" not in runpodctl_calls(tmp_path / "bin")[0][1]


@pytest.mark.parametrize(("on_finish", "words"), [("stop", ["pod", "stop", "p1"]), ("terminate", ["pod", "delete", "p1"])])
def test_a_runpodctl_without_the_old_words_is_asked_with_the_new_ones(
    story: Story, tmp_path: Path, on_finish: str, words: list[str]
) -> None:
    path = write_runpodctl(tmp_path / "bin", "sys.exit(sys.argv[1] != 'pod')")
    story.finish({"RUNPOD_POD_ID": "p1", **path}, on_finish=on_finish)
    assert [arguments for arguments, _ in runpodctl_calls(tmp_path / "bin")][-1] == words
    assert story.notified == []


def test_a_runpodctl_that_reports_its_failure_with_status_0_is_not_believed(story: Story, tmp_path: Path) -> None:
    path = write_runpodctl(tmp_path / "bin", "print('pod \"p1\" stop failed; status is RUNNING')")
    story.signal_at(20)
    story.finish({"RUNPOD_POD_ID": "p1", **path})
    assert "STILL BILLING" in story.text and "stop failed; status is RUNNING" in story.text


def test_a_graphql_that_answers_200_with_errors_is_not_believed(story: Story, runpod: RunPodServer) -> None:
    del runpod.pods["p1"]
    story.signal_at(20)
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert "RunPod's GraphQL: answered: pod not found" in story.text


# Not at once


@pytest.mark.parametrize("status", [1, 2, 3, 4, 5, 7, 75])
def test_a_failed_runs_pod_waits_for_somebody_to_look(story: Story, runpod: RunPodServer, status: int) -> None:
    story.finish(runpod.environ("p1"), on_finish="stop", exit_status=status, fail_grace_minutes=15, api_key=runpod.api_key)
    assert story.said[0] == (0.0, f"THE RUN FAILED with exit status {status}: pod p1 stops in 15 minutes (FAIL_GRACE_MINUTES)")
    assert f"touch {story.keep_file}" in story.said[1][1] and f"touch {story.keep_file}" in story.notified[0][1]
    assert next(when for when, text in story.said if "has agreed" in text) == 900.0
    assert runpod.pods["p1"].status == "EXITED"


def test_a_grace_of_0_is_none(story: Story, runpod: RunPodServer) -> None:
    story.finish(runpod.environ("p1"), exit_status=7, fail_grace_minutes=0, api_key=runpod.api_key)
    assert (story.said[0][0], len(runpod.log), story.notified) == (0.0, 1, [])


def test_a_signal_in_the_grace_leaves_the_pod(story: Story, runpod: RunPodServer) -> None:
    story.signal_at(100)
    story.finish(runpod.environ("p1"), exit_status=3, fail_grace_minutes=15, api_key=runpod.api_key)
    assert runpod.log == [] and 100 <= story.now <= 101
    assert "a signal came: pod p1 is left" in story.text


@pytest.mark.parametrize("on_finish", ["stop", "terminate"])
@pytest.mark.parametrize("status", [0, 75])
def test_a_signal_before_leaves_the_pod(story: Story, runpod: RunPodServer, on_finish: str, status: int) -> None:
    story.has_signal = True
    story.finish(runpod.environ("p1"), on_finish=on_finish, exit_status=status, fail_grace_minutes=15, api_key=runpod.api_key)
    assert (runpod.log, story.now) == ([], 0.0) and "stopped by a signal" in story.text


def test_a_file_on_the_machine_keeps_the_pod_until_it_is_deleted(story: Story, runpod: RunPodServer) -> None:
    story.at(100, story.keep_file.touch)
    story.at(5000, story.keep_file.unlink)
    story.finish(runpod.environ("p1"), exit_status=3, fail_grace_minutes=15, api_key=runpod.api_key)
    agreed = next(when for when, text in story.said if "has agreed" in text)
    assert 5000 <= agreed <= 5002 and "WHICH IS BILLING" in story.text
    assert runpod.pods["p1"].status == "EXITED"


def test_the_wait_is_never_silent_for_ten_minutes(story: Story, runpod: RunPodServer) -> None:
    story.at(3 * 3600, story.keep_file.touch)
    story.at(6 * 3600, story.keep_file.unlink)
    story.finish(runpod.environ("p1"), exit_status=3, fail_grace_minutes=200, api_key=runpod.api_key)
    times = [when for when, _ in story.said]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[-1] > 6 * 3600 and max(gaps) <= LONGEST_SILENCE_SECONDS
    assert len(times) < 6 * 3600 / HEARTBEAT_SECONDS + 10


# No way leads there


def test_a_pod_that_no_way_ends_is_told_loudly_and_tried_again_until_it_is_ended(story: Story, runpod: RunPodServer) -> None:
    runpod.fail("/", status=403, times=ALWAYS)
    story.at(3 * TRY_AGAIN_SECONDS + 10, runpod.heal)
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    alarms = [when for when, text in story.said if "POD p1 IS STILL BILLING" in text]
    assert len(alarms) == 4 and "https://console.runpod.io/pods" in story.said[0][1]
    assert runpod.pods["p1"].status == "EXITED"
    assert [text.partition(",")[0] for _, text in story.notified] == ["POD p1 IS STILL BILLING", "pod p1 stops after all"]


def test_it_stays_for_days_and_reminds_every_hour(story: Story, runpod: RunPodServer) -> None:
    runpod.fail("/", status=401, times=ALWAYS)
    story.signal_at(10 * 3600)
    story.finish(runpod.environ("p1"), exit_status=3, api_key=runpod.api_key)
    assert 10 * 3600 <= story.now <= 10 * 3600 + 1
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(story.notified)]
    assert len(gaps) >= 9 and all(NOTIFY_AGAIN_SECONDS <= gap <= NOTIFY_AGAIN_SECONDS + TRY_AGAIN_SECONDS for gap in gaps)
    assert runpod.pods["p1"].status == "RUNNING"


def test_a_signal_between_two_tries_ends_them(story: Story, runpod: RunPodServer) -> None:
    runpod.fail("/v2/", status=500, times=ALWAYS)
    story.signal_at(0.5)
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert len(runpod.log) <= 2 and story.now <= 2 and "STILL BILLING" not in story.text


def test_a_runpod_that_is_not_there_is_told_too(story: Story) -> None:
    with RunPodServer() as server:
        environ = server.environ("p1")
    story.signal_at(30)
    story.finish(environ, api_key="rpa_planted")
    assert "no answer (ConnectionError)" in story.text and "runpodctl: is not installed" in story.text


def test_nothing_that_goes_wrong_here_is_raised(runpod: RunPodServer, tmp_path: Path) -> None:
    class BrokenClock(Exception):
        pass

    def clock() -> float:
        raise BrokenClock(runpod.api_key)

    said: list[str] = []
    finish_machine(
        on_finish="stop",
        fail_grace_minutes=0,
        exit_status=0,
        environ=runpod.environ("p1"),
        api_key=runpod.api_key,
        output_is_off_machine=True,
        say=said.append,
        is_stopped=lambda: False,
        notify=said.append,
        keep_file=tmp_path / "keep",
        clock=clock,
    )
    assert len(said) == 1 and "BrokenClock" in said[0] and "may still be billing" in said[0] and runpod.api_key not in said[0]


def test_the_key_is_in_no_message_and_on_no_command_line(story: Story, runpod: RunPodServer, tmp_path: Path) -> None:
    own = "another-one-of-the-pod-itself"
    script = (
        "from urllib.parse import quote\n"
        "key = os.environ['RUNPOD_API_KEY']\n"
        "print(f'Post \"https://api.runpod.io/graphql?api_key={key}\": x509: no authority')\n"
        "print(key, quote(key, safe=''))\n"
        f"print('{own}', 'rpa_somebody', 'api_key=other%2Bkey&x')\n"
        "sys.exit(1)"
    )
    path = write_runpodctl(tmp_path / "bin", script)
    runpod.fail("/", status=401, times=ALWAYS)
    story.signal_at(100)
    environ = {**runpod.environ("p1"), "RUNPOD_API_KEY": own, **path}
    story.finish(environ, exit_status=3, fail_grace_minutes=1, api_key=runpod.api_key)
    told = "\n".join(text for _, text in [*story.said, *story.notified])
    assert "x509" in told
    for secret in (runpod.api_key, "planted%2Fkey%2B1", own, "rpa_somebody", "other%2Bkey"):
        assert secret not in told
    assert all(runpod.api_key not in " ".join(arguments) for arguments, _ in runpodctl_calls(tmp_path / "bin"))
    assert all(runpod.api_key not in request.path + request.body for request in runpod.log)


def test_the_key_stays_with_runpod_when_the_address_moves(story: Story, runpod: RunPodServer) -> None:
    with RunPodServer() as other:
        runpod.fail("/", status=307, headers={"Location": f"{other.url}/v2/pods/p1/action"}, times=ALWAYS)
        story.signal_at(10)
        story.finish(runpod.environ("p1"), api_key=runpod.api_key)
        assert other.log == [] and "redirects are not followed" in story.text


def test_a_netrc_does_not_replace_the_key(
    story: Story, runpod: RunPodServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n", "utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    story.finish(runpod.environ("p1"), api_key=runpod.api_key)
    assert [request.authorization for request in runpod.log] == [f"Bearer {runpod.api_key}"]


def test_with_the_real_clock_a_signal_ends_the_wait_within_two_seconds(runpod: RunPodServer, tmp_path: Path) -> None:
    signal = threading.Event()
    threading.Timer(0.3, signal.set).start()
    began = time.monotonic()
    finish_machine(
        on_finish="stop",
        fail_grace_minutes=15,
        exit_status=3,
        environ=runpod.environ("p1"),
        api_key=runpod.api_key,
        output_is_off_machine=True,
        say=lambda _: None,
        is_stopped=signal.is_set,
        notify=lambda _: None,
        keep_file=tmp_path / "keep",
    )
    assert time.monotonic() - began < 2 and runpod.log == []


# The RunPod of these tests


@pytest.mark.parametrize(
    "wrong", [{"id": "p1"}, {"title": "Not Found", "status": "404", "detail": "x"}, {"action": "pause"}], ids=str
)
def test_an_answer_that_runpod_would_not_give_is_refused(wrong: dict[str, Any]) -> None:
    import jsonschema  # type: ignore[import-untyped]

    for name in ("Pod", "ErrorResponse", "PodActionRequest"):
        with pytest.raises(jsonschema.ValidationError):
            check_shape(name, wrong)


def test_the_server_answers_what_price_asks(runpod: RunPodServer) -> None:
    from job.plan.price import runpod_price

    price, complaint = runpod_price(runpod.environ("p1"), runpod.api_key)
    assert price is not None and (price.usd_per_hour, complaint) == (0.44, None)
