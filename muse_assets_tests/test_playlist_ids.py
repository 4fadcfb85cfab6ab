"""The ids of a playlist's songs: the law that a row matches by its trimmed key alone, and what that costs.

Here: `index_ids` against keys, column types and collations of every kind, on MariaDB and SQLite. Not here:
what becomes of the ids (`test_playlists.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.playlists import ids
from muse_assets.playlists.ids import index_ids
from muse_assets.playlists.songs import trimmed
from muse_assets_tests.servers import fresh_schema

VIBE = CATALOG.index("vibe")
ALBUM = CATALOG.index("album_name")
COLUMNS = {
    "padding collation": ("VARCHAR(40) COLLATE utf8mb4_general_ci", "VARCHAR(20) COLLATE utf8mb4_general_ci"),
    "unicode collation": ("VARCHAR(40) COLLATE utf8mb4_unicode_ci", "VARCHAR(20) COLLATE utf8mb4_bin"),
    "no pad": ("VARCHAR(40) COLLATE utf8mb4_nopad_bin", "VARCHAR(20) COLLATE utf8mb4_general_nopad_ci"),
    "char": ("CHAR(40)", "CHAR(20)"),
    "bytes": ("VARBINARY(60)", "VARBINARY(60)"),
    "bytes and text": ("VARCHAR(40)", "VARBINARY(60)"),
    "another character set": ("VARCHAR(40) CHARACTER SET euckr", "VARCHAR(20) CHARACTER SET utf8mb3"),
}
# Alike to some collation or other, but for the separators of a packed answer, which stand for any oddity.
PARTS = ["7", "07", "a", "A", "가", "%", "'", "\\", ""]
ODD = ["a\x1fb", "a\x1e7"]
SPACES = st.sampled_from(["", "", "", " ", "  "])
PART = st.builds(
    lambda before, part, after: before + part + after, SPACES, st.sampled_from([*PARTS, *PARTS, *ODD]), SPACES
)
KEY = st.tuples(PART, st.one_of(st.none(), PART))
MANY = {(f"d{n}", "1") for n in range(1_500)}  # from 1,000 values on MariaDB joins a table of them


@pytest.fixture(scope="module")
def engine(mariadb_url: str) -> Iterator[Engine]:
    with fresh_schema(mariadb_url) as url:
        yield engine_for(url)


def fill(engine: Engine, disc: str, track: str, rows: dict[int, tuple[Any, Any]]) -> None:
    with engine.begin() as connection:
        for spec in (VIBE, ALBUM):
            connection.execute(text(f"DROP TABLE IF EXISTS {spec.table}"))
            columns = f"idx INTEGER PRIMARY KEY, disccommseq {disc}, trackno {track}"
            connection.execute(
                text(f"CREATE TABLE {spec.table} ({columns}, INDEX song (disccommseq, trackno))")
            )
            if rows:
                connection.execute(
                    text(f"INSERT INTO {spec.table} VALUES (:idx, :disc, :track)"),
                    [{"idx": idx, "disc": key[0], "track": key[1]} for idx, key in rows.items()],
                )


def expected(rows: dict[int, tuple[Any, Any]], songs: set[tuple[str, str]], width: int) -> list[int]:
    wanted = {song[:width] for song in songs}
    return [
        idx - 1 for idx, key in sorted(rows.items()) if tuple(trimmed(part) for part in key[:width]) in wanted
    ]


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(KEY, min_size=1, max_size=30),
    chosen=st.sets(st.integers(0, 29), min_size=1),
    many=st.booleans(),
    small=st.booleans(),
)
def test_a_row_matches_by_its_trimmed_key_alone(
    engine: Engine,
    columns: tuple[str, str],
    keys: list[tuple[str, str | None]],
    chosen: set[int],
    many: bool,
    small: bool,
) -> None:
    rows = dict(enumerate(keys, 1))
    songs = [key for place, key in enumerate(keys) if place in chosen]
    playlist = {(trimmed(disc), trimmed(track)) for disc, track in songs} | (MANY if many else set())
    fill(engine, *columns, rows)
    with pytest.MonkeyPatch.context() as patch:
        # Answers that are cut off: asked for again by halves, and at last by rows.
        patch.setattr(ids, "_PACKED_BYTES", 16 if small else ids._PACKED_BYTES)
        for spec in (VIBE, ALBUM):
            found = index_ids(engine, spec, playlist, chunk=2_000)
            assert found.dtype == np.int64
            assert found.tolist() == expected(rows, playlist, len(spec.song_key)), spec.name


@pytest.mark.parametrize("disc", ["BIGINT", "DECIMAL(12,2)"])
def test_numbers_match_as_python_writes_them(engine: Engine, disc: str) -> None:
    fill(engine, disc, "VARCHAR(20)", {1: (0, "1"), 2: (7, " 1"), 3: (7, "2"), 4: (-7, "1")})
    written = "{}" if disc == "BIGINT" else "{}.00"
    songs = {(written.format(n), "1") for n in (0, 7, 8)}
    assert index_ids(engine, VIBE, songs).tolist() == [0, 1]
    assert index_ids(engine, ALBUM, songs).tolist() == [0, 1, 2]


@pytest.mark.parametrize("disc", ["VARCHAR(40)", "BIGINT"])
def test_with_an_index_on_the_disc_only_its_rows_are_read(engine: Engine, disc: str) -> None:
    fill(engine, disc, "VARCHAR(20)", {})
    with engine.begin() as connection:
        connection.execute(
            text(f"INSERT INTO {VIBE.table} SELECT seq, seq DIV 10, seq MOD 10 FROM seq_1_to_50000")
        )
        connection.execute(text(f"ANALYZE TABLE {VIBE.table}"))
    songs = {(str(n), "3") for n in range(20, 30)}
    before = rows_read(engine)
    assert index_ids(engine, VIBE, songs).tolist() == [n * 10 + 2 for n in range(20, 30)]
    assert rows_read(engine) - before < 1_000


def rows_read(engine: Engine) -> int:
    with engine.connect() as connection:
        return sum(int(row[1]) for row in connection.execute(text("SHOW GLOBAL STATUS LIKE 'Handler_read%'")))


def test_separators_in_keys_are_no_bridge_between_disc_and_track(engine: Engine) -> None:
    fill(engine, "VARCHAR(40)", "VARCHAR(20)", {1: ("a", "b\x1fc"), 2: ("a\x1fb", "c"), 3: ("a", "b")})
    assert index_ids(engine, VIBE, {("a", "b\x1fc"), ("a\x1fb", "d")}).tolist() == [0]
