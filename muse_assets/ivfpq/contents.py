"""What an IVF-PQ index holds: its ids, lists and codes, and how they are taken out and put in order.

Here: reads and edits of inverted lists in memory. Not here: encoding vectors (`encoding`) or files.
`ntotal` is never trusted: FAISS counts a NaN row in it that is in no list.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Contents:
    """ids (n,) int64 ascending; lists (n,) int64 list numbers; codes (n, code_size) uint8."""

    ids: NDArray[np.int64]
    lists: NDArray[np.int64]
    codes: NDArray[np.uint8]


def list_sizes(index: Any) -> NDArray[np.int64]:
    """Codes in each inverted list, (nlist,) int64."""
    return np.array([index.invlists.list_size(i) for i in range(index.nlist)], dtype=np.int64)


def list_ids(index: Any) -> NDArray[np.int64]:
    """Every id in the inverted lists, (n,) int64 in list order, duplicates included."""
    parts = [_ids_view(index, i) for i in range(index.nlist)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def read_contents(index: Any, only: NDArray[np.int64] | None = None) -> Contents:
    """Copy ids, lists and codes out of the index, by ascending id; `only` restricts to those ids."""
    wanted = None if only is None else np.sort(only)
    ids, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    codes = [np.empty((0, index.code_size), np.uint8)]
    # List by list: over all ids at once, finding the wanted ones took 36 bytes a row of the index.
    for number in range(index.nlist if wanted is None or len(wanted) else 0):
        of_list = _ids_view(index, number)
        rows = np.arange(len(of_list)) if wanted is None else _found_in(wanted, of_list)
        ids.append(of_list[rows])
        numbers.append(np.full(len(rows), number))
        codes.append(_codes_view(index, number)[rows])
    found = np.concatenate(ids)
    order = np.argsort(found, kind="stable")
    return Contents(found[order], np.concatenate(numbers)[order], np.concatenate(codes)[order])


def _found_in(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of those `ids` (n,) that are among `wanted` (w,) ascending, w > 0."""
    at = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
    return np.flatnonzero(wanted[at] == ids)


def decoded_vectors(index: Any, lists: NDArray[np.int64], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the index takes rows of these lists (n,) and codes (n, code_size) for, (n, d) float32."""
    vectors: NDArray[np.float32] = index.pq.decode(np.ascontiguousarray(codes))
    if index.by_residual:
        vectors += faiss.downcast_index(index.quantizer).reconstruct_batch(lists)
    return vectors


def remove_ids(index: Any, ids: NDArray[np.int64]) -> int:
    """Remove every copy of `ids` (n,) int64; return how many entries went.

    IDSelectorBatch with no direct map: 10 ms for 5,000 of 1M. A hashtable map forgets older duplicates,
    IDSelectorArray scans linearly.
    """
    if not len(ids):
        return 0
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    return int(index.remove_ids(faiss.IDSelectorBatch(ids)))


def sort_lists(index: Any) -> None:
    """Order each inverted list by id, in place.

    The canonical order: the same rows and cluster then give the same bytes, whatever the history of
    additions and removals.
    """
    for number in range(index.nlist):
        ids = _ids_view(index, number)
        if len(ids) > 1 and np.any(ids[1:] < ids[:-1]):
            order = np.argsort(ids, kind="stable")
            codes = _codes_view(index, number)
            ids[:] = ids[order]
            codes[:] = codes[order]


def trained_fingerprint(index: Any) -> str:
    """SHA-256 (hex) of what training fixed: coarse quantizer, codebook, shape and metric.

    `merge_from` and `add` accept a foreign codebook without a word, so this is compared instead.
    """
    quantizer = faiss.downcast_index(index.quantizer)
    centroids = quantizer.reconstruct_n(0, index.nlist)
    codebook = faiss.vector_to_array(index.pq.centroids)
    shape = (
        type(quantizer).__name__,
        index.d,
        index.nlist,
        index.pq.M,
        index.pq.nbits,
        index.metric_type,
        index.by_residual,
    )
    digest = hashlib.sha256(repr(shape).encode())
    digest.update(centroids.tobytes())
    digest.update(codebook.tobytes())
    if not isinstance(quantizer, faiss.IndexFlat):
        # The graph decides the list too: it is built by several threads, never the same twice.
        digest.update(faiss.serialize_index(quantizer).tobytes())
    return digest.hexdigest()


def _ids_view(index: Any, number: int) -> NDArray[np.int64]:
    size = index.invlists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    view: NDArray[np.int64] = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
    return view


def _codes_view(index: Any, number: int) -> NDArray[np.uint8]:
    size = index.invlists.list_size(number)
    if not size:
        return np.empty((0, index.code_size), np.uint8)
    flat: NDArray[np.uint8] = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
    return flat.reshape(size, index.code_size)
