"""A reply or a raw text in, whether it repeats itself out: loops of a model, boilerplate, pasted lists.

The limits are Gopher's (Rae et al. 2021, arXiv 2112.11446, table A1), which were made for web pages; what is ours keeps them
from harm on instruction data: short texts, code and tables are not judged, a heading or label may come back, and the items
of a list may begin alike. Not handled: texts that write no spaces (Chinese, Japanese, Thai) are judged by lines and
paragraphs only, and of a very long text only the beginning is judged.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from job.data.messages import Example
from job.data.prose import is_code_line, without_code_blocks
from job.data.reasons import Reason

# Rae et al. 2021, table A1: the share that must not be exceeded.
MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

MIN_WORDS = 100
# In 50 words (Gopher's shortest page) a phrase of five that comes twice is 10 %, in 100 words 5 %: only then does it take
# more than an echo of the question or a refrain to reach 15 %.
MIN_CHARACTERS = 600
# As many as 100 words have; the bound for lines and paragraphs, also where words are not set apart.
MIN_LINE_CHARACTERS = 20
# Shorter lines are labels and headings ("Output:", "Example:"); they may come back.
MAX_CODE_SHARE = 0.25
# With more lines of code than this, a text without code marks is a program, and programs repeat themselves.
MAX_WORDS = 20_000
# What is looked at of a longer text; the n-grams of more would take hundreds of MB.

# Blanks count from their first on: tried from each of them, a long run of blanks would take quadratic time.
_LIST_ITEM = re.compile(r"(?:(?<!\s)\s+)?(?:[-*+•–]|\(?\w{1,3}[.):])\s")
_LETTER = re.compile(r"[^\W\d_]")


def drop_repetitive(example: Example) -> Reason | None:
    """Drop an example with a reply, or a raw text, that repeats itself."""
    texts = [message.content for message in example.messages if message.role == "assistant"] or [example.text]
    return Reason.REPETITIVE if any(len(text) >= MIN_CHARACTERS and is_repetitive(text) for text in texts) else None


def is_repetitive(text: str) -> bool:
    """Whether the prose of a text is beyond one of the limits."""
    written = without_code_blocks(text)[: MAX_WORDS * 10].splitlines()
    filled = [line for line in written if line.strip()]
    code = sum(map(is_code_line, filled))
    if code > MAX_CODE_SHARE * len(filled):
        return False
    lines = [line for line in written if "|" not in line and "\t" not in line.strip() and not (code and is_code_line(line))]
    if sum(map(len, lines)) < MIN_CHARACTERS:
        return False
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    bare = [_LIST_ITEM.sub("", line) for line in lines]  # a list that loops goes on counting
    if _repeats(bare, MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS) or _repeats(
        paragraphs, MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS
    ):
        return True
    words = [word for line in bare for word in line.lower().split()][:MAX_WORDS]
    if len(words) < MIN_WORDS:
        return False
    # A phrase that comes twice has its first five words twice: most texts are done with here.
    if len(set(_ngrams(words, 5))) < len(words) - 4 and any(
        _duplicate_share(words, length) > limit for length, limit in MAX_DUPLICATE_NGRAMS.items()
    ):
        return True
    flowing = [word for line in lines if not _LIST_ITEM.match(line) for word in line.lower().split()][:MAX_WORDS]
    return len(flowing) >= MIN_WORDS and any(_top_share(flowing, length) > limit for length, limit in MAX_TOP_NGRAM.items())


def _repeats(parts: Iterable[str], max_share: float, max_characters: float) -> bool:
    """Whether too many lines or paragraphs came before, by number or by characters."""
    seen: set[str] = set()
    num_parts = num_characters = num_repeated = repeated_characters = 0
    for part in parts:
        text = part.strip()
        if not _LETTER.search(text):
            continue
        num_parts += 1
        num_characters += len(text)
        if text not in seen:
            seen.add(text)
        elif len(text) >= MIN_LINE_CHARACTERS:
            num_repeated += 1
            repeated_characters += len(text)
    return num_repeated > max_share * num_parts or repeated_characters > max_characters * num_characters


def _ngrams(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _duplicate_share(words: Sequence[str], length: int) -> float:
    """Share of the characters that lie in sequences of `length` words that came before; none is counted twice."""
    seen: set[tuple[str, ...]] = set()
    repeated = skipped = 0
    for ngram in _ngrams(words, length):
        if skipped:
            skipped -= 1
        elif ngram in seen:
            repeated += sum(map(len, ngram))
            skipped = length - 1
        else:
            seen.add(ngram)
    return repeated / sum(map(len, words))


def _top_share(words: Sequence[str], length: int) -> float:
    """Share of the characters that the most frequent sequence of `length` words has, all its places together."""
    ngram, count = Counter(_ngrams(words, length)).most_common(1)[0]
    return sum(map(len, ngram)) * count / sum(map(len, words)) if count > 1 else 0.0
