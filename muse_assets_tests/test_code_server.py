"""The server whose runs are forks of a warm process: that they are, and what happens when that one is gone.

Here: the processes. Not here: what a run does (`test_assets.py`), or the server as a unit
(`test_deployment.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import numpy as np
import pytest
from dagster import DagsterRunStatus
from dagster._core.launcher import WorkerStatus
from dagster._core.test_utils import create_run_for_test

from muse_assets.assets.run_processes import PROCESS_TAG
from muse_assets.automation import REBUILD
from muse_assets.catalog import CATALOG
from muse_assets.code_server.forking import RunContext, warm_context
from muse_assets.code_server.launching import WatchingRunLauncher
from muse_assets.seoul_time import seoul_today
from muse_assets_tests.installations import environment_of
from muse_assets_tests.ui.dagster_host import LOCATION, DagsterHost, dagster_host

PATIENCE_SECONDS = 60
LAUNCH = """
mutation($params: ExecutionParams!) {
  launchRun(executionParams: $params) { ... on LaunchRunSuccess { run { runId } } }
}
"""
TERMINATE = "mutation($run: String!) { terminateRun(runId: $run) { __typename } }"


def wait_until(what: str, reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"in {PATIENCE_SECONDS} s it did not come that {what}"
        time.sleep(0.05)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- The processes ----------------------------------------------------------------------------------------


@pytest.fixture
def warm() -> Iterator[Callable[[str], RunContext]]:
    """Makes the context whose warm process imports a module; that process ends with the test."""
    yield lambda module: warm_context([module])
    stop_warm_process()


def stop_warm_process() -> None:
    if (pid := forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        wait_until("the warm process ends", lambda: not runs(pid))


def say_who(answers: Any) -> None:
    answers.put((os.getpid(), os.getppid(), "faiss" in sys.modules))


def sleep_long(answers: Any) -> None:
    say_who(answers)
    time.sleep(PATIENCE_SECONDS)


def search(answers: Any) -> None:
    faiss.omp_set_num_threads(2)
    vectors = np.random.default_rng(1).random((20_000, 32), dtype=np.float32)
    distances, ids = faiss.knn(vectors[:2_000], vectors, 10)
    product = vectors.T @ vectors
    answers.put((ids, distances, product, len(list(Path("/proc/self/task").iterdir()))))


def started(context: RunContext, work: Callable[[Any], None]) -> tuple[Any, Any]:
    """The process and its first answer."""
    answers = context.Queue()
    process = context.Process(target=work, args=(answers,))
    process.start()
    return process, answers.get(timeout=PATIENCE_SECONDS)


def test_a_process_is_a_fork_of_the_warm_one(warm: Callable[[str], RunContext]) -> None:
    context = warm("faiss")
    process, (pid, parent, preloaded) = started(context, say_who)
    process.join()
    assert (process.pid, process.exitcode) == (pid, 0)
    assert parent not in (os.getpid(), 1) and parent_of(parent) == os.getpid()
    assert preloaded


def test_faiss_and_blas_use_their_threads_in_a_fork(warm: Callable[[str], RunContext]) -> None:
    process, (ids, distances, product, threads) = started(warm("muse_assets.code_server.warm"), search)
    process.join()
    assert process.exitcode == 0 and threads > 1
    vectors = np.random.default_rng(1).random((20_000, 32), dtype=np.float32)
    expected_distances, expected = faiss.knn(vectors[:2_000], vectors, 10)
    assert np.array_equal(ids, expected) and np.array_equal(distances, expected_distances)
    assert np.allclose(product, vectors.T @ vectors)


def test_a_process_ends_with_the_warm_one_and_the_next_has_a_new_one(
    warm: Callable[[str], RunContext],
) -> None:
    context = warm("faiss")
    process, (pid, parent, _) = started(context, sleep_long)
    os.kill(parent, signal.SIGKILL)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 255
    wait_until("the process ends too", lambda: not runs(pid))
    _, (_, new_parent, preloaded) = started(context, say_who)
    assert new_parent not in (parent, os.getpid()) and preloaded


def test_without_a_warm_process_one_begins_afresh(
    warm: Callable[[str], RunContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_warm.py").write_text("raise RuntimeError('not today')", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process, (_, parent, _) = started(warm("broken_warm"), say_who)
    process.join()
    assert (parent, process.exitcode) == (os.getpid(), 0)


# --- The server -------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DagsterHost]:
    """An installation whose embedding database takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mysql+pymysql://muse@127.0.0.1:{silent.getsockname()[1]}/muse"
        home = tmp_path / "home"
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("MUSE_", "DAGSTER_"))
            },
            **environment_of(home, embedding_db_url=url, playlist_db_url=url),
            "MUSE_LOG_DIR": str(home / "logs"),
        }
        with dagster_host(home, environment) as running:
            yield running


def test_runs_are_forks_that_can_be_terminated_and_fail_with_the_warm_process(host: DagsterHost) -> None:
    with dg.DagsterInstance.from_config(host.environment["DAGSTER_HOME"]) as instance:
        # Before any run: a pool that the run queue does not know yet holds nothing back.
        known = instance.event_log_storage.get_concurrency_keys()
        assert known == {f"index_{spec.name}" for spec in CATALOG.indexes}

        first, second = launch(host, "artist"), launch(host, "title")
        pids = [at_work(instance, run) for run in (first, second)]
        warm_process, other = (parent_of(pid) for pid in pids)
        assert warm_process == other
        server = Path(f"/proc/{parent_of(warm_process)}/cmdline").read_bytes()
        assert b"muse_assets.code_server" in server

        host.graphql(TERMINATE, run=first)
        wait_until("the run is terminated", lambda: status(instance, first) == DagsterRunStatus.CANCELED)
        assert status(instance, second) == DagsterRunStatus.STARTED

        os.kill(warm_process, signal.SIGKILL)
        wait_until("the run is failed", lambda: status(instance, second) == DagsterRunStatus.FAILURE)
        assert not any(runs(pid) for pid in pids)

        third = launch(host, "artist")
        assert parent_of(at_work(instance, third)) != warm_process
        host.graphql(TERMINATE, run=third)  # the server would wait for it to end


def test_run_monitoring_leaves_a_command_s_own_run_alone(tmp_path: Path) -> None:
    launcher = {"module": WatchingRunLauncher.__module__, "class": WatchingRunLauncher.__name__}
    with dg.instance_for_test({"run_launcher": launcher}, temp_dir=str(tmp_path)) as instance:
        run = create_run_for_test(instance, "daily", status=DagsterRunStatus.STARTED)
        assert instance.run_launcher.supports_check_run_worker_health
        assert instance.run_launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING


def launch(host: DagsterHost, index: str) -> str:
    selector = {
        "repositoryLocationName": LOCATION,
        "repositoryName": "__repository__",
        "jobName": REBUILD,
        "assetSelection": [{"path": [index, "cluster"]}],
        "assetCheckSelection": None,
    }
    tags = [{"key": "dagster/partition", "value": seoul_today().isoformat()}]
    params = {"selector": selector, "executionMetadata": {"tags": tags}}
    return str(host.graphql(LAUNCH, params=params)["launchRun"]["run"]["runId"])


def status(instance: dg.DagsterInstance, run_id: str) -> DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def at_work(instance: dg.DagsterInstance, run_id: str) -> int:
    """The process of a run, once its step has begun."""

    def tag() -> str:
        run = instance.get_run_by_id(run_id)
        return run.tags.get(PROCESS_TAG, "") if run else ""

    wait_until("a step of the run begins", tag)
    return int(tag().split(":")[1])
