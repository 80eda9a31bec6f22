"""What the GPUs draw, asked of nvidia-smi now and then by a thread of the supervisor; kilowatt-hours out.

The driver's own number, of the cards alone: not of the machine around them. Where nvidia-smi is missing or a card does not
tell, nothing is known, and nothing is made up.
"""

import subprocess
import threading
import time
from collections.abc import Mapping

EVERY_SECONDS = 10.0
_QUERY = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")


class EnergyMeter:
    """Adds up while it runs; one sample stands for the time since the one before."""

    def __init__(self, environ: Mapping[str, str], *, every_seconds: float = EVERY_SECONDS) -> None:
        self._environ, self._every = dict(environ), every_seconds
        self._watt_seconds = 0.0
        self._num_samples = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def kwh(self) -> float | None:
        """So far; None when no card told."""
        return self._watt_seconds / 3.6e6 if self._num_samples else None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="energy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _work(self) -> None:
        before, watts_before = time.monotonic(), read_watts(self._environ)
        while watts_before is not None and not self._end.wait(self._every):
            now, watts = time.monotonic(), read_watts(self._environ)
            if watts is not None:
                self._watt_seconds += (watts + watts_before) / 2 * (now - before)
                self._num_samples += 1
                before, watts_before = now, watts


def read_watts(environ: Mapping[str, str]) -> float | None:
    """What all cards of this machine draw together; None when one does not tell."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True, env=dict(environ))
        return sum(float(line) for line in answer.stdout.split("\n") if line.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
