"""Vectors into codes: a pure function of the vector and the trained index, on every core.

Here: the encoder and the fill. Not here: reading vectors or deciding which go in (`snapshots`).

Python threads of one OpenMP thread each encode small blocks with transposed centroids: about 1.3 times
`add_with_ids` at 512-d and 1.7 times at 1024-d a CPU-second, and kilobytes of scratch instead of 2.2 GB
(at dsub 16 FAISS materializes n * 256 * m distances).
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

# A row's code must depend on the row alone, for an incremental index to equal a full one to the byte. In
# a matrix product it does not quite: rounding depends on the row's place, which decides near-ties (of 2,000
# rows with 70 distinct vectors, 766 got other codes in another order). So:
# - every call has the same shape, padded with zeros;
# - the two nearest centroids are looked up, which costs no more than one, and where they are too close to
#   call the list is decided in float64;
# - from dsub 16 on, where FAISS encodes through BLAS, blocks of 8 rows (one or two whole kernel tiles) gave
#   one code for identical rows, blocks of 16 to 64 up to three; below, rows are encoded one by one anyway.
BLOCK_ROWS = 1024
_CODES_BLOCK = 8
_DEFAULT_CODES_BLOCK = 262_144
_TOO_CLOSE = 2e-6

Encode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]


def encoder_name() -> str:
    """Names the arithmetic: codes of different encoders may differ in ties, so they are never mixed."""
    return f"faiss {faiss.__version__} {faiss.SIMDConfig.get_level_name()} {BLOCK_ROWS}/{_CODES_BLOCK}"


@contextlib.contextmanager
def encoder(index: Any, workers: int | None = None) -> Iterator[tuple[Encode, ThreadPoolExecutor]]:
    """A function (n <= BLOCK_ROWS, d) float32 -> (n, nlist bytes + code_size) uint8, and its thread pool."""

    assign = _assigner(index)
    width = index.coarse_code_size() + index.code_size

    def encode(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows = len(vectors)
        if rows < BLOCK_ROWS:
            padded = np.zeros((BLOCK_ROWS, index.d), np.float32)
            padded[:rows] = vectors
            vectors = padded
        lists = assign(vectors)
        codes = np.empty((BLOCK_ROWS, width), np.uint8)
        index.encode_vectors(
            BLOCK_ROWS, faiss.swig_ptr(vectors), faiss.swig_ptr(lists), faiss.swig_ptr(codes), True
        )
        return codes[:rows]

    index.pq.sync_transposed_centroids()
    faiss.cvar.product_quantizer_compute_codes_bs = _CODES_BLOCK
    try:
        with ThreadPoolExecutor(
            workers or os.cpu_count() or 1, "encode", initializer=lambda: faiss.omp_set_num_threads(1)
        ) as pool:
            yield encode, pool
    finally:
        faiss.cvar.product_quantizer_compute_codes_bs = _DEFAULT_CODES_BLOCK
        index.pq.clear_transposed_centroids()


def _assigner(index: Any) -> Callable[[NDArray[np.float32]], NDArray[np.int64]]:
    """A function (n, d) float32 -> list numbers (n,) int64, the same for a row wherever it stands."""
    quantizer = faiss.downcast_index(index.quantizer)
    if not isinstance(quantizer, faiss.IndexFlatL2) or index.nlist == 1:
        # HNSW computes distances one by one: no rounding that depends on the neighbors.
        return lambda vectors: np.ascontiguousarray(quantizer.search(vectors, 1)[1][:, 0])
    centroids = quantizer.reconstruct_n(0, index.nlist).astype(np.float64)
    norms = np.einsum("ij,ij->i", centroids, centroids)

    def assign(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        distances, lists = quantizer.search(vectors, 2)
        nearest = np.ascontiguousarray(lists[:, 0])
        scale = distances[:, 1] + np.einsum("ij,ij->i", vectors, vectors)
        for row in np.flatnonzero(distances[:, 1] - distances[:, 0] < _TOO_CLOSE * scale):
            exact = norms - 2 * (centroids @ vectors[row].astype(np.float64))
            nearest[row] = np.flatnonzero(exact <= exact.min() + 1e-12 * norms.max())[0]
        return nearest

    return assign


def coarse_quantizer(index: Any) -> str:
    """The class of the coarse quantizer."""
    return type(faiss.downcast_index(index.quantizer)).__name__


def why_not_continued(index: Any) -> list[str]:
    """What of a trained index that another program made keeps this encoder from going on with it."""
    found = []
    if index.metric_type != faiss.METRIC_L2:
        found.append("its metric is not squared L2")
    if coarse_quantizer(index) not in ("IndexFlatL2", "IndexHNSWFlat"):
        found.append(f"its coarse quantizer is {coarse_quantizer(index)}, not IndexFlatL2 or IndexHNSWFlat")
    if index.pq.nbits > 8:
        found.append(f"its nbits is {index.pq.nbits}, over 8")
    return found


def encode_all(index: Any, vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Stand-alone codes (list number, then PQ code) of (n, d) float32 vectors, as `fill` stores them."""
    with encoder(index) as (encode, pool):
        blocks = pool.map(encode, _blocks(vectors))
        return np.concatenate([np.empty((0, index.sa_code_size()), np.uint8), *blocks])


def fill(
    index: Any,
    batches: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> int:
    """Encode and add batches of ids (n,) int64 and vectors (n, d) float32; return the rows added.

    Vectors must be finite: FAISS drops a NaN row without a word. Batches are taken one ahead of the
    encoders, so memory holds the index, the batch and a few blocks.
    """
    added = 0
    with encoder(index) as (encode, pool):
        pending: collections.deque[tuple[NDArray[np.int64], Future[NDArray[np.uint8]]]] = collections.deque()

        def take() -> None:
            nonlocal added
            ids, codes = pending.popleft()
            index.add_sa_codes(codes.result(), ids)
            added += len(ids)
            on_rows(len(ids))

        for ids, vectors in batches:
            for start, block in enumerate(_blocks(vectors)):
                block_ids = np.ascontiguousarray(ids[start * BLOCK_ROWS : start * BLOCK_ROWS + len(block)])
                pending.append((block_ids, pool.submit(encode, block)))
                if len(pending) > 4 * (os.cpu_count() or 1):
                    take()
        while pending:
            take()
    return added


def split_codes(index: Any, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Stand-alone codes into list numbers (n,) int64 and PQ codes (n, code_size) uint8."""
    width = index.coarse_code_size()
    padded = np.zeros((len(codes), 8), np.uint8)
    padded[:, :width] = codes[:, :width]
    return padded.view("<i8").ravel(), np.ascontiguousarray(codes[:, width:])


def _blocks(vectors: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(vectors), BLOCK_ROWS):
        yield np.ascontiguousarray(vectors[start : start + BLOCK_ROWS])
