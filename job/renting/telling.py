"""What `submit` tells: sentences for people on standard error and the pod's log on standard output, or a JSON line for each."""

import json
import sys
from collections.abc import Callable
from typing import Any

from job.errors import PreemptedError, SettingsError
from job.renting.api import CONSOLE, LogLine
from job.renting.following import End


class Teller:
    """Of one command.

    Args:
        say: shows a sentence.
    """

    def __init__(self, say: Callable[[str], None], redact: Callable[[str], str], *, as_json: bool) -> None:
        self.say, self._redact, self._as_json = say, redact, as_json

    def event(self, event: str, **fields: Any) -> None:
        """One line for scripts, where they were asked for."""
        if self._as_json:
            print(self._redact(json.dumps({"event": event, **fields}, ensure_ascii=False)), flush=True)

    def log(self, line: LogLine) -> None:
        if self._as_json:
            self.event("log", source=line.source, line=line.text)
        else:
            print(self._redact(line.text if line.source == "container" else f"[{line.source}] {line.text}"), flush=True)


def confirm(question: str, *, says_yes: bool) -> bool:
    """Ask at the terminal; Enter is no.

    Raises:
        SettingsError: nobody is there to answer.
    """
    if says_yes:
        return True
    if not sys.stdin.isatty():
        raise SettingsError([f"{question} Nobody is at a terminal to say so, and nothing is rented; --yes says it beforehand"])
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")


def way_back(pod_id: str) -> str:
    """How to come back to a pod, and how to end it; these words of runpodctl are those that all its versions know."""
    return (
        "come back: python -m job submit, with the same settings\n"
        f"stop it: runpodctl stop pod {pod_id}\n"
        f"delete it, with its own disk: runpodctl remove pod {pod_id}\n"
        f"or in the console: {CONSOLE}/pods"
    )


def left_running(pod_id: str) -> PreemptedError:
    """What who leaves is told."""
    return PreemptedError(f"no longer followed; POD {pod_id} RUNS ON, and bills\n{way_back(pod_id)}")


def pod_line(pod_id: str, end: End, *, on_finish: str, is_failed: bool, grace_minutes: str) -> str:
    """What became of the pod, and whether it costs."""
    match end.pod:
        case "gone":
            return f"pod {pod_id} is deleted; nothing bills any more"
        case "exited":
            return f"pod {pod_id} is stopped; its disk is kept, and bills until you delete the pod: {CONSOLE}/pods"
        case "error":
            return f"pod {pod_id} is in an error state that RunPod does not leave by itself; delete it: {CONSOLE}/pods"
    billing = f"POD {pod_id} STILL BILLS ${end.usd_per_hour:.2f} an hour"
    if on_finish != "exit" and is_failed:
        return (
            f"{billing}: it stays to be looked at for {grace_minutes} minutes (FAIL_GRACE_MINUTES) and then stops itself; see "
            f"that it does: {CONSOLE}/pods"
        )
    return f"{billing}; end it: {CONSOLE}/pods"
