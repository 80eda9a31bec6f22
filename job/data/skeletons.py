"""The derivation of `spans.py`, remembered: for most conversations one rendering and one comparison.

A skeleton is what the derivation finds for probes in place of contents: the texts that the template writes around them and
the borders of what is learned. A conversation with the same roles fits when skeleton and contents together are exactly
what the template renders; one that does not (a content that the template takes apart, tool calls) is derived.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from job.data.spans import Derivation, Learn, LostReplyError, Piece, Span
from job.data.templates import ChatTemplate, TemplateRefusal
from job.data.turns import Message

_MAX_REMEMBERED = 2_000
"""Sequences of roles; ordinary data has dozens, data with many speakers in no order has one per row."""
_MAX_TURNS = 64
"""Longer conversations are derived: few have the same number of turns."""
_LEFT, _RIGHT = " \n", "\n "
_SLOT = re.compile("\ue000Slot(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of a message's content, with or without the blanks at its ends."""

    message: int
    keeps_left: bool
    keeps_right: bool

    def fill(self, messages: Sequence[Message]) -> str:
        content = messages[self.message].content
        if not self.keeps_left:
            content = content.lstrip()
        return content if self.keeps_right else content.rstrip()


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """One piece: literal texts and slots in order, and which of their borders are those of what is learned."""

    parts: list[str | _Slot]
    borders: list[tuple[int, int, str]]
    """(number of parts before the span, before its end, the span's rest)."""
    num_messages: int

    def fill(self, messages: Sequence[Message], text: str) -> Piece | None:
        """The piece, or None when `text` is not this skeleton with these contents."""
        filled = [part if isinstance(part, str) else part.fill(messages) for part in self.parts]
        if "".join(filled) != text:
            return None
        starts = [0]
        for part in filled:
            starts.append(starts[-1] + len(part))
        spans = [Span(starts[first], starts[last], rest) for first, last, rest in self.borders]
        # A reply that goes on as the prompt for generation does may begin later than the skeleton says.
        if any(span.rest and text.startswith(span.rest, span.begin) for span in spans):
            return None
        return Piece(text, spans, self.num_messages)


class PieceFinder:
    """Finds what is learned of conversations, remembering the skeletons of those seen before."""

    def __init__(self, template: ChatTemplate, learn: Learn, added_tokens: Sequence[str]) -> None:
        self._template = template
        self._learn = learn
        self.derivation = Derivation(template, learn, added_tokens)
        self._skeletons: dict[tuple[str, ...], list[_Skeleton] | None] = {}

    def find_pieces(self, messages: Sequence[Message], tools: str | None) -> list[Piece]:
        """As `Derivation.find_pieces`, and equal to it."""
        if self._learn == "all" or tools is not None or len(messages) > _MAX_TURNS:
            return self.derivation.find_pieces(messages, tools)
        # Without a content two turns can look like one, and the skeleton may be another's.
        if any(message.extra is not None or not message.content or message.content.isspace() for message in messages):
            return self.derivation.find_pieces(messages, tools)
        roles = tuple([message.role for message in messages])
        if roles not in self._skeletons:
            if len(self._skeletons) >= _MAX_REMEMBERED:
                self._skeletons.clear()
            self._skeletons[roles] = self._build(roles)
        pieces = []
        for skeleton in self._skeletons[roles] or ():
            piece = skeleton.fill(messages, self._template.render(messages[: skeleton.num_messages]))
            if piece is None:
                break
            pieces.append(piece)
        else:
            if pieces:
                return pieces
        return self.derivation.find_pieces(messages, tools)

    def _build(self, roles: Sequence[str]) -> list[_Skeleton] | None:
        probes = [
            Message(role=role, content=f"{_LEFT}\ue000Slot{index}\ue001{_RIGHT}") for index, role in enumerate(roles)
        ]  # fmt: skip
        try:
            pieces = self.derivation.find_pieces(probes, None)
        except (TemplateRefusal, LostReplyError):
            return None
        skeletons = [_skeleton(piece) for piece in pieces]
        found = [skeleton for skeleton in skeletons if skeleton]
        return found if len(found) == len(skeletons) else None


def _skeleton(piece: Piece) -> _Skeleton | None:
    """Cut a piece that was made of probes; None when a learned stretch begins or ends inside a probe."""
    text = piece.text
    slots: dict[tuple[int, int], _Slot] = {}
    for match in _SLOT.finditer(text):
        begin, end = match.span()
        left, right = text.endswith(_LEFT, 0, begin), text.startswith(_RIGHT, end)
        slots[begin - len(_LEFT) * left, end + len(_RIGHT) * right] = _Slot(int(match[1]), left, right)
    borders = {border for span in piece.spans for border in (span.begin, span.end)}
    cuts = sorted({0, len(text)} | borders | {cut for place in slots for cut in place})
    if any(begin < border < end for begin, end in slots for border in borders):
        return None
    parts = [slots.get(place, text[slice(*place)]) for place in pairwise(cuts)]
    number = {cut: index for index, cut in enumerate(cuts)}
    return _Skeleton(parts, [(number[span.begin], number[span.end], span.rest) for span in piece.spans], piece.num_messages)
