"""Rows of the table, read again after a build and encoded again: whether the index holds what the table has.

Here: which rows, and what is measured on them. Not here: what may pass (`gate`, `data_quality`), or when
(`building`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.digests import BUCKET_ROWS, changed_buckets, read_digests
from muse_assets.embeddings.reading import Bounds, join_pages, rows_by_idx
from muse_assets.ivfpq.coarse_error import coarse_errors
from muse_assets.ivfpq.quality import reencoded_wrongly
from muse_assets.snapshots.data_quality import TELLING_ROWS
from muse_assets.snapshots.sync import Synced, require_still_there

# Rows read again from the table and encoded again: of the whole table, and of those that this build put in.
_REREAD_ROWS, _REREAD_PUT_IN = 1_000, 500
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Reread:
    """Rows of the table, read again and encoded again.

    ids (n,) ascending; vectors (n, d); errors (n,): squared distance to the centroid; random (n,): which are
    drawn from the whole table, the others are of those put in; wrong (w,): ids that encode otherwise.
    """

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    errors: NDArray[np.float32]
    random: NDArray[np.bool_]
    wrong: NDArray[np.int64]

    def mean_error(self, among: NDArray[np.bool_]) -> float | None:
        """Of the rows that `among` (n,) marks; None where they are too few to tell."""
        return _mean(self.errors[among])

    def foreign_share(self, among: NDArray[np.bool_], mean: NDArray[np.float32]) -> float | None:
        """Those nearer to `mean` (d,) than to any centroid, of the marked rows; None where they are too few.

        By more than rounding: where all rows are equal, mean and centroid are the row.
        """
        to_mean = np.square(self.vectors - mean).sum(axis=1)
        return _mean(self.errors[among] > to_mean[among] + _ROUNDING * np.square(mean).sum())


def reread(engine: Engine, spec: IndexSpec, day: date, index: Any, synced: Synced) -> Reread:
    """Read rows again, some of them of those that were put in, others every day, and encode them.

    Raises PassingFailure when more of them are gone than may shrink away.
    """
    random = np.random.default_rng(day.toordinal())
    put_in = np.concatenate([synced.added_ids, synced.recoded_ids])
    # First the same ones whatever was put in: what is measured on them does not depend on history.
    drawn = random.choice(synced.expected_ids, min(_REREAD_ROWS, len(synced.expected_ids)), replace=False)
    wanted = np.union1d(drawn, random.choice(put_in, min(_REREAD_PUT_IN, len(put_in)), replace=False))
    ids, vectors = read_rows(engine, spec, wanted)
    # A gate that measures next to nothing passes everything, as after a TRUNCATE.
    require_still_there(spec, len(wanted), len(ids))
    wrong = reencoded_wrongly(index, ids, vectors)
    if len(wrong):
        # A writer may have changed a row after it was indexed: that is the next run's, not a fault.
        buckets = np.unique((wrong - spec.id_offset) // BUCKET_ROWS)
        bounds = [Bounds(int(b) * BUCKET_ROWS, int(b + 1) * BUCKET_ROWS - 1) for b in buckets]
        now = read(
            engine,
            f"digesting {spec.table} for {spec.name}",
            lambda connection: read_digests(connection, spec, bounds),
        )
        moved = changed_buckets(synced.state.digests.select(buckets), now)
        wrong = wrong[~np.isin((wrong - spec.id_offset) // BUCKET_ROWS, moved)]
    return Reread(ids, vectors, coarse_errors(index, vectors), np.isin(ids, drawn), wrong)


def read_rows(
    engine: Engine, spec: IndexSpec, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The usable rows among `ids` (n,) as the table has them now: their ids and vectors as indexed."""
    page = read(
        engine,
        f"sampling {spec.table} to check {spec.name}",
        lambda connection: join_pages(rows_by_idx(connection, spec, ids - spec.id_offset)),
    )
    decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
    good = decoded.reasons == Reason.OK
    return page.idx[good] + spec.id_offset, decoded.vectors[good]


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) >= TELLING_ROWS else None
