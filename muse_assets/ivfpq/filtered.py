"""Searches among some ids only, as a server runs them with a selector: how good, and who comes back short.

Here: one index in memory, ids and queries in; figures out. Not here: whose ids (`playlists`) or where the
vectors come from.

A selector hides rows, it does not look further for others: the nearest lists hold what they hold. So how
many of the ids a search finds is a sum over list sizes, and the lists that would have sufficed are known
without searching again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.contents import decoded_vectors, list_ids, list_sizes, read_contents
from muse_assets.ivfpq.exact_neighbors import as_near_as

# Vectors reconstructed at a time: 16 MB of 512 floats.
_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Reach:
    """How far searches have to go.

    held: how many of the ids are in the index. lists_needed (q,) int64: the nearest lists of each query that
    hold k of them together, or all where they are fewer. scanned (nlist,): mean codes in the nearest p lists,
    at place p - 1, which is what a plain search at nprobe p scans.
    """

    held: int
    lists_needed: NDArray[np.int64]
    scanned: NDArray[np.float64]

    def short(self, nprobe: int) -> float:
        """Share of the queries that find fewer than k, or than all, of the ids at this nprobe."""
        return float((self.lists_needed > nprobe).mean())

    def nprobe_for(self, share: float) -> int:
        """The smallest nprobe at which no more than `share` of the queries come back short."""
        may_be_short = min(int(share * len(self.lists_needed) + 1e-9), len(self.lists_needed) - 1)
        return int(np.sort(self.lists_needed)[-1 - may_be_short])

    def codes_scanned(self, nprobe: int) -> float:
        """Codes that a plain search at this nprobe scans, on average."""
        return float(self.scanned[min(nprobe, len(self.scanned)) - 1])


@dataclass(frozen=True)
class Found:
    """distances (q, k) float32, squared L2; ids (q, k) int64, -1 past the last hit; seconds (q,)."""

    distances: NDArray[np.float32]
    ids: NDArray[np.int64]
    seconds: NDArray[np.float64]


def measure_reach(index: Any, ids: NDArray[np.int64], queries: NDArray[np.float32], k: int) -> Reach:
    """How many lists each of `queries` (q, d) float32 has to probe to find k of `ids` (n,) int64.

    Lists in the order of their centroids' exact distances: an HNSW quantizer may visit others.
    """
    sizes = list_sizes(index)
    among = np.isin(list_ids(index), ids)
    wanted = np.bincount(np.repeat(np.arange(index.nlist), sizes)[among], minlength=index.nlist)
    centroids = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)
    _, nearest = faiss.knn(np.ascontiguousarray(queries), centroids, index.nlist)
    held = int(among.sum())
    enough = np.cumsum(wanted[nearest], axis=1) >= min(k, held)
    return Reach(held, enough.argmax(axis=1) + 1, np.cumsum(sizes[nearest], axis=1).mean(axis=0))


def search_among(
    index: Any, ids: NDArray[np.int64], queries: NDArray[np.float32], k: int, nprobe: int
) -> Found:
    """The k nearest of `ids` (n,) int64 for each of `queries` (q, d) float32, one query a call."""
    parameters = faiss.SearchParametersIVF(
        nprobe=nprobe, sel=faiss.IDSelectorBatch(np.ascontiguousarray(ids, dtype=np.int64))
    )
    distances = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    seconds = np.empty(len(queries))
    for row in range(len(queries)):
        started = time.perf_counter()
        distances[row : row + 1], found[row : row + 1] = index.search(
            queries[row : row + 1], k, params=parameters
        )
        seconds[row] = time.perf_counter() - started
    return Found(distances, found, seconds)


def recall_of_rows(
    found: Found, ids: NDArray[np.int64], vectors: NDArray[np.float32], queries: NDArray[np.float32]
) -> float:
    """recall@k against exact search among `ids` (n,) int64 ascending with their `vectors` (n, d) float32.

    A hit counts when it is as near as the exact k-th, so equal vectors do not count as misses.
    """
    k = min(found.ids.shape[1], len(ids))
    farthest = faiss.knn(queries, vectors, k)[0][:, -1]
    rows = np.clip(np.searchsorted(ids, found.ids), 0, len(ids) - 1)
    distances = np.square(vectors[rows] - queries[:, None, :]).sum(axis=2)
    return _share_within((ids[rows] == found.ids) & (distances <= as_near_as(farthest[:, None])), k)


def recall_of_codes(found: Found, index: Any, ids: NDArray[np.int64], queries: NDArray[np.float32]) -> float:
    """recall@k against what probing every list would find among `ids` (n,) int64: the codes' own error apart.

    Scores the reconstructed vectors instead of scanning the whole index for each query.
    """
    contents = read_contents(index, only=ids)
    k = min(found.ids.shape[1], len(contents.ids))
    nearest = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(contents.ids), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        vectors = decoded_vectors(index, contents.lists[block], contents.codes[block])
        distances, _ = faiss.knn(queries, vectors, min(k, len(vectors)))
        nearest = np.sort(np.hstack([nearest, distances]), axis=1)[:, :k]
    return _share_within((found.ids >= 0) & (found.distances <= as_near_as(nearest[:, -1:])), k)


def _share_within(good: NDArray[np.bool_], k: int) -> float:
    return float(np.minimum(good.sum(axis=1), k).mean() / k)
