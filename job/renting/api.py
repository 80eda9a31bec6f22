"""RunPod's API v2 as who rents a pod needs it: a question in, its answer out.

Asking is repeated while that may help; making a pod never is, for it might make two. Not handled: ending a pod (deliver/pod.py).
Sources: openapi.json of Runpod REST 2.0.0, and what its pages say of each status (November 2026).
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import requests
from tenacity import stop_after_attempt

from job.deliver.calls import CallError, insist
from job.errors import JobError, MachineError, NetworkError, PlanError, Problem, SettingsError

OLDEST_CUDA = "13.0"
"""Of the host's driver: torch's wheels in our image carry CUDA 13.0."""
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
"""Making a pod takes a while: RunPod's own example of it waits as long."""
NUM_TRIES = 5
CONSOLE = "https://console.runpod.io"
_BLOCK_BYTES = 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """One line that the container, or its host, has written.

    Attributes:
        id: what the stream is taken up from again.
        source: container or system.
    """

    id: str
    source: str
    text: str


class RunPod:
    """Who answers at a base address with this key.

    Args:
        base: RUNPOD_REST_URL, or RunPod's own address.
    """

    def __init__(self, base: str, api_key: str, *, sleep: Callable[[float], object] = time.sleep) -> None:
        self._base, self._api_key, self.sleep = base.rstrip("/"), api_key, sleep

    def gpus(self, *, cloud: str, num_gpus: int) -> list[dict[str, Any]]:
        """Every kind of GPU with its price, and whether as many of it are free for a pod that runs our image.

        Raises:
            CallError: as all methods here.
        """
        asked = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud, "count": num_gpus, "minCudaVersion": OLDEST_CUDA}
        found: list[dict[str, Any]] = self._ask(f"/catalog/gpus?{urlencode(asked)}")["gpus"]
        return found

    def volume(self, volume_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(f"/network-volumes/{quote(volume_id, safe='')}")
        return found

    def pods(self) -> list[dict[str, Any]]:
        """All of the account, but for those of clusters."""
        found: list[dict[str, Any]] = self._ask("/pods")["pods"]
        return found

    def pod(self, pod_id: str) -> dict[str, Any] | None:
        """None: there is none of that name, or no longer."""
        try:
            found: dict[str, Any] = self._ask(f"/pods/{quote(pod_id, safe='')}")
        except CallError as error:
            if error.status == 404:
                return None
            raise
        return found

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Rent a pod: one request, whatever comes of it."""
        made: dict[str, Any] = self._send("POST", "/pods", body)
        return made

    def logs(self, pod_id: str, *, last_id: str | None, num_before: int, quiet_seconds: float) -> Iterator[LogLine]:
        """Yield lines until the stream ends, or is silent for so long.

        Args:
            last_id: of the last line that is known; it and those of its time may come again.
            num_before: without it, how many of the lines that were written before are wanted.
        """
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        with self._open("GET", f"/pods/{quote(pod_id, safe='')}/logs?tail={num_before}", None, headers, quiet_seconds) as answer:
            rest, fields = b"", {"id": last_id or ""}
            while True:
                try:
                    block = answer.raw.read1(_BLOCK_BYTES)
                except Exception as error:  # urllib3's own: silence, or a connection that broke; either way it is taken up again
                    if not type(error).__module__.startswith(("urllib3", "http")):
                        raise
                    return
                if not block:
                    return
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield from _event(line.decode("utf-8", "replace").rstrip("\r"), fields)

    def _ask(self, path: str) -> Any:
        return insist(lambda: self._send("GET", path), stop=stop_after_attempt(NUM_TRIES), sleep=self.sleep)

    def _send(self, method: str, path: str, body: object = None) -> Any:
        with self._open(method, path, body, {}, ANSWER_SECONDS) as answer:
            try:
                return json.loads(answer.content)
            except ValueError as error:
                raise CallError("answered something else than JSON", is_transient=True, status=502) from error
            except OSError as error:
                raise CallError(f"gave no whole answer ({type(error).__name__})", is_transient=True) from error

    def _open(self, method: str, path: str, body: object, headers: dict[str, str], answer_seconds: float) -> requests.Response:
        """The answer, its body unread, when it is a success."""
        try:
            answer = requests.request(
                method,
                f"{self._base}{path}",
                json=body,
                headers={"User-Agent": "qlora-job", **headers},
                auth=self._sign,  # a header alone would give way to what ~/.netrc has for the host
                timeout=(CONNECT_SECONDS, answer_seconds),
                allow_redirects=False,  # they would carry the key elsewhere
                stream=True,
            )
        except (OSError, ValueError) as error:  # requests' own errors are OSErrors
            may_pass = isinstance(error, (requests.ConnectionError, requests.Timeout))
            raise CallError(f"gave no answer ({type(error).__name__})", is_transient=may_pass) from error
        if not 200 <= answer.status_code < 300:
            with answer:
                raise _refusal(answer)
        return answer

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def job_error(error: CallError, what: str) -> JobError:
    """What the user is told, and the exit status that it becomes.

    Args:
        what: was asked for.
    """
    told = f"RunPod {error} when asked for {what}"
    match error.status:
        case 401:
            rule, way_out = "RunPod does not accept it (401)", f"make a new one at {CONSOLE}/user/settings"
            return SettingsError([Problem(setting="RUNPOD_API_KEY", value="***", rule=rule, way_out=way_out)])
        case 402:
            return PlanError(f"{told}: the account's balance is too low; add credit at {CONSOLE}/user/billing and submit again")
        case 403:
            rule, way_out = f"it may not do this: {told}", f"give it that right at {CONSOLE}/user/settings, or make another one"
            return SettingsError([Problem(setting="RUNPOD_API_KEY", value="***", rule=rule, way_out=way_out)])
        case 404 | 422:
            return SettingsError([f"{told}; correct what it names"])
        case 400:
            return MachineError(f"{told}; correct what it names, or try again later")
        case _:
            return NetworkError(f"{told}; submit again when the network and RunPod are well")


def _event(line: str, fields: dict[str, str]) -> Iterator[LogLine]:
    """Take in one line of Server-Sent Events; the empty one ends an event."""
    name, _, value = line.partition(":")
    if name == "id":
        fields["id"] = value.strip()
    elif name == "data":
        fields["data"] = value.strip()
    elif not line and (data := fields.pop("data", None)) is not None:
        try:
            found = json.loads(data)
            yield LogLine(id=fields["id"], source=str(found["source"]), text=str(found["line"]))
        except (ValueError, KeyError, TypeError):  # not of the described shape: shown as it is
            yield LogLine(id=fields["id"], source="container", text=data)


def _refusal(answer: requests.Response) -> CallError:
    status = answer.status_code
    try:
        found = json.loads(answer.content)
        told = "; ".join(str(part) for part in (found.get("detail"), *(found.get("errors") or ())) if part)
    except (OSError, ValueError, AttributeError):
        told = ""
    wait = answer.headers.get("Retry-After", "")
    return CallError(
        f"answered {status}{f' ({told})' if told else ''}",
        is_transient=status == 429 or status >= 500,
        status=status,
        retry_after_seconds=float(wait) if wait.isdigit() else 0.0,  # whole seconds, says RunPod
    )
