"""A list of turns as some data set writes it in, messages with one vocabulary of roles out.

Understood: role/content and from/value; contents given as text, as a list of text parts, or left out beside tool calls;
tool calls in OpenAI's form, and as the `function_call` turns of sharegpt; whole lists that are JSON (or Python) text.
Keys without a value are left out of tool calls and tools: Arrow fills them in where other rows have one.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    role: str
    """system, user, assistant or tool."""
    content: str
    extra: str | None = None
    """JSON text of an object with what else a template may use: tool_calls, tool_call_id, name, reasoning_content."""

    @property
    def calls_tools(self) -> bool:
        return self.extra is not None and '"tool_calls"' in self.extra


# Speakers as data sets name them (FastChat, LLaMA-Factory data/README.md, OpenAI's API; 2026-08).
_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "tools": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALLING_ROLES = ("function_call", "tool_call", "tool_calls")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # in the order of transformers' chat_template_utils


def read_turns(turns: Any) -> tuple[Message, ...] | None:
    """The messages of a list of turns, or None when it is not one."""
    if isinstance(turns, str):
        turns = parsed_json(turns)
    if not isinstance(turns, list) or not turns:
        return None
    messages = []
    for turn in turns:
        message = _read_turn(turn) if isinstance(turn, Mapping) else None
        if message is None:
            return None
        messages.append(message)
    return tuple(messages)


def read_history(history: Any) -> tuple[Message, ...] | None:
    """The messages of earlier exchanges: pairs of question and answer, or a list of turns; nothing where it is empty."""
    if isinstance(history, str) and history.strip():
        history = parsed_json(history)
        if history is None:
            return None
    if not history:
        return ()
    if isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        texts = [text for pair in history for text in pair]
        if not all(isinstance(text, str) for text in texts):
            return None
        return tuple(Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(texts))
    return read_turns(history)


def read_tools(tools: Any) -> str | None:
    """JSON text of a list of tools, each in OpenAI's form; None where there are none.

    Raises:
        ValueError: it is not a list of objects.
    """
    if isinstance(tools, str) and tools.strip():
        tools = parsed_json(tools)
        if tools is None:
            raise ValueError("not JSON")
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list):
        raise ValueError("not a list")
    whole = []
    for tool in tools:
        tool = parsed_json(tool) if isinstance(tool, str) else tool
        if not isinstance(tool, Mapping):
            raise ValueError("not an object")
        tool = _without_nulls(tool)
        whole.append(tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool})
    return _as_json(whole)


def parsed_json(text: str) -> Any:
    """What a text of JSON holds, or None. Lists that pandas wrote into a csv file are in Python's notation instead."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not text.lstrip().startswith(("[{'", '[{"', "[[", "{'")):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _read_turn(turn: Mapping[str, Any]) -> Message | None:
    speaker = turn.get("from") if turn.get("role") is None else turn["role"]
    said = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    name = speaker.strip().lower() if isinstance(speaker, str) else ""
    role = _ROLES.get(name)
    if role is None:
        return None
    extra: dict[str, Any] = {}
    if role == "assistant":
        calls = turn.get("tool_calls")
        if calls is None and isinstance(turn.get("function_call"), Mapping):  # OpenAI's form of 2023
            calls = [turn["function_call"]]
        if name in _CALLING_ROLES and isinstance(said, str) and calls is None:
            calls = parsed_json(said)
            said = said if calls is None else None
        calls = _read_calls(calls)
        if calls is None:
            return None
        if calls:
            extra["tool_calls"] = calls
        for key in _REASONING_KEYS:
            if isinstance(turn.get(key), str) and turn[key]:
                extra["reasoning_content"] = turn[key]
                break
    if isinstance(turn.get("name"), str) and turn["name"]:
        extra["name"] = turn["name"]
    if role == "tool" and isinstance(turn.get("tool_call_id"), str) and turn["tool_call_id"]:
        extra["tool_call_id"] = turn["tool_call_id"]
    content = _read_content(said)
    if content is None:
        if said is not None or not ("tool_calls" in extra or "reasoning_content" in extra):
            return None
        content = ""
    return Message(role=role, content=content, extra=_as_json(extra) if extra else None)


def _read_content(said: Any) -> str | None:
    if isinstance(said, list):
        texts = [
            part if isinstance(part, str) else part.get("text") if _is_text_part(part) else None
            for part in said
        ]  # fmt: skip
        return "".join(text for text in texts if text is not None) if texts and None not in texts else None
    return said if isinstance(said, str) else None


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _read_calls(calls: Any) -> list[dict[str, Any]] | None:
    """Calls in OpenAI's form with their arguments parsed; None when they are something else."""
    if isinstance(calls, str):
        calls = parsed_json(calls) if calls.strip() else []
        if calls is None:
            return None
    if isinstance(calls, Mapping):
        calls = [calls]
    if not calls:
        return []
    if not isinstance(calls, list):
        return None
    whole = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return None
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):
            # Templates write arguments as JSON themselves: a text would come out quoted twice.
            arguments = value if isinstance(value := parsed_json(arguments), dict) else arguments
        function = {"name": inner["name"], "arguments": {} if arguments is None else _without_nulls(arguments)}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        whole.append(identity | {"type": "function", "function": function})
    return whole


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _as_json(value: Any) -> str:
    """Rows of Arrow and csv hold more types than JSON has (dates, decimals): those become text."""
    return json.dumps(value, ensure_ascii=False, default=str)
