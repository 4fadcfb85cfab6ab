"""One index of a whole installation on an instance on disk, run by processes that can be killed.

Here: its table's two states, the runs there are, and what has to hold of its files at any moment. Not here:
injecting anything (the tests).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pytest
import redis

from muse_assets.catalog import CATALOG
from muse_assets.durable_files import file_sha256
from muse_assets.manifest import identify
from muse_assets.playlists.ids import index_ids
from muse_assets.playlists.songs import program_songs
from muse_assets.publishing.backups import backups, is_intact
from muse_assets.seoul_time import seoul_today
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.faults.warm_process import Child, Step, WarmProcess, warm_process
from muse_assets_tests.installations import Installation, environment_of, install

INDEX = "artist"
SPEC = CATALOG.index(INDEX)
PROGRAM = CATALOG.programs[0]
KEYS = [PROGRAM.ids_key(spec.name) for spec in CATALOG.indexes]


@dataclass
class Lane:
    """One index of a whole installation, whose table goes back and forth between two states.

    rows: idx of a row of the program's playlist that state b lacks, of one whose vector it replaces, and of
    the one whose vector it takes. references: (cluster sha256, state) -> sha256 of a full build that was
    never killed.
    """

    installed: Installation
    warm: WarmProcess
    scratch: Path
    rows: tuple[int, int, int]
    state: str = "a"
    references: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def cluster(self) -> Path:
        return self.installed.work / SPEC.cluster_file

    @property
    def live(self) -> Path:
        return self.installed.server / SPEC.live_file

    def toggle(self) -> None:
        """State b lacks a row of the program's playlist and has another row's vector replaced."""
        table, (gone, replaced, copied) = SPEC.table, self.rows
        if self.state == "a":
            vector = SPEC.embedding_column
            self.installed.execute(
                f"CREATE TABLE IF NOT EXISTS kept_rows AS SELECT * FROM {table}"
                f" WHERE idx IN ({gone}, {replaced})",
                f"UPDATE {table} SET {vector} = (SELECT v FROM"
                f" (SELECT {vector} AS v FROM {table} WHERE idx = {copied}) AS c) WHERE idx = {replaced}",
                f"DELETE FROM {table} WHERE idx = {gone}",
            )
        else:
            self.installed.execute(
                f"DELETE FROM {table} WHERE idx IN ({gone}, {replaced})",
                f"INSERT INTO {table} SELECT * FROM kept_rows",
            )
        self.state = "b" if self.state == "a" else "a"

    def run(self, *steps: Step) -> Child:
        """A clean run of these steps, in a process of its own; fails the test unless all succeed."""
        child = self.warm.start(*steps)
        assert child.wait() == 0, (
            child.outcomes[-1]["failure"] if child.result.exists() else child.log[-2000:]
        )
        return child

    def build(self) -> None:
        """A snapshot of the table as it is, for a deploy to be killed."""
        build_snapshot(self.installed.embeddings, SPEC, self.installed.work, seoul_today())

    def reference(self) -> str:
        """The digest of a full build in a folder of its own with the present cluster, never killed."""
        key = file_sha256(self.cluster), self.state
        if key not in self.references:
            shutil.rmtree(self.scratch, ignore_errors=True)
            built = build_snapshot(
                self.installed.embeddings,
                SPEC,
                self.scratch,
                seoul_today(),
                cluster_path=self.cluster,
                full=True,
            )
            self.references[key] = built.manifest.sha256
        return self.references[key]

    def reference_cluster(self) -> str:
        shutil.rmtree(self.scratch, ignore_errors=True)
        return train_cluster(self.installed.embeddings, SPEC, self.scratch / "c.index").sha256

    def keys(self) -> tuple[bytes | None, ...]:
        """The program's seven values."""
        with redis.Redis.from_url(self.installed.settings.redis_address()) as client:
            return tuple(client.mget(KEYS))

    def assert_whole(self, known: set[str]) -> None:
        """What has to hold at any moment; known: digests that may be live."""
        server = self.installed.server
        live = identify(server, INDEX, self.live)
        assert live, f"{self.live} is not what was published"
        assert live.sha256 in known | {self.reference()}, "the live file is no full build's"
        assert identify(server, INDEX, server / SPEC.fallback_file), "the fallback is not what was published"
        kept = backups(SPEC, server)
        assert kept, "no backup"
        assert all(is_intact(backup) for backup in kept)


def daily(**config: bool) -> tuple[Step, ...]:
    name = f"{INDEX}/index"
    return (Step("daily", (name,), seoul_today().isoformat(), {name: config}),)


def deploy(**config: bool) -> tuple[Step, ...]:
    return (Step("deploy", (f"{INDEX}/deployed",), None, {f"{INDEX}/deployed": config}),)


def rebuild(*steps: str) -> tuple[Step, ...]:
    return (Step("rebuild", tuple(f"{INDEX}/{step}" for step in steps), seoul_today().isoformat()),)


def playlists() -> tuple[Step, ...]:
    return (Step("playlists", ("playlist_cache",), PROGRAM.id),)


def rounds(count: int, seconds: float) -> Iterator[int]:
    """0, 1, 2 ... below `count`; none begins after `seconds`: on a busy machine runs take thrice as long."""
    until = time.monotonic() + seconds
    for n in range(count):
        if n and time.monotonic() > until:
            return
        yield n


@contextlib.contextmanager
def open_lane(
    home: Path, monkeypatch: pytest.MonkeyPatch, *, redis_url: str, **database_urls: str
) -> Iterator[Lane]:
    """The lane with a live file and its backup; this process's environment names the installation too."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    environment = environment_of(home, redis_url=redis_url, **database_urls)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        installed = install(home, instance, redis_url=redis_url, songs=150, **database_urls)
        with warm_process(home / "children", environment) as warm:
            songs = program_songs(installed.playlists, PROGRAM, "song_tables")
            gone, replaced, copied = index_ids(installed.embeddings, SPEC, songs)[:3] - SPEC.id_offset
            made = Lane(installed, warm, home / "scratch", (int(gone), int(replaced), int(copied)))
            made.run(*rebuild("cluster", "index", "deployed"), *playlists())
            made.toggle()
            made.run(*daily(), *deploy())
            yield made
