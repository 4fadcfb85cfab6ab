"""What a table holds, in digests: the whole of it, bucket by bucket, and whether it went back in time.

Here: asking the database, and what a parent's digests still vouch for. Not here: which buckets are due
(`rotation`), the digest itself (`embeddings.digests`), or what is done about buckets that differ (`sync`).
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, text

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.embeddings.digests import (
    BUCKET_ROWS,
    Digests,
    empty_digests,
    join_digests,
    read_digests,
    steps,
)
from muse_assets.embeddings.reading import Bounds, next_auto_increment, quoted, table_extent
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.snapshots.rotation import Verified, covers, due_stretches, never

# A digest is CPU of the server, one core a connection: a million warm rows of 2 KB took 1.2 s on one.
_DIGESTING_CONNECTIONS = 2
# Of those not due: a tenth of the table that vanished is a tenth of these, give or take one in a hundred.
_COUNTED_BUCKETS = 1000


@dataclass(frozen=True)
class Since:
    """What a build of `day` goes on from: the parent's digests, and when each stretch was digested."""

    digests: Digests
    verified: Verified
    day: date


@dataclass(frozen=True)
class TableState:
    """A table as it stood: digests of every bucket the partition covers, each of one moment; newest idx.

    asked (k, 2): first and last buckets of the stretches that were digested now. since: what the others
    are taken from; None where all were asked.
    """

    digests: Digests
    newest_idx: int
    columns: dict[str, str]
    asked: NDArray[np.int64]
    covered: tuple[int, int]
    since: Since | None = None

    def verified(self, day: date) -> Verified:
        """When each bucket was last digested, now being `day`."""
        before = self.since.verified if self.since else never()
        return before.digested(*self.covered, self.asked, day)


def read_table_state(
    engine: Engine, spec: IndexSpec, before: datetime | None, since: Since | None = None
) -> TableState:
    """Digest the rows that the partition covers; nothing is held while they are pulled.

    With `since`, only the stretches that are due by `spec.verify_days`; of the others its digests stand.
    Outside the oldest and newest idx, which are asked every time, none do.

    A step of the digest is one statement, so one consistent view, of whole buckets; no lock outlives it (a
    transaction's would queue an ALTER and everything behind it). Steps are of moments a second apart, as a
    changed bucket's pull is of a later one again, and that is harmless: what is covered was bound before
    the first step, every bucket is of one moment, and what a writer changes after its bucket's moment
    differs from the digest on the next day. A table emptied between two steps is caught as one emptied
    after them is: by the share of rows that went, by its AUTO_INCREMENT, and by the rows the gate reads.
    """
    doing = f"digesting {spec.table} for {spec.name}"
    extent = read(engine, doing, lambda connection: table_extent(connection, spec, before))
    failed = threading.Event()

    def digest(step: Bounds) -> Digests:
        if failed.is_set():  # else the time-outs of every further step would add up
            return empty_digests()
        try:
            return read(engine, doing, lambda connection: read_digests(connection, spec, [step]))
        except BaseException:
            failed.set()
            raise

    low, high = extent.oldest_idx // BUCKET_ROWS, extent.newest_idx // BUCKET_ROWS
    asked = np.array([[low, high]], np.int64)
    kept = empty_digests()
    if since is not None:
        known = since.digests.bucket
        asked = due_stretches(since.verified, known, low, high, since.day, spec.verify_days)
        kept = since.digests.select(known[~covers(asked, known) & (known >= low) & (known <= high)])
    bounds = [
        Bounds(int(first) * BUCKET_ROWS, min(int(last + 1) * BUCKET_ROWS - 1, extent.newest_idx))
        for first, last in asked
    ]
    workers = _DIGESTING_CONNECTIONS if engine.dialect.name in ("mysql", "mariadb") else 1
    with ThreadPoolExecutor(workers, "digest") as pool:
        parts = list(pool.map(digest, [step for bound in bounds for step in steps(bound)]))
    digests = join_digests([kept, *parts])
    return TableState(digests, extent.newest_idx, extent.columns, asked, (low, high), since)


def require_forward(
    engine: Engine, spec: IndexSpec, table: TableState, known_newest: int, *, confirm_shrink: bool
) -> None:
    """Raise PassingFailure when rows up to `known_newest`, which a snapshot held, never were on this server.

    Deleting the newest rows leaves AUTO_INCREMENT above them. A replica that is behind, a TRUNCATE and an
    older restore do not; a few rows fewer would pass every other check.
    """
    if table.newest_idx >= known_newest or confirm_shrink:
        return
    doing = f"asking for AUTO_INCREMENT of {spec.table} for {spec.name}"
    upcoming = read(engine, doing, lambda connection: next_auto_increment(connection, spec))
    if upcoming is not None and upcoming <= known_newest:
        raise PassingFailure(
            f"{spec.name}: {spec.table} went back in time: its newest idx was {known_newest:,}, now it is "
            f"{table.newest_idx:,} (AUTO_INCREMENT {upcoming:,}).",
            next_step="if this is a replica that is behind, wait for it or repair it, then launch again; if "
            "the table was emptied or restored on purpose, launch with confirm_shrink: true in the index's "
            "config.",
        )


def require_vouched_for(engine: Engine, spec: IndexSpec, table: TableState) -> None:
    """Raise PermanentFailure when more rows than may shrink away went from buckets that were not asked for.

    A few of them are counted, whatever else the day brings: without it, a mass deletion among them would be
    taken for a day with nothing new. Counting reads no payload.
    """
    if table.since is None:
        return
    digests = table.digests
    trusted = np.flatnonzero(~covers(table.asked, digests.bucket))
    random = np.random.default_rng(table.since.day.toordinal())
    drawn = random.choice(trusted, min(_COUNTED_BUCKETS, len(trusted)), replace=False)

    def count(connection: Connection) -> int:
        within = f"FROM {quoted(connection, spec.table)} WHERE idx >= :low AND idx <= :high"
        query = text(f"SELECT COUNT(*) {within}")
        lows = [int(bucket) * BUCKET_ROWS for bucket in np.sort(digests.bucket[drawn])]
        counts = (
            connection.execute(query, {"low": low, "high": low + BUCKET_ROWS - 1}).scalar_one()
            for low in lows
        )
        return sum(counts)

    wanted = int(digests.rows[drawn].sum())
    found = read(engine, f"counting rows of {spec.table} for {spec.name}", count)
    if found < wanted * (1 - spec.max_shrink_share):
        raise PermanentFailure(
            f"{spec.name}: {wanted - found:,} of {wanted:,} counted rows are gone from {spec.table}: "
            f"a mass deletion among those that are digested within {spec.verify_days} days.",
            next_step="if that is right, launch the index again with confirm_shrink: true in its config, "
            "which digests the whole table; else restore the table. The live file still serves the old rows.",
        )
