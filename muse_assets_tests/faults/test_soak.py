"""Four hundred days of the daily job, day by day: nothing drifts, leaks or piles up.

Here: all indexes and programs on one installation under a moving clock. Not here: faults (the tests beside
this), or one index's histories (`test_law.py`).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path
from statistics import mean, median

import dagster as dg
import pytest
import time_machine
from sqlalchemy import text

from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.connections.redis_server import connect
from muse_assets.durable_files import file_sha256
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import read_index
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.publishing.deploying import deploy
from muse_assets.sample import write_days
from muse_assets.seoul_time import SEOUL, seoul_today
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.store import prune
from muse_assets_tests.conftest import Stores
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.installations import Installation, hurry_retries, install, write_small_catalog

DAY_ONE = date(2026, 1, 1)
SONGS = 120
RETRAIN_DAYS = 30
DAGSTER_DAYS = 40
FULL_DAYS = 50
# Newest idx that no day deletes: the sample's late rows are still to come among them.
SPARED = 10

# Eight days' snapshots with two files of facts each, as many backups and one file of facts each; the
# cluster, the live and the fallback file with theirs, and three locks.
FILES_AN_INDEX = 48
# Eight snapshots, eight backups, live file and cluster.
LIVE_SIZES = 20
# A snapshot's queries and their neighbors, and a cluster's queries: of tables as small as these, as large as
# the files.
FACTS_AN_INDEX = 9 * 800_000


@dataclass(frozen=True)
class Footprint:
    """What a day leaves behind. storage: bytes of the Dagster instance. memory: resident bytes."""

    descriptors: int
    memory: int
    files: int
    bytes: int
    storage: int


@dataclass(frozen=True)
class Catalog2026:
    """The installation, and how many rows each table has at the end of a day."""

    installed: Installation
    dagster_home: Path
    redis_url: str
    rows: dict[str, int]

    @property
    def specs(self) -> tuple[IndexSpec, ...]:
        return self.installed.catalog.indexes

    def write_day(self) -> None:
        """Two new songs, late rows, re-embeddings; as many deletions as keep the tables' sizes."""
        installed = self.installed
        write_days(installed.embeddings, installed.playlists, installed.catalog, days=1, inserts=2, deletes=0)
        choice = random.Random(f"{seoul_today()}")
        for spec in self.specs:
            idx = sorted(id_ + 1 for id_ in installed.table_ids(spec.name))
            gone = choice.sample(idx[:-SPARED], max(0, len(idx) - self.rows[spec.name]))
            if gone:
                installed.execute(f"DELETE FROM {spec.table} WHERE idx IN ({', '.join(map(str, gone))})")

    def train(self) -> None:
        for spec in self.specs:
            train_cluster(self.installed.embeddings, spec, self.installed.work / spec.cluster_file)

    def run_directly(self) -> None:
        """The day's work as the assets do it, without Dagster's 5 s a day."""
        installed, today = self.installed, seoul_today()
        for spec in self.specs:
            built = build_snapshot(installed.embeddings, spec, installed.work, today)
            deploy(spec, built.path, built.manifest, installed.server)
            prune(installed.work, spec, today=today)
        client = connect(self.redis_url)
        for program in installed.catalog.programs:
            refresh_program(
                installed.embeddings, installed.playlists, client, installed.catalog, program, "song_tables"
            )
        client.close()

    def run_by_dagster(self) -> None:
        """The runs that schedule and sensor launch in a day: one an index, deploy and program."""
        installed, today = self.installed, seoul_today().isoformat()
        for spec in self.specs:
            for ran in (installed.build(spec.name, today), installed.deploy(spec.name)):
                assert ran.success, ran.failure
        for program in installed.catalog.programs:
            ran = installed.cache(program.id)
            assert ran.success, ran.failure

    def require_no_drift(self) -> None:
        """The live files hold the tables' rows, and Redis the programs' ids among them."""
        installed = self.installed
        for spec in self.specs:
            ids = [int(id_) for id_ in list_ids(read_index(installed.server / spec.live_file))]
            assert len(ids) == len(set(ids)), f"{spec.name}: an id twice"
            facts = list((installed.work / ".manifests" / spec.name).glob("*.cluster.json"))
            assert len(facts) == 1, f"{spec.name}: replaced clusters left {len(facts) - 1} files of facts"
            assert set(ids) == installed.table_ids(spec.name), f"{spec.name} drifted from {spec.table}"
        values = installed.redis_values()
        assert len(values) == len(CATALOG.programs) * (len(self.specs) + 2)
        for program in CATALOG.programs:
            refreshed = float(values[program.update_key] or b"0")
            assert datetime.fromtimestamp(refreshed, SEOUL).date() == seoul_today()
            for spec in self.specs:
                cached = set(json.loads(values[program.ids_key(spec.name)] or b""))
                assert cached and cached <= installed.table_ids(spec.name)
        assert not installed.temp_files()

    def require_full_equals_incremental(self, scratch: Path) -> None:
        """A full build of the day, from the same cluster in an empty directory, has the live file's bytes."""
        installed = self.installed
        for spec in self.specs:
            full = build_snapshot(
                installed.embeddings,
                spec,
                scratch,
                seoul_today(),
                cluster_path=installed.work / spec.cluster_file,
            )
            assert full.manifest.mode in ("full", "unchanged")
            assert full.manifest.sha256 == file_sha256(installed.server / spec.live_file), spec.name

    def footprint(self) -> Footprint:
        installed = self.installed
        ours = [path for folder in (installed.work, installed.server) for path in folder.rglob("*")]
        # Snapshots, live files and backups share inodes.
        sizes = {path.stat().st_ino: path.stat().st_size for path in ours if path.is_file()}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Footprint(
            descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
            memory=pages * os.sysconf("SC_PAGE_SIZE"),
            files=sum(path.is_file() for path in ours),
            bytes=sum(sizes.values()),
            storage=sum(path.stat().st_size for path in self.dagster_home.rglob("*") if path.is_file()),
        )


