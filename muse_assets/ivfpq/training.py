"""Training: how many inverted lists, where their centroids lie, and the product quantizer.

Here: a random sample in, a trained empty index out. Not here: drawing the sample (`embeddings.sampling`).

k-means runs on growing prefixes of the sample, each stage from the last one's centroids, and each stage
ends when the objective stops falling: fixed counts lost 0.7 point of recall and scanned 14 to 26 % more
codes on strongly clustered text vectors. Polysemous training, the factory's default, is off: it took 108
of 159 CPU-seconds at 512-d and only `polysemous_ht` uses it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.failures import PermanentFailure

# More points cost little recall below 128 and mostly balance: 5 % more codes scanned at 64.
POINTS_PER_CENTROID = 128
# FAISS warns below 39 points a centroid; a list should hold at least that many rows anyway.
MIN_POINTS_PER_CENTROID = 39
# Below about 16k lists a flat coarse quantizer is faster than an HNSW one, and exact.
HNSW_FROM_NLIST = 16_384
_MAX_TRAINING_ROWS = 131_072
_PQ_TRAINING_ROWS = 65_536


@dataclass(frozen=True)
class KMeansStage:
    """points: rows a centroid; iterations: at most; tolerance: relative fall of the objective to go on."""

    points: int
    iterations: int
    tolerance: float


STAGES = (KMeansStage(32, 10, 5e-3), KMeansStage(POINTS_PER_CENTROID, 10, 2e-3))
PQ_ITERATIONS = 16
PQ_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Trained:
    """A trained, empty IndexIVFPQ; coarse_error: mean squared distance to the nearest centroid."""

    index: Any
    rows: int
    coarse_error: float
    objective: tuple[float, ...]


def choose_nlist(rows: int, fixed: int | None = None) -> int:
    """Inverted lists for a table of `rows`: sqrt(2 * rows), so 1000 at 500k; `fixed` wins."""
    if fixed is not None:
        return fixed
    return max(1, min(round(math.sqrt(2 * rows)), rows // MIN_POINTS_PER_CENTROID))


def training_rows(nlist: int) -> int:
    """Rows to sample for training that many lists."""
    return max(_PQ_TRAINING_ROWS, min(POINTS_PER_CENTROID * nlist, max(_MAX_TRAINING_ROWS, 64 * nlist)))


def train(
    sample: NDArray[np.float32],
    *,
    nlist: int,
    m: int,
    nbits: int = 8,
    seed: int = 1,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train an IVF-PQ index, metric L2, on a random sample (n, d) float32 in random order.

    Deterministic for the same sample and seed. Raises PermanentFailure when there are fewer rows than
    lists, or none.
    """
    rows, dimension = sample.shape
    if rows < max(nlist, 1):
        raise PermanentFailure(
            f"{rows} usable training rows are too few for nlist {nlist}.",
            next_step="let nlist follow the table (leave it unset in the catalog), or wait for more rows.",
        )
    with _blas_for_small_dimensions():
        centroids, objective = _coarse_centroids(sample, nlist, seed, on_stage)
        quantizer = _coarse_quantizer(dimension, nlist)
        quantizer.add(centroids)
        index = faiss.IndexIVFPQ(quantizer, dimension, nlist, m, nbits)
        index.own_fields = True
        quantizer.this.disown()
        clustering = index.pq.cp
        clustering.niter = PQ_ITERATIONS
        clustering.seed = seed
        clustering.early_stop_threshold = PQ_TOLERANCE
        # Small tables train on what they have; FAISS would print a warning for each of m quantizers.
        clustering.min_points_per_centroid = 1
        # A codebook of 2^nbits needs as many rows; a smaller table repeats its own.
        pq_sample = sample[:_PQ_TRAINING_ROWS]
        on_stage(f"product quantizer: {m} x {1 << nbits} centroids on {len(pq_sample):,} rows")
        index.train(np.resize(pq_sample, (max(len(pq_sample), 1 << nbits), dimension)))
    coarse_error = float(quantizer.search(sample[-min(rows, 10_000) :], 1)[0].mean())
    return Trained(index, rows, coarse_error, objective)


def _coarse_quantizer(dimension: int, nlist: int) -> Any:
    if nlist < HNSW_FROM_NLIST:
        return faiss.IndexFlatL2(dimension)
    quantizer = faiss.IndexHNSWFlat(dimension, 32)
    quantizer.hnsw.efSearch = 32
    return quantizer


def _coarse_centroids(
    sample: NDArray[np.float32], nlist: int, seed: int, on_stage: Callable[[str], None]
) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    centroids: NDArray[np.float32] | None = None
    objective: list[float] = []
    for stage in STAGES:
        rows = min(stage.points * nlist, len(sample))
        kmeans = faiss.Kmeans(
            sample.shape[1],
            nlist,
            niter=stage.iterations,
            early_stop_threshold=stage.tolerance,
            max_points_per_centroid=stage.points,
            min_points_per_centroid=1,
            seed=seed,
        )
        kmeans.train(sample[:rows], init_centroids=centroids)
        centroids = kmeans.centroids
        # The objective is a sum over this stage's rows.
        objective.extend(float(value) / rows for value in kmeans.obj)
        on_stage(
            f"coarse k-means: {nlist} lists on {rows:,} rows, {len(kmeans.obj)} iterations, "
            f"error {objective[-1]:.4f}"
        )
        if rows == len(sample):
            break
    assert centroids is not None  # noqa: S101  (STAGES is not empty)
    return centroids, tuple(objective)


@contextlib.contextmanager
def _blas_for_small_dimensions() -> Iterator[None]:
    """Let PQ training use BLAS below 128,000 floats too: 9,984 rows took 4.06 CPU-s without, 0.56 with."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20_000
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
