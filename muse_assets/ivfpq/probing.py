"""How many lists a search has to probe: true recall by nprobe, and the nprobe to store.

Here: what an index in memory finds of its queries' exact neighbors. Not here: those neighbors
(`exact_neighbors`), or any other quality (`quality`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.contents import decoded_vectors, read_contents
from muse_assets.ivfpq.exact_neighbors import Ids, Neighbors, Queries, as_near_as

# recall@10 decides; the others are told.
K = 10
KS = (1, 10, 100)
# The ladder ends where twice the lists find less than this share more.
_SETTLED = 0.005


@dataclass(frozen=True)
class Probe:
    """What queries find in `nprobe` lists. recall: k -> share of the exact k nearest rows, on average.

    codes_scanned: a query. k is left out where no query has k neighbors that are known.
    """

    nprobe: int
    recall: dict[int, float]
    codes_scanned: float


@dataclass(frozen=True)
class ProbeCurve:
    """By nprobe, ascending; queries: how many were asked."""

    probes: tuple[Probe, ...]
    queries: int

    def at(self, nprobe: int) -> Probe:
        """The probe of a measured nprobe."""
        return next(probe for probe in self.probes if probe.nprobe == nprobe)


def probe_ladder(nlist: int, fixed: int | None = None) -> tuple[int, ...]:
    """1, 2, 4, ..., nlist itself, and `fixed` if it is below."""
    steps = {1 << bit for bit in range(nlist.bit_length())} | {fixed or nlist, nlist}
    return tuple(sorted(step for step in steps if step <= nlist))


def measure_probes(
    index: Any, queries: Queries, neighbors: Neighbors, *, fixed: int | None = None
) -> ProbeCurve:
    """Measure recall@1, @10 and @100 by nprobe, until more lists find hardly more.

    A returned id counts when it is as near as the exact k-th neighbor. fixed: an nprobe to measure too.
    Without queries or neighbors recall is 1.
    """
    known = neighbors.known()
    # Where every row is listed there may be fewer than k.
    complete = np.isinf(neighbors.horizon)
    asked = {
        k: np.flatnonzero((known >= k) | (complete & (known > 0)))
        for k in KS
        if (known >= k).any() or (k <= K and known.any())
    }
    if not asked:
        return ProbeCurve((Probe(index.nlist, dict.fromkeys((1, K), 1.0), float(index.ntotal)),), 0)
    tied = _tied_distances(index, queries, neighbors)
    # List -1, which an HNSW quantizer gives where it reaches fewer lists than asked for, has no codes.
    sizes = np.array([*(index.invlists.list_size(number) for number in range(index.nlist)), 0])
    found: list[Probe] = []
    searched: _Searched | None = None
    for nprobe in probe_ladder(index.nlist, fixed):
        to_lists, lists = faiss.downcast_index(index.quantizer).search(queries.vectors, nprobe)
        searched = _search(index, queries, lists, to_lists, max(asked) + 1, searched)
        ids, distances = searched.others(queries)
        recall = {
            k: _recall(neighbors, tied, rows, np.minimum(known[rows], k), ids, distances)
            for k, rows in asked.items()
        }
        found.append(Probe(nprobe, recall, float(sizes[lists].sum(axis=1).mean())))
        settled = len(found) > 1 and recall[K] - found[-2].recall[K] <= _SETTLED * recall[K]
        if settled and nprobe >= (fixed or 0):
            break
    return ProbeCurve(tuple(found), len(queries.ids))


def recall_at(index: Any, queries: Queries, neighbors: Neighbors) -> float:
    """recall@10 at the index's own nprobe."""
    measured = measure_probes(index, queries, neighbors, fixed=index.nprobe)
    return next(probe.recall[K] for probe in measured.probes if probe.nprobe >= index.nprobe)


def choose_nprobe(curve: ProbeCurve, recall_gate: float, probe_share: float, fixed: int | None = None) -> int:
    """`fixed` if it was measured; else the smallest measured nprobe whose recall@10 meets both limits.

    They are the gate, and the share of what more lists would find. Plain search uses the nprobe stored in
    the file; the last step where nothing meets the gate.
    """
    if any(probe.nprobe == fixed for probe in curve.probes):
        return fixed or 0
    most = max(probe.recall[K] for probe in curve.probes)
    for probe in curve.probes:
        if probe.recall[K] >= max(recall_gate, probe_share * most):
            return probe.nprobe
    return curve.probes[-1].nprobe