@pytest.fixture
def catalog_2026(tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog2026]:
    hurry_retries(monkeypatch)
    home = tmp_path / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home), overrides={"telemetry": {"enabled": False}}) as instance:
        installed = install(
            tmp_path / "home",
            instance,
            embedding_db_url=stores.embedding_url,
            playlist_db_url=stores.playlist_url,
            redis_url=stores.redis_url,
            songs=SONGS,
            catalog=write_small_catalog(tmp_path / "catalog.toml"),
        )
        with installed.embeddings.connect() as connection:
            rows = {
                spec.name: int(connection.execute(text(f"SELECT COUNT(*) FROM {spec.table}")).scalar_one())
                for spec in installed.catalog.indexes
            }
        installed.work.mkdir()
        yield Catalog2026(installed, home, stores.redis_url, rows)


@contextmanager
def afternoon_of(day: date) -> Iterator[None]:
    """16:58 of that day in Seoul: retention, partitions and Dagster all read this process's clock."""
    with time_machine.travel(datetime.combine(day, time(16, 58), SEOUL).timestamp(), tick=True):
        yield


@pytest.mark.parametrize("stores", ["mariadb-redis"], indirect=True)
def test_four_hundred_days(
    catalog_2026: Catalog2026, injecting: Injecting, times: Times, tmp_path: Path
) -> None:
    days = times(9, 400)
    left: list[Footprint] = []
    storage: list[int] = []
    with injecting(
        "SOAK", f"days of {len(CATALOG.indexes)} indexes and {len(CATALOG.programs)} programs"
    ) as ledger:
        for number in range(days):
            day = DAY_ONE + timedelta(days=number)
            with afternoon_of(day), ledger.injection(day), ledger.recovery():
                if number:
                    catalog_2026.write_day()
                if number % RETRAIN_DAYS == 0 or number == days - 2:
                    catalog_2026.train()
                before = catalog_2026.footprint().storage
                if number % DAGSTER_DAYS == DAGSTER_DAYS - 1 or number == days // 2:
                    catalog_2026.run_by_dagster()
                    storage.append(catalog_2026.footprint().storage - before)
                else:
                    catalog_2026.run_directly()
                catalog_2026.require_no_drift()
                if number % FULL_DAYS == FULL_DAYS - 1 or number == days - 1:
                    catalog_2026.require_full_equals_incremental(tmp_path / "full" / day.isoformat())
            left.append(catalog_2026.footprint())
        ledger.note = note_of(left, storage)
        with ledger.injection("footprint"):
            live = [catalog_2026.installed.server / spec.live_file for spec in catalog_2026.specs]
            require_flat(left, sum(path.stat().st_size for path in live), long=days > 100)


def require_flat(left: list[Footprint], live_bytes: int, *, long: bool) -> None:
    """Nothing piles up: not in the directories, nor in descriptors, nor (over a long time) in memory."""
    first, last = windows(left)
    assert max(day.files for day in left) <= FILES_AN_INDEX * len(CATALOG.indexes)
    assert max(day.bytes for day in left) <= LIVE_SIZES * live_bytes + FACTS_AN_INDEX * len(CATALOG.indexes)
    assert max(day.descriptors for day in last) <= max(day.descriptors for day in first) + 2
    if long:
        assert mean(day.memory for day in last) <= 1.15 * mean(day.memory for day in first)


def windows(left: list[Footprint]) -> tuple[list[Footprint], list[Footprint]]:
    """An eighth of the days after the first one, in which caches fill, and the last one."""
    days = max(1, len(left) // 8)
    return left[days : 2 * days], left[-days:]


def note_of(left: list[Footprint], storage: list[int]) -> str:
    first, last = windows(left)
    memory, disk, files = (
        " -> ".join(f"{mean(getattr(day, name) for day in some) / unit:.0f}" for some in (first, last))
        for name, unit in (("memory", 1e6), ("bytes", 1e6), ("files", 1))
    )
    return (
        f"RSS {memory} MB, disk {disk} MB, {files} files, {last[-1].descriptors} descriptors; "
        f"Dagster {median(storage) / 1e6:.2f} MB a day"
    )
