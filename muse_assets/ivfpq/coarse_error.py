"""How far vectors lie from their centroids: what k-means left over, and what a foreign set has more of.

Here: the distances. Not here: what they are compared with (`snapshots.drift`, `snapshots.gate`).
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray


def coarse_errors(index: Any, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared L2 distance of each of `vectors` (n, d) to the nearest centroid of the index, (n,) float32."""
    if not len(vectors):
        return np.empty(0, np.float32)
    distances, _ = faiss.downcast_index(index.quantizer).search(vectors, 1)
    nearest: NDArray[np.float32] = distances[:, 0]
    return nearest
