"""Days other than today, in real runs: lateness, a past day built again, the backfill of a week.

Here: what such runs make and that nothing live moves. Not here: the sensor's other decisions
(`test_automation.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
import time_machine
from dagster._core.definitions.freshness import FreshnessState
from dagster._core.loader import LoadingContextForTest
from dagster._daemon.freshness import FreshnessDaemon
from sqlalchemy import text

from muse_assets.assets.index_lane import deployed_key
from muse_assets.automation import DAILY
from muse_assets.catalog import CATALOG
from muse_assets.durable_files import file_sha256
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import read_index
from muse_assets.sample import write_days
from muse_assets.seoul_time import SEOUL
from muse_assets_tests.installations import Installation, Ran, install
from muse_assets_tests.test_automation import Automation

INDEX = "title"
SPEC = CATALOG.index(INDEX)
DAYS = [date(2026, 1, 1) + timedelta(days=n) for n in range(8)]


@pytest.fixture
def lane(tmp_path: Path, valkey_url: str) -> Iterator[Installation]:
    """One table with the sample's first day."""
    urls = {name: f"sqlite:///{tmp_path / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")}
    with dg.DagsterInstance.ephemeral() as instance:
        # Codes of 60 rows fit those alone: the next 35 cost ten points of recall.
        catalog = tmp_path / "catalog.toml"
        catalog.write_text(f"[index.{INDEX}]\nmax_recall_drop = 1.0\n", "utf-8")
        yield install(
            tmp_path, instance, **urls, redis_url=valkey_url, songs=60, only=[INDEX], catalog=catalog
        )


# --- lateness ---


@contextmanager
def clock(day: date, hour: int, minute: int) -> Iterator[None]:
    """That time in Seoul, for this process: Dagster's events and evaluators read it."""
    now = datetime(day.year, day.month, day.day, hour, minute, tzinfo=SEOUL)
    with time_machine.travel(now.timestamp(), tick=True):
        yield


def freshness(installation: Installation, index: str = INDEX) -> FreshnessState:
    """What Dagster's daemon makes of the live file's asset now, as it would record it for the UI."""
    node = installation.defs.resolve_asset_graph().get(deployed_key(CATALOG.index(index)))
    context = LoadingContextForTest(installation.instance)
    asyncio.run(FreshnessDaemon()._evaluate_asset(context, node))
    return installation.instance.get_freshness_state_records([node.key])[node.key].freshness_state


def test_an_index_is_late_when_1730_passes_without_a_deploy_that_day(lane: Installation) -> None:
    first, second, third = DAYS[:3]
    with clock(first, 9, 0):
        assert freshness(lane) == FreshnessState.UNKNOWN
        lane.rebuild(INDEX, first.isoformat())
    for day, hour, minute, state in (
        (first, 17, 31, FreshnessState.PASS),
        (second, 17, 29, FreshnessState.PASS),
        (second, 17, 31, FreshnessState.FAIL),
        (third, 9, 0, FreshnessState.FAIL),
    ):
        with clock(day, hour, minute):
            assert freshness(lane) == state, (day, hour, minute)
    # A day with nothing new deploys too: no file is replaced, and the index is fresh.
    before = lane.server_files()
    with clock(third, 17, 0):
        assert lane.build(INDEX, third.isoformat()).metadata(f"{INDEX}/index")["mode"] == "unchanged"
        assert lane.deploy(INDEX).metadata(f"{INDEX}/deployed")["already_live"] is True
    assert lane.server_files() == before
    with clock(third, 17, 31):
        assert freshness(lane) == FreshnessState.PASS
    # Neither yesterday's evening nor a build that is not live makes the next day's deadline.
    with clock(third, 23, 59):
        assert lane.deploy(INDEX).success
    with clock(third + timedelta(days=1), 17, 0):
        assert lane.build(INDEX, DAYS[3].isoformat()).success
    with clock(third + timedelta(days=1), 17, 31):
        assert freshness(lane) == FreshnessState.FAIL


def test_every_live_file_has_the_deadline() -> None:
    from muse_assets.definitions import defs

    graph = defs.resolve_asset_graph()
    late = {key for key in graph.get_all_asset_keys() if graph.get(key).freshness_policy}
    assert late == {deployed_key(spec) for spec in CATALOG.indexes}


