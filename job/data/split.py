"""Kept pieces in; which are trained on, how often and in which order, and which are held out.

Every choice is made by what an example says (a seeded hash of its key), never by where it stands or by chance.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.data.keys import shuffled
from job.data.merge import Kept
from job.data.near import NearIndex
from job.data.shards import read_shard

Places = NDArray[np.int64]


def quotas(weights: list[float], max_samples: int | None) -> list[int | None]:
    """How many rows each source may give to MIX=interleave; no source needs to be read further."""
    if max_samples is None:
        return [None] * len(weights)
    return [int(np.ceil(max_samples * weight / sum(weights))) for weight in weights]


def not_sampled(kept: Kept, weights: NDArray[np.float64], *, mix: str, max_samples: int | None, seed: int) -> NDArray[np.bool_]:
    """Which pieces are left out so that the sources stand in proportion; all pieces of a row go together.  # (N,)

    Args:
        weights: by source number; those of EVAL_DATASETS are 0 and their pieces stay.
        mix: concatenate leaves rows out of sources with a weight below 1; interleave out of all but the scarcest source.
    """
    starts = kept.starts()
    counts = np.bincount(kept.source[starts], minlength=len(weights))
    trained = np.flatnonzero((weights > 0) & (counts > 0))
    wanted = counts.astype(np.float64)
    if mix == "interleave" and len(trained):
        total = min(counts[trained] / weights[trained]) * weights[trained].sum()
        if max_samples is not None:
            total = min(total, max_samples)
        wanted[trained] = total * weights[trained] / weights[trained].sum()
    else:
        wanted[trained] = counts[trained] * np.minimum(weights[trained], 1.0)
    left_out = np.zeros(len(kept.row), dtype=bool)
    row_number = np.cumsum(starts) - 1
    for source in trained:
        rows = np.flatnonzero(starts & (kept.source == source))
        surplus = len(rows) - max(1, round(float(wanted[source])))
        if surplus > 0:
            order = np.argsort(shuffled(kept.key[rows], seed + 1), kind="stable")
            left_out[rows[order[len(rows) - surplus :]]] = True
    return np.asarray(left_out[np.flatnonzero(starts)][row_number]) if len(left_out) else left_out


def held_out(kept: Kept, *, fraction: float, seed: int, shards: list[Path]) -> tuple[NDArray[np.bool_], int]:
    """Which pieces are held out, and how many rows went back to training for having a near duplicate there.

    The rows of the smallest seeded hashes are the candidates. A candidate that nearly repeats a training row would make the
    held-out loss measure memory, so it is trained on instead, and nothing is lost.
    """
    keys = np.unique(kept.key)
    none = np.zeros(len(kept.row), dtype=bool)
    if fraction == 0 or len(keys) < 2:
        return none, 0
    wanted = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    chosen = np.isin(kept.key, keys[np.argsort(shuffled(keys, seed), kind="stable")[:wanted]])
    moved = _with_near_duplicate(kept, chosen, shards)
    stays = chosen & ~np.isin(kept.key, moved)
    return stays, len(moved)


def _with_near_duplicate(kept: Kept, chosen: NDArray[np.bool_], shards: list[Path]) -> NDArray[np.uint64]:
    """Keys of the chosen rows that nearly repeat one that is not chosen, directly or by way of other chosen rows."""
    candidates = list(_signatures(kept.select(chosen & kept.starts()), shards))
    index = NearIndex()
    for number, (_, signature) in enumerate(candidates):
        index.add(number, signature)
    found = {index.find(signature) for _, signature in _signatures(kept.select(~chosen & kept.starts()), shards)}
    moved = {number for number in found if number is not None}
    index, newly = NearIndex(), moved
    while newly:
        for number in sorted(newly):
            index.add(number, candidates[number][1])
        left = (number for number in range(len(candidates)) if number not in moved)
        newly = {number for number in left if index.find(candidates[number][1]) is not None}
        moved |= newly
    return np.array(sorted(candidates[number][0] for number in moved), dtype=np.uint64)


def _signatures(kept: Kept, shards: list[Path]) -> Iterator[tuple[int, bytes]]:
    """(key, signature) of each piece."""
    for shard, pieces in kept.by_shard():
        column = read_shard(shards[shard])["signature"].take(pieces.position)
        yield from zip(pieces.key.tolist(), column.to_pylist(), strict=True)


def training_order(kept: Kept, weights: NDArray[np.float64], *, mix: str, order: str, seed: int) -> Places:
    """Places in `kept` in the order in which they are written; rows of a source with a weight above 1 repeat.  # (M,)"""
    copies = np.ones(len(kept.row), dtype=np.int64)
    if mix == "concatenate":
        weight = np.maximum(weights[kept.source], 1.0)
        share = shuffled(kept.key, seed + 2) / 2.0**64  # [0, 1), of each row
        copies = (weight + (1.0 - share) - 1e-12).astype(np.int64)
    places = np.repeat(np.arange(len(kept.row)), copies)
    if order == "length":
        return np.asarray(places[np.argsort(kept.num_tokens[places], kind="stable")])
    if mix == "interleave":  # each source spread evenly over the whole
        where: NDArray[Any] = np.zeros(len(places))
        for source in np.unique(kept.source[places]):
            of_source = np.flatnonzero(kept.source[places] == source)
            where[of_source] = (np.arange(len(of_source)) + 0.5) / len(of_source)
        return np.asarray(places[np.argsort(where, kind="stable")])
    return places
