"""Shards in, in order; out comes which of their rows are kept once other rows are looked at: duplicates, limits, contamination.

Memory grows by some thirty bytes a row kept: what is said of it here is numbers, the text stays in the shards.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from job.data.keys import Keys, KeySet, first_of_each
from job.data.messages import is_unicode
from job.data.near import NearIndex
from job.data.reasons import Reason
from job.data.shards import NUM_SAMPLES, SAMPLE_CHARACTERS, read_shard
from job.data.tally import Sample

Decode = Callable[[list[int]], str]


@dataclass(slots=True, kw_only=True)
class SourceState:
    """One source while it is read."""

    name: str
    held_out: bool
    max_samples: int | None = None
    max_tokens: int | None = None
    num_rows: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    samples: dict[Reason, list[Sample]] = field(default_factory=dict)
    longest_unlearned: list[tuple[int, int]] = field(default_factory=list)
    """(characters, row) of the three longest rows in which nothing is left to learn."""

    @property
    def is_full(self) -> bool:
        enough_rows = self.max_samples is not None and self.num_kept >= self.max_samples
        return enough_rows or (self.max_tokens is not None and self.num_tokens >= self.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The pieces kept, one entry each, in order of sources and rows.  # all (N,)"""

    source: NDArray[np.int32]
    shard: NDArray[np.int32]
    position: NDArray[np.int32]
    """Where it stands in its shard."""
    row: NDArray[np.int64]
    key: Keys
    num_tokens: NDArray[np.int32]
    num_learned: NDArray[np.int32]

    def select(self, chosen: NDArray[Any]) -> "Kept":
        """The pieces at these places, or where a mask is true."""
        if chosen.dtype == np.bool_ and chosen.all():
            return self
        return Kept(**{name: getattr(self, name)[chosen] for name in self.__slots__})

    def of_source(self, number: int) -> "Kept":
        """The pieces of one source, as a view."""
        start, end = np.searchsorted(self.source, [number, number + 1])
        return Kept(**{name: getattr(self, name)[start:end] for name in self.__slots__})

    def by_shard(self) -> Iterator[tuple[int, "Kept"]]:
        """(shard, its pieces), for each shard that has some."""
        numbers, starts = np.unique(self.shard, return_index=True)
        for number, start, end in zip(numbers, starts, [*starts, len(self.shard)][1:], strict=True):
            yield int(number), Kept(**{name: getattr(self, name)[start:end] for name in self.__slots__})

    def starts(self) -> NDArray[np.bool_]:
        """Which pieces are the first of their row."""
        is_start = np.ones(len(self.row), dtype=bool)
        is_start[1:] = (self.row[1:] != self.row[:-1]) | (self.source[1:] != self.source[:-1])
        return is_start


