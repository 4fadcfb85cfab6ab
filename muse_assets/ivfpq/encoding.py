"""Vectors into codes: a pure function of the vector and the trained index, on every core.

Here: the encoder and the fill. Not here: reading vectors or deciding which go in (`snapshots`).

Python threads of one OpenMP thread each encode small blocks. FAISS's own path takes, beside the matrix
product with the centroids, 8 us a vector for the product code at 512-d (dsub 8) and 38 at 1024-d (dsub 16,
where it materializes n * 256 * m distances: 2.2 GB); its fused nearest-neighbor kernel takes 7 and 11.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.nearest_centroids import BLOCK_ROWS as _COMPARED_ROWS
from muse_assets.ivfpq.nearest_centroids import Centroids, one_blas_thread
from muse_assets.ivfpq.process_wide import WhileWanted

# A row's code must depend on the row alone, for an incremental index to equal a full one to the byte. In
# a matrix product it does not quite: rounding depends on the row's place, which decides near-ties (of 2,000
# rows with 70 distinct vectors, 766 got other codes in another order). So:
# - every call has the same shape, padded with zeros;
# - where the two nearest centroids are too close to call the list is decided in float64;
# - residuals are differences, and the fused kernel keeps a row's arithmetic to itself: at each of its
#   dimensions equal rows had equal distances to the bit in every place of blocks of 1 to 1,032 rows;
# - without that kernel FAISS encodes: row by row below dsub 16, from there on through BLAS, where blocks of
#   8 rows (one or two whole kernel tiles) gave one code for identical rows, of 16 to 64 up to three.
BLOCK_ROWS = 1024
_CODES_BLOCK = 8
_TOO_CLOSE = 2e-6
# faiss/utils/distances_fused: the largest dimension that has a kernel, by what the SIMD level begins with.
_FUSED_DIMENSIONS = {"AVX512": 32, "AVX2": 16}

Encode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
_ProductEncode = Callable[[NDArray[np.float32], NDArray[np.uint8]], None]


def encoder_name() -> str:
    """Names the arithmetic: codes of different encoders may differ in ties, so they are never mixed."""
    level = faiss.SIMDConfig.get_level_name()
    return f"faiss {faiss.__version__} {level} {BLOCK_ROWS}/numpy/fused/{_CODES_BLOCK}"


def fused_dimensions() -> int:
    """The largest dimension of FAISS's fused nearest-neighbor kernels on this machine; 0 without any."""
    level = faiss.SIMDConfig.get_level_name()
    return max((size for name, size in _FUSED_DIMENSIONS.items() if level.startswith(name)), default=0)


def use_one_thread() -> None:
    """Keep FAISS from starting threads of its own in the calling thread, which is one of many that encode."""
    faiss.omp_set_num_threads(1)


