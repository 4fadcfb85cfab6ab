"""The songs of a program, and their titles, as the playlist database has them.

Here: the two table layouts and the form of a song key. Not here: which rows of an index the songs are
(`ids.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import Engine, Select, column, func, inspect, select, table
from sqlalchemy.sql.elements import ColumnClause, quoted_name

from muse_assets.catalog import Catalog, Program
from muse_assets.connections.databases import connected

Layout = Literal["song_tables", "song_pool"]

SongKey = tuple[str, str]
"""(disc, track), both as `trimmed` returns them."""

SONG_POOL = "tb_playlist_song_pool_m"
_PROGRAMS = "tb_program_m"
_TITLE_COLUMNS = ("song_name", "artist_name")


def trimmed(value: object) -> str:
    """A disc or track of any column type as the text that is compared: without spaces around, as TRIM."""
    if isinstance(value, str):
        return value.strip(" ")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip(" ")
    return "" if value is None else str(value)


def song_table(program: Program, layout: Layout) -> str:
    """The table that holds the program's songs."""
    return program.song_table if layout == "song_tables" else SONG_POOL


def program_songs(engine: Engine, program: Program, layout: Layout) -> frozenset[SongKey]:
    """The program's songs, banned ones left out; rows without disc or track name no song.

    Raises PassingFailure or PermanentFailure (`connections.databases.explained`).
    """
    statement = _select(song_table(program, layout), "disc_id", "track_no")
    if layout == "song_pool":
        statement = statement.add_columns(column("is_banned")).where(
            func.trim(column("program_id")) == program.id
        )
    with connected(engine, f"reading the songs of program {program.id}") as connection:
        rows = connection.execute(statement).all()
    keys = {(trimmed(disc), trimmed(track)) for disc, track, *banned in rows if not _is_set(*banned)}
    return frozenset(key for key in keys if all(key))


def unknown_programs(engine: Engine, catalog: Catalog) -> list[str]:
    """Ids in tb_program_m (layout song_pool) that the catalog lacks, sorted: nobody caches their songs."""
    with connected(engine, f"reading {_PROGRAMS}") as connection:
        ids = {trimmed(row[0]) for row in connection.execute(_select(_PROGRAMS, "id"))}
    return sorted(ids - {program.id for program in catalog.programs})


def song_titles(
    engine: Engine, catalog: Catalog, layout: Layout, keys: Collection[tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[str, str]]:
    """(title, artist) of the songs among `keys` (at most some thousands) that a program table describes.

    A key is (disc, track), or (disc,), which stands for the first song known of that disc. The columns
    song_name and artist_name are optional: tables without them are left out.
    """
    wanted = set(keys)
    among = func.trim(column("disc_id")).in_(sorted({key[0] for key in wanted}))
    titles: dict[tuple[str, ...], tuple[str, str]] = {}
    with connected(engine, "reading song titles") as connection:
        inspector = inspect(connection)
        for name in dict.fromkeys(song_table(program, layout) for program in catalog.programs):
            if not inspector.has_table(name):
                continue
            if not {found["name"] for found in inspector.get_columns(name)}.issuperset(_TITLE_COLUMNS):
                continue
            found = _select(name, "disc_id", "track_no", *_TITLE_COLUMNS).where(among)
            for row in connection.execute(found.order_by(column("disc_id"), column("track_no"))):
                disc, track, title, artist = map(trimmed, row)
                for key in wanted & {(disc, track), (disc,)}:
                    titles.setdefault(key, (title, artist))
    return titles


def _select(table_name: str, *names: str) -> Select[Any]:
    columns: list[ColumnClause[Any]] = [column(name) for name in names]
    return select(*columns).select_from(table(quoted_name(table_name, quote=True)))


def _is_set(flag: object = None) -> bool:
    """Whether a flag column (integer, BIT, or a letter) says yes; in SQL, 'Y' = 0 is true on MySQL."""
    return trimmed(flag).upper() not in ("", "0", "\0", "N", "FALSE")
