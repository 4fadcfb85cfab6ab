"""Publishing: the server directory through deploys, roll-backs, kills, failing disks and bad reloads."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import random
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from muse_assets import durable_files
from muse_assets.failures import Conflict, MuseError, PassingFailure, PermanentFailure
from muse_assets.manifest import read_manifest, write_manifest
from muse_assets.publishing.backups import Retention, backups, prune
from muse_assets.publishing.deploying import deploy, rollback
from muse_assets.publishing.live import live_file
from muse_assets.publishing.loaded import loaded_contents
from muse_assets.publishing.reloading import ReloadFailed, reload_server
from muse_assets.publishing.verifying import verify
from muse_assets_tests.server_directories import (
    SPEC,
    Snapshot,
    assert_sound,
    contents,
    ended,
    fallback,
    flip_a_byte,
    in_child,
    live,
    put,
    sha,
    snapshot,
    snapshot_of,
    temps,
    trained_index,
)

LYRICS = replace(SPEC, name="lyrics")


def flat_index(seed: int) -> Any:
    index = faiss.IndexFlatL2(16)
    index.add(np.random.default_rng(seed).random((400, 16), dtype=np.float32))
    return index


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    return folder


# --- deploys


def test_the_first_deploy_gives_the_server_a_live_file_and_a_second_chance(work: Path, server: Path) -> None:
    first = snapshot(work, 1)
    done = put(server, first)
    assert (done.sha256, done.partition, done.size) == (first[1].sha256, "2026-11-22", first[1].size)
    assert (done.replaced_sha256, done.backup, done.already_live) == (None, None, False)
    assert live(server) == fallback(server) == first[1].sha256
    assert faiss.read_index(str(server / SPEC.live_file)).ntotal == 400
    assert read_manifest(server, SPEC.name, first[1].sha256) == first[1]
    assert_sound(server)


def test_the_replaced_file_is_backup_and_fallback(work: Path, server: Path) -> None:
    first, second = snapshot(work, 1), snapshot(work, 2, "2026-11-23")
    put(server, first)
    done = put(server, second)
    assert live(server) == second[1].sha256
    assert fallback(server) == done.replaced_sha256 == first[1].sha256
    assert done.backup is not None
    assert sha(done.backup) == first[1].sha256
    assert [b.manifest for b in backups(SPEC, server)] == [first[1]]
    assert_sound(server)


def test_an_operators_copy_over_the_live_file_spares_backup_and_fallback(work: Path, server: Path) -> None:
    first, second = snapshot(work, 1), snapshot(work, 2)
    put(server, first)
    done = put(server, second)
    shutil.copyfile(snapshot(work, 3)[0], server / SPEC.live_file)
    assert done.backup is not None
    assert sha(done.backup) == fallback(server) == first[1].sha256


def test_deploying_the_live_content_again_changes_no_file(work: Path, server: Path) -> None:
    first = snapshot(work, 1)
    put(server, first)
    before, inode = contents(server), (server / SPEC.live_file).stat().st_ino
    assert put(server, first).already_live
    assert contents(server) == before
    assert (server / SPEC.live_file).stat().st_ino == inode


def test_the_same_content_of_a_newer_day_moves_the_live_day_on(work: Path, server: Path) -> None:
    path, manifest = snapshot(work, 1)
    put(server, (path, manifest))
    done = put(server, (path, replace(manifest, partition="2026-11-25")))
    assert (done.already_live, done.partition) == (True, "2026-11-25")
    # The older facts do not take it back, and a day between the two is now too old.
    assert put(server, (path, manifest)).partition == "2026-11-25"
    with pytest.raises(PermanentFailure, match="older than the live file's 2026-11-25"):
        put(server, snapshot(work, 2, "2026-11-24"))


def test_an_older_day_is_refused(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1, "2026-11-22"))
    before = contents(server)
    with pytest.raises(PermanentFailure, match="to go back in time, roll back"):
        put(server, snapshot(work, 2, "2026-11-21"))
    assert contents(server) == before


def violating(work: Path, what: str) -> tuple[Snapshot, str]:
    inner = faiss.METRIC_INNER_PRODUCT
    made: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
        "dimension": (partial(trained_index, 2, dimension=32), {}, "dimension is 32, the live file has 16"),
        "metric": (partial(trained_index, 2, metric=inner), {}, "metric is metric 0, the live file has l2"),
        "class": (partial(flat_index, 2), {}, "index class IndexFlat"),
        "id_offset": (partial(trained_index, 2), {"id_offset": 0}, "id_offset is 0, the live file has -1"),
        "index": (partial(trained_index, 2), {"index": "title"}, "a file of index title"),
        "size": (partial(trained_index, 2, rows=4000), {}, "more than 1.5 times"),
        "rows": (partial(trained_index, 2, rows=300), {}, "300 rows are over 10% fewer .* live file's 400"),
    }
    index, wrong_facts, reason = made[what]
    path, manifest = snapshot_of(index(), work / "violating.index")
    return (path, replace(manifest, **wrong_facts)), reason


@pytest.mark.parametrize("what", ["dimension", "metric", "class", "id_offset", "index", "size", "rows"])
def test_what_the_server_could_not_serve_is_refused(work: Path, server: Path, what: str) -> None:
    put(server, snapshot(work, 1))
    before = contents(server)
    taken, reason = violating(work, what)
    with pytest.raises(PermanentFailure, match=reason):
        put(server, taken)
    assert contents(server) == before


@pytest.mark.parametrize(("what", "confirmation"), [("size", "confirm_size"), ("rows", "confirm_shrink")])
def test_a_confirmed_growth_or_shrink_is_taken(
    work: Path, server: Path, what: str, confirmation: str
) -> None:
    put(server, snapshot(work, 1))
    taken, _ = violating(work, what)
    assert put(server, taken, **{confirmation: True}).sha256 == taken[1].sha256


def test_far_fewer_rows_than_in_an_adopted_file_are_refused(work: Path, server: Path) -> None:
    faiss.write_index(trained_index(7), str(server / SPEC.live_file))
    taken, reason = violating(work, "rows")
    with pytest.raises(PermanentFailure, match=reason):
        put(server, taken)
    few = snapshot_of(trained_index(3, rows=360), work / "few.index")
    assert put(server, few).sha256 == live(server)


def test_the_first_file_has_to_match_the_catalog(work: Path, server: Path) -> None:
    with pytest.raises(PermanentFailure, match="dimension is 32, the catalog says 16"):
        put(server, violating(work, "dimension")[0])
    assert contents(server) == {}


def test_a_damaged_snapshot_is_refused(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    before, second = contents(server), snapshot(work, 2)
    flip_a_byte(second[0])
    with pytest.raises(PermanentFailure, match="is damaged"):
        put(server, second)
    assert contents(server) == before


def test_a_snapshot_built_anew_during_the_deploy_is_a_conflict(
    work: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, snapshot(work, 1))
    before = contents(server)
    path, manifest = snapshot(work, 2)
    anew = snapshot(work, 3)

    def copy_after_a_build(target: Path, source: Path, *, expected_size: int) -> durable_files.Staged:
        write_manifest(work, anew[1])
        shutil.copyfile(anew[0], path)
        return durable_files.stage_copy(target, source, expected_size=expected_size)

    monkeypatch.setattr("muse_assets.publishing.deploying.stage_copy", copy_after_a_build)
    with pytest.raises(Conflict, match="built anew while it was copied"):
        put(server, (path, manifest))
    assert contents(server) == before


def test_a_missing_snapshot_is_refused(work: Path, server: Path) -> None:
    path, manifest = snapshot(work, 1)
    path.unlink()
    with pytest.raises(PermanentFailure, match="materialize vibe/index for 2026-11-22"):
        put(server, (path, manifest))
    assert contents(server) == {}


def test_a_work_directory_is_no_server_directory(work: Path) -> None:
    taken = snapshot(work, 1)
    with pytest.raises(PermanentFailure, match="different directories"):
        put(work, taken)


def test_readers_of_another_user_can_read_what_a_strict_umask_wrote(work: Path, server: Path) -> None:
    taken, old = (snapshot(work, 1), snapshot(work, 2)), os.umask(0o077)
    try:
        for one in taken:
            put(server, one)
    finally:
        os.umask(old)
    for name in (SPEC.live_file, SPEC.fallback_file):
        assert (server / name).stat().st_mode & 0o777 == 0o644


# --- the legacy's files


def test_a_legacy_file_is_adopted_backed_up_and_can_come_back(work: Path, server: Path) -> None:
    legacy = trained_index(7)
    faiss.write_index(legacy, str(server / SPEC.live_file))
    before = live(server)
    adopted = live_file(server, SPEC)
    assert adopted is not None
    assert not adopted.damaged
    second = snapshot(work, 2)
    done = put(server, second)
    assert done.replaced_sha256 == fallback(server) == before
    assert_sound(server)
    assert rollback(SPEC, server).sha256 == live(server) == before
    assert_sound(server)
    # Nobody knows the legacy file's day, so every day is newer.
    assert put(server, second).sha256 == live(server) == second[1].sha256


def test_a_legacy_file_of_another_shape_is_not_replaced(work: Path, server: Path) -> None:
    faiss.write_index(trained_index(7, dimension=32), str(server / SPEC.live_file))
    before = contents(server)
    with pytest.raises(PermanentFailure, match="dimension is 16, the live file has 32"):
        put(server, snapshot(work, 1))
    assert contents(server) == before


def test_a_torn_legacy_file_is_damaged(work: Path, server: Path) -> None:
    whole = faiss.serialize_index(trained_index(7)).tobytes()
    (server / SPEC.live_file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PermanentFailure, match="damaged or was edited"):
        put(server, snapshot(work, 1))


# --- damage


def damaged_server(work: Path, server: Path) -> tuple[Snapshot, str]:
    first, second = snapshot(work, 1), snapshot(work, 2)
    put(server, first)
    put(server, second)
    flip_a_byte(server / SPEC.live_file)
    return first, live(server)


def test_a_damaged_live_file_is_named_and_not_replaced_unasked(work: Path, server: Path) -> None:
    damaged_server(work, server)
    before = contents(server)
    with pytest.raises(PermanentFailure, match="replace_damaged"):
        put(server, snapshot(work, 3))
    assert contents(server) == before
    states = {finding.path.name: finding.state for finding in verify(server, SPEC)}
    assert (states[SPEC.live_file], states[SPEC.fallback_file]) == ("damaged", "ok")


def test_damaged_bytes_are_set_aside_and_never_served_again(work: Path, server: Path) -> None:
    first, damage = damaged_server(work, server)
    done = put(server, snapshot(work, 3), replace_damaged=True)
    assert (done.replaced_sha256, done.backup) == (damage, None)
    assert fallback(server) == first[1].sha256
    assert damage[:12] not in {b.sha12 for b in backups(SPEC, server)}
    aside = list((server / ".backups" / SPEC.name).glob("*_damaged_*"))
    assert [sha(path) for path in aside] == [damage]
    assert_sound(server)


def test_a_fallback_that_is_no_backup_keeps_its_facts(work: Path, server: Path) -> None:
    first = snapshot(work, 1)
    put(server, first)
    flip_a_byte(server / SPEC.live_file)
    put(server, snapshot(work, 2), replace_damaged=True)
    assert fallback(server) == first[1].sha256
    assert_sound(server)


def test_the_right_bytes_repair_a_damaged_live_file(work: Path, server: Path) -> None:
    damaged_server(work, server)
    second = snapshot(work, 2)
    assert put(server, second, replace_damaged=True).sha256 == live(server) == second[1].sha256
    assert_sound(server)


def test_a_damaged_live_file_can_be_rolled_back(work: Path, server: Path) -> None:
    first, _ = damaged_server(work, server)
    assert rollback(SPEC, server).sha256 == live(server) == fallback(server) == first[1].sha256
    assert_sound(server)


def test_verify_tells_damaged_unknown_and_missing_apart(work: Path, server: Path) -> None:
    first, second = snapshot(work, 1), snapshot(work, 2)
    put(server, first)
    done = put(server, second)
    assert done.backup is not None
    flip_a_byte(done.backup)  # the fallback is the same file
    (server / SPEC.live_file).unlink()
    states = {finding.path.name: finding.state for finding in verify(server, SPEC)}
    assert states == {SPEC.live_file: "missing", SPEC.fallback_file: "damaged", done.backup.name: "damaged"}
    dated = work / "muse_vibe_20261122.index"
    shutil.copyfile(first[0], dated)
    assert [(f.path, f.state) for f in verify(work, SPEC)] == [(dated, "unknown")]


# --- rolling back


def test_rolling_back_twice_rolls_forward(work: Path, server: Path) -> None:
    first, second = snapshot(work, 1, "2026-11-22"), snapshot(work, 2, "2026-11-23")
    put(server, first)
    put(server, second)
    back = rollback(SPEC, server)
    assert (back.sha256, back.partition) == (live(server), "2026-11-22")
    assert back.replaced_sha256 == second[1].sha256
    assert fallback(server) == first[1].sha256  # not the file that was rolled back from
    assert_sound(server)
    assert rollback(SPEC, server).sha256 == live(server) == second[1].sha256
    assert_sound(server)


def test_a_rollback_to_a_named_content(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in (1, 2, 3)]
    for one in taken:
        put(server, one)
    wanted = taken[0][1].sha256
    assert rollback(SPEC, server, to=wanted[:8]).sha256 == live(server) == wanted
    assert rollback(SPEC, server, to=wanted).already_live
    with pytest.raises(PermanentFailure, match="has no backup ffff"):
        rollback(SPEC, server, to="ffff")


def test_a_rollback_needs_an_intact_backup(work: Path, server: Path) -> None:
    with pytest.raises(PermanentFailure, match="no backup that is not live; backups: none"):
        rollback(SPEC, server)
    put(server, snapshot(work, 1))
    done = put(server, snapshot(work, 2))
    assert done.backup is not None
    flip_a_byte(done.backup)
    before = contents(server)
    with pytest.raises(PermanentFailure, match="is damaged"):
        rollback(SPEC, server)
    assert contents(server) == before


# --- retention


def age(server: Path, days: float) -> None:
    """Make the backups look `days` older."""
    for backup in backups(SPEC, server):
        then = backup.replaced_at - timedelta(days=days)
        backup.path.rename(backup.path.with_name(f"{then:%Y%m%dT%H%M%S.%fZ}_{backup.sha12}.index"))


def test_twenty_deploys_leave_two_old_backups_and_no_orphans(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in range(20)]
    for one in taken:
        put(server, one)
        age(server, 8)
    put(server, taken[0])
    expected = [one[1].sha256[:12] for one in (taken[19], taken[18])]
    assert [b.sha12 for b in backups(SPEC, server)] == expected
    assert_sound(server)


def test_young_backups_stay_and_a_content_is_kept_once(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in range(4)]
    for one in taken * 2:
        put(server, one)
    assert sorted(b.sha12 for b in backups(SPEC, server)) == sorted(m.sha256[:12] for _, m in taken)
    put(server, taken[0])
    prune(SPEC, server, live(server), Retention(backups=1, days=0))
    assert [b.sha12 for b in backups(SPEC, server)] == [taken[3][1].sha256[:12]]
    assert_sound(server)


def test_a_clock_that_was_set_back_does_not_reorder_backups(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in range(3)]
    put(server, taken[0])
    put(server, taken[1])
    age(server, -30)  # as if written under a clock that ran ahead
    put(server, taken[2])
    newest = backups(SPEC, server)[0]
    assert newest.sha12 == taken[1][1].sha256[:12]
    assert newest.replaced_at > datetime.now(UTC)


def unprunable(server: Path) -> Path:
    """A backup too old to keep that is a folder, so that removing it fails."""
    folder = server / ".backups" / SPEC.name / "20000101T000000.000000Z_aaaaaaaaaaaa.index"
    folder.mkdir()
    return folder


def test_a_publication_that_cannot_prune_holds_and_warns(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in range(4)]
    for one in taken[:3]:
        assert put(server, one).warning is None
    unprunable(server)
    done = put(server, taken[3])
    assert done.warning is not None
    assert "could not be pruned" in done.warning
    assert done.sha256 == live(server) == taken[3][1].sha256
    # A retry of a rollback would take it back, so it must not fail either.
    back = rollback(SPEC, server)
    assert back.warning is not None
    assert back.sha256 == live(server) == taken[2][1].sha256


def test_an_unreadable_record_of_what_was_loaded_stops_pruning_only(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    (server / ".loaded.json").write_text("[]")
    second = snapshot(work, 2)
    done = put(server, second)
    assert done.warning is not None
    assert ".loaded.json is not a JSON object" in done.warning
    assert live(server) == second[1].sha256


def test_a_backup_that_vanishes_while_listed_is_left_out(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    put(server, snapshot(work, 2))
    known = backups(SPEC, server)
    gone = server / ".backups" / SPEC.name / "20990101T000000.000000Z_aaaaaaaaaaaa.index"
    gone.symlink_to(server / "gone")
    assert backups(SPEC, server) == known


# --- directories that cannot be written


def test_a_missing_directory_is_not_created(work: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(PermanentFailure, match="does not exist"):
        put(absent, snapshot(work, 1))
    with pytest.raises(PermanentFailure, match="does not exist"):
        rollback(SPEC, absent)
    assert not absent.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("NOT PROVEN HERE: full and read-only disks need root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_changes_nothing(work: Path, small_disk: Path) -> None:
    put(small_disk, snapshot(work, 1))
    before = contents(small_disk)
    with contextlib.suppress(OSError), (small_disk / ".filler").open("wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    with pytest.raises(PassingFailure, match="full"):
        put(small_disk, snapshot(work, 2))
    (small_disk / ".filler").unlink()
    assert contents(small_disk) == before
    assert temps(small_disk) == []
    put(small_disk, snapshot(work, 2))
    assert_sound(small_disk)


def test_a_read_only_disk_changes_nothing(work: Path, small_disk: Path) -> None:
    put(small_disk, snapshot(work, 1))
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(PermanentFailure, match="read-only"):
        put(small_disk, snapshot(work, 2))
    with pytest.raises(PermanentFailure, match="read-only"):
        rollback(SPEC, small_disk)
    assert contents(small_disk) == before


# --- kills, errors and rivals

# What the interpreter reports before a call that can change a directory or open a file.
STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "fcntl.flock"}
_at_step: Callable[[], None] | None = None


def _audit(event: str, _arguments: object) -> None:
    if _at_step is not None and event in STEPS:
        _at_step()


@contextlib.contextmanager
def each_step(action: Callable[[int], None]) -> Iterator[list[int]]:
    """Call `action` with the number of every step of this process from here on; yields the count."""
    global _at_step  # noqa: PLW0603
    if not getattr(sys, "_muse_audited", False):  # an audit hook can never be removed
        sys.addaudithook(_audit)
        sys._muse_audited = True  # type: ignore[attr-defined]
    count = [0]

    def step() -> None:
        count[0] += 1
        action(count[0])

    _at_step = step
    try:
        yield count
    finally:
        _at_step = None


def die_at(wanted: int) -> Callable[[int], None]:
    def action(step: int) -> None:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def fail_at(wanted: int) -> Callable[[int], None]:
    def action(step: int) -> None:
        if step == wanted:
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"step {step}")

    return action


PAST_THE_END = 42


def legacy_server(_work: Path, folder: Path) -> Path:
    folder.mkdir()
    faiss.write_index(trained_index(7), str(folder / SPEC.live_file))
    return folder


def first_and_second(work: Path, folder: Path) -> Path:
    folder.mkdir()
    put(folder, snapshot(work, 1))
    put(folder, snapshot(work, 2))
    return folder


@pytest.mark.parametrize("start", [legacy_server, first_and_second])
@pytest.mark.parametrize("fault", [die_at, fail_at])
def test_a_fault_at_any_step_leaves_a_complete_live_file(
    work: Path,
    tmp_path: Path,
    start: Callable[[Path, Path], Path],
    fault: Callable[[int], Callable[[int], None]],
) -> None:
    template, taken = start(work, tmp_path / "template"), snapshot(work, 3)
    old, new = live(template), taken[1].sha256
    outcomes = set()
    for step in range(1, 200):
        server = tmp_path / f"server_{step}"
        shutil.copytree(template, server)

        def attempt(server: Path = server, step: int = step) -> None:
            with each_step(fault(step)) as count:
                put(server, taken)
            if count[0] < step:
                os._exit(PAST_THE_END)

        code = ended(in_child(attempt))
        assert code in (0, 1, -signal.SIGKILL, PAST_THE_END)
        outcomes.add((code, live(server)))
        assert live(server) in (old, new)
        if (server / SPEC.fallback_file).exists():
            faiss.read_index(str(server / SPEC.fallback_file))
        if fault is fail_at:
            assert list(server.glob(f".{SPEC.live_file}.*")) == [], f"step {step}"
        assert put(server, taken).sha256 == live(server) == new
        assert fallback(server) == old, f"step {step}"
        assert temps(server) == [], f"step {step}"
        assert {f.state for f in verify(server, SPEC)} == {"ok"}, f"step {step}"
        if code == PAST_THE_END:
            break
    failed = 1 if fault is fail_at else -signal.SIGKILL
    # Faults fell before the rename and after it, and the last attempt met none.
    assert outcomes >= {(failed, old), (failed, new), (PAST_THE_END, new)}


@pytest.mark.parametrize(
    ("start", "rolls_back"), [(legacy_server, False), (first_and_second, False), (first_and_second, True)]
)
def test_an_error_at_any_step_undoes_everything_or_says_that_it_may_be_live(
    work: Path, tmp_path: Path, start: Callable[[Path, Path], Path], rolls_back: bool
) -> None:
    template, taken = start(work, tmp_path / "template"), snapshot(work, 3)
    seen: list[str] = []
    for step in range(1, 200):
        server = tmp_path / f"server_{step}"
        shutil.copytree(template, server)
        before = contents(server)
        count = [step]
        try:
            with each_step(fail_at(step)) as count:
                done = rollback(SPEC, server) if rolls_back else put(server, taken)
        except MuseError as error:
            if live(server) == before[SPEC.live_file]:
                seen.append("undone")
                assert contents(server) == before, f"step {step}"
            else:
                seen.append("unconfirmed")
                assert "could not be confirmed" in error.what, f"step {step}"
                # A rollback that is tried again by itself would put the bad file back.
                assert isinstance(error, PermanentFailure) is rolls_back, f"step {step}"
            aside = [server / SPEC.fallback_file, *(b.path for b in backups(SPEC, server))]
            assert not any(p.exists() and p.samefile(server / SPEC.live_file) for p in aside), f"step {step}"
        else:
            seen.append("warned" if done.warning else "done")
            assert live(server) == done.sha256 != before[SPEC.live_file]
        if count[0] < step:
            break
    assert set(seen) == {"undone", "unconfirmed", "warned", "done"}
    assert seen[-1] == "done"


@pytest.mark.parametrize("renamed", [True, False])
def test_whether_a_failed_rename_took_place_is_read_from_the_file(
    work: Path, server: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    put(server, snapshot(work, 1))
    second, before = snapshot(work, 2), contents(server)
    real = os.rename

    def fail(source: Path, target: Path) -> Path:
        if target.name != SPEC.live_file:
            real(source, target)
            return target
        if renamed:
            real(source, target)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(PassingFailure, match="could not be confirmed" if renamed else "Nothing was replaced"):
        put(server, second)
    monkeypatch.undo()
    assert (contents(server) == before) is not renamed
    assert put(server, second).already_live is renamed
    assert_sound(server)


def test_readers_see_whole_files_while_publishers_are_killed(work: Path, server: Path) -> None:
    taken = [snapshot(work, 1), snapshot(work, 2)]
    put(server, taken[0])
    good = {manifest.sha256 for _, manifest in taken}
    seen: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(live(server))

    def publish_for_ever() -> None:
        while True:
            for one in taken:
                put(server, one)

    reader = threading.Thread(target=read)
    choose = random.Random(5)
    pids = []
    reader.start()
    try:
        for _ in range(25):
            pids.append(in_child(publish_for_ever))
            time.sleep(choose.uniform(0.005, 0.12))
            os.kill(pids[-1], signal.SIGKILL)
            assert ended(pids[-1]) == -signal.SIGKILL
            assert live(server) in good
    finally:
        stop.set()
        reader.join()
    assert set(seen) == good
    for one in taken:
        put(server, one)
    assert_sound(server)


def test_of_two_deploys_at_once_one_wins(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    rivals = [snapshot(work, seed) for seed in (2, 3)]

    def attempt(taken: Snapshot) -> None:
        with each_step(lambda _: time.sleep(0.005)):  # so that they do meet
            put(server, taken)

    codes = [ended(pid) for pid in [in_child(partial(attempt, taken)) for taken in rivals]]
    assert sorted(codes) == [0, 1]
    assert live(server) == rivals[codes.index(0)][1].sha256
    assert_sound(server)


def test_a_held_lock_is_a_conflict_and_can_be_waited_for(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    put(server, snapshot(work, 2))
    with durable_files.locked(server / ".locks" / "vibe.lock"), pytest.raises(Conflict):
        put(server, snapshot(work, 3))
    held = threading.Event()

    def hold() -> None:
        with durable_files.locked(server / ".locks" / "vibe.lock"):
            held.set()
            time.sleep(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert rollback(SPEC, server, lock_wait_seconds=5.0).sha256 == live(server)
    holder.join()


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_live_file_changed_during_the_deploy_is_a_conflict(
    work: Path, server: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool, settled: bool
) -> None:
    put(server, snapshot(work, 1))
    foreign = snapshot(work, 9)[0].read_bytes()
    if settled:
        monkeypatch.setattr(durable_files, "_SETTLED_SECONDS", -1.0)

    def copy_while_an_operator_copies(
        target: Path, source: Path, *, expected_size: int
    ) -> durable_files.Staged:
        if replaced:
            target.with_suffix(".new").write_bytes(foreign)
            target.with_suffix(".new").rename(target)
        else:
            target.write_bytes(foreign)
        return durable_files.stage_copy(target, source, expected_size=expected_size)

    monkeypatch.setattr("muse_assets.publishing.deploying.stage_copy", copy_while_an_operator_copies)
    with pytest.raises(Conflict, match="changed by someone else"):
        put(server, snapshot(work, 2))
    assert (server / SPEC.live_file).read_bytes() == foreign
    assert temps(server) == []
    assert backups(SPEC, server) == []


@pytest.fixture
def staged_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large files are: the copy begins before the live file is hashed, and is read back behind it."""
    monkeypatch.setattr("muse_assets.publishing.deploying._WORTH_A_THREAD", 0)
    monkeypatch.setattr("muse_assets.durable_files._PIECE", 1)


