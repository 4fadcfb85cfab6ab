"""SIGKILL at random points of whole runs: files and keys stay whole, and the next clean run heals.

Here: processes that run the graph and are killed with all that they started. Not here: kills at each system
call of one publish (`test_publish_system_calls.py`), or the daemon's restart (`test_sensor.py`).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from muse_assets.assets.run_processes import PROCESS_TAG
from muse_assets.durable_files import file_sha256
from muse_assets.publishing.backups import Backup, backups
from muse_assets.seoul_time import seoul_today
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting, Ledger
from muse_assets_tests.faults.on_disk_instance import (
    INDEX,
    SPEC,
    Lane,
    daily,
    deploy,
    open_lane,
    playlists,
    rebuild,
    rounds,
)
from muse_assets_tests.faults.warm_process import PATIENCE_SECONDS, Child, Step

ROOT = Path(__file__).parent.parent.parent


def muse_run() -> tuple[Step, ...]:
    return (Step(arguments=("run", "--index", INDEX)),)


@dataclass(frozen=True)
class Scenario:
    """A run to be killed, the clean run after it, and whether a snapshot has to wait for it."""

    name: str
    killed: Callable[[], tuple[Step, ...]]
    healing: Callable[[], tuple[Step, ...]]
    snapshot_first: bool = False


SCENARIOS = [
    Scenario("incremental build", daily, lambda: daily() + deploy()),
    Scenario("deploy", deploy, deploy, snapshot_first=True),
    Scenario("full build", lambda: daily(full=True), lambda: daily() + deploy()),
    Scenario("playlists", playlists, playlists),
    Scenario("train", lambda: rebuild("cluster"), lambda: rebuild("cluster", "index", "deployed")),
    Scenario("rollback", lambda: deploy(rollback=True), lambda: deploy(release=True), snapshot_first=True),
    Scenario(
        "rebuild",
        lambda: rebuild("cluster", "index", "deployed"),
        lambda: rebuild("cluster", "index", "deployed"),
    ),
    Scenario("muse run", muse_run, muse_run),
]


@pytest.fixture
def lane(
    mariadb_schema: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lane]:
    """On MariaDB and Redis, both databases in one schema."""
    with open_lane(
        tmp_path,
        monkeypatch,
        embedding_db_url=mariadb_schema,
        playlist_db_url=mariadb_schema,
        redis_url=redis_url,
    ) as made:
        yield made


def close_records(lane: Lane) -> int:
    """A tick of the sensor closes what killed processes left; how many runs died before their first step.

    Those carry no process yet, and are left to the instance's `max_runtime_seconds`.
    """
    instance = lane.installed.instance
    defs = lane.installed.defs
    context = dg.build_sensor_context(instance=instance, definitions=defs)
    defs.resolve_sensor_def("deploy_new_builds").evaluate_tick(context)
    left = [run for run in instance.get_runs() if not run.is_finished]
    assert not [run for run in left if PROCESS_TAG in run.tags], "a dead run stays STARTED"
    for run in left:
        instance.report_run_failed(run)
    return len(left)


def test_a_killed_run_is_healed_by_the_next(injecting: Injecting, times: Times, lane: Lane) -> None:
    with injecting("2", "SIGKILL at random points of whole runs") as ledger:
        kill_runs(ledger, lane, times(8, 200))
    # As operators and schedulers start them; a start takes seconds, so few of them.
    with injecting("2", "SIGKILL of whole `dagster asset materialize` commands") as ledger:
        kill_commands(ledger, lane, times(1, 6))


def kill_runs(ledger: Ledger, lane: Lane, wanted: int) -> None:
    choose = random.Random(7)
    # Seconds from the scenario's first step to the end of its run, learned on the way.
    lasts = dict.fromkeys((scenario.name for scenario in SCENARIOS), 0.5)
    temps = untagged = 0
    for attempt in rounds(4 * wanted, 3600):
        scenario = SCENARIOS[ledger.injected % len(SCENARIOS)]
        before = lane.keys()
        known = {file_sha256(lane.live), *(file_sha256(kept.path) for kept in kept_backups(lane))}
        lane.toggle()
        if scenario.snapshot_first:
            lane.build()
        moment = choose.uniform(0, lasts[scenario.name])
        child = lane.warm.start(*scenario.killed())
        if choose.random() < 0.9:  # the rest die before their first step
            wait_for_step(lane, child)
        started = time.monotonic()
        while time.monotonic() < started + moment and child.status() is None:
            time.sleep(0.005)
        child.kill()
        if child.wait() != -signal.SIGKILL:
            # It was quicker than thought: not a fault, and no moment of the run to be missed.
            lasts[scenario.name] = time.monotonic() - started
            lane.run(*scenario.healing())
            continue
        lasts[scenario.name] *= 1.25
        with ledger.injection(f"{attempt}: {scenario.name} after {moment:.3f} s"):
            temps += bool(lane.installed.temp_files())
            lane.assert_whole(known)
            assert_healed(ledger, lane, scenario, before)
        untagged += close_records(lane)
        if ledger.injected == wanted:
            break
    ledger.note = f"{temps} left temp files; {untagged} died before their first step"
    assert ledger.injected >= min(wanted, len(SCENARIOS)), "a run of each kind has to be killed"


def wait_for_step(lane: Lane, child: Child) -> None:
    """Until the child's first step has begun: before it lie only Dagster's own preparations."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while child.status() is None and time.monotonic() < deadline:
        newest = lane.installed.instance.get_runs(limit=1)
        if any(PROCESS_TAG in run.tags and not run.is_finished for run in newest):
            return
        time.sleep(0.01)


