"""Examples in, 128-byte signatures out; and an index that finds a kept example with nearly the same words.

MinHash (Broder 1997) over three-word shingles with banding. The hashing is rensa's: 8 us for 80 shingles against datasketch's
140, and it does not bring scipy (2026-11-23, one core). The index is ours, since rensa's holds objects, not bytes: 300 to 480
bytes an example. Not handled: texts that say the same in other words, and templates of a hundred words that differ in one.
"""

import re
from array import array
from collections import Counter
from operator import eq

from rensa import RMinHash  # type: ignore[import-untyped, unused-ignore]

from job.data.messages import Example

THRESHOLD = 0.8
"""Estimated Jaccard similarity of the shingles from which two examples are nearly the same."""
SHINGLE_WORDS = 3
# A changed word takes three shingles along, so below about 29 words one change is enough to be another text ("What follows 7?"
# and "What follows 9?"), and in a reply of 150 words about five changes are.
SIGNATURE_BYTES = 128
# One byte a hash (Li and König 2010, b-bit minwise hashing): the estimate's standard error is 0.035 at 0.8.
SEED = 42
NUM_BANDS, BAND_BYTES = 21, 6
# A pair at 0.8 meets in some band with probability 1 - (1 - 0.8^6)^21 = 0.998, one at 0.5 with 0.28, one at 0.3 with 0.015.
MAX_SHARED, MAX_COMPARED = 8, 16
# A template that thousands of examples share must not cost quadratic time: under one band at most eight are entered, and
# the sixteen that share most bands are compared (a pair at 0.8 shares 5.5 of 21 on average).

_CHANCE = 1 / 256  # two different hashes have the same byte
_MIN_EQUAL = SIGNATURE_BYTES * (_CHANCE + THRESHOLD * (1 - _CHANCE))
# Words, single characters where words are not set apart, and signs that mean something: 5 > 3 is not 5 < 3.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s.,;:!?'\"“”‘’…]")


def signature(example: Example) -> bytes:
    """128 bytes that are the same on every machine and alike for texts that are alike; system messages are left out."""
    words: list[str] = []
    for message in example.messages:
        if message.role != "system":
            words.append(f"\0{message.role}")
            words += _WORD.findall(message.content.lower())
            if message.extra is not None:  # what a call of a tool says stands there, and its content is empty
                words += _WORD.findall(message.extra.lower())
    if not example.messages:
        words = _WORD.findall(example.text.lower())
    if len(words) <= SHINGLE_WORDS:  # the words alone say too little: their order and signs count as well
        shingles = ["\n".join([*(message.content for message in example.messages if message.role != "system"), example.text])]
    else:
        shingles = list(map(" ".join, zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False)))
    sketch = RMinHash(num_perm=SIGNATURE_BYTES, seed=SEED)
    sketch.update(shingles)
    return bytes([value & 0xFF for value in sketch.digest()])


class NearIndex:
    """Signatures of what was kept, by key; the one that shares most is found, the first added among equals."""

    def __init__(self) -> None:
        self._keys = array("q")
        self._signatures = bytearray()
        # Open addressing: 1 + the position of a signature whose band hashes to this slot, or 0.
        self._num_bits = 16
        self._slots = array("I", bytes(4 << self._num_bits))
        self._num_used = 0

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, signature: bytes) -> int | None:
        """The key of a kept example that is nearly the same, or None."""
        num_shared = Counter(position for band in range(NUM_BANDS) for position in self._sharing(signature, band)[0])
        for position, _ in sorted(num_shared.items(), key=lambda item: (-item[1], item[0]))[:MAX_COMPARED]:
            start = position * SIGNATURE_BYTES
            if sum(map(eq, signature, self._signatures[start : start + SIGNATURE_BYTES])) >= _MIN_EQUAL:
                return self._keys[position]
        return None

    def add(self, key: int, signature: bytes) -> None:
        self._keys.append(key)
        self._signatures += signature
        if 2 * (self._num_used + NUM_BANDS) > len(self._slots):
            self._grow()
        self._enter(len(self._keys) - 1)

    def _enter(self, position: int) -> None:
        start = position * SIGNATURE_BYTES
        signature = bytes(self._signatures[start : start + SIGNATURE_BYTES])
        for band in range(NUM_BANDS):
            sharing, slot = self._sharing(signature, band)
            if len(sharing) < MAX_SHARED:
                self._slots[slot] = position + 1
                self._num_used += 1

    def _sharing(self, signature: bytes, band: int) -> tuple[list[int], int]:
        """Positions of the signatures that are equal in this band, and the first free slot after them."""
        offset = band * BAND_BYTES
        wanted = signature[offset : offset + BAND_BYTES]
        slots, signatures = self._slots, self._signatures
        # The upper bits of a product with 2^64 / golden ratio (Knuth, vol. 3, 6.4) depend on every byte of the band.
        key = int.from_bytes(wanted, "little") + (band << 48)
        slot = (key * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF_FFFF) >> (64 - self._num_bits)
        last = len(slots) - 1
        sharing = []
        while entry := slots[slot]:
            start = (entry - 1) * SIGNATURE_BYTES + offset
            if signatures[start : start + BAND_BYTES] == wanted and entry - 1 not in sharing:  # or it is there for another band
                sharing.append(entry - 1)
            slot = slot + 1 & last
        return sharing, slot

    def _grow(self) -> None:
        self._num_bits += 1
        self._slots = array("I", bytes(4 << self._num_bits))
        self._num_used = 0
        for position in range(len(self._keys)):
            self._enter(position)
