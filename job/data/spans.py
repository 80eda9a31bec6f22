"""A conversation in, its text and the stretches of it that are learned out: the checked derivation.

For each reply the template is asked what comes before it (the conversation so far, with the prompt for generation), what
comes after it (a probe stands in the reply's place), and whether both hold in the whole conversation too. Where they do
not - models that drop earlier reasoning, or that end the last turn with another token - the conversation becomes one
piece per reply.

Learned are the reply, what the template opens it with and the prompt does not (an empty reasoning block), and the mark of
the end of the turn without the blanks after it: without the mark, generation would never stop.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from job.data.templates import PROBE, ChatTemplate
from job.data.turns import Message

Learn = Literal["assistant", "completion", "all"]
_NUM_CHARACTERS_ASKED = 40
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Span:
    """A learned stretch of a text, in characters."""

    begin: int
    end: int
    rest: str = ""
    """What the prompt for generation writes where a plain reply begins; a reply that begins so itself follows it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A text to learn from."""

    text: str
    spans: list[Span]
    num_messages: int
    """Of the conversation's messages, this many were rendered: the first ones."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """A conversation up to and with one reply."""

    text: str
    begin: int
    content_end: int
    """Where the content ends and the mark of the turn's end begins."""
    end: int
    rest: str


class LostReplyError(Exception):
    """A reply is not where the derivation looks for it."""


class Derivation:
    """Finds what is learned by asking the template; several renderings for each reply."""

    def __init__(self, template: ChatTemplate, learn: Learn, added_tokens: Sequence[str]) -> None:
        self._template = template
        self._learn = learn
        whole = sorted((token for token in added_tokens if len(token) > 1), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, whole)) or "(?!)")
        self._longest = len(whole[0]) if whole else 0
        self._opening: str | None = None

    def find_pieces(self, messages: Sequence[Message], tools: str | None) -> list[Piece]:
        """One piece, or one for each reply where the template demands it.

        Raises:
            TemplateRefusal: the template does not take these messages.
            LostReplyError: a reply cannot be found in the text.
        """
        whole = self._template.render(messages, tools)
        if self._learn == "all":
            return [Piece(whole, [Span(0, len(whole))], len(messages))]
        replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if self._learn == "completion":
            replies = replies[-1:]
        last = len(messages) - 1
        turns = [(index, self._turn(messages[: index + 1], tools, whole if index == last else None)) for index in replies]
        spans = [self._span_in(whole, turn) for _, turn in turns]
        found = [span for span in spans if span]
        if len(found) == len(spans):
            return [Piece(whole, found, len(messages))]
        return [Piece(turn.text, [Span(turn.begin, turn.end, turn.rest)], index + 1) for index, turn in turns]

    def _turn(self, messages: Sequence[Message], tools: str | None, whole: str | None) -> _Turn:
        *history, reply = messages
        probed = self._template.render([*history, Message(role="assistant", content=PROBE)], tools)
        slot = probed.rfind(PROBE)
        if slot < 0:
            raise LostReplyError
        text = self._template.render(messages, tools) if whole is None else whole
        begin, rest = self._begin(history, tools, text, probed, slot)
        after = probed[slot + len(PROBE) :]
        if text.endswith(after):
            content_end = len(text) - len(after)
            end = content_end + len(after.rstrip()) if after.strip() else len(text)
        else:  # a turn that calls tools may end with a mark of its own
            content_end = end = len(text.rstrip())
        if content_end < begin or not _says(text[begin:content_end], reply):
            raise LostReplyError
        return _Turn(text, begin, content_end, end, rest)

    def _begin(self, history: Sequence[Message], tools: str | None, text: str, probed: str, slot: int) -> tuple[int, str]:
        """Where the reply begins in `text`, and what the prompt has left over there."""
        header, rest = slot, ""
        if history:
            prompt = self._template.render(history, tools, prompt=True)
            header = self._common(prompt, probed[:slot])
            rest = prompt[header:]
            if rest and text.startswith(prompt):
                return len(prompt), rest
        if rest or not history:
            # The two part: in how they open a reply, or long before it (Mistral's puts the system message into the last
            # turn of the user, but into none where the assistant has the last word). A plain exchange tells the opening.
            opening = self._plain_opening()
            if not probed[:slot].endswith(opening):
                raise LostReplyError
            rest = rest if header == slot - len(opening) else ""
            header = slot - len(opening)
        if text[:header] != probed[:header]:
            raise LostReplyError
        return header, rest

    def _plain_opening(self) -> str:
        """What the template, and not the prompt, writes before the reply to a single question."""
        if self._opening is None:
            question, reply = Message(role="user", content=f"{PROBE}?"), Message(role="assistant", content=PROBE)
            header = self._template.render([question, reply]).rpartition(PROBE)[0]
            opening = header[self._common(self._template.render([question], prompt=True), header) :]
            if PROBE in opening:
                raise LostReplyError
            self._opening = opening
        return self._opening

    def _span_in(self, whole: str, turn: _Turn) -> Span | None:
        """Where a turn's learned stretch stands in the whole conversation; None where that renders the turn differently."""
        if whole[: turn.content_end] != turn.text[: turn.content_end]:
            return None
        after, after_in_whole = turn.text[turn.content_end :], whole[turn.content_end :]
        common = self._common(after, after_in_whole[: len(after) + self._longest])
        if common == len(after):
            return Span(turn.begin, turn.end, turn.rest)
        mark = after[:common].rstrip()
        return Span(turn.begin, turn.content_end + len(mark), turn.rest) if mark else None

    def _common(self, left: str, right: str) -> int:
        """Length of the common prefix, cut back where it would end inside a token such as `<think>`."""
        length = _common_prefix(left, right)
        for text in (left, right):
            window = max(0, length - self._longest)
            for match in self._added.finditer(text, window, length + self._longest):
                if match.start() < length < match.end():
                    length = match.start()
                    break
        return length


def _says(learned: str, reply: Message) -> bool:
    """Whether the reply's last word is in the learned text, and the names of the tools that it calls."""
    # Templates may take reasoning and blanks off a reply, or set them apart; what it ends with must be there.
    end = reply.content.rstrip()[-_NUM_CHARACTERS_ASKED:]
    words = _WORDS.findall(end) or end.split()
    if words and words[-1] not in learned:
        return False
    if not reply.calls_tools:
        return True
    return all(call["function"]["name"] in learned for call in json.loads(reply.extra or "{}")["tool_calls"])


def _common_prefix(left: str, right: str) -> int:
    """By halving: comparing slices costs far less than comparing characters one by one."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
