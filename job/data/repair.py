"""An example in, the same with its text repaired or masked out; roles and structure are never touched.

What decoding destroyed cannot be repaired: `drop_garbled` finds that. Not handled: names, phone numbers and street addresses,
which no pattern finds reliably.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from job.data.messages import Example
from job.data.reasons import Reason
from job.settings import DataSettings

Repair = Callable[[Example], Example]

MIN_DAMAGED, MAX_DAMAGED_SHARE = 3, 0.005
# Lost letters: a text may speak of the replacement character, and one lost quotation mark spoils nothing; Turkish or German
# whose letters were lost has 2 to 10 %, English with lost quotation marks about 1 %.
_DAMAGED = re.compile(r"[\ufffd\x80-\x84\x86-\x9f]")  # U+0085 is a line break

_LOWER = "ß-öø-ÿğış"
# ftfy's heuristic needs 130 ns a character. None of its patterns (6.3.1) matches without one of these: two characters beyond
# ASCII side by side that are not both common small letters, or a character that is suspicious alone.
_SUSPICIOUS = re.compile(rf"[^\x00-\x7f](?:[^\x00-\x7f{_LOWER}]|(?<![{_LOWER}])[^\x00-\x7f])|[\x80-\x9fŒœÃÂ]")

_EMAIL = re.compile(r"(?<![\w.%+-])[\w%+-][\w.%+-]{0,63}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]*\d)[0-9A-Fa-f:]{6,39}(?:(?<=:)(?:\d{1,3}\.){3}\d{1,3})?(?![\w:]|\.\d)")
_CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){8,14}\d(?![\w-]|\.\d)")  # 13 to 19 digits, ISO/IEC 7812
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")  # 15 to 34 characters, ISO 13616


def build_repairs(settings: DataSettings) -> list[Repair]:
    """The repairs that the settings ask for, in the order in which they are made."""
    repairs = []
    if settings.repair_text:
        repairs.append(_on_every_text(repair_text))
    if settings.mask_pii:
        repairs.append(_on_every_text(mask_pii))
    return repairs


def repair_text(text: str) -> str:
    """Undo a wrong decoding (`fÃ¼r` becomes `für`), line by line, where ftfy's heuristic sees one."""
    if text.isascii() or not _SUSPICIOUS.search(text):
        return text
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    # By line: ftfy undoes a line as a whole, and one that cannot be decoded must not keep the others from it.
    return "".join(
        fix_encoding(line) if _SUSPICIOUS.search(line) and is_bad(line) else line for line in text.splitlines(keepends=True)
    )


def mask_pii(text: str) -> str:
    """Put <EMAIL>, <IP_ADDRESS>, <CARD_NUMBER> and <IBAN> where those are; check digits must be right."""
    if "@" in text:
        text = _EMAIL.sub("<EMAIL>", text)
    if not any(map(text.__contains__, "0123456789")):
        return text
    text = _IBAN.sub(_mask_iban, text)  # before cards: its digits may pass for one
    text = _CARD.sub(lambda found: "<CARD_NUMBER>" if _passes_luhn(found[0]) else found[0], text)
    if "::" in text or text.count(":") >= 7:
        text = _IPV6.sub(_mask_address, text)  # before the old ones, which may be its end
    return _IPV4.sub(_mask_address, text)


def drop_garbled(example: Example) -> Reason | None:
    """Drop an example with a text that has lost too many letters to a wrong decoding."""
    texts = [message.content for message in example.messages] or [example.text]
    return Reason.GARBLED if any(map(_is_garbled, texts)) else None


def _is_garbled(text: str) -> bool:
    if text.isascii():
        return False
    count = len(_DAMAGED.findall(text))
    return count >= MIN_DAMAGED and count > MAX_DAMAGED_SHARE * len(text)


def _on_every_text(change: Callable[[str], str]) -> Repair:
    def repair(example: Example) -> Example:
        if not example.messages:
            text = change(example.text)
            return example if text == example.text else replace(example, text=text)
        texts = [(change(message.content), _change_json(change, message.extra)) for message in example.messages]
        if all(new == (message.content, message.extra) for new, message in zip(texts, example.messages, strict=True)):
            return example
        pairs = zip(texts, example.messages, strict=True)
        messages = tuple(replace(message, content=content, extra=extra) for (content, extra), message in pairs)
        return replace(example, messages=messages)

    return repair


def _change_json(change: Callable[[str], str], text: str | None) -> str | None:
    """Change the texts inside a JSON text, and numbers (of cards) too, so that it stays JSON."""
    if text is None or change(text) == text:
        return text
    return json.dumps(_change_values(change, json.loads(text)), ensure_ascii=False)


def _change_values(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _change_values(change, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_change_values(change, item) for item in value]
    if isinstance(value, str):
        return change(value)
    changed = change(str(value))
    return value if changed == str(value) else changed


def _mask_address(found: re.Match[str]) -> str:
    try:
        address: IPv4Address | IPv6Address = ip_address(found[0])
    except ValueError:
        return found[0]
    # These name no machine: localhost, "any address", netmasks.
    nobody = address.is_loopback or address.is_unspecified or address.is_multicast or found[0].startswith("255.")
    return found[0] if nobody else "<IP_ADDRESS>"


def _passes_luhn(number: str) -> bool:
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _mask_iban(found: re.Match[str]) -> str:
    """The pattern may have taken a word in capitals after the number along: try without the last groups too."""
    number, rest = found[0], ""
    while len(compact := number.replace(" ", "")) >= 15:
        if len(compact) <= 34 and int("".join(str(int(sign, 36)) for sign in compact[4:] + compact[:4])) % 97 == 1:
            return f"<IBAN>{rest}"
        number, blank, last = number.rpartition(" ")
        rest = blank + last + rest
    return found[0]
