"""Which of many centroids are near a row, by NumPy's matrix product.

Here: comparing rows with every centroid. Not here: moving centroids (`kmeans`), or codes (`encoding`).

NumPy's product and not FAISS's: the OpenBLAS in FAISS's wheel is of 2021 and takes a processor that came
after it for a Prescott. On an Emerald Rapids a row and 1,000 centroids of 512-d took FAISS 32 us and NumPy 7;
where FAISS's knows the processor both take as long.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from muse_assets.ivfpq.process_wide import WhileWanted

# Rows compared at once: their distances to 1,000 centroids, 1 MB, stay in the cache.
BLOCK_ROWS = 256

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

    def nearest(self, rows: Floats, count: int) -> Numbers:
        """The `count` nearest of each row (n, d), (n, count) int64, in no order."""
        found = np.empty((len(rows), count), np.int64)
        for at in range(0, len(rows), BLOCK_ROWS):
            block = slice(at, at + BLOCK_ROWS)
            offsets = self.offsets(rows[block])
            found[block] = np.argpartition(offsets, min(count, offsets.shape[1] - 1), axis=1)[:, :count]
        return found


_one_thread = WhileWanted(partial(threadpool_limits, 1, user_api="blas"))


def one_blas_thread() -> AbstractContextManager[None]:
    """Keep BLAS from starting threads of its own, which spin beside those that ask it; for the whole process.

    Beside two encoders the products of 300,000 rows with 128 queries took 5.6 CPU-s, on one thread 1.0.
    """
    return _one_thread.held()
