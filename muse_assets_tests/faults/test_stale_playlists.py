"""The daily job killed between files and Redis: playlists of yesterday on files of today find no wrong song.

Here: a process that deploys and refreshes, killed after any of its steps. Not here: a kill within a publish
or within a refresh (the tests beside this).
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from dataclasses import dataclass, replace
from datetime import date, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import dagster as dg
import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from muse_assets.catalog import Catalog, Program
from muse_assets.connections.databases import engine_for
from muse_assets.connections.redis_server import connect
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import read_index
from muse_assets.playlists.cache import read_ids
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.playlists.songs import SongKey, program_songs, trimmed
from muse_assets.publishing.backups import backups, is_intact
from muse_assets.publishing.deploying import deploy
from muse_assets.publishing.live import live_file
from muse_assets.sample import write_days
from muse_assets.server_search import search, stored_vector
from muse_assets.settings import Settings
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.conftest import Stores
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.redis_generations import PROCESSES
from muse_assets_tests.installations import Installation, install, write_small_catalog

# Three rows a song, one, and one a disc.
INDEXES = ("vibe", "title", "album_name")
DAY_ONE = date(2026, 1, 1)
SONGS = 150


def catalog_of(settings: Settings) -> Catalog:
    catalog = settings.load_catalog()
    return replace(catalog, indexes=tuple(catalog.index(name) for name in INDEXES))


def day_s_work(settings: Settings, day: date, steps: Connection | None = None) -> None:
    """Build all, deploy all, refresh all; each step's end is sent to `steps`, and waits for an answer."""
    faiss.omp_set_num_threads(1)  # in the child too: spinning threads cost it 10 s a day's work
    catalog, embeddings = catalog_of(settings), engine_for(settings.embedding_url())
    work, server = settings.work_directory(), settings.server_directory()
    built = [build_snapshot(embeddings, spec, work, day) for spec in catalog.indexes]
    for spec, snapshot in zip(catalog.indexes, built, strict=True):
        deploy(spec, snapshot.path, snapshot.manifest, server)
        if steps:
            steps.send(spec.name)
            steps.recv()
    playlists = engine_for(settings.playlist_url())
    with contextlib.closing(connect(settings.redis_address())) as client:
        for program in catalog.programs:
            refresh_program(embeddings, playlists, client, catalog, program, "song_tables")
            if steps:
                steps.send(program.id)
                steps.recv()


@dataclass(frozen=True)
class Search:
    """An installation as the search server sees it."""

    installed: Installation
    catalog: Catalog

    def songs(self, program: Program) -> frozenset[SongKey]:
        return program_songs(self.installed.playlists, program, "song_tables")

    def playlists(self) -> dict[str, list[int]]:
        """Key -> ids, as Redis holds them."""
        with contextlib.closing(connect(self.installed.settings.redis_address())) as client:
            return {
                program.ids_key(spec.name): read_ids(client, program, spec.name).tolist()
                for program in self.catalog.programs
                for spec in self.catalog.indexes
            }

    def require_no_wrong_song(self) -> int:
        """Every hit within a playlist is a song of its program, or a row that is gone; returns the hits."""
        found = 0
        embeddings, held = self.installed.embeddings, self.playlists()
        for spec in self.catalog.indexes:
            live = self.installed.server / spec.live_file
            query = stored_vector(embeddings, spec, max(self.installed.table_ids(spec.name)) + 1)
            for program in self.catalog.programs:
                width = len(spec.song_key)
                songs = {song[:width] for song in self.songs(program)}
                ids = held[program.ids_key(spec.name)]
                answer = search(embeddings, spec, live, query, k=50, playlist_ids=as_ids(ids))
                for hit in answer.hits:
                    song = tuple(map(trimmed, hit.song_key))
                    assert song in songs or not song, f"{program.id} found {song} in {spec.name}"
                    found += 1
        return found

    def require_files_complete(self) -> None:
        """Every live file and the newest backup have the bytes of their facts."""
        for spec in self.catalog.indexes:
            live = live_file(self.installed.server, spec)
            assert live is not None and not live.damaged
            newest = next(iter(backups(spec, self.installed.server)), None)
            assert newest is None or is_intact(newest)

    def require_fresh(self) -> None:
        """Files hold the tables' rows, and the playlists every row of their songs."""
        held = self.playlists()
        for spec in self.catalog.indexes:
            rows = self.installed.table_ids(spec.name)
            assert set(list_ids(read_index(self.installed.server / spec.live_file)).tolist()) == rows
            for program in self.catalog.programs:
                assert set(held[program.ids_key(spec.name)]) <= rows
        assert not self.installed.temp_files()


def as_ids(ids: list[int]) -> NDArray[np.int64]:
    return np.array(ids, dtype=np.int64)


@pytest.mark.parametrize("stores", ["mariadb-redis"], indirect=True)
def test_a_kill_between_files_and_playlists(
    stores: Stores, injecting: Injecting, times: Times, tmp_path: Path
) -> None:
    installed = install(
        tmp_path / "home",
        dg.DagsterInstance.ephemeral(),
        embedding_db_url=stores.embedding_url,
        playlist_db_url=stores.playlist_url,
        redis_url=stores.redis_url,
        songs=SONGS,
        only=INDEXES,
        catalog=write_small_catalog(tmp_path / "catalog.toml"),
    )
    world = Search(installed, catalog_of(installed.settings))
    installed.work.mkdir()
    for spec in world.catalog.indexes:
        train_cluster(installed.embeddings, spec, installed.work / spec.cluster_file)
    day_s_work(installed.settings, DAY_ONE)
    world.require_fresh()
    choice = random.Random(26)
    steps = len(world.catalog.indexes) + len(world.catalog.programs)
    stale, hits = 0, 0
    with injecting("26", "SIGKILL between the files' deploys and the playlists") as ledger:
        for number in range(1, 1 + times(2, 40)):
            day = DAY_ONE + timedelta(days=number)
            write_days(
                installed.embeddings,
                installed.playlists,
                world.catalog,
                days=1,
                inserts=6,
                deletes=1,
                today=day,
            )
            with ledger.injection(day):
                before = world.playlists()
                kill_after(choice.randrange(1, steps), choice.random() * 0.02, installed.settings, day)
                world.require_files_complete()
                hits += world.require_no_wrong_song()
                left = world.playlists()
                with ledger.recovery():
                    day_s_work(installed.settings, day)
                after = world.playlists()
                assert all(left[key] in (before[key], after[key]) for key in left)
                stale += left != after
                world.require_fresh()
                world.require_no_wrong_song()
        ledger.note = f"{stale} left stale playlists; {hits:,} hits searched in them"
        assert stale, "no kill left a stale playlist"


def kill_after(steps: int, seconds: float, settings: Settings, day: date) -> None:
    """SIGKILL a process that does the day's work, so long after the end of so many of its steps.

    It waits after each step, the last one too, so that it cannot end before it is killed.
    """
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=day_s_work, args=(settings, day, there))
    process.start()
    for _ in range(steps):
        assert here.poll(60), "the day's work does not get on"
        here.recv()
        here.send("go on")
    time.sleep(seconds)
    process.kill()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL, "it was not killed"
