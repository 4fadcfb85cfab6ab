"""Which of many centroids are near a row: the nearest by NumPy's matrix product, or a few by short codes.

Here: comparing rows with every centroid. Not here: moving centroids (`kmeans`), or codes (`encoding`).

NumPy's product and not FAISS's: the OpenBLAS in FAISS's wheel is of 2021 and takes a processor that came
after it for a Prescott. On an Emerald Rapids a row and 1,000 centroids of 512-d took FAISS 32 us and NumPy 7;
where FAISS's knows the processor both take as long.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager
from functools import partial

import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from muse_assets.ivfpq.process_wide import WhileWanted

# Rows compared at once: their distances to 1,000 centroids, 1 MB, stay in the cache.
BLOCK_ROWS = 256
_CODE_BITS = 4
_CODED_DIMENSIONS, _LEAST_CODES = 8, 64
# Of 1,000 centroids of 512-d: 0.02 s; FAISS's 25 take 0.07 to 0.17 and find the nearest of 0.2 % more rows.
_CODE_STEPS = 5

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


class Centroids:
    """Centroids (k, d) float32, as rows are compared with them; any number of threads may ask."""

    def __init__(self, centroids: Floats) -> None:
        self._columns = np.ascontiguousarray(centroids.T)
        self._halves = (np.square(centroids, dtype=np.float64).sum(axis=1) / 2).astype(np.float32)
        self._own = threading.local()

    def offsets(self, block: Floats) -> Floats:
        """Half the squared distances of a block's rows (n, d) to the centroids, less half the row's square.

        (n, k), n at most BLOCK_ROWS, good until the calling thread asks again. What rounding does to a row
        depends on its place in the block and on n.
        """
        if not hasattr(self._own, "scratch"):
            self._own.scratch = np.empty((BLOCK_ROWS, len(self._halves)), np.float32)
        found: Floats = self._own.scratch[: len(block)]
        np.matmul(block, self._columns, out=found)
        np.subtract(self._halves, found, out=found)
        return found


class CodedCentroids:
    """Centroids (k, d) float32 as product codes of 4 bits, from which the few near a row are told.

    For a step of k-means, which only has to look at the right ones: 98.8 to 99.8 % of rows of three sets
    found the nearest of 1,000 among 16, and the error rose by 0.003 to 0.04 %. It took 5.3 us a row of 512-d
    and 8 of 1024-d where the product and the 16 least of its row took 14 and 26. With codes of 16 dimensions
    90 to 98 %, of 4 all but 0.05 %, in 7.7 us. Few dimensions need shorter ones: of 64, without any
    structure, 8 codes tell 65 %, 64 all.

    https://github.com/facebookresearch/faiss/wiki/Fast-accumulation-of-PQ-and-AQ-codes-(FastScan)
    """

    def __init__(self, centroids: Floats) -> None:
        self._count, dimension = centroids.shape
        if self._count > 1 << _CODE_BITS:
            coded_dimensions = min(max(dimension // _LEAST_CODES, 1), _CODED_DIMENSIONS)
            codes = dimension // math.gcd(dimension, coded_dimensions)
            self._index = faiss.IndexPQFastScan(dimension, codes, _CODE_BITS)
            self._index.pq.cp.min_points_per_centroid = 1  # it need not warn of few
            self._index.pq.cp.niter = _CODE_STEPS
            self._index.train(centroids)
            self._index.add(centroids)

    def near(self, rows: Floats, count: int) -> Numbers:
        """About the `count` nearest of each row (n, d), (n, count) int64, in no order; all of so few.

        Any number of threads may ask at once, each with FAISS's own threads off.
        """
        if self._count <= max(count, 1 << _CODE_BITS):
            return np.tile(np.arange(self._count), (len(rows), 1))
        found: Numbers = self._index.search(rows, count)[1]
        return found


_one_thread = WhileWanted(partial(threadpool_limits, 1, user_api="blas"))


def one_blas_thread() -> AbstractContextManager[None]:
    """Keep BLAS from starting threads of its own, which spin beside those that ask it; for the whole process.

    Beside two encoders the products of 300,000 rows with 128 queries took 5.6 CPU-s, on one thread 1.0.
    """
    return _one_thread.held()
