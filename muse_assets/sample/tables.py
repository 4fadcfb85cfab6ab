"""The real schema, and blocks of sample rows in it.

Here: the embedding and program tables, how a vector becomes a column's value and back, the rows of a
range. Not here: which ranges are written when (`day_one.py`, `further_days.py`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import lru_cache
from typing import Any

import numpy as np
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    insert,
    inspect,
    select,
)

from muse_assets.catalog import Catalog, IndexSpec, Program
from muse_assets.connections.databases import connected, describe_url, explained
from muse_assets.failures import PermanentFailure
from muse_assets.sample.keyed_random import Ints, uniforms
from muse_assets.sample.songs import (
    GENRES,
    artist_names,
    artists_of,
    discs_and_tracks,
    genres_of,
    spelled,
    titles,
)
from muse_assets.sample.vectors import Content, Vectors, content_of

Row = dict[str, Any]

# SQLite numbers rows by itself only in a column of type INTEGER.
_ID = BigInteger().with_variant(Integer, "sqlite")
_OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "sqlite_autoincrement": True,
}
_BANNED_SHARE = 0.004


@dataclass(frozen=True)
class EmbeddingTable:
    """One index's table and what its rows stand for."""

    spec: IndexSpec
    content: Content
    table: Table


def embedding_table(spec: IndexSpec) -> EmbeddingTable:
    """The embedding table of one index, as the catalog names it."""
    content = content_of(spec)
    columns: list[Column[Any]] = [Column("idx", _ID, primary_key=True, autoincrement=True)]
    columns += [
        Column(name, String(length), nullable=False)
        for name, length in zip(spec.song_key, (32, 8), strict=False)
    ]
    if content.part_column:
        columns.append(Column(content.part_column, SmallInteger, nullable=False))
    value_type = Text() if spec.encoding == "json" else LargeBinary()
    table = Table(
        spec.table,
        MetaData(),
        *columns,
        Column(spec.embedding_column, value_type, nullable=False),
        # A plain column: MariaDB refuses one generated from an auto-increment key.
        Column("idx_mod_100", SmallInteger, nullable=False),
        Column(spec.created_at_column, DateTime, nullable=False),
        Index(f"ix_{spec.table}"[:58] + "_song", *spec.song_key),
        Index(f"ix_{spec.table}"[:58] + "_mod", "idx_mod_100"),
        **_OPTIONS,
    )
    return EmbeddingTable(spec, content, table)


@dataclass(frozen=True)
class ProgramTables:
    """Both layouts of the playlist database. songs: one table a program, by program id."""

    songs: dict[str, Table]
    names: Table
    pool: Table

    @property
    def all(self) -> list[Table]:
        """Every table, the per-program ones first."""
        return [*self.songs.values(), self.names, self.pool]


def program_tables(programs: Iterable[Program]) -> ProgramTables:
    """The program tables of the playlist database."""

    def song_columns() -> list[Column[Any]]:
        return [
            Column("disc_id", String(32), nullable=False),
            Column("track_no", String(8), nullable=False),
            Column("song_name", String(255)),
            Column("artist_name", String(255)),
        ]

    metadata = MetaData()
    songs = {
        program.id: Table(
            program.song_table, metadata, Column("idx", _ID, primary_key=True), *song_columns(), **_OPTIONS
        )
        for program in programs
    }
    names = Table(
        "tb_program_m",
        metadata,
        Column("id", String(32), primary_key=True),
        Column("name", String(255)),
        **_OPTIONS,
    )
    pool = Table(
        "tb_playlist_song_pool_m",
        metadata,
        Column("idx", _ID, primary_key=True),
        Column("program_id", String(32), nullable=False, index=True),
        *song_columns(),
        Column("is_banned", Boolean, nullable=False),
        **_OPTIONS,
    )
    return ProgramTables(songs, names, pool)


def check_empty(engine: Engine, tables: Sequence[Table]) -> None:
    """PermanentFailure names a table that already holds rows."""
    for table in tables:
        if holds_rows(engine, table):
            raise PermanentFailure(
                f"Table {table.name} of {describe_url(engine)} holds rows: the sample overwrites nothing.",
                next_step="point the sample at an empty schema, or drop that schema's tables yourself.",
            )


def create_missing(engine: Engine, tables: Sequence[Table]) -> None:
    """Create the tables that are not there yet."""
    for table in tables:
        with explained(engine, f"creating {table.name}"):
            table.create(engine, checkfirst=True)


