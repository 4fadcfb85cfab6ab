"""Rows of an index that share inverted list and code: equal vectors, or nearly so.

Here: counting them over the whole index, and the ids of the largest groups. Not here: whether the rows are
equal to the bit, which only the table knows (`snapshots.data_quality`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

# Codes are hashed so many at a time: beside the keys, 8 bytes a row, this is all the memory it takes.
_BLOCK_ROWS = 65_536
_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Group:
    """rows: that share one list and code; ids: the smallest of theirs."""

    rows: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Duplicates:
    """rows: of the index; repeated: those whose list and code an earlier row has; largest groups first."""

    rows: int
    repeated: int
    groups: tuple[Group, ...]


def find_duplicates(index: Any, *, groups: int = 5, ids: int = 4) -> Duplicates:
    """Count the rows that share list and code, and name `ids` rows each of the largest `groups`.

    By a 64-bit hash, whose chance collisions need billions of rows. 300,000 rows of 64 bytes: 0.1 s.
    """
    keys, members = _keys(index)
    order = np.argsort(keys)
    ordered = keys[order]
    del keys
    # Whether a row has the key of the one before; none at the ends.
    repeats = np.zeros(len(ordered) + 2, bool)
    np.equal(ordered[1:], ordered[:-1], out=repeats[1 : len(ordered)])
    starts = np.flatnonzero(~repeats[:-1] & repeats[1:])
    sizes = np.flatnonzero(repeats[:-1] & ~repeats[1:]) + 1 - starts
    # By size, then by key: the same index names the same groups.
    largest = np.argsort(-sizes, kind="stable")[:groups]
    return Duplicates(
        rows=len(ordered),
        repeated=int(repeats.sum()),
        groups=tuple(
            Group(int(size), tuple(np.sort(members[order[start : start + size]])[:ids].tolist()))
            for start, size in zip(starts[largest], sizes[largest], strict=True)
        ),
    )


def _keys(index: Any) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A hash of (list, code) and the id of every row, in list order."""
    sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
    keys, ids = np.empty(sum(sizes), np.uint64), np.empty(sum(sizes), np.int64)
    at = 0
    for numbers in _blocks(sizes):
        rows = sum(sizes[number] for number in numbers)
        codes = np.zeros((rows, -(-index.code_size // 8) * 8), np.uint8)
        start = 0
        for number in numbers:
            end = start + sizes[number]
            if end > start:
                codes[start:end, : index.code_size] = faiss.rev_swig_ptr(
                    index.invlists.get_codes(number), sizes[number] * index.code_size
                ).reshape(-1, index.code_size)
                ids[at + start : at + end] = faiss.rev_swig_ptr(index.invlists.get_ids(number), sizes[number])
            start = end
        lists = np.repeat(np.array(numbers, np.uint64), [sizes[number] for number in numbers])
        keys[at : at + rows] = _hashed(lists, codes.view(np.uint64))
        at += rows
    return keys, ids


def _hashed(keys: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """keys (n,) with words (n, w) mixed in; a sum alone would let the words' high bytes cancel out."""
    keys = (keys + _ODD) * _ODD  # a list's number is as small as a word may be: they would cancel out too
    for column in range(words.shape[1]):
        keys = (keys ^ words[:, column]) * _ODD
        keys ^= keys >> _HALF
    return keys


def _blocks(sizes: list[int]) -> list[list[int]]:
    """List numbers, in runs of about _BLOCK_ROWS rows; a longer list is a run of its own."""
    runs: list[list[int]] = [[]]
    rows = 0
    for number, size in enumerate(sizes):
        if rows and rows + size > _BLOCK_ROWS:
            runs.append([])
            rows = 0
        runs[-1].append(number)
        rows += size
    return runs
