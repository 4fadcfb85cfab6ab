"""Day one of the sample: every table, filled block by block.

Here: writing a sample into empty tables and telling whether there is one. Not here: later days
(`further_days.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
from sqlalchemy import Engine, insert

from muse_assets.catalog import Catalog
from muse_assets.connections.databases import connected
from muse_assets.failures import PermanentFailure
from muse_assets.sample.keyed_random import SEED
from muse_assets.sample.tables import (
    EmbeddingTable,
    check_empty,
    create_missing,
    embedding_rows,
    embedding_table,
    holds_rows,
    program_tables,
    times_of_day,
    write_program_songs,
)

DAY_ONE = date(2026, 1, 1)

# 2,000 rows of 1,024 floats are 8 MB; a process that writes 100,000 peaks at 122 MB in all.
_BLOCK = 2_000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SampleSummary:
    """What was written. rows: index -> rows. program_songs: program id -> songs, banned left out."""

    songs: int
    rows: dict[str, int]
    program_songs: dict[str, int]


def write_sample(
    embeddings: Engine,
    playlists: Engine,
    catalog: Catalog,
    *,
    songs: int = 2000,
    seed: int = SEED,
    rows: Mapping[str, int] | None = None,
    on_progress: Progress | None = None,
) -> SampleSummary:
    """Create the tables that are missing and write day one, 2026-01-01, into them.

    rows: exact numbers of rows for indexes by name; the others follow from `songs`. on_progress gets
    (index or "playlists", rows done, rows in all). Each block is one transaction. Raises
    PermanentFailure, before writing a row, for a table that already holds some.
    """
    wanted = _row_counts(catalog, songs, rows or {})
    targets = [embedding_table(spec) for spec in catalog.indexes]
    programs = program_tables(catalog.programs)
    destinations = ((embeddings, [target.table for target in targets]), (playlists, programs.all))
    for engine, tables in destinations:
        check_empty(engine, tables)
    for engine, tables in destinations:
        create_missing(engine, tables)
    report = on_progress or (lambda *_: None)
    for target in targets:
        _fill(embeddings, target, seed, wanted[target.spec.name], report)
    program_songs = Counter({program.id: 0 for program in catalog.programs})
    with connected(playlists, "writing the sample's programs") as connection:
        if catalog.programs:
            names = [{"id": program.id, "name": program.title} for program in catalog.programs]
            connection.execute(insert(programs.names), names)
        for first in range(0, songs, _BLOCK):
            block = np.arange(first, min(first + _BLOCK, songs))
            program_songs.update(write_program_songs(connection, programs, catalog, seed, block))
            connection.commit()
            report("playlists", first + len(block), songs)
    return SampleSummary(songs, wanted, dict(program_songs))


def sample_written(embeddings: Engine, catalog: Catalog) -> bool:
    """Whether every embedding table of the catalog exists and holds rows."""
    return all(holds_rows(embeddings, embedding_table(spec).table) for spec in catalog.indexes)


def _row_counts(catalog: Catalog, songs: int, rows: Mapping[str, int]) -> dict[str, int]:
    counts = {spec.name: embedding_table(spec).content.rows(songs) for spec in catalog.indexes}
    counts |= {catalog.index(name).name: count for name, count in rows.items()}
    if too_few := [f"{name} {count}" for name, count in counts.items() if count < 1]:
        raise PermanentFailure(
            f"A sample of {songs} songs with rows {', '.join(too_few)} would leave a table empty.",
            next_step="ask for at least 1 song and 1 row an index.",
        )
    return counts


def _fill(engine: Engine, target: EmbeddingTable, seed: int, total: int, report: Progress) -> None:
    with connected(engine, f"writing the sample's {target.spec.table}") as connection:
        for first in range(0, total, _BLOCK):
            stop = min(first + _BLOCK, total)
            times = times_of_day(DAY_ONE, first, stop, total)
            block = embedding_rows(target, seed, np.arange(first + 1, stop + 1), times)
            connection.execute(insert(target.table), block)
            connection.commit()
            report(target.spec.name, stop, total)