@pytest.mark.usefixtures("staged_in_a_thread")
def test_a_copy_that_is_staged_meanwhile_goes_live_or_goes(work: Path, server: Path) -> None:
    first, second, third = (snapshot(work, seed) for seed in (1, 2, 3))
    put(server, first)
    put(server, second)
    assert_sound(server)
    before = contents(server)
    with pytest.raises(PermanentFailure, match="older than"):
        put(server, (third[0], replace(third[1], partition="2026-01-01")))
    with pytest.raises(PermanentFailure, match="is damaged"):
        put(server, (first[0], replace(third[1], size=first[1].size)))
    assert put(server, second).already_live
    assert contents(server) == before
    assert temps(server) == []


@pytest.mark.usefixtures("staged_in_a_thread")
def test_a_refusal_is_told_before_a_copy_that_failed(
    work: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, snapshot(work, 1))
    before, (path, manifest) = contents(server), snapshot(work, 2)

    def on_a_full_disk(*_: object, **__: object) -> durable_files.Staged:
        raise PassingFailure("the disk is full", next_step="free space there")

    monkeypatch.setattr("muse_assets.publishing.deploying.stage_copy", on_a_full_disk)
    with pytest.raises(PermanentFailure, match="older than"):
        put(server, (path, replace(manifest, partition="2026-01-01")))
    with pytest.raises(PassingFailure, match="full"):
        put(server, (path, manifest))
    assert contents(server) == before


