"""Two runs at once on one index, a retrain underneath a build, a parent that is gone: never a wrong file.

Here: races of real processes, and damage to what a build would build upon. Not here: two publishers alone
(`test_readers.py`), or a second daemon (`test_sensor.py`).
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from muse_assets.connections.databases import engine_for
from muse_assets.durable_files import file_sha256
from muse_assets.ivfpq.contents import trained_fingerprint
from muse_assets.ivfpq.files import read_index
from muse_assets.manifest import identify, manifest_path
from muse_assets.seoul_time import seoul_today
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.store import state_path
from muse_assets_tests.embedding_rows import SPEC as SMALL
from muse_assets_tests.embedding_rows import payloads_of, put_rows, unit_vectors
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting, Ledger
from muse_assets_tests.faults.on_disk_instance import (
    INDEX,
    SPEC,
    Lane,
    daily,
    deploy,
    open_lane,
    rebuild,
    rounds,
)
from muse_assets_tests.faults.warm_process import Child, Step

# What a run that lost says: the lock is taken, or the file it was about to replace or copy was changed.
CONFLICTS = ("Another process is at work here", "was changed by someone else", "was built anew while")
ROWS = 600
MONTH = date(2026, 11, 1)


@pytest.fixture
def lane(tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    urls = {name: f"sqlite:///{tmp_path / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")}
    with open_lane(tmp_path, monkeypatch, redis_url=valkey_url, **urls) as made:
        yield made


@dataclass(frozen=True)
class Race:
    """Two runs, and whether a new snapshot has to wait for them."""

    name: str
    first: Callable[[], tuple[Step, ...]]
    second: Callable[[], tuple[Step, ...]]
    snapshot_first: bool = False


def yesterday() -> tuple[Step, ...]:
    day = (seoul_today() - timedelta(days=1)).isoformat()
    return (Step("daily", (f"{INDEX}/index",), day),)


RACES = [
    Race("two builds", daily, daily),
    Race("two deploys", deploy, deploy, snapshot_first=True),
    Race("two full builds", lambda: daily(full=True), lambda: daily(full=True)),
    Race("two trainings", lambda: rebuild("cluster"), lambda: rebuild("cluster")),
    Race("builds of two days", daily, yesterday),
    Race("build and deploy", daily, deploy, snapshot_first=True),
]


def race(lane: Lane, first: tuple[Step, ...], second: tuple[Step, ...], lead: float) -> tuple[Child, Child]:
    """Both runs, ended; the second began `lead` seconds after the first."""
    at = time.monotonic() + 0.1
    children = lane.warm.start(*first, at=at), lane.warm.start(*second, at=at + lead)
    for child in children:
        child.wait()
    return children


def assert_one_won(children: tuple[Child, Child]) -> bool:
    """At most one is red, by a conflict it names; whether the two met."""
    reds = [child.outcomes[-1]["failure"] for child in children if child.status()]
    assert len(reds) < 2, reds
    for red in reds:
        assert any(words in red for words in CONFLICTS), red
        assert f"{INDEX}" in red
        assert "Next: " in red
    return bool(reds) or any(outcome["retries"] for child in children for outcome in child.outcomes)


def assert_settles(ledger: Ledger, lane: Lane) -> None:
    """A clean run gives what a full rebuild gives."""
    with ledger.recovery():
        lane.run(*daily(), *deploy())
    assert file_sha256(lane.live) == lane.reference()
    assert not lane.installed.temp_files()


def test_of_two_runs_at_once_one_wins(injecting: Injecting, times: Times, lane: Lane) -> None:
    choose = random.Random(19)
    met = 0
    with injecting("19", "two runs of one index at once") as ledger:
        for n in rounds(times(6, 120), 240):
            pair = RACES[n % len(RACES)]
            known = {file_sha256(lane.live)}
            lane.toggle()
            if pair.snapshot_first:
                lane.build()
            with ledger.injection(f"{n}: {pair.name}"):
                children = race(
                    lane, pair.first(), pair.second(), choose.choice([0.0, choose.uniform(0, 0.2)])
                )
                met += assert_one_won(children)
                lane.assert_whole(known)
                if "training" in pair.name:
                    assert file_sha256(lane.cluster) == lane.reference_cluster()
                assert_settles(ledger, lane)
        ledger.note = f"{met} of them met at the lock"
        assert met, "no two of them met: nothing was proven"


def test_a_retrain_underneath_is_never_mixed_in(injecting: Injecting, times: Times, lane: Lane) -> None:
    choose = random.Random(23)
    lane.run(*rebuild("cluster", "index", "deployed"))  # of the present state: each retrain is of the other
    with injecting("23", "cluster retrained during and between builds") as ledger:
        for n in rounds(times(3, 60), 120):
            before = fingerprint(lane)
            lane.toggle()
            with ledger.injection(n):
                if n % 3 == 2:
                    lane.run(*rebuild("cluster"))
                    assert mode_of(lane, daily()) == "full"
                else:
                    children = race(lane, daily(full=True), rebuild("cluster"), choose.uniform(-0.1, 0.3))
                    assert [child.status() for child in children] == [0, 0], children[0].log[-2000:]
                    built = lane.installed.work / SPEC.snapshot_file(seoul_today())
                    manifest = identify(lane.installed.work, INDEX, built)
                    assert manifest
                    assert trained_fingerprint(read_index(built)) == manifest.cluster
                    assert manifest.cluster in (before, fingerprint(lane))
                    if manifest.cluster != fingerprint(lane):
                        assert mode_of(lane, daily()) == "full"
                assert fingerprint(lane) != before, "the retrain changed nothing"
                assert_settles(ledger, lane)


def fingerprint(lane: Lane) -> str:
    found: str = trained_fingerprint(read_index(lane.cluster))
    return found


def mode_of(lane: Lane, steps: tuple[Step, ...]) -> str:
    """How the build that these steps make was made."""
    lane.run(*steps)
    manifest = identify(lane.installed.work, INDEX, lane.installed.work / SPEC.snapshot_file(seoul_today()))
    assert manifest
    return manifest.mode


def test_a_damaged_parent_means_a_full_build(injecting: Injecting, times: Times, tmp_path: Path) -> None:
    choose = random.Random(22)
    spec = replace(SMALL, recall_gate=0.3)
    engine, good = engine_for(f"sqlite:///{tmp_path / 'e.sqlite'}"), tmp_path / "good"
    put_rows(engine, spec, payloads_of(unit_vectors(ROWS)))
    train_cluster(engine, spec, good / spec.cluster_file)
    parent = build_snapshot(engine, spec, good, MONTH)
    put_rows(engine, spec, payloads_of(unit_vectors(40, seed=3), ROWS - 20))
    full = build_snapshot(
        engine,
        spec,
        tmp_path / "full",
        MONTH + timedelta(days=1),
        cluster_path=good / spec.cluster_file,
        full=True,
    ).path.read_bytes()

    def files(work: Path) -> dict[str, Path]:
        sha256 = parent.manifest.sha256
        return {
            "file": work / parent.path.name,
            "manifest": manifest_path(work, spec.name, sha256),
            "row facts": state_path(work, spec.name, sha256),
        }

    # Without harm the day is incremental: else none of this would show anything.
    work = tmp_path / "work"
    shutil.copytree(good, work)
    assert build_snapshot(engine, spec, work, MONTH + timedelta(days=1)).manifest.mode == "incremental"
    with injecting("22", "previous snapshot, its manifest or its row facts damaged") as ledger:
        for n in rounds(times(30, 1500), 90):
            shutil.rmtree(work)
            shutil.copytree(good, work)
            name, path = list(files(work).items())[n % 3]
            how = HARMS[n // 3 % len(HARMS)]
            with ledger.injection(f"{n}: {name} {how.__name__}"):
                how(path, choose)
                with ledger.recovery():
                    built = build_snapshot(engine, spec, work, MONTH + timedelta(days=1))
                assert built.path.read_bytes() == full
                # A flipped bit may lie where no reader looks, as in a zip's time stamps.
                assert built.manifest.mode == "full" or (how, name) == (flip, "row facts")
                assert not list(work.rglob(".*.part"))


def remove(path: Path, _choose: random.Random) -> None:
    path.unlink()


def truncate(path: Path, choose: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: choose.randrange(len(content))])


def flip(path: Path, choose: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def zero(path: Path, choose: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at, length = choose.randrange(len(content) // 2), choose.randrange(1, len(content) // 2)
    content[at : at + length] = bytes(length)
    # Where zeros were before, nothing is damaged.
    path.write_bytes(content if content != path.read_bytes() else content[:-1])


def replace_with_garbage(path: Path, choose: random.Random) -> None:
    path.write_bytes(choose.randbytes(choose.randrange(1, 4096)))


HARMS: list[Callable[[Path, random.Random], None]] = [remove, truncate, flip, zero, replace_with_garbage]
