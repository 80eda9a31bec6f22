"""Quantities in, the words and digits out that a person reads them by.

Whatever is unknown or not finite reads "unknown": a report is never "nan" and never 0 for want of knowledge.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

UNKNOWN = "unknown"
GIB, MIB = 2**30, 2**20
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def duration(seconds: float | None) -> str:
    """`8.2 s`, `12 min 05 s`, `1 h 04 min`, `3 d 04 h`."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    minutes = round(seconds / _MINUTE)
    if minutes < 2 * _DAY // _MINUTE:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / _HOUR)
    return f"{hours // 24:,} d {hours % 24:02d} h"


def count(number: float | None) -> str:
    """`1,234,567`."""
    return f"{number:,.0f}" if number is not None and math.isfinite(number) else UNKNOWN


def short_count(number: float | None) -> str:
    """`1,234`, `18.4 k`, `5.03 M`: three digits that count."""
    if number is None or not math.isfinite(number):
        return UNKNOWN
    for scale, letter, begin in ((1e12, "T", 0.9995e12), (1e9, "G", 0.9995e9), (1e6, "M", 0.9995e6), (1e3, "k", 9999.5)):
        if abs(number) >= begin:
            value = number / scale
            return f"{value:,.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {letter}"
    return count(number)


def size(num_bytes: float | None) -> str:
    if num_bytes is None or not math.isfinite(num_bytes):
        return UNKNOWN
    if abs(num_bytes) < GIB:
        return f"{num_bytes / MIB:,.0f} MiB"
    return f"{num_bytes / GIB:,.{2 if abs(num_bytes) < 100 * GIB else 0}f} GiB"


def dollars(usd: float | None) -> str:
    """Cents, and tenths of a cent below a dollar: a small run costs little more than one."""
    if usd is None or not math.isfinite(usd):
        return UNKNOWN
    return f"${usd:,.{2 if abs(usd) >= 1 or usd == 0 else 3}f}"


def quantity(what: str, value: float | None) -> str:
    """A value of a row of the comparison."""
    says = {"memory_bytes": size, "seconds": duration, "num_tokens": count, "cost_usd": dollars}.get(what)
    return says(value) if says else number(value)


def number(value: float | None) -> str:
    """Four digits that count."""
    return f"{value:.4g}" if value is not None and math.isfinite(value) else UNKNOWN


def loss(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def perplexity(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.2f}" if value < 10_000 else f"{value:.2g}"


def share(part: float, whole: float) -> str:
    """Percent, never 0% or 100% where it is not exactly that."""
    if not whole:
        return "0%"
    percent = 100 * part / whole
    if 0 < percent < 1:
        return "<1%"
    return ">99%" if 99 < percent < 100 else f"{percent:.0f}%"


def moment(when: datetime) -> str:
    """`2026-11-24 19:40:37`, in UTC."""
    return aware(when).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def aware(when: datetime) -> datetime:
    """A time without a zone is UTC here."""
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def spelled(name: str) -> str:
    """`too_long` as `too long`."""
    return name.replace("_", " ")


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def tick_labels(values: Sequence[float], *, prefix: str = "") -> list[str]:
    """Labels of an axis: equally many decimals, as few as tell them apart, and thousands as k, M, G."""
    largest = max((abs(value) for value in values), default=0.0)
    if not largest or 1e-2 <= largest < 1e12:
        scale, letter = next(((s, e) for s, e in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= 10 * s), (1.0, ""))
        for decimals in (0, 2, 3, 4) if prefix == "$" else range(6):
            labels = [f"{value / scale:,.{decimals}f}" for value in values]
            if all(math.isclose(float(label.replace(",", "")) * scale, value, rel_tol=1e-9, abs_tol=1e-12 * (largest or 1))
                   for label, value in zip(labels, values, strict=True)):  # fmt: skip
                break
        labels = ["0" if not value else f"{label}{letter}" for label, value in zip(labels, values, strict=True)]
    else:  # learning rates
        parts = [f"{value:.2e}".split("e") for value in values]
        labels = [f"{float(digits):g}e{int(power)}" if float(digits) else "0" for digits, power in parts]
    return [prefix + label for label in labels]