def test_a_disk_that_gives_back_other_bytes_is_told_from_a_damaged_snapshot(
    work: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, snapshot(work, 1))
    before, (path, manifest) = contents(server), snapshot(work, 2)

    def on_a_bad_disk(target: Path, _source: Path, *, expected_size: int) -> durable_files.Staged:
        return durable_files.stage_copy(target, snapshot(work, 3)[0], expected_size=expected_size)

    monkeypatch.setattr("muse_assets.publishing.deploying.stage_copy", on_a_bad_disk)
    write_manifest(work, manifest)
    with pytest.raises(PassingFailure, match="reads back differently"):
        put(server, (path, manifest))
    assert contents(server) == before


@pytest.mark.usefixtures("staged_in_a_thread")
def test_what_was_read_back_before_its_fsync_is_read_again_if_the_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def beside_a_rival(descriptor: int) -> None:
        time.sleep(0.1)  # past the read
        for temp in tmp_path.glob(".*.part"):
            temp.write_bytes(b"other")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", beside_a_rival)
    (tmp_path / "source").write_bytes(b"bytes")
    staged = durable_files.stage_copy(tmp_path / "target", tmp_path / "source", expected_size=5)
    assert staged.sha256 == durable_files.file_sha256(staged.path)
    assert staged.path.read_bytes() == b"other"
    with pytest.raises(PassingFailure, match="reads back differently"):
        durable_files.stage(tmp_path / "target", durable_files.copy_into(tmp_path / "source"))


