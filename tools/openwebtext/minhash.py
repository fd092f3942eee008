"""MinHash of texts in numpy (Broder 1997): similar texts agree in about as many hashes as they have shingles in common.

A hash of a text is the smallest value of one random function over its shingles, the 5-byte substrings of its UTF-8 form.
Hashes come in bands; documents that agree in a whole band are worth comparing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

SHINGLE_BYTES = 5
#: Shingles hashed at a time: the table of their values by function stays in the processor's cache.
BLOCK = 512
_SEEDS_BELOW = 1_000_000


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread 64-bit integers evenly, each to its own (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class MinHasher:
    """Fingerprints of texts: `num_seeds` hashes of 32 bits in `num_bands` bands.

    Function i of a shingle x is a_i x + b_i modulo 2^32, where x has been spread over 32 bits and a_i and b_i come from the
    i-th seed.
    """

    def __init__(self, num_seeds: int, num_bands: int, seed: int) -> None:
        self.num_bands = num_bands
        seeds = np.random.RandomState(seed).randint(0, _SEEDS_BELOW, size=num_seeds).astype(np.uint64)
        drawn = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
        self._factors = (drawn.astype(np.uint32) | np.uint32(1))[:, None]
        self._offsets = (drawn >> np.uint64(32)).astype(np.uint32)[:, None]
        self._table = np.empty((num_seeds, BLOCK), np.uint32)

    def fingerprint(self, text: str) -> NDArray[np.uint32] | None:
        """The hashes of a text [num_seeds]; None where it is shorter than a shingle."""
        data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        count = len(data) - SHINGLE_BYTES + 1
        if count < 1:
            return None
        packed = np.zeros(count, np.uint64)
        for place in range(SHINGLE_BYTES):
            packed = (packed << np.uint64(8)) | data[place : place + count]
        shingles = (_mix(packed) >> np.uint64(32)).astype(np.uint32)
        smallest = np.full(len(self._factors), np.iinfo(np.uint32).max, np.uint32)
        for start in range(0, count, BLOCK):
            block = shingles[start : start + BLOCK]
            table = self._table[:, : len(block)]
            np.multiply(block, self._factors, out=table)
            np.add(table, self._offsets, out=table)
            np.minimum(smallest, table.min(axis=1), out=smallest)
        return smallest

    def band_keys(self, fingerprint: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """A number per band [num_bands] that stands for the band's hashes."""
        rows = fingerprint.reshape(self.num_bands, -1).astype(np.uint64)
        keys = np.zeros(self.num_bands, np.uint64)
        for column in rows.T:
            keys = _mix(keys + column + np.uint64(0x9E3779B97F4A7C15))
        return keys


def buckets(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """Numbers of the documents that agree in a key, for each key [documents] that two or more have; ordered by key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    bounds = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    for first in np.flatnonzero(np.diff(bounds) > 1):
        yield order[bounds[first] : bounds[first + 1]]
