"""One chunk of raw rows in, one shard out: an Arrow file in which every row has its tokens or the reason why it was dropped.

This runs in worker processes and knows nothing of other chunks. What depends on other rows (duplicates, limits, the held-out
split) is decided afterwards, in `merge.py`. A shard that is already there from an earlier start is not made again.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from job.data.chunks import Chunk, Row, read_chunk
from job.data.filters import build_filters, content_key, first_reason
from job.data.language import Languages
from job.data.messages import Example, read_row
from job.data.near import signature
from job.data.reasons import Reason
from job.data.repair import build_repairs
from job.data.shapes import Layout
from job.data.tokens import IGNORED, Labeller, Tokenizer
from job.settings import DataSettings

NUM_SAMPLES = 10
SAMPLE_CHARACTERS = 600
LANGUAGE_SAMPLE = 20
"""One row in so many is judged for the report's histogram when LANGUAGE is not set."""
VERSION = 2  # rensa 0.5.0
"""Raise it when the same chunk would give another shard."""
_MERGING = {
    *("datasets", "eval_datasets", "dedup", "mix", "max_samples", "max_tokens", "min_samples", "max_unlearned"),
    *("eval_fraction", "order", "keep_dropped", "dataset_num_proc", "prepare_on"),
}
"""Settings that say nothing about a row alone."""
SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.int64(),
        "reason": pyarrow.string(),  # null: kept
        "language": pyarrow.string(),
        "size": pyarrow.int64(),  # characters
        "text": pyarrow.string(),  # of the first dropped rows of each reason
        "raw": pyarrow.string(),  # JSON, with KEEP_DROPPED
        "key": pyarrow.uint64(),
        "signature": pyarrow.binary(),
        "num_learned": pyarrow.int32(),
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRows:
    """What a chunk's source is called and how its rows hold their text."""

    source: str
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A row after everything that is cheaper than tokens."""

    row: Row | None
    example: Example | None
    language: str | None
    reason: Reason | None


class Sharder:
    """The stateless part of preparation, with everything that it needs loaded once per process."""

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, *, with_signatures: bool) -> None:
        self._settings = settings
        self.with_signatures = with_signatures
        self._filters = build_filters(settings)
        self._repairs = build_repairs(settings)
        self._languages = Languages(settings)
        self._labeller = Labeller(
            tokenizer,
            learn=settings.learn,
            min_tokens=settings.min_tokens,
            max_length=settings.max_length,
            overlong=settings.overlong,
        )
        self._rules = _rules(settings, tokenizer)

    def make(self, chunk: Chunk, source: SourceRows, path: Path) -> Path:
        """Write the shard of a chunk to `path`, whole or not at all; one that is there already is left alone.

        Raises:
            DataError: the chat template cannot be used at all.
        """
        digest = self.digest(chunk, source)
        if not is_made(path, digest):
            write_shard(path, self.table(chunk, source, digest))
        return path

    def digest(self, chunk: Chunk, source: SourceRows) -> str:
        """What tells that a shard is the one that `make` would write."""
        layout = str(source.layout)  # found in the first rows: they may have changed where this chunk did not
        extras = [self._settings.keep_dropped, self.with_signatures]
        wanted = [VERSION, self._rules, source.source, layout, *extras, chunk.first_row]
        return blake2b(repr(wanted).encode() + chunk.digest, digest_size=16).hexdigest()

    def table(self, chunk: Chunk, source: SourceRows, digest: str) -> pyarrow.Table:
        """The shard of a chunk in memory, with its digest. Raises DataError, as `make`."""
        columns = self._read(chunk, source)
        arrays = [_column([row.get(name) for row in columns], SCHEMA.field(name).type) for name in SCHEMA.names]
        return pyarrow.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({"digest": digest}))

    def _read(self, chunk: Chunk, source: SourceRows) -> list[dict[str, Any]]:
        judged = [self._judge(row, source, index) for index, row in enumerate(read_chunk(chunk), chunk.first_row)]
        survivors = [one.example for one in judged if one.reason is None and one.example is not None]
        labelled = dict(zip(map(id, survivors), self._labeller.label_many(survivors), strict=True))
        columns: list[dict[str, Any]] = []
        samples: Counter[Reason] = Counter()
        for index, one in enumerate(judged, chunk.first_row):
            outcome = labelled.get(id(one.example), one.reason)
            values: dict[str, Any] = {"row": index, "language": one.language, "size": _size(one.example)}
            if self._settings.keep_dropped:
                values["raw"] = _as_json(one.row)
            if outcome is None or isinstance(outcome, Reason) or one.example is None:
                reason = Reason.MALFORMED if not isinstance(outcome, Reason) else outcome
                samples[reason] += 1
                text = _shown(one.row, one.example) if samples[reason] <= NUM_SAMPLES else None
                columns.append({**values, "reason": reason, "text": text})
                continue
            values["key"] = int.from_bytes(content_key(one.example)[:8], "little")
            values["signature"] = signature(one.example) if self.with_signatures else None
            for piece in outcome:
                num_learned = len(piece.labels) - piece.labels.count(IGNORED)
                columns.append({**values, "input_ids": piece.input_ids, "labels": piece.labels, "num_learned": num_learned})
        return columns

    def _judge(self, row: Row | Reason, source: SourceRows, index: int) -> "_Judged":
        if isinstance(row, Reason):
            return _Judged(row=None, example=None, language=None, reason=row)
        example = read_row(
            row,
            source.layout,
            source=source.source,
            index=index,
            system_prompt=self._settings.system_prompt,
            replace_system=self._settings.system_prompt_mode == "replace",
        )
        if isinstance(example, Reason):
            return _Judged(row=row, example=None, language=None, reason=example)
        for repair in self._repairs:
            example = repair(example)
        reason, language = first_reason(example, self._filters), None
        if reason is None and (self._settings.language or index % LANGUAGE_SAMPLE == 0):
            language, reason = self._languages.judge(example)
        return _Judged(row=row, example=example, language=language, reason=reason)


def _column(values: list[Any], kind: pyarrow.DataType) -> pyarrow.Array:
    if not pyarrow.types.is_list(kind):
        return pyarrow.array(values, kind)
    # Token by token pyarrow takes three times as long.
    flat = np.fromiter(chain.from_iterable(filter(None, values)), np.int32)
    ends = np.cumsum([len(value or ()) for value in values], dtype=np.int64)
    is_missing = np.array([value is None for value in values], dtype=bool)
    return pyarrow.ListArray.from_arrays(np.append(0, ends).astype(np.int32), flat, mask=pyarrow.array(is_missing))


def _rules(settings: DataSettings, tokenizer: Tokenizer) -> str:
    """What tells that a row would be judged and tokenised the same: settings, tokenizer, template and detector."""
    judging = settings.model_dump(mode="json", exclude=_MERGING)
    detector = Path(settings.language_model).expanduser()
    file = [(found := detector.stat()).st_size, found.st_mtime_ns] if detector.is_file() else None
    words = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return blake2b(json.dumps([judging, file, words], default=str).encode(), digest_size=16).hexdigest()


def write_shard(path: Path, table: pyarrow.Table) -> None:
    """Write a shard, whole or not at all."""
    partial = path.with_suffix(".partial")
    with pyarrow.ipc.new_file(partial, table.schema) as writer:
        writer.write_table(table)
    partial.replace(path)


def is_made(path: Path, digest: str) -> bool:
    """Whether the shard with this digest lies there already."""
    return path.is_file() and _metadata(path) == {"digest": digest}


def read_shard(path: Path) -> pyarrow.Table:
    """A shard, mapped into memory: columns that are not touched are not read."""
    with pyarrow.memory_map(str(path)) as file:
        return pyarrow.ipc.open_file(file).read_all()


def _metadata(path: Path) -> dict[str, str]:
    try:
        with pyarrow.memory_map(str(path)) as file:
            found = pyarrow.ipc.open_file(file).schema.metadata or {}
    except (OSError, pyarrow.ArrowException):
        return {}  # of a disk that filled up: made again
    return {key.decode(): value.decode() for key, value in found.items()}


def _size(example: Example | None) -> int:
    if example is None:
        return 0
    return len(example.text) + sum(len(message.content) for message in example.messages)


def _shown(row: Mapping[str, Any] | None, example: Example | None) -> str:
    """Enough of a dropped row to recognise it."""
    if example is None:
        return (_as_json(row) or "")[:SAMPLE_CHARACTERS]
    text = example.text or "\n".join(f"{message.role}: {message.content}" for message in example.messages)
    return text[:SAMPLE_CHARACTERS].encode("utf-8", "replace").decode()


def _as_json(row: Mapping[str, Any] | None) -> str | None:
    if row is None:
        return None
    return json.dumps(row, ensure_ascii=True, default=repr)
