"""Examples in, a reason to drop each or nothing out: small functions, cheapest first.

Not here: language (`language.py`) and near duplicates (`near.py`), which hold a model and an index, and length, which is
judged in tokens where those are made (`tokens.py`).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

from job.data.messages import Example
from job.data.reasons import Reason
from job.data.repair import drop_garbled
from job.data.repetition import drop_repetitive
from job.settings import DataSettings

Filter = Callable[[Example], Reason | None]

PLACEHOLDERS = frozenset(
    {
        *("<nooutput>", "<no output>", "nooutput", "no output", "[no output]"),  # what text-davinci-003 wrote in Alpaca
        *("<noinput>", "<no input>", "noinput", "no input"),  # the same for inputs, which slipped into outputs
        *("n/a", "n.a", "#n/a", "not applicable"),  # Alpaca too; alpaca-cleaned removes them (its README, "N/A outputs")
        *("none", "null", "nil", "nan", "undefined"),  # what programs write for a missing value
        *("todo", "tbd", "fixme", "placeholder", "[placeholder]", "your response here", "[your response here]"),  # drafts
        *("[deleted]", "[removed]"),  # what Reddit shows of removed answers
    }
)
"""Whole replies that say nothing, in small letters without a full stop or emphasis around them."""
LONGEST_PLACEHOLDER = max(map(len, PLACEHOLDERS)) + 8  # blanks, emphasis and a full stop
_NOTHING = re.compile(r"[\s.…_]*|-{2,}|—+")


def drop_without_reply(example: Example) -> Reason | None:
    """A conversation must end with the assistant."""
    if example.messages and example.messages[-1].role != "assistant":
        return Reason.NO_REPLY
    return None


def drop_empty_reply(example: Example) -> Reason | None:
    """Every reply, and a raw text, must say something; a call of a tool does.

    A placeholder word is an answer when the question has it ("... positive, negative or none?"); where it does not, "None"
    may be one too, but is far more often a missing value that a program wrote.
    """
    if not example.messages:
        return Reason.EMPTY_REPLY if _is_empty(example.text, "") else None
    question = ""
    for message in example.messages:
        if message.role == "assistant" and not message.calls_tools and _is_empty(message.content, question):
            return Reason.EMPTY_REPLY
        if message.role == "user":
            question = message.content
    return None


def _is_empty(reply: str, question: str) -> bool:
    if _NOTHING.fullmatch(reply):
        return True
    if len(reply) > LONGEST_PLACEHOLDER:
        return False
    word = " ".join(reply.lower().split()).strip("*_`\"'. ")
    return word in PLACEHOLDERS and word not in question.lower()


def build_filters(settings: DataSettings) -> list[Filter]:
    """The filters that need nothing but the example, in the order in which they run."""
    filters: list[Filter] = [drop_without_reply, drop_empty_reply]
    if settings.min_turns > 1 or settings.max_turns is not None:
        filters.append(_limit_turns(settings.min_turns, settings.max_turns))
    if settings.keep_regex:
        filters.append(_demand(settings.keep_regex))
    if settings.drop_regex:
        filters.append(_forbid(settings.drop_regex))
    filters.append(drop_garbled)
    if settings.drop_repetitive:
        filters.append(drop_repetitive)
    return filters


def first_reason(example: Example, filters: Sequence[Filter]) -> Reason | None:
    return next((reason for check in filters if (reason := check(example))), None)


def content_key(example: Example) -> bytes:
    """16 bytes that identify what an example says, system messages left out."""
    digest = hashlib.blake2b(digest_size=16)
    for message in example.messages:
        if message.role != "system":
            said = f"{message.role}\0{message.content.strip()}\0{message.extra or ''}\0"
            digest.update(said.encode("utf-8", "surrogatepass"))
    digest.update((example.tools or "").encode("utf-8", "surrogatepass"))
    digest.update(example.text.strip().encode("utf-8", "surrogatepass"))
    return digest.digest()


def _limit_turns(fewest: int, most: int | None) -> Filter:
    def check(example: Example) -> Reason | None:
        replies = sum(message.role == "assistant" for message in example.messages)
        if not example.messages:  # raw text has no turns
            return None
        if replies < fewest:
            return Reason.TOO_FEW_TURNS
        return Reason.TOO_MANY_TURNS if most is not None and replies > most else None

    return check


def _demand(pattern: str) -> Filter:
    regex = re.compile(pattern)
    return lambda example: None if any(map(regex.search, _said(example))) else Reason.KEEP_REGEX


def _forbid(pattern: str) -> Filter:
    regex = re.compile(pattern)
    return lambda example: Reason.DROP_REGEX if any(map(regex.search, _said(example))) else None


def _said(example: Example) -> Iterator[str]:
    """Each message's text but the system's, or the raw text."""
    if not example.messages:
        yield example.text
    for message in example.messages:
        if message.role != "system":
            yield message.content
            if message.extra is not None:
                yield message.extra
