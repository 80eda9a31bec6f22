"""Messages to WEBHOOK_URL: what is in them, in which shape, and that no server can fail, delay or overhear a run."""

import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.deliver.notify import (
    CHECKPOINT_SECONDS,
    MAX_WAITING,
    SILENCE_SECONDS,
    TOTAL_SECONDS,
    Notifier,
    Standing,
    shape_for,
)

SLACK = "https://hooks.slack.com/services/T0/B0/xoxtoken"
DISCORD = "https://discord.com/api/webhooks/1/discordtoken"
OTHER = "https://example.org/hook?token=othertoken"
WHOLE = Standing(step=40, num_steps=120, loss=1.25, eval_loss=1.5, seconds=3600.0, cost_usd=0.414)


def redactor(*secrets: str) -> Callable[[str], str]:
    def redact(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        return text

    return redact


class Received(NamedTuple):
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    at: float


class Hook:
    """A server that records what is posted to it, and answers as it is told."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.num_requests = 0
        self.answers: list[tuple[int, dict[str, str]]] = []
        """Of the next requests; then 204."""
        self.is_hanging = False
        self.dribbles = False
        """One byte of an answer that never ends, every tenth of a second."""
        self.num_resets = 0
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.base}/hook/secrettoken"

    def stop(self) -> None:
        self.is_hanging = self.dribbles = False
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, count: int, seconds: float = 3.0) -> list[dict[str, Any]]:
        """The bodies, as soon as there are so many."""
        deadline = time.monotonic() + seconds
        while len(self.received) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return [received.body for received in self.received]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what this is for."""


def _handler(hook: Hook) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.num_requests += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hook.num_resets:
                hook.num_resets -= 1
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            while hook.is_hanging:
                time.sleep(0.02)
            while hook.dribbles:
                self.wfile.write(b"H")
                time.sleep(0.1)
            status, headers = hook.answers.pop(0) if hook.answers else (204, {})
            if status < 300:
                hook.received.append(Received(self.path, json.loads(body), dict(self.headers.items()), time.monotonic()))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.stop()


Make = Callable[..., Notifier]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(hook: Hook, said: list[str]) -> Make:
    def make(url: str | None = hook.url, **arguments: Any) -> Notifier:
        wanted = {"run_id": "r1", "redact": redactor("planted"), "say": said.append}
        return Notifier(url, **{**wanted, **arguments})

    return make


# What is in a message


def test_the_end_of_a_run_is_told_with_all_its_numbers(hook: Hook, make: Make, said: list[str]) -> None:
    where = {"hub": "https://hub/o/n", "store": "s3://b/r1", "report": "s3://b/r1/report.json"}
    make().stopped(WHOLE, status=8, stopped="budget", reason="MAX_HOURS=1: reached", **where)
    assert [received.body for received in hook.received] == [
        {
            "event": "stopped",
            "run_id": "r1",
            "status": 8,
            "stopped": "budget",
            "reason": "MAX_HOURS=1: reached",
            "step": 40,
            "num_steps": 120,
            "loss": 1.25,
            "eval_loss": 1.5,
            "seconds": 3600.0,
            "cost_usd": 0.414,
            "links": where,
            "text": "run r1: budget, exit status 8; step 40 of 120, loss 1.25, held-out loss 1.5, 1.00 h, $0.41; "
            "MAX_HOURS=1: reached; https://hub/o/n",
        }
    ]
    assert hook.received[0].headers["Content-Type"] == "application/json" and said == []


def test_every_event_has_the_same_fields(hook: Hook, make: Make) -> None:
    notifier = make()
    notifier.started(Standing(num_steps=120), store="s3://b/r1")
    notifier.checkpoint(WHOLE)
    hook.wait_for(2)
    notifier.stopped(Standing(), status=0, stopped="finished")
    notifier.tell("pod p1 stops")
    bodies = hook.wait_for(4)
    assert [body["event"] for body in bodies] == ["started", "checkpoint", "stopped", "machine"]
    assert len({tuple(sorted(body)) for body in bodies}) == 1
    assert all(set(body["links"]) == {"hub", "store", "report"} for body in bodies)
    assert [body["text"] for body in bodies] == [
        "run r1: started, 120 steps in all",
        "run r1: checkpoint, step 40 of 120, loss 1.25, held-out loss 1.5, 1.00 h, $0.41",
        "run r1: finished",
        "run r1: pod p1 stops",
    ]
    assert bodies[2]["cost_usd"] == "unknown" and bodies[0]["links"]["store"] == "s3://b/r1"


def test_a_later_start_says_where_it_goes_on(hook: Hook, make: Make) -> None:
    make().started(Standing(step=40, num_steps=120))
    assert hook.wait_for(1)[0]["text"] == "run r1: goes on after step 40, 120 steps in all"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_told_all_the_same(hook: Hook, make: Make, said: list[str], loss: float) -> None:
    make().stopped(Standing(step=3, loss=loss), status=7, stopped="diverged")
    (body,) = hook.wait_for(1)
    assert (body["loss"], said) == (None, []) and f"loss {loss:g}" in body["text"]


def test_a_reason_of_several_lines_is_one_line_of_text(hook: Hook, make: Make) -> None:
    make().stopped(Standing(), status=2, stopped="crashed", reason="A: is wrong\nB: is wrong\n")
    (body,) = hook.wait_for(1)
    assert "A: is wrong B: is wrong" in body["text"] and "\n" not in body["text"]


def test_a_text_that_is_no_unicode_is_sent(hook: Hook, make: Make, said: list[str]) -> None:
    make().stopped(Standing(), status=3, stopped="crashed", reason="file \udcff.jsonl")
    (body,) = hook.wait_for(1)
    assert body["reason"].encode() == b"file ?.jsonl" and said == []


# Shapes


def message(text: str) -> dict[str, Any]:
    return {"event": "machine", "run_id": "r1", "text": text}


@pytest.mark.parametrize(
    ("url", "shape"),
    [
        (SLACK, {"text"}),
        ("https://HOOKS.Slack.com:443/services/x", {"text"}),
        ("https://hooks.slack-gov.com/services/x", {"text"}),
        (DISCORD, {"content", "allowed_mentions"}),
        ("https://discordapp.com/api/webhooks/1/t", {"content", "allowed_mentions"}),
        ("https://canary.discord.com/api/v10/webhooks/1/t?wait=true", {"content", "allowed_mentions"}),
        (f"{DISCORD}/slack", {"text"}),
        (OTHER, {"event", "run_id", "text"}),
        ("https://hooks.slack.com.example.org/services/x", {"event", "run_id", "text"}),
        ("https://notdiscord.com/api/webhooks/1/t", {"event", "run_id", "text"}),
        ("https://example.org/?next=https://hooks.slack.com/", {"event", "run_id", "text"}),
        ("https://discord.com/channels/1", {"event", "run_id", "text"}),
    ],
)
def test_the_shape_follows_from_the_host(url: str, shape: set[str]) -> None:
    assert set(shape_for(url, message("hello"))) == shape


def test_slack_gets_its_three_characters_escaped() -> None:
    assert shape_for(SLACK, message("a < b & <!channel>")) == {"text": "a &lt; b &amp; &lt;!channel&gt;"}


def test_discord_gets_no_markdown_and_mentions_nobody() -> None:
    body = shape_for(DISCORD, message("@everyone __main__ *x* [a](b) https://hub/o/a_b_c"))
    assert body["content"] == r"@everyone \_\_main\_\_ \*x\* \[a\](b) https://hub/o/a_b_c"
    assert body["allowed_mentions"] == {"parse": []}


@given(st.text(alphabet=st.sampled_from("a_*&<>😀é\n `"), min_size=0, max_size=5000))
def test_no_text_is_too_long_for_discord_or_slack(text: str) -> None:
    content = shape_for(DISCORD, message(text))["content"]
    assert len(content.encode("utf-16-le")) // 2 <= 2000
    assert len(shape_for(SLACK, message(text))["text"]) <= 40_000


def test_a_text_that_is_cut_keeps_its_beginning() -> None:
    content = shape_for(DISCORD, message("x" * 2001))["content"]
    assert content == "x" * 1999 + "…"
    assert shape_for(DISCORD, message("x" * 2000))["content"] == "x" * 2000
    assert shape_for(DISCORD, message("😀" * 1001))["content"] == "😀" * 999 + "…"  # two units each


@pytest.mark.parametrize(
    ("path", "host", "body"),
    [
        ("/services/T0/B0/tok", "hooks.slack.com", {"text": "run r1: a &lt; b"}),
        (
            "/api/webhooks/1/tok",
            "discord.com",
            {"content": "run r1: a < b", "allowed_mentions": {"parse": []}},
        ),
    ],
)
def test_what_is_sent_has_the_shape(
    hook: Hook, make: Make, monkeypatch: pytest.MonkeyPatch, path: str, host: str, body: dict[str, Any]
) -> None:
    monkeypatch.setenv("http_proxy", hook.base)
    make(f"http://{host}{path}").tell("a < b")
    assert [(received.path, received.body) for received in hook.received] == [(f"http://{host}{path}", body)]


# Secrets

SECRET = r'pl<an>&t"ed_\*sécret  x'


@pytest.mark.parametrize("url", [OTHER, SLACK, DISCORD])
def test_a_secret_is_in_nothing_that_is_sent(hook: Hook, make: Make, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("http_proxy", hook.base)
    notifier = make(url.replace("https", "http"), redact=redactor(SECRET), run_id=f"run-{SECRET}")
    notifier.started(Standing(), store=f"s3://{SECRET}/r")
    hook.wait_for(1)
    where = {"hub": SECRET, "store": SECRET, "report": SECRET}
    notifier.stopped(Standing(), status=2, stopped="crashed", reason=f"HF_TOKEN={SECRET}: is wrong", **where)
    notifier.tell(f"{SECRET} tells")
    bodies = hook.wait_for(3)
    sent = " ".join(json.dumps(body, ensure_ascii=False) for body in bodies)
    assert len(bodies) == 3 and sent.replace("\\", "").count("***") >= 3
    assert not any(piece in sent for piece in ("cret", "pl<", "pl&lt;", "sécr"))


def test_a_secret_at_the_place_of_the_cut_is_not_sent_in_part(hook: Hook, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hook.base)
    make("http://discord.com/api/webhooks/1/t", redact=redactor("S" * 40)).tell("x" * 1970 + "S" * 40)
    (body,) = hook.wait_for(1)
    assert "S" not in body["content"] and body["content"].endswith(r"x\*\*\*")


BAD_ADDRESSES = {
    "refused": "http://127.0.0.1:1/services/secrettoken",
    "no such host": "http://nowhere.invalid/services/secrettoken",
    "not http": "ftp://example.org/secrettoken",
    "no address": "secrettoken",
    "a bad port": "http://example.org:secrettoken/",
    "a bad host": "http://[secrettoken/",
    "an empty label": "http://.example.org/secrettoken",
    "a label that is too long": f"http://secrettoken{'x' * 70}.example.org/",
    "not found": None,
}


@pytest.mark.parametrize("case", BAD_ADDRESSES)
def test_a_failure_is_said_once_and_without_the_address(
    hook: Hook, make: Make, said: list[str], capfd: pytest.CaptureFixture[str], case: str
) -> None:
    hook.answers = [(404, {"X": hook.url})] * 20
    notifier = make(BAD_ADDRESSES[case] or hook.url, total_seconds=0.5)
    notifier.started(Standing())
    notifier.stopped(Standing(), status=0, stopped="finished")
    notifier.tell("hello")
    assert len(said) == 1 and said[0].startswith("warning: WEBHOOK_URL: ")
    captured = capfd.readouterr()
    assert "secrettoken" not in said[0] + captured.out + captured.err


# A server that is slow, broken or away


def test_a_checkpoint_is_told_at_most_every_ten_minutes(hook: Hook, make: Make) -> None:
    now = [0.0]
    notifier = make(clock=lambda: now[0])
    for now[0], step in [(0.0, 1), (1.0, 2), (CHECKPOINT_SECONDS - 1, 3), (CHECKPOINT_SECONDS, 4), (CHECKPOINT_SECONDS + 1, 5)]:
        notifier.checkpoint(Standing(step=step))
    assert [body["step"] for body in hook.wait_for(2)] == [1, 4]
    time.sleep(0.2)
    assert len(hook.received) == 2


def test_a_hanging_server_delays_no_checkpoint(hook: Hook, make: Make) -> None:
    hook.is_hanging = True
    notifier = make(checkpoint_seconds=0)
    began = time.monotonic()
    notifier.started(Standing())
    for step in range(100):
        notifier.checkpoint(Standing(step=step))
    assert time.monotonic() - began < 0.5
    hook.is_hanging = False
    time.sleep(0.5)
    assert 1 <= len(hook.received) <= MAX_WAITING + 2


def test_a_hanging_server_delays_the_end_for_a_few_seconds(hook: Hook, make: Make, said: list[str]) -> None:
    hook.is_hanging = True
    began = time.monotonic()
    make(silence_seconds=1.0).stopped(WHOLE, status=0, stopped="finished")
    assert 0.9 < time.monotonic() - began < 2.5 and (SILENCE_SECONDS, TOTAL_SECONDS) == (3.0, 10.0)
    assert said == ["warning: WEBHOOK_URL: no answer (ReadTimeout); the run goes on, and messages may be missing there"]
    assert hook.num_requests == 1  # it may have arrived


def test_a_server_that_never_ends_its_answer_is_left_in_time(hook: Hook, make: Make, said: list[str]) -> None:
    hook.dribbles = True
    began = time.monotonic()
    make(total_seconds=1.0).tell("hello")
    assert 0.9 < time.monotonic() - began < 2.5
    assert "no answer within 1 seconds" in said[0]


def test_a_busy_server_gets_the_message_when_it_asks_for_it(hook: Hook, make: Make, said: list[str]) -> None:
    hook.answers = [(429, {"Retry-After": "2"})]
    began = time.monotonic()
    make().stopped(WHOLE, status=0, stopped="finished")
    assert 2 <= hook.received[0].at - began < 4 and said == []


def test_a_server_that_is_busy_for_long_is_not_waited_for(hook: Hook, make: Make, said: list[str]) -> None:
    hook.answers = [(429, {"Retry-After": "60"})]
    began = time.monotonic()
    make().stopped(WHOLE, status=0, stopped="finished")
    assert time.monotonic() - began < 2 and "answered 429" in said[0] and hook.received == []


@pytest.mark.parametrize("broken", ["500", "reset"])
def test_a_broken_server_is_tried_again(hook: Hook, make: Make, said: list[str], broken: str) -> None:
    if broken == "500":
        hook.answers = [(500, {})]
    else:
        hook.num_resets = 1
    make().stopped(WHOLE, status=0, stopped="finished")
    assert len(hook.received) == 1 and said == []


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_a_refusal_is_not_tried_again(hook: Hook, make: Make, said: list[str], status: int) -> None:
    hook.answers = [(status, {})] * 3
    make().stopped(WHOLE, status=0, stopped="finished")
    assert hook.num_requests == 1 and f"answered {status}" in said[0]


def test_a_redirect_is_not_followed(hook: Hook, make: Make, said: list[str]) -> None:
    other = Hook()
    hook.answers = [(307, {"Location": other.url})]
    make().tell("hello")
    other.stop()
    assert other.num_requests == 0 and "redirects are not followed" in said[0]


def test_the_end_does_not_wait_for_old_news(hook: Hook, make: Make) -> None:
    hook.is_hanging = True
    notifier = make(checkpoint_seconds=0, total_seconds=2.0)
    notifier.started(Standing())
    for step in range(5):
        notifier.checkpoint(Standing(step=step))
    threading.Timer(0.3, lambda: setattr(hook, "is_hanging", False)).start()
    notifier.stopped(WHOLE, status=0, stopped="finished")
    time.sleep(0.3)
    events = [received.body["event"] for received in hook.received]
    assert sorted(events) == ["started", "stopped"]


def test_a_redaction_that_fails_does_not_fail_the_run(hook: Hook, make: Make, said: list[str]) -> None:
    def redact(text: str) -> str:
        raise KeyError(text)

    notifier = make(redact=redact)
    notifier.started(Standing())
    notifier.checkpoint(Standing(step=1))
    notifier.stopped(Standing(), status=0, stopped="finished")
    notifier.tell("planted")
    assert (hook.num_requests, len(said)) == (0, 1) and "KeyError" in said[0] and "planted" not in said[0]


def test_without_an_address_nothing_happens(hook: Hook, make: Make, said: list[str]) -> None:
    before = threading.active_count()
    notifier = make(None)
    notifier.started(Standing())
    notifier.checkpoint(Standing(step=1))
    notifier.stopped(Standing(), status=0, stopped="finished")
    notifier.tell("hello")
    assert (hook.num_requests, said, threading.active_count()) == (0, [], before)
