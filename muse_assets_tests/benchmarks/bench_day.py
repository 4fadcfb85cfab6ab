"""The scheduled day of all seven indexes through Dagster, against the same work as plain function calls.

Here: from the launch of the schedule's seven runs to the last program's keys, with the code location, daemon
and webserver of an installation and its instance on MariaDB, as `deploy/dagster.yaml` has it. 20,000 rows a
table and 64 floats a vector, so that the work is small beside what Dagster adds. Not here: what a
build costs by itself (`bench_daily.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import DagsterRunStatus
from sqlalchemy import insert
from sqlalchemy.engine import make_url

from muse_assets.automation import DAILY, DEPLOY, PLAYLISTS
from muse_assets.catalog import CATALOG, Catalog, load_catalog
from muse_assets.connections.databases import engine_for
from muse_assets.connections.redis_server import connect
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.playlists.searching import measure_searches
from muse_assets.publishing.deploying import deploy
from muse_assets.sample.tables import program_tables
from muse_assets.seoul_time import seoul_today
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.store import prune
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Row, begin, measure
from muse_assets_tests.benchmarks.tables import private_database, write_embeddings
from muse_assets_tests.benchmarks.vectors import clustered
from muse_assets_tests.installations import environment_of
from muse_assets_tests.servers import execute, private_redis
from muse_assets_tests.ui.dagster_host import LOCATION, DagsterHost, dagster_host

_ROWS = 20_000
_NEW_ROWS = 500
_SONGS = 2_000
_DIMENSION = 64
_SECONDS_MORE = 25.0
_PATIENCE_SECONDS = 600
_TO_LAST_KEY = "seconds to the last key"
_INSTANCE_SCHEMA = "dagster"
_SHAPE = {"dimension": _DIMENSION, "m": 8, "nlist": 32, "recall_gate": 0.0, "max_imbalance": 1000.0}
_LAUNCH = """
mutation($params: ExecutionParams!) {
  launchRun(executionParams: $params) { __typename ... on PythonError { message } }
}
"""


def rows(scale: float) -> Iterator[Row]:
    """One row: the bound is the plain calls' time and 25 s."""
    with private_database(1024) as url, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        catalog_file = _write_catalog(root / "catalog.toml")
        catalog = load_catalog(catalog_file)
        _write_tables(url, catalog, int(_ROWS * scale))
        _make_yesterday(url, catalog, root / "plain")
        for spec in catalog.indexes:
            new = clustered(_NEW_ROWS, _DIMENSION, seed=3)
            write_embeddings(url, spec, [new], first_idx=int(_ROWS * scale) + 1)
        shutil.copytree(root / "plain", root / "dagster")
        (root / "redis").mkdir()
        with private_redis(root / "redis") as redis_url:
            plain = measure(_plain_calls, url, redis_url, catalog_file, root / "plain")
            ours = measure(_through_dagster, url, redis_url, catalog_file, root / "dagster")
        _assert_same(catalog, root / "plain", root / "dagster")
    # The cost of the processes is known when they have ended; ending them is no part of the day.
    ours = replace(ours, wall=float(ours.facts[_TO_LAST_KEY]))
    said = {name: value for name, value in ours.facts.items() if name != _TO_LAST_KEY}
    yield Row(
        f"a day of {len(catalog.indexes)} x {int(_ROWS * scale):,} rows, through Dagster",
        f"plain calls + {_SECONDS_MORE:g} s",
        ours,
        Cost(plain.wall + _SECONDS_MORE, plain.cpu, plain.peak),
        reach=1,
        faster=False,
        note=f"plain calls {plain.wall:.1f} s, {ours.wall - plain.wall:.1f} s more; "
        + ", ".join(f"{name} {value}" for name, value in said.items()),
    )


def _write_catalog(file: Path) -> Path:
    fields = "".join(f"{name} = {value}\n" for name, value in _SHAPE.items())
    file.write_text("\n".join(f"[index.{spec.name}]\n{fields}" for spec in CATALOG.indexes), "utf-8")
    return file


