"""The Hub's own client library in; one whose requests are sent once and end in time, while a `with` block lasts, out.

huggingface_hub 2.4.0 repeats some requests by itself (six times within 23 seconds, or after whatever time a server asks for)
and others never, and waits for an answer for ever. Here it does neither, so that one place decides what is repeated and how
long. What is not handled: uploads by hf-xet, which has a client of its own, and requests to other hosts than the Hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook

UNWELL = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524)
"""Answers of a server, or of what stands before it, that may be another one soon; 52x are Cloudflare's."""
CONNECT_SECONDS = 20.0


class UnwellError(Exception):
    """The Hub does not answer, or says that it cannot now.

    Args:
        retry_after_seconds: how long it asks to wait.
    """

    def __init__(self, text: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds


@contextmanager
def single_requests(endpoint: str, *, timeout_seconds: float) -> Iterator[None]:
    """Let each request to the Hub be sent once; what may go better another time raises an UnwellError.

    Args:
        timeout_seconds: silence that is waited for, in reading and in writing.
    """
    host = urlsplit(endpoint).netloc

    def make() -> httpx2.Client:
        timeout = httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS))
        client = _SingleClient(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=timeout)
        client.hub = host
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


class _SingleClient(httpx2.Client):
    hub = ""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        if request.url.netloc.decode() != self.hub:
            return super().send(request, **options)
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as error:
            raise UnwellError(f"it does not answer: {str(error) or type(error).__name__}") from error
        if response.status_code in UNWELL:
            response.close()
            raise UnwellError(f"it answered {response.status_code}", _retry_after_seconds(response.headers))
        return response


def _retry_after_seconds(headers: httpx2.Headers) -> float | None:
    """What `RateLimit` or `Retry-After` ask for; the second may be a date."""
    limits = parse_ratelimit_headers(headers)
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # neither a number nor a date, or one without a zone
        return None
