"""An operator's day in a real browser: the lineage, a day's build and its deploy, the plots, a rollback.

Here: what Dagster's own pages show of our assets, and that its own buttons do what the runbook says.
Not here: what a build, a deploy or a rollback guarantees (the tests of those).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

pytest.importorskip("playwright.sync_api", reason="SERVICE MISSING: no playwright; run `make test-ui`")

from playwright.sync_api import expect

from muse_assets_tests.ui.operated import INDEX, SENSOR, Operated
from muse_assets_tests.ui.pages import RUN_SECONDS, Box, DagsterPages

# The instance's log handler is one; see `cli.launching.open_instance`.
pytestmark = pytest.mark.filterwarnings("ignore:Handling yaml-defined logging")

STEPS = ["table", "cluster", "index", "deployed"]
PLOTTED = (
    "dagster/row_count",
    "added",
    "removed",
    "rejected",
    "recall_at_10",
    "imbalance",
    "seconds",
    "size_mb",
)
TICK_SECONDS = 90
WHY = "wrong songs since the morning"


def test_the_lineage_shows_seven_lanes_from_table_to_playlists(
    pages: DagsterPages, operated: Operated
) -> None:
    names = sorted(spec.name for spec in operated.installation.catalog.indexes)
    pages.open_lineage()

    until(lambda: len(lanes(pages.graph(), names)) == 7, 60)
    boxes = pages.graph()
    pages.photograph("1_lineage")
    assert len(names) == 7
    assert lanes(boxes, names) == dict.fromkeys(names, STEPS)
    [cache] = [box for box in boxes if box.text.startswith("playlist_cache")]
    assert all(cache.x > box.x for box in boxes if box.text.startswith("deployed"))


def lanes(boxes: list[Box], names: list[str]) -> dict[str, list[str]]:
    """Group -> names of the nodes in it, from left to right."""
    groups = [box for box in boxes if box.text in names]
    nodes = [(step, box) for step in STEPS for box in boxes if box.text.startswith(step)]
    nodes.sort(key=lambda node: node[1].x)
    return {group.text: [step for step, box in nodes if group.holds(box)] for group in groups}


def test_a_partition_is_materialized_and_the_sensor_deploys_it(
    pages: DagsterPages, operated: Operated
) -> None:
    pages.switch_on(SENSOR)
    before = operated.newest("deployed")

    build = pages.materialize_latest(f"{INDEX}/index")
    pages.expect_success()
    pages.photograph("2_build_succeeded")
    built = operated.newest("index")
    assert built.run_id == build
    assert value(built, "added") > 0

    until(lambda: operated.newest("deployed").run_id != before.run_id, TICK_SECONDS + RUN_SECONDS)
    deployed = operated.newest("deployed")
    assert value(deployed, "sha256") == value(built, "sha256")
    run = operated.installation.instance.get_run_by_id(deployed.run_id)
    assert run is not None and run.tags["dagster/sensor_name"] == SENSOR

    pages.open_asset(f"{INDEX}/deployed")
    expect(pages.metadata("sha256")).to_have_text(value(built, "sha256"))
    expect(pages.metadata("pinned")).to_have_text("false")
    pages.photograph("2_deployed")
    pages.open_run(deployed.run_id)
    pages.expect_success()
    pages.photograph("2_deploy_succeeded")


def test_numbers_are_plotted_by_day_and_list_sizes_are_drawn(pages: DagsterPages) -> None:
    pages.open_asset(f"{INDEX}/index")
    sparkline = pages.metadata("list_sizes").get_by_role("img", name="list sizes")
    expect(sparkline).to_be_visible()
    assert sparkline.evaluate("picture => picture.complete && picture.naturalWidth") > 0
    pages.photograph("3_metadata")

    pages.open_plots()
    until(lambda: all(pages.plotted_columns(name) for name in PLOTTED), 60)
    pages.photograph("3_plots")


def test_a_rollback_from_the_launchpad_pins_the_index_until_it_is_released(
    pages: DagsterPages, operated: Operated
) -> None:
    before = operated.newest("deployed")
    pages.switch_on(SENSOR)

    rollback = pages.launch_with(f"{INDEX}/deployed", {"rollback": "true", "why": WHY}, "4_launchpad")
    pages.expect_success()
    pinned = operated.newest("deployed")
    assert pinned.run_id == rollback
    assert value(pinned, "sha256") != value(before, "sha256")
    pages.open_asset(f"{INDEX}/deployed")
    expect(pages.metadata("pinned")).to_have_text("true")
    expect(pages.metadata("pin")).to_contain_text(WHY)
    pages.metadata("pin").scroll_into_view_if_needed()
    pages.photograph("4_pinned")

    pages.switch_on(SENSOR)
    until(lambda: says_pinned(pages), TICK_SECONDS)
    pages.photograph("4_sensor_says_pinned")
    assert operated.newest("deployed").run_id == rollback

    assert f"{INDEX} is released" in operated.muse("release", INDEX)
    until(lambda: operated.newest("deployed").run_id != rollback, TICK_SECONDS + RUN_SECONDS)
    pages.open_asset(f"{INDEX}/deployed")
    expect(pages.metadata("sha256")).to_have_text(value(operated.newest("index"), "sha256"))
    expect(pages.metadata("pinned")).to_have_text("false")
    pages.photograph("4_released")


def says_pinned(pages: DagsterPages) -> bool:
    """Whether the sensor's newest tick says it; its dialog is open then."""
    pages.close_dialog()
    return f"{INDEX} is pinned to" in pages.newest_skip_reason()


def value(event: dg.EventLogEntry, name: str) -> Any:
    materialization = event.asset_materialization
    assert materialization is not None
    return materialization.metadata[name].value


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Ask again and again until it holds; fails the test after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)
