"""`SeenKeys`: the keys that a tar has had so far, in eight bytes each.

A tar may have 10^7 samples, whose names would take a gigabyte. So only a hash of 64 bits is kept of each. Two
keys with the same hash are taken for one: among 10^7 keys, a new one meets such a pair once in 10^12 times.
"""

from __future__ import annotations

import hashlib

import numpy as np

MAX_RECENT = 1 << 16
"""Keys that are held one by one, until they are sorted in among the others."""


class SeenKeys:
    """A set of keys. The same keys give the same answers in every process."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: str) -> None:
        self._recent.add(_hash(key))
        if len(self._recent) == MAX_RECENT:
            recent = np.fromiter(self._recent, np.uint64, MAX_RECENT)
            # Two sorted runs, which a stable sort joins in one pass.
            self._sorted = np.concatenate([self._sorted, np.sort(recent)])
            self._sorted.sort(kind="stable")
            self._recent.clear()

    def __contains__(self, key: str) -> bool:
        wanted = _hash(key)
        if wanted in self._recent:
            return True
        index = int(np.searchsorted(self._sorted, np.uint64(wanted)))
        return index < len(self._sorted) and int(self._sorted[index]) == wanted


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest())
