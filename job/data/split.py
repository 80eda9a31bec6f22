"""Kept pieces in; which are trained on, how often and in which order, and which are held out.

Every choice is made by what an example says (a seeded hash of its key), never by where it stands or by chance.
"""

from collections.abc import Callable, Iterator
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


def not_sampled(
    kept: Kept, weights: NDArray[np.float64], *, mix: str, max_samples: int | None, max_tokens: int | None, seed: int
) -> NDArray[np.bool_]:
    """Which pieces are left out so that the sources stand in proportion; all pieces of a row go together.  # (N,)

    Args:
        weights: by source number; those of EVAL_DATASETS are 0 and their pieces stay.
        mix: concatenate leaves rows out of sources with a weight below 1; interleave out of all but the scarcest source.
    """
    starts = np.flatnonzero(kept.starts())
    left_out = np.zeros(len(starts), dtype=bool)
    if not len(starts):
        return left_out
    row_source, row_tokens = kept.source[starts], np.add.reduceat(kept.num_tokens.astype(np.int64), starts)
    hashes = shuffled(kept.key[starts], seed + 1)
    # The rows of each source, those that are taken first in front.
    rows = {number: np.flatnonzero(row_source == number) for number in np.unique(row_source) if weights[number] > 0}
    rows = {number: of_source[np.argsort(hashes[of_source], kind="stable")] for number, of_source in rows.items()}
    counts = np.array([len(of_source) for of_source in rows.values()])
    shares = weights[list(rows)]
    if mix == "interleave" and rows:
        total = int(min(counts / shares) * shares.sum() + 1e-6)
        if max_samples is not None:
            total = min(total, max_samples)
        if max_tokens is not None:
            sums = [np.append(0, np.cumsum(row_tokens[of_source])) for of_source in rows.values()]
            total = _fewest(total, lambda number: _tokens_of(sums, _apportioned(number, shares)) >= max_tokens)
        wanted = _apportioned(total, shares)
    else:
        wanted = np.array([max(1, round(count * min(share, 1.0))) for count, share in zip(counts, shares, strict=True)])
    for of_source, number in zip(rows.values(), wanted, strict=True):
        left_out[of_source[number:]] = True
    return np.asarray(np.repeat(left_out, np.diff(starts, append=len(kept.row))))


def _apportioned(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """A total in whole parts, in proportion; what is left over goes to the largest remainders."""
    exact = total * shares / shares.sum()
    parts: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]] += 1
    return parts


def _fewest(most: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest number up to `most` that is enough, or `most`."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _tokens_of(sums: list[NDArray[np.int64]], numbers: NDArray[np.int64]) -> int:
    return sum(int(of_source[min(number, len(of_source) - 1)]) for of_source, number in zip(sums, numbers, strict=True))


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
