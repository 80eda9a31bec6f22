"""Examples in, token ids with their labels out.

Only what the assistant says is learned (every reply, or only the last one, or everything); which stretches of the text
those are is found in `skeletons.py` and `spans.py`. A token is learned when it begins inside such a stretch. Tokenizers
that are not "fast" (of the `tokenizers` library) are not supported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from job.data.backend import characters_per_token, exact_backend, first_token_at
from job.data.messages import Example, Message
from job.data.overlong import split_exchanges
from job.data.reasons import Reason
from job.data.skeletons import PieceFinder
from job.data.spans import Learn, LostReplyError, Piece, Span
from job.data.templates import ChatTemplate, TemplateRefusal
from job.errors import DataError

IGNORED = -100
"""The label of a token that is not learned (the ignore_index of PyTorch's cross entropy)."""
Tokenizer = Any
"""A fast tokenizer of transformers, which is untyped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Ids and labels of one training example, of equal length; a label is its id or IGNORED."""

    input_ids: list[int]
    labels: list[int]


class Labeller:
    """Turns examples into tokens with one tokenizer and one set of rules."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        learn: Learn,
        min_tokens: int,
        max_length: int,
        overlong: Literal["drop", "truncate", "split"],
    ) -> None:
        """Prepare.

        Raises:
            DataError: the tokenizer is not a fast one, or has no usable chat template.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise DataError(
                f"MODEL_ID: its tokenizer ({type(tokenizer).__name__}) has no fast version (tokenizer.json); choose another model"
            )
        self._backend = exact_backend(backend)
        self._tokenizer = tokenizer
        self._learn = learn
        self._min_tokens = min_tokens
        self._max_length = max_length
        self._overlong = overlong
        self._finder: PieceFinder | None = None
        self._max_characters = characters_per_token(self._backend) * max_length
        self._eos: str = tokenizer.eos_token or ""
        begins = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        # Tokenizers that put a token before every text (Llama, Gemma) were trained so, and raw texts get it too.
        self._bos = begins if begins and list(tokenizer("a")["input_ids"][:1]) == begins else []

    def label_many(self, examples: Sequence[Example]) -> list[list[Tokens] | Reason]:
        """Each example's tokens, or why it is dropped: one piece, or several (see OVERLONG, and `spans.py`).

        An example is dropped whole: every one of its pieces must be within the limits.
        """
        found = [self._find_pieces(example) for example in examples]
        texts = [piece.text for pieces in found if not isinstance(pieces, Reason) for piece in pieces]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            pieces if isinstance(pieces, Reason) else self._limit(example, [self._tokens(piece, encodings) for piece in pieces])
            for example, pieces in zip(examples, found, strict=True)
        ]

    def label(self, example: Example) -> list[Tokens] | Reason:
        """The same for one example."""
        return self.label_many([example])[0]

    def _find_pieces(self, example: Example) -> list[Piece] | Reason:
        if not example.messages:
            text = example.text if example.text.endswith(self._eos) else example.text + self._eos
            pieces = [Piece(text, [Span(0, len(text))], 0)]
        else:
            try:
                pieces = self._pieces_of_conversation(example)
            except TemplateRefusal:
                return Reason.TEMPLATE_REFUSES
            except LostReplyError:
                return Reason.NOTHING_TO_LEARN
        if self._overlong == "drop" and any(self._cannot_fit(piece.text) for piece in pieces):
            return Reason.TOO_LONG
        return pieces

    def _pieces_of_conversation(self, example: Example) -> list[Piece]:
        if self._finder is None:
            added = [token.content for token in self._backend.get_added_tokens_decoder().values()]
            self._finder = PieceFinder(ChatTemplate(self._tokenizer), self._learn, added)
        return self._finder.find_pieces(example.messages, example.tools)

    def _cannot_fit(self, text: str) -> bool:
        """Whether a text has more characters than MAX_LENGTH tokens can hold; blanks may be swallowed and do not count."""
        return len(text) > self._max_characters and sum(map(len, text.split())) > self._max_characters

    def _tokens(self, piece: Piece, encodings: Iterator[Encoding]) -> Tokens:
        encoding = next(encodings)
        ids = encoding.ids
        if not piece.num_messages:
            ids = ids if ids[:1] == self._bos else self._bos + ids
            return Tokens(input_ids=ids, labels=list(ids))
        labels = [IGNORED] * len(ids)
        for span in piece.spans:
            first, last = (first_token_at(encoding, place, len(piece.text)) for place in (span.begin, span.end))
            labels[first:last] = ids[first:last]
        return Tokens(input_ids=ids, labels=labels)

    def _limit(self, example: Example, pieces: list[Tokens]) -> list[Tokens] | Reason:
        if not pieces:
            return Reason.NOTHING_TO_LEARN
        if any(len(tokens.input_ids) < self._min_tokens for tokens in pieces):
            return Reason.TOO_SHORT
        if any(len(tokens.input_ids) > self._max_length for tokens in pieces):
            if self._overlong == "drop":
                return Reason.TOO_LONG
            if self._overlong == "split":
                return self._split_conversation(example) if example.messages else self._split_text(pieces[0].input_ids)
            cut = slice(self._max_length)
            pieces = [Tokens(input_ids=tokens.input_ids[cut], labels=tokens.labels[cut]) for tokens in pieces]
        return pieces if all(map(_teaches, pieces)) else Reason.NOTHING_TO_LEARN

    def _split_text(self, ids: list[int]) -> list[Tokens]:
        """Pieces of nearly equal length, so that no scrap is left over."""
        ids = ids[len(self._bos) :]
        room = self._max_length - len(self._bos)
        num_pieces = -(-len(ids) // room)
        borders = [len(ids) * number // num_pieces for number in range(num_pieces + 1)]
        parts = [self._bos + ids[first:last] for first, last in pairwise(borders)]
        return [Tokens(input_ids=part, labels=list(part)) for part in parts]

    def _split_conversation(self, example: Example) -> list[Tokens] | Reason:
        def label(messages: tuple[Message, ...]) -> list[Tokens] | Reason:
            found = self._find_pieces(replace(example, messages=messages))
            if isinstance(found, Reason):
                return found
            encodings = iter(self._backend.encode_batch([piece.text for piece in found], add_special_tokens=False))
            pieces = [self._tokens(piece, encodings) for piece in found]
            return Reason.TOO_LONG if any(len(tokens.input_ids) > self._max_length for tokens in pieces) else pieces

        pieces = split_exchanges(example.messages, label, only_last=self._learn == "completion")
        if isinstance(pieces, Reason):
            return pieces
        return list(filter(_teaches, pieces)) or Reason.NOTHING_TO_LEARN


def show_learned(tokens: Tokens, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The example as text, in stretches that are learned or not."""
    stretches: list[tuple[str, bool]] = []
    shown, begin = "", 0
    learned = [label != IGNORED for label in tokens.labels]
    for end in range(1, len(learned) + 1):
        if end == len(learned) or learned[end] != learned[begin]:
            # Decoding all up to here keeps the blanks that some tokenizers drop at the start of a text.
            text = str(tokenizer.decode(tokens.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            stretches.append((text[len(shown) :], learned[begin]))
            shown, begin = text, end
    return stretches


def _teaches(tokens: Tokens) -> bool:
    return any(label != IGNORED for label in tokens.labels[1:])  # nothing predicts the first token
