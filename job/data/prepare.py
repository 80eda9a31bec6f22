"""Data settings and a tokenizer in; a folder with the training set, the held-out set and the tally out.

    <folder>/train, <folder>/eval    Arrow: input_ids, labels, source, row (eval only when something is held out)
    <folder>/tally.json              how many rows came in, and for which reason each dropped one was dropped
    <folder>/dropped.jsonl           every dropped row, with KEEP_DROPPED

Sources are cut into chunks, chunks become shards on all cores (`shards.py`), shards are merged in order (`merge.py`), and what
is chosen of them (`split.py`) is written (`write.py`). The same settings and sources give the same bytes, whatever the number
of processes and however often it was interrupted: shards that exist are not made again.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from job.data.merge import Kept, Merger, SourceState
from job.data.peek import find_layout
from job.data.reasons import Reason
from job.data.shards import Sharder, SourceRows, read_shard
from job.data.sources import Source, open_source
from job.data.split import held_out, not_sampled, quotas, training_order
from job.data.tally import DROPPED, TALLY, SourceTally, Stretch, Tally
from job.data.tokens import Tokenizer, Tokens, show_learned
from job.data.workers import ShardMaker, Task, Workers
from job.data.write import write_set
from job.errors import DataError, Problem, SettingsError
from job.settings import DatasetSpec, DataSettings, distinct_labels

ReportProgress = Callable[[str, int], None]
SHARDS = "shards"
_REPORT_SECONDS = 2.0


class _Input:
    """One data set with its shape."""

    def __init__(self, spec: DatasetSpec, label: str, cache_dir: Path, *, is_held_out: bool) -> None:
        self.source: Source = open_source(spec, cache_dir)
        self.spec, self.label, self.is_held_out = spec, label, is_held_out
        self.rows = SourceRows(source=label, layout=find_layout(spec, self.source.chunks()))


def prepare(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    folder: Path,
    cache_dir: Path,
    seed: int,
    report_progress: ReportProgress = lambda text, done: None,
) -> Tally:
    """Read, filter, tokenise, split and write; `folder` may hold the shards of an interrupted start.

    Raises:
        DataError: a source is unreadable, or fewer than MIN_SAMPLES examples survive.
        NetworkError: a source could not be reached, or PREPARE_ON's cluster.
        MachineError: a worker process was killed, or is not one of ours.
        SettingsError: PREPARE_ON cannot be used here.
    """
    for left_over in ("train", "eval"):
        shutil.rmtree(folder / left_over, ignore_errors=True)
    for name in (TALLY, DROPPED):  # half of it, perhaps of a start with KEEP_DROPPED
        (folder / name).unlink(missing_ok=True)
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    with_signatures = settings.dedup == "near" or bool(settings.eval_datasets) or settings.eval_fraction > 0
    sharder = Sharder(settings, tokenizer, with_signatures=with_signatures)
    progress = _Progress(report_progress)
    with ExitStack() as stack:
        dropped_file = None
        if settings.keep_dropped:
            dropped_file = stack.enter_context((folder / DROPPED).open("w", encoding="utf-8"))
        workers = stack.enter_context(_start_workers(settings, sharder, tokenizer, progress.tell, report_progress))
        specs = [*((spec, True) for spec in settings.eval_datasets), *((spec, False) for spec in settings.datasets)]
        inputs = []
        labels = distinct_labels(spec for spec, _ in specs)
        for (spec, is_held_out), label in zip(specs, labels, strict=True):
            report_progress(f"opening {label}", 0)
            inputs.append(_Input(spec, label, cache_dir, is_held_out=is_held_out))
        merger = Merger(dedup=settings.dedup, decode=_decoder(tokenizer), dropped_file=dropped_file)
        _merge(inputs, settings, workers, merger, folder / SHARDS, progress)
        _refuse_unlearned(merger.sources, settings)
        tally = _write(merger, inputs, settings, tokenizer, folder, seed)
    shutil.rmtree(folder / SHARDS)
    (folder / TALLY).write_text(tally.model_dump_json(indent=2), "utf-8")
    return tally


def _start_workers(
    settings: DataSettings, sharder: Sharder, tokenizer: Tokenizer, on_tick: Callable[[], None], report: ReportProgress
) -> AbstractContextManager[ShardMaker]:
    """On this machine's cores, or on a cluster."""
    if settings.prepare_on is None:
        num_processes = os.cpu_count() or 1 if settings.dataset_num_proc == "auto" else settings.dataset_num_proc
        return Workers(sharder, num_processes, on_tick)
    if find_spec("distributed") is None:
        rule = "the package distributed is not installed"
        way_out = "`pip install -c requirements-cluster.txt distributed`, or leave it out to prepare on this machine"
        raise SettingsError([Problem(setting="PREPARE_ON", value=settings.prepare_on, rule=rule, way_out=way_out)])
    from job.data.cluster import ClusterWorkers

    return ClusterWorkers(settings, sharder, tokenizer, on_tick, lambda text: report(text, 0))


