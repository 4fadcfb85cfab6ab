"""Frozen queries and their exact nearest rows, kept true while rows come and go.

Here: the lists, and taking rows into and out of them. Not here: what an index finds of them (`probing`), or
which rows changed (`snapshots.sync`).

A list holds every row of the table within its query's horizon. So it stays exact by dropping the rows that
went and comparing only the rows that came: a day costs its changed rows, not the table. Deletions wear a list
down; the horizon stays where it is, and what lies beyond is not known until the table is read in full.

Distances decide alone, and are computed row by row: so a list is the same whatever the history, as far as
its horizon reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Recall is told up to the 100 nearest. The others take the place of deleted ones, and of a growing table's
# they are replaced by new rows within the horizon.
LISTED = 160
# What a matrix product may be off, of the sum of both squared norms.
_PRODUCT_ERROR = 1e-5
# Compared at a time, so that their differences, 1 MB of 512-d, stay in the cache.
_PAIRS = 256

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Queries:
    """Rows held out of training, as they were then. ids (q,) int64; vectors (q, d) float32.

    They stay, whatever becomes of their rows; a row is never its own query's neighbor.
    """

    ids: Ids
    vectors: Floats


@dataclass(frozen=True)
class Neighbors:
    """The nearest rows of q queries, by distance and id.

    ids (q, LISTED) int64, -1 past the end; distances (q, LISTED) float32, squared L2, inf past the end;
    horizon (q,) float32: every row nearer than that is listed, inf where every row is.
    """

    ids: Ids
    distances: Floats
    horizon: Floats

    def known(self) -> Ids:
        """How many of the smallest distances of each query are those of the table (q,)."""
        listed = (self.ids >= 0) & (self.distances <= self.horizon[:, None])
        counts: Ids = listed.sum(axis=1)
        return counts

    def without(self, gone: NDArray[np.bool_]) -> Neighbors:
        """Less the entries that `gone` (q, LISTED) marks."""
        ids, distances = np.where(gone, -1, self.ids), np.where(gone, np.inf, self.distances)
        order = np.argsort(ids < 0, axis=1, kind="stable")
        return Neighbors(
            np.take_along_axis(ids, order, 1),
            np.take_along_axis(distances, order, 1).astype(np.float32),
            self.horizon,
        )


def as_near_as(distances: Floats) -> Floats:
    """Up to where a row counts as being as near as one at these squared distances: rounding left aside.

    So that of identical vectors (every song of an artist) any is right.
    """
    limits: Floats = distances * np.float32(1 + 1e-4) + np.float32(1e-6)
    return limits


def lists_suffice(neighbors: Neighbors, k: int = 10) -> bool:
    """Whether each query's k nearest rows are still known, and those as near as the k-th; else only reading
    the whole table helps."""
    known, horizon = neighbors.known() >= k, neighbors.horizon
    # Of a full list the last row tells that there may be more as near (`probing`).
    tied = (neighbors.ids[:, -1] >= 0) | (as_near_as(neighbors.distances[:, k - 1]) < horizon)
    return bool((np.isinf(horizon) | (known & tied)).all())


def no_neighbors(queries: Queries) -> Neighbors:
    """Of an empty table, or of one whose rows all lie beyond the horizon that is put into it."""
    shape = (len(queries.ids), LISTED)
    return Neighbors(
        np.full(shape, -1, np.int64),
        np.full(shape, np.inf, np.float32),
        np.full(shape[0], np.inf, np.float32),
    )


class NearestRows:
    """Lists that take rows in, in any order and in batches of any size.

    Memory: a batch's distances to every query, and as many candidates again as are listed.
    """

    def __init__(self, queries: Queries, start: Neighbors) -> None:
        self._queries = queries
        self._columns = np.ascontiguousarray(queries.vectors.T)
        self._norms = np.einsum("ij,ij->i", queries.vectors, queries.vectors)
        self._lists = start
        self._pending: list[tuple[Ids, Ids, Floats]] = []
        self._waiting = 0

    @property
    def horizon(self) -> Floats:
        """Distances (q,) from which on a row need not be taken, as far as is known by now."""
        return self._lists.horizon

    def merge(self, others: Neighbors) -> None:
        """Take in lists of other rows that were begun with this horizon, or an earlier one."""
        horizon = np.minimum(self._lists.horizon, others.horizon)
        self._lists = replace(self._lists, horizon=horizon)
        query, place = np.nonzero(others.ids >= 0)
        self._wait(query, others.ids[query, place], others.distances[query, place])

    def take(self, ids: Ids, vectors: Floats) -> None:
        """Compare rows of ids (n,), none of them listed, and vectors (n, d) with every query."""
        if not len(ids) or not len(self._queries.ids):
            return
        # |q - x|^2 <= horizon as x.q - |x|^2 / 2 >= (|q|^2 - horizon) / 2: two passes over the matrix.
        closeness = vectors @ self._columns
        norms = np.einsum("ij,ij->i", vectors, vectors)
        closeness -= (((1 - _PRODUCT_ERROR) / 2) * norms)[:, None]
        needed = ((1 - _PRODUCT_ERROR) * self._norms - self._lists.horizon) / 2
        near = closeness >= needed
        # The query's own row, and one more, so that the lists are seen to be cut.
        enough = LISTED + 2
        if len(ids) > enough and near.sum() > near.size // 2:
            # Lists that are not full yet let every row in: the batch's own nearest will do.
            slack = _PRODUCT_ERROR * (self._norms + norms.max())
            last = np.partition(closeness, -enough, axis=0)[-enough]
            near &= closeness >= last - slack
        row, query = np.divmod(np.flatnonzero(near), len(needed))
        others = self._queries.ids[query] != ids[row]
        query, row = query[others], row[others]
        self._wait(query, ids[row], self._distances(query, row, vectors))

    def hand_over(self) -> Neighbors:
        """The lists with all that was taken."""
        self._settle()
        return self._lists

    def _wait(self, query: Ids, ids: Ids, distances: Floats) -> None:
        self._pending.append((query, ids, distances))
        self._waiting += len(query)
        if self._waiting > LISTED * len(self._queries.ids):
            self._settle()

    def _distances(self, query: Ids, row: Ids, vectors: Floats) -> Floats:
        """Each pair's squared distance, in float64: the same whatever stands beside it."""
        found = np.empty(len(query), np.float32)
        for at in range(0, len(query), _PAIRS):
            part = slice(at, at + _PAIRS)
            difference = vectors[row[part]].astype(np.float64) - self._queries.vectors[query[part]]
            found[part] = np.einsum("ij,ij->i", difference, difference)
        return found

    def _settle(self) -> None:
        """Merge what is pending into the lists, and cut them to LISTED."""
        if not self._waiting:
            return
        lists, count = self._lists, len(self._queries.ids)
        listed = np.nonzero(lists.ids >= 0)
        query, ids, distances = (
            np.concatenate(parts)
            for parts in zip(
                (listed[0], lists.ids[listed], lists.distances[listed]), *self._pending, strict=True
            )
        )
        inside = distances <= lists.horizon[query]
        query, ids, distances = query[inside], ids[inside], distances[inside]
        order = np.lexsort((ids, distances, query))
        query, ids, distances = query[order], ids[order], distances[order]
        sizes = np.bincount(query, minlength=count)
        place = np.arange(len(query)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept = place < LISTED
        merged = no_neighbors(self._queries)
        merged.ids[query[kept], place[kept]] = ids[kept]
        merged.distances[query[kept], place[kept]] = distances[kept]
        # Whatever was cut lies no nearer than the last one listed.
        cut = sizes > LISTED
        horizon = np.where(cut, merged.distances[:, -1], lists.horizon)
        self._lists = Neighbors(merged.ids, merged.distances, horizon.astype(np.float32))
        self._pending, self._waiting = [], 0