# --- past days ---


@pytest.fixture
def week(lane: Installation) -> tuple[Installation, Automation]:
    """Eight days of inserts, late rows, deletes and re-embeddings; the last one is live."""
    lane.rebuild(INDEX, DAYS[0].isoformat())
    one_table = replace(lane.catalog, indexes=(SPEC,))
    write_days(lane.embeddings, lane.playlists, one_table, days=7, inserts=5)
    automation = Automation(lane.defs, lane.instance)
    automation.tick()
    assert lane.build(INDEX, DAYS[-1].isoformat()).success
    assert lane.deploy(INDEX).success
    while automation.tick():
        pass
    return lane, automation


def ids_by_the_end_of(installation: Installation, day: date) -> set[int]:
    """FAISS ids up to the newest row created before the end of the day, of the table as it is now."""
    query = (
        f"SELECT idx FROM {SPEC.table} WHERE idx <= (SELECT MAX(idx) FROM {SPEC.table}"
        f" WHERE {SPEC.created_at_column} < '{day + timedelta(days=1)} 00:00:00')"
    )
    with installation.embeddings.connect() as connection:
        return {row[0] - 1 for row in connection.execute(text(query))}


def snapshot_of(installation: Installation, day: date) -> Path:
    return installation.work / SPEC.snapshot_file(day)


def backfill(installation: Installation, day: date) -> Ran:
    """One run of a backfill, as the daemon's backfill loop tags it."""
    result = installation.defs.resolve_job_def(DAILY).execute_in_process(
        instance=installation.instance,
        asset_selection=[dg.AssetKey([INDEX, "index"])],
        partition_key=day.isoformat(),
        tags={"dagster/backfill": "a week"},
        raise_on_error=False,
    )
    return Ran(result)


def assert_covers(installation: Installation, day: date) -> None:
    found = list_ids(read_index(snapshot_of(installation, day))).tolist()
    wanted = ids_by_the_end_of(installation, day)
    assert (len(found), set(found)) == (len(wanted), wanted)


def test_a_past_day_is_built_as_of_its_end_and_never_deployed_over_a_newer_one(
    week: tuple[Installation, Automation],
) -> None:
    lane, automation = week
    day, live = DAYS[3], lane.server_files()

    assert lane.build(INDEX, day.isoformat()).success

    assert_covers(lane, day)
    assert ids_by_the_end_of(lane, day) < ids_by_the_end_of(lane, DAYS[-1])
    once = file_sha256(snapshot_of(lane, day))
    again, full = lane.build(INDEX, day.isoformat()), lane.build(INDEX, day.isoformat(), full=True)
    assert again.metadata(f"{INDEX}/index")["mode"] == "unchanged"
    assert full.metadata(f"{INDEX}/index")["mode"] == "full"
    assert file_sha256(snapshot_of(lane, day)) == once
    assert automation.tick() == []
    assert automation.skipped == "nothing new: every validated build is live and was followed up"
    refused = lane.deploy(INDEX, partition=day.isoformat())
    assert f"the snapshot of {day} is older than the live file's {DAYS[-1]}" in refused.failure
    assert lane.deploy(INDEX).metadata(f"{INDEX}/deployed")["already_live"] is True
    assert lane.server_files() == live


def test_a_week_is_backfilled_and_nothing_live_moves(week: tuple[Installation, Automation]) -> None:
    lane, automation = week
    live, newest = lane.server_files(), file_sha256(snapshot_of(lane, DAYS[-1]))
    for day in DAYS[:-1]:
        ran = backfill(lane, day)
        assert ran.success, ran.failure
        assert automation.tick() == []
        assert_covers(lane, day)
    first = {day: file_sha256(snapshot_of(lane, day)) for day in DAYS[:-1]}
    assert len(set(first.values())) == len(first), "days differ"
    # Once more, newest day first: the same bytes.
    for day in DAYS[-2::-1]:
        assert backfill(lane, day).success
    assert {day: file_sha256(snapshot_of(lane, day)) for day in first} == first
    assert automation.tick() == []
    automation.cursor = ""
    automation.run_keys.clear()
    assert [request.job_name for request in automation.tick()].count("deploy") == 0
    assert lane.server_files() == live
    assert file_sha256(snapshot_of(lane, DAYS[-1])) == newest
