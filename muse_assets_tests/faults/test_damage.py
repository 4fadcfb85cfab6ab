"""Damage on disk: every kind in every file is found before the file is used, named, and repaired by command.

Here: flipped bits, zeroed pages, truncations. Not here: faults while a file is being written
(`test_publish_system_calls.py`).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from click.testing import CliRunner

from muse_assets.catalog import IndexSpec
from muse_assets.cli import cli
from muse_assets.cli.inspecting import findings
from muse_assets.durable_files import file_sha256
from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.publishing.deploying import deploy, rollback
from muse_assets.publishing.live import live_file
from muse_assets.publishing.reloading import reload_server
from muse_assets.sealed_json import read_sealed
from muse_assets.settings import Settings
from muse_assets.snapshots.cluster import load_cluster
from muse_assets.snapshots.store import read_state, snapshots
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.installations import DAY_ONE, DAY_THREE, DAY_TWO, Installation, install

PAGE = 4096
INDEX = "title"


@dataclass(frozen=True)
class Home:
    """A copy of an installation's files, and the settings that lead there."""

    settings: Settings
    spec: IndexSpec

    @property
    def server(self) -> Path:
        return self.settings.server_directory()

    @property
    def work(self) -> Path:
        return self.settings.work_directory()

    def bad(self) -> set[Path]:
        return {found.path for found in findings(self.settings, self.spec) if found.state != "ok"}

    def contents(self) -> set[tuple[str, str]]:
        """Name -> content of the index files; backups by content alone."""
        return {(path.name, file_sha256(path)) for path in self.settings.root.rglob("muse_*.index")}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Installation]:
    """Three days of one index: live file, fallback, backups, snapshots, facts; and its Dagster instance."""
    home, databases = tmp_path_factory.mktemp("template"), tmp_path_factory.mktemp("databases")
    (home / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(home / "dagster")) as instance:
        urls = {name: f"sqlite:///{databases / name}.sqlite" for name in ("embeddings", "playlists")}
        installed = install(
            home,
            instance,
            embedding_db_url=urls["embeddings"],
            playlist_db_url=urls["playlists"],
            redis_url=valkey_url,
            only=[INDEX],
        )
        installed.rebuild(INDEX, DAY_ONE)
        table = installed.catalog.index(INDEX).table
        for day in (DAY_TWO, DAY_THREE):
            installed.execute(f"DELETE FROM {table} WHERE idx = (SELECT MAX(idx) FROM {table})")
            assert installed.build(INDEX, day).success
            assert installed.deploy(INDEX).success
        yield installed


def copied(template: Installation, to: Path) -> Home:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(template.settings.root, to)
    settings = template.with_settings(home=to, server_dir=to / "server").settings
    return Home(settings, settings.load_catalog().index(INDEX))


def flip_a_bit(content: bytearray, choose: random.Random) -> None:
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)


def zero_a_page(content: bytearray, choose: random.Random) -> None:
    start = choose.randrange(len(content)) // PAGE * PAGE
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))


def truncate(content: bytearray, choose: random.Random) -> None:
    del content[choose.randrange(len(content)) :]


def harm(path: Path, kind: Callable[[bytearray, random.Random], None], choose: random.Random) -> None:
    """Change the file in place, as a failing disk does: whatever shares its inode is harmed too."""
    content = bytearray(path.read_bytes())
    while content == path.read_bytes():
        kind(content, choose)
    path.write_bytes(content)


KINDS = (flip_a_bit, zero_a_page, truncate)
PATTERNS = {
    "cluster": "work/muse_*_cluster.index",
    "snapshot": "work/muse_*_2*.index",
    "live file": "server/muse_title.index",
    "fallback": "server/muse_title_backup.index",
    "backup": "server/.backups/title/*.index",
    "snapshot's manifest": f"work/.manifests/title/{'?' * 64}.json",
    "live manifest": "server/.manifests/title/*.json",
    "row facts": "work/.manifests/title/*.rows.npz",
    "cluster's facts": "work/.manifests/title/*.cluster.json",
}


@pytest.mark.parametrize("what", PATTERNS)
def test_damage_is_found_before_use(
    template: Installation, tmp_path: Path, injecting: Injecting, times: Times, what: str
) -> None:
    home, choose = copied(template, tmp_path / "home"), random.Random(what)
    assert home.bad() == set()
    with injecting("20", f"damaged {what}") as ledger:
        for n in range(times(9, 150)):
            kind, path = KINDS[n % 3], choose.choice(sorted(home.settings.root.glob(PATTERNS[what])))
            before, twins = path.read_bytes(), names_of(home, path)
            facts = what_is_said(home, path)
            harm(path, kind, choose)
            with ledger.injection(f"{kind.__name__} in {path.name}"):
                if what_is_said(home, path) != facts or facts is None:
                    named = home.bad()
                    assert named, "not named by verify"
                    assert named <= twins | names_of_content(home, path), f"verify names {named}"
                    refuse_to_use(home, what, path)
            path.write_bytes(before)
        assert home.bad() == set()


