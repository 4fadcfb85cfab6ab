"""What is odd about the vectors of a table: lengths, dead dimensions, vectors that come more than once.

Here: measuring it, on rows that the gate reads anyway and on the index's own codes. Not here: what is still
acceptable (`gate`), or rows that cannot be decoded at all (`embeddings.decoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muse_assets.ivfpq.duplicates import Duplicates

# Of the usual spread of the lengths, the median absolute deviation; of a normal distribution 1 in 10^8.
_FAR = 8.0
# And no nearer than this share of the usual length: unit vectors differ by rounding alone.
_TOLERANCE = 0.02
# Of the mean variance of the dimensions. Of 512 dimensions the smallest had 47 % of it in real text, 5 % in
# vectors of sines.
_HARDLY = 1e-3
# Fewer rows tell nothing of where rows like them lie.
TELLING_ROWS = 30

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class NormOutliers:
    """usual: the median length; ids: of the vectors that are far longer or shorter; sampled: of so many."""

    usual: float
    ids: Ids
    sampled: int


@dataclass(frozen=True)
class ConstantDimensions:
    """dimensions: those that hardly vary; sampled: over so many rows, None where they are too few."""

    dimensions: Ids
    sampled: int | None


@dataclass(frozen=True)
class DuplicateGroup:
    """Rows that share list and code. idx: some of them; read: how many of those the table still has, equal:
    how many of these hold the first one's vector to the bit.
    """

    rows: int
    idx: tuple[int, ...]
    read: int
    equal: int


def norm_outliers(ids: Ids, vectors: Floats) -> NormOutliers:
    """Of ids (n,) with vectors (n, d): those whose length is far from the median."""
    norms = np.linalg.norm(vectors, axis=1)
    if not len(norms):
        return NormOutliers(0.0, ids, 0)
    usual = float(np.median(norms))
    off = np.abs(norms - usual)
    return NormOutliers(usual, ids[off > max(_FAR * float(np.median(off)), _TOLERANCE * usual)], len(ids))


def constant_dimensions(vectors: Floats) -> ConstantDimensions:
    """Of vectors (n, d): the dimensions whose variance is next to nothing; all if the rows are one."""
    if len(vectors) < TELLING_ROWS:
        return ConstantDimensions(np.empty(0, np.int64), None)
    variances = vectors.var(axis=0, dtype=np.float64)
    return ConstantDimensions(np.flatnonzero(variances <= _HARDLY * variances.mean()), len(vectors))


def confirm_duplicates(
    found: Duplicates, id_offset: int, read: Callable[[Ids], tuple[Ids, Floats]]
) -> tuple[DuplicateGroup, ...]:
    """Compare the rows that the largest groups name; `read` gives the ids and vectors of those it finds."""
    wanted = np.array(sorted(id_ for group in found.groups for id_ in group.ids), np.int64)
    ids, vectors = read(wanted) if len(wanted) else (wanted, np.empty((0, 0), np.float32))
    by_id: Mapping[int, Floats] = dict(zip(ids.tolist(), vectors, strict=True))
    groups = []
    for group in found.groups:
        held = [by_id[id_] for id_ in group.ids if id_ in by_id]
        equal = sum(np.array_equal(vector, held[0]) for vector in held)
        idx = tuple(id_ - id_offset for id_ in group.ids)
        groups.append(DuplicateGroup(group.rows, idx, len(held), equal))
    return tuple(groups)
