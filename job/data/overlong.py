"""A conversation that is too long in, as many whole exchanges as fit at a time out."""

from collections.abc import Callable
from typing import TypeVar

from job.data.reasons import Reason
from job.data.turns import Message

_Piece = TypeVar("_Piece")
_Messages = tuple[Message, ...]


def split_exchanges(
    messages: _Messages, label: Callable[[_Messages], list[_Piece] | Reason], *, only_last: bool
) -> list[_Piece] | Reason:
    """Cut between exchanges; each part begins with the conversation's system messages.

    Args:
        label: the pieces of some of the messages, or the reason why they are none: too long, as a rule.
        only_last: keep the last exchange only, and before it the exchanges that fit.

    Returns:
        All pieces, or the reason for which a single exchange has none.
    """
    num_system = next((index for index, message in enumerate(messages) if message.role != "system"), 0)
    borders = [*_exchange_starts(messages, num_system), len(messages)]
    num_exchanges = len(borders) - 1

    def try_exchanges(first: int, last: int) -> list[_Piece] | Reason:
        return label(messages[:num_system] + messages[borders[first] : borders[last]])

    def most(first: int, last: int) -> tuple[int, list[_Piece] | Reason]:
        """The largest number of exchanges that fit, at the start (or the end) of a range, and their pieces."""
        low, high = 1, last - first
        best = try_exchanges(last - 1, last) if only_last else try_exchanges(first, first + 1)
        while low < high and not isinstance(best, Reason):
            middle = (low + high + 1) // 2
            tried = try_exchanges(last - middle, last) if only_last else try_exchanges(first, first + middle)
            if isinstance(tried, Reason):
                high = middle - 1
            else:
                low, best = middle, tried
        return low, best

    whole: list[_Piece] = []
    first = 0
    while first < num_exchanges:
        number, pieces = most(first, num_exchanges)
        if isinstance(pieces, Reason) or only_last:
            return pieces
        whole += pieces
        first += number
    return whole


def _exchange_starts(messages: _Messages, first: int) -> list[int]:
    """Where a user speaks up after a reply; the first exchange begins after the system messages."""
    starts, replied = [first], False
    for index, message in enumerate(messages[first:], first):
        if message.role == "user" and replied:
            starts.append(index)
            replied = False
        replied = replied or message.role == "assistant"
    return starts
