"""Python that a model wrote in, a verdict out: the code runs in a process of its own, limited and cut off.

What is guaranteed on Linux, x86_64 and aarch64, for root and for any user, inside containers too: the code ends within its
time and takes everything with it; it stays within its memory; it starts no process, reaches no network, signals no process
but itself, changes no file outside its folder, which is deleted; it gets no environment, no standard input, and its output
is cut; ending early is no success. It ends when its parent ends.

What holds where the kernel helps (`containment.py`): that it reads no files but Python's library (Landlock), and that it
cannot look into other processes through /proc (Landlock, or a parent that is root, or user namespaces).

What is not handled: malice. This contains accidents of a model's code, as HumanEval's own sandbox does, and is no jail.
Code that looks for the success protocol in its own process finds it; total size on disk is bounded by time alone. Only the
standard library can be imported. A parent that is killed leaves the folder behind.
"""

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.errors import MachineError

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 60.0
"""To start Python on a busy machine; it takes 0.04 s on an idle one."""
MAX_OUTPUT_BYTES = 2**20
MAX_VERDICT_BYTES = 2**16
"""Its lines are short: whoever writes more is not our script."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How code ended."""

    ok: bool
    reason: str
    """Empty when ok."""
    seconds: float
    """From when the sandbox stood."""
    output: str
    """What it wrote, both streams together."""


def run_python(*programs: str, timeout_seconds: float = 10.0, memory_bytes: int = 2**30) -> Verdict:
    """Run programs one after the other in one namespace, as module `answer`; ok when all came to their end.

    Safe to call from several threads, and in a process that holds a GPU: it starts a new Python and forks nothing.

    Raises:
        MachineError: this machine cannot contain code.
    """
    word = secrets.token_hex(16)
    request = {
        "programs": programs,
        "word": word,
        "parent": os.getpid(),
        "memory_bytes": memory_bytes,
        "cpu_seconds": math.ceil(timeout_seconds) + 1,
    }
    with _folder() as folder, tempfile.TemporaryFile() as request_file:
        request_file.write(json.dumps(request).encode())
        request_file.seek(0)
        read_fd, write_fd = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", str(CHILD), str(write_fd)],
                stdin=request_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={},
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        with process, os.fdopen(read_fd, "rb", buffering=0) as verdict_file:
            try:
                return _Watch(process, verdict_file, timeout_seconds, word).verdict()
            finally:
                # The group, too: before the sandbox stands there may be more than one.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@dataclass
class _Watch:
    """Reads what a sandbox writes until it ends, or must."""

    process: "subprocess.Popen[bytes]"
    verdict_file: Any
    timeout_seconds: float
    word: str
    output: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    started: float = 0.0

    def verdict(self) -> Verdict:
        stopped = self._listen()
        seconds = time.monotonic() - self.started if self.started else 0.0
        text = self.output.decode("utf-8", errors="replace")
        messages = self._messages()
        if not any("ready" in message for message in messages):
            problem = next((message["problem"] for message in messages if "problem" in message), stopped or text.strip()[-300:])
            raise MachineError(
                f"no sandbox for Python can stand on this machine ({problem}); "
                "score with exact_match, contains or json, or run on Linux with seccomp"
            )
        done = next((message for message in messages if message.get("done") == self.word), None)
        if stopped:
            reason = stopped
        elif done is not None:
            reason = str(done["reason"]).encode("utf-8", errors="backslashreplace").decode()
        else:
            reason = _explain_status(self.process.wait(), text)
        return Verdict(ok=not reason, reason=reason, seconds=seconds, output=text)

    def _listen(self) -> str:
        """Read until the process has ended; the reason why it had to be stopped, or nothing."""
        deadline = time.monotonic() + START_SECONDS
        limits = {self.process.stdout: (self.output, MAX_OUTPUT_BYTES), self.verdict_file: (self.said, MAX_VERDICT_BYTES)}
        with selectors.DefaultSelector() as selector:
            for file in limits:
                selector.register(file, selectors.EVENT_READ)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._late()
                for key, _events in selector.select(left):
                    data = os.read(key.fd, 2**16)
                    text, limit = limits[key.fileobj]
                    text += data
                    if not data:
                        selector.unregister(key.fileobj)
                    if len(text) > limit:
                        del text[limit:]
                        return f"wrote more than {limit // 1024} KiB"
                if not self.started and b'{"ready": true}\n' in self.said:
                    self.started = time.monotonic()
                    deadline = self.started + self.timeout_seconds
        try:  # it may have closed both and go on
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return self._late()
        return ""

    def _late(self) -> str:
        return f"timed out after {self.timeout_seconds:g} s" if self.started else f"did not start within {START_SECONDS:g} s"

    def _messages(self) -> list[dict[str, Any]]:
        messages = []
        for line in self.said.splitlines():
            with suppress(ValueError):  # the programs can write here too
                message = json.loads(line)
                if isinstance(message, dict):
                    messages.append(message)
        return messages


def _explain_status(status: int, output: str) -> str:
    last = output.strip().rpartition("\n")[2][-300:]
    if status >= 0:
        return f"ended with status {status} before its end" + (f": {last}" if status and last else "")
    if -status == signal.SIGXCPU:
        return "used up its processor time"
    return f"died of signal {-status} ({signal.strsignal(-status)})"


@contextmanager
def _folder() -> Iterator[Path]:
    """A new folder, gone afterwards with whatever it holds."""
    folder = Path(tempfile.mkdtemp(prefix="answer-"))
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder by lifting what lies deep to its top: any depth, where shutil.rmtree recurses, and no long paths."""
    mark, count = secrets.token_hex(8), 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                Path(entry).unlink()
                continue
            Path(entry).chmod(0o700)  # made by mkdir(mode=0), it could not be listed
            for inner in list(os.scandir(entry)):
                count += 1
                Path(inner).rename(folder / f"{mark}-{count}")
            Path(entry).rmdir()
    folder.rmdir()
