"""Messages in, the text that the model's chat template makes of them out.

The template is compiled once, by transformers' own compiler, and rendered with what `apply_chat_template` would give it
- except for the clock: a template that writes today's date (Llama 3.2, gpt-oss) gets one fixed date, so that the same data
gives the same bytes tomorrow. That date is the one that Llama 3.1's template falls back to.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from job.data.turns import Message
from job.errors import DataError
from job.settings.chat_template import CHATML, find_template

TODAY = datetime(2024, 7, 26)
PROBE = "\ue000Reply\ue001"
"""Stands for a message's content; its private characters are in no text, and its letters show a change of case."""
# What a template's own code may raise for messages it was not written for.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class TemplateRefusal(Exception):  # noqa: N818  it is an answer, not a failure
    """The template raised an error for a conversation."""


def set_template(tokenizer: Any, chat_template: str | None) -> None:
    """Give the tokenizer the template of a family or file, or leave it its own; one that has none gets ChatML.

    Raises:
        DataError: the value names no template.
    """
    if chat_template:
        try:
            tokenizer.chat_template = find_template(chat_template)
        except ValueError as error:
            raise DataError(f"CHAT_TEMPLATE={chat_template}: {error}") from error
    elif not tokenizer.chat_template:
        tokenizer.chat_template = CHATML


class ChatTemplate:
    """A tokenizer's template, ready to render."""

    def __init__(self, tokenizer: Any) -> None:
        """Compile.

        Raises:
            DataError: the tokenizer has no template, or it is not a valid one, or it leaves replies out.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if not tokenizer.chat_template:
            raise DataError("CHAT_TEMPLATE: the model's tokenizer has no template; name one, `chatml` say")
        try:
            self._compiled = _compile_jinja_template(tokenizer.get_chat_template())
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"CHAT_TEMPLATE: not a valid template ({error}); correct it") from error
        except ValueError as error:  # several templates by name, and none of them is the default
            raise DataError(f"CHAT_TEMPLATE: {error}; name a template") from error
        self._variables = {"documents": None, "strftime_now": TODAY.strftime, **tokenizer.special_tokens_map}
        self._in_parts = False
        self._closing = ""
        self._study(tokenizer.eos_token or "")

    def render(self, messages: Sequence[Message], tools: str | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant's next reply begins.

        Where the template writes nothing after a reply, the tokenizer's end of text follows the last one.

        Raises:
            TemplateRefusal: the template does not take these messages.
        """
        closing = self._closing if not prompt and messages and messages[-1].role == "assistant" else ""
        return self._rendered(messages, None if tools is None else json.loads(tools), prompt) + closing

    def _rendered(self, messages: Sequence[Message], tools: Any, prompt: bool) -> str:
        try:
            return self._render([self._turn(message) for message in messages], tools, prompt)
        except TypeError as error:
            # A few templates (DeepSeek's) glue the arguments of tool calls to texts: they want them as text.
            turns = [self._turn(message, text_arguments=True) for message in messages]
            if not any(message.calls_tools for message in messages):
                raise TemplateRefusal(str(error)) from error
        except _REFUSALS as error:
            raise TemplateRefusal(str(error)) from error
        try:
            return self._render(turns, tools, prompt)
        except _REFUSALS as error:
            raise TemplateRefusal(str(error)) from error

    def _render(self, turns: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        text: str = self._compiled.render(messages=turns, tools=tools, add_generation_prompt=prompt, **self._variables)
        return text

    def _turn(self, message: Message, *, text_arguments: bool = False) -> dict[str, Any]:
        content: Any = [{"type": "text", "text": message.content}] if self._in_parts else message.content
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.extra is not None:
            turn |= json.loads(message.extra)
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]  # gpt-oss's name for it
            if text_arguments:
                turn["tool_calls"] = [_with_text_arguments(call) for call in turn.get("tool_calls", ())]
        return turn

    def _study(self, eos_token: str) -> None:
        """Find out how contents must be given, and whether the template ends a turn at all.

        Raises:
            DataError: replies given in neither way can be found in what the template writes.
        """
        exchange = (Message(role="user", content="?"), Message(role="assistant", content=PROBE))
        num_refused = 0
        for self._in_parts in (False, True):
            try:
                _, found, after = self.render(exchange).rpartition(PROBE)
            except TemplateRefusal:
                num_refused += 1
                continue
            if found:
                # GLM's ends a turn with the next one's role only: a last reply without an end would teach to go on for ever.
                self._closing = "" if after.strip() else eos_token
                return
        self._in_parts = False
        if num_refused == 2:  # not even this plain exchange: conversations will be counted one by one
            return
        raise DataError(
            "CHAT_TEMPLATE: the model's template renders a reply so that its place cannot be found; "
            "name another with CHAT_TEMPLATE, `chatml` say"
        )


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
