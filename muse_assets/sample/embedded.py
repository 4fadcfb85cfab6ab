"""The sample in the embedded default's SQLite files: all of it or none, however it was interrupted.

Here: writing it aside and putting it into place. Not here: its content (`day_one.py`), or any database
that somebody set.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

from muse_assets import durable_files
from muse_assets.catalog import Catalog
from muse_assets.connections.databases import describe_url, engine_for
from muse_assets.failures import PassingFailure
from muse_assets.sample.day_one import Progress, SampleSummary, write_sample
from muse_assets.sample.keyed_random import SEED
from muse_assets.sample.tables import check_empty, embedding_table, program_tables


def write_embedded_sample(
    embeddings: Engine,
    playlists: Engine,
    catalog: Catalog,
    *,
    songs: int = 2000,
    seed: int = SEED,
    on_progress: Progress | None = None,
) -> SampleSummary:
    """Write day one as `write_sample` does, into two SQLite files of one folder that hold no rows yet.

    Nothing is in them until all of it is; what a killed call left aside goes at the next one. Raises
    Conflict beside another call, PermanentFailure for a table that holds other rows.
    """
    folder = _file(embeddings).parent
    with durable_files.locked(folder / ".sample.lock"), _emptied(folder / ".sample.part") as aside:
        check_empty(embeddings, [embedding_table(spec).table for spec in catalog.indexes])
        new_embeddings, new_playlists = (
            engine_for(f"sqlite:///{aside / _file(engine).name}") for engine in (embeddings, playlists)
        )
        try:
            done = write_sample(
                new_embeddings, new_playlists, catalog, songs=songs, seed=seed, on_progress=on_progress
            )
        finally:
            new_embeddings.dispose()
            new_playlists.dispose()
        # The embeddings last: they tell `sample_written`. A kill in between left these very playlists.
        if not _same_rows(new_playlists, playlists):
            check_empty(playlists, program_tables(catalog.programs).all)
            _copy(new_playlists, playlists)
        _copy(new_embeddings, embeddings)
    return done


def _file(engine: Engine) -> Path:
    return Path(engine.url.database or "")


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """An empty folder, gone at the end."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _same_rows(one: Engine, other: Engine) -> bool:
    with _opened(one) as first, _opened(other) as second:
        return list(first.iterdump()) == list(second.iterdump())


def _copy(source: Engine, target: Engine) -> None:
    """Copy a database in one transaction: a rename would part it from the WAL of whoever has it open."""
    with _opened(source) as pages, _opened(target) as into:
        pages.backup(into)


@contextlib.contextmanager
def _opened(engine: Engine) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(sqlite3.connect(_file(engine), timeout=60)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise PassingFailure(
            f"{describe_url(engine)}, while putting the sample into place: {error}.",
            next_step="check that disk and that no other program holds the file, then run the command again.",
        ) from error