@contextlib.contextmanager
def encoder(index: Any) -> Iterator[Encode]:
    """A function (n, d) float32 -> (n, nlist bytes + code_size) uint8: stand-alone codes.

    Any number of threads may call it at once, each after `use_one_thread`.
    """
    assign = _assigner(index)
    encode_product = _product_encoder(index.pq)
    prefix = index.coarse_code_size()

    def encode_block(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows = len(vectors)
        if rows < BLOCK_ROWS:
            padded = np.zeros((BLOCK_ROWS, index.d), np.float32)
            padded[:rows] = vectors
            vectors = padded
        lists = assign(vectors, rows)
        product = np.empty((BLOCK_ROWS, index.code_size), np.uint8)
        encode_product(_residuals(index, vectors, lists), product)
        numbers = lists.astype("<i8", copy=False).view(np.uint8).reshape(BLOCK_ROWS, 8)
        return np.concatenate([numbers[:rows, :prefix], product[:rows]], axis=1)

    def encode(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        nothing = np.empty((0, index.sa_code_size()), np.uint8)
        return np.concatenate([nothing, *(encode_block(block) for block in _blocks(vectors))])

    with _settings.held(), one_blas_thread():
        try:
            yield encode
        finally:
            index.pq.clear_transposed_centroids()


def _assigner(index: Any) -> Callable[[NDArray[np.float32], int], NDArray[np.int64]]:
    """A function (n, d) float32 -> list numbers (n,) int64, the same for a row wherever it stands.

    Its second argument says how many rows count: those behind are padding, and get any list.
    """
    quantizer = faiss.downcast_index(index.quantizer)
    if not isinstance(quantizer, faiss.IndexFlatL2) or index.nlist == 1:
        # HNSW computes distances one by one: no rounding that depends on the neighbors.
        return lambda vectors, _: np.ascontiguousarray(quantizer.search(vectors, 1)[1][:, 0])
    centroids = quantizer.reconstruct_n(0, index.nlist)
    compared = Centroids(centroids)
    exact_centroids = centroids.astype(np.float64)
    norms = np.einsum("ij,ij->i", exact_centroids, exact_centroids)

    # The whole matrix product: bounds from 127 of 512 principal dimensions took as long, 11 us, and left 44
    # to 88 % of the rows of three data sets undecided among the 32 nearest lists.
    def assign(vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        lists = np.empty(len(vectors), np.int64)
        for at in range(0, len(vectors), _COMPARED_ROWS):
            block = vectors[at : at + _COMPARED_ROWS]
            offsets, rows = compared.offsets(block), np.arange(len(block))
            nearest = offsets.argmin(axis=1)
            smallest = offsets[rows, nearest]
            offsets[rows, nearest] = np.inf
            second = offsets.min(axis=1)
            scale = second + np.einsum("ij,ij->i", block, block)
            # Not of the padding: its zeros are as near to all centroids where those are of unit length.
            for row in np.flatnonzero((second - smallest < _TOO_CLOSE * scale)[: max(count - at, 0)]):
                exact = norms - 2 * (exact_centroids @ block[row].astype(np.float64))
                nearest[row] = np.flatnonzero(exact <= exact.min() + 1e-12 * norms.max())[0]
            lists[at : at + len(block)] = nearest
        return lists

    return assign


def _residuals(index: Any, vectors: NDArray[np.float32], lists: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the product quantizer encodes of (n, d) vectors: the differences from their lists' centroids."""
    if not index.by_residual:
        return vectors
    residuals = np.empty_like(vectors)
    pointers = (faiss.swig_ptr(array) for array in (vectors, residuals, lists))
    index.quantizer.compute_residual_n(len(vectors), *pointers)
    return residuals


def _product_encoder(pq: Any) -> _ProductEncode:
    """A function of residuals (n, d) float32 that writes their codes (n, code_size) uint8; any thread's."""
    if pq.nbits != 8 or pq.dsub > fused_dimensions():
        pq.sync_transposed_centroids()
        return lambda residuals, codes: pq.compute_codes_c(
            faiss.swig_ptr(residuals), faiss.swig_ptr(codes), len(codes)
        )
    own = threading.local()

    def encode(residuals: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
        if not hasattr(own, "pq"):
            own.pq, own.nearest = faiss.ProductQuantizer(pq.d, pq.M, pq.nbits), faiss.IndexFlatL2(pq.dsub)
            own.pq.centroids = pq.centroids
            own.pq.assign_index = own.nearest
        own.pq.compute_codes_with_assign_index(faiss.swig_ptr(residuals), faiss.swig_ptr(codes), len(codes))

    return encode


@contextlib.contextmanager
def _tuned() -> Iterator[None]:
    """FAISS's process-wide settings as encoders need them.

    Below the threshold (rows x dimensions) a search does not come to the fused kernel. And after each of a
    block's 64 searches FAISS asks Python for signals, and so for the GIL: beside a thread that runs Python
    a row's product code took 39 us with that and 23 without. An interrupt waits for the block's end, 20 ms.
    """
    variables = faiss.cvar
    before = variables.distance_compute_blas_threshold, variables.product_quantizer_compute_codes_bs
    variables.distance_compute_blas_threshold = 1
    variables.product_quantizer_compute_codes_bs = _CODES_BLOCK
    faiss.InterruptCallback.clear_instance()
    try:
        yield
    finally:
        faiss.PythonInterruptCallback.reset()
        variables.distance_compute_blas_threshold, variables.product_quantizer_compute_codes_bs = before


_settings = WhileWanted(_tuned)


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
    with encoder(index) as encode, _threads() as pool:
        blocks = pool.map(encode, _blocks(vectors))
        return np.concatenate([np.empty((0, index.sa_code_size()), np.uint8), *blocks])


def fill(
    index: Any,
    batches: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> int:
    """Encode and add batches of ids (n,) int64 and vectors (n, d) float32; return the rows added.

    Vectors must be finite: a NaN row gets any code without a word. Batches are taken one ahead of the
    encoders, so memory holds the index, the batch and a few blocks.
    """
    added = 0
    with encoder(index) as encode, _threads() as pool:
        pending: collections.deque[tuple[NDArray[np.int64], Future[NDArray[np.uint8]]]] = collections.deque()

        def take() -> None:
            nonlocal added
            ids, codes = pending.popleft()
            add_codes(index, ids, codes.result())
            added += len(ids)
            on_rows(len(ids))

        for ids, vectors in batches:
            for start, block in enumerate(_blocks(vectors)):
                pending.append((ids[start * BLOCK_ROWS :][: len(block)], pool.submit(encode, block)))
                if len(pending) > 4 * (os.cpu_count() or 1):
                    take()
        while pending:
            take()
    return added


def add_codes(index: Any, ids: NDArray[np.int64], codes: NDArray[np.uint8]) -> None:
    """Put rows of ids (n,) into their lists by their stand-alone codes (n, w)."""
    index.add_sa_codes(np.ascontiguousarray(codes), np.ascontiguousarray(ids))


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "encode", initializer=use_one_thread)


def split_codes(index: Any, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Stand-alone codes into list numbers (n,) int64 and PQ codes (n, code_size) uint8."""
    width = index.coarse_code_size()
    padded = np.zeros((len(codes), 8), np.uint8)
    padded[:, :width] = codes[:, :width]
    return padded.view("<i8").ravel(), np.ascontiguousarray(codes[:, width:])


def _blocks(vectors: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(vectors), BLOCK_ROWS):
        yield np.ascontiguousarray(vectors[start : start + BLOCK_ROWS])
