"""One raw row in, one `Example` out (or the reason why not), whatever shape the data set has.

How a list of turns is read stands in `turns.py`, how the shape is found in `shapes.py`. Images are not handled: a row
with one is malformed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.data.reasons import Reason
from job.data.shapes import Layout, Shape
from job.data.turns import Message, parsed_json, read_history, read_tools, read_turns

__all__ = ["Example", "Message", "is_unicode", "read_row"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A conversation, or raw text (then `messages` is empty)."""

    messages: tuple[Message, ...]
    text: str
    source: str
    row: int
    """0-based index in that source."""
    tools: str | None = None
    """JSON text of the list of tools that the assistant may call."""


_Messages = tuple[Message, ...] | None
_Row = Mapping[str, Any]
_Columns = Mapping[str, str]


def read_row(
    row: _Row, layout: Layout, *, source: str, index: int, system_prompt: str | None, replace_system: bool = False
) -> Example | Reason:
    """Turn a raw row into an example.

    Args:
        system_prompt: goes before a conversation that has no system message.
        replace_system: it takes the place of the conversation's own system messages too.
    """
    columns = layout.columns
    if layout.shape is Shape.TEXT:
        text = row.get(columns["text"])
        if not isinstance(text, str) or not is_unicode(text):
            return Reason.MALFORMED
        return Example(messages=(), text=text, source=source, row=index)
    try:
        messages = _READERS[layout.shape](row, columns)
        tools = read_tools(row.get(columns["tools"])) if "tools" in columns else None
    except (ValueError, RecursionError):  # tools that are none, and objects nested beyond reason
        return Reason.MALFORMED
    if not messages:
        return Reason.MALFORMED
    if (before := _read_system(row, columns, messages)) is None:
        return Reason.MALFORMED
    messages = before + messages
    if system_prompt:
        if replace_system:
            messages = tuple(message for message in messages if message.role != "system")
        if not messages or messages[0].role != "system":
            messages = (Message(role="system", content=system_prompt), *messages)
    if not all(is_unicode(message.content) and is_unicode(message.extra or "") for message in messages):
        return Reason.MALFORMED
    if not is_unicode(tools or ""):
        return Reason.MALFORMED
    return Example(messages=messages, text="", source=source, row=index, tools=tools)


def is_unicode(text: str) -> bool:
    """False where JSON smuggled in half of a surrogate pair, which tokenizers refuse."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_system(row: _Row, columns: _Columns, messages: Sequence[Message]) -> _Messages:
    """The system message of a column of its own, when the conversation does not begin with one."""
    system = row.get(columns["system"]) if "system" in columns else None
    if not isinstance(system, str | None):
        return None
    if not system or not system.strip() or messages[0].role == "system":
        return ()
    return (Message(role="system", content=system),)


def _from_messages(row: _Row, columns: _Columns) -> _Messages:
    return read_turns(row.get(columns["messages"]))


def _from_sharegpt(row: _Row, columns: _Columns) -> _Messages:
    return read_turns(row.get(columns["conversations"]))


def _from_alpaca(row: _Row, columns: _Columns) -> _Messages:
    instruction, output = row.get(columns["instruction"]), row.get(columns["output"])
    extra = row.get(columns["input"]) if "input" in columns else None
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(extra, str | None):
        return None
    prompt = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return _pair(row, columns, prompt, output)


def _from_pair(row: _Row, columns: _Columns) -> _Messages:
    prompt, completion = row.get(columns["prompt"]), row.get(columns["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        if not (_may_be_turns(prompt) and _may_be_turns(completion)):
            return _pair(row, columns, prompt, completion)
        prompt_turns, completion_turns = read_turns(prompt), read_turns(completion)
        if prompt_turns is None or completion_turns is None:  # texts that only look like lists of turns
            return _pair(row, columns, prompt, completion)
        return prompt_turns + completion_turns
    before, after = _as_turns(prompt, "user"), _as_turns(completion, "assistant")
    return None if before is None or after is None else before + after


def _as_turns(value: Any, role: str) -> _Messages:
    """Messages of a conversational prompt or completion, either of which may also be a plain text."""
    return (Message(role=role, content=value),) if isinstance(value, str) else read_turns(value)


def _may_be_turns(text: str) -> bool:
    return text.startswith("[{") and isinstance(parsed_json(text), list)


def _pair(row: _Row, columns: _Columns, prompt: str, completion: str) -> _Messages:
    history = read_history(row.get(columns["history"])) if "history" in columns else ()
    if history is None:
        return None
    return (*history, Message(role="user", content=prompt), Message(role="assistant", content=completion))


_READERS: dict[Shape, Callable[[_Row, _Columns], _Messages]] = {
    Shape.MESSAGES: _from_messages,
    Shape.SHAREGPT: _from_sharegpt,
    Shape.ALPACA: _from_alpaca,
    Shape.PROMPT_COMPLETION: _from_pair,
}
