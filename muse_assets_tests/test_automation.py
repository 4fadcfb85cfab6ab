"""The schedule's ticks and the deploy sensor's decisions, on a real instance that holds no files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muse_assets.assets.index_lane import deployed_key, index_key
from muse_assets.assets.playlist_cache import PLAYLIST_CACHE
from muse_assets.assets.run_processes import PROCESS_TAG, fail_dead_runs, this_process
from muse_assets.automation import (
    DAILY,
    DEPLOY,
    PLAYLISTS,
    REBUILD,
    RELOAD,
    Cursor,
    DeployRun,
    Event,
    NextTry,
    build_to_deploy,
    cause_of_deploy,
    next_try,
    read_cursor,
    write_cursor,
)
from muse_assets.catalog import CATALOG
from muse_assets.definitions import build_defs
from muse_assets.settings import Settings

SEOUL = ZoneInfo("Asia/Seoul")
VIBE, LYRICS = CATALOG.index("vibe"), CATALOG.index("lyrics")
MONDAY, TUESDAY, WEDNESDAY = "2026-03-02", "2026-03-03", "2026-03-04"


class Automation:
    """The sensor against one instance, with its cursor kept from tick to tick as the daemon does."""

    def __init__(self, defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self.defs, self.instance, self.cursor = defs, instance, ""
        self.run_keys: set[str] = set()

    def tick(self) -> list[dg.RunRequest]:
        """New run requests: those whose run key was not used before, as the daemon launches them."""
        sensor = self.defs.resolve_sensor_def("deploy_new_builds")
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor or None, definitions=self.defs
        )
        self.answer = sensor.evaluate_tick(context)
        self.cursor = self.answer.cursor if self.answer.cursor is not None else self.cursor
        fresh = [r for r in self.answer.run_requests or [] if r.run_key not in self.run_keys]
        self.run_keys |= {str(request.run_key) for request in fresh}
        return fresh

    @property
    def skipped(self) -> str:
        return self.answer.skip_message or ""

    def built(self, index: str = "vibe", day: str = MONDAY) -> int:
        """Record a build; its storage id."""
        key = index_key(CATALOG.index(index))
        self._record(dg.AssetMaterialization(key, partition=day, metadata={"sha256": "a"}))
        return self.instance.fetch_materializations(key, limit=1).records[0].storage_id

    def deployed(
        self, index: str = "vibe", day: str = MONDAY, *, rollback: bool = False, pinned: bool = False
    ) -> int:
        """Record a deploy; its storage id."""
        key = deployed_key(CATALOG.index(index))
        metadata: dict[str, Any] = {"sha256": "a", "partition": day, "rollback": rollback, "pinned": pinned}
        self._record(dg.AssetMaterialization(key, metadata=metadata))
        return self.instance.fetch_materializations(key, limit=1).records[0].storage_id

    def cached(self) -> None:
        for program in CATALOG.programs:
            self._record(dg.AssetMaterialization(PLAYLIST_CACHE, partition=program.id))

    def run_in_progress(self, job: str, tags: dict[str, str] | None = None) -> dg.DagsterRun:
        return self.instance.create_run_for_job(
            self.defs.resolve_job_def(job), status=dg.DagsterRunStatus.STARTED, tags=tags
        )

    def fails(self, request: dg.RunRequest) -> None:
        """The requested run, killed before it could say anything."""
        run = self.instance.create_run_for_job(
            self.defs.resolve_job_def(str(request.job_name)),
            status=dg.DagsterRunStatus.STARTED,
            tags=request.tags,
        )
        self.instance.report_run_failed(run)

    def _record(self, event: dg.AssetMaterialization) -> None:
        self.instance.report_runless_asset_event(event)


@pytest.fixture
def automation(tmp_path: Path) -> Iterator[Automation]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Automation(build_defs(Settings(home=tmp_path)), instance)


def jobs(requests: list[dg.RunRequest]) -> list[str | None]:
    return [request.job_name for request in requests]


def days(requests: list[dg.RunRequest]) -> list[str]:
    return [request.tags["muse/day"] for request in requests]


@pytest.mark.parametrize(
    ("at", "day"),
    [
        (datetime(2026, 3, 2, 16, 58, tzinfo=SEOUL), MONDAY),
        # The daemon hands over UTC: 16:58 in Seoul is 07:58 there, on the same date.
        (datetime(2026, 3, 2, 7, 58, tzinfo=ZoneInfo("UTC")), MONDAY),
        # Evaluated late, across midnight in either zone, the day is Seoul's.
        (datetime(2026, 3, 2, 23, 59, tzinfo=SEOUL), MONDAY),
        (datetime(2026, 3, 3, 0, 1, tzinfo=SEOUL), TUESDAY),
        (datetime(2026, 3, 2, 14, 59, tzinfo=ZoneInfo("UTC")), MONDAY),
        (datetime(2026, 3, 2, 15, 0, tzinfo=ZoneInfo("UTC")), TUESDAY),
        (datetime(2026, 3, 3, 8, 59, tzinfo=SEOUL), TUESDAY),  # 23:59 UTC of the day before
    ],
)
def test_a_tick_requests_seven_runs_of_seouls_day(automation: Automation, at: datetime, day: str) -> None:
    schedule = automation.defs.resolve_schedule_def("daily_1658")
    context = dg.build_schedule_context(
        instance=automation.instance,
        scheduled_execution_time=at,
        repository_def=automation.defs.get_repository_def(),
    )

    requests = schedule.evaluate_tick(context).run_requests or []

    assert [request.asset_selection for request in requests] == [
        [index_key(spec)] for spec in CATALOG.indexes
    ]
    assert {request.partition_key for request in requests} == {day}
    assert len({request.run_key for request in requests}) == 7
    with dg.partition_loading_context(effective_dt=at):
        job = automation.defs.resolve_job_def(DAILY)
        assert job.partitions_def
        assert job.partitions_def.has_partition_key(day)


def test_the_schedule_ticks_at_1658_in_seoul(automation: Automation) -> None:
    schedule = automation.defs.resolve_schedule_def("daily_1658")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("58 16 * * *", "Asia/Seoul")


def test_nothing_built_is_skipped_with_a_reason(automation: Automation) -> None:
    assert automation.tick() == []
    assert automation.skipped == "nothing new: every validated build is live and was followed up"


def test_new_builds_are_deployed_and_then_followed_up_once(automation: Automation) -> None:
    vibe, lyrics = automation.built("vibe"), automation.built("lyrics")

    requests = automation.tick()

    assert jobs(requests) == [DEPLOY, DEPLOY]
    assert [r.run_key for r in requests] == [f"deploy-vibe-{vibe}", f"deploy-lyrics-{lyrics}"]
    assert [r.asset_selection for r in requests] == [[deployed_key(VIBE)], [deployed_key(LYRICS)]]
    for request in requests:
        (config,) = request.run_config["ops"].values()
        assert config["config"] == {"partition": MONDAY}
        assert request.job_name
        assert dg.validate_run_config(automation.defs.resolve_job_def(request.job_name), request.run_config)

    assert automation.tick() == []  # requested, not live yet
    automation.deployed("vibe")
    last = automation.deployed("lyrics")
    after = automation.tick()
    assert jobs(after) == [PLAYLISTS] * 6
    assert [r.partition_key for r in after] == [program.id for program in CATALOG.programs]
    assert {r.run_key for r in after} == {f"playlists-{last}-{program.id}" for program in CATALOG.programs}
    assert automation.tick() == []
    automation.cached()
    assert automation.tick() == []


def test_with_a_reload_hook_the_server_is_reloaded_first(automation: Automation, tmp_path: Path) -> None:
    automation.defs = build_defs(Settings(home=tmp_path, reload="true"))
    automation.deployed()
    assert jobs(automation.tick()) == [RELOAD, *[PLAYLISTS] * 6]
    assert automation.tick() == []


@pytest.mark.parametrize("job", [DAILY, DEPLOY])
def test_the_follow_up_waits_for_the_days_last_run(automation: Automation, job: str) -> None:
    run = automation.run_in_progress(job)
    automation.deployed()

    assert automation.tick() == []
    assert automation.skipped == f"waiting for the day's last deploy: in progress 1 of {job}"
    automation.built("lyrics", MONDAY)
    assert jobs(automation.tick()) == [DEPLOY]  # but a deploy never waits for another index
    automation.deployed("lyrics", MONDAY)
    automation.instance.report_run_failed(run)
    assert jobs(automation.tick()) == [PLAYLISTS] * 6


def test_a_backfill_or_another_teams_run_holds_nothing_up(automation: Automation) -> None:
    automation.run_in_progress(DAILY, tags={"dagster/backfill": "week"})

    @dg.asset
    def stream() -> None: ...

    others = dg.Definitions(assets=[stream], jobs=[dg.define_asset_job("stream_job")])
    automation.instance.create_run_for_job(
        others.resolve_job_def("stream_job"), status=dg.DagsterRunStatus.NOT_STARTED
    )
    automation.built()
    assert jobs(automation.tick()) == [DEPLOY]
    automation.deployed()
    assert jobs(automation.tick()) == [PLAYLISTS] * 6


def test_playlists_in_progress_hold_nothing_up(automation: Automation) -> None:
    automation.run_in_progress(PLAYLISTS)
    automation.deployed()
    assert jobs(automation.tick()) == [PLAYLISTS] * 6


def test_a_rebuild_deploys_by_itself(automation: Automation) -> None:
    run = automation.run_in_progress(REBUILD)
    automation.built()
    assert automation.tick() == []
    assert "rebuild" in automation.skipped
    automation.deployed()
    automation.instance.report_run_failed(run)
    assert jobs(automation.tick()) == [PLAYLISTS] * 6


def test_an_older_day_is_never_deployed(automation: Automation) -> None:
    automation.deployed(day=TUESDAY)
    automation.tick()
    automation.built(day=MONDAY)
    assert automation.tick() == []
    # Nor while the newer day is still on its way.
    automation.built(day=WEDNESDAY)
    assert days(automation.tick()) == [WEDNESDAY]
    automation.built(day=TUESDAY)
    assert automation.tick() == []


def test_of_several_builds_only_the_newest_day_is_deployed(automation: Automation) -> None:
    automation.tick()
    automation.built(day=TUESDAY)
    newest = automation.built(day=WEDNESDAY)
    automation.built(day=MONDAY)
    assert [r.run_key for r in automation.tick()] == [f"deploy-vibe-{newest}"]
    assert automation.tick() == []


def test_a_long_backfill_does_not_hide_the_newest_day(automation: Automation) -> None:
    automation.deployed(day="2026-02-28")
    newest = automation.built(day=MONDAY)
    for day in range(1, 29):
        automation.built(day=f"2026-02-{day:02d}")
    assert [r.run_key for r in automation.tick()] == [f"deploy-vibe-{newest}"]


def test_a_day_built_again_is_deployed_again(automation: Automation) -> None:
    automation.built()
    automation.tick()
    automation.deployed()
    again = automation.built()
    assert [r.run_key for r in automation.tick()] == [f"deploy-vibe-{again}"]


def test_a_deploy_by_hand_counts(automation: Automation) -> None:
    automation.built()
    automation.deployed()
    assert jobs(automation.tick()) == [PLAYLISTS] * 6
    # Everything by hand, before the sensor's first look: one refresh more does no harm, a deploy might.
    automation.cursor = ""
    automation.run_keys.clear()
    automation.cached()
    assert jobs(automation.tick()) == [PLAYLISTS] * 6
    assert automation.tick() == []


def test_an_event_reported_by_hand_is_no_build(automation: Automation) -> None:
    automation.instance.report_runless_asset_event(
        dg.AssetMaterialization(index_key(VIBE), partition=WEDNESDAY)
    )
    real = automation.built(day=MONDAY)
    assert [r.run_key for r in automation.tick()] == [f"deploy-vibe-{real}"]


@pytest.mark.parametrize("cursor", ["", "not JSON", "[]", "7", '{"builds": 3}', '{"followed": 1e999}'])
def test_a_lost_or_bad_cursor_repeats_nothing(automation: Automation, cursor: str) -> None:
    automation.built()
    automation.tick()
    automation.deployed()
    automation.tick()
    automation.cached()

    automation.cursor = cursor
    assert automation.tick() == []
    automation.run_keys.clear()
    automation.cursor = cursor
    assert DEPLOY not in jobs(automation.tick())


@pytest.mark.parametrize("cursor_is_lost", [False, True])
def test_what_the_server_could_not_load_stays_back_until_the_next_build(
    automation: Automation, cursor_is_lost: bool
) -> None:
    for day in (MONDAY, TUESDAY):
        automation.built(day=day)
        automation.tick()
        automation.deployed(day=day)
        automation.tick()
    automation.deployed(day=MONDAY, rollback=True)
    if cursor_is_lost:
        automation.cursor = ""
        automation.run_keys.clear()
    assert jobs(automation.tick()) == [PLAYLISTS] * 6  # of what is live now
    assert automation.tick() == []
    automation.built(day=WEDNESDAY)
    assert days(automation.tick()) == [WEDNESDAY]


def test_a_failed_deploy_is_tried_again_after_a_pause(
    automation: Automation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed gives no reason, so it may have been a passing one."""
    build = automation.built()
    [request] = automation.tick()
    automation.fails(request)
    assert automation.tick() == []
    assert automation.skipped.startswith(f"the deploy of vibe {MONDAY} failed (run ")
    assert "try 2 at " in automation.skipped

    monkeypatch.setattr("muse_assets.automation.RETRY_PAUSES", (timedelta(0),) * 3)
    for number in (2, 3, 4):
        automation.cursor = (
            "" if number == 3 else automation.cursor
        )  # the runs are the record, not the cursor
        [request] = automation.tick()
        assert request.run_key == f"deploy-vibe-{build}-{number}"
        assert days([request]) == [MONDAY]
        assert automation.tick() == []
        automation.fails(request)
    assert automation.tick() == []
    assert "failed 4 times" in automation.skipped
    newer = automation.built(day=TUESDAY)
    assert [r.run_key for r in automation.tick()] == [f"deploy-vibe-{newer}"]