@pytest.mark.usefixtures("staged_in_a_thread")
def test_a_disk_that_gives_back_other_bytes_of_a_large_file_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_bad_disk(descriptor: int, start: int, _end: int) -> None:
        os.pwrite(descriptor, b"X", start)

    monkeypatch.setattr("muse_assets.durable_files._begin_writeback", on_a_bad_disk)
    with pytest.raises(PassingFailure, match=r"target.* reads back differently"):
        durable_files.write_text(tmp_path / "target", "bytes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("staged_in_a_thread")
def test_a_failed_fsync_beside_the_reading_back_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(PassingFailure, match=r"Cannot write .*target.*Input/output error"):
        durable_files.write_text(tmp_path / "target", "bytes")
    assert list(tmp_path.iterdir()) == []


def test_a_stamp_holds_until_the_file_is_written_or_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    _, young = durable_files.stamped_sha256(path)
    assert not durable_files.is_untouched(path, young), "a write in the same tick would not show"
    monkeypatch.setattr(durable_files, "_SETTLED_SECONDS", 0.1)
    time.sleep(0.2)
    _, stamp = durable_files.stamped_sha256(path)
    assert durable_files.is_untouched(path, stamp)
    path.rename(tmp_path / "renamed")
    assert durable_files.is_untouched(tmp_path / "renamed", stamp)
    assert not durable_files.is_untouched(path, stamp)
    path.write_bytes(b"bytes")
    assert not durable_files.is_untouched(path, stamp)
    (tmp_path / "renamed").write_bytes(b"other")
    assert not durable_files.is_untouched(tmp_path / "renamed", stamp)


def test_a_stamp_of_a_file_whose_time_was_set_back_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    os.utime(path, (0, 0))
    assert not durable_files.stamped_sha256(path)[1].settled


# --- reloading


def fake_server(server: Path, accepted: set[str]) -> tuple[str, str]:
    """A hook that "loads" the live file and counts its runs, a health check that accepts some contents."""
    hook, health = server.parent / "hook.sh", server.parent / "health.sh"
    hook.write_text(
        f"sha256sum {server}/muse_vibe.index > {server.parent}/running\necho run >> {server.parent}/runs\n"
    )
    pattern = "|".join(sorted(accepted)) or "nothing"
    health.write_text(f"grep -qE '{pattern}' {server.parent}/running || {{ echo 색인을 못 읽음; exit 3; }}\n")
    return f"sh {hook}", f"sh {health}"


def reload_now(server: Path, hook: str | None, health: str | None, **options: Any) -> Any:
    options = {"timeout_seconds": 0.3, "pause_seconds": 0.05} | options
    return reload_server(server, [SPEC, LYRICS], hook=hook, health=health, **options)


def runs(server: Path) -> int:
    return len((server.parent / "runs").read_text().splitlines())


def test_a_reload_records_what_was_loaded_and_runs_once(work: Path, server: Path) -> None:
    first = snapshot(work, 1)
    put(server, first)
    hook, health = fake_server(server, {first[1].sha256})
    done = reload_now(server, hook, health)
    assert (done.reloaded, done.covered) == (True, {"vibe": first[1].sha256})
    assert loaded_contents(server) == {"vibe": first[1].sha256}
    assert not reload_now(server, hook, health).reloaded
    assert runs(server) == 1


def test_without_a_hook_nothing_is_recorded(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    done = reload_now(server, None, None)
    assert (done.reloaded, "by hand" in done.message) == (False, True)
    assert loaded_contents(server) == {}


def test_a_server_that_does_not_come_up_gets_its_old_files_back(work: Path, server: Path) -> None:
    first, second = snapshot(work, 1, "2026-11-22"), snapshot(work, 2, "2026-11-23")
    lyrics = snapshot(work, 3, spec=LYRICS)
    put(server, first)
    hook, health = fake_server(server, {first[1].sha256})
    reload_now(server, hook, health)
    put(server, second)
    deploy(LYRICS, *lyrics, server)
    with pytest.raises(PermanentFailure) as failure:
        reload_now(server, hook, health)
    for words in (
        "did not take vibe, lyrics",
        "색인을 못 읽음",
        f"vibe went back to {first[1].sha256[:12]} of 2026-11-22",
        "lyrics stays",
        "the server came up on them",
    ):
        assert words in str(failure.value)
    assert live(server) == first[1].sha256
    assert sha(server / LYRICS.live_file) == lyrics[1].sha256
    assert loaded_contents(server) == {"vibe": first[1].sha256}
    assert runs(server) == 3


def test_a_first_reload_that_fails_goes_back_to_the_newest_intact_backup(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in (1, 2, 3)]
    done = [put(server, one) for one in taken]
    assert done[2].backup is not None
    flip_a_byte(done[2].backup)  # of the second, so the first is the newest intact one
    hook, health = fake_server(server, {taken[0][1].sha256})
    with pytest.raises(ReloadFailed, match=r"vibe went back to .*came up on them") as failure:
        reload_now(server, hook, health)
    assert live(server) == taken[0][1].sha256
    (back,) = failure.value.returned
    assert (back.index, back.sha256) == ("vibe", taken[0][1].sha256)
    assert back.replaced_sha256 == taken[2][1].sha256


def test_what_was_loaded_last_is_kept_however_many_deploys_follow(work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in range(6)]
    put(server, taken[0])
    reload_now(server, "true", None)
    for one in taken[1:]:
        put(server, one)
        age(server, 8)
    assert [b.sha12 for b in backups(SPEC, server)] == [taken[n][1].sha256[:12] for n in (4, 3, 0)]
    with pytest.raises(ReloadFailed):
        reload_now(server, "false", None)
    assert live(server) == taken[0][1].sha256


def test_a_newer_file_put_live_during_the_reload_stays(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    reload_now(server, "true", None)
    put(server, snapshot(work, 2))
    newer = snapshot(work, 3)
    script = server.parent / "newer.sh"
    script.write_text(f"mv {newer[0]} {server / SPEC.live_file}\nexit 1\n")
    with pytest.raises(ReloadFailed, match=r"vibe could not go back: .*no longer") as failure:
        reload_now(server, f"sh {script}", None)
    assert failure.value.returned == ()
    assert live(server) == newer[1].sha256


def test_a_failing_hook_takes_the_files_back_and_says_that_the_second_try_failed(
    work: Path, server: Path
) -> None:
    first = snapshot(work, 1)
    put(server, first)
    reload_now(server, "true", None)
    put(server, snapshot(work, 2))
    with pytest.raises(PermanentFailure, match=r"ls ended with .*vibe went back.*the second try failed"):
        reload_now(server, "ls /no-such-folder", None)
    assert live(server) == first[1].sha256


@pytest.mark.parametrize("hook", ["sleep 30", "no-such-command-here"])
def test_a_hook_that_hangs_or_is_missing_fails_in_bounded_time(work: Path, server: Path, hook: str) -> None:
    put(server, snapshot(work, 1))
    started = time.monotonic()
    with pytest.raises(PermanentFailure, match=r"the reload hook failed: .*vibe stays"):
        reload_now(server, hook, None)
    assert time.monotonic() - started < 5


def test_a_daemon_left_by_the_hook_does_not_hold_the_reload(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    script = server.parent / "daemon.sh"
    script.write_text("sleep 4 &\n")
    started = time.monotonic()
    assert reload_now(server, f"sh {script}", None, timeout_seconds=3).reloaded
    assert time.monotonic() - started < 2


def test_the_health_check_is_tried_until_it_succeeds(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    tries = server.parent / "tries"
    script = server.parent / "slow.sh"
    script.write_text(f"echo try >> {tries}\ntest $(wc -l < {tries}) -ge 3\n")
    assert reload_now(server, "true", f"sh {script}", timeout_seconds=10).reloaded
    assert len(tries.read_text().splitlines()) == 3


@pytest.fixture
def web() -> Iterator[tuple[str, list[str], dict[str, int]]]:
    """An HTTP server: its address, the requests it saw, the status by path."""
    seen: list[str] = []
    status: dict[str, int] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.partition("?")[0]
            seen.append(f"{self.command} {path}")
            self.send_response(status.get(path, 200))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}", seen, status
        listener.shutdown()
        thread.join()


def test_hook_and_health_check_may_be_urls(
    work: Path, server: Path, web: tuple[str, list[str], dict[str, int]]
) -> None:
    address, seen, status = web
    put(server, snapshot(work, 1))
    status["/health"] = 503
    with pytest.raises(PermanentFailure, match=r"GET http://127\.0\.0\.1:\d+/health answered 503") as failure:
        reload_now(server, f"{address}/reload?token=canary", f"{address}/health?token=canary")
    assert "canary" not in str(failure.value)
    seen.clear()
    del status["/health"]
    assert reload_now(server, f"{address}/reload", f"{address}/health").reloaded
    assert seen == ["POST /reload", "GET /health"]


def test_an_answer_that_is_no_http_is_not_repeated(work: Path, server: Path) -> None:
    class Echo(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    put(server, snapshot(work, 1))
    with socketserver.TCPServer(("127.0.0.1", 0), Echo) as listener:
        thread = threading.Thread(target=listener.handle_request)
        thread.start()
        address = f"http://127.0.0.1:{listener.server_address[1]}/reload"
        with pytest.raises(ReloadFailed, match=f"POST {address}: BadStatusLine;") as failure:
            reload_now(server, f"{address}?token=canary", None)
        thread.join()
    assert "canary" not in str(failure.value)


def test_a_commands_arguments_are_masked_in_its_output(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    script = server.parent / "echo.sh"
    script.write_text('echo "no  $1 from $2, ${2#*=}, $3, ${3%:*}; 거절됨"; exit 7\n')
    with pytest.raises(ReloadFailed, match=r"sh ended with 7: no") as failure:
        reload_now(server, f"sh {script} 'canary  one' --token=canary2 canary3:canary4", None)
    assert "no *** from ***, ***, ***, ***; 거절됨" in str(failure.value)
    assert "canary" not in str(failure.value)


def test_a_damaged_live_file_is_never_loaded(work: Path, server: Path) -> None:
    damaged_server(work, server)
    hook, _ = fake_server(server, set())
    with pytest.raises(PermanentFailure, match="was not restarted"):
        reload_now(server, hook, None)
    assert not (server.parent / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("sh 'canary", "balance the quotes"),
        (" ", "begin with a program"),
        ("ftp://me:canary@host/", "begin with a program"),
        ("TOKEN=canary sh restart", "begin with a program"),
        ("http://", "needs a host"),
        ("http://me:canary@host/", "no user part"),
        ("HTTP://canary@host/", "no user part"),
        ("http://host:canary/", "port from 1 to 65535"),
        ("http://host:99999/canary", "port from 1 to 65535"),
        ("http://host/?token=canary two", "percent-encode"),
        ("http://host/?token=canary두", "percent-encode"),
        ("http://host/?token=canary\n", "control characters"),
        ("sh canary\0", "control characters"),
    ],
)
@pytest.mark.parametrize("variable", ["MUSE_RELOAD", "MUSE_RELOAD_HEALTH"])
def test_an_unusable_hook_is_refused_before_anything_is_run(
    work: Path, server: Path, setting: str, remedy: str, variable: str
) -> None:
    put(server, snapshot(work, 1))
    hook, _ = fake_server(server, set())
    settings = (setting, None) if variable == "MUSE_RELOAD" else (hook, setting)
    with pytest.raises(PermanentFailure, match=f"{variable} is neither a command nor .*{remedy}") as failure:
        reload_now(server, *settings)
    assert "canary" not in "".join(traceback.format_exception(failure.value))
    assert not (server.parent / "runs").exists()


def test_an_unreadable_record_is_named(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    (server / ".loaded.json").write_text("[]")
    with pytest.raises(PermanentFailure, match=r"\.loaded\.json is not a JSON object"):
        reload_now(server, "true", None)