def _merge(
    inputs: list[_Input], settings: DataSettings, workers: ShardMaker, merger: Merger, shards: Path, progress: "_Progress"
) -> None:
    trained = [one for one in inputs if not one.is_held_out]
    interleaved = settings.mix == "interleave"
    limits = quotas([one.spec.weight for one in trained], settings.max_samples) if interleaved else []
    num_samples = num_tokens = 0
    for number, one in enumerate(inputs):
        state = SourceState(name=one.label, held_out=one.is_held_out)
        if not one.is_held_out and interleaved:
            # The shares of tokens follow from those of rows, which are known at the end: any source may need them all.
            state.max_samples, state.max_tokens = limits[trained.index(one)], settings.max_tokens
        elif not one.is_held_out:
            state.max_samples = settings.max_samples and settings.max_samples - num_samples
            state.max_tokens = settings.max_tokens and settings.max_tokens - num_tokens
        merger.start(state)
        if state.is_full:  # the sources before it were enough
            continue
        progress.source(state)
        tasks: Iterator[Task] = (
            (chunk, one.rows, shards / f"{number:03d}-{index:06d}.arrow") for index, chunk in enumerate(one.source.chunks())
        )
        for path in workers.make(tasks):
            merger.take(path)
            progress.tell_sometimes()
            if state.is_full:
                break
        if not one.is_held_out:
            num_samples, num_tokens = num_samples + state.num_kept, num_tokens + state.num_tokens


def _refuse_unlearned(sources: list[SourceState], settings: DataSettings) -> None:
    for source in sources:
        unlearned = source.dropped[Reason.NOTHING_TO_LEARN]
        if unlearned > settings.max_unlearned * (source.num_kept + unlearned):
            longest = ", ".join(f"row {row} ({size:,} characters)" for size, row in source.longest_unlearned)
            raise DataError(
                f"MAX_UNLEARNED={settings.max_unlearned}: {unlearned} of {source.num_kept + unlearned} examples of {source.name} "
                f"have no token left to learn; the longest are {longest}; raise MAX_LENGTH={settings.max_length}, set "
                "OVERLONG=drop, or look at LEARN and CHAT_TEMPLATE"
            )


def _refuse_too_few(sources: list[SourceState], settings: DataSettings) -> None:
    dropped: Counter[Reason] = Counter()
    for source in sources:
        dropped.update(source.dropped)
    num_examples = sum(source.num_kept for source in sources if not source.held_out)
    if num_examples < settings.min_samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none dropped"
        raise DataError(
            f"MIN_SAMPLES={settings.min_samples}: only {num_examples} examples survive ({reasons}); "
            "loosen the filters, add data, or lower MIN_SAMPLES"
        )