@pytest.mark.parametrize("newer", ["built", "deployed", "rolled back"])
def test_a_failed_deploy_is_not_tried_again_once_there_is_something_newer(
    automation: Automation, monkeypatch: pytest.MonkeyPatch, newer: str
) -> None:
    monkeypatch.setattr("muse_assets.automation.RETRY_PAUSES", (timedelta(0),) * 3)
    automation.built()
    automation.fails(automation.tick()[0])
    if newer == "built":
        again = automation.built()
        assert [r.run_key for r in automation.tick()] == [f"deploy-vibe-{again}"]
    else:
        automation.deployed(rollback=newer == "rolled back")
        assert jobs(automation.tick()) == [PLAYLISTS] * 6
    assert automation.tick() == []


def test_a_failed_deploy_does_not_hold_up_the_others(automation: Automation) -> None:
    automation.built("vibe")
    automation.built("lyrics")
    vibe, _ = automation.tick()
    automation.fails(vibe)
    automation.deployed("lyrics")
    assert jobs(automation.tick()) == [PLAYLISTS] * 6
    automation.deployed("vibe")  # by the next try
    assert jobs(automation.tick()) == [PLAYLISTS] * 6


def test_a_run_whose_process_is_gone_holds_nothing_up(automation: Automation) -> None:
    """Dagster's run monitoring leaves it STARTED: its default launcher cannot ask after a started run."""
    gone = {PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}:1"}  # our pid, at another time
    elsewhere = {PROCESS_TAG: "another-host:1:1"}
    dead = automation.run_in_progress(REBUILD, tags=gone)
    here = automation.run_in_progress(DAILY, tags=this_process())
    there = automation.run_in_progress(DAILY, tags=elsewhere)
    automation.deployed()
    assert automation.tick() == []
    assert automation.skipped.endswith("in progress 2 of daily")
    failed = automation.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
    assert [run.run_id for run in failed] == [dead.run_id]
    assert {run.run_id for run in automation.instance.get_runs() if not run.is_finished} == {
        here.run_id,
        there.run_id,
    }


