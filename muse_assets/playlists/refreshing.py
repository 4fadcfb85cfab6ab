"""One program's playlist, from its songs to its Redis keys.

Here: the order of the three steps. Not here: the steps (`songs.py`, `ids.py`, `cache.py`).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import redis
from sqlalchemy import Engine

from muse_assets.catalog import Catalog, IndexSpec, Program
from muse_assets.connections.databases import describe_url
from muse_assets.connections.redis_server import check_eviction
from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.playlists.cache import LiveContent, Refresh, refresh
from muse_assets.playlists.ids import match_songs
from muse_assets.playlists.songs import Layout, program_songs, song_table
from muse_assets.publishing.live import live_file

# The database scans one table while another's keys are matched here.
_TABLES_AT_ONCE = 2


def refresh_program(
    embedding_engine: Engine,
    playlist_engine: Engine,
    client: redis.Redis,
    catalog: Catalog,
    program: Program,
    layout: Layout,
    *,
    server: Path | None = None,
    confirm_shrink: bool = False,
    now: float | None = None,
) -> Refresh:
    """Read the program's songs, find their ids in every index of the catalog, replace its Redis keys.

    `server` is the search server's directory, for the live contents that the metadata name; without it, and
    for a file that cannot be read, they name none. `now` (seconds since the epoch) is the time at the write
    unless given. Raises PermanentFailure, with nothing written, for a program without songs (`confirm_shrink`
    does not help), and whatever the three steps raise. `seconds` of the result covers all of it.
    """
    started = time.monotonic()
    # Before seven tables are read for a server that is not there.
    check_eviction(client)
    songs = program_songs(playlist_engine, program, layout)
    if not songs:
        raise PermanentFailure(
            f"Program {program.id} ({program.title}) has no songs in {song_table(program, layout)}, "
            f"{describe_url(playlist_engine)}. Nothing was written.",
            next_step="fill that table, or correct MUSE_PLAYLIST_LAYOUT and MUSE_PLAYLIST_DB_URL.",
        )
    with ThreadPoolExecutor(_TABLES_AT_ONCE) as threads:
        found = threads.map(partial(match_songs, embedding_engine, songs=songs), catalog.indexes)
        # Hashed while the database answers.
        live = {
            spec.name: content
            for spec in catalog.indexes
            if server and (content := _live_content(server, spec))
        }
        matches = {spec.name: of_index for spec, of_index in zip(catalog.indexes, found, strict=True)}
    result = refresh(
        client,
        program,
        {name: of_index.ids for name, of_index in matches.items()},
        now=time.time() if now is None else now,
        live=live,
        confirm_shrink=confirm_shrink,
    )
    return replace(result, matches=matches, seconds=time.monotonic() - started)


def _live_content(server: Path, spec: IndexSpec) -> LiveContent | None:
    """None where nothing is live, or its disk fails: the ids are right without it."""
    try:
        live = live_file(server, spec)
    except MuseError:
        return None
    if live is None:
        return None
    facts = live.manifest
    return LiveContent(live.sha256, facts.partition if facts and facts.day != date.min else None)
