"""The process that runs unread code: a request on standard input in, lines of JSON on the file descriptor named by argv[1] out.

A script of the standard library alone, for `python -I -S`: it contains itself, says that it is ready, runs the programs one
after the other in one namespace, and last repeats the request's secret word. Code that ends the process earlier, however
politely, leaves that word unsaid. Output of the programs goes where the process's goes. Use `sandbox.run_python`.
"""

import json
import os
import sys
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_REASON = 300
"""Characters: a line or two of a report."""

_write, _exit, _dumps = os.write, os._exit, json.dumps  # the programs may put anything in their places


def main(requests: Any, verdict_fd: int) -> None:
    """Run one request and end the process."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from job.scoring.containment import contain

    sys.path.pop(0)
    request = json.load(requests)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        contain(parent=request["parent"], memory_bytes=request["memory_bytes"], cpu_seconds=request["cpu_seconds"])
    except (OSError, KeyError) as error:
        _say(verdict_fd, problem=f"{type(error).__name__}: {error}")
        _exit(1)
    sys.addaudithook(_refuse)
    _say(verdict_fd, ready=True)
    reason = run_programs(request["programs"])
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    _say(verdict_fd, done=request["word"], reason=reason)
    _exit(0)  # threads that still run end here


def _say(verdict_fd: int, **message: Any) -> None:
    _write(verdict_fd, _dumps(message).encode() + b"\n")


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: a second layer where the kernel has none, for code that means no harm; it can be gone round."""
    if event.startswith("ctypes."):
        raise PermissionError("ctypes is not for answers")
    if event == "open" and isinstance(args[0], str | bytes) and os.fsdecode(args[0]).startswith("/proc"):
        raise PermissionError(f"no {os.fsdecode(args[0])!r} for answers")


def run_programs(programs: Sequence[str]) -> str:
    """Run them in one namespace until one raises; the reason why, or nothing."""
    sys.argv = ["answer"]
    module = sys.modules["answer"] = types.ModuleType("answer")  # dataclasses look their module up
    names = {f"<program {number}>": source for number, source in enumerate(programs, start=1)}
    try:
        for name, source in names.items():
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        return f"left with status {error.code} before the end"
    except BaseException as error:
        return _explain(error, names)
    return ""


def _explain(error: BaseException, names: dict[str, str]) -> str:
    """The error as Python writes it, and the program's line that it came from."""
    text = type(error).__name__
    with suppress(Exception):
        text = f"{text}: {error}" if str(error) else text
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in names:
            line = names[trace.tb_frame.f_code.co_filename].split("\n")[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    text = text[:MAX_REASON]
    return f"{text} (at: {line[:MAX_REASON]})" if line else text


if __name__ == "__main__":
    main(sys.stdin, int(sys.argv[1]))
