"""How a run ended in; out, what the queue keeps of it for half an hour: a few kilobytes, without secrets.

All of it is in the store too, with everything that is left out here.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from job.errors import JobError, Problem
from job.keep.store import MissingError, Store, read_text

REPORT, DONE, ADAPTER = "report.json", "DONE", "adapter"  # names that scripts build on; their modules take seconds to import
MAX_CHARACTERS = 20_000
"""Of an error; RunPod takes 10 MB in all."""
WHAT_NEXT = {
    2: "correct the settings and submit again",
    3: "correct the data and submit again",
    4: "submit to an endpoint with more GPU memory, or with a larger budget",
    5: "submit again: another worker may do, and the run continues",
    6: "trained and safe in the store: correct HUB_MODEL_ID or the token, and submit again; it trains nothing anew",
    7: "submit again with a lower LEARNING_RATE, as a new run",
    8: "the checkpoint is saved: raise MAX_COST_USD or MAX_HOURS and submit again; the run continues",
    75: "what is whole is kept: submit the same request again; the run continues",
}
"""By exit status, as in the README."""
SUBMIT_AGAIN = (5, 75)
"""The same request again may do; for all others something has to change first."""
FRESH_WORKER = (1, 5)
"""This worker may be the reason. A killed job counts too."""
_ESSENTIALS = ("stopped", "actual", "chosen", "evaluations", "happenings", "publication", "model")


def refused(problems: Sequence[Problem | str]) -> dict[str, Any]:
    """A request that nothing was started for."""
    texts = [str(problem) for problem in problems]
    error = _cut(f"exit status 2, nothing was started; {WHAT_NEXT[2]}:\n" + "\n".join(texts))
    return {"error": error, "exit_status": 2, "submit_again": False, "what_next": WHAT_NEXT[2], "problems": texts[:100]}


def failed(
    status: int,
    reason: str | None,
    *,
    run_id: str | None = None,
    store: Store | None = None,
    refresh: bool | None = None,
    what_next: str | None = None,
) -> dict[str, Any]:
    """A run that is not done.

    Args:
        status: the job's exit status, negative for a signal.
        refresh: whether RunPod is asked for a fresh worker; by default where this one may be the reason.
        what_next: instead of what the exit status says.
    """
    what_next = what_next or WHAT_NEXT.get(status, "a bug: please report it; submitted again, the run continues")
    if status < 0:
        what_next = "the job was killed, perhaps for memory: submit the same request again; the run continues"
    text = _cut(reason or "no reason was given; the worker's log has all that was printed")
    report = None if store is None else essentials(store)
    return {
        "error": f"exit status {status}: {text}; {what_next}",
        "run_id": run_id,
        "exit_status": status,
        "reason": text,
        "submit_again": status in SUBMIT_AGAIN or status < 0,
        "what_next": what_next,
        "store": None if store is None else store.uri,
        "report": report if report and report.get("exit_status") == status else None,  # else it is an earlier start's
        **({"refresh_worker": True} if (status in FRESH_WORKER or status < 0 if refresh is None else refresh) else {}),
    }


def done(run_id: str, store: Store, *, already: bool) -> dict[str, Any]:
    """A run that is done; `already`: before this request."""
    return {
        "run_id": run_id,
        "exit_status": 0,
        "already_done": already,
        "store": store.uri,
        "adapter": f"{store.uri}/{ADAPTER}",
        "report_file": f"{store.uri}/{REPORT}",
        "report": essentials(store),
    }


def essentials(store: Store) -> dict[str, Any] | None:
    """What report.json says in short; None where it cannot be read."""
    report: Any = None
    with suppress(JobError, MissingError, ValueError):
        report = json.loads(read_text(store, REPORT, Path(tempfile.gettempdir())), parse_constant=lambda _: None)
    if not isinstance(report, Mapping):
        return None
    short = {name: report.get(name) for name in ("exit_status", "reason", *_ESSENTIALS)}
    for name in ("evaluations", "happenings"):
        short[name] = (short[name] or [])[-20:]
    return short | {"num_attempts": len(report.get("attempts") or [])}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