def test_what_is_no_tag_of_ours_names_no_dead_process(automation: Automation) -> None:
    host = socket.gethostname()
    for tag in ("", "::", host, f"{host}:x:y", f"{host}:-1:7", f"{host}:1"):
        automation.run_in_progress(DAILY, tags={PROCESS_TAG: tag} if tag else None)
    init = f"{host}:1:{Path('/proc/1/stat').read_text().rpartition(')')[2].split()[19]}"
    automation.run_in_progress(DAILY, tags={PROCESS_TAG: init})
    closed = fail_dead_runs(automation.instance)
    assert [run.tags[PROCESS_TAG] for run in closed] == [f"{host}:1"], "no process began at an unknown time"


NOW = datetime(2026, 3, 2, 17, 0, tzinfo=SEOUL)


@pytest.mark.parametrize(
    ("failures", "due", "said"),
    [
        (1, NOW + timedelta(minutes=2), "failed (run run-1), try 2 at 17:02:00 Seoul"),
        (2, NOW + timedelta(minutes=10), "failed (run run-2), try 3 at 17:10:00 Seoul"),
        (3, NOW + timedelta(minutes=30), "failed (run run-3), try 4 at 17:30:00 Seoul"),
        (4, None, "failed 4 times (see run run-4, then launch the job `deploy`)"),
    ],
)
def test_the_pauses_grow_and_end(failures: int, due: datetime | None, said: str) -> None:
    runs = [DeployRun(f"run-{n + 1}", NOW) for n in range(failures)]
    assert next_try(runs) == NextTry(failures + 1, due, said)
    # A refusal is never tried again, whatever came before it; a run in progress or done is left alone.
    refused = next_try([*runs, DeployRun("last", NOW, passing=False)])
    assert refused
    assert (refused.at, "refused" in refused.reason) == (None, True)
    assert next_try([*runs, DeployRun("last")]) is None
    assert next_try([]) is None


