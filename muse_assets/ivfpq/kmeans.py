"""k-means that finds the few centroids near each row once, and from then on compares it with those alone.

Here: moving centroids to where the rows are. Not here: how many centroids, on which rows, or what they
are for (`training`).

A step moves the centroids little, so a row's next centroid is nearly always one of those near it already:
with 1,000 centroids of 512-d finding them took 7 us a row, each step among them 0.7 us, and a step of FAISS's
k-means 7 to 32.
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

# Twice as many are told by their codes as are kept, the nearest of them.
_CANDIDATES_PER_KEPT = 2
# Of so few all are kept: a small table takes no time, and its centroids go far from where they began.
_FEW = 64
# A step goes half as far again as the means: at the same cost the error of unseen rows was 0.1 % (text, no
# clusters) to 0.8 % (clusters of unequal size) lower than with plain means. Twice as far took another 0.1 %
# of text's and won no recall; 10,000 rows it fitted so closely that others lay 1.17 times as far from their
# centroids, 1.13 with this.
_STRIDE = 1.5
# As FAISS does: a centroid without rows goes to a thousandth beside one with many.
_SPLIT = np.float32(1 / 1024)

_BLOCK_ROWS = 2048
# Tasks in which the rows of the centroids are summed: one a centroid cost more than its sum, 0.06 of 0.08 s.
_SUMMERS = 16

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Clustered:
    """centroids (k, d); nearest (n,), the centroid of each row; near (n, c), those it is compared with;
    errors: mean squared distance by step."""

    centroids: Floats
    nearest: Numbers
    near: Numbers
    errors: tuple[float, ...]


def start(centroids: Floats, kept: int) -> Clustered:
    """`centroids` (k, d) float32 of which no row is known yet; a row is compared with the `kept` near it."""
    kept = len(centroids) if len(centroids) <= _FEW else kept
    nothing = np.empty((0, kept), np.int64)
    return Clustered(centroids, nothing[:, 0], nothing, ())


def refine(rows: Floats, before: Clustered, *, steps: int, tolerance: float) -> Clustered:
    """Move the centroids of `before` to the means of their nearest `rows` (n, d), in at most `steps` steps.

    A step goes past the means; the last, after one that lowered the mean squared distance by less than
    `tolerance` of itself, goes to them. `before` may have been found on the first of these rows: those stay
    compared with what they were. Memory: the rows and 200 bytes each, of few centroids 800.
    """
    centroids, count = before.centroids, len(before.centroids)
    with ThreadPoolExecutor(os.cpu_count(), initializer=use_one_thread) as pool:
        near = _near(rows, before, pool)
        nearest, smallest = _nearest(near, _distances(rows, near, centroids))
        sums, sizes = _sums(rows, np.arange(len(rows)), nearest, count, pool)
        errors = [_mean(smallest)]
        while True:
            settled = len(errors) > steps or (
                len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * errors[-2]
            )
            centroids = _moved(centroids, sums, sizes, 1 if settled else _STRIDE)
            _split(centroids, sizes, nearest, near)
            was = nearest
            nearest, smallest = _nearest(near, _distances(rows, near, centroids))
            errors.append(_mean(smallest))
            if settled:
                return Clustered(centroids, nearest, near, tuple(errors[1:]))
            # After two steps one moves 1 to 8 % of the rows: all anew took a training 0.7 s instead of 0.3.
            changed = np.flatnonzero(nearest != was)
            came, come = _sums(rows, changed, nearest[changed], count, pool)
            went, gone = _sums(rows, changed, was[changed], count, pool)
            sums, sizes = sums + came - went, sizes + come - gone


def _near(rows: Floats, before: Clustered, pool: ThreadPoolExecutor) -> Numbers:
    """The centroids near each row (n, d), (n, c); the first rows keep those of `before`."""
    known, kept = before.near.shape
    coded, near = CodedCentroids(before.centroids), np.empty((len(rows), kept), np.int64)
    near[:known] = before.near

    def find(start: int) -> None:
        block = slice(start, start + _BLOCK_ROWS)
        found = coded.near(rows[block], _CANDIDATES_PER_KEPT * kept)
        order = np.argsort(_distances(rows[block], found, before.centroids), axis=1)
        near[block] = np.take_along_axis(found, order[:, :kept], 1)

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


def _sums(
    rows: Floats, which: Numbers, centroid: Numbers, count: int, pool: ThreadPoolExecutor
) -> tuple[Floats, Numbers]:
    """The sums (k, d) of the rows at `which` (w,) by the `centroid` (w,) of each, and their number (k,)."""
    sizes = np.bincount(centroid, minlength=count)
    members, ends = which[np.argsort(centroid, kind="stable")], np.cumsum(sizes)
    sums = np.zeros((count, rows.shape[1]), np.float32)

    def add(numbers: range) -> None:
        for number in numbers:
            if sizes[number]:
                # take() lets the other threads run, rows[mine] does not.
                mine = members[ends[number] - sizes[number] : ends[number]]
                np.add.reduce(rows.take(mine, axis=0), axis=0, out=sums[number])

    # Two threads took 66 instead of 94 ms for 192 rows a centroid, and for two rows 6 instead of 2: the GIL.
    run = pool.map if len(which) > 100 * count else map
    list(run(add, (range(count)[first::_SUMMERS] for first in range(_SUMMERS))))
    return sums, sizes


def _moved(centroids: Floats, sums: Floats, sizes: Numbers, stride: float) -> Floats:
    """Each centroid `stride` times as far as the mean of its rows; one without rows stays."""
    means = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1).astype(np.float32)[:, None], centroids)
    moved: Floats = means + np.float32(stride - 1) * (means - centroids)
    return moved


def _split(centroids: Floats, sizes: Numbers, nearest: Numbers, near: Numbers) -> None:
    """Let each centroid without rows split a large one, in place; the rows of that are compared with both."""
    empty = np.flatnonzero(sizes == 0)
    large = np.argsort(-sizes, kind="stable")[: len(centroids) - len(empty)]
    for number, split in zip(empty, np.resize(large, len(empty)), strict=True):
        centroids[number] = centroids[split] * (1 + _SPLIT)
        centroids[split] *= 1 - _SPLIT
        if near.shape[1] < len(centroids):
            near[nearest == split, -1] = number


def _mean(values: Floats) -> float:
    return float(values.mean(dtype=np.float64))
