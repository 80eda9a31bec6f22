"""Texts of people and of models in, Markdown that shows them and does nothing else out."""

import html
import re

MAX_TEXT = 2_000
"""Characters of a text that is shown as it is."""
MAX_CELL = 300
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SPECIAL = re.compile(r"[\\`*\[\]|~$#!]")


def cell(value: object) -> str:
    """One line for a table or a sentence: no markup, no HTML, no new cell."""
    text = " ".join(_CONTROL.sub("�", str(value)).split())
    if len(text) > MAX_CELL:
        text = f"{text[: MAX_CELL - 1]}…"
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", html.escape(text))


def fenced(value: str, language: str = "") -> str:
    """A block of code in a fence that is longer than any inside."""
    text = _CONTROL.sub("�", value.replace("\r\n", "\n").replace("\r", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def shortened(value: str) -> str:
    """At most MAX_TEXT characters, and a word on how many are left out."""
    return value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}\n… ({len(value) - MAX_TEXT:,} more characters)"
