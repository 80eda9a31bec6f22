"""The published schema of `report.json`: what the code says now, and what reports really are."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from reports import bare_report, rich_report

from job.deliver.report import Report
from job.deliver.schema import report_schema, schema_text

PUBLISHED = Path(__file__).resolve().parent.parent / "docs/report.schema.json"


def test_the_published_schema_is_the_one_that_is_generated() -> None:
    assert PUBLISHED.read_text("utf-8") == schema_text(), "run `make docs`"


def test_the_schema_is_one() -> None:
    schema = report_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == "urn:qlora-job:report:1" and schema["title"] == "Report of a qlora-job run"


@pytest.mark.parametrize("report", [rich_report(), bare_report()], ids=["rich", "bare"])
def test_a_report_is_as_the_schema_says(report: Report) -> None:
    validator = Draft202012Validator(report_schema())
    written = json.loads(report.model_dump_json())
    assert [error.message for error in validator.iter_errors(written)] == []
    assert Report.model_validate(written) == report


def test_what_is_no_report_is_refused() -> None:
    written = {**json.loads(rich_report().model_dump_json()), "stopped": "gave up"}
    assert len(list(Draft202012Validator(report_schema()).iter_errors(written))) == 1
