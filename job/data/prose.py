"""Text in, what people wrote in it out: code and addresses are found by their looks and left out."""

import re

from job.data.messages import Example

MAX_CODE_LINE = 120
# A longer line that ends like code is a paragraph about code: "... see printf(3)".

_BLOCK = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
_INLINE = re.compile(r"`[^`\n]*`")
# Lengths are limited so that no text, however odd, takes more than linear time.
_ADDRESS = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{1,190}")
_CODE_LINE = re.compile(
    r"\s*(?:#|//|/\*|def |class |import |from [\w.]+ import|return\b|for \w+ in |(?:for|while|if) ?\(|elif |else:|print\()"
    r"|(?:\s{4}|\t).*[=()\[\]{}<>_]"  # indented text is code when it looks like it
    r"|.*[{}]\s*$|.*[=(\[].*\S;\s*$|\s*[\w.]+\([^()]*\)\s*$"
)


def without_code_blocks(text: str) -> str:
    return _BLOCK.sub("\n", text) if "```" in text or "~~~" in text else text


def is_code_line(line: str) -> bool:
    """Whether a line outside a code block is code all the same."""
    return len(line) <= MAX_CODE_LINE and _CODE_LINE.match(line) is not None


def prose_of(example: Example) -> str:
    """What the user and the assistant say, or a raw text, on one line without code and addresses."""
    parts = [message.content for message in example.messages if message.role in ("user", "assistant")] or [example.text]
    lines: list[str] = []
    for part in parts:
        text = without_code_blocks(part)
        if "`" in text:
            text = _INLINE.sub(" ", text)
        lines += (line for line in text.splitlines() if not is_code_line(line))
    joined = " ".join(lines)
    if "@" in joined or "://" in joined or "www." in joined:
        joined = _ADDRESS.sub(" ", joined)
    return " ".join(joined.split())
