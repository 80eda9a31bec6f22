"""Every way the job fails on purpose, and the exit status each becomes.

    JobError                 1   a bug, when nothing more precise is known
    |-- SettingsError        2   a setting is missing or wrong; do not retry
    |-- DataError            3   data is unreadable, or too few examples survive; do not retry
    |-- PlanError            4   does not fit
    |-- MachineError         5   this machine cannot run it; another may
    |-- PublishError         6   trained and safe in the store, but not on the Hub: `publish` finishes it
    |-- DivergedError        7   the loss is not finite
    |-- BudgetError          8   MAX_COST_USD or MAX_HOURS is reached, with a checkpoint: raise it and start again
    `-- InterruptedRunError 75   stopped with what is whole kept: start it again
        |-- PreemptedError       a signal took the machine away
        `-- NetworkError         a server did not answer, or not in time

Never 137 or 143: engines read them as somebody else's kill.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""OSErrors that are the machine's fault, wherever they come up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One wrong setting, in words a user can act on."""

    setting: str
    """Upper-case name as the user writes it."""
    value: str | None
    """What was given, already masked when it is a secret; None when nothing was given."""
    rule: str
    way_out: str

    def __str__(self) -> str:
        given = self.setting if self.value is None else f"{self.setting}={self.value}"
        return f"{given}: {self.rule}; {self.way_out}"


class JobError(Exception):
    """A failure that the user is told in one line, without a traceback."""

    exit_status: ClassVar[int] = 1


class SettingsError(JobError):
    """One or more settings are missing or wrong; all of them are named."""

    exit_status = 2

    def __init__(self, problems: Sequence[Problem | str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(JobError):
    exit_status = 3


class PlanError(JobError):
    exit_status = 4


class MachineError(JobError):
    exit_status = 5


class PublishError(JobError):
    exit_status = 6


class DivergedError(JobError):
    exit_status = 7


class BudgetError(JobError):
    exit_status = 8


class InterruptedRunError(JobError):
    exit_status = 75


class PreemptedError(InterruptedRunError):
    pass


class NetworkError(InterruptedRunError):
    pass


def as_job_error(error: Exception) -> JobError:
    """The failure that any exception is: one of ours, the disk's, or a bug."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return MachineError(
            f"WORK_DIR: {error.filename or 'its disk'}: {error.strerror}; free it, or name a folder on another disk"
        )
    return JobError(f"{type(error).__name__}: {error}")


def error_for_status(status: int, message: str) -> JobError:
    """Rebuild the error of a child process from its exit status and its last words."""
    if status == SettingsError.exit_status:
        return SettingsError([message])
    purposes = (DataError, PlanError, MachineError, PublishError, DivergedError, InterruptedRunError)
    return next((error for error in purposes if error.exit_status == status), JobError)(message)
