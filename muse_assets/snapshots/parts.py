"""A part of a table: the rows of some buckets, pulled, proved against their digests, decoded and encoded.

Here: the work that needs nothing but the database and the trained cluster, so that any thread of any
machine can do it, again if need be. Not here: who does it (`encoding_workers`, `dask_workers`), or what
becomes of the codes (`sync`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.digests import (
    BUCKET_ROWS,
    Digests,
    changed_buckets,
    digest_rows,
    empty_digests,
    join_digests,
    read_digests,
)
from muse_assets.embeddings.reading import Bounds, Page, freeze, page_rows, read_ranges
from muse_assets.failures import PassingFailure
from muse_assets.ivfpq.encoding import Encode
from muse_assets.ivfpq.exact_neighbors import NearestRows, Neighbors, Queries, no_neighbors

# More than single buckets that make a page: at 100, pages that were cut short left the encoder a block of
# padding for every three, and a day of 1,000 scattered changes took 2.5 s instead of 2.35.
_RANGES_A_PAGE = 256
# A page lost, or a bucket that moved: that page again, not the whole build.
_PAGE_TRIES = 5
_ASKED_AGAIN = 1000


@dataclass(frozen=True)
class Part:
    """Buckets to encode. digests: what the database said of them. newest_idx: rows above are not covered.

    horizon (q,) float32: how near a row has to be to a query to be among its neighbors.
    """

    digests: Digests
    newest_idx: int
    horizon: NDArray[np.float32]


@dataclass(frozen=True)
class EncodedPart:
    """What became of a part.

    ids (n,) int64: FAISS ids of the valid rows; codes (n, w) uint8: their list numbers and product codes.
    rejected_idx (r,) int64, rejected_reason (r,) uint8. moved (b,) int64: buckets that were not as digested;
    digests: what they were when they were pulled. neighbors: those of the rows within the horizon.
    """

    ids: NDArray[np.int64]
    codes: NDArray[np.uint8]
    rejected_idx: NDArray[np.int64]
    rejected_reason: NDArray[np.uint8]
    moved: NDArray[np.int64]
    digests: Digests
    neighbors: Neighbors


def plan(digests: Digests, rows: int, *, ranges: int | None = None) -> Iterator[Digests]:
    """Cut digests, ascending by bucket, into parts of about `rows` rows in at most `ranges` runs."""
    start, found, runs, before = 0, 0, 0, -2
    for at, (bucket, count) in enumerate(zip(digests.bucket.tolist(), digests.rows.tolist(), strict=True)):
        new_run = at == start or bucket != before + 1
        if at > start and (found + count > rows or (new_run and runs == ranges)):
            yield digests.part(start, at)
            start, found, runs, new_run = at, 0, 0, True
        found += count
        runs += new_run
        before = bucket
    if len(digests.bucket):
        yield digests.part(start, len(digests.bucket))


def encode_part(engine: Engine, spec: IndexSpec, encode: Encode, queries: Queries, part: Part) -> EncodedPart:
    """Pull the part's rows page by page and encode the valid ones; memory holds a page, and the codes.

    A bucket whose pulled bytes do not digest to what the database said moved meanwhile, or arrived
    short: it is digested again as of the moment of the pull. Raises PassingFailure where those differ too.
    """
    nearest = NearestRows(queries, replace(no_neighbors(queries), horizon=part.horizon))
    ids, rejected_idx, moved = ([np.empty(0, np.int64)] for _ in range(3))
    reasons, codes, fresh = [np.empty(0, np.uint8)], [encode(queries.vectors[:0])], [empty_digests()]
    for digests in plan(part.digests, page_rows(spec), ranges=_RANGES_A_PAGE):
        page, page_moved, page_fresh = read(
            engine,
            f"reading {spec.table} for {spec.name}",
            partial(_pull, spec, digests, part.newest_idx),
            tries=_PAGE_TRIES,
        )
        decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
        good = decoded.reasons == Reason.OK
        page_ids = page.idx[good] + spec.id_offset
        vectors = decoded.vectors if good.all() else decoded.vectors[good]
        nearest.take(page_ids, vectors)
        codes.append(encode(vectors))
        ids.append(page_ids)
        rejected_idx.append(page.idx[~good])
        reasons.append(decoded.reasons[~good])
        moved.append(page_moved)
        fresh.append(page_fresh)
    return EncodedPart(
        np.concatenate(ids),
        np.concatenate(codes),
        np.concatenate(rejected_idx),
        np.concatenate(reasons),
        np.concatenate(moved),
        join_digests(fresh),
        nearest.hand_over(),
    )


def require_same_database(
    engine: Engine, spec: IndexSpec, digests: Digests, moved: NDArray[np.int64], newest_idx: int
) -> None:
    """Raise PassingFailure where buckets that another process found changed (m,) are as `digests` has them.

    A thousand of them are asked for again: that process read another database, or a replica that is behind.
    """
    random = np.random.default_rng(len(moved))
    asked = np.sort(random.choice(moved, min(_ASKED_AGAIN, len(moved)), replace=False))
    now = read(
        engine,
        f"digesting {spec.table} for {spec.name}",
        lambda connection: read_digests(connection, spec, _ranges(asked, newest_idx)),
    )
    same = np.setdiff1d(asked, changed_buckets(digests.select(asked), now))
    if len(same):
        raise PassingFailure(
            f"{spec.name}: {len(same):,} of {len(asked):,} buckets of {spec.table} that the workers found "
            f"changed are not, such as at idx {int(same[0]) * BUCKET_ROWS}: they read another database, or a "
            "replica that is behind.",
            next_step="correct the MUSE_EMBEDDING_DB_URL of the workers, or wait for the replica; then "
            "launch again.",
        )


def _pull(
    spec: IndexSpec, digests: Digests, newest_idx: int, connection: Connection
) -> tuple[Page, NDArray[np.int64], Digests]:
    """The rows, which buckets were not as digested, and what those are now."""
    # One view for both: without it, 110 updates/s to a page's rows outran five tries in 3 of 7 runs.
    freeze(connection)
    page = read_ranges(connection, spec, _ranges(digests.bucket, newest_idx))
    found = digest_rows(page.idx, page.payloads)
    moved = changed_buckets(digests, found)
    if not len(moved):
        return page, moved, empty_digests()
    fresh = read_digests(connection, spec, _ranges(moved, newest_idx))
    if len(changed_buckets(digests.replaced(moved, fresh), found)):
        raise PassingFailure(
            f"{spec.name}: rows of {spec.table} near idx {int(moved[0]) * BUCKET_ROWS} arrived otherwise "
            "than the database digests them.",
            next_step="launch the run again; if it recurs, check that the table is InnoDB and the "
            "connection sound.",
        )
    return page, moved, fresh


def _ranges(buckets: NDArray[np.int64], newest_idx: int) -> list[Bounds]:
    if not len(buckets):
        return []
    breaks = np.flatnonzero(np.diff(buckets) != 1) + 1
    return [
        Bounds(int(run[0]) * BUCKET_ROWS, min(int(run[-1] + 1) * BUCKET_ROWS - 1, newest_idx))
        for run in np.split(buckets, breaks)
    ]
