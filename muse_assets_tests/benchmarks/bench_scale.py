"""How each part's cost grows: with the table, with what changed in it, with a file's bytes, with songs.

64-d vectors and 16-byte codes, so that the largest table fits the time. nlist is fixed, since the encoder
compares a row with every centroid: with `choose_nlist` a full build would grow to the 1.5 in its coarse part.
Training follows `choose_nlist`, which is what it costs. The tables fit the buffer pool: warm.
CPU-seconds are this process's; the server's own are not counted. Not here: memory (`bench_memory.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np

from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.publishing.deploying import deploy
from muse_assets.sample.tables import program_tables
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.table_state import read_table_state
from muse_assets_tests.benchmarks.bench_deploy import deploy_after, random_snapshot
from muse_assets_tests.benchmarks.bench_playlists import append_rows, refresh, write_program
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Series, begin, in_turn, less, measure
from muse_assets_tests.benchmarks.tables import (
    delete_embeddings,
    private_database,
    reembed,
    write_embeddings,
)
from muse_assets_tests.benchmarks.vectors import clustered
from muse_assets_tests.server_directories import SPEC as DEPLOYED
from muse_assets_tests.server_directories import Snapshot
from muse_assets_tests.servers import private_redis

SPEC = replace(CATALOG.index("vibe"), dimension=64, m=16, recall_gate=0.1)
_NLIST, _NLIST_OF_A_TRIAL = 1024, 64
_A_DAY = timedelta(days=1)
_SIZES = (100_000, 200_000, 400_000, 800_000, 1_600_000)
_NEW, _DELETED, _REEMBEDDED = 2_000, 200, 200
_CHANGES = (1_000, 4_000, 16_000, 64_000)
# A file of that many rows: a code of 64 bytes and an id of 8.
_BYTES_A_ROW = 72
_SONGS = (2_500, 5_000, 10_000, 20_000, 40_000)
_FIXED_SONGS = 20_000
_TRACKS_A_DISC, _ROWS_A_SONG = 12, 4
_PLAYLIST_ROWS = (100_000, 200_000, 400_000, 800_000)
# Of the cost of each: how it should grow, and the largest exponent that is so.
_EXPECTED: dict[str, tuple[str, float | None]] = {
    "train": ("1 to 0.5, by choose_nlist", 1.1),
    "full build": ("1", 1.1),
    "day with nothing new": ("1", 1.1),
    "daily sync": ("1, above a constant", 1.1),
    "the digest query of both": ("1", 1.1),
    "daily sync, the rest": ("1 in file bytes, above a constant", 0.9),
}
_FIRST = date(2026, 11, 1)
# Of a live file that was written within the last minute, its bytes alone tell that it is still the same.
_A_MINUTE = 61.0


def rows(scale: float) -> Iterator[Series]:
    """Tables, changes, files and playlists, each at several sizes."""
    with tempfile.TemporaryDirectory(prefix="muse_scale_") as folder:
        yield from _of_the_table(Path(folder), scale)
        yield from _of_the_file(Path(folder) / "files", scale)
        yield from _of_playlists(Path(folder) / "redis", scale)


# --- The table, and what changes in it


def _of_the_table(folder: Path, scale: float) -> Iterator[Series]:
    sizes = tuple(int(size * scale) for size in _SIZES)
    spec = replace(SPEC, nlist=_NLIST if scale == 1 else _NLIST_OF_A_TRIAL)
    work = folder / "work"
    found: list[dict[str, Cost]] = []
    with private_database(2048) as url:
        newest, day = 0, _FIRST
        for size in sizes:
            newest += _write(url, newest + 1, size - newest, day)
            if not found:
                measure(train, url, work, spec)
            costs = {
                "train": measure(train, url, folder / "trained", replace(spec, nlist=None)),
                "full build": measure(build, url, work, spec, day, True),
            }
            digest, unchanged = in_turn(3, (digest_table, (url, day)), (build, (url, work, spec, day)))
            newest += _change(url, newest, day + _A_DAY)
            (synced,) = in_turn(3, (build_beside, (url, work, spec, day + _A_DAY)))
            found.append(
                costs
                | {
                    "day with nothing new": unchanged,
                    "daily sync": synced,
                    "the digest query of both": digest,
                    "daily sync, the rest": less(synced, digest),
                }
            )
            day += 2 * _A_DAY
        for what, (expected, at_most) in _EXPECTED.items():
            costs_of = tuple(costs[what] for costs in found)
            yield Series(what, "rows of the table", sizes, costs_of, expected, at_most)
        yield _of_changes(url, work, spec, day, newest, scale)


def _of_changes(url: str, work: Path, spec: IndexSpec, day: date, newest: int, scale: float) -> Series:
    """Scattered rows, embedded anew a day."""
    measure(build, url, work, spec, day)
    changes = tuple(int(count * scale) for count in _CHANGES)
    costs = []
    for count in changes:
        day += _A_DAY
        changed = np.random.default_rng(count).choice(newest, count, replace=False) + 1
        reembed(url, spec, np.sort(changed), seed=count)
        digest, synced = measure(digest_table, url, day), measure(build, url, work, spec, day)
        costs.append(less(synced, digest))
    what = f"daily sync of {newest:,} rows, the rest"
    return Series(
        what, "rows embedded anew, scattered", changes, tuple(costs), "1, above a constant", 1.1, per=1000
    )


def _write(url: str, first: int, count: int, day: date) -> int:
    return write_embeddings(
        url, SPEC, [clustered(count, SPEC.dimension, seed=first)], first_idx=first, created_at=_noon(day)
    )


def _change(url: str, newest: int, day: date) -> int:
    """A day's new, deleted and re-embedded rows; how many are new."""
    touched = np.random.default_rng(newest).choice(newest, _DELETED + _REEMBEDDED, replace=False) + 1
    delete_embeddings(url, SPEC, touched[:_DELETED])
    reembed(url, SPEC, touched[_DELETED:])
    return _write(url, newest + 1, _NEW, day)


