"""A small installation that an operator sees in the browser, with Dagster running on it.

Here: its days, its settings, its command line. Not here: fixtures (`conftest.py`), the processes
(`dagster_host.py`), or what should be true of it (the tests).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from muse_assets.automation import Cursor, write_cursor
from muse_assets.sample import write_days
from muse_assets.seoul_time import seoul_today
from muse_assets_tests.installations import Installation, environment_of, install
from muse_assets_tests.ui.dagster_host import LOCATION, DagsterHost, dagster_host

INDEX = "vibe"
SENSOR = "deploy_new_builds"
_SONGS = 300
_DAYS_BUILT = 3
# The daemon would follow each deploy with six runs of 10 s each on two cores; other tests watch those.
_NO_PLAYLISTS = Cursor(followed=2**62)
_SET_CURSOR = """
mutation($sensor: SensorSelector!, $cursor: String!) {
  setSensorCursor(sensorSelector: $sensor, cursor: $cursor) {
    __typename
  }
}
"""


@dataclass(frozen=True)
class Operated:
    """An installation, and the web server that shows it."""

    installation: Installation
    host: DagsterHost

    def muse(self, *arguments: str) -> str:
        """Run the command in a process of its own; what it printed."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("muse")), *arguments],
            env=dict(self.host.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def newest(self, step: str) -> dg.EventLogEntry:
        """The newest materialization of an asset of the lane."""
        event = self.installation.instance.get_latest_materialization_event(dg.AssetKey([INDEX, step]))
        assert event is not None, f"{INDEX}/{step} was never materialized"
        return event


@contextlib.contextmanager
def operated_installation(folder: Path) -> Iterator[Operated]:
    """Three days built and live, rows of today waiting in the tables, schedule and sensors off."""
    home = folder / "home"
    urls = {f"{name}_db_url": f"sqlite:///{home / name}.sqlite" for name in ("embedding", "playlist")}
    urls["redis_url"] = f"unix://{folder}/nobody.sock"  # no run of these tests writes playlists
    settings = environment_of(home, **urls, log_dir=str(folder / "logs"))
    with (
        pytest.MonkeyPatch.context() as patch,
        dg.DagsterInstance.from_config(settings["DAGSTER_HOME"]) as instance,
    ):
        patch.setenv("MUSE_LOG_DIR", settings["MUSE_LOG_DIR"])  # the instance's log handler reads it
        installation = install(home, instance, songs=_SONGS, **urls)
        _build_days(installation)
        with dagster_host(folder, _environment(settings)) as host:
            _without_playlists(host)
            yield Operated(installation, host)


def _build_days(installation: Installation) -> None:
    """All indexes on the first day, one of them on each; its rows change after each of its days."""
    today = seoul_today()
    for before in range(_DAYS_BUILT, 0, -1):
        day = (today - timedelta(days=before)).isoformat()
        if before == _DAYS_BUILT:
            for spec in installation.catalog.indexes:
                installation.rebuild(spec.name, day)
        else:
            for ran in (installation.build(INDEX, day), installation.deploy(INDEX)):
                assert ran.success, ran.failure
        write_days(installation.embeddings, installation.playlists, installation.catalog, days=1)


def _environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with these settings of ours and no others."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("MUSE_", "DAGSTER_"))}
    # FAISS's spinning threads beside three servers and a browser cost seconds a run.
    return kept | {"OMP_NUM_THREADS": "1"} | settings


def _without_playlists(host: DagsterHost) -> None:
    sensor = {
        "repositoryName": "__repository__",
        "repositoryLocationName": LOCATION,
        "sensorName": SENSOR,
    }
    done = host.graphql(_SET_CURSOR, sensor=sensor, cursor=write_cursor(_NO_PLAYLISTS))
    assert done["setSensorCursor"]["__typename"] == "Sensor", done
