"""Training: how many inverted lists, where their centroids lie, and the product quantizer.

Here: a random sample in, a trained empty index out, and every figure that trades time for quality. Not
here: drawing the sample (`embeddings.sampling`), the steps of k-means (`kmeans`).

Both quantizers learn on growing prefixes of the sample, each stage from the last one's centroids, and a
stage ends when the error stops falling: fixed counts lost 0.7 point of recall and scanned 14 to 26 % more
codes on strongly clustered text vectors. Polysemous training, the factory's default, is off: it took 108
of 159 CPU-seconds at 512-d and only `polysemous_ht` uses it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.encoding import use_one_thread
from muse_assets.ivfpq.kmeans import Clustered, refine, start

# FAISS warns below 39 points a centroid; a list should hold at least that many rows anyway.
MIN_POINTS_PER_CENTROID = 39
# Below about 16k lists a flat coarse quantizer is faster than an HNSW one, and exact.
HNSW_FROM_NLIST = 16_384
_MAX_TRAINING_ROWS = 196_608
_PQ_TRAINING_ROWS = 65_536


@dataclass(frozen=True)
class CoarseStage:
    """points: rows a centroid; steps: at most; tolerance: relative fall of the error to go on; kept: the
    nearest centroids that a row is compared with."""

    points: int
    steps: int
    tolerance: float
    kept: int


@dataclass(frozen=True)
class CodebookStage:
    """rows of the sample; steps: at most; tolerance: relative fall of the error to go on."""

    rows: int
    steps: int
    tolerance: float


# Coarse recall of 20,000 queries of two draws of text at the codes that 4 of FAISS's lists hold, 1,000 lists
# of 512-d, against FAISS's training on 256 points a centroid: 0.27 and 0.17 point lower with these stages, in
# 2.05 s. What decides is how surely the last rows find their nearest centroid: with 8 kept in every stage and
# 4 last steps to 1e-3 0.56 and 0.25, in 1.85; with 8 kept in the last, 8 steps, 0.37 and 0.20, in 1.96; with
# 16 there, 8 steps, 0.25 and 0.16, in 2.35, and with 8 before it 0.44 and 0.15, with 4 0.49 and 0.20. Twenty
# plain steps on all rows from random ones, candidates found anew at each, were level with it in 16 s; found
# once, 1.4 to 2.0 lower.
# Squared distance of unseen rows to their centroids, of text, a set without clusters and one with clusters of
# unequal size, where 8 kept and 4 last steps were +0.15, +0.17 and -0.98 % of FAISS's: 0.01 to 0.13 % less.
# From 64 points on, without the first stage, as much; but 2,000 rows then have one stage, from random rows: a
# quarter of them lay by no centroid.
COARSE_STAGES = (
    CoarseStage(32, 4, 5e-3, 6),
    CoarseStage(64, 2, 5e-3, 6),
    CoarseStage(128, 2, 5e-3, 6),
    CoarseStage(192, 6, 5e-4, 12),
)
# Error of unseen rows against 16,384 x 8 and 65,536 x 5 of FAISS's own steps, which took 3.3 to 4.0 CPU-s for
# 64 codebooks of 512-d, on the three sets: these stages -0.07 to +0.03 % in 2.2; a last stage of one step
# +0.17; a first one of 4,096 rows +0.18; a stride of 1.6 instead of 1.9 +0.2.
CODEBOOK_STAGES = (
    CodebookStage(8_192, 6, 1e-3),
    CodebookStage(24_576, 3, 1e-3),
    CodebookStage(_PQ_TRAINING_ROWS, 2, 0),
)
# Below 2 no step raises the error.
_CODEBOOK_STRIDE = np.float32(1.9)


@dataclass(frozen=True)
class Trained:
    """A trained, empty IndexIVFPQ.

    objective: mean squared distance of the sample to its centroids, by step; imbalance: of the lists that
    the sample would fill, as FAISS's factor.
    """

    index: Any
    rows: int
    imbalance: float
    objective: tuple[float, ...]


def choose_nlist(rows: int, fixed: int | None = None) -> int:
    """Inverted lists for a table of `rows`: sqrt(2 * rows), so 1000 at 500k; `fixed` wins."""
    if fixed is not None:
        return fixed
    return max(1, min(round(math.sqrt(2 * rows)), rows // MIN_POINTS_PER_CENTROID))


def training_rows(nlist: int) -> int:
    """Rows to sample for training that many lists."""
    return max(_PQ_TRAINING_ROWS, min(COARSE_STAGES[-1].points * nlist, max(_MAX_TRAINING_ROWS, 64 * nlist)))


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

    Deterministic for the same sample and seed below HNSW_FROM_NLIST lists: a graph is built by several
    threads. Raises PermanentFailure when there are fewer rows than lists, or none.
    """
    rows, dimension = sample.shape
    if rows < max(nlist, 1):
        raise PermanentFailure(
            f"{rows} usable training rows are too few for nlist {nlist}.",
            next_step="let nlist follow the table (leave it unset in the catalog), or wait for more rows.",
        )
    sample = np.ascontiguousarray(sample)
    coarse, objective = _coarse_centroids(sample, nlist, seed, on_stage)
    quantizer = _coarse_quantizer(dimension, nlist)
    quantizer.add(coarse.centroids)
    index = faiss.IndexIVFPQ(quantizer, dimension, nlist, m, nbits)
    index.own_fields = True
    quantizer.this.disown()
    pq_rows = min(rows, _PQ_TRAINING_ROWS)
    on_stage(f"product quantizer: {m} x {1 << nbits} centroids on {pq_rows:,} rows")
    codebooks = _codebooks(sample[-pq_rows:], coarse, m, 1 << nbits, seed)
    faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    sizes = np.bincount(coarse.nearest, minlength=nlist).astype(np.float64)
    return Trained(index, rows, float(nlist * (sizes**2).sum() / rows**2), objective)


