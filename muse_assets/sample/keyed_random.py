"""Random numbers that are a pure function of (seed, stream, key): no state, no order, no block size.

Here: counter-based uniforms, normals and bytes. Not here: what they stand for.
All of it is integer arithmetic, so the same key gives the same bits on every machine.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Words = NDArray[np.uint64]

SEED = 2026

_STEP = np.uint64(0x9E3779B97F4A7C15)


def random_words(seed: int, stream: str, keys: NDArray[Any], width: int) -> Words:
    """uint64 (n, width): `width` random words for each of the n integer keys."""
    start = np.uint64(
        int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little")
    )
    by_key = _mixed(keys.astype(np.uint64) * _STEP + start)
    return _mixed(by_key[:, None] + np.arange(1, width + 1, dtype=np.uint64) * _STEP)


def uniforms(seed: int, stream: str, keys: NDArray[Any], width: int = 1) -> Floats:
    """float64 (n, width), uniform in [0, 1)."""
    return (random_words(seed, stream, keys, width) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def picks(seed: int, stream: str, keys: NDArray[Any], among: NDArray[Any] | int) -> Ints:
    """int64 (n,): for each key a number in [0, among)."""
    return (uniforms(seed, stream, keys)[:, 0] * among).astype(np.int64)


def normals(seed: int, stream: str, keys: NDArray[Any], width: int) -> Floats:
    """float64 (n, width), mean 0, variance 1, in steps of 1/4.

    The set bits of 64 random ones are binomial, near enough to normal, and exact: Box-Muller's
    logarithm and cosine differ in the last bit between processors.
    """
    known, back = np.unique(keys, return_inverse=True)
    ones = np.bitwise_count(random_words(seed, stream, known, width)).astype(np.float64)
    return ((ones - 32) / 4)[back]


def _mixed(words: Words) -> Words:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