def what_is_said(home: Home, path: Path) -> object:
    """What the parser of small facts makes of them; None for an index, whose every byte counts.

    A flipped bit may change nothing that is read: 1e-05 becomes 1E-05, or a time stamp in the archive.
    """
    if path.suffix == ".npz":
        state = read_state(home.work, INDEX, path.name.split(".")[0])
        return state and [state.digests.columns().tolist(), state.rejected_idx.tolist()]
    return read_sealed(path) if path.suffix == ".json" else None


def names_of(home: Home, path: Path) -> set[Path]:
    """All names of the file's inode."""
    return {other for other in home.settings.root.rglob("*") if other.is_file() and other.samefile(path)}


def names_of_content(home: Home, facts: Path) -> set[Path]:
    """The index files that a manifest, row facts or cluster facts stand for."""
    sha256 = facts.name.split(".")[0]
    return {path for path in home.settings.root.rglob("*.index") if file_sha256(path) == sha256}


def refuse_to_use(home: Home, what: str, path: Path) -> None:
    """Everything that would read the damaged file refuses, in words that name it, or passes it over."""
    spec, server, work = home.spec, home.server, home.work
    if what in ("cluster", "cluster's facts"):
        with pytest.raises(PermanentFailure, match=spec.cluster_file):
            load_cluster(work / spec.cluster_file, spec)
    elif what in ("snapshot", "snapshot's manifest"):
        assert path not in {snapshot.path for snapshot in snapshots(work, spec)}
        assert path.stem not in {snapshot.manifest.sha256 for snapshot in snapshots(work, spec)}
    elif what == "row facts":
        assert read_state(work, INDEX, path.name.split(".")[0]) is None
    elif what == "live file":
        assert (live := live_file(server, spec)) is not None
        assert live.damaged
        newest = next(snapshots(work, spec))
        with pytest.raises(PermanentFailure, match="damaged or was edited"):
            deploy(spec, newest.path, newest.manifest, server)
        with pytest.raises(PermanentFailure, match="is damaged or was edited"):
            reload_server(server, [spec], hook="true", health=None)
    elif what == "backup":
        with pytest.raises(MuseError):
            rollback(spec, server, to=path.stem.rpartition("_")[2])


@pytest.mark.parametrize("what", PATTERNS)
def test_repair_restores_what_is_damaged(
    template: Installation,
    tmp_path: Path,
    injecting: Injecting,
    times: Times,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    choose = random.Random(what)
    with injecting("20", f"`muse repair` of a damaged {what}") as ledger:
        for n in range(times(1, 12)):
            home = copied(template, tmp_path / f"home_{n}")
            live = file_sha256(home.server / home.spec.live_file)
            path = choose.choice(sorted(home.settings.root.glob(PATTERNS[what])))
            # Truncation: a flipped bit may be harmless in facts.
            harm(path, truncate if path.suffix != ".index" else KINDS[n % 3], choose)
            with ledger.injection(path.name):
                assert home.bad(), "not found"
                monkeypatch.setenv("DAGSTER_HOME", str(home.settings.root / "dagster"))
                for name in ("home", "server_dir", "embedding_db_url", "playlist_db_url", "redis_url"):
                    value = getattr(home.settings, name)
                    shown = value.get_secret_value() if hasattr(value, "get_secret_value") else value
                    monkeypatch.setenv(f"MUSE_{name.upper()}", str(shown))
                with ledger.recovery():
                    done = CliRunner().invoke(cli, ["repair", INDEX])
                assert done.exit_code == 0, done.output
                assert home.bad() == set()
                assert load_cluster(home.work / home.spec.cluster_file, home.spec).fingerprint
                if what not in ("cluster's facts",):
                    assert file_sha256(home.server / home.spec.live_file) == live
                assert list(home.settings.root.rglob("*.part")) == []


def test_arrays_of_row_facts_are_what_was_written(template: Installation) -> None:
    """What `what_is_said` compares is all there is."""
    [newest, *_] = snapshots(template.work, template.catalog.index(INDEX))
    state = read_state(template.work, INDEX, newest.manifest.sha256)
    assert state is not None
    assert np.array_equal(np.sort(state.digests.bucket), state.digests.bucket)