@dataclass(frozen=True)
class _Searched:
    """The nearest rows (q, k) in `lists` (q, nprobe) by what the index tells of them, nearest first; id -1
    where there are fewer."""

    lists: Ids
    ids: Ids
    distances: NDArray[np.float32]

    def others(self, queries: Queries) -> tuple[Ids, NDArray[np.float32]]:
        """Ids and distances (q, k - 1), each query's own row left out."""
        own = self.ids == queries.ids[:, None]
        own[~own.any(axis=1), -1] = True
        shape = (len(own), own.shape[1] - 1)
        return self.ids[~own].reshape(shape), self.distances[~own].reshape(shape)


def _search(
    index: Any,
    queries: Queries,
    lists: Ids,
    to_lists: NDArray[np.float32],
    k: int,
    before: _Searched | None,
) -> _Searched:
    """Search in `lists` (q, nprobe), at these squared distances: in those `before` did not search yet."""
    new = lists
    if before is not None:
        known = np.zeros((len(lists), index.nlist + 1), bool)  # list -1 is the last
        np.put_along_axis(known, before.lists, True, axis=1)
        again = np.take_along_axis(known, lists, axis=1)
        if (again.sum(axis=1) == before.lists.shape[1]).all():
            new = np.where(again, -1, lists)  # FAISS passes -1 over
        else:  # an HNSW quantizer that is asked for more lists may find others
            before = None
    stored = index.nprobe, index.parallel_mode
    # By queries: this call leaves that to its caller, unlike `search`, and would run on one core.
    index.nprobe, index.parallel_mode = lists.shape[1], 3
    try:
        distances, ids = index.search_preassigned(queries.vectors, k, new, to_lists)
    finally:
        index.nprobe, index.parallel_mode = stored
    if before is not None:
        ids = np.concatenate([before.ids, ids], axis=1)
        distances = np.concatenate([before.distances, distances], axis=1)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
        ids, distances = np.take_along_axis(ids, nearest, 1), np.take_along_axis(distances, nearest, 1)
    return _Searched(lists, ids, distances)


def _limits(neighbors: Neighbors, rows: Ids, counts: Ids) -> NDArray[np.float32]:
    """The distance up to which a row counts among the `counts` (r,) nearest of queries `rows` (r,)."""
    return as_near_as(neighbors.distances[rows, counts - 1])


def _recall(
    neighbors: Neighbors,
    tied: NDArray[np.float32],
    rows: Ids,
    counts: Ids,
    ids: Ids,
    distances: NDArray[np.float32],
) -> float:
    """Mean share of the `counts` (r,) nearest of queries `rows` (r,) among ids (q, k), nearest first."""
    limits = _limits(neighbors, rows, counts)[:, None]
    considered = np.arange(ids.shape[1]) < counts[:, None]
    ids, distances, tied = ids[rows], distances[rows], tied[rows][:, None]
    listed = np.where(neighbors.distances[rows] <= limits, neighbors.ids[rows], -2)
    right = (ids[:, :, None] == listed[:, None, :]).any(axis=2)
    beyond = neighbors.distances[rows, -1:] <= limits
    right |= beyond & (ids >= 0) & (np.abs(distances - tied) <= as_near_as(tied) - tied)
    return float(((right & considered).sum(axis=1) / counts).mean())


def _tied_distances(index: Any, queries: Queries, neighbors: Neighbors) -> NDArray[np.float32]:
    """What the index gives as distance of each query's last listed row (q,); nan where the list is not full.

    Of more identical rows than are listed, any is right: they share list and code, and so this distance.
    """
    tied = np.full(len(queries.ids), np.nan, np.float32)
    full = np.flatnonzero(neighbors.ids[:, -1] >= 0)
    last = neighbors.ids[full, -1]
    held = read_contents(index, only=np.unique(last))
    present = np.isin(last, held.ids)
    full, last = full[present], last[present]
    at = np.searchsorted(held.ids, last)
    decoded = decoded_vectors(index, held.lists[at], held.codes[at])
    tied[full] = np.square(queries.vectors[full] - decoded).sum(axis=1)
    return tied
