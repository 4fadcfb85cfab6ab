"""How good an index is: recall@10 by nprobe, the nprobe to store, balance, agreement with its vectors.

Here: measurements on an index in memory and vectors given as arrays. Not here: the limits that a
snapshot has to keep (`snapshots.gate`) or where the rows come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.contents import read_contents
from muse_assets.ivfpq.encoding import encode_all, split_codes

K = 10


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
    """
    order = np.argsort(ids)
    sorted_ids, base = ids[order], np.ascontiguousarray(vectors[order])
    query_rows = np.searchsorted(sorted_ids, ids[:queries])
    query = base[query_rows]
    k = min(k, len(ids) - 1)
    if k < 1:
        return ProbeCurve((index.nlist,), (1.0,), (1.0,), (float(len(ids)),))
    exact, neighbors = faiss.knn(query, base, k + 1)
    # The query row is its own nearest neighbor, or ties with it: drop it, else the farthest.
    own = neighbors == query_rows[:, None]
    own[~own.any(axis=1), -1] = True
    kth = exact[~own].reshape(len(query), k)[:, -1]
    reach = kth * (1 + 1e-4) + 1e-6

    coarse = faiss.downcast_index(index.quantizer)
    # List -1, which an HNSW quantizer gives where it reaches fewer lists than asked for, has no codes.
    sizes = np.array([*(index.invlists.list_size(i) for i in range(index.nlist)), 0])
    probed = coarse.search(query, index.nlist)[1]
    selector = faiss.IDSelectorBatch(sorted_ids)
    whole = len(sorted_ids) == sizes.sum()
    complete = _without_self(index, query, ids[:queries], index.nlist, k, None)
    ladder, recall, kept, scanned = [], [], [], []
    for nprobe in probe_ladder(index.nlist, fixed):
        everywhere = _without_self(index, query, ids[:queries], nprobe, k, None)
        found = everywhere if whole else _without_self(index, query, ids[:queries], nprobe, k, selector)
        rows = np.clip(np.searchsorted(sorted_ids, found), 0, len(base) - 1)
        distances = np.square(base[rows] - query[:, None, :]).sum(axis=2)
        ladder.append(nprobe)
        recall.append(float(((distances <= reach[:, None]) & (found >= 0)).mean()))
        kept.append(float(np.mean([np.isin(c, e).mean() for c, e in zip(complete, everywhere, strict=True)])))
        scanned.append(float(sizes[probed[:, :nprobe]].sum(axis=1).mean()))
        if kept[-1] == 1.0 and len(recall) > 1 and recall[-1] == recall[-2] and nprobe >= (fixed or 0):
            break  # more lists change nothing: a complete curve took 4.4 s, this 0.5 s, on 60k rows
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


def imbalance(index: Any) -> float:
    """FAISS's imbalance factor: 1 when all lists are equally long; search cost grows with it."""
    return float(index.invlists.imbalance_factor())


def reencoded_wrongly(index: Any, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Those of `ids` (n,) whose list or code in the index is not what `vectors` (n, d) encode to now.

    The strongest single test: it finds stale vectors, shifted ids and a wrong codebook, where self-recall
    stays at 100 with ids rolled by one or a tenth of the codebook zeroed.
    """
    stored = read_contents(index, only=ids)
    order = np.argsort(ids)
    lists, codes = split_codes(index, encode_all(index, vectors[order]))
    expected_ids = ids[order]
    if not np.array_equal(stored.ids, expected_ids):
        present = np.isin(expected_ids, stored.ids)
        duplicated = stored.ids[:-1][stored.ids[1:] == stored.ids[:-1]]
        missing: NDArray[np.int64] = np.union1d(expected_ids[~present], duplicated)
        return missing
    wrong = (stored.lists != lists) | (stored.codes != codes).any(axis=1)
    disagreeing: NDArray[np.int64] = expected_ids[wrong]
    return disagreeing


def _without_self(
    index: Any, query: NDArray[np.float32], own: NDArray[np.int64], nprobe: int, k: int, selector: Any
) -> NDArray[np.int64]:
    parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    _, found = index.search(query, k + 1, params=parameters)
    mine = found == own[:, None]
    mine[~mine.any(axis=1), -1] = True
    kept: NDArray[np.int64] = found[~mine].reshape(len(query), k)
    return kept
