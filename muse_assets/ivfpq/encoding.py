"""Vectors into codes: a pure function of the vector and the trained index, on every core.

Here: the encoder and the fill. Not here: reading vectors or deciding which go in (`snapshots`).

Two Python threads of one OpenMP thread each run `sa_encode` with transposed centroids on small blocks:
71k -> 100k vectors/s at 512-d, 16k -> 43k at 1024-d on 2 cores against `add_with_ids`, and 4 MB of
scratch instead of 2.2 GB (at dsub 16 FAISS materializes n * 256 * m distances).
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

# Every call encodes exactly this many rows, padded with zeros. With a fixed shape BLAS takes the same
# path for every row, so a row's code does not depend on its neighbors or on the size of the batch:
# 0 of 40,000 codes differed under permutations, which the incremental = full law rests on.
BLOCK_ROWS = 1024
_CODES_BLOCK = 64
_DEFAULT_CODES_BLOCK = 262_144

Encode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]


def encoder_name() -> str:
    """Names the arithmetic: codes of different encoders may differ in ties, so they are never mixed."""
    return f"faiss {faiss.__version__} {faiss.get_compile_options().strip()} transposed {BLOCK_ROWS}"


@contextlib.contextmanager
def encoder(index: Any, workers: int | None = None) -> Iterator[tuple[Encode, ThreadPoolExecutor]]:
    """A function (n <= BLOCK_ROWS, d) float32 -> (n, nlist bytes + code_size) uint8, and its thread pool."""

    def encode(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows = len(vectors)
        if rows < BLOCK_ROWS:
            padded = np.zeros((BLOCK_ROWS, index.d), np.float32)
            padded[:rows] = vectors
            vectors = padded
        codes: NDArray[np.uint8] = index.sa_encode(vectors)[:rows]
        return codes

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
