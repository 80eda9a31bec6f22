"""A prompt with what is right for it and the model's answer in, a score between 0 and 1 with its reason out.

An answer is right or wrong: no part marks, no judge. Answers with their thoughts before them are scored as they are.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job.scoring.answer_code import before_function, defines, find_block, find_code
from job.scoring.sandbox import run_python
from job.settings.eval_prompts import EvalPrompt, parse_json

REGEX_SECONDS = 2.0
"""A search that takes longer backtracks without end: 4,000 characters take microseconds otherwise."""
SHOWN = 60
"""Characters of an expected answer in a reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What an answer is worth."""

    value: float
    """0 wrong, 1 right."""
    reason: str
    """Why it is wrong; empty when right."""


RIGHT = Score(value=1.0, reason="")


def score(prompt: EvalPrompt, answer: str) -> Score | None:
    """Score an answer; None where the prompt has no scorer.

    exact_match and contains compare words: runs of white space are one blank, and composed letters equal decomposed ones;
    case counts. regex searches anywhere in the answer. json reads the answer, or the first fenced block in it, and compares
    values: order of keys and 1 or 1.0 do not matter. python runs the answer's code and then the tests in a sandbox.

    Raises:
        MachineError: regex and python need a sandbox, and this machine has none.
    """
    if prompt.scorer is None:
        return None
    reason = _SCORERS[prompt.scorer](prompt, answer)
    return Score(value=0.0, reason=reason) if reason else RIGHT


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _show(prompt: EvalPrompt) -> str:
    first = prompt.expected[0]
    shown = repr(first if len(first) <= SHOWN else first[:SHOWN] + "...")
    return f"{shown} or {len(prompt.expected) - 1} others" if len(prompt.expected) > 1 else shown


def _match_exactly(prompt: EvalPrompt, answer: str) -> str:
    right = _normalise(answer) in {_normalise(text) for text in prompt.expected}
    return "" if right else f"is not {_show(prompt)}"


def _find_text(prompt: EvalPrompt, answer: str) -> str:
    words = _normalise(answer)
    right = any(_normalise(text) in words for text in prompt.expected)
    return "" if right else f"does not contain {_show(prompt)}"


def _search(prompt: EvalPrompt, answer: str) -> str:
    # In a process that can be killed: re does not let go of a pattern that backtracks.
    program = f"import re\nprint(any(re.search(pattern, {answer!r}) for pattern in {prompt.expected!r}))"
    verdict = run_python(program, timeout_seconds=REGEX_SECONDS)
    if not verdict.ok:
        return verdict.reason
    return "" if verdict.output == "True\n" else f"does not match {_show(prompt)}"


def _compare_json(prompt: EvalPrompt, answer: str) -> str:
    block = find_block(answer, ("json", ""))
    try:
        value = parse_json(answer if block is None else block)
        right = not prompt.expected or any(_is_same(value, parse_json(text)) for text in prompt.expected)
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {error}"
    return "" if right else f"is not {_show(prompt)}"


def _is_same(one: Any, other: Any) -> bool:
    """Equal as JSON: in Python, True equals 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _run_tests(prompt: EvalPrompt, answer: str) -> str:
    code = find_code(answer)
    programs = [code]
    if prompt.entry_point is not None:
        if defines(code, prompt.entry_point):
            programs.insert(0, before_function(prompt.prompt, prompt.entry_point))
        else:
            programs = [prompt.prompt + code]
    return run_python(*programs, prompt.tests or "").reason


_SCORERS: dict[str, Callable[[EvalPrompt, str], str]] = {
    "exact_match": _match_exactly,
    "contains": _find_text,
    "regex": _search,
    "json": _compare_json,
    "python": _run_tests,
}