def kept_backups(lane: Lane) -> list[Backup]:
    return backups(SPEC, lane.installed.server)


def assert_healed(ledger: Ledger, lane: Lane, scenario: Scenario, before: tuple[bytes | None, ...]) -> None:
    """One clean run puts everything right, and Redis had the old keys or the new ones."""
    after_kill = lane.keys()
    with ledger.recovery():
        lane.run(*scenario.healing())
    if scenario.name in ("playlists", "muse run"):
        assert after_kill in (before, lane.keys()), "half of the program's keys changed"
    else:
        assert after_kill == before == lane.keys()
    if scenario.name != "playlists":
        assert file_sha256(lane.live) == lane.reference(), "not the bytes of a run that was never killed"
    if scenario.name in ("train", "rebuild"):
        assert file_sha256(lane.cluster) == lane.reference_cluster()
    assert not lane.installed.temp_files()


def kill_commands(ledger: Ledger, lane: Lane, wanted: int) -> None:
    choose = random.Random(11)
    program = str(Path(sys.executable).with_name("dagster"))
    for n in range(4 * wanted):
        before = {file_sha256(lane.live)}
        lane.toggle()
        selection = f"{INDEX}/index,{INDEX}/deployed" if n % 2 else f"{INDEX}/index"
        command = [program, "asset", "materialize", "-m", "muse_assets.definitions"]
        command += ["--select", selection, "--partition", seoul_today().isoformat()]
        known = {run.run_id for run in lane.installed.instance.get_runs()}
        with lane.warm.folder.joinpath(f"command_{n}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait_for_start(lane, known, process)
            time.sleep(choose.uniform(0, 0.8))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != -signal.SIGKILL:
            continue  # it had ended before
        with ledger.injection(f"command {n}"):
            lane.assert_whole(before)
            with ledger.recovery():
                lane.run(*daily(), *deploy())
            assert file_sha256(lane.live) == lane.reference()
            assert not lane.installed.temp_files()
        close_records(lane)
        if ledger.injected == wanted:
            return
    pytest.fail(f"only {ledger.injected} of {wanted} commands were killed")


def wait_for_start(lane: Lane, known: set[str], process: subprocess.Popen[bytes]) -> None:
    """Until the command's run has begun."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        runs = [run for run in lane.installed.instance.get_runs(limit=1) if run.run_id not in known]
        if runs and runs[0].status == dg.DagsterRunStatus.STARTED:
            return
        time.sleep(0.02)
    pytest.fail(f"the command did not begin its run (exit status {process.returncode})")