def train(url: str, work: Path, spec: IndexSpec) -> Facts:
    """Sample the table and train."""
    engine = engine_for(url)
    begin()
    trained = train_cluster(engine, spec, work / spec.cluster_file)
    return {"nlist": trained.nlist}


def digest_table(url: str, day: date) -> Facts:
    """The aggregate query, every row of the table in it."""
    begin()
    state = read_table_state(engine_for(url), SPEC, _noon(day))
    return {"buckets": len(state.digests.bucket)}


def build(url: str, work: Path, spec: IndexSpec, day: date, full: bool = False) -> Facts:
    """A day's snapshot in the work directory."""
    engine = engine_for(url)
    begin()
    built = build_snapshot(engine, spec, work, day, full=full)
    return {"mode": built.manifest.mode, "bytes": built.manifest.size}


def build_beside(url: str, work: Path, spec: IndexSpec, day: date) -> Facts:
    """A day's snapshot in a copy of the work directory."""
    with tempfile.TemporaryDirectory(dir=work.parent) as folder:
        copy = shutil.copytree(work, Path(folder) / "work")
        return build(url, copy, spec, day)


def _noon(day: date) -> datetime:
    return datetime.combine(day, datetime.min.time()) + timedelta(hours=12)


# --- A file


def _of_the_file(folder: Path, scale: float) -> Iterator[Series]:
    """Deploys over a live file of the same size that is older than a minute, as the day's is."""
    sizes = tuple(int(size * scale) * _BYTES_A_ROW for size in _SIZES)
    lanes = [_lane(folder / str(size), size) for size in sizes]
    for lane in lanes:
        for server in lane.servers:
            deploy(DEPLOYED, *lane.before, server)
    os.sync()
    time.sleep(_A_MINUTE)
    costs = []
    for lane in lanes:
        each = [measure(deploy_after, lane.after, server) for server in lane.servers]
        costs.append(sorted(each, key=lambda cost: cost.wall)[len(each) // 2])
    yield Series("deploy", "bytes of the file", sizes, tuple(costs), "1, above its fsyncs", 1.1, per=10**9)


@dataclass(frozen=True)
class _Lane:
    before: Snapshot
    after: Snapshot
    servers: tuple[Path, ...]


def _lane(folder: Path, size: int) -> _Lane:
    """Random bytes: a deploy reads no vector. A directory a deploy, since what it leaves is a new file."""
    servers = tuple(folder / f"server_{number}" for number in range(3))
    for server in servers:
        server.mkdir(parents=True)
    before, after = (
        random_snapshot(folder / "work", seed, size, (_FIRST + seed * _A_DAY).isoformat())
        for seed in range(2)
    )
    return _Lane(before, after, servers)


# --- Playlists


def _of_playlists(folder: Path, scale: float) -> Iterator[Series]:
    """Programs of whole discs, so that as many rows are fetched from a table of any size."""
    programs = f"{len(CATALOG.programs)} playlists x {len(CATALOG.indexes)} indexes"
    sizes = tuple(int(size * scale) for size in _PLAYLIST_ROWS)
    by_rows, by_songs = [], []
    asked = tuple(int(songs * scale) // _TRACKS_A_DISC * _TRACKS_A_DISC for songs in _SONGS)
    with private_database(4096) as url:
        before = 0
        with private_redis(folder / "by_rows") as redis_url:
            for size in sizes:
                append_rows(url, before + 1, size)
                before = size
                _write_programs(url, int(_FIXED_SONGS * scale), size)
                by_rows += in_turn(3, (refresh, (url, redis_url)))
        # Of its own: a playlist that shrinks to a quarter is refused.
        with private_redis(folder / "by_songs") as redis_url:
            for songs in asked:
                _write_programs(url, songs, before)
                by_songs += in_turn(3, (refresh, (url, redis_url)))
    what = f"{programs} x {int(_FIXED_SONGS * scale):,} songs"
    yield Series(what, "rows of each table", sizes, tuple(by_rows), "0", 0.3)
    what = f"{programs}, {before:,} rows each"
    yield Series(what, "songs of a program", asked, tuple(by_songs), "1, above a constant", 1.1, per=1000)


def _write_programs(url: str, songs: int, table_rows: int) -> None:
    discs = table_rows // (_ROWS_A_SONG * _TRACKS_A_DISC)
    random = np.random.default_rng(1)
    with engine_for(url).begin() as connection:
        for table in program_tables(CATALOG.programs).songs.values():
            chosen = random.choice(discs, songs // _TRACKS_A_DISC, replace=False)
            tracks = chosen[:, None] * _TRACKS_A_DISC + np.arange(_TRACKS_A_DISC)
            write_program(connection, table, tracks.ravel())
