"""What the log told, what the store holds; out, the exit status of the run, and on whose word.

The job's own last words come from the process that ended, after all that it did, so they go first. The report is written before
that, and may be of an earlier start: it counts where the words were not heard, and only if it tells of a start on this pod.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.deliver.record import REPORT
from job.deliver.report import Report
from job.errors import InterruptedRunError, JobError
from job.keep.store import MissingError, Store, hurried, read_text

SKEW = timedelta(minutes=1)
"""By which RunPod's clock and the pod's may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the run ended.

    Attributes:
        status: to exit with.
        source: whose word it is.
        doubt: what speaks against it; empty when nothing does.
    """

    status: int
    source: str
    doubt: str = ""


def judge(told: int | None, report: Report | None, *, why_no_report: str) -> Outcome:
    """Weigh the two.

    Args:
        told: by the job's last words in the pod's log.
        report: of a start on this pod.
        why_no_report: in words, where there is none.
    """
    if told is not None:
        differs = report is not None and report.exit_status != told
        doubt = f"report.json says {report.exit_status}: it was written before the end" if report and differs else ""
        return Outcome(status=told, source="the job's last words in the pod's log", doubt=doubt)
    if report is not None:
        return Outcome(status=report.exit_status, source="report.json in OUTPUT_URI; the log ended before the job's last words")
    doubt = f"nobody told how it ended: the log has no last words, and {why_no_report}"
    return Outcome(status=InterruptedRunError.exit_status, source="no one's word", doubt=doubt)


def find_report(store: Store | None, pod: dict[str, Any], scratch: Path) -> tuple[Report | None, str]:
    """The report of a start on this pod, or why there is none.

    Args:
        store: the run's folder in OUTPUT_URI; None when this machine cannot reach it.
    """
    if store is None:
        return None, "OUTPUT_URI cannot be reached from here"
    try:
        report = Report.model_validate_json(read_text(hurried(store), REPORT, scratch))
    except MissingError:
        return None, "there is no report.json in OUTPUT_URI"
    except JobError as error:
        return None, f"report.json cannot be read from here ({error})"
    except (ValidationError, ValueError):
        return None, "the report.json in OUTPUT_URI is of another version of the job"
    made = datetime.fromisoformat(str(pod["createdAt"]))
    if not report.attempts or report.attempts[-1].started < made - SKEW:
        return None, "the report.json in OUTPUT_URI is of an earlier start"
    return report, ""
