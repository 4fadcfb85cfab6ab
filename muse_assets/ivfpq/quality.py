"""How good an index is, searching apart: its balance, and whether it holds what its vectors encode to.

Here: measurements on an index in memory and vectors given as arrays. Not here: recall (`probing`), the
limits that a snapshot has to keep (`snapshots.gate`) or where the rows come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.contents import read_contents
from muse_assets.ivfpq.encoding import encode_all, split_codes


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
