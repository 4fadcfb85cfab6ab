"""Dagster on two hosts, as `deploy/README.md` says: the pages and the daemon on one, the builds on the other.

Here: that runs execute where the code location is, what is known of them elsewhere, and what becomes of them
when that host dies. Not here: one host (`test_deployment.py`), or the processes of runs
(`test_code_server.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._grpc.client import DagsterGrpcClient
from dagster_graphql import DagsterGraphQLClient, DagsterGraphQLClientError
from dagster_shared.yaml_utils import load_yaml_from_path
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from muse_assets.assets.run_processes import PROCESS_TAG
from muse_assets.automation import REBUILD
from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.durable_files import file_sha256
from muse_assets.sample import write_sample
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.installations import DAY_ONE, write_small_catalog
from muse_assets_tests.network_hosts import NetworkHost, Process, network
from muse_assets_tests.servers import execute, private_mariadb, private_redis
from muse_assets_tests.systemd_units import read_environment, read_unit

DEPLOY_FILES = Path(__file__).parent.parent / "deploy"
SPEC = CATALOG.index("artist")
PATIENCE_SECONDS = 60
# In deploy/dagster.yaml 30 and 120; the test waits for both.
POLL_SECONDS, UNREACHABLE_SECONDS = 1, 2
PROGRAMS = Path(sys.executable).parent
# What deploy/instance.env.example has, and systemd adds; pages and daemon see nothing else.
INSTANCE_SETTINGS = (*read_environment(DEPLOY_FILES / "instance.env.example"), "HOME")


@dataclass
class Cluster:
    """The two hosts, what runs on them, and the Dagster instance as seen from this machine."""

    front: NetworkHost
    builds: NetworkHost
    environment: Mapping[str, str]
    tables_url: str
    instance: dg.DagsterInstance
    running: dict[str, Process] = field(default_factory=dict)

    def start_front(self) -> None:
        """Daemon and webserver, with the instance's settings and none of the stores'."""
        mine = {name: self.environment[name] for name in INSTANCE_SETTINGS}
        workspace = str(self.front.seen_as / "workspace.yaml")
        page = ["dagster-webserver", "-h", self.front.address, "-p", "3000", "-w", workspace]
        for command in (page, ["dagster-daemon", "run", "-w", workspace]):
            self._start(self.front, command, mine)

    def start_builds(self) -> None:
        """The code location, by the command of deploy/several_hosts/tcp.conf, until it answers."""
        unit = read_unit(self.builds.disk / "units", "muse-dagster-code.service")
        _, *command = shlex.split(unit.value("ExecStart"))
        self._start(self.builds, ["python", *command], self.environment)
        self.wait("the code location answers", self.answers)

    def answers(self) -> bool:
        """Whether the code location answers this machine; RuntimeError when it has ended."""
        self.running["python"].check()
        try:
            return bool(DagsterGrpcClient(host=self.builds.address, port=4266).ping(""))
        except DagsterUserCodeUnreachableError:
            return False

    def _start(self, host: NetworkHost, command: list[str], environment: Mapping[str, str]) -> None:
        log = host.disk / f"{command[0]}.log"
        self.running[command[0]] = host.start([str(PROGRAMS / command[0]), *command[1:]], environment, log)

    def wait(self, what: str, reached: Callable[[], Any]) -> None:
        """Until it is so; the test fails with all logs when it takes too long."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            if time.monotonic() > deadline:
                tails = "\n".join(f"--- {name}: {one.tail()}" for name, one in self.running.items())
                pytest.fail(f"in {PATIENCE_SECONDS} s it did not come that {what}\n{tails}")
            time.sleep(0.1)

    def ask(self, query: str, **variables: Any) -> Any:
        """The data of the page's answer."""
        request = urllib.request.Request(
            f"http://{self.front.address}:3000/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
            return json.load(reply)["data"]

    def knows_assets(self) -> bool:
        try:
            return bool(self.ask("{ assetNodes { id } }")["assetNodes"])
        except OSError:
            return False

    def launch(self) -> str:
        """Have the page queue a rebuild of the index, once it reaches the code location; the run's id."""
        client = DagsterGraphQLClient(self.front.address, port_number=3000)
        runs: list[str] = []

        def launched() -> bool:
            # A page that knows no such job yet answers with an error that its own client cannot read.
            with contextlib.suppress(DagsterGraphQLClientError, KeyError):
                runs.append(
                    client.submit_job_execution(
                        REBUILD,
                        repository_location_name="muse_assets",
                        tags={"dagster/partition": DAY_ONE},
                        asset_selection=[
                            dg.AssetKey([SPEC.name, step]) for step in ("cluster", "index", "deployed")
                        ],
                    )
                )
            return bool(runs)

        self.wait("the page launches a run", launched)
        return runs[0]

    def run(self, run_id: str) -> dg.DagsterRun:
        found = self.instance.get_run_by_id(run_id)
        assert found is not None
        return found

    def succeed(self, run_id: str) -> None:
        self.wait("the run ends", lambda: self.run(run_id).is_finished)
        assert self.run(run_id).status is DagsterRunStatus.SUCCESS, self.said(run_id)

    def at_work(self, run_id: str) -> int:
        """The process of a run, once its step has begun."""
        self.wait("a step of the run begins", lambda: self.run(run_id).tags.get(PROCESS_TAG))
        host, pid, _ = self.run(run_id).tags[PROCESS_TAG].split(":")
        assert host == self.builds.name and int(pid) in self.builds.processes()
        return int(pid)

    def said(self, run_id: str) -> list[str]:
        """The messages of a run's events, as the page shows them."""
        query = """query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection {
            events { ... on MessageEvent { message } } } } }"""
        events = self.ask(query, run=run_id)["logsForRun"]["events"]
        return [event["message"] for event in events]

    def printed(self, run_id: str) -> str:
        """What the run's process printed, as the page shows it."""
        query = "query($key: [String!]!) { capturedLogs(logKey: $key) { stdout stderr } }"
        found = self.ask(query, key=[run_id, "compute_logs", self.log_name(run_id)])["capturedLogs"]
        return (found["stdout"] or "") + (found["stderr"] or "")

    def log_name(self, run_id: str) -> str:
        (name,) = {
            entry.dagster_event.logs_captured_data.file_key
            for entry in self.instance.all_logs(run_id, of_type=dg.DagsterEventType.LOGS_CAPTURED)
            if entry.dagster_event
        }
        return str(name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Both hosts at work, with databases and Redis on a third (this machine), which both reach."""
    for name in ("mariadbd", "mariadb-install-db", "redis-server"):
        require_tool(name)
    folder = tmp_path_factory.mktemp("hosts")
    with (
        network(folder, "front", "builds") as (here, (front, builds)),
        private_mariadb(folder, f"--bind-address=127.0.0.1,{here}") as tables_url,
        private_redis(folder / "redis", "--bind", "127.0.0.1", here) as redis_url,
    ):
        engine = engine_for(tables_url)
        write_sample(engine, engine, replace(CATALOG, indexes=(SPEC,)), songs=200)
        execute(tables_url, "CREATE DATABASE muse_dagster CHARACTER SET utf8mb4")
        from_there = make_url(tables_url).set(host=here)
        of_instance = from_there.set(drivername="mysql+mysqlconnector", database="muse_dagster")
        seen = {
            name: url.render_as_string(hide_password=False)
            for name, url in (("tables", from_there), ("instance", of_instance))
        }
        disk = front.seen_as
        environment = {
            "DAGSTER_HOME": str(disk / "dagster"),
            "DAGSTER_DISABLE_TELEMETRY": "yes",
            "HOME": str(disk),
            "MUSE_INSTANCE_DB_URL": seen["instance"],
            "MUSE_EMBEDDING_DB_URL": seen["tables"],
            "MUSE_PLAYLIST_DB_URL": seen["tables"],
            "MUSE_REDIS_URL": redis_url.replace("127.0.0.1", here),
            "MUSE_HOME": str(disk),
            "MUSE_WORK_DIR": str(disk / "work"),
            "MUSE_SERVER_DIR": str(disk / "server"),
            "MUSE_LOG_DIR": str(disk / "log"),
            "MUSE_CATALOG": str(disk / "catalog.toml"),
            # No sensor: run monitoring alone has to see what is gone.
            "MUSE_AUTOMATION": "stopped",
        }
        for host in (front, builds):
            set_up(host, builds.address)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MUSE_INSTANCE_DB_URL", seen["instance"])
            with dg.DagsterInstance.from_config(str(front.disk / "dagster")) as instance:  # makes its tables
                made = Cluster(front, builds, environment, tables_url, instance)
                made.start_builds()
                made.start_front()
                made.wait("the page knows the assets", made.knows_assets)
                yield made


def set_up(host: NetworkHost, code: str) -> None:
    """A host's files from `deploy/`, with this test's paths, addresses and times."""
    for name in ("dagster", "server", "work", "units/muse-dagster-code.service.d"):
        (host.disk / name).mkdir(parents=True)
    write_small_catalog(host.disk / "catalog.toml")
    settings = load_yaml_from_path(str(DEPLOY_FILES / "dagster.yaml"))
    assert isinstance(settings, dict)
    settings["compute_logs"]["config"]["base_dir"] = str(host.seen_as / "printed")
    settings["run_monitoring"]["poll_interval_seconds"] = POLL_SECONDS
    settings["run_launcher"]["config"]["unreachable_seconds"] = UNREACHABLE_SECONDS
    (host.disk / "dagster/dagster.yaml").write_text(json.dumps(settings), "utf-8")
    files = {
        "several_hosts/workspace.yaml": "workspace.yaml",
        "several_hosts/tcp.conf": "units/muse-dagster-code.service.d/tcp.conf",
        "systemd/muse-dagster-code.service": "units/muse-dagster-code.service",
    }
    for name, target in files.items():
        content = (DEPLOY_FILES / name).read_text("utf-8")
        (host.disk / target).write_text(content.replace("muse-code.internal", code), "utf-8")


@pytest.fixture
def locked(cluster: Cluster) -> Iterator[Connection]:
    """The index's table locked, so that a build waits for it; closing the connection lets it go on."""
    with create_engine(cluster.tables_url, poolclass=NullPool).connect() as connection:
        connection.execute(text(f"LOCK TABLES {SPEC.table} WRITE"))
        yield connection


def test_a_run_executes_on_the_host_of_the_code_location(cluster: Cluster) -> None:
    run = cluster.launch()
    cluster.at_work(run)
    cluster.succeed(run)
    files = {
        host.name: sorted(path.name for path in (host.disk / "server").glob("*.index"))
        for host in (cluster.front, cluster.builds)
    }
    assert files == {cluster.front.name: [], cluster.builds.name: [SPEC.live_file, SPEC.fallback_file]}
    built = cluster.instance.get_latest_materialization_event(dg.AssetKey([SPEC.name, "deployed"]))
    assert built is not None and built.asset_materialization is not None
    live = file_sha256(cluster.builds.disk / "server" / SPEC.live_file)
    assert built.asset_materialization.metadata["sha256"].value == live


def test_the_page_shows_a_run_s_events_but_not_what_its_process_printed(cluster: Cluster) -> None:
    run = cluster.launch()
    cluster.succeed(run)
    said = cluster.said(run)
    assert sum("Materialized value" in message for message in said) == 3
    assert cluster.printed(run) == ""
    name = cluster.log_name(run)
    assert list((cluster.builds.disk / "printed").rglob(f"{name}.err"))
    assert not list((cluster.front.disk / "printed").rglob(f"{name}.err"))


def test_a_run_whose_process_is_killed_is_failed(cluster: Cluster, locked: Connection) -> None:
    run = cluster.launch()
    os.kill(cluster.at_work(run), signal.SIGKILL)
    cluster.wait("the run is failed", lambda: cluster.run(run).is_finished)
    assert cluster.run(run).status is DagsterRunStatus.FAILURE
    locked.close()
    cluster.succeed(cluster.launch())


def test_a_run_whose_host_dies_is_failed_and_the_next_one_succeeds(
    cluster: Cluster, locked: Connection
) -> None:
    run = cluster.launch()
    cluster.at_work(run)
    cluster.builds.lose_power()
    cluster.wait("the run is failed", lambda: cluster.run(run).is_finished)
    assert cluster.run(run).status is DagsterRunStatus.FAILURE
    (why,) = (message for message in cluster.said(run) if "Marking run" in message)
    assert re.search(rf"the code location at {cluster.builds.address}:4266 has not answered for \d s", why)
    locked.close()
    cluster.start_builds()
    cluster.succeed(cluster.launch())


def test_a_run_whose_host_restarts_is_failed(cluster: Cluster, locked: Connection) -> None:
    run = cluster.launch()
    cluster.at_work(run)
    # The daemon does not look until the code location is there again.
    daemon = cluster.running["dagster-daemon"].process
    daemon.send_signal(signal.SIGSTOP)
    cluster.builds.lose_power()
    cluster.start_builds()
    daemon.send_signal(signal.SIGCONT)
    cluster.wait("the run is failed", lambda: cluster.run(run).is_finished)
    assert any("the code location restarted" in message for message in cluster.said(run))


def test_a_run_that_a_stopping_code_location_waits_for_is_left_alone(
    cluster: Cluster, locked: Connection
) -> None:
    run = cluster.launch()
    cluster.at_work(run)
    code = cluster.running["python"].process
    code.terminate()
    time.sleep(UNREACHABLE_SECONDS + 2 * POLL_SECONDS)
    assert cluster.run(run).status is DagsterRunStatus.STARTED and code.poll() is None
    locked.close()
    cluster.succeed(run)
    assert code.wait(PATIENCE_SECONDS) == 0