_DAYS = st.sampled_from([MONDAY, TUESDAY, WEDNESDAY])
_EVENTS = st.builds(Event, st.integers(1, 50), _DAYS)
_BUILDS = st.lists(_EVENTS, max_size=8, unique_by=lambda event: event.storage_id)
_DEPLOYED = st.none() | st.builds(Event, st.integers(51, 60) | st.integers(1, 50), _DAYS, st.booleans())
_UNDER_A_PIN = st.builds(Event, st.integers(1, 60), _DAYS, st.booleans(), st.just(True))


@given(st.integers(0, 60), _BUILDS, _DEPLOYED)
def test_only_the_newest_unseen_build_goes_live(
    seen: int, builds: list[Event], deployed: Event | None
) -> None:
    chosen = build_to_deploy(seen, builds, deployed)
    if chosen:
        assert chosen.storage_id > seen
        assert all((b.partition, b.storage_id) <= (chosen.partition, chosen.storage_id) for b in builds)
        assert deployed is None or chosen.partition >= deployed.partition
        # Once seen, it is not chosen again, whatever older days are built after it.
        assert build_to_deploy(max(b.storage_id for b in builds), builds, deployed) is None
        older = Event(99, "2026-03-01")
        assert build_to_deploy(chosen.storage_id, [*builds, older], deployed) is None
    elif builds and deployed is None:
        assert max(builds, key=lambda b: (b.partition, b.storage_id)).storage_id <= seen


