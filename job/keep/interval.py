"""How often to save: what a save costs and how often machines fail in, seconds between checkpoints out.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006. The first order suffices: an interval
off by a factor of two costs a quarter more than the best one.
"""

import math
from collections.abc import Sequence

from job.events import Stopped
from job.keep.ledger import Attempt, Ledger

MIN_SECONDS, MAX_SECONDS = 60.0, 1800.0
"""More often than once a minute wears the store out; half an hour is all that anyone should lose."""

DEFAULT_MEAN_SECONDS_BETWEEN_FAILURES = 6 * 3600.0
"""An assumption, before a run has a history. Nobody publishes a mean for spot GPUs; Google stops preemptible machines after
24 hours at the latest (docs.cloud.google.com/compute/docs/instances/create-use-preemptible, 2026-11), and the mean lies below
that. A mean that is wrong by four makes the interval wrong by two."""

SAVE_SECONDS = 5.0
"""What a save is taken to cost until one was measured: 250 MB of adapter and optimizer on a disk of 50 MB/s."""

_FAILURES = (Stopped.PREEMPTED, Stopped.CRASHED)
"""What takes a machine away; an OOM or a divergence would happen on any."""


def save_interval_seconds(save_cost_seconds: float, mean_seconds_between_failures: float) -> float:
    """Weigh the time that saves take against the time that a failure loses: sqrt(2 x cost x mean), within 1-30 minutes.

    Args:
        save_cost_seconds: for how long a save holds up the training; an upload beside it costs nothing.
        mean_seconds_between_failures: of the machine, whatever the reason.
    """
    product = 2 * save_cost_seconds * mean_seconds_between_failures
    if not math.isfinite(product):
        return MAX_SECONDS
    return min(max(math.sqrt(max(product, 0.0)), MIN_SECONDS), MAX_SECONDS)


def learned_interval_seconds(ledger: Ledger) -> float:
    """The interval for what a run's saves cost and how often its machines failed, as far as its attempts know."""
    cost = ledger.learned("save_seconds")
    mean = mean_seconds_between_failures(ledger.attempts) or DEFAULT_MEAN_SECONDS_BETWEEN_FAILURES
    return save_interval_seconds(float(cost) if isinstance(cost, (int, float)) else SAVE_SECONDS, mean)


def mean_seconds_between_failures(attempts: Sequence[Attempt]) -> float | None:
    """The mean over a run's attempts, the running one included; None without any time on record.

    One failure after the default time counts along, so that a single unlucky start does not set the pace, and ten do.
    """
    known = [attempt for attempt in attempts if not attempt.is_unreadable]
    seconds = sum(attempt.seconds for attempt in known)
    if seconds <= 0:
        return None
    num_failures = sum(attempt.stopped in _FAILURES for attempt in known)
    return (DEFAULT_MEAN_SECONDS_BETWEEN_FAILURES + seconds) / (1 + num_failures)
