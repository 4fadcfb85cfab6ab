"""How many lists a search has to probe: recall@10 and the share of all answers found, by nprobe.

Here: one measurement on an index in memory and a sample of its rows, and the nprobe to store. Not here: any
other quality (`quality`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

K = 10
# Lists probed at first, and how many times more while a larger share of answers lies in the further half of
# them. With 1.6 % there (100k rows, 400 lists), 0.1 % of the answers lay beyond the 64 lists.
_FIRST_REACH = 64
_FURTHER = 4
_SETTLED = 0.02


@dataclass(frozen=True)
class ProbeCurve:
    """By nprobe, ascending: recall@10 against exact search, share of exhaustive probing's answers found.

    recall is measured among the sampled rows alone (a selector hides the others), so it reads a few
    points low where the sample is thin (75.3 for a true 78.8 at a tenth): compare it with itself.
    kept is measured on the whole index and needs no vectors but the queries.
    """

    nprobe: tuple[int, ...]
    recall: tuple[float, ...]
    kept: tuple[float, ...]
    codes_scanned: tuple[float, ...]

    def at(self, nprobe: int) -> float:
        """recall@10 at a measured nprobe."""
        return self.recall[self.nprobe.index(nprobe)]


def probe_ladder(nlist: int, fixed: int | None = None) -> tuple[int, ...]:
    """1, 2, 4, ..., nlist itself, and `fixed` if it is below."""
    steps = {1 << bit for bit in range(nlist.bit_length())} | {fixed or nlist, nlist}
    return tuple(sorted(step for step in steps if step <= nlist))


def measure_probes(
    index: Any,
    ids: NDArray[np.int64],
    vectors: NDArray[np.float32],
    queries: int = 200,
    k: int = K,
    *,
    fixed: int | None = None,
) -> ProbeCurve:
    """Measure recall@k with the first `queries` sampled rows as queries, each row's own id left out.

    ids (n,) int64 and vectors (n, d) float32: a random sample of the index's rows as stored. A returned
    id counts when it is as near as the exact k-th neighbor, so rows with identical vectors (every song of
    an artist) do not count as misses. fixed: an nprobe to measure too.

    What probing every list would find is taken from the nearest 64 lists, or four times as many as long
    as more than 2 % of it lies in the further half of them: probing all is most of a measurement's cost.
    """
    base, query = np.ascontiguousarray(vectors), np.ascontiguousarray(vectors[:queries])
    order = np.argsort(ids)
    sorted_ids = ids[order]
    k = min(k, len(ids) - 1)
    if k < 1:
        return ProbeCurve((index.nlist,), (1.0,), (1.0,), (float(len(ids)),))
    nearest = _kth_distances(query, base, k) * (1 + 1e-4) + 1e-6

    # List -1, which an HNSW quantizer gives where it reaches fewer lists than asked for, has no codes.
    sizes = np.array([*(index.invlists.list_size(i) for i in range(index.nlist)), 0])
    probed, ranks = _answers(index, query, ids[:queries], k, fixed or 0)
    selector = None if len(sorted_ids) == sizes.sum() else faiss.IDSelectorBatch(sorted_ids)
    ladder, recall, kept, scanned = [], [], [], []
    for nprobe in probe_ladder(index.nlist, fixed):
        if nprobe > probed.shape[1]:
            break
        found = _search_without_self(index, query, ids[:queries], nprobe, k, selector)
        rows = order[np.clip(np.searchsorted(sorted_ids, found), 0, len(base) - 1)]
        distances = np.square(base[rows] - query[:, None, :]).sum(axis=2)
        ladder.append(nprobe)
        recall.append(float(((distances <= nearest[:, None]) & (found >= 0)).mean()))
        kept.append(float((ranks < nprobe).mean()) if len(ranks) else 1.0)
        scanned.append(float(sizes[probed[:, :nprobe]].sum(axis=1).mean()))
        if kept[-1] == 1.0 and len(recall) > 1 and recall[-1] == recall[-2] and nprobe >= (fixed or 0):
            break
    return ProbeCurve(tuple(ladder), tuple(recall), tuple(kept), tuple(scanned))


def choose_nprobe(curve: ProbeCurve, recall_gate: float, probe_share: float, fixed: int | None = None) -> int:
    """`fixed` if it was measured; else the smallest measured nprobe that meets both limits.

    They are recall@10, and the share of exhaustive probing's answers that is found.

    Plain search uses the nprobe stored in the file; the largest step where nothing meets the gate.
    """
    if fixed in curve.nprobe:
        return fixed
    for nprobe, recall, kept in zip(curve.nprobe, curve.recall, curve.kept, strict=True):
        if recall >= recall_gate and kept >= probe_share:
            return nprobe
    return curve.nprobe[-1]


def _kth_distances(query: NDArray[np.float32], base: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Squared distance (q,) of the first q rows of `base` to their exact k-th neighbors among the others."""
    distances, neighbors = faiss.knn(query, base, k + 1)
    # The query row is its own nearest neighbor, or ties with it: drop it, else the farthest.
    own = neighbors == np.arange(len(query))[:, None]
    own[~own.any(axis=1), -1] = True
    kth: NDArray[np.float32] = distances[~own].reshape(len(query), k)[:, -1]
    return kth


