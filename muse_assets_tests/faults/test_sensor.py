"""The deploy sensor after crashes: each newest good build goes live once, then the playlists follow once.

Here: ticks on a real instance with real runs, cut off where a daemon can be; and real daemons. Not here: the
sensor's decisions one by one (`test_automation.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import dagster as dg
import pytest

from muse_assets.assets.index_lane import deployed_key
from muse_assets.assets.run_processes import PROCESS_TAG
from muse_assets.automation import DEPLOY, PLAYLISTS
from muse_assets.catalog import CATALOG
from muse_assets.durable_files import file_sha256, locked
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.on_disk_instance import INDEX, SPEC, Lane, daily, deploy, open_lane, rounds
from muse_assets_tests.faults.warm_process import Child, Step

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 300
RUN_KEY = "dagster/run_key"
FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}


@dataclass
class Daemon:
    """The daemon's loop in steps, so that it can be cut off between any two of them.

    Run keys are looked up among the instance's runs, as the daemon does it.
    """

    lane: Lane
    cursor: str = ""
    skipped: str = ""
    children: list[Child] = field(default_factory=list)

    @property
    def instance(self) -> dg.DagsterInstance:
        return self.lane.installed.instance

    def evaluate(self) -> tuple[list[dg.RunRequest], str]:
        """The requests of one evaluation and the cursor to be kept once they are launched."""
        defs = self.lane.installed.defs
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor or None, definitions=defs
        )
        answer = defs.resolve_sensor_def("deploy_new_builds").evaluate_tick(context)
        self.skipped = answer.skip_message or ""
        return list(answer.run_requests or []), answer.cursor or self.cursor

    def launch(self, requests: list[dg.RunRequest]) -> None:
        """A process each for deploys; the playlists are only recorded, they are not the matter here."""
        for request in requests:
            tags = {**request.tags, RUN_KEY: str(request.run_key)}
            if self._has_run(tags[RUN_KEY]):
                continue
            if request.job_name == PLAYLISTS:
                job = self.lane.installed.defs.resolve_job_def(PLAYLISTS)
                self.instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.SUCCESS)
            else:
                assert request.job_name == DEPLOY
                step = Step(DEPLOY, (f"{INDEX}/deployed",), run_config=dict(request.run_config), tags=tags)
                self.children.append(self.lane.warm.start(step))
                # The daemon too has the run on record before it goes on.
                wait_until(partial(self._has_run, tags[RUN_KEY]), "the run is on record")

    def _has_run(self, run_key: str) -> bool:
        return bool(self.instance.get_runs(dg.RunsFilter(tags={RUN_KEY: run_key}), limit=1))

    def tick(self) -> None:
        requests, cursor = self.evaluate()
        self.launch(requests)
        self.cursor = cursor

    def wait(self) -> None:
        """Until what was launched has ended."""
        while self.children:
            self.children.pop().wait()

    def settle(self) -> None:
        """Ticks until nothing is asked for any more."""
        for _ in range(8):
            self.wait()
            requests, cursor = self.evaluate()
            self.launch(requests)
            self.cursor = cursor
            if not requests:
                return
        raise AssertionError("the sensor does not come to rest")

    def runs(self, job: str) -> list[dg.DagsterRun]:
        return [r for r in self.instance.get_runs(dg.RunsFilter(job_name=job)) if RUN_KEY in r.tags]

    def run_keys(self, job: str, *statuses: dg.DagsterRunStatus) -> set[str]:
        return {run.tags[RUN_KEY] for run in self.runs(job) if not statuses or run.status in statuses}

    def has_more(self, job: str, than: int) -> bool:
        return len(self.run_keys(job)) > than

    def has_done(self, job: str, count: int) -> bool:
        return len(self.run_keys(job, dg.DagsterRunStatus.SUCCESS)) >= count

    def deployed(self) -> int:
        """Materializations of the live file."""
        return len(self.instance.fetch_materializations(deployed_key(SPEC), limit=10_000).records)

    def hours_pass(self) -> None:
        """As far as the records of ended runs tell."""
        database = Path(os.environ["DAGSTER_HOME"]) / "history" / "runs.db"
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
            connection.execute("UPDATE runs SET end_time = end_time - 3600 WHERE end_time IS NOT NULL")


def killed_before_the_runs(daemon: Daemon) -> None:
    daemon.evaluate()


def killed_between_runs_and_cursor(daemon: Daemon) -> None:
    requests, _ = daemon.evaluate()
    daemon.launch(requests)
    daemon.settle()
    requests, _ = daemon.evaluate()
    daemon.launch(requests)


def cursor_lost_before(daemon: Daemon) -> None:
    daemon.cursor = ""


def cursor_lost_during(daemon: Daemon) -> None:
    daemon.tick()
    daemon.cursor = "{damaged"
    daemon.tick()


def cursor_lost_after(daemon: Daemon) -> None:
    daemon.settle()
    daemon.cursor = ""


def two_builds_while_down(daemon: Daemon) -> None:
    daemon.lane.toggle()
    daemon.lane.run(*daily(full=True))


def deploy_killed(daemon: Daemon) -> None:
    daemon.tick()
    child = daemon.children.pop()
    wait_until(lambda: has_process(daemon.runs(DEPLOY)[0]) or child.status() is not None, "a step begins")
    child.kill()
    child.wait()
    retried_once_the_pause_is_over(daemon)


def deploy_failed(daemon: Daemon) -> None:
    with locked(daemon.lane.installed.server / ".locks" / f"{INDEX}.lock"):
        daemon.tick()
        daemon.wait()
    retried_once_the_pause_is_over(daemon)


def newer_build_after_a_failed_deploy(daemon: Daemon) -> None:
    with locked(daemon.lane.installed.server / ".locks" / f"{INDEX}.lock"):
        daemon.tick()
        daemon.wait()
    daemon.lane.toggle()
    daemon.lane.run(*daily())
    before = len(daemon.runs(DEPLOY))
    daemon.settle()
    daemon.hours_pass()
    daemon.settle()
    assert len(daemon.runs(DEPLOY)) == before + 1, "the old build was tried again"


def deploy_fails_for_hours(daemon: Daemon) -> None:
    """Given up after three repetitions; then a person deploys."""
    before = len(daemon.runs(DEPLOY))
    with locked(daemon.lane.installed.server / ".locks" / f"{INDEX}.lock"):
        for _ in range(6):
            daemon.tick()
            daemon.wait()
            daemon.hours_pass()
    assert len(daemon.runs(DEPLOY)) == before + 4
    assert "failed 4 times" in daemon.skipped
    daemon.lane.run(*deploy())


def deploy_refused(daemon: Daemon) -> None:
    """A damaged live file is no matter of time: nothing is tried again until a person has decided."""
    live = daemon.lane.live
    live.write_bytes(live.read_bytes() + b"!")
    before = len(daemon.runs(DEPLOY))
    daemon.tick()
    daemon.wait()
    daemon.hours_pass()
    for _ in range(3):
        daemon.tick()
        assert "refused" in daemon.skipped
        assert not daemon.children
    assert len(daemon.runs(DEPLOY)) == before + 1
    daemon.lane.run(*deploy(replace_damaged=True))


def retried_once_the_pause_is_over(daemon: Daemon) -> None:
    before = len(daemon.runs(DEPLOY))
    daemon.tick()
    assert "try 2 at" in daemon.skipped, daemon.skipped
    assert len(daemon.runs(DEPLOY)) == before
    daemon.hours_pass()
    daemon.tick()
    assert len(daemon.children) == 1
    daemon.wait()


def has_process(run: dg.DagsterRun) -> bool:
    """Whether its first step has begun, so that its process is on record."""
    return PROCESS_TAG in run.tags


FAULTS: list[Callable[[Daemon], None]] = [
    deploy_killed,
    killed_between_runs_and_cursor,
    deploy_refused,
    cursor_lost_during,
    deploy_failed,
    newer_build_after_a_failed_deploy,
    deploy_fails_for_hours,
    killed_before_the_runs,
    cursor_lost_before,
    cursor_lost_after,
    two_builds_while_down,
]


@pytest.fixture
def lane(tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    urls = {name: f"sqlite:///{tmp_path / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")}
    with open_lane(tmp_path, monkeypatch, redis_url=valkey_url, **urls) as made:
        yield made


def test_every_build_goes_live_once_whatever_befalls_the_daemon(
    injecting: Injecting, times: Times, lane: Lane
) -> None:
    daemon = Daemon(lane)
    daemon.settle()
    with injecting("26", "daemon, cursor or deploy lost around a build") as ledger:
        for n in rounds(times(4, 6 * len(FAULTS)), 240):
            befall = FAULTS[n % len(FAULTS)]
            lane.toggle()
            lane.run(*daily())
            deployed, followed = daemon.deployed(), len(daemon.runs(PLAYLISTS))
            with ledger.injection(f"{n}: {befall.__name__}"):
                befall(daemon)
                with ledger.recovery():
                    daemon.settle()
                assert file_sha256(lane.live) == lane.reference(), "the newest build is not live"
                assert daemon.deployed() == deployed + 1, "not deployed exactly once"
                # Counted by deploys: those by a run of the sensor and those by hand are followed up alike.
                assert len(daemon.runs(PLAYLISTS)) == followed + len(CATALOG.programs)
                assert "nothing new" in daemon.skipped
                assert all(run.status in FINISHED for run in daemon.instance.get_runs())
                assert not lane.installed.temp_files()


@contextlib.contextmanager
def real_daemon(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`dagster-daemon` as production runs it; afterwards it and all that it started are gone."""
    command = [str(Path(sys.executable).with_name("dagster-daemon")), "run", "-w", "workspace.yaml"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_real_daemons_deploy_a_build_once(
    injecting: Injecting, times: Times, lane: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builds while no daemon ran, a killed command's record, a daemon killed, then two at once."""
    monkeypatch.setenv("MUSE_AUTOMATION", "running")
    log, seen = tmp_path / "daemon.log", Daemon(lane)
    with injecting("26", "real daemon killed, then two on one instance") as ledger:
        for n in range(times(1, 3)):
            lane.toggle()
            lane.run(*daily())
            lane.toggle()
            lane.run(*daily(full=True))
            dead = leave_a_dead_run(lane)
            requested, followed = len(seen.run_keys(DEPLOY)), len(seen.run_keys(PLAYLISTS))
            deployed, deploys = seen.deployed(), len(seen.runs(DEPLOY))
            # What a daemon started outlives it, as after a crash; all of it ends with the test.
            with ledger.injection(n), contextlib.ExitStack() as daemons:
                first = daemons.enter_context(real_daemon(log))
                wait_until(partial(seen.has_more, DEPLOY, requested), "the sensor requests a deploy", log)
                first.kill()
                first.wait()
                with ledger.recovery():
                    for _ in range(2):
                        daemons.enter_context(real_daemon(log))
                    wait_until(
                        partial(seen.has_done, PLAYLISTS, followed + len(CATALOG.programs)),
                        "every program's playlist is refreshed",
                        log,
                    )
                # By run key: Dagster looks for one before it creates a run and not while, so two daemons at
                # the same instant may both create it; the second finds its work done.
                assert len(seen.run_keys(DEPLOY)) == requested + 1
                assert seen.deployed() - deployed == len(seen.runs(DEPLOY)) - deploys, "a deploy failed"
                assert file_sha256(lane.live) == lane.reference(), "the newest build is not live"
                assert len(seen.run_keys(PLAYLISTS)) == followed + len(CATALOG.programs)
                closed = seen.instance.get_run_by_id(dead)
                assert closed
                assert closed.status == dg.DagsterRunStatus.FAILURE
                assert not lane.installed.temp_files()


def leave_a_dead_run(lane: Lane) -> str:
    """The id of a run whose process was killed and that no further command has closed."""
    child = lane.warm.start(*daily(full=True))

    def in_progress() -> list[dg.DagsterRun]:
        newest = lane.installed.instance.get_runs(limit=1)
        return [run for run in newest if has_process(run) and not run.is_finished]

    wait_until(lambda: bool(in_progress()), "a run begins")
    child.kill()
    child.wait()
    [dead] = in_progress()
    return dead.run_id


def wait_until(reached: Callable[[], bool], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        said = log.read_text("utf-8", "replace")[-3000:] if log else ""
        assert time.monotonic() < deadline, f"in {PATIENCE_SECONDS} s it did not come that {what}: {said}"
        time.sleep(0.02 if log is None else 0.2)
