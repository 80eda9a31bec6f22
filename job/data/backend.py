"""What is asked of the `tokenizers` library underneath a fast tokenizer: exact offsets, and how much text a token can hold."""

import copy
import json

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend


def first_token_at(encoding: Encoding, place: int, length: int) -> int:
    """The first token that begins at or after a character; one that begins before it belongs to what is before."""
    if place <= 0:
        return 0
    num_tokens = len(encoding)
    if place >= length:
        return num_tokens
    token = encoding.char_to_token(place)
    if token is None:  # a character that the tokenizer leaves out
        return next((index for index, (start, _) in enumerate(encoding.offsets) if start >= place), num_tokens)
    while token < num_tokens and (characters := encoding.token_to_chars(token)) is not None and characters[0] < place:
        token += 1
    return token


def exact_backend(backend: Backend) -> Backend:
    """A copy without settings left by others, and without the post-processor, which trims blanks off tokens' offsets."""
    exact = copy.deepcopy(backend)
    exact.no_truncation()
    exact.no_padding()
    exact.post_processor = None
    return exact


# Composing (NFC) makes at most one character out of four: U+1F82 (Unicode 15, UAX 15).
_CHARACTERS_PER_NORMALISED = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1}


def characters_per_token(backend: Backend) -> float:
    """How many characters other than blanks one token can stand for at most; infinite where that cannot be told.

    That is the longest token's length - if every character becomes part of some token (bytes as a last resort), and the
    text is not shortened before.
    """
    model = backend.model
    split = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    if not (getattr(model, "byte_fallback", False) or "ByteLevel" in json.dumps(split)):
        return float("inf")
    shrink = 1
    steps = [json.loads(backend.normalizer.__getstate__())] if backend.normalizer else []
    while steps:
        step = steps.pop()
        if step["type"] == "Sequence":
            steps += step["normalizers"]
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            continue
        elif step["type"] in _CHARACTERS_PER_NORMALISED:
            shrink *= _CHARACTERS_PER_NORMALISED[step["type"]]
        else:
            return float("inf")
    return float(shrink * max(map(len, backend.get_vocab()), default=1))