def _write_tables(url: str, catalog: Catalog, rows: int) -> None:
    vectors = clustered(rows, _DIMENSION)
    for spec in catalog.indexes:
        write_embeddings(url, spec, [vectors])
    with engine_for(url).begin() as connection:
        for table in program_tables(catalog.programs).songs.values():
            table.create(connection)
            songs = (divmod(song, 12) for song in range(min(_SONGS, rows // 4)))
            values = [{"disc_id": f"{disc + 1:07d}", "track_no": f"{track + 1:02d}"} for disc, track in songs]
            connection.execute(insert(table), values)


def _make_yesterday(url: str, catalog: Catalog, home: Path) -> None:
    """Every index trained, built and live."""
    (home / "server").mkdir(parents=True)
    for spec in catalog.indexes:
        train_cluster(engine_for(url), spec, home / "work" / spec.cluster_file)
    _build_and_deploy(url, catalog, home, seoul_today() - timedelta(days=1))


def _build_and_deploy(url: str, catalog: Catalog, home: Path, day: date) -> None:
    for spec in catalog.indexes:
        built = build_snapshot(engine_for(url), spec, home / "work", day)
        deploy(spec, built.path, built.manifest, home / "server")
        prune(home / "work", spec, today=seoul_today())


def _plain_calls(url: str, redis_url: str, catalog_file: Path, home: Path) -> Facts:
    catalog, engine, client = load_catalog(catalog_file), engine_for(url), connect(redis_url)
    begin()
    _build_and_deploy(url, catalog, home, seoul_today())
    for program in catalog.programs:
        refresh_program(engine, engine, client, catalog, program, "song_tables", server=home / "server")
        measure_searches(engine, client, catalog, program, home / "server")
    client.flushdb()
    return {}


def _through_dagster(url: str, redis_url: str, catalog_file: Path, home: Path) -> Facts:
    catalog, client = load_catalog(catalog_file), connect(redis_url)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MUSE_", "DAGSTER_"))},
        **environment_of(home, embedding_db_url=url, playlist_db_url=url, redis_url=redis_url),
        "MUSE_CATALOG": str(catalog_file),
        "MUSE_AUTOMATION": "running",
        "MUSE_LOG_DIR": str(home / "logs"),
    }
    updates = [program.update_key for program in catalog.programs]
    _put_instance_on_mariadb(Path(environment["DAGSTER_HOME"]), url)
    with dagster_host(home, environment) as host:
        begin()
        started = time.time()
        _launch_the_days_runs(host, catalog)
        while client.exists(*updates) < len(updates):
            if time.time() - started > _PATIENCE_SECONDS:
                raise RuntimeError("the day did not end")
            time.sleep(0.05)
        seconds = time.time() - started
        return {_TO_LAST_KEY: seconds, **_times(environment["DAGSTER_HOME"], started)}


def _put_instance_on_mariadb(dagster_home: Path, url: str) -> None:
    execute(url, f"CREATE DATABASE {_INSTANCE_SCHEMA}")
    instance_url = make_url(url).set(drivername="mysql+mysqlconnector", database=_INSTANCE_SCHEMA, query={})
    with (dagster_home / "dagster.yaml").open("a", encoding="utf-8") as file:
        file.write(
            f"storage:\n  mysql:\n    mysql_url: {instance_url.render_as_string(hide_password=False)}\n"
        )


def _launch_the_days_runs(host: DagsterHost, catalog: Catalog) -> None:
    """As the schedule's tick asks for them: one an index, of today's partition."""
    day = seoul_today().isoformat()
    for spec in catalog.indexes:
        params: Mapping[str, Any] = {
            "selector": {
                "repositoryLocationName": LOCATION,
                "repositoryName": "__repository__",
                "jobName": DAILY,
                "assetSelection": [{"path": [spec.name, "index"]}],
                "assetCheckSelection": None,
            },
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": day}]},
        }
        launched = host.graphql(_LAUNCH, params=params)["launchRun"]
        if launched["__typename"] != "LaunchRunSuccess":
            raise RuntimeError(str(launched))


def _times(dagster_home: str, started: float) -> Facts:
    """When each job's last run ended, and what its runs took, in seconds."""
    found: dict[str, float | str] = {}
    with dg.DagsterInstance.from_config(dagster_home) as instance:
        for job in (DAILY, DEPLOY, PLAYLISTS):
            records = instance.get_run_records(dg.RunsFilter(job_name=job))
            if failed := [r for r in records if r.dagster_run.status == DagsterRunStatus.FAILURE]:
                raise RuntimeError(f"a run of {job} failed: {failed[0].dagster_run.run_id}")
            done = [(r.start_time, r.end_time or time.time()) for r in records if r.start_time]
            spent = sum(end - start for start, end in done)
            last = max(end for _, end in done) - started
            found[job] = f"{len(done)} runs of {spent / len(done):.1f} s, the last ended at {last:.1f} s"
    return found


def _assert_same(catalog: Catalog, one: Path, other: Path) -> None:
    for spec in catalog.indexes:
        contents = {(home / "server" / spec.live_file).read_bytes() for home in (one, other)}
        if len(contents) != 1:
            raise RuntimeError(f"{spec.name}: what Dagster's runs deployed is not what the calls did")
