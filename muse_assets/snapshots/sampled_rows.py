"""The rows a gate measures recall on: which ones they are, and their vectors as they were indexed.

Here: the choice, gathering their vectors while a build reads, keeping them for the next day. Not here:
measuring (`ivfpq.probing`), or the rows that a gate reads again for itself (`building`).

The choice is of the smallest hashes of ids: it depends on the set of ids alone, so an incremental and a full
build measure the same rows and store the same nprobe; and a row that comes or goes exchanges at most one.

Kept vectors carry the digests of their buckets, and serve only while the table's are the same: then the row
has the same bytes. So the file needs no facts of its own; a lost, damaged or outdated one costs reading
20,000 rows again (0.6 CPU-s warm, and as many seeks cold; the file 0.2 CPU-s).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.digests import BUCKET_ROWS, Digests, changed_buckets

# 20,000 bound the cost, and hold ten true neighbors of most queries near enough that recall reads at most
# a few points low.
SAMPLED_ROWS = 20_000
# Gathered beside: those that step in where up to a tenth of the chosen rows are no longer there.
_SLACK = 1.1


@dataclass(frozen=True)
class RowSample:
    """ids (n,) int64 in random order; vectors (n, d) float32 as they are indexed."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def only(self, wanted: NDArray[np.bool_]) -> RowSample:
        """Those rows."""
        return self if wanted.all() else RowSample(self.ids[wanted], self.vectors[wanted])

    def joined(self, further: RowSample) -> RowSample:
        """These rows, and those of `further` that are not among them."""
        new = further.only(~np.isin(further.ids, self.ids))
        if not len(new.ids):
            return self
        return RowSample(np.concatenate([self.ids, new.ids]), np.concatenate([self.vectors, new.vectors]))

    def first(self, count: int) -> RowSample:
        """The first `count` rows, not copied."""
        return RowSample(self.ids[:count], self.vectors[:count])

    def by_hash(self) -> RowSample:
        """The same rows in random order: those that `choose_rows` prefers come first."""
        order = np.argsort(_hashes(self.ids))
        return RowSample(self.ids[order], self.vectors[order])


class Gathered:
    """Vectors of rows that may be chosen, picked from the batches of a build as they pass.

    Memory: 1.1 x SAMPLED_ROWS vectors, whatever the table's size.
    """

    def __init__(self, table_rows: int, dimension: int) -> None:
        share = min(1.0, _SLACK * SAMPLED_ROWS / max(table_rows, 1))
        self._limit = np.uint64(share * 0xFFFFFFFFFFFFF000)
        self._ids = [np.empty(0, np.int64)]
        self._vectors = [np.empty((0, dimension), np.float32)]

    def take(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Keep what may be chosen of ids (n,) and vectors (n, d)."""
        chosen = _hashes(ids) <= self._limit
        if chosen.any():
            self._ids.append(ids[chosen])
            self._vectors.append(vectors[chosen])

    def hand_over(self) -> RowSample:
        """All that was gathered, in the order in which it came; it is held no longer."""
        rows = RowSample(np.concatenate(self._ids), np.concatenate(self._vectors))
        self._ids, self._vectors = [rows.ids[:0].copy()], [rows.vectors[:0].copy()]
        return rows


def choose_rows(ids: NDArray[np.int64], count: int = SAMPLED_ROWS) -> NDArray[np.int64]:
    """The `count` of ids (n,) int64 with the smallest hashes, by hash: in random order."""
    hashes = _hashes(ids)
    if count < len(ids):
        few = np.argpartition(hashes, count)[:count]
        ids, hashes = ids[few], hashes[few]
    return ids[np.argsort(hashes)]


def kept_file(work: Path, index: str) -> Path:
    """Where the vectors of the last build's sampled rows lie."""
    return work / ".samples" / f"{index}.npz"


def keep_rows(work: Path, spec: IndexSpec, source: str, digests: Digests, rows: RowSample) -> None:
    """Keep `rows`, which are as `digests` of their table say; call it under the index's lock.

    source: what the vectors come from and how they are read. Not fsynced, and what fails is left undone.
    """
    path = kept_file(work, spec.name)
    temp = path.with_name(f".{path.name}.new.part")  # so `durable_files.sweep` knows it
    columns = digests.select(_buckets(spec, rows.ids)).columns()
    with contextlib.suppress(OSError):
        durable_files.make_directory(path.parent)
        try:
            with temp.open("wb") as file:
                np.savez(file, source=source, digests=columns, ids=rows.ids, vectors=rows.vectors)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)


def kept_rows(work: Path, spec: IndexSpec, source: str, digests: Digests) -> RowSample:
    """Those of the kept rows that are still as `digests`, the table's, say."""
    nothing = RowSample(np.empty(0, np.int64), np.empty((0, spec.dimension), np.float32))
    try:
        with kept_file(work, spec.name).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["source"]) != source:
                return nothing
            columns, rows = arrays["digests"], RowSample(arrays["ids"], arrays["vectors"])
    except Exception:  # zip and npy parsers meet damage with a dozen types; reading again answers them all
        return nothing
    if rows.vectors.shape != (len(rows.ids), spec.dimension):
        return nothing
    then = Digests(*columns.T)
    moved = changed_buckets(then, digests.select(then.bucket))
    return rows.only(~np.isin(_buckets(spec, rows.ids), moved))


def _buckets(spec: IndexSpec, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return (ids - spec.id_offset) // BUCKET_ROWS


def _hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer, a bijection: no two ids tie."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
