"""A server directory that is missing, read-only, full, elsewhere, or shared with a rival.

Here: faults of the directory as a whole, for real: mounts, size limits, umask, races of processes. Not here:
errors call by call (`test_publish_system_calls.py`), damaged files (`test_damage.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import pytest

from muse_assets.failures import Conflict, MuseError, PassingFailure, PermanentFailure
from muse_assets.publishing.deploying import rollback
from muse_assets.publishing.verifying import verify
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.mounts import read_only, tmpfs
from muse_assets_tests.faults.snapshot_lane import Lane, built_lane
from muse_assets_tests.server_directories import (
    SPEC,
    assert_sound,
    contents,
    ended,
    fallback,
    in_child,
    live,
    put,
    sha,
    snapshot,
    temps,
)

_PAGE = 4096
_AGE_SECONDS = 0.1  # some ticks of the clock that stamps files


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


def fill(folder: Path, leave: int) -> Path:
    """Fill the disk but for about `leave` bytes; remove the returned file to free it."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"x" * _PAGE):
                pass
        file.truncate(max(0, file.tell() - leave))
    return filler


def refused(kind: type[MuseError], words: str, publish: Callable[[], object]) -> None:
    """The publish is red, in words that name the fault and what to do."""
    with pytest.raises(kind, match=words) as failure:
        publish()
    assert failure.value.next_step


# --- the directory itself


def absent(server: Path) -> contextlib.AbstractContextManager[object]:
    @contextlib.contextmanager
    def moved() -> Iterator[None]:
        server.rename(server.with_name("elsewhere"))
        try:
            yield
            assert not server.exists(), "it was created: its mount may have been missing"
        finally:
            server.with_name("elsewhere").rename(server)

    return moved()


def a_file(server: Path) -> contextlib.AbstractContextManager[object]:
    @contextlib.contextmanager
    def replaced() -> Iterator[None]:
        with absent(server):
            server.write_text("not a directory")
            yield
            assert server.read_text() == "not a directory"
            server.unlink()

    return replaced()


DIRECTORIES: dict[str, tuple[Callable[[Path], contextlib.AbstractContextManager[object]], str]] = {
    "missing": (absent, "does not exist"),
    "a file": (a_file, "is not a directory"),
    "read-only": (read_only, "read-only"),
}


@pytest.mark.parametrize("what", DIRECTORIES)
def test_a_directory_that_cannot_be_published_into(
    injecting: Injecting, work: Path, server: Path, what: str
) -> None:
    fault, words = DIRECTORIES[what]
    put(server, snapshot(work, 1))
    put(server, snapshot(work, 2))
    before, third = contents(server), snapshot(work, 3)
    with injecting("21", "server directory missing, a file, read-only") as ledger:
        for publish in (lambda: put(server, third), lambda: rollback(SPEC, server)):
            with ledger.injection(what), fault(server):
                refused(PermanentFailure, words, publish)
            assert contents(server) == before
        with ledger.recovery():
            put(server, third)
        assert_sound(server)


def test_a_directory_on_another_file_system(injecting: Injecting, work: Path, tmp_path: Path) -> None:
    with (
        injecting("21", "server directory on another file system than the work directory") as ledger,
        tmpfs(tmp_path / "disk", "8m") as server,
    ):
        assert server.stat().st_dev != work.stat().st_dev
        for seed in (1, 2, 3):
            with ledger.injection(f"deploy {seed}"):
                put(server, snapshot(work, seed))
                assert_sound(server) if seed > 1 else None
        with ledger.injection("rollback"):
            assert rollback(SPEC, server).sha256 == live(server)
            assert_sound(server)


# --- full disks and size limits


