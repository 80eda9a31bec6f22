"""The form of `report.json` for those who read it by program: JSON Schema, published as `docs/report.schema.json`.

It says what this version writes. A reader should pass over fields that it does not know: new ones come without a new
`schema_version`.
"""

import json
from typing import Any

from job.deliver.report import Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def report_schema() -> dict[str, Any]:
    """The schema of a report as it is written, computed values included."""
    version = Report.model_fields["schema_version"].default
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": DIALECT, "$id": f"urn:qlora-job:report:{version}", **schema}


def schema_text() -> str:
    """The published file."""
    return json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"
