"""Full builds on a real Dask cluster: the same bytes as in the process, whatever dies on the way."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import distributed
import pytest
from distributed import cfexecutor
from sqlalchemy.engine import make_url

from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.ivfpq.encoding import encoder_name
from muse_assets.settings import Settings
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.dask_workers import on_dask
from muse_assets_tests.dask_cluster import DaskCluster, dask_cluster, wait_for_workers, worker_command
from muse_assets_tests.embedding_rows import SPEC, delete_rows, payloads_of, put_rows, unit_vectors
from muse_assets_tests.installations import Installation
from muse_assets_tests.lanes import Lane, build, full_bytes, lane_at, temps
from muse_assets_tests.network_hosts import network
from muse_assets_tests.servers import CANARY, free_port, fresh_schema, mariadb_server

ROWS = 20_000
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def table(mariadb_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lane, bytes]]:
    """A lane whose table has unusable rows and gaps, and what a full build in this process gives."""
    with fresh_schema(mariadb_url) as url:
        lane = filled_lane(url, tmp_path_factory.mktemp("dask"))
        yield lane, full_bytes(lane)
        lane.engine.dispose()


def filled_lane(url: str, work: Path) -> Lane:
    lane = replace(lane_at(url, work), spec=replace(SPEC, recall_gate=0.1, nlist=64))
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(ROWS)))
    put_rows(lane.engine, lane.spec, {7: None, 15_001: b"not a vector"})
    delete_rows(lane.engine, lane.spec, range(8_000, 8_500))
    train_cluster(lane.engine, lane.spec, lane.cluster)
    return lane


@pytest.fixture(scope="module")
def running(table: tuple[Lane, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with dask_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: DaskCluster, table: tuple[Lane, bytes], small_parts: None) -> Iterator[DaskCluster]:
    """Four workers, whatever the test before did to them."""
    for name in NAMES:
        if name not in running.workers or running.workers[name].poll() is not None:
            running.start_worker(name, {"MUSE_EMBEDDING_DB_URL": table[0].url})
    for name in set(running.workers) - set(NAMES):
        running.stop_worker(name)
    wait_for_workers(running.address, len(NAMES))
    yield running


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small table has many parts, and is worth a cluster."""
    monkeypatch.setattr("muse_assets.snapshots.dask_workers.WORTH_ROWS", 1_000)
    monkeypatch.setattr("muse_assets.snapshots.dask_workers._PART_ROWS", 500)


def build_on(address: str, lane: Lane, work: Path, on_progress: Callable[[str, int, int], None]) -> bytes:
    """A full build in a directory of its own."""
    built = build(
        replace(lane, work=work),
        cluster_path=lane.cluster,
        full=True,
        recruit=on_dask(address),
        on_progress=on_progress,
    )
    assert "Dask workers" in built.encoded_on
    assert built.dashboard is not None
    return built.path.read_bytes()


def silent(_doing: str, _done: int, _total: int) -> None: ...


def test_a_cluster_gives_the_bytes_that_the_process_gives(
    cluster: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path
) -> None:
    lane, expected = table
    said: list[str] = []
    assert build_on(cluster.address, lane, tmp_path, lambda doing, *_: said.append(doing)) == expected
    assert any("encoding on 4 Dask workers, to be watched at http://127.0.0.1:" in doing for doing in said)


def test_the_parts_of_a_killed_worker_are_done_again(
    cluster: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path
) -> None:
    lane, expected = table
    victim = cluster.workers["a"].pid
    killed_at: list[int] = []

    def kill(doing: str, done: int, total: int) -> None:
        if doing != "encoding" or killed_at:
            return
        os.kill(victim, signal.SIGSTOP)  # it keeps the parts that it has
        if done > total // 2:
            os.kill(victim, signal.SIGKILL)
            killed_at.append(done)

    assert build_on(cluster.address, lane, tmp_path, kill) == expected
    assert killed_at
    assert killed_at[0] < ROWS - 1_000, "its parts were not under way any more"


