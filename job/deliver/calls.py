"""An HTTP request in, its answer out; sent again while the server may yet take it.

An error's text never holds the address nor a header, for either may be a secret. Redirects are refused: they would carry the
secret elsewhere.
"""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import TypeVar

import requests
from requests.auth import AuthBase
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter
from tenacity.stop import stop_base

LONGEST_WAIT_SECONDS = 60.0
"""However much later a server asks to be asked again."""
_BLOCK_BYTES, _NUM_BLOCKS = 8192, 8
"""As much of an answer as is read; RunPod's description of a pod has 2 KB."""
_BACKOFF = wait_exponential_jitter(1, 8)
_Result = TypeVar("_Result")


class CallError(Exception):
    """What was asked for is not done.

    Attributes:
        is_transient: whether the same request may succeed later.
        status: the answer's; None when there was no answer.
        retry_after_seconds: how long the server asks to wait.
    """

    def __init__(
        self, text: str, *, is_transient: bool = False, status: int | None = None, retry_after_seconds: float = 0.0
    ) -> None:
        super().__init__(text)
        self.is_transient, self.status, self.retry_after_seconds = is_transient, status, retry_after_seconds


def insist(action: Callable[[], _Result], *, stop: stop_base, sleep: Callable[[float], object]) -> _Result:
    """Do what may raise CallError, again and again while that is transient and `stop` lets it."""

    def pause(seconds: float) -> None:
        sleep(seconds)

    return Retrying(retry=retry_if_exception(_is_transient), stop=stop, wait=_wait, sleep=pause, reraise=True)(action)


def ask(
    method: str,
    url: str,
    *,
    seconds: float,
    body: object = None,
    sign: AuthBase | None = None,
    reads_answer: bool = True,
    repeats_unanswered: bool = True,
) -> str:
    """Send one request, and return the beginning of the answer when that is a success.

    Args:
        seconds: for the connection, and again for each silence of the server.
        body: what is sent as JSON.
        sign: adds the credentials; without one, ~/.netrc would be asked for some.
        reads_answer: False where its status is all that counts.
        repeats_unanswered: whether a request that was sent and had no answer is transient: sent twice, it may do it twice.

    Raises:
        CallError: it is no success.
    """
    headers = {"User-Agent": "qlora-job"}  # some gateways refuse the names of HTTP libraries
    try:
        with requests.request(
            method, url, json=body, headers=headers, auth=sign, timeout=seconds, allow_redirects=False, stream=True
        ) as answer:
            if not 200 <= answer.status_code < 300:
                raise _refusal(answer)
            return _beginning(answer) if reads_answer else ""
    except (OSError, ValueError) as error:  # requests' own errors are OSErrors; an address may also be no text for a name server
        name = type(error).__name__
        is_silent = isinstance(error, requests.ReadTimeout)
        if isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)):
            raise CallError(f"no answer ({name})", is_transient=repeats_unanswered or not is_silent) from error
        raise CallError(f"cannot be sent ({name})") from error


def _refusal(answer: requests.Response) -> CallError:
    status = answer.status_code
    told = _problem(answer)
    hint = " (redirects are not followed)" if 300 <= status < 400 else f" ({told})" if told else ""
    return CallError(
        f"answered {status}{hint}",
        is_transient=status == 429 or status >= 500,
        status=status,
        retry_after_seconds=_retry_after_seconds(answer.headers.get("Retry-After", "")),
    )


def _problem(answer: requests.Response) -> str:
    """What RFC 9457 calls the detail of a problem."""
    if answer.headers.get("Content-Type", "").partition(";")[0] != "application/problem+json":
        return ""
    try:
        found = json.loads(_beginning(answer))
    except (OSError, ValueError):
        return ""
    return str(found.get("detail", "")) if isinstance(found, dict) else ""


def _beginning(answer: requests.Response) -> str:
    return b"".join(islice(answer.iter_content(_BLOCK_BYTES), _NUM_BLOCKS)).decode("utf-8", "replace")


def _retry_after_seconds(value: str) -> float:
    """Of the header: a number of seconds, or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, CallError) and error.is_transient


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_seconds if isinstance(error, CallError) else 0.0
    return max(_BACKOFF(state), min(asked, LONGEST_WAIT_SECONDS))
