"""Data settings and a tokenizer in; a folder with the training set, the held-out set and the tally out.

    <folder>/train, <folder>/eval    Arrow: input_ids, labels, source, row (eval only when something is held out)
    <folder>/tally.json              how many rows came in, and for which reason each dropped one was dropped

One pass, one process; rows are read, filtered and tokenised in order, so the same settings give the same examples.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.data.filters import build_filters, content_key, first_reason
from job.data.messages import detect_layout, read_row
from job.data.reasons import Reason
from job.data.sources import open_rows, peek_columns
from job.data.tokens import CHATML, Labeller, Tokenizer
from job.errors import DataError
from job.settings import DatasetSpec, DataSettings

ReportProgress = Callable[[str, int], None]
_WRITE_EVERY = 1_000


class SourceTally(BaseModel):
    """What became of the rows of one data set."""

    model_config = ConfigDict(frozen=True)

    source: str
    shape: str
    revision: str | None
    num_rows: int
    num_kept: int
    dropped: dict[str, int]
    num_tokens: int


class Tally(BaseModel):
    """What became of every row; `tally.json`."""

    model_config = ConfigDict(frozen=True)

    sources: list[SourceTally]
    num_train: int
    num_eval: int
    num_train_tokens: int
    num_learned_tokens: int
    """Of the training tokens, those that the loss counts."""
    longest_tokens: int


@dataclass(slots=True)
class _Columns:
    """Examples on their way to disk; columns are short lived, `flush` empties them."""

    rows: dict[str, list[Any]] = field(default_factory=lambda: {"input_ids": [], "labels": [], "source": [], "row": []})

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.rows[name].append(value)


def prepare(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    folder: Path,
    cache_dir: Path,
    seed: int,
    report_progress: ReportProgress = lambda text, done: None,
) -> Tally:
    """Read, filter, tokenise, split and write.

    Raises:
        DataError: a source is unreadable, or fewer than MIN_SAMPLES examples survive.
        NetworkError: a source could not be reached.
    """
    import datasets

    labeller = Labeller(
        tokenizer,
        learn=settings.learn,
        min_tokens=settings.min_tokens,
        max_length=settings.max_length,
        overlong=settings.overlong,
    )
    tallies: list[SourceTally] = []
    held_out_order: list[bytes] = []
    examples = _examples(settings, labeller, tallies, held_out_order, cache_dir, report_progress)
    # The generator is consumed once; from_generator would cache by a hash of its arguments, which we do not want.
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "labels": datasets.List(datasets.Value("int32")),
            "source": datasets.Value("string"),
            "row": datasets.Value("int64"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tally.json").unlink(missing_ok=True)  # of an earlier attempt, perhaps with other settings
    for name in ("train", "eval"):
        shutil.rmtree(folder / name, ignore_errors=True)
    scratch = folder / "all.arrow"
    with datasets.arrow_writer.ArrowWriter(path=str(scratch), features=features, writer_batch_size=_WRITE_EVERY) as writer:
        for example in examples:
            writer.write(example)
        writer.finalize()
    num_pieces, num_examples = len(held_out_order), sum(tally.num_kept for tally in tallies)
    if num_examples < settings.min_samples:
        dropped: Counter[str] = Counter()
        for source in tallies:
            dropped.update(source.dropped)
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none dropped"
        raise DataError(
            f"MIN_SAMPLES={settings.min_samples}: only {num_examples} examples survive ({reasons}); "
            "loosen the filters, add data, or lower MIN_SAMPLES"
        )
    everything = datasets.Dataset.from_file(str(scratch))
    held_out = _held_out(held_out_order, settings.eval_fraction, seed)
    kept = [index for index in range(num_pieces) if index not in held_out]
    train = everything.select(kept)
    train.save_to_disk(folder / "train")
    if held_out:
        everything.select(sorted(held_out)).save_to_disk(folder / "eval")
    lengths = [len(ids) for ids in train["input_ids"]]
    tally = Tally(
        sources=tallies,
        num_train=len(kept),
        num_eval=len(held_out),
        num_train_tokens=sum(lengths),
        num_learned_tokens=sum(1 for labels in train["labels"] for label in labels if label >= 0),
        longest_tokens=max(lengths),
    )
    del everything, train
    scratch.unlink()
    (folder / "tally.json").write_text(tally.model_dump_json(indent=2), "utf-8")
    return tally


def set_default_template(tokenizer: Any, template_file: str | None) -> None:
    """Give the tokenizer the user's template, or ChatML when it has none of its own."""
    if template_file:
        tokenizer.chat_template = Path(template_file).read_text("utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = CHATML


def _examples(
    settings: DataSettings,
    labeller: Labeller,
    tallies: list[SourceTally],
    held_out_order: list[bytes],
    cache_dir: Path,
    report_progress: ReportProgress,
) -> Iterator[dict[str, Any]]:
    """Yield each surviving piece; appends a tally per source and a content key per piece as it goes."""
    filters = build_filters(settings)
    num_kept_before = 0
    for spec in settings.datasets:
        columns, rows = peek_columns(open_rows(spec, cache_dir))
        layout = detect_layout(spec, columns) if columns else None
        if layout is None:
            raise DataError(f"DATASETS={spec}: no row of the first 50 can be read; check the file and its format")
        dropped: Counter[Reason] = Counter()
        num_rows = num_kept = num_tokens = 0
        for index, row in enumerate(rows):
            num_rows += 1
            if num_rows % 500 == 0:
                report_progress(f"preparing {spec.where}: {num_kept} of {num_rows} rows kept", num_kept_before + num_kept)
            example = (
                Reason.UNREADABLE
                if row is None
                else read_row(row, layout, source=str(spec), index=index, system_prompt=settings.system_prompt)
            )
            if not isinstance(example, Reason):
                pieces = first_reason(example, filters) or labeller.label(example)
                if not isinstance(pieces, Reason):
                    num_kept += 1
                    for piece in pieces:
                        num_tokens += len(piece.input_ids)
                        held_out_order.append(content_key(example))
                        yield {
                            "input_ids": piece.input_ids,
                            "labels": piece.labels,
                            "source": example.source,
                            "row": example.row,
                        }
                    if settings.max_samples and num_kept_before + num_kept >= settings.max_samples:
                        break
                    continue
                example = pieces
            dropped[example] += 1
        num_kept_before += num_kept
        tallies.append(
            SourceTally(
                source=str(spec),
                shape=layout.shape,
                revision=_resolved_revision(spec),
                num_rows=num_rows,
                num_kept=num_kept,
                dropped={reason.value: count for reason, count in sorted(dropped.items())},
                num_tokens=num_tokens,
            )
        )
        if settings.max_samples and num_kept_before >= settings.max_samples:
            return


def _held_out(keys: list[bytes], fraction: float, seed: int) -> set[int]:
    """Indices of the held-out pieces: those of the smallest seeded hashes, so pieces of one example stay together.

    The choice depends on what an example says and not on where it stands, so adding data moves few examples across.
    """
    if fraction == 0 or len(keys) < 2:
        return set()
    wanted = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    hashes = [hashlib.blake2b(key, digest_size=8, salt=seed.to_bytes(8, "little")).digest() for key in keys]
    threshold = sorted(hashes)[wanted - 1]
    chosen = {index for index, digest in enumerate(hashes) if digest <= threshold}
    return chosen if len(chosen) < len(keys) else set()


def _resolved_revision(spec: DatasetSpec) -> str | None:
    return spec.revision


def load_tally(folder: Path) -> Tally:
    """Read the tally of a prepared folder.

    Raises:
        FileNotFoundError: the folder was not prepared to the end.
    """
    return Tally.model_validate(json.loads((folder / "tally.json").read_text("utf-8")))
