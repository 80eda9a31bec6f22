"""A set of 64-bit keys in eight bytes each: which rows were seen before.

Sorted arrays of doubling size, merged as they fill (a log-structured merge). At a hundred million rows the chance that two
different ones share a key is 0.03%.
"""

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]


class KeySet:
    """Grows only."""

    def __init__(self) -> None:
        self._runs: list[Keys] = []  # sorted, longest first

    def add(self, keys: Keys) -> None:
        run = np.unique(keys)
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.union1d(self._runs.pop(), run)
        if len(run):
            self._runs.append(run)

    def contains(self, keys: Keys) -> Mask:
        """Which of the keys are in the set.  # (N,) -> (N,)"""
        found = np.zeros(len(keys), dtype=bool)
        for run in self._runs:
            places = np.searchsorted(run, keys)
            places[places == len(run)] = 0
            found |= run[places] == keys
        return found


def first_of_each(keys: Keys) -> Mask:
    """Which keys do not stand further left as well.  # (N,) -> (N,)"""
    is_first = np.zeros(len(keys), dtype=bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    return is_first


def shuffled(keys: Keys, seed: int) -> Keys:
    """Mix the bits of each key with a seed, for choices that look random and are always the same (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
