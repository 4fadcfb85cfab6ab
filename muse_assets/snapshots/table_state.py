"""What a table holds, in digests: the whole of it, bucket by bucket, and whether it went back in time.

Here: which buckets are digested, as of when. Not here: the digest itself (`embeddings.digests`), or what is
done about buckets that differ (`sync`).
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.embeddings.digests import Digests, empty_digests, join_digests, read_digests, steps
from muse_assets.embeddings.reading import Bounds, next_auto_increment, table_extent
from muse_assets.failures import PassingFailure

# A digest is CPU of the server, one core a connection: a million warm rows of 2 KB took 1.2 s on one.
_DIGESTING_CONNECTIONS = 2


@dataclass(frozen=True)
class TableState:
    """A table as it stood: digests of every bucket the partition covers, each of one moment; newest idx."""

    digests: Digests
    newest_idx: int
    columns: dict[str, str]


def read_table_state(engine: Engine, spec: IndexSpec, before: datetime | None) -> TableState:
    """Digest the rows that the partition covers; nothing is held while they are pulled.

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

    workers = _DIGESTING_CONNECTIONS if engine.dialect.name in ("mysql", "mariadb") else 1
    with ThreadPoolExecutor(workers, "digest") as pool:
        parts = list(pool.map(digest, steps(extent.bounds)))
    return TableState(join_digests([empty_digests(), *parts]), extent.newest_idx, extent.columns)


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