def _answers(
    index: Any, query: NDArray[np.float32], own: NDArray[np.int64], k: int, at_least: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The lists probed, nearest first (q, reach), and at which place of them each answer (a,) was found.

    An answer within the first p lists is one of the nearest k there too: so one search says for every p
    which of its answers are found.
    """
    reach = min(max(_FIRST_REACH, at_least), index.nlist)
    while True:
        to_lists, probed = faiss.downcast_index(index.quantizer).search(query, reach)
        ranks = _ranks(index, query, own, k, probed, to_lists)
        if reach == index.nlist or not len(ranks) or float((ranks >= reach // 2).mean()) <= _SETTLED:
            return probed, ranks
        reach = min(_FURTHER * reach, index.nlist)


def _ranks(
    index: Any,
    query: NDArray[np.float32],
    own: NDArray[np.int64],
    k: int,
    probed: NDArray[np.int64],
    to_lists: NDArray[np.float32],
) -> NDArray[np.int64]:
    distances = np.empty((len(query), k + 1), np.float32)
    places = np.empty((len(query), k + 1), np.int64)
    index.search_preassigned_c(
        len(query),
        faiss.swig_ptr(query),
        k + 1,
        faiss.swig_ptr(probed),
        faiss.swig_ptr(to_lists),
        faiss.swig_ptr(distances),
        faiss.swig_ptr(places),
        True,
        faiss.SearchParametersIVF(nprobe=probed.shape[1]),
        None,
    )
    # A place is list number << 32 | offset, -1 where fewer than k + 1 rows were reached.
    lists, offsets = places >> 32, places & 0xFFFFFFFF
    mine = np.zeros(places.shape, bool)
    for row, column in np.argwhere(places >= 0):
        number, offset = int(lists[row, column]), int(offsets[row, column])
        mine[row, column] = index.invlists.get_single_id(number, offset) == own[row]
    mine[~mine.any(axis=1), -1] = True
    ranks = np.argmax(probed[:, None, :] == lists[:, :, None], axis=2)
    found: NDArray[np.int64] = ranks[~mine & (places >= 0)]
    return found


def _search_without_self(
    index: Any, query: NDArray[np.float32], own: NDArray[np.int64], nprobe: int, k: int, selector: Any
) -> NDArray[np.int64]:
    parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    _, found = index.search(query, k + 1, params=parameters)
    mine = found == own[:, None]
    mine[~mine.any(axis=1), -1] = True
    kept: NDArray[np.int64] = found[~mine].reshape(len(query), k)
    return kept
