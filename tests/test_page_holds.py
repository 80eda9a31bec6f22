"""The page holds for every report that could be written: nothing known, everything odd, numbers that are none."""

import re
from datetime import UTC, datetime
from functools import partial
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from reports import rich_settings
from test_page import Page

from job.data.tally import SourceTally, Tally
from job.deliver.compare import Comparison
from job.deliver.page.series import LARGEST, curve
from job.deliver.page.write import write_page
from job.deliver.report import Actual, Candidate, Chosen, Happening, Publication, Report, Sample
from job.events import Answer
from job.keep.ledger import Attempt
from job.plan.forecast import Plan
from job.plan.memory import MemoryEstimate
from job.plan.progress import Reforecast

CURVES = ("step", "loss", "learning_rate", "grad_norm", "num_tokens", "seconds", "memory_bytes", "eval_loss")
times = st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))
few = partial(st.lists, max_size=4)


def fields_of(kind: type[BaseModel], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Models of which every field is drawn; also those that have a default."""
    drawn = {name: given.get(name, st.from_type(field.annotation)) for name, field in kind.model_fields.items()}  # type: ignore[arg-type]
    return st.builds(kind, **drawn)


counts = st.dictionaries(
    st.one_of(st.text(max_size=8), st.sampled_from(["64", "128", "1048576"])), st.integers(-3, 10**7), max_size=4
)
row_counts = st.integers(0, 10**7)
attempts = fields_of(Attempt, started=times, ended=times, notes=st.just({}))
plans = fields_of(Plan, memory=st.none() | fields_of(MemoryEstimate), assumptions=few(st.text()))
sources = fields_of(SourceTally, num_rows=row_counts, num_kept=row_counts, dropped=counts, lengths=counts, languages=counts)
rows = st.fixed_dictionaries({}, optional={name: st.none() | st.floats() | st.integers(0, 10**6) for name in CURVES})
measured = st.fixed_dictionaries({"step": st.integers(0, 10**6), "eval_loss": st.floats()})
odd_settings = st.dictionaries(st.text(), st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=3), max_size=4)
any_report = fields_of(
    Report,
    plan=st.none() | plans,
    reforecast=st.none() | fields_of(Reforecast),
    comparison=few(fields_of(Comparison)),
    actual=fields_of(Actual),
    data=st.none() | fields_of(Tally, sources=st.lists(sources, max_size=6)),
    attempts=few(attempts),
    curve=st.lists(rows, max_size=60),
    evaluations=few(measured),
    candidates=few(fields_of(Candidate)),
    chosen=st.none() | fields_of(Chosen),
    happenings=few(fields_of(Happening, at=times)),
    publication=st.none() | fields_of(Publication),
    samples=few(fields_of(Sample, answers=few(fields_of(Answer)))),
    settings=st.just(rich_settings()) | odd_settings,
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(report=any_report)
def test_every_report_becomes_a_page(report: Report) -> None:
    html = write_page(report)
    page = Page(html)
    assert len(page.values("data-chart")) == page.tags.count("svg")
    for points in re.findall(r' (?:d|x|y)="([^"]*)"', "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))):
        assert not re.search("nan|inf", points)


@given(st.lists(rows, max_size=20), st.sampled_from(CURVES))
def test_a_curve_has_only_numbers_that_can_be_drawn_in_order(some: list[dict[str, float | None]], name: str) -> None:
    points = curve(some, name)
    assert points == sorted(points) and all(abs(value) < LARGEST for point in points for value in point)
