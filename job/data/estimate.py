"""Data settings and a tokenizer in; how many examples and tokens there will be out, from the first rows of each source.

Only the beginning is read, and nothing is kept. What is not estimated: duplicates, and sources whose later rows are unlike their
first ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory

from job.data.chunks import Chunk, read_chunk
from job.data.messages import read_row
from job.data.peek import find_layout
from job.data.reasons import Reason
from job.data.shards import Sharder, SourceRows, read_shard
from job.data.sources import Source, open_source
from job.data.tables import count_rows
from job.data.tally import Estimate
from job.data.tokens import Tokenizer
from job.errors import DataError
from job.settings import DatasetSpec, DataSettings

NUM_ROWS = 400
"""Of each source: the mean length is then known to about a tenth, since lengths vary about as much as their mean."""
PACKING = 4.0
"""How much smaller gzip and zstd make text, and parquet its columns (3 to 5 times is usual)."""
CHARACTERS_PER_TOKEN, GUESSED_TOKENS_ERROR = 3.5, 0.4
"""Of English and code with usual vocabularies; other languages take more tokens."""
GUESSED_ROWS_ERROR = 0.3
"""Where the number of rows follows from a file's size and the packing is only assumed."""


_Counting = Callable[[list[Chunk], SourceRows], list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sampled:
    num_examples: float
    num_tokens: float
    longest: int
    error: float
    num_rows_read: int


def estimate(settings: DataSettings, tokenizer: Tokenizer | None, *, cache_dir: Path, num_rows: int = NUM_ROWS) -> Estimate:
    """Read the first rows of each source and scale them up.

    Args:
        tokenizer: without it tokens are guessed from characters, and no filter is asked.

    Raises:
        DataError: a source is unreadable, or no row of its beginning survives.
        NetworkError: a source could not be reached.
    """
    count: _Counting = partial(_by_characters, settings)
    if tokenizer is not None:
        count = partial(_by_tokens, Sharder(settings, tokenizer, with_signatures=False))
    trained = [(spec, _sample(spec, count, settings.max_length, cache_dir, num_rows)) for spec in settings.datasets]
    held = [_sample(spec, count, settings.max_length, cache_dir, num_rows) for spec in settings.eval_datasets]
    examples = sum(spec.weight * one.num_examples for spec, one in trained)
    tokens = sum(spec.weight * one.num_tokens for spec, one in trained)
    if examples < 1:
        raise DataError("DATASETS: no row of their beginnings survives the filters; `python -m job prepare` shows why")
    kept = 1.0
    if settings.max_samples is not None:
        kept = min(kept, settings.max_samples / examples)
    if settings.max_tokens is not None:
        kept = min(kept, settings.max_tokens / tokens)
    eval_tokens = sum(one.num_tokens for one in held)
    if not settings.eval_datasets:
        eval_tokens = kept * tokens * settings.eval_fraction
        kept *= 1 - settings.eval_fraction
    weighed = sum(spec.weight * one.num_tokens * one.error for spec, one in trained) / tokens
    return Estimate(
        num_examples=max(1, round(examples * kept)),
        num_tokens=max(1, round(tokens * kept)),
        longest_tokens=max(one.longest for _, one in trained),
        num_eval_tokens=round(eval_tokens),
        error=round(weighed + (0.0 if tokenizer else GUESSED_TOKENS_ERROR), 3),
        num_rows_read=sum(one.num_rows_read for _, one in trained),
    )


def _by_tokens(sharder: Sharder, chunks: list[Chunk], rows: SourceRows) -> list[int]:
    """Tokens of each example that survives, as preparation makes them."""
    lengths: list[int] = []
    with TemporaryDirectory() as folder:
        for number, chunk in enumerate(chunks):
            table = read_shard(sharder.make(chunk, rows, Path(folder) / f"{number}.arrow"))
            lengths += [len(ids) for ids in table["input_ids"].to_pylist() if ids is not None]
    return lengths


def _by_characters(settings: DataSettings, chunks: list[Chunk], rows: SourceRows) -> list[int]:
    lengths = []
    for chunk in chunks:
        for index, row in enumerate(read_chunk(chunk), chunk.first_row):
            if isinstance(row, Reason):
                continue
            example = read_row(row, rows.layout, source=rows.source, index=index, system_prompt=settings.system_prompt)
            if not isinstance(example, Reason):
                characters = len(example.text) + sum(len(message.content) for message in example.messages)
                lengths.append(max(1, min(settings.max_length, round(characters / CHARACTERS_PER_TOKEN))))
    return lengths


def _sample(spec: DatasetSpec, count: _Counting, max_length: int, cache_dir: Path, num_rows: int) -> _Sampled:
    source = open_source(spec, cache_dir, only_look=True)
    chunks = list(source.beginning(num_rows))
    rows = SourceRows(source=str(spec), layout=find_layout(spec, chunks))
    read = sum(chunk.num_rows for chunk in chunks)
    lengths = count(chunks, rows)
    total, error = (float(read), 0.0) if read < num_rows else _count(source, sum(len(chunk.payload) for chunk in chunks) / read)
    if not lengths:
        return _Sampled(num_examples=0.0, num_tokens=0.0, longest=1, error=1.0, num_rows_read=read)
    scale = max(total, read) / read
    sampling = 0.0 if scale == 1 else 2 * pstdev(lengths) / math.sqrt(len(lengths)) / fmean(lengths)
    return _Sampled(
        num_examples=len(lengths) * scale,
        num_tokens=sum(lengths) * scale,
        # The longest of a few is not the longest of all, unless a limit cuts them.
        longest=max(lengths) if scale == 1 else min(max_length, 2 * max(lengths)),
        error=sampling + error,
        num_rows_read=read,
    )


def _count(source: Source, row_bytes: float) -> tuple[float, float]:
    """(rows of a source, share by which that may be off)."""
    num_rows, error = 0.0, 0.0
    for files, (start, stop) in source.parts:
        in_part = 0.0
        for file in files:
            counted = count_rows(file)
            if counted is None:
                is_packed = file.compression is not None or file.format in ("parquet", "arrow")
                counted_or_not = (file.num_bytes or 0) * (PACKING if is_packed else 1.0) / max(row_bytes, 1.0)
                error = max(error, GUESSED_ROWS_ERROR if is_packed or file.format == "csv" else 0.1)
                in_part += counted_or_not
            else:
                in_part += counted
        end = in_part if stop is None else min(stop, in_part or stop)
        num_rows += max(0.0, end - start)
    return (min(num_rows, source.spec.limit) if source.spec.limit else num_rows), error
