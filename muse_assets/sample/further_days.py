"""Further days of the sample: what a live catalog does to its tables between two nightly runs.

Here: new songs, rows that commit a day late below newer ones, deletions and re-embeddings, a day at a
time. Not here: day one (`day_one.py`).

A row's idx says what it holds, so a day needs nothing but the tables: their newest idx, and which of the
few before it are still missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TypeVar
from zoneinfo import ZoneInfo

import numpy as np
from sqlalchemy import Connection, Engine, bindparam, delete, insert, select, update

from muse_assets.catalog import Catalog
from muse_assets.connections.databases import connected
from muse_assets.failures import PermanentFailure
from muse_assets.sample.day_one import Progress
from muse_assets.sample.keyed_random import SEED
from muse_assets.sample.tables import (
    EmbeddingTable,
    decoded,
    embedding_rows,
    embedding_table,
    encoded,
    holds_rows,
    program_tables,
    times_of_day,
    write_program_songs,
)
from muse_assets.sample.vectors import moved

# Rows a day and table that commit a day late, just below the day's newest row.
_LATE = 3

T = TypeVar("T")


@dataclass(frozen=True)
class TableDay:
    """Rows of one table that a day changed. late: rows of the day before that this day brought in."""

    inserted: int
    late: int
    deleted: int
    reembedded: int


@dataclass(frozen=True)
class DaySummary:
    """One day. tables: by index name. program_songs: program id -> songs added, banned left out."""

    day: date
    tables: dict[str, TableDay]
    program_songs: dict[str, int]


@dataclass(frozen=True)
class _Newest:
    """The row with a table's largest idx."""

    idx: int
    created_at: datetime


