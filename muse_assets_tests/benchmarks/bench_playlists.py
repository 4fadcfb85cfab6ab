"""All programs' playlists against one query a song, and against the bare queries of a refresh.

Here: 6 programs of 20,000 songs and seven tables of 120,000 rows, in some of them four rows a song, on
MariaDB and Redis. Not here: whether readers see whole generations (`muse_assets_tests/test_playlists.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, Table, insert

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.connections.redis_server import connect
from muse_assets.playlists.cache import read_ids
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.playlists.songs import program_songs
from muse_assets.sample.tables import embedding_table, program_tables
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Row, begin, in_turn, measure
from muse_assets_tests.benchmarks.tables import private_database
from muse_assets_tests.servers import execute, private_redis

_ROWS = 120_000
_ROWS_A_SONG = 4
_TRACKS_A_DISC = 12
_SONGS = 20_000
_ASKED_SINGLY = 2_000
_DISCS_A_QUERY = 20_000


def rows(scale: float) -> Iterator[Row]:
    """A refresh of every program, against both."""
    songs, asked = int(_SONGS * scale), int(_ASKED_SINGLY * scale)
    with private_database(1024) as url, tempfile.TemporaryDirectory() as folder:
        write_tables(url, int(_ROWS * scale), songs)
        with private_redis(Path(folder)) as redis_url:
            ours, bare = in_turn(3, (refresh, (url, redis_url)), (_bare_queries, (url,)))
            one_by_one = measure(_one_query_a_song, url, redis_url, asked)
        share = songs / asked * len(CATALOG.programs)
        naive = Cost(one_by_one.wall * share, one_by_one.cpu * share, one_by_one.peak)
        what = f"{len(CATALOG.programs)} playlists x {songs:,} songs x {len(CATALOG.indexes)} indexes"
        written = f"{ours.facts['ids']:,} ids written"
        singly = f"{asked:,} songs of one program asked singly in {one_by_one.wall:.1f} s, x {share:.0f}"
        note = f"{written}; {singly}; their ids are among ours"
        yield Row(what, "one query a song", ours, naive, reach=20, note=note)
        note = f"{written}, read back, compared; {bare.facts['rows']:,} rows fetched"
        yield Row(what, "the bare queries", ours, bare, reach=1.5, faster=False, note=note)


def write_tables(url: str, rows: int, songs: int) -> None:
    """Seven tables of `rows` rows, and six programs of `songs` songs each."""
    append_rows(url, 1, rows)
    tables = program_tables(CATALOG.programs)
    random = np.random.default_rng(1)
    with engine_for(url).begin() as connection:
        for table in tables.songs.values():
            picked = random.choice(rows // _ROWS_A_SONG, songs, replace=False)
            write_program(connection, table, picked)


def append_rows(url: str, first: int, last: int) -> None:
    """Rows of idx `first` to `last` in each of the seven tables, which are made where they are missing."""
    engine = engine_for(url)
    for spec in CATALOG.indexes:
        target = embedding_table(spec)
        target.table.create(engine, checkfirst=True)
        song = f"(seq - 1) DIV {_ROWS_A_SONG if target.content.part_column else 1}"
        values = {
            "idx": "seq",
            "disccommseq": f"LPAD({song} DIV {_TRACKS_A_DISC} + 1, 7, '0')",
            "trackno": f"LPAD({song} MOD {_TRACKS_A_DISC} + 1, 2, '0')",
            spec.embedding_column: "'[]'",  # nothing here reads a vector
            spec.created_at_column: "NOW()",
        }
        columns = [column.name for column in target.table.columns]
        chosen = ", ".join(values.get(name, "seq MOD 100") for name in columns)
        execute(
            url,
            f"INSERT INTO {spec.table} ({', '.join(columns)}) SELECT {chosen} FROM seq_{first}_to_{last}",
        )


def write_program(connection: Connection, table: Table, songs: NDArray[np.int64]) -> None:
    """The program's table anew, of songs (n,) by their number: twelve a disc."""
    table.drop(connection, checkfirst=True)
    table.create(connection)
    keys = (divmod(int(song), _TRACKS_A_DISC) for song in songs)
    connection.execute(
        insert(table),
        [{"disc_id": f"{disc + 1:07d}", "track_no": f"{track + 1:02d}"} for disc, track in keys],
    )


def refresh(url: str, redis_url: str) -> Facts:
    """Every program's keys."""
    engine, client = engine_for(url), connect(redis_url)
    _connect(engine)
    begin()
    done = [
        refresh_program(engine, engine, client, CATALOG, program, "song_tables")
        for program in CATALOG.programs
    ]
    return {"ids": sum(sum(one.counts.values()) for one in done)}


def _bare_queries(url: str) -> Facts:
    """The same rows, asked for by the driver, 20,000 discs a statement, and fetched."""
    fetched = 0
    with engine_for(url).connect() as connection:
        cursor = connection.connection.cursor()
        begin()
        for program in CATALOG.programs:
            cursor.execute(f"SELECT disc_id, track_no FROM {program.song_table}")
            songs = cursor.fetchall()
            discs = sorted({disc for disc, _ in songs})
            for spec in CATALOG.indexes:
                for start in range(0, len(discs), _DISCS_A_QUERY):
                    chunk = discs[start : start + _DISCS_A_QUERY]
                    columns, disc = ", ".join(("idx", *spec.song_key)), spec.song_key[0]
                    places = ", ".join(["%s"] * len(chunk))
                    cursor.execute(f"SELECT {columns} FROM {spec.table} WHERE {disc} IN ({places})", chunk)
                    fetched += len(cursor.fetchall())
    return {"rows": fetched}


def _one_query_a_song(url: str, redis_url: str, songs: int) -> Facts:
    """The ids of some songs of one program, as the scripts before asked for them; all have to be ours too."""
    engine, program = engine_for(url), CATALOG.programs[0]
    keys = sorted(program_songs(engine, program, "song_tables"))[:songs]
    found: dict[str, set[int]] = {spec.name: set() for spec in CATALOG.indexes}
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        begin()
        for key in keys:
            for spec in CATALOG.indexes:
                where = " AND ".join(f"{column} = %s" for column in spec.song_key)
                cursor.execute(f"SELECT idx FROM {spec.table} WHERE {where}", key[: len(spec.song_key)])
                found[spec.name].update(row[0] + spec.id_offset for row in cursor.fetchall())
    client = connect(redis_url)
    for name, ids in found.items():
        if not ids or not ids <= set(read_ids(client, program, name).tolist()):
            raise RuntimeError(f"{name}: the refresh lacks ids that single queries find")
    return {}


def _connect(engine: Engine) -> None:
    with engine.connect():
        pass