def _coarse_quantizer(dimension: int, nlist: int) -> Any:
    if nlist < HNSW_FROM_NLIST:
        return faiss.IndexFlatL2(dimension)
    quantizer = faiss.IndexHNSWFlat(dimension, 32)
    quantizer.hnsw.efSearch = 32
    return quantizer


def _coarse_centroids(
    sample: NDArray[np.float32], nlist: int, seed: int, on_stage: Callable[[str], None]
) -> tuple[Clustered, tuple[float, ...]]:
    """k-means from `nlist` random rows of the sample, and the error after each step."""
    first_rows = min(COARSE_STAGES[0].points * nlist, len(sample))
    first = sample[np.random.default_rng(seed).permutation(first_rows)[:nlist]]
    found = start(first, COARSE_STAGES[0].kept)
    objective: list[float] = []
    for stage in COARSE_STAGES:
        # The last stage has the whole sample; of a small one that is an earlier stage.
        last = stage is COARSE_STAGES[-1] or stage.points * nlist >= len(sample)
        rows = len(sample) if last else stage.points * nlist
        limits = COARSE_STAGES[-1] if last else stage
        # The candidates of the first stages are out of date by the last: found anew there, 0.1 % less error.
        before = start(found.centroids, limits.kept) if last else found
        found = refine(sample[:rows], before, steps=limits.steps, tolerance=limits.tolerance)
        objective.extend(found.errors)
        on_stage(
            f"coarse k-means: {nlist} lists on {rows:,} rows, {len(found.errors)} steps, "
            f"error {objective[-1]:.4f}"
        )
        if last:
            break
    return found, tuple(objective)


def _codebooks(
    sample: NDArray[np.float32], coarse: Clustered, m: int, size: int, seed: int
) -> NDArray[np.float32]:
    """Codebooks (m, size, d / m) of the residuals of the rows given, the last that `coarse` was found on.

    The last, since the first stage fitted its centroids to the first ones: their residuals are too short.

    Sub-quantizers side by side, each on one thread: on two threads each, 16,384 rows took 0.7 CPU-s an
    iteration on a busy machine, and 0.12 on one.
    """
    width = sample.shape[1] // m
    nearest = coarse.nearest[-len(sample) :]

    def codebook(number: int) -> NDArray[np.float32]:
        part = slice(number * width, (number + 1) * width)
        residuals = sample[:, part] - coarse.centroids[:, part].take(nearest, axis=0)
        # A codebook needs as many rows as it has words; a smaller table repeats its own.
        residuals = np.resize(residuals, (max(len(residuals), size), width))
        words: NDArray[np.float32] | None = None
        for stage in CODEBOOK_STAGES:
            words = _refined(residuals[: stage.rows], words, size, stage, seed + number)
            if stage.rows >= len(residuals):
                break
        assert words is not None  # noqa: S101  (CODEBOOK_STAGES is not empty)
        return words

    with (
        _blas_for_small_dimensions(),
        ThreadPoolExecutor(os.cpu_count(), "codebook", initializer=use_one_thread) as pool,
    ):
        return np.stack(list(pool.map(codebook, range(m))))


def _refined(
    rows: NDArray[np.float32],
    words: NDArray[np.float32] | None,
    size: int,
    stage: CodebookStage,
    seed: int,
) -> NDArray[np.float32]:
    """`size` words (size, w) for rows (n, w), from `words` or from random rows: FAISS's steps, but longer.

    The last step is not, so that each word is the mean of its rows.
    """
    errors = [np.inf]
    for step in range(1, stage.steps + 1):
        kmeans = faiss.Kmeans(
            rows.shape[1],
            size,
            niter=1,
            max_points_per_centroid=len(rows),
            min_points_per_centroid=1,
            seed=seed,
        )
        kmeans.train(rows, init_centroids=words)
        errors.append(float(kmeans.obj[-1]))
        settled = errors[-2] - errors[-1] <= stage.tolerance * errors[-1]
        if words is None or settled or step == stage.steps:
            words = kmeans.centroids
        else:
            words = words + _CODEBOOK_STRIDE * (kmeans.centroids - words)
        if settled:
            break
    assert words is not None  # noqa: S101  (a stage has a step)
    return words


@contextlib.contextmanager
def _blas_for_small_dimensions() -> Iterator[None]:
    """Let k-means of small dimensions use BLAS on few rows: 9,984 took 4.06 CPU-s without, 0.56 with."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20_000
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
