"""The `Date` of answers that come anyway in, how wrong this machine's clock is out."""

import threading
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from job.errors import MachineError

MAX_SECONDS = 300.0
"""S3 refuses signatures from 15 minutes on; 5 are Kerberos' limit, and more than any drift of a clock that is set at all."""


class Clock:
    """Collects what servers say the time is; the largest difference counts."""

    def __init__(self) -> None:
        self.ahead_seconds: float | None = None
        """How far the servers' clocks are ahead of ours; None while none has told."""
        self._lock = threading.Lock()

    def read(self, date: str | None) -> None:
        """Take the `Date` header of an answer that has just come."""
        try:
            theirs = parsedate_to_datetime(date or "")
        except ValueError:
            return
        if theirs.tzinfo is not None:
            self.note((theirs - datetime.now(UTC)).total_seconds())

    def note(self, ahead_seconds: float) -> None:
        with self._lock:
            if self.ahead_seconds is None or abs(ahead_seconds) > abs(self.ahead_seconds):
                self.ahead_seconds = ahead_seconds


def check_clock(ahead_seconds: float) -> str:
    """Say how well the clock goes.

    Raises:
        MachineError: it is more than five minutes off.
    """
    if abs(ahead_seconds) > MAX_SECONDS:
        way = "behind" if ahead_seconds > 0 else "ahead of"
        raise MachineError(
            f"this machine's clock is {abs(ahead_seconds):,.0f} seconds {way} the servers'; signatures, certificates and the "
            "cost count on it; set the clock (NTP), or use another machine"
        )
    return f"within {max(abs(ahead_seconds), 1):.0f} s of the servers'"
