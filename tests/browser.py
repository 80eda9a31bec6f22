"""A headless Chromium, driven through the pipe of its DevTools protocol: opens a file, asks the page, takes its picture.

https://chromedevtools.github.io/devtools-protocol: a command or an event is one JSON object that ends with a NUL.
"""

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_SECONDS = 30.0
END_SECONDS = 5.0
FLAGS = (
    "--headless",
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class BrowserError(Exception):
    """The browser does not answer, or answers with an error."""


def find_browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser; what it says on its console, and what it asks of the network, is collected."""

    def __init__(self) -> None:
        executable = find_browser()
        if executable is None:
            raise BrowserError(f"none of {', '.join(NAMES)} is installed")
        self.complaints: list[str] = []
        """Errors and warnings of the console, and requests for anything but the page itself."""
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self._profile = tempfile.mkdtemp(prefix="browser-")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads from descriptor 3 and writes to 4: the ends are moved out of the way first.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        self._pid = os.posix_spawn(
            executable,
            [executable, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, ends[0], 3),
                (os.POSIX_SPAWN_DUP2, ends[1], 4),
            ],
            setpgroup=0,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)

    def __enter__(self) -> Self:
        try:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are looked at."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while (message := self._next()).get("id") != self._number:
            self._note(message)
        if "error" in message:
            raise BrowserError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def open(self, html: Path, *, width: int, height: int, dark: bool = False) -> None:
        """Open a file in a window of that size, in CSS pixels, and wait until it is drawn."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.ask("Page.navigate", url=html.resolve().as_uri())
        while self._next_event() != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, *, whole_page: bool = False) -> bytes:
        """PNG of the window, or of all that can be scrolled to."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        return base64.b64decode(answer["data"])

    def _next_event(self) -> str:
        message = self._next()
        self._note(message)
        return str(message.get("method", ""))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console.{params['type']}: {params['args']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Network.requestWillBeSent" if params["type"] != "Document" and not params["request"]["url"].startswith("data:"):
                self.complaints.append(f"request for {params['request']['url']}")

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select([self._in], [], [], left)[0]:
                raise BrowserError(f"no word for {PATIENCE_SECONDS:.0f} seconds")
            if not (more := os.read(self._in, 1 << 16)):
                raise BrowserError("it has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _end(self) -> None:
        self._session = None
        with suppress(BrowserError, OSError):  # asked to, it also buries its own children
            self.ask("Browser.close")
        deadline = time.monotonic() + END_SECONDS
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        for end in (self._out, self._in):
            os.close(end)
        shutil.rmtree(self._profile, ignore_errors=True)


def screenshot(html: Path, png: Path, width: int, height: int, dark: bool = False) -> None:
    """Write what a window of that size shows of a page."""
    with Browser() as browser:
        browser.open(html, width=width, height=height, dark=dark)
        png.write_bytes(browser.screenshot())
