"""A real daemon, killed between a build and its deploy: one deploy, one refresh of the playlists."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import redis

from muse_assets.automation import DEPLOY, PLAYLISTS
from muse_assets.catalog import CATALOG
from muse_assets_tests.installations import DAY_ONE, Installation, install

INDEX = "artist"
PATIENCE_SECONDS = 90
ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed(tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """All tables in SQLite, known to this process and to the daemon's by environment variables."""
    home = tmp_path / "dagster"
    home.mkdir()
    settings = (importlib.resources.files("muse_assets") / "dagster.yaml").read_text("utf-8")
    (home / "dagster.yaml").write_text(settings, "utf-8")
    urls = {
        "embedding_db_url": f"sqlite:///{tmp_path / 'embeddings.sqlite'}",
        "playlist_db_url": f"sqlite:///{tmp_path / 'playlists.sqlite'}",
        "redis_url": valkey_url,
    }
    for name, value in {
        "DAGSTER_HOME": str(home),
        "MUSE_HOME": str(tmp_path),
        "MUSE_SERVER_DIR": str(tmp_path / "server"),
        "MUSE_AUTOMATION": "running",
        **{f"MUSE_{name.upper()}": url for name, url in urls.items()},
    }.items():
        monkeypatch.setenv(name, value)
    with redis.Redis.from_url(valkey_url) as client:
        client.flushdb()
    with dg.DagsterInstance.get() as instance:
        yield install(tmp_path, instance, **urls, songs=300)


@contextlib.contextmanager
def daemon(log: Path) -> Iterator[subprocess.Popen[bytes]]:
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


def test_a_killed_daemon_deploys_once(installed: Installation, tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    built = installed.run("rebuild", f"{INDEX}/cluster", f"{INDEX}/index", partition=DAY_ONE)
    assert built.success, built.failure
    live = installed.server / f"muse_{INDEX}.index"

    # What the first daemon started outlives it, as after a crash; all of it ends with the test.
    with contextlib.ExitStack() as daemons:
        first = daemons.enter_context(daemon(log))
        wait_until(lambda: bool(runs(installed, DEPLOY)), "the sensor requests a deploy", log)
        first.kill()
        first.wait()
        assert not live.exists()
        daemons.enter_context(daemon(log))
        wait_until(
            lambda: len(runs(installed, PLAYLISTS, dg.DagsterRunStatus.SUCCESS)) == len(CATALOG.programs),
            "every program's playlist is refreshed",
            log,
        )

    (deployed,) = runs(installed, DEPLOY)
    assert deployed.tags["dagster/sensor_name"] == "deploy_new_builds"
    assert installed.server_files()[live.name] == built.metadata(f"{INDEX}/index")["sha256"]
    assert len(runs(installed, PLAYLISTS)) == len(CATALOG.programs)
    assert len(installed.redis_values()) == len(CATALOG.programs) * (len(CATALOG.indexes) + 1)


def runs(installed: Installation, job: str, *statuses: dg.DagsterRunStatus) -> list[dg.DagsterRun]:
    return list(installed.instance.get_runs(dg.RunsFilter(job_name=job, statuses=statuses)))


def wait_until(reached: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            pytest.fail(f"in {PATIENCE_SECONDS} s it did not come that {what}: {log.read_text()[-3000:]}")
        time.sleep(0.2)