@given(st.integers(0, 60), _BUILDS, _UNDER_A_PIN)
def test_what_went_live_under_a_pin_deals_with_no_build(
    seen: int, builds: list[Event], deployed: Event
) -> None:
    newest = max(builds, key=lambda b: (b.partition, b.storage_id), default=None)
    assert build_to_deploy(seen, builds, deployed) == newest
    if newest:
        # A deploy of its own, told apart from those before the pin and from those after another one.
        later = replace(deployed, storage_id=deployed.storage_id + 1)
        causes = {cause_of_deploy(newest, event) for event in (None, deployed, later)}
        assert len(causes) == 3


@given(_BUILDS, _DEPLOYED | _UNDER_A_PIN)
def test_the_order_in_which_builds_are_listed_does_not_matter(
    builds: list[Event], deployed: Event | None
) -> None:
    assert build_to_deploy(0, builds, deployed) == build_to_deploy(0, builds[::-1], deployed)


@given(st.dictionaries(st.text(), st.integers()), st.integers())
def test_a_cursor_reads_back(builds: dict[str, int], followed: int) -> None:
    assert read_cursor(write_cursor(Cursor(builds, followed))) == Cursor(builds, followed)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.none()
    | st.text()
    | _JSON.map(json.dumps)
    | st.fixed_dictionaries({"builds": _JSON, "followed": _JSON}).map(json.dumps)
)
def test_no_stored_text_breaks_the_cursor(text: str | None) -> None:
    assert isinstance(read_cursor(text), Cursor)


def test_a_deeply_nested_cursor_starts_anew() -> None:
    assert read_cursor("[" * 100_000) == Cursor()