def test_a_full_disk(injecting: Injecting, times: Times, work: Path, tmp_path: Path) -> None:
    taken = snapshot(work, 3)
    with (
        injecting("3, 21", "the server's disk is full: whole, and all but the last pages") as ledger,
        tmpfs(tmp_path / "disk", "256k") as server,
    ):
        put(server, snapshot(work, 1))
        put(server, snapshot(work, 2))
        before = contents(server)
        pages = -(-taken[1].size // _PAGE)
        # From nothing free, over a file that lacks its last page, to a manifest that does not fit.
        for free in range(times(4, pages + 4)):
            filler = fill(server, free * _PAGE)
            left = {path: digest for path, digest in contents(server).items() if path != filler.name}
            assert left == before
            try:
                done = put(server, taken)
            except MuseError as failure:
                filler.unlink()
                with ledger.injection(f"{free} pages free"):
                    assert isinstance(failure, PassingFailure)
                    assert "full" in failure.what, failure
                    assert contents(server) == before
                    assert temps(server) == []
            else:
                assert done.sha256 == live(server)
                filler.unlink()
                rollback(SPEC, server)
                shutil.rmtree(server / ".backups" / SPEC.name)
                (server / ".backups" / SPEC.name).mkdir()
                before = contents(server)
        with ledger.recovery():
            put(server, taken)
        assert_sound(server)


def limit_files(limit: int) -> None:
    """No file of this process may grow beyond `limit` bytes from here on, as `ulimit -f` has it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def refused_for_its_size(publish: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        try:
            publish()
        except MuseError as error:
            # In the child: a wrong word must not look like a refusal.
            if "larger than this process may write" not in error.what or not error.next_step:
                raise RuntimeError(error.what) from error
            raise

    return run


def test_a_file_size_limit_in_a_deploy(injecting: Injecting, times: Times, work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    put(server, snapshot(work, 2))
    before, taken = contents(server), snapshot(work, 3)
    with injecting("4", "EFBIG by RLIMIT_FSIZE in a deploy") as ledger:
        for number in range(times(8, 100)):
            limit = taken[1].size * number // times(8, 100)
            with ledger.injection(f"{limit} bytes"):

                def publish(limit: int = limit) -> None:
                    limit_files(limit)
                    put(server, taken)

                assert ended(in_child(refused_for_its_size(publish))) == 1
                assert contents(server) == before
                assert temps(server) == []
        with ledger.recovery():
            put(server, taken)
        assert_sound(server)


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Lane:
    return built_lane(tmp_path_factory.mktemp("lane"))


def test_a_file_size_limit_in_the_write_of_faiss(injecting: Injecting, times: Times, lane: Lane) -> None:
    folder = lane.fresh("limited")
    before, size = lane.files(folder), lane.size
    with injecting("4", "EFBIG by RLIMIT_FSIZE inside a FAISS write") as ledger:
        for number in range(times(5, 60)):
            limit = size * number // times(5, 60)
            with ledger.injection(f"{limit} of {size} bytes"):

                def when_writing(stage: str, _done: int, _all: int, limit: int = limit) -> None:
                    if stage == "writing":  # not before: SQLite's side files are larger than the index
                        limit_files(limit)

                build = lane.build_in(folder, when_writing)
                assert ended(in_child(refused_for_its_size(build))) == 1
                assert lane.files(folder) == before
                assert list(folder.rglob("*.part")) == []
        with ledger.recovery():
            assert lane.build_in(folder)() == lane.wanted
        assert list(folder.rglob("*.part")) == []


def test_a_full_disk_in_the_write_of_a_snapshot(injecting: Injecting, times: Times, lane: Lane) -> None:
    folder = lane.fresh("full")
    with (
        injecting("3", "the work directory's disk is full: whole, and all but the last pages") as ledger,
        tmpfs(folder / "work", "1m") as work,
    ):
        shutil.copytree(lane.template / "work", work, dirs_exist_ok=True)
        before = lane.files(folder)
        pages = -(-lane.size // _PAGE)
        for free in range(pages + 2) if times(0, 1) else (0, pages - 1, pages):
            with ledger.injection(f"{free} pages free, the index has {pages}"):
                filler = fill(work, free * _PAGE)
                refused(PassingFailure, "full", lane.build_in(folder))
                filler.unlink()
                assert lane.files(folder) == before
                assert list(work.rglob("*.part")) == []
        with ledger.recovery():
            assert lane.build_in(folder)() == lane.wanted


# --- modes


def test_a_umask_of_077(injecting: Injecting, work: Path, tmp_path: Path) -> None:
    with injecting("29", "umask 077: live, fallback, manifests, backups, folders open to readers") as ledger:
        old = os.umask(0o077)
        try:
            taken = [snapshot(work, seed) for seed in (1, 2)]
            for number, publish in enumerate(("first deploy", "second deploy", "rollback")):
                with ledger.injection(publish):
                    server = tmp_path / f"server_{number}"
                    server.mkdir(0o777)
                    server.chmod(0o755)
                    for one in taken[: number + 1]:
                        put(server, one)
                    if publish == "rollback":
                        rollback(SPEC, server)
                    published = [path for path in server.rglob("*") if ".locks" not in path.parts]
                    modes = {path: path.stat().st_mode & 0o777 for path in published}
                    assert {modes[path] for path in published if path.is_file()} == {0o644}
                    assert {modes[path] for path in published if path.is_dir()} == {0o755}
                    if os.geteuid() == 0:
                        assert ended(in_child(lambda server=server: as_nobody(server))) == 0  # type: ignore[misc]
        finally:
            os.umask(old)


def as_nobody(server: Path) -> None:
    """Read as the search server's user does; the test's own folders above are opened for it first."""
    for parent in server.parents:
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    faiss.read_index(str(server / SPEC.live_file))
    faiss.read_index(str(server / SPEC.fallback_file))
    if any(finding.state != "ok" for finding in verify(server, SPEC)):
        raise RuntimeError("verify could not read everything")


# --- rivals


def test_two_deploys_at_once(injecting: Injecting, times: Times, work: Path, server: Path) -> None:
    taken = [snapshot(work, seed) for seed in range(4)]
    put(server, taken[0])
    choose = random.Random(3)
    met = 0
    with injecting("19", "two deploys of one index at once") as ledger:
        for race in range(times(25, 1_000)):
            with ledger.injection(f"race {race}"):
                rivals = choose.sample(taken, 2) if race % 5 else [choose.choice(taken)] * 2
                start = time.monotonic() + 0.02
                delays = (start, start + choose.uniform(0, 0.004))
                pids = [
                    in_child(lambda one=one, at=at: deploy_at(server, one, at))  # type: ignore[misc]
                    for one, at in zip(rivals, delays, strict=True)
                ]
                codes = [ended(pid) for pid in pids]
                assert set(codes) <= {0, 1}, "neither deployed nor a conflict"
                assert 0 in codes, "both lost"
                met += 1 in codes
                winners = {one[1].sha256 for one, code in zip(rivals, codes, strict=True) if code == 0}
                assert live(server) in winners
                assert fallback(server) in {one[1].sha256 for one in taken}
                assert {finding.state for finding in verify(server, SPEC)} == {"ok"}
                assert temps(server) == []
        ledger.note = f"{met} met"
        assert met, "they never met"
        with ledger.recovery():
            put(server, taken[1])
        assert_sound(server)


def deploy_at(server: Path, taken: tuple[Path, object], at: float) -> None:
    while time.monotonic() < at:
        pass
    try:
        put(server, taken)  # type: ignore[arg-type]
    except Conflict:
        raise
    except MuseError as error:
        raise RuntimeError(str(error)) from error


@pytest.mark.parametrize("aged", [False, True], ids=["of_this_minute", "aged"])
@pytest.mark.parametrize("manner", ["cp", "mv"])
def test_a_rivals_copy_over_the_live_file_during_a_deploy(
    injecting: Injecting,
    times: Times,
    work: Path,
    server: Path,
    manner: str,
    aged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aged: the live file has not been written for a while, so its stamp is asked and not its bytes, and the
    copy is staged in a thread, as in a day's deploy of a large file.
    """
    if aged:
        monkeypatch.setattr("muse_assets.durable_files._SETTLED_SECONDS", _AGE_SECONDS)
        monkeypatch.setattr("muse_assets.publishing.deploying._WORTH_A_THREAD", 0)
        monkeypatch.setattr("muse_assets.durable_files._PIECE", 1)
    # 20,000 rows, so that there is time to meet in.
    first, second = (snapshot(work, seed, rows=20_000) for seed in (1, 2))
    known, unknown = (snapshot(work, seed, rows=20_000) for seed in (3, 4))
    choose = random.Random(4)
    refusals = 0
    with injecting("19, 20", "a rival's cp or mv over the live file during a deploy") as ledger:
        put(server, first)
        put(server, second)
        put(server, known)
        for round_ in range(times(12, 300)):
            with ledger.injection(f"{manner} {round_}"):
                wanted = (first, second)[round_ % 2]
                rival = (known, unknown)[round_ // 2 % 2]
                kept = {path.name: digest for path, digest in backups_of(server).items()}
                staged = server.parent / "rival.index"
                shutil.copyfile(rival[0], staged)
                if aged:
                    time.sleep(2 * _AGE_SECONDS)
                pid = in_child(lambda wanted=wanted: deploy_or_conflict(server, wanted))  # type: ignore[misc]
                time.sleep(choose.uniform(0, 0.015))
                subprocess.run([manner, staged, server / SPEC.live_file], check=True)
                code = ended(pid)
                assert code in (0, 1), "neither deployed nor refused"
                refusals += code
                # The rival's copy came before the deploy's start, during it, or after its end.
                assert live(server) in {rival[1].sha256, wanted[1].sha256}
                if code == 1:
                    assert live(server) == rival[1].sha256
                    assert temps(server) == []
                now = {path.name: digest for path, digest in backups_of(server).items()}
                assert all(now.get(name, digest) == digest for name, digest in kept.items())
                with ledger.recovery():
                    put(server, wanted, replace_damaged=True)
                assert live(server) == wanted[1].sha256
                assert_sound(server)
                for backup in (server / ".backups" / SPEC.name).glob("*.index"):
                    assert sha(backup).startswith(backup.stem.rpartition("_")[2])
        ledger.note = f"{refusals} conflicts"
        assert refusals, "they never met"


def backups_of(server: Path) -> dict[Path, str]:
    folder = server / ".backups" / SPEC.name
    return {server / path: digest for path, digest in contents(folder).items()}


def deploy_or_conflict(server: Path, taken: tuple[Path, object]) -> None:
    try:
        put(server, taken)  # type: ignore[arg-type]
    except Conflict:
        raise
    except PermanentFailure as error:
        # Read while cp had written half of it: damaged indeed, and refused.
        if "damaged or was edited" not in error.what:
            raise RuntimeError(str(error)) from error
        raise
