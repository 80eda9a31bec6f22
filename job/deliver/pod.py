"""A RunPod pod in, the same pod stopped or terminated: through API v2, else GraphQL, else `runpodctl`.

Not handled: whether and when, which is machine.py's; clusters, whose pods the API keeps for the cluster's own endpoints.
Sources: RunPod REST 2.0.0; for GraphQL and for what is printed, runpodctl 1.14 and 2.7 (read in November 2026).
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from requests import PreparedRequest
from requests.auth import AuthBase
from tenacity import RetryCallState, stop_after_attempt
from tenacity.stop import stop_base

from job.deliver.calls import CallError, ask, insist
from job.plan.price import RUNPOD_API, RUNPOD_SECONDS

Verb = Literal["stop", "terminate"]
RUNPOD_GRAPHQL = "https://api.runpod.io/graphql"  # RunPod retires it early in 2027: release notes of 2026-08-18
NUM_TRIES = 4
"""Of one way, with waits of about 1, 2 and 4 seconds between; who calls comes again in minutes."""
RUNPODCTL_SECONDS = 30.0
RUNPODCTL = {"stop": (("stop", "pod"), ("pod", "stop")), "terminate": (("remove", "pod"), ("pod", "delete"))}
"""The words that all its versions know, though the later ones hide them; then those of the later ones."""
MUTATIONS = {
    "stop": ("podStop", "mutation ($podId: String!) { podStop(input: {podId: $podId}) { id desiredStatus } }"),
    "terminate": ("podTerminate", "mutation ($podId: String!) { podTerminate(input: {podId: $podId}) }"),
}
LONGEST_REASON = 300
_KEY = re.compile(r"(api_key=|\brpa_|Bearer )[\w%.~+/=-]+")


class PodError(Exception):
    """No way led to it; says why each did not."""


class _Bearer(AuthBase):
    """Signs a request; a header alone would give way to what ~/.netrc has for the host."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


class _StopWhen(stop_base):
    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped

    def __call__(self, _state: RetryCallState) -> bool:
        return self._is_stopped()


def end_pod(
    verb: Verb,
    *,
    environ: Mapping[str, str],
    api_key: str | None,
    sleep: Callable[[float], object],
    is_stopped: Callable[[], bool],
) -> str:
    """Have RunPod stop or terminate the pod RUNPOD_POD_ID; returns the way that led there.

    Args:
        api_key: without one, only `runpodctl` is asked, which may have one of its own.
        is_stopped: asked between tries; True gives up.

    Raises:
        PodError: the pod still runs.
    """
    pod = environ["RUNPOD_POD_ID"]
    ways: dict[str, Callable[[], None]] = {}
    if api_key:
        sign = _Bearer(api_key)
        ways["RunPod's API"] = _RestCall(verb, pod, environ.get("RUNPOD_REST_URL", RUNPOD_API), sign)
        ways["RunPod's GraphQL"] = partial(_call_graphql, verb, pod, environ.get("RUNPOD_GRAPHQL_URL", RUNPOD_GRAPHQL), sign)
    ways["runpodctl"] = partial(_call_runpodctl, verb, pod, environ, api_key)
    failures = [] if api_key else ["there is no RUNPOD_API_KEY"]
    for name, way in ways.items():
        if is_stopped():
            break
        try:
            insist(way, stop=stop_after_attempt(NUM_TRIES) | _StopWhen(is_stopped), sleep=sleep)
        except CallError as error:
            failures.append(f"{name}: {_told(str(error), api_key, environ)}")
        else:
            return name
    raise PodError("; ".join(failures))


class _RestCall:
    """One request to API v2, to be made until it succeeds."""

    def __init__(self, verb: Verb, pod: str, base: str, sign: AuthBase) -> None:
        self._verb, self._url, self._sign = verb, f"{base.rstrip('/')}/pods/{quote(pod, safe='')}", sign
        self._may_have_arrived = False

    def __call__(self) -> None:
        try:
            if self._verb == "stop":
                ask("POST", f"{self._url}/action", body={"action": "stop"}, sign=self._sign, seconds=RUNPOD_SECONDS)
            else:
                ask("DELETE", self._url, sign=self._sign, seconds=RUNPOD_SECONDS)
        except CallError as error:
            # 404 is "gone" and "not yours" alike, 409 "stopped already" and "a cluster's" alike. This process runs on the
            # pod: to a first request either is a refusal, after one without an answer it is what that one did.
            if self._may_have_arrived and error.status in (404, 409):
                return
            self._may_have_arrived = self._may_have_arrived or error.status is None or error.status >= 500
            raise


def _call_graphql(verb: Verb, pod: str, url: str, sign: AuthBase) -> None:
    name, query = MUTATIONS[verb]
    text = ask("POST", url, body={"query": query, "variables": {"podId": pod}}, sign=sign, seconds=RUNPOD_SECONDS)
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise CallError("answered something else than JSON") from error
    answer = answer if isinstance(answer, dict) else {}
    if errors := answer.get("errors"):  # with status 200
        raise _graphql_error(errors)
    data = answer.get("data")
    if not isinstance(data, dict) or name not in data:
        raise CallError("does not say that it is done")
    if verb == "stop":  # podTerminate has no result
        status = data[name].get("desiredStatus") if isinstance(data[name], dict) else None
        if status != "EXITED":
            raise CallError(f"the pod's status is to be {status}")


def _graphql_error(errors: Any) -> CallError:
    found = [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    codes = [error["extensions"].get("code") for error in found if isinstance(error.get("extensions"), dict)]
    told = ", ".join(str(error.get("message")) for error in found)
    return CallError(f"answered: {told or errors}", is_transient="INTERNAL_SERVER_ERROR" in codes)


def _call_runpodctl(verb: Verb, pod: str, environ: Mapping[str, str], api_key: str | None) -> None:
    """Let the tool do it: on a pod it may have a key of its own. Ours goes by the environment: `ps` shows arguments to all."""
    tool = shutil.which("runpodctl", path=environ.get("PATH", ""))
    if tool is None:
        raise CallError("is not installed")
    wanted = ("PATH", "HOME", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
    passed = {name: value for name, value in environ.items() if name in wanted or name.startswith("RUNPOD_")}
    if api_key:
        passed["RUNPOD_API_KEY"] = api_key
    said = ""
    for words in RUNPODCTL[verb]:
        try:
            done = subprocess.run(
                [tool, *words, pod],
                env=passed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=RUNPODCTL_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CallError(f"does not run ({type(error).__name__})", is_transient=True) from error
        said = done.stdout.decode("utf-8", "replace")
        if done.returncode == 0 and "failed" not in said:  # `pod "x" stop failed; status is RUNNING` has status 0
            return
    raise CallError(f"said: {said}", is_transient=True)


def _told(text: str, api_key: str | None, environ: Mapping[str, str]) -> str:
    """One short line without a key in it: runpodctl prints the addresses that it asks, with the key in them."""
    for secret in (api_key, environ.get("RUNPOD_API_KEY")):
        if secret:
            text = text.replace(secret, "***").replace(quote(secret, safe=""), "***")
    flat = " ".join(_KEY.sub(r"\1***", text).split())
    return flat if len(flat) <= LONGEST_REASON else flat[: LONGEST_REASON - 1] + "…"
