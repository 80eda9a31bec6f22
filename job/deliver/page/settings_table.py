"""The settings of a report in, those that were changed out, by section and as a person writes them."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from job.deliver.page.wording import spelled
from job.deliver.report import Report
from job.settings import DatasetSpec
from job.settings.read import sections

LONG = 90
"""Characters from which a setting's value is folded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting that differs from its default."""

    name: str
    value: str
    is_long: bool


def settings_shown(report: Report) -> list[tuple[str, list[Setting]]]:
    """(title, settings) of each section, only those that differ from their default; unknown ones are all shown."""
    known = dict(sections())
    groups = []
    for name, values in report.settings.items():
        section = known.get(name)
        if not isinstance(values, dict):
            groups.append((spelled(name), [_setting(name, values)]))
            continue
        shown = []
        for key, value in values.items():
            field = section.model_fields.get(key) if section else None
            if field is not None and not field.is_required():
                default = field.get_default(call_default_factory=True, validated_data={})
                if to_jsonable_python(default) == value:
                    continue
            shown.append(_setting(key, value))
        if shown:
            groups.append((section.title if section else spelled(name), shown))
    return groups


def _setting(name: str, value: Any) -> Setting:
    text = _as_written(value)
    return Setting(name=name.upper(), value=text, is_long=len(text) > LONG or "\n" in text)


def _as_written(value: Any) -> str:
    """As much like the setting was written as its parsed value allows."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if isinstance(value, dict) and isinstance(value.get("where"), str):
        return _data_set(value)
    if isinstance(value, list) and value:
        parts = [_as_written(one) for one in value]
        return ("\n" if any(isinstance(one, dict) for one in value) and len(value) > 1 else ", ").join(parts)
    return json.dumps(value, ensure_ascii=False, default=str)


def _data_set(spec: dict[str, Any]) -> str:
    fields = DatasetSpec.model_fields
    options = []
    for name, value in spec.items():
        default = fields[name].get_default(call_default_factory=True) if name in fields else None
        if name == "where" or value is None or value == to_jsonable_python(default):
            continue
        options += (
            [f"{key}={column}" for key, column in value.items()] if isinstance(value, dict) else [f"{name}={_as_written(value)}"]
        )
    return str(spec["where"]) + (f"?{'&'.join(options)}" if options else "")
