"""A source's columns in, its shape out: which column plays which role.

Detection goes from the most specific shape to the least, and the first that fits wins:

    1. what the user mapped (`?prompt=input&completion=solution`), whatever else there is
    2. messages or sharegpt: a column with one of the usual names whose values are lists of turns
    3. alpaca: instruction with output or response, and input or context when there is one
    4. prompt_completion: one of the pairs below, in their order
    5. text: one column of raw text

`system`, `tools` and `history` are used beside any of 2 to 4. Columns that no role names are ignored: a `reasoning`
column beside `input` and `solution`, say. Images and preference pairs (chosen, rejected) have no shape.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from job.errors import DataError
from job.settings import DatasetSpec


class Shape(StrEnum):
    """How a source's rows hold their text."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Layout:
    """A source's shape and the columns that play each role in it."""

    shape: Shape
    columns: Mapping[str, str]
    """Role -> column; only roles that the shape uses."""

    def __str__(self) -> str:
        roles = (role if role == column else f"{role}={column}" for role, column in self.columns.items())
        return f"{self.shape} ({', '.join(roles)})"


_TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_ALPACA_INPUTS, _ALPACA_OUTPUTS = ("input", "context"), ("output", "response")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "canonical_solution"),  # human-eval
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "solution"),
    ("input", "output"),
    ("instruction", "completion"),
    ("instruction", "answer"),
)
_TEXT_COLUMNS = ("text", "content")
_SIDE_ROLES = {"system": ("system", "system_prompt"), "tools": ("tools", "functions"), "history": ("history",)}
# The roles that a mapping must name to decide the shape by itself.
_DECIDING_ROLES: dict[Shape, set[str]] = {
    Shape.MESSAGES: {"messages"},
    Shape.SHAREGPT: {"conversations"},
    Shape.ALPACA: {"instruction", "output"},
    Shape.PROMPT_COMPLETION: {"prompt", "completion"},
    Shape.TEXT: {"text"},
}
_NUM_LISTED = 20


def detect_layout(spec: DatasetSpec, columns: list[str], rows: Sequence[Mapping[str, Any]] = ()) -> Layout:
    """Find the shape of a source from its columns, some of its rows, and the mapping that the user gave.

    Raises:
        DataError: a mapped column does not exist, or no shape fits; lists the columns there are.
    """
    have = set(columns)
    for role, column in spec.columns.items():
        if column not in have:
            raise DataError(
                f"DATASETS={spec}: {role}={column} names a column that does not exist; the columns are {list_columns(columns)}"
            )
    named = {name: name for name in columns} | spec.columns
    layout = _mapped_layout(spec.columns, named) or _found_layout(named, rows)
    if layout is None:
        raise DataError(
            f"DATASETS={spec}: no known shape in the columns {list_columns(columns)}; "
            "name them, for example ?messages=COLUMN, ?prompt=COLUMN&completion=COLUMN or ?text=COLUMN"
        )
    return layout


def list_columns(columns: Sequence[str]) -> str:
    """The columns in words, the first 20 of them by name."""
    listed = ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in columns[:_NUM_LISTED])
    return f"{listed} and {len(columns) - _NUM_LISTED:,} more" if len(columns) > _NUM_LISTED else listed


def _mapped_layout(mapped: Mapping[str, str], named: Mapping[str, str]) -> Layout | None:
    for shape, roles in _DECIDING_ROLES.items():
        if roles <= mapped.keys():
            # An alpaca `input` goes unmapped as a rule, and belongs to it all the same.
            extra = _choose(named, input=_ALPACA_INPUTS) if shape is Shape.ALPACA else {}
            return _with_sides(shape, extra | {role: mapped[role] for role in sorted(roles)}, named)
    return None


def _found_layout(named: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Layout | None:
    for name in _TURN_COLUMNS:
        if name in named:
            keys = _turn_keys(rows, named[name])
            if keys or not rows or name in ("messages", "conversations"):
                sharegpt = "from" in keys or (name == "conversations" and "role" not in keys)
                role = "conversations" if sharegpt else "messages"
                return _with_sides(Shape.SHAREGPT if sharegpt else Shape.MESSAGES, {role: named[name]}, named)
    if "instruction" in named and any(name in named for name in _ALPACA_OUTPUTS):
        roles = {"instruction": named["instruction"]} | _choose(named, input=_ALPACA_INPUTS, output=_ALPACA_OUTPUTS)
        return _with_sides(Shape.ALPACA, roles, named)
    for prompt, completion in _PAIRS:
        if prompt in named and completion in named:
            return _with_sides(Shape.PROMPT_COMPLETION, {"prompt": named[prompt], "completion": named[completion]}, named)
    text = _choose(named, text=_TEXT_COLUMNS)
    return Layout(Shape.TEXT, text) if text else None


def _with_sides(shape: Shape, roles: Mapping[str, str], named: Mapping[str, str]) -> Layout:
    taken = set(roles.values())
    sides = {} if shape is Shape.TEXT else _choose(named, **_SIDE_ROLES)
    return Layout(shape, dict(roles) | {role: column for role, column in sides.items() if column not in taken})


def _choose(named: Mapping[str, str], **names: Sequence[str]) -> dict[str, str]:
    """For each role the first of its column names that there is."""
    found = {role: next((named[name] for name in choices if name in named), None) for role, choices in names.items()}
    return {role: column for role, column in found.items() if column is not None}


def _turn_keys(rows: Sequence[Mapping[str, Any]], column: str) -> set[str]:
    """The keys of the turns in the first rows; empty when the column does not hold lists of turns."""
    keys: set[str] = set()
    for row in rows[:50]:
        turns = row.get(column)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):
                continue
        if isinstance(turns, list):
            keys.update(key for turn in turns[:4] if isinstance(turn, dict) for key in turn)
    return keys if keys & {"role", "from"} else set()
