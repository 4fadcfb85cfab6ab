"""The retrain sensor's decisions, on a real instance; and that what it requests is a run that retrains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muse_assets.assets.index_lane import cluster_key, deployed_key, index_key
from muse_assets.automation import (
    DAILY,
    DEPLOY,
    REBUILD,
    Build,
    RetrainRun,
    in_quiet_hours,
    why_not_retrained,
)
from muse_assets.catalog import CATALOG
from muse_assets.definitions import build_defs
from muse_assets.publishing.pinning import Pin, put_pin
from muse_assets.seoul_time import SEOUL
from muse_assets.settings import Settings
from muse_assets_tests.installations import DAY_ONE, Installation, install

VIBE, TITLE = CATALOG.index("vibe"), CATALOG.index("title")
MONDAY, TUESDAY = "2026-03-02", "2026-03-03"
# The whole day, so that a test does not depend on when it runs.
ALWAYS = "00-00"


def overrides(folder: Path, *names: str) -> Path:
    file = folder / "catalog.toml"
    file.write_text("".join(f"[index.{name}]\nauto_retrain = true\n" for name in names), "utf-8")
    return file


@dataclass
class Night:
    """The sensor against one instance; run keys are used once, as the daemon has it."""

    defs: dg.Definitions
    instance: dg.DagsterInstance
    run_keys: set[str] = field(default_factory=set)
    skipped: str = ""

    def tick(self) -> list[dg.RunRequest]:
        sensor = self.defs.resolve_sensor_def("retrain_drifted")
        answer = sensor.evaluate_tick(dg.build_sensor_context(instance=self.instance, definitions=self.defs))
        self.skipped = answer.skip_message or ""
        fresh = [r for r in answer.run_requests or [] if r.run_key not in self.run_keys]
        self.run_keys |= {str(request.run_key) for request in fresh}
        return fresh

    def built(
        self, index: str = "vibe", day: str = MONDAY, *, drifted: bool = True, cluster: str = "c" * 64
    ) -> None:
        key = index_key(CATALOG.index(index))
        metadata: dict[str, Any] = {"sha256": "a", "cluster": cluster, "retrain_advised": drifted}
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(key, partition=day, metadata=metadata)
        )

    def run(
        self, job: str, status: dg.DagsterRunStatus, tags: Mapping[str, str] | None = None
    ) -> dg.DagsterRun:
        started = dg.DagsterRunStatus.STARTED
        run = self.instance.create_run_for_job(self.defs.resolve_job_def(job), status=started, tags=tags)
        if status == dg.DagsterRunStatus.FAILURE:
            self.instance.report_run_failed(run)
        return run


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def night(tmp_path: Path, instance: dg.DagsterInstance) -> Night:
    catalog = overrides(tmp_path, "vibe", "title")
    return Night(build_defs(Settings(home=tmp_path, catalog=catalog, retrain_hours=ALWAYS)), instance)


# --- decisions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "hour", "within"),
    [
        ((1, 5), 0, False),
        ((1, 5), 1, True),
        ((1, 5), 4, True),
        ((1, 5), 5, False),
        ((22, 4), 23, True),
        ((22, 4), 3, True),
        ((22, 4), 4, False),
        ((22, 4), 12, False),
        ((0, 0), 12, True),
    ],
)
def test_quiet_hours_are_seouls(hours: tuple[int, int], hour: int, within: bool) -> None:
    at = datetime(2026, 3, 2, hour, 59, tzinfo=SEOUL)
    assert in_quiet_hours(at, hours) is within
    assert in_quiet_hours(at.astimezone(UTC), hours) is within


PIN = Pin("vibe", "a" * 64, MONDAY, "2026-03-02T10:00:00+09:00", "wrong songs")
DRIFTED = Build("c" * 64, advised=True)


@given(
    build=st.sampled_from([None, Build("c", advised=False), DRIFTED]),
    pin=st.sampled_from([None, PIN]),
    failed=st.sampled_from([None, "f" * 36]),
    run=st.sampled_from([None, RetrainRun("r" * 36, "FAILURE")]),
)
def test_only_a_drifted_index_that_nothing_holds_back_is_retrained(
    build: Build | None, pin: Pin | None, failed: str | None, run: RetrainRun | None
) -> None:
    why_not = why_not_retrained(build, pin=pin, failed=failed, run=run)
    assert (why_not is None) == (build is DRIFTED and pin is None and failed is None and run is None)
    assert build is DRIFTED or why_not == "not drifted"


@pytest.mark.parametrize("hours", ["1-5", "01:00-05:00", "24-05", "night"])
def test_hours_that_are_none_are_refused(hours: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retrain_hours"):
        Settings(home=tmp_path, retrain_hours=hours)


# --- the sensor --------------------------------------------------------------------------------------


def test_a_drifted_index_is_rebuilt_once_a_cluster(night: Night) -> None:
    night.built()
    (request,) = night.tick()
    assert request.job_name == REBUILD
    assert request.run_key == f"retrain-vibe-{'c' * 64}"
    assert request.asset_selection == [cluster_key(VIBE), index_key(VIBE), deployed_key(VIBE)]
    assert request.partition_key == datetime.now(SEOUL).date().isoformat()
    assert request.tags["muse/index"] == "vibe"

    night.run(REBUILD, dg.DagsterRunStatus.FAILURE, tags=request.tags)
    night.run_keys.clear()
    assert night.tick() == []
    assert "vibe: drifted, and was retrained once for this cluster (run " in night.skipped
    assert "failure); from here on it is by hand" in night.skipped
    night.built(day=TUESDAY, cluster="d" * 64)
    assert [request.run_key for request in night.tick()] == [f"retrain-vibe-{'d' * 64}"]


def test_the_newest_day_decides(night: Night) -> None:
    night.built(day=MONDAY)
    night.built(day=TUESDAY, drifted=False)
    night.built(day=MONDAY)
    assert night.tick() == []
    assert night.skipped == "vibe: not drifted; title: not drifted"


def test_one_index_at_a_time(night: Night) -> None:
    night.built("title")
    night.built("vibe")
    (first,) = night.tick()
    running = night.run(REBUILD, dg.DagsterRunStatus.STARTED, tags=first.tags)
    assert night.tick() == []
    assert night.skipped == "waiting: in progress 1 of rebuild"
    night.instance.report_run_failed(running)
    assert [request.tags["muse/index"] for request in night.tick()] == ["title"]


@pytest.mark.parametrize("job", [DAILY, DEPLOY])
def test_it_waits_for_whatever_runs_a_backfill_included(night: Night, job: str) -> None:
    night.built()
    night.run(job, dg.DagsterRunStatus.STARTED, tags={"dagster/backfill": "week"})
    assert night.tick() == []
    assert night.skipped == f"waiting: in progress 1 of {job}"


def test_it_waits_for_the_night(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    hour = (datetime.now(SEOUL).hour + 2) % 24
    catalog = overrides(tmp_path, "vibe")
    hours = f"{hour:02d}-{(hour + 1) % 24:02d}"
    night = Night(build_defs(Settings(home=tmp_path, catalog=catalog, retrain_hours=hours)), instance)
    night.built()
    assert night.tick() == []
    assert night.skipped.startswith(f"retrains are for {hour:02d}:00 to ")


def test_an_index_without_auto_retrain_only_warns(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    night = Night(build_defs(Settings(home=tmp_path, retrain_hours=ALWAYS)), instance)
    night.built()
    assert night.tick() == []
    assert night.skipped == "no index of the catalog has auto_retrain"


def test_a_pinned_index_stays_as_it_is(night: Night, tmp_path: Path) -> None:
    night.built()
    (tmp_path / "server").mkdir()
    put_pin(tmp_path / "server", "vibe", PIN)
    assert night.tick() == []
    assert "vibe: drifted, but pinned" in night.skipped


def test_after_a_failed_build_a_person_looks_first(night: Night) -> None:
    """Another embedding model fails the build; a retrain that night would mix two models."""
    of_vibe = {"muse/index": "vibe"}
    night.run(DAILY, dg.DagsterRunStatus.FAILURE, tags=of_vibe)
    night.built()
    night.run(DAILY, dg.DagsterRunStatus.FAILURE, tags={"muse/index": "title"})
    failed = night.run(DAILY, dg.DagsterRunStatus.FAILURE, tags=of_vibe)
    assert night.tick() == []
    assert f"vibe: drifted, but its newest build failed (run {failed.run_id[:8]})" in night.skipped
    night.built(day=TUESDAY)
    assert len(night.tick()) == 1


# --- the run -----------------------------------------------------------------------------------------


def test_what_is_requested_trains_builds_in_full_and_deploys(
    valkey_url: str, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    urls: dict[str, Any] = {
        name: f"sqlite:///{tmp_path / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")
    }
    catalog = overrides(tmp_path, "title")
    installed: Installation = install(
        tmp_path,
        instance,
        **urls,
        redis_url=valkey_url,
        only=["title"],
        catalog=catalog,
        retrain_hours=ALWAYS,
    )
    before = installed.rebuild("title").metadata("title/index")
    table = TITLE.table
    columns = "disccommseq, trackno, song_name_embedding, idx_mod_100, created_at"
    for _ in range(2):  # four times the rows that it was trained on
        installed.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {table}")
    grown = installed.build("title", DAY_ONE)
    assert grown.checks["drift"] is False
    assert grown.metadata("title/index")["drift_rows"] == 4

    (request,) = Night(installed.defs, instance).tick()
    ran = installed.defs.resolve_job_def(REBUILD).execute_in_process(
        instance=instance,
        asset_selection=request.asset_selection,
        partition_key=request.partition_key,
        run_config=request.run_config,
        tags=request.tags,
        raise_on_error=False,
    )
    assert ran.success
    materialized = {
        event.asset_key.to_user_string(): event.materialization.metadata
        for event in ran.get_asset_materialization_events()
        if event.asset_key
    }
    assert set(materialized) == {"title/cluster", "title/index", "title/deployed"}
    after = materialized["title/index"]
    assert after["mode"].value == "full"
    assert after["cluster"].value != before["cluster"]
    assert after["retrain_advised"].value is False
    assert materialized["title/deployed"]["sha256"] == after["sha256"]
    assert Night(installed.defs, instance).tick() == []
