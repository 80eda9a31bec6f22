"""How quantities are said in a report."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.deliver.page.wording import count, dollars, duration, share, short_count, size, tick_labels


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (duration(0.31), "0.3 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(3840), "1 h 04 min"),
        (duration(273_600), "3 d 04 h"),
        (duration(math.nan), "unknown"),
        (duration(None), "unknown"),
        (count(1234567), "1,234,567"),
        (short_count(9_999), "9,999"),
        (short_count(18_420), "18.4 k"),
        (short_count(999_999), "1.00 M"),
        (dollars(0.0403), "$0.040"),
        (dollars(math.inf), "unknown"),
        (share(1, 1000), "<1%"),
        (share(999, 1000), ">99%"),
        (share(0, 0), "0%"),
        (",".join(tick_labels([0, 0.5, 1])), "0,0.5,1.0"),
        (",".join(tick_labels([0, 1e-4, 2e-4])), "0,1e-4,2e-4"),
        (",".join(tick_labels([0, 20_000])), "0,20k"),
        (",".join(tick_labels([0, 0.5], prefix="$")), "$0,$0.50"),
    ],
)
def test_quantities_are_said_as_people_say_them(said: str, expected: str) -> None:
    assert said == expected


@given(st.floats())
def test_no_quantity_is_said_to_be_none(value: float) -> None:
    for said in (count(value), dollars(value), duration(value), short_count(value), size(value)):
        assert "nan" not in said and "inf" not in said
    if not math.isfinite(value):
        assert {duration(value), dollars(value), size(value)} == {"unknown"}


@given(st.integers(-50, 50), st.sampled_from([1, 2, 2.5, 5]), st.integers(-9, 9), st.sampled_from(["", "$"]))
def test_labels_of_an_axis_tell_its_ticks_apart(first: int, step: float, power: int, prefix: str) -> None:
    ticks = [(first + at) * step * 10.0**power for at in range(5)]
    assert len(set(tick_labels(ticks, prefix=prefix))) == 5