def write_days(
    embeddings: Engine,
    playlists: Engine,
    catalog: Catalog,
    *,
    days: int,
    inserts: int | None = None,
    deletes: int | None = None,
    reembeds: int | None = None,
    today: date | None = None,
    seed: int = SEED,
    on_progress: Progress | None = None,
) -> list[DaySummary]:
    """Append `days` days after the newest created_at of the sample's tables, never past `today`.

    inserts: new songs a day (default 1 %), each with its rows in every table. deletes, reembeds: rows a
    day in each table (default 0.1 and 0.2 % of it, at least one), of earlier days; fewer if the table
    has no more. A re-embedded row keeps its created_at and gets a vector near its old one. The last few
    idx of a day but one are left out, and come in on the next day with the day's created_at. today:
    default Seoul's. on_progress gets (day, days done, days). One transaction a table and day.

    Raises PermanentFailure without a sample, for tables that hold other rows, and past `today`.
    """
    targets = [embedding_table(spec) for spec in catalog.indexes]
    programs = program_tables(catalog.programs)
    newest = [_newest_of_sample(embeddings, target) for target in targets]
    last_day = max(row.created_at for row in newest).date()
    _check_not_past(last_day, days, today or datetime.now(ZoneInfo("Asia/Seoul")).date())
    songs = max(target.content.songs(row.idx) for target, row in zip(targets, newest, strict=True))
    summaries = []
    for number in range(1, days + 1):
        day = last_day + timedelta(days=number)
        new_songs = max(1, songs // 100) if inserts is None else inserts
        tables = {}
        for target in targets:
            new_rows = target.content.rows(songs + new_songs) - target.content.rows(songs)
            with connected(embeddings, f"writing {day} into {target.spec.table}") as connection:
                tables[target.spec.name] = _write_day(
                    connection, target, seed, day, new_rows, deletes, reembeds
                )
                connection.commit()
        with connected(playlists, f"writing {day} into the sample's programs") as connection:
            block = np.arange(songs, songs + new_songs)
            program_songs = write_program_songs(connection, programs, catalog, seed, block)
            connection.commit()
        summaries.append(DaySummary(day, tables, program_songs))
        songs += new_songs
        if on_progress:
            on_progress(day.isoformat(), number, days)
    return summaries


def _newest_of_sample(engine: Engine, target: EmbeddingTable) -> _Newest:
    """The table's newest row; PermanentFailure unless it is one that the sample wrote."""
    spec, table = target.spec, target.table
    if not holds_rows(engine, table):
        raise PermanentFailure(
            f"Table {spec.table} for {spec.name} holds no sample to append days to.",
            next_step="write the sample first (`muse sample`).",
        )
    with connected(engine, f"reading the newest row of {spec.table}") as connection:
        row = _newest_row(connection, target)
        key = [table.c[name] for name in spec.song_key]
        found = connection.execute(select(*key).where(table.c.idx == row.idx)).one()
    discs, tracks, _ = target.content.places(np.array([row.idx - 1]))
    if tuple(found) != (f"{discs[0] + 1:07d}", f"{tracks[0] + 1:02d}")[: len(key)]:
        raise PermanentFailure(
            f"Table {spec.table} for {spec.name} holds rows that the sample did not write (idx {row.idx}).",
            next_step="append sample days only to a database that `muse sample` filled.",
        )
    return row


def _newest_row(connection: Connection, target: EmbeddingTable) -> _Newest:
    idx, created_at = target.table.c.idx, target.table.c[target.spec.created_at_column]
    row = connection.execute(select(idx, created_at).order_by(idx.desc()).limit(1)).one()
    return _Newest(*row)


def _check_not_past(last_day: date, days: int, today: date) -> None:
    if last_day + timedelta(days=days) > today:
        raise PermanentFailure(
            f"Days after {last_day}, the sample's newest: {days} would pass {today}.",
            next_step=f"ask for {max(0, (today - last_day).days)} at most.",
        )


def _write_day(
    connection: Connection,
    target: EmbeddingTable,
    seed: int,
    day: date,
    new_rows: int,
    deletes: int | None,
    reembeds: int | None,
) -> TableDay:
    before = _newest_row(connection, target)
    late = _missing_below(connection, target, before.idx)
    _insert(connection, target, seed, late, [before.created_at] * len(late))

    newest = before.idx + new_rows
    on_time = [idx for idx in range(before.idx + 1, newest + 1) if idx == newest or idx < newest - _LATE]
    times = times_of_day(day, 0, new_rows, new_rows)
    _insert(connection, target, seed, on_time, [times[idx - before.idx - 1] for idx in on_time])

    deletes = before.idx // 1000 + 1 if deletes is None else deletes
    reembeds = before.idx // 500 + 1 if reembeds is None else reembeds
    chosen = _older_rows(connection, target, seed, day, before.idx - _LATE, deletes + reembeds)
    deleted, reembedded = chosen[:deletes], chosen[deletes:]
    _delete(connection, target, deleted)
    _reembed(connection, target, seed, day, reembedded)
    return TableDay(len(on_time), len(late), len(deleted), len(reembedded))


def _missing_below(connection: Connection, target: EmbeddingTable, idx: int) -> list[int]:
    """Which of the `_LATE` idx below `idx` have no row: deletions spare these, so they are still to come."""
    window = range(max(1, idx - _LATE), idx)
    present = _present(connection, target, window)
    return [idx for idx in window if idx not in present]


def _present(connection: Connection, target: EmbeddingTable, wanted: Iterable[int]) -> set[int]:
    idx = target.table.c.idx
    return {
        row.idx
        for page in _pages(list(wanted))
        for row in connection.execute(select(idx).where(idx.in_(page)))
    }


def _older_rows(
    connection: Connection, target: EmbeddingTable, seed: int, day: date, below: int, count: int
) -> list[int]:
    """Up to `count` idx under `below`, in random order; fewer if most of the table is gone."""
    older = range(1, max(1, below))
    # Twice as many as asked for: some of them were deleted on earlier days.
    candidates = random.Random(f"{seed}/{day}/{target.spec.name}").sample(  # noqa: S311
        older, min(len(older), 2 * count + 50)
    )
    present = _present(connection, target, candidates)
    return [idx for idx in candidates if idx in present][:count]


def _insert(
    connection: Connection, target: EmbeddingTable, seed: int, idx: list[int], created_at: list[datetime]
) -> None:
    for page in _pages(list(zip(idx, created_at, strict=True))):
        numbers, times = zip(*page, strict=True)
        rows = embedding_rows(target, seed, np.array(numbers), times)
        connection.execute(insert(target.table), rows)


def _delete(connection: Connection, target: EmbeddingTable, idx: list[int]) -> None:
    for page in _pages(idx):
        connection.execute(delete(target.table).where(target.table.c.idx.in_(page)))


def _reembed(connection: Connection, target: EmbeddingTable, seed: int, day: date, idx: list[int]) -> None:
    spec, table = target.spec, target.table
    value = table.c[spec.embedding_column]
    replace = update(table).where(table.c.idx == bindparam("of_idx")).values({value: bindparam("moved")})
    for page in _pages(idx):
        rows = connection.execute(select(table.c.idx, value).where(table.c.idx.in_(page))).all()
        numbers = [row[0] for row in rows]
        vectors = moved(decoded(spec, [row[1] for row in rows]), spec, seed, f"{day}", np.array(numbers))
        connection.execute(
            replace,
            [
                {"of_idx": number, "moved": payload}
                for number, payload in zip(numbers, encoded(spec, vectors), strict=True)
            ],
        )


def _pages(items: list[T]) -> list[list[T]]:
    # One query or executemany: SQLite takes at most 32,766 parameters, and memory stays at a few MB.
    return [items[start : start + 500] for start in range(0, len(items), 500)]