class Gone:
    """A Dask future whose worker ends when its result has come in."""

    status = "pending"

    def __init__(self, future: distributed.Future) -> None:
        self._future = future

    def _result(self, *, raiseit: bool) -> Any:
        return self._future._result(raiseit=raiseit)


def test_a_part_whose_worker_ends_as_its_result_comes_in_is_done_again(
    cluster: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, expected = table
    passed_on: list[Any] = []
    pass_on = cfexecutor._cascade_future

    def of_a_worker_that_ends(future: distributed.Future, answer: Any) -> Any:
        passed_on.append(future)
        return pass_on(Gone(future) if len(passed_on) == 3 else future, answer)

    monkeypatch.setattr(cfexecutor, "_cascade_future", of_a_worker_that_ends)
    assert build_on(cluster.address, lane, tmp_path, silent) == expected
    assert len(passed_on) > 3


def test_a_cluster_that_lost_every_worker_goes_on_with_a_new_one(
    cluster: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path
) -> None:
    lane, expected = table

    def replace_all(doing: str, done: int, _total: int) -> None:
        if doing == "encoding" and done and "new" not in cluster.workers:
            cluster.stop_workers()
            cluster.start_worker("new", {"MUSE_EMBEDDING_DB_URL": lane.url})

    assert build_on(cluster.address, lane, tmp_path, replace_all) == expected
    assert set(cluster.workers) == {"new"}


def test_without_any_worker_left_the_build_is_red_in_bounded_time(
    cluster: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muse_assets.snapshots.dask_workers._PATIENCE_SECONDS", 1)
    monkeypatch.setattr("muse_assets.snapshots.encoding_workers._LOOK_SECONDS", 0.5)

    def stop(doing: str, done: int, _total: int) -> None:
        if doing == "encoding" and done:
            cluster.stop_workers()

    with pytest.raises(PassingFailure, match="has had no worker for 1 s") as failed:
        build_on(cluster.address, table[0], tmp_path, stop)
    assert f"dask worker {cluster.address}" in failed.value.next_step
    assert not list(tmp_path.glob("*.index"))


def test_a_killed_scheduler_is_a_red_build(
    table: tuple[Lane, bytes], tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, _ = table
    # As long as the client tries to reach it again.
    monkeypatch.setattr("muse_assets.snapshots.dask_workers._CONNECT_SECONDS", 4)
    with dask_cluster(tmp_path / "cluster") as cluster:
        cluster.start_worker("only", {"MUSE_EMBEDDING_DB_URL": lane.url})
        wait_for_workers(cluster.address, 1)

        def kill(doing: str, done: int, _total: int) -> None:
            if doing == "encoding" and done and cluster.scheduler:
                cluster.scheduler.kill()

        start = time.monotonic()
        with pytest.raises(PassingFailure, match=r"scheduler at tcp://\S+ was lost while tb_embedding"):
            build_on(cluster.address, lane, tmp_path / "work", kill)
        assert time.monotonic() - start < 60
    assert not list((tmp_path / "work").glob("*.index"))
    assert not temps(replace(lane, work=tmp_path / "work"))


def test_a_cluster_that_is_not_there_is_told_and_a_small_sync_does_not_need_it(
    table: tuple[Lane, bytes], tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muse_assets.snapshots.dask_workers._CONNECT_SECONDS", 1)
    lane, expected = table
    absent = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(PassingFailure, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:") as failed:
        build_on(absent, lane, tmp_path, silent)
    assert "MUSE_DASK_SCHEDULER" in failed.value.next_step
    elsewhere = replace(lane, work=tmp_path)
    first = build(elsewhere, cluster_path=lane.cluster, full=True)
    assert first.path.read_bytes() == expected
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(5, seed=1), ROWS + 1))
    second = build(elsewhere, 2, cluster_path=lane.cluster, recruit=on_dask(absent))
    delete_rows(lane.engine, lane.spec, range(ROWS + 1, ROWS + 6))
    assert (second.manifest.mode, second.manifest.added) == ("incremental", 5)
    assert "threads" in second.encoded_on


@pytest.mark.parametrize("fault", ["no database", "other arithmetic", "wrong password"])
def test_a_worker_that_cannot_do_it_says_why(
    running: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path, small_parts: None, fault: str
) -> None:
    lane, _ = table
    wrong = make_url(lane.url).set(password="mistaken").render_as_string(hide_password=False)  # noqa: S106
    level = "AVX2" if "AVX512" in encoder_name() else "NONE"
    environment = {
        "no database": {},
        "other arithmetic": {"MUSE_EMBEDDING_DB_URL": lane.url, "FAISS_SIMD_LEVEL": level},
        "wrong password": {"MUSE_EMBEDDING_DB_URL": wrong},
    }[fault]
    running.stop_workers()
    running.start_worker("odd", environment)
    wait_for_workers(running.address, 1)
    with pytest.raises(PermanentFailure) as failed:
        build_on(running.address, lane, tmp_path, silent)
    assert {
        "no database": "has no MUSE_EMBEDDING_DB_URL",
        "other arithmetic": "might get other codes",
        "wrong password": "Access denied",
    }[fault] in failed.value.what
    assert failed.value.next_step
    assert CANARY not in str(failed.value)
    assert not list(tmp_path.glob("*.index"))


def test_workers_that_read_another_database_are_found_out(
    running: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path, mariadb_url: str, small_parts: None
) -> None:
    """Of the same rows, so that nothing but the vectors differs: the ids and their number would pass."""
    lane, _ = table
    running.stop_workers()
    with fresh_schema(mariadb_url) as url:
        other = replace(lane, engine=lane_at(url, tmp_path).engine)
        put_rows(other.engine, lane.spec, payloads_of(unit_vectors(ROWS, seed=7)))
        delete_rows(other.engine, lane.spec, range(8_000, 8_500))
        running.start_worker("elsewhere", {"MUSE_EMBEDDING_DB_URL": url})
        wait_for_workers(running.address, 1)
        with pytest.raises(PassingFailure, match="that the workers found changed are not, such as at idx"):
            build_on(running.address, lane, tmp_path / "work", silent)
        running.stop_workers()
        other.engine.dispose()
    assert not list((tmp_path / "work").glob("*.index"))


def test_a_run_shows_where_its_rows_were_encoded(
    cluster: DaskCluster, table: tuple[Lane, bytes], tmp_path: Path
) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text("[index.vibe]\ndimension = 32\nm = 8\nnlist = 64\nrecall_gate = 0.1\n", "utf-8")
    settings = Settings(
        home=tmp_path,
        catalog=catalog,
        embedding_db_url=table[0].url,
        playlist_db_url=f"sqlite:///{tmp_path / 'playlists.sqlite'}",
        dask_scheduler=cluster.address,
    )
    with dg.DagsterInstance.ephemeral() as instance:
        ran = Installation(settings, instance).run(
            "rebuild", "vibe/cluster", "vibe/index", partition="2026-11-01"
        )
    assert ran.success, ran.failure
    shown = ran.metadata("vibe/index")
    assert shown["encoded_on"] == "4 Dask workers"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", shown["dask_dashboard"])


def test_workers_on_hosts_of_their_own_and_one_that_loses_its_power(
    tmp_path: Path, small_parts: None
) -> None:
    with (
        network(tmp_path, *NAMES) as (here, hosts),
        mariadb_server(tmp_path / "db", "--bind-address=*") as server,
        dask_cluster(tmp_path / "cluster", here) as cluster,
    ):
        url = server.url.replace("127.0.0.1", here)
        lane = filled_lane(url, tmp_path / "lane")
        expected = full_bytes(lane)
        for host in hosts:
            command = worker_command(cluster.address, host.name)
            host.start(command, {"MUSE_EMBEDDING_DB_URL": url}, tmp_path / f"{host.name}.log")
        wait_for_workers(cluster.address, len(hosts))
        lost: list[int] = []

        def cut(doing: str, done: int, _total: int) -> None:
            if doing == "encoding" and done and not lost:
                hosts[0].lose_power()
                lost.append(done)

        assert build_on(cluster.address, lane, tmp_path / "work", cut) == expected
        assert lost
        assert lost[0] < ROWS // 2
        lane.engine.dispose()
