"""A publish, and the write of a snapshot, killed or failed at each of its system calls by strace.

Here: kills, errors a disk gives, and the state a kill leaves for the runs after it. Not here: real full
disks and size limits (`test_server_directory.py`), readers meanwhile (`test_readers.py`).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from muse_assets.failures import PermanentFailure
from muse_assets.manifest import identify
from muse_assets.publishing.deploying import rollback
from muse_assets.publishing.verifying import verify
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.publish_bench import (
    Bench,
    Publish,
    after_a_kill,
    assert_served,
    bench_of,
    empty,
    legacy,
    one_deploy,
    spread,
    with_backup,
)
from muse_assets_tests.faults.snapshot_lane import SPEC as LANE_SPEC
from muse_assets_tests.faults.snapshot_lane import Lane, built_lane
from muse_assets_tests.faults.system_calls import FALLIBLE, Call, Ended, calls_of, failed_at, killed_at
from muse_assets_tests.server_directories import (
    SPEC,
    assert_sound,
    contents,
    ended,
    in_child,
    live,
    put,
    snapshot,
    temps,
)

# These undo or tidy: after one that failed, a temp stays until the next run, which sweeps it.
_TIDYING = {"unlink"}
_NEVER_PASSED_OVER = {
    "openat",
    "read",
    "write",
    "fallocate",
    "ftruncate",
    "fchmod",
    "fsync",
    "rename",
    "link",
    "getdents64",
}


PUBLISHES = [
    Publish(empty, 3),
    Publish(legacy, 3),
    Publish(one_deploy, 3),
    Publish(with_backup, 3),
    Publish(with_backup, None),
    Publish(with_backup, 2),  # already live
    Publish(after_a_kill, 3),
]


@pytest.fixture(params=PUBLISHES, ids=lambda publish: publish.name.replace(" ", "_"))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return bench_of(request.param, tmp_path, tmp_path)


def heal(bench: Bench, server: Path) -> None:
    """The next clean run: the wanted content is live, and everything is as after an undisturbed publish."""
    if bench.publish.taken is None and live(server) == bench.new:
        # Rolling back again would roll forward; the day's next deploy is what follows.
        put(server, bench.taken)
    else:
        assert bench.run(server) == bench.new
    assert live(server) == bench.new
    assert_sound(server)
    before = contents(server)
    assert put(server, bench.taken).already_live
    assert contents(server) == before


def test_a_publish_killed_at_each_system_call(injecting: Injecting, times: Times, bench: Bench) -> None:
    with injecting("1", "SIGKILL at each system call of a publish") as ledger:
        calls = bench.calls()
        chosen = spread(calls, times(10, len(calls)))
        outcomes = set()
        for number, call in enumerate(chosen):
            with ledger.injection(f"{bench.publish.name}, {call}"):
                server = bench.fresh(f"killed_{number}")
                ended = killed_at(call, lambda server=server: bench.run(server), bench.log)  # type: ignore[misc]
                assert ended.status == -9, f"it was not killed: {ended}"
                outcomes.add(bench.content(server))
                assert_served(bench, server)
                with ledger.recovery():
                    heal(bench, server)
                shutil.rmtree(server)
        # Kills fell on both sides of the rename.
        assert outcomes == {bench.old, bench.new}


@pytest.mark.parametrize("bench", [Publish(one_deploy, 3), Publish(with_backup, 3)], indirect=True)
def test_a_publish_that_stages_in_a_thread_killed_at_any_moment(
    injecting: Injecting, times: Times, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # strace counts the calls of each thread by itself, so these kills fall by the clock.
    monkeypatch.setattr("muse_assets.publishing.deploying._WORTH_A_THREAD", 0)
    monkeypatch.setattr("muse_assets.durable_files._PIECE", 1)
    started = time.monotonic()
    bench.run(bench.fresh("undisturbed"))
    took, choose = time.monotonic() - started, random.Random(1)
    with injecting("1", "SIGKILL at any moment of a publish that stages in a thread") as ledger:
        for number in range(times(10, 200)):
            with ledger.injection(f"{bench.publish.name}, {number}"):
                server = bench.fresh(f"killed_{number}")
                pid = in_child(lambda server=server: bench.run(server))  # type: ignore[misc]
                time.sleep(choose.uniform(0, took))
                os.kill(pid, signal.SIGKILL)
                assert ended(pid) in (-9, 0)
                assert_served(bench, server)
                with ledger.recovery():
                    heal(bench, server)
                shutil.rmtree(server)


def names(paths: Iterable[Path], server: Path) -> set[Path]:
    return {path.relative_to(server) for path in paths}


def failures_of(calls: Iterable[Call]) -> list[tuple[Call, str]]:
    return [(call, error) for call in calls for error in FALLIBLE.get(call.name, ())]


def assert_explained(bench: Bench, call: Call, ended: Ended, server: Path) -> None:
    """The run is red with words to act on, or it survived; the files are what the words say."""
    assert (ended.status, ended.injected > 0) == (0, True), f"nothing was injected: {ended}"
    assert ended.expected or not ended.failure, f"a raw {ended.failure}: {ended.said}"
    if bench.publish.start is not legacy:
        # A disk that fails to give bytes says nothing about them. Of a legacy file FAISS reads the header
        # itself and cannot tell; but it was hashed just before, and a real disk would have failed there.
        assert "damaged" not in ended.said, ended.said
    assert_served(bench, server)
    faiss_read_it = bench.publish.start is legacy and call.name == "read"
    if call.name in _NEVER_PASSED_OVER and not faiss_read_it:
        assert ended.failure or "warning" in ended.said, "the error was passed over"
    left = set() if call.name in _TIDYING else names(temps(server), server)
    if not ended.failure:
        assert ended.said.startswith(bench.new)
        assert bench.content(server) == bench.new
    elif bench.content(server) == bench.old != bench.new:
        assert str(server) in ended.said
        assert "Next: " in ended.said
        assert f"{SPEC.live_file} was renamed" not in ended.said
        assert left <= names(temps(bench.template), bench.template)
        if call.name not in _TIDYING and bench.publish.start is not after_a_kill:
            assert contents(server) == contents(bench.template)
    elif bench.old != bench.new:
        assert "could not be confirmed" in ended.said, ended.said


@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from_then_on"])
def test_a_publish_whose_disk_fails_at_each_system_call(
    injecting: Injecting, times: Times, bench: Bench, onwards: bool
) -> None:
    manner = "from then on" if onwards else "once"
    with injecting("3, 5", f"ENOSPC, EIO, EFBIG, EROFS in a publish, {manner}") as ledger:
        failures = failures_of(bench.calls())
        fsyncs = [failure for failure in failures if failure[0].name == "fsync" and failure[1] == "EIO"]
        for number, (call, error) in enumerate(
            (fsyncs if times(1, 0) else []) + spread(failures, times(6 if onwards else 10, len(failures)))
        ):
            with ledger.injection(f"{bench.publish.name}, {call} {error}"):
                server = bench.fresh(f"failed_{number}")
                work = lambda server=server: bench.run(server)  # noqa: E731
                ended = failed_at(call, error, work, bench.log, onwards=onwards)
                if not onwards:
                    assert_explained(bench, call, ended, server)
                else:
                    assert ended.injected
                    assert ended.expected or not ended.failure, f"a raw {ended.failure}: {ended.said}"
                    assert_served(bench, server)
                    assert ended.failure or ended.said.startswith(str(bench.content(server)))
                    if bench.content(server) != bench.old and ended.failure:
                        assert "could not be confirmed" in ended.said, ended.said
                with ledger.recovery():
                    heal(bench, server)
                shutil.rmtree(server)


def before_its_rename(bench: Bench) -> Call:
    """The rename of the live file."""
    (call,) = [
        call
        for call in bench.calls()
        if call.name == "rename" and call.arguments.split('", "')[1].endswith(f'/{SPEC.live_file}") = 0')
    ]
    return call


def deploy_what_is_live(bench: Bench, server: Path) -> None:
    second = snapshot(bench.folder / "work", 2)
    assert put(server, second).already_live


def deploy_what_is_refused(bench: Bench, server: Path) -> None:
    path, manifest = bench.taken
    with pytest.raises(PermanentFailure, match="older than"):
        put(server, (path, replace(manifest, partition="2026-01-01")))


def roll_back_to_what_is_live(_bench: Bench, server: Path) -> None:
    assert rollback(SPEC, server, to=live(server)).already_live


@pytest.mark.parametrize("bench", [Publish(with_backup, 3), Publish(with_backup, None)], indirect=True)
@pytest.mark.parametrize("next_run", [deploy_what_is_live, deploy_what_is_refused, roll_back_to_what_is_live])
def test_after_a_kill_an_operators_copy_harms_the_live_file_alone(
    injecting: Injecting, bench: Bench, next_run: Callable[[Bench, Path], None]
) -> None:
    with injecting("1, 20", "SIGKILL just before the rename, then cp over the live file") as ledger:
        call = before_its_rename(bench)
        with ledger.injection(f"{bench.publish.name}, {next_run.__name__}"):
            server = bench.fresh("killed")
            ended = killed_at(call, lambda: bench.run(server), bench.log)
            assert (ended.status, live(server)) == (-9, bench.old)
            links = (server / SPEC.live_file).stat().st_nlink
            assert links > 1, "the kill left no further name of the live file"
            with ledger.recovery():
                next_run(bench, server)
            assert (server / SPEC.live_file).stat().st_nlink == 1
            aside = {path: sha for path, sha in contents(server).items() if path != SPEC.live_file}
            assert_sound_but_for_unneeded_facts(server)
            with (server / SPEC.live_file).open("r+b") as file:  # as cp does: the same inode
                file.write(b"edited by hand")
            assert {name: contents(server)[name] for name in aside} == aside
            assert rollback(SPEC, server).sha256 == live(server) != bench.old
            assert_sound(server)


def assert_sound_but_for_unneeded_facts(server: Path) -> None:
    assert temps(server) == []
    assert {finding.state for finding in verify(server, SPEC)} == {"ok"}


@pytest.mark.parametrize("bench", [Publish(with_backup, 2)], indirect=True)
def test_a_deploy_of_what_is_live_makes_the_rename_durable(injecting: Injecting, bench: Bench) -> None:
    # An fsync that failed after the rename leaves it in doubt; the run that then says "deployed" settles it.
    with injecting("5, 6", "the rename's fsync fails; the next deploy makes it durable") as ledger:
        calls = bench.calls()
        with ledger.injection("the server directory is fsynced"):
            synced = [call for call in calls if call.name == "fsync" and "/undisturbed>" in call.arguments]
            assert len(synced) == 1


# --- the write of a snapshot


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Lane:
    return built_lane(tmp_path_factory.mktemp("lane"))


def test_a_snapshot_whose_disk_fails_at_each_system_call(
    injecting: Injecting, times: Times, lane: Lane
) -> None:
    with injecting("3, 5", "ENOSPC, EIO, EFBIG, EROFS in the build of a snapshot") as ledger:
        folder = lane.fresh("undisturbed")
        failures = failures_of(calls_of(lane.build_in(folder), lane.log))
        before = lane.files(lane.template)
        chosen, never_came = spread(failures, times(14, len(failures))), 0
        for number, (call, error) in enumerate(chosen):
            with ledger.injection(f"{call} {error}"):
                folder = lane.fresh(f"failed_{number}")
                ended = failed_at(call, error, lane.build_in(folder), lane.log)
                assert ended.status == 0, ended
                if not ended.injected:  # a build reads ahead in a thread: its calls are not always as many
                    never_came += 1
                    ledger.injected -= 1
                    continue
                assert ended.expected or not ended.failure, f"a raw {ended.failure}: {ended.said}"
                found = lane.files(folder)
                left = list(folder.rglob("*.part"))
                if ended.failure and lane.target in found:
                    assert "could not be confirmed" in ended.said, ended.said
                elif ended.failure:
                    assert found == before
                    assert "Next: " in ended.said
                    assert left == [] or call.name in _TIDYING
                assert {name: found[name] for name in before} == before
                if lane.target in found:
                    assert (
                        identify(folder / "work", LANE_SPEC.name, folder / "work" / lane.target) is not None
                    )
                with ledger.recovery():
                    assert lane.build_in(folder)() == lane.wanted
                assert lane.files(folder) == {**before, lane.target: lane.wanted}
                assert list(folder.rglob("*.part")) == []
                shutil.rmtree(folder)
        assert never_came <= len(chosen) / 20
