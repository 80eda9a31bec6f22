"""Energy from a stand-in for nvidia-smi that is a real program."""

import time
from pathlib import Path

import pytest

from job.energy import EnergyMeter, read_watts


def write_nvidia_smi(folder: Path, lines: str) -> dict[str, str]:
    """Puts a program of that name on a PATH of its own."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_the_power_of_all_cards_is_added_up_over_the_time(tmp_path: Path) -> None:
    meter = EnergyMeter(write_nvidia_smi(tmp_path, "300.5\\n99.5\\n"), every_seconds=0.1)
    begun = time.monotonic()
    meter.start()
    time.sleep(1.0)
    kwh, seconds = meter.kwh, time.monotonic() - begun
    meter.stop()
    assert kwh is not None and 0.2 * 400 * seconds / 3.6e6 < kwh <= 400 * seconds / 3.6e6


@pytest.mark.parametrize("lines", ["[N/A]\\n", "120.0\\n[Not Supported]\\n"])
def test_a_card_that_does_not_tell_makes_it_unknown(tmp_path: Path, lines: str) -> None:
    environ = write_nvidia_smi(tmp_path, lines)
    assert read_watts(environ) is None
    meter = EnergyMeter(environ, every_seconds=0.01)
    meter.start()
    time.sleep(0.2)
    assert meter.kwh is None


def test_without_nvidia_smi_nothing_is_known(tmp_path: Path) -> None:
    assert read_watts({"PATH": str(tmp_path)}) is None