class Merger:
    """Takes the shards of every source in order; what it keeps does not depend on how many processes made them.

    Args:
        dedup: DEDUP's value.
        decode: token ids to text, for the samples of dropped rows.
        dropped_file: where each dropped row is written as a JSON line, with KEEP_DROPPED.
    """

    def __init__(self, *, dedup: str, decode: Decode, dropped_file: IO[str] | None) -> None:
        self._dedup, self._decode, self._dropped_file = dedup, decode, dropped_file
        self._seen, self._seen_near = KeySet(), NearIndex()
        self._held_out, self._held_out_near = KeySet(), NearIndex()
        self._has_held_out = False
        self.sources: list[SourceState] = []
        self.shards: list[Path] = []
        self._kept: list[Kept] = []

    def start(self, source: SourceState) -> None:
        """The next shards are of this source; those of EVAL_DATASETS come first."""
        self.sources.append(source)
        self._has_held_out |= source.held_out

    def take(self, path: Path) -> None:
        """Merge the next shard of the source that was started last; stops within it when the source is full."""
        table, source = read_shard(path), self.sources[-1]
        if len(table) == 0:
            return
        rows, first = np.unique(np.asarray(table["row"]), return_index=True)
        reasons = [value and Reason(value) for value in table["reason"].take(first).to_pylist()]
        lengths = np.asarray(pyarrow.compute.list_value_length(table["input_ids"]).fill_null(0))
        tokens = np.add.reduceat(lengths, first)
        candidates = np.flatnonzero([reason is None for reason in reasons])
        keys = np.asarray(table["key"].take(first[candidates]))
        for candidate, reason in zip(candidates, self._known(keys, source), strict=True):
            reasons[candidate] = reason
        looks = self._dedup == "near" or self._has_held_out
        signatures = table["signature"].take(first).to_pylist() if looks else [None] * len(rows)
        end = len(rows)
        for place in range(len(rows)):
            if reasons[place] is None and (signature := signatures[place]) is not None:
                reasons[place] = self._near(signature, source)
            if reasons[place] is None:
                source.num_kept += 1
                source.num_tokens += int(tokens[place])
                if source.is_full:
                    end = place + 1
                    break
        self._seen.add(keys[candidates < end])
        kept_rows = np.array([place for place in range(end) if reasons[place] is None], dtype=np.int64)
        if source.held_out:
            self._held_out.add(np.asarray(table["key"].take(first[kept_rows])))
        self._tell(table.take(first[:end]), reasons[:end], source)
        pieces = np.append(first, len(table))
        positions = [np.arange(pieces[place], pieces[place + 1]) for place in kept_rows]
        self._keep(path, table, np.concatenate(positions) if positions else np.zeros(0, np.int64), lengths)

    def result(self) -> Kept:
        """All that was kept."""
        kept, self._kept = self._kept, []
        return Kept(**{name: np.concatenate([getattr(one, name) for one in kept]) for name in Kept.__slots__})

    def drop(self, kept: Kept, reason: Reason) -> None:
        """Count rows that were kept as dropped after all; `kept` holds every piece of them."""
        for shard, pieces in kept.by_shard():
            table, starts = read_shard(self.shards[shard]), pieces.starts()
            state = self.sources[pieces.source[0]]
            for position, row in zip(pieces.position[starts].tolist(), pieces.row[starts].tolist(), strict=True):
                self._drop(table, position, reason, state, row)
            state.num_kept -= int(starts.sum())
            state.num_tokens -= int(pieces.num_tokens.sum())

    def _known(self, keys: Keys, source: SourceState) -> list[Reason | None]:
        contaminated = self._held_out.contains(keys) & (not source.held_out)
        duplicate = (self._seen.contains(keys) | ~first_of_each(keys)) & (self._dedup != "off")
        return [
            Reason.CONTAMINATED if one else Reason.DUPLICATE if other else None
            for one, other in zip(contaminated, duplicate, strict=True)
        ]

    def _near(self, signature: bytes, source: SourceState) -> Reason | None:
        if source.held_out:
            self._held_out_near.add(source.num_kept, signature)
        elif self._held_out_near.find(signature) is not None:
            return Reason.CONTAMINATED
        if self._dedup == "near":
            if self._seen_near.find(signature) is not None:
                return Reason.NEAR_DUPLICATE
            self._seen_near.add(source.num_kept, signature)
        return None

    def _tell(self, table: pyarrow.Table, reasons: list[Reason | None], source: SourceState) -> None:
        rows = table["row"].to_pylist()
        source.num_rows += len(rows)
        source.languages.update(language for language in table["language"].to_pylist() if language)
        for place, reason in enumerate(reasons):
            if reason is not None:
                self._drop(table, place, reason, source, rows[place])

    def _drop(self, table: pyarrow.Table, place: int, reason: Reason, source: SourceState, row: int) -> None:
        source.dropped[reason] += 1
        samples = source.samples.setdefault(reason, [])
        if len(samples) < NUM_SAMPLES:
            text = table["text"][place].as_py()
            if text is None:
                text = self._decode(table["input_ids"][place].as_py() or [])
            samples.append(Sample(row=row, text=text[:SAMPLE_CHARACTERS]))
        if reason is Reason.NOTHING_TO_LEARN:
            longest = [*source.longest_unlearned, (int(table["size"][place].as_py()), row)]
            source.longest_unlearned = sorted(longest, reverse=True)[:3]
        if self._dropped_file is not None:
            raw = table["raw"][place].as_py()
            line = {"source": source.name, "row": row, "reason": reason, "raw": raw and json.loads(raw)}
            text = json.dumps(line, ensure_ascii=False)
            if not is_unicode(text):  # half of a surrogate pair can only be written as an escape
                text = json.dumps(line)
            self._dropped_file.write(text + "\n")

    def _keep(self, path: Path, table: pyarrow.Table, positions: NDArray[np.int64], lengths: NDArray[Any]) -> None:
        number = len(self.shards)
        self.shards.append(path)
        self._kept.append(
            Kept(
                source=np.full(len(positions), len(self.sources) - 1, np.int32),
                shard=np.full(len(positions), number, np.int32),
                position=positions.astype(np.int32),
                row=np.asarray(table["row"].take(positions)),
                key=np.asarray(table["key"].take(positions)),
                num_tokens=lengths[positions].astype(np.int32),
                num_learned=np.asarray(table["num_learned"].take(positions)),
            )
        )