def _write(merger: Merger, inputs: list[_Input], settings: DataSettings, tokenizer: Tokenizer, folder: Path, seed: int) -> Tally:
    kept, sources, warnings = merger.result(), merger.sources, list[str]()
    weights = np.array([0.0 if one.is_held_out else one.spec.weight for one in inputs])
    limits = {"max_samples": settings.max_samples, "max_tokens": settings.max_tokens}
    left_out = not_sampled(kept, weights, mix=settings.mix, seed=seed, **limits)
    merger.drop(kept.select(left_out), Reason.NOT_SAMPLED)
    kept = kept.select(~left_out)
    _refuse_too_few(sources, settings)
    if unread := [source.name for source in sources if not source.num_rows]:
        limit = " or ".join(f"{name.upper()}={value}" for name, value in limits.items() if value is not None)
        warnings.append(f"{limit} was reached before {', '.join(unread)}, which was not read; MIX=interleave takes some of all")
    if settings.eval_datasets:
        is_eval = weights[kept.source] == 0
    else:
        is_eval, num_moved = held_out(kept, fraction=settings.eval_fraction, seed=seed, shards=merger.shards)
        if num_moved and not is_eval.any():
            warnings.append(
                f"every example that was to be held out ({num_moved}) nearly repeats one that is trained on, so nothing is held "
                "out and no held-out loss is measured; name other data in EVAL_DATASETS"
            )
        if not num_moved and settings.eval_fraction and not is_eval.any():
            warnings.append(f"EVAL_FRACTION={settings.eval_fraction}: all examples say the same, so nothing is held out")
    for source in sources:
        if source.num_rows and not source.num_kept:
            fate = "no held-out loss is measured on it" if source.held_out else "nothing of it is trained on"
            warnings.append(f"no row of {source.name} is kept, so {fate}")
    names = [source.name for source in sources]
    train = kept.select(~is_eval)
    order = training_order(train, weights, mix=settings.mix, order=settings.order, seed=seed)
    write_set(folder / "train", train, order, shards=merger.shards, sources=names)
    if is_eval.any():
        held = kept.select(is_eval)
        write_set(folder / "eval", held, np.arange(len(held.row)), shards=merger.shards, sources=names)
    return Tally(
        sources=[
            _source_tally(state, one, kept.of_source(number), merger.shards, tokenizer)
            for number, (state, one) in enumerate(zip(sources, inputs, strict=False))
        ],
        num_train=len(order),
        num_eval=int(is_eval.sum()),
        num_train_tokens=int(train.num_tokens[order].sum(dtype=np.int64)),
        num_learned_tokens=int(train.num_learned[order].sum(dtype=np.int64)),
        longest_tokens=int(train.num_tokens.max()),
        warnings=warnings,
    )


def _source_tally(state: SourceState, one: _Input, kept: Kept, shards: list[Path], tokenizer: Tokenizer) -> SourceTally:
    edges, counts = np.unique(2 ** np.ceil(np.log2(kept.num_tokens)).astype(np.int32), return_counts=True)
    first: list[Stretch] = []
    if len(kept.row):
        piece = read_shard(shards[kept.shard[0]]).slice(kept.position[0], 1)
        tokens = Tokens(input_ids=piece["input_ids"][0].as_py(), labels=piece["labels"][0].as_py())
        first = [Stretch(text=text, learned=learned) for text, learned in show_learned(tokens, tokenizer)]
    return SourceTally(
        source=state.name,
        shape=one.rows.layout.shape,
        revision=one.source.revision,
        num_rows=state.num_rows,
        num_kept=state.num_kept,
        dropped={reason.value: state.dropped[reason] for reason in Reason if state.dropped[reason]},
        num_tokens=state.num_tokens,
        held_out=state.held_out,
        lengths={str(edge): int(count) for edge, count in zip(edges, counts, strict=True)},
        languages=dict(state.languages.most_common()),
        samples={reason.value: state.samples[reason] for reason in Reason if state.samples.get(reason)},
        first_example=first,
    )


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids))


class _Progress:
    """Tells how far preparation is, every few seconds."""

    def __init__(self, report: ReportProgress) -> None:
        self._report = report
        self._state: SourceState | None = None
        self._done = 0
        self._begun = self._told = time.monotonic()

    def source(self, state: SourceState) -> None:
        if self._state is not None:
            self._done += self._state.num_kept
        self._state, self._begun = state, time.monotonic()

    def tell_sometimes(self) -> None:
        if time.monotonic() - self._told >= _REPORT_SECONDS:
            self.tell()

    def tell(self) -> None:
        state = self._state
        if state is None:
            return
        self._told = time.monotonic()
        seconds = max(self._told - self._begun, 1e-3)
        rate = f"{state.num_rows / seconds:,.0f} rows/s"
        text = f"preparing {state.name}: {state.num_kept:,} of {state.num_rows:,} rows kept, {rate}"
        limits = ((state.max_samples, state.num_kept), (state.max_tokens, state.num_tokens))
        if left := [goal / have - 1 for goal, have in limits if goal and have]:
            text += f", at most {seconds * min(left):,.0f} s left"
        self._report(text, self._done + state.num_kept)
