"""Why a start of the job ends before its work is done, a signal or the budget, and how long it may still take then.

One for the supervisor's process. What comes first decides the exit status: a signal 75, the budget 8.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from job.errors import BudgetError, JobError, PreemptedError
from job.events import Stopped
from job.keep.budget import WAY_OUT, Budget

LAST_SECONDS = 2.0
"""For the record and the report when the mirror has used up the grace: two small files."""

ECHO_SECONDS = 1.0
"""A second signal within this time is the first one over again."""

LONGEST_TIMER_SECONDS = 3600.0
"""A timer for the budget is set anew after this; the kernel's would not take years."""


class _StopNow(BaseException):
    """Raised where the main thread stands. No Exception: boto3 would take it for a failed request, and try again."""


class StopRequest:
    """SIGTERM or SIGINT to the supervisor: the first asks children to stop, a second one kills them. The budget asks too.

    Attributes:
        count: signals so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._asked_at, self._raises = 0.0, False
        self._grace_seconds: float | None = None
        self._is_over = False
        self._budget: Budget | None = None
        self._reached: str | None = None
        self._reached_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.count == 0:
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at < ECHO_SECONDS:
            return  # the same request by another way: to the process group, and passed on by who started us
        self.count += 1
        if self._raises:
            self._raises = False  # what puts things away after it is not interrupted again
            raise _StopNow
        if self._grace_seconds is not None:
            self._set_timer(self._grace_seconds)

    def limit(self, budget: Budget | None) -> None:
        """Stop for the budget as well from now on; None: no longer, also when it was reached since."""
        self._budget = budget
        if budget is None:
            self._reached = None

    def is_asked(self) -> bool:
        """Whether to stop, by a signal or because the budget is reached now."""
        if not self.count and self._reached is None and self._budget is not None and self._budget.seconds_left() <= 0:
            self._reached, self._reached_at = self._budget.keep_back(), time.monotonic()
        return bool(self.count) or self._reached is not None

    @property
    def stopped(self) -> Stopped:
        """Which of the two was first."""
        return Stopped.PREEMPTED if self._reached is None else Stopped.BUDGET

    def error(self, what: str | None = None) -> JobError:
        """The error to exit with.

        Args:
            what: how things were left.
        """
        if self._reached is not None and self._budget is not None:
            return BudgetError(f"{self._reached}; {what or self._budget.progress()}; {WAY_OUT}")
        return PreemptedError(f"stopped by a signal; {f'{what}; ' if what else ''}start again with the same settings to continue")

    def check(self) -> None:
        """Raise the error to exit with when a stop was asked for."""
        if self.is_asked():
            raise self.error()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal or the budget's end raises wherever the main thread stands: in a download, an upload, a request.

        Raises:
            PreemptedError, BudgetError: whichever was first.
        """
        self._raises = True
        before = signal.signal(signal.SIGALRM, self._at_limit)
        try:
            self.check()
            self._set_budget_timer()
            yield
        except BaseException as error:
            # s3transfer's own clean-up may fail over it, and hide it behind another error.
            if (self.count or self._reached is not None) and not isinstance(error, (PreemptedError, BudgetError)):
                raise self.error() from error
            raise
        finally:
            self._raises = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _set_budget_timer(self) -> None:
        if self._budget is not None:
            left = min(self._budget.seconds_left(), LONGEST_TIMER_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))  # 0 would turn it off

    def _at_limit(self, _number: int, _frame: FrameType | None) -> None:
        if not self._raises:
            return
        if not self.is_asked():
            self._set_budget_timer()
            return
        self._raises = False
        raise _StopNow

    @contextmanager
    def within_grace(self, grace_seconds: float) -> Iterator[None]:
        """Inside, PreemptedError is raised when the grace since the stop was asked for is over, or at a second signal: a store
        that is silent would keep the process for minutes, and the machine's owner would kill it.
        """
        before = signal.signal(signal.SIGALRM, self._raise_at_alarm)
        self._grace_seconds = grace_seconds
        try:
            if self.count or self._reached is not None:
                self._set_timer(grace_seconds)
            yield
        except BaseException as error:
            if self._is_over:
                text = f"GRACE_SECONDS={grace_seconds:g} are over, and not all is in the store; start again to continue"
                raise PreemptedError(text) from error
            raise
        finally:
            self._grace_seconds = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _set_timer(self, grace_seconds: float) -> None:
        if self.count > 1:
            self._raise_at_alarm(0, None)
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds_left(grace_seconds), LAST_SECONDS))

    def _raise_at_alarm(self, _number: int, _frame: FrameType | None) -> None:
        self._is_over = True
        raise _StopNow

    def seconds_left(self, grace_seconds: float) -> float:
        """What is left of the grace: all of it while no stop was asked for, nothing after a second signal.

        A stop for the budget has what the budget keeps back, and no less than the grace: a few cents are not worth the steps
        that a cut upload loses.
        """
        if self.count > 1:
            return 0.0
        if self.count:
            return max(0.0, self._asked_at + grace_seconds - time.monotonic())
        if self._reached is None or self._budget is None:
            return grace_seconds
        return max(0.0, self._reached_at + grace_seconds - time.monotonic(), self._budget.seconds_left(keeps_reserve=False))

    @property
    def is_over(self) -> bool:
        """Whether the time that `within_grace` gave is over."""
        return self._is_over
