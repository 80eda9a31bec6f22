"""One raw row in, one `Example` out (or the reason why not), whatever shape the data set has.

The shape of a source is detected from its columns, most specific first. What is not handled: tool calls and images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from job.data.reasons import Reason
from job.errors import DataError
from job.settings import DatasetSpec


class Shape(StrEnum):
    """How a source's rows hold their text."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A conversation, or raw text (then `messages` is empty)."""

    messages: tuple[Message, ...]
    text: str
    source: str
    row: int
    """0-based index in that source."""


# sharegpt data sets name the speakers in these ways (FastChat, LLaMA-Factory data/README.md, 2026-08).
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# (prompt column, completion column) pairs in use when a source has no mapping of its own.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("input", "solution"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("input", "output"),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A source's shape and the columns that play each role in it."""

    shape: Shape
    columns: Mapping[str, str]


def detect_layout(spec: DatasetSpec, columns: list[str]) -> Layout:
    """Find the shape of a source from its columns and the mapping that the user gave.

    Raises:
        DataError: a mapped column does not exist, or no shape fits; lists the columns there are.
    """
    for role, column in spec.columns.items():
        if column not in columns:
            raise DataError(
                f"DATASETS={spec}: {role}={column} names a column that does not exist; the columns are {', '.join(columns)}"
            )
    have = {column: column for column in columns} | dict(spec.columns)
    if mapped := set(spec.columns):  # what the user mapped decides; other columns may have misleading names
        for shape, roles in _SHAPE_ROLES.items():
            if roles <= mapped:
                return Layout(shape, have)
    if "messages" in have:
        return Layout(Shape.MESSAGES, have)
    if "conversations" in have:
        return Layout(Shape.SHAREGPT, have)
    if {"instruction", "output"} <= have.keys():
        return Layout(Shape.ALPACA, have)
    for prompt, completion in _PAIRS:
        if prompt in have and completion in have:
            return Layout(Shape.PROMPT_COMPLETION, have | {"prompt": have[prompt], "completion": have[completion]})
    if "text" in have:
        return Layout(Shape.TEXT, have)
    raise DataError(
        f"DATASETS={spec}: no known shape in the columns {', '.join(columns)}; "
        "name them, for example ?prompt=COLUMN&completion=COLUMN or ?text=COLUMN"
    )


_SHAPE_ROLES: dict[Shape, set[str]] = {
    Shape.MESSAGES: {"messages"},
    Shape.SHAREGPT: {"conversations"},
    Shape.ALPACA: {"instruction", "output"},
    Shape.PROMPT_COMPLETION: {"prompt", "completion"},
    Shape.TEXT: {"text"},
}


def read_row(row: Mapping[str, Any], layout: Layout, *, source: str, index: int, system_prompt: str | None) -> Example | Reason:
    """Turn a raw row into an example; `system_prompt` goes before conversations that have no system message."""
    if layout.shape is Shape.TEXT:
        text = row.get(layout.columns["text"])
        if not isinstance(text, str):
            return Reason.MALFORMED
        return Example(messages=(), text=text, source=source, row=index) if _is_unicode(text) else Reason.MALFORMED
    messages = _MESSAGE_READERS[layout.shape](row, layout.columns)
    if messages is None or not all(_is_unicode(message.content) for message in messages):
        return Reason.MALFORMED
    if system_prompt and (not messages or messages[0].role != "system"):
        messages = (Message(role="system", content=system_prompt), *messages)
    return Example(messages=messages, text="", source=source, row=index)


def _is_unicode(text: str) -> bool:
    """False where JSON smuggled in half of a surrogate pair, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_Messages = tuple[Message, ...] | None


def _from_messages(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Messages:
    return _from_turns(row.get(columns["messages"]), role_key="role", content_key="content")


def _from_sharegpt(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Messages:
    return _from_turns(row.get(columns["conversations"]), role_key="from", content_key="value")


def _from_turns(turns: Any, *, role_key: str, content_key: str) -> _Messages:
    if not isinstance(turns, list) or not turns:
        return None
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role = _ROLES.get(str(turn.get(role_key, turn.get("role"))).lower())
        content = turn.get(content_key, turn.get("content"))
        if role is None or not isinstance(content, str):
            return None
        messages.append(Message(role=role, content=content))
    return tuple(messages)


def _from_alpaca(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Messages:
    instruction, output = row.get(columns["instruction"]), row.get(columns["output"])
    extra = row.get(columns["input"]) if "input" in columns else None
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(extra, str | None):
        return None
    prompt = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return _pair(row, columns, prompt, output)


def _from_pair(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Messages:
    prompt, completion = row.get(columns["prompt"]), row.get(columns["completion"])
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return None
    return _pair(row, columns, prompt, completion)


def _pair(row: Mapping[str, Any], columns: Mapping[str, str], prompt: str, completion: str) -> _Messages:
    pair = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    system = row.get(columns["system"]) if "system" in columns else None
    return (Message(role="system", content=system), *pair) if isinstance(system, str) and system else pair


_MESSAGE_READERS = {
    Shape.MESSAGES: _from_messages,
    Shape.SHAREGPT: _from_sharegpt,
    Shape.ALPACA: _from_alpaca,
    Shape.PROMPT_COMPLETION: _from_pair,
}
