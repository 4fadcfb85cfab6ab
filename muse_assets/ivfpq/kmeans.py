"""k-means that finds the few centroids near each row once, and from then on compares it with those alone.

Here: moving centroids to where the rows are. Not here: how many centroids, on which rows, or what they
are for (`training`).

A step moves the centroids little, so a row's next centroid is nearly always one of those near it already:
with 1,000 centroids of 512-d finding `CANDIDATES` of them took 5.5 us a row, each step among those 1 us, and
a step of FAISS's k-means 7 to 32.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.encoding import use_one_thread
from muse_assets.ivfpq.nearest_centroids import CodedCentroids

CANDIDATES = 16
# Of those, how many the steps of one stage look at: the nearest when it begins. With all of them three sets
# took 7.8, 7.5 and 7.8 CPU-s, so 7.6, 6.9 and 6.6; the error of unseen rows +0.15, +0.03 and -0.08 %.
_LOOKED_AT = 8
# A step goes half as far again as the means: at the same cost the error of unseen rows was 0.1 % (text, no
# clusters) to 0.8 % (clusters of unequal size) lower than with plain means.
_STRIDE = 1.5
# As FAISS does: a centroid without rows goes to a thousandth beside one with many.
_SPLIT = np.float32(1 / 1024)

# Searched at once: what that holds of a row, 5 KB of 512-d, stays in the cache.
_BLOCK_ROWS = 512
# Tasks in which the centroids of a step are moved.
_MOVERS = 16

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Clustered:
    """centroids (k, d); nearest (n,), the centroid of each row; near (n, c), its candidates; errors: mean
    squared distance by step."""

    centroids: Floats
    nearest: Numbers
    near: Numbers
    errors: tuple[float, ...]


def start(centroids: Floats) -> Clustered:
    """`centroids` (k, d) float32 of which no row is known yet."""
    nothing = np.empty((0, min(CANDIDATES, len(centroids))), np.int64)
    return Clustered(centroids, nothing[:, 0], nothing, ())


def refine(rows: Floats, before: Clustered, *, steps: int, tolerance: float) -> Clustered:
    """Move the centroids of `before` to the means of their nearest `rows` (n, d), in at most `steps` steps.

    It ends when a step lowers the mean squared distance by less than `tolerance` of itself. `before` may
    have been found on the first of these rows: those keep their candidates. Memory: the rows and 400 bytes
    each.
    """
    centroids = before.centroids
    with ThreadPoolExecutor(os.cpu_count(), initializer=use_one_thread) as pool:
        near = _candidates(rows, before, pool)
        distances = _distances(rows, near, centroids)
        nearest, smallest = _nearest(near, distances)
        looked_at = min(_LOOKED_AT, near.shape[1])
        near = np.take_along_axis(near, np.argpartition(distances, looked_at - 1, axis=1), 1)
        nearer = np.ascontiguousarray(near[:, :looked_at])
        errors = [_mean(smallest)]
        for _ in range(steps):
            centroids = _moved(rows, nearest, nearer, centroids, pool)
            nearest, smallest = _nearest(nearer, _distances(rows, nearer, centroids))
            errors.append(_mean(smallest))
            if errors[-2] - errors[-1] <= tolerance * errors[-2]:
                break
        # The last step goes to the means themselves: half as far again is too far when all is still.
        centroids = _moved(rows, nearest, nearer, centroids, pool, stride=1)
        nearest, smallest = _nearest(nearer, _distances(rows, nearer, centroids))
        errors.append(_mean(smallest))
        near[:, :looked_at] = nearer  # with the centroids that split others
    return Clustered(centroids, nearest, near, tuple(errors[1:]))


def _candidates(rows: Floats, before: Clustered, pool: ThreadPoolExecutor) -> Numbers:
    """The centroids near each row (n, d), (n, c); the first rows keep those of `before`."""
    known, count = before.near.shape
    coded, near = CodedCentroids(before.centroids), np.empty((len(rows), count), np.int64)
    near[:known] = before.near

    def find(start: int) -> None:
        block = slice(start, start + _BLOCK_ROWS)
        near[block] = coded.near(rows[block], count)

    list(pool.map(find, range(known, len(rows), _BLOCK_ROWS)))
    return near


def _distances(rows: Floats, near: Numbers, centroids: Floats) -> Floats:
    """Squared distances of each row to its candidates, (n, c)."""
    distances = np.empty(near.shape, np.float32)
    faiss.fvec_L2sqr_by_idx(
        *(faiss.swig_ptr(array) for array in (distances, rows, centroids, near)), rows.shape[1], *near.shape
    )
    return distances


def _nearest(near: Numbers, distances: Floats) -> tuple[Numbers, Floats]:
    """The nearest of each row's candidates (n,) and its squared distance (n,)."""
    best = distances.argmin(axis=1)[:, None]
    return np.take_along_axis(near, best, 1)[:, 0], np.take_along_axis(distances, best, 1)[:, 0]


def _moved(
    rows: Floats,
    nearest: Numbers,
    near: Numbers,
    centroids: Floats,
    pool: ThreadPoolExecutor,
    stride: float = _STRIDE,
) -> Floats:
    """Each centroid past the mean of its rows; one without rows splits a large one, in `near` too."""
    sizes = np.bincount(nearest, minlength=len(centroids))
    order, ends = np.argsort(nearest, kind="stable"), np.cumsum(sizes)
    members = np.split(order, ends[:-1])
    moved = centroids.copy()

    def move(numbers: range) -> None:
        for number in numbers:
            if sizes[number]:
                # take() lets the other threads run, rows[members] does not.
                total = np.add.reduce(rows.take(members[number], axis=0), axis=0)
                mean = total / np.float32(sizes[number])
                moved[number] = mean + np.float32(stride - 1) * (mean - centroids[number])

    # A centroid a task cost more than its mean, 0.06 of 0.08 s.
    list(pool.map(move, (range(len(centroids))[start::_MOVERS] for start in range(_MOVERS))))
    empty = np.flatnonzero(sizes == 0)
    large = np.argsort(-sizes, kind="stable")[: len(centroids) - len(empty)]
    for number, split in zip(empty, np.resize(large, len(empty)), strict=True):
        moved[number] = moved[split] * (1 + _SPLIT)
        moved[split] *= 1 - _SPLIT
        if near.shape[1] < len(centroids):
            near[members[split], -1] = number
    return moved


def _mean(values: Floats) -> float:
    return float(values.mean(dtype=np.float64))