def holds_rows(engine: Engine, table: Table) -> bool:
    """Whether the table exists and holds a row."""
    with connected(engine, f"looking for rows in {table.name}") as connection:
        if not inspect(connection).has_table(table.name):
            return False
        first = next(iter(table.primary_key))
        return connection.execute(select(first).limit(1)).first() is not None


def embedding_rows(target: EmbeddingTable, seed: int, idx: Ints, created_at: Sequence[datetime]) -> list[Row]:
    """The rows with those idx values; the row with idx i is row i - 1 of the index's content."""
    spec, content = target.spec, target.content
    discs, tracks, parts = content.places(idx - 1)
    keys = [[f"{disc + 1:07d}" for disc in discs.tolist()], [f"{track + 1:02d}" for track in tracks.tolist()]]
    columns: Row = {"idx": idx.tolist(), **dict(zip(spec.song_key, keys, strict=False))}
    if content.part_column:
        columns[content.part_column] = parts.tolist()
    columns[spec.embedding_column] = encoded(spec, content.vectors(spec, seed, idx - 1))
    columns["idx_mod_100"] = (idx % 100).tolist()
    columns[spec.created_at_column] = created_at
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def times_of_day(day: date, first: int, stop: int, total: int) -> list[datetime]:
    """Seoul times for rows first..stop of the day's `total`: in order, evenly from 02:00 to 14:00."""
    start = datetime.combine(day, time(2))
    return [start + timedelta(seconds=row * 43_200 // total) for row in range(first, stop)]


def encoded(spec: IndexSpec, vectors: Vectors) -> list[bytes] | list[str]:
    """The column's values for float32 vectors (n, dimension), in the catalog's encoding."""
    if spec.encoding == "json":
        return [json.dumps(vector) for vector in vectors.tolist()]
    header = _npy_header(_npy_shape(spec)) if spec.encoding == "npy" else b""
    data, width = vectors.astype("<f4").tobytes(), 4 * spec.dimension
    return [header + data[start : start + width] for start in range(0, len(data), width)]


def decoded(spec: IndexSpec, values: Sequence[bytes | str]) -> Vectors:
    """float32 (n, dimension): what `encoded` wrote."""
    if spec.encoding == "json":
        return np.array([json.loads(value) for value in values], dtype=np.float32)
    # The vector is a payload's last bytes, with a header before it or without.
    tails = b"".join(bytes(value)[-4 * spec.dimension :] for value in values if isinstance(value, bytes))
    return np.frombuffer(tails, dtype="<f4").reshape(len(values), spec.dimension)


def _npy_shape(spec: IndexSpec) -> tuple[int, ...]:
    return (1, spec.dimension) if spec.model == "bgem3" else (spec.dimension,)


@lru_cache(maxsize=16)
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What numpy itself writes before the data; `numpy.save` row by row takes twice as long."""
    file = io.BytesIO()
    empty = np.zeros(shape, dtype="<f4")
    np.save(file, empty, allow_pickle=False)
    return file.getvalue()[: -empty.nbytes]


def write_program_songs(
    connection: Connection, tables: ProgramTables, catalog: Catalog, seed: int, songs: Ints
) -> dict[str, int]:
    """Put those of the songs that each program plays into both layouts; program id -> songs, banned left out.

    A program plays 2 to 15 % of a genre. The pool holds a few banned songs beside.
    """
    discs, tracks = discs_and_tracks(songs)
    artists = artists_of(seed, discs)
    genres = genres_of(seed, artists)
    counts = {}
    for program in catalog.programs:
        taste = 0.02 + 0.13 * uniforms(seed, f"{program.id}/taste", np.arange(GENRES))[:, 0]
        chance = uniforms(seed, f"{program.id}/songs", songs)[:, 0]
        chosen = np.flatnonzero(chance < taste[genres] + _BANNED_SHARE)
        banned = (chance >= taste[genres])[chosen].tolist()
        rows = [
            {
                "disc_id": f"{disc + 1:07d}",
                "track_no": f"{track + 1:02d}",
                "song_name": title,
                "artist_name": by,
            }
            for disc, track, title, by in zip(
                discs[chosen].tolist(),
                tracks[chosen].tolist(),
                spelled(titles(seed, songs[chosen])),
                spelled(artist_names(seed, artists[chosen])),
                strict=True,
            )
        ]
        played = [row for row, is_banned in zip(rows, banned, strict=True) if not is_banned]
        pool = [
            {"program_id": program.id, **row, "is_banned": is_banned}
            for row, is_banned in zip(rows, banned, strict=True)
        ]
        if played:
            connection.execute(insert(tables.songs[program.id]), played)
        if pool:
            connection.execute(insert(tables.pool), pool)
        counts[program.id] = len(played)
    return counts
