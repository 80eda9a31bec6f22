"""What happens to a run in, messages to WEBHOOK_URL out: JSON for a program, or one line for Slack or Discord.

A message never fails or delays the run. The address is a secret, for those of Slack and Discord let anybody post: no text here
holds it. Everything that is sent passes the redaction first.
"""

import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from tenacity import stop_before_delay, stop_when_event_set
from tenacity.stop import stop_base

from job.deliver.calls import CallError, ask, insist

SILENCE_SECONDS = 3.0
"""How long the server may take to connect, and to answer."""
TOTAL_SECONDS = 10.0
"""How long the run's end waits for its message, tries and name look-up included."""
CHECKPOINT_SECONDS = 600.0
MAX_WAITING = 8
"""Messages that wait for a slow server; later ones are left out."""
SLACK_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")
DISCORD_HOSTS = ("discord.com", "discordapp.com")
SLACK_CHARACTERS = 3000  # Slack cuts at 40,000; an escaped one may become five
DISCORD_CHARACTERS = 2000  # of a message's content: Discord's developer documentation, Execute Webhook
_MARKDOWN = re.compile(r"(https?://\S+)|([\\*_~`|>#\[\]])")


def shape_for(url: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """The body that the server of this address understands; the message as it is for one that we do not know."""
    address = urlsplit(url)
    host, path = (address.hostname or "").rstrip("."), address.path.rstrip("/")
    text = str(message["text"])
    is_discord = any(host == known or host.endswith(f".{known}") for known in DISCORD_HOSTS)
    if is_discord and path.startswith("/api/") and "/webhooks/" in path and not path.endswith("/slack"):
        escaped = _MARKDOWN.sub(lambda found: found[1] or f"\\{found[2]}", text)
        return {"content": _cut(escaped, DISCORD_CHARACTERS), "allowed_mentions": {"parse": []}}
    if host in SLACK_HOSTS or (is_discord and path.endswith("/slack")):
        text = _cut(text, SLACK_CHARACTERS)
        return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    return dict(message)


def _cut(text: str, limit: int) -> str:
    """The beginning of a text that is too long, in UTF-16 units: nobody counts more than these."""
    raw = text.encode("utf-16-le", "replace")
    return text if len(raw) <= 2 * limit else raw[: 2 * (limit - 1)].decode("utf-16-le", "ignore") + "…"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a run is; None where that is not known."""

    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    seconds: float | None = None
    """Over all starts of the run, as `cost_usd`."""
    cost_usd: float | Literal["unknown"] = "unknown"

    def __str__(self) -> str:
        """What is known, as a person reads it."""
        parts = []
        if self.step is not None:
            parts.append(f"step {self.step} of {self.num_steps}" if self.num_steps else f"step {self.step}")
        parts += [f"loss {self.loss:.4g}"] if self.loss is not None else []
        parts += [f"held-out loss {self.eval_loss:.4g}"] if self.eval_loss is not None else []
        parts += [f"{self.seconds / 3600:.2f} h"] if self.seconds is not None else []
        parts += [f"${self.cost_usd:.2f}"] if self.cost_usd != "unknown" else []
        return ", ".join(parts)


class Notifier:
    """Tells one run's news to WEBHOOK_URL; does nothing without one. Its methods return, whatever the server does.

    Args:
        url: WEBHOOK_URL.
        redact: blots out the secrets in a text.
        say: shows a line.
        checkpoint_seconds: the least time from one message about a checkpoint to the next.
        silence_seconds, total_seconds: bounds of one try, and of a message that the run waits for.
    """

    def __init__(
        self,
        url: str | None,
        *,
        run_id: str,
        redact: Callable[[str], str],
        say: Callable[[str], None],
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url, self._run_id, self._redact, self._say, self._clock = url, run_id, redact, say, clock
        self._checkpoint_seconds, self._silence_seconds, self.total_seconds = checkpoint_seconds, silence_seconds, total_seconds
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(MAX_WAITING)
        self._worker: threading.Thread | None = None
        self._checkpoint_at: float | None = None
        self._is_ending = threading.Event()
        self._warning = threading.Lock()
        self._has_warned = False

    def started(self, standing: Standing, *, store: str | None = None) -> None:
        """A start of the run begins; `standing.step` is the last one that earlier starts did."""
        how = f"goes on after step {standing.step}" if standing.step else "started"
        text = f"{how}, {standing.num_steps} steps in all" if standing.num_steps else how
        self._enqueue("started", text, standing, links={"store": store})

    def checkpoint(self, standing: Standing) -> None:
        """A checkpoint is in the store; a call that comes too soon after the last message sends none."""
        now = self._clock()
        if self._checkpoint_at is not None and now - self._checkpoint_at < self._checkpoint_seconds:
            return
        self._checkpoint_at = now
        self._enqueue("checkpoint", f"checkpoint, {standing}", standing)

    def stopped(
        self,
        standing: Standing,
        *,
        status: int,
        stopped: str,
        reason: str | None = None,
        hub: str | None = None,
        store: str | None = None,
        report: str | None = None,
    ) -> None:
        """This start of the run has ended; waits until the server has it, for a few seconds at most.

        Args:
            status: the exit status.
            stopped: why, as in the report.
            reason: the error's text.
            hub, store, report: where everything is.
        """
        self._is_ending.set()
        how = f"{stopped}, exit status {status}" if status else stopped
        text = "; ".join(part for part in (how, str(standing), reason, hub or store) if part)
        links = {"hub": hub, "store": store, "report": report}
        self._send_now("stopped", text, standing, links=links, status=status, stopped=stopped, reason=reason)

    def tell(self, text: str) -> None:
        """Something about the machine that somebody should know; waits as `stopped` does."""
        self._send_now("machine", text, Standing())

    def _message(
        self, event: str, text: str, standing: Standing, *, links: Mapping[str, str | None] | None = None, **facts: object
    ) -> dict[str, Any]:
        message = {
            "event": event,
            "run_id": self._run_id,
            **dict.fromkeys(("status", "stopped", "reason")),
            **facts,
            **asdict(standing),
            "links": {"hub": None, "store": None, "report": None, **(links or {})},
            "text": f"run {self._run_id}: {' '.join(self._redact(text).split())}",
        }
        clean: dict[str, Any] = self._clean(message)
        return clean

    def _clean(self, value: Any) -> Any:
        """Texts redacted, before anything is cut or escaped; numbers that JSON does not know as null."""
        if isinstance(value, dict):
            return {name: self._clean(part) for name, part in value.items()}
        if isinstance(value, str):
            return self._redact(value).encode("utf-8", "replace").decode("utf-8")
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def _enqueue(self, event: str, text: str, standing: Standing, **facts: Any) -> None:
        if self._url is None:
            return
        with self._unfailing(), suppress(queue.Full):
            self._waiting.put_nowait(self._message(event, text, standing, **facts))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="notify", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        stop = stop_before_delay(self.total_seconds) | stop_when_event_set(self._is_ending)
        while True:
            message = self._waiting.get()
            if not self._is_ending.is_set():  # else it is old news
                self._post(message, stop)

    def _send_now(self, event: str, text: str, standing: Standing, **facts: Any) -> None:
        """Send past the queue, by a thread of its own: looking up a host's name knows no time-out."""
        if self._url is None:
            return
        with self._unfailing():
            message = self._message(event, text, standing, **facts)
            stop = stop_before_delay(self.total_seconds)
            thread = threading.Thread(target=self._post, args=(message, stop), name="notify-now", daemon=True)
            thread.start()
            thread.join(self.total_seconds)
            if thread.is_alive():
                self._warn(f"no answer within {self.total_seconds:g} seconds")

    def _post(self, message: dict[str, Any], stop: stop_base) -> None:
        url = self._url or ""
        with self._unfailing():
            body = shape_for(url, message)
            insist(
                lambda: ask("POST", url, body=body, seconds=self._silence_seconds, reads_answer=False, repeats_unanswered=False),
                stop=stop,
                sleep=time.sleep,
            )

    @contextmanager
    def _unfailing(self) -> Iterator[None]:
        """Tell an error inside, and go on."""
        try:
            yield
        except CallError as error:
            self._warn(str(error))
        except Exception as error:  # whose text may hold the address
            self._warn(type(error).__name__)

    def _warn(self, why: str) -> None:
        """Once: the run's own lines are not to be lost among these."""
        with self._warning:
            if self._has_warned:
                return
            self._has_warned = True
        self._say(f"warning: WEBHOOK_URL: {why}; the run goes on, and messages may be missing there")
