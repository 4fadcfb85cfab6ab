"""A table that moves away from what its cluster was trained on, another model's vectors, and a recall that
drops: what is noticed, when, in which words, and that a retrain ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from numpy.typing import NDArray

from muse_assets.assets.metadata import index_metadata
from muse_assets.failures import PermanentFailure
from muse_assets.publishing.deploying import Deployment, deploy
from muse_assets.snapshots.building import Built
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.drift import Drift
from muse_assets.snapshots.gate import DRIFT, EMBEDDING_MODEL, GateFailed
from muse_assets.snapshots.neighbor_preview import NeighborPreview
from muse_assets.snapshots.queries import QUERIES
from muse_assets_tests.embedding_rows import delete_rows, npy, payloads_of, put_rows, unit_vectors
from muse_assets_tests.installations import DAY_ONE, DAY_TWO, Installation, install
from muse_assets_tests.lanes import Lane, build, lane_at, temps

Vectors = NDArray[np.float32]
ROWS, DIMENSION = 1500, 64


def songs(rows: int, *, seed: int = 0, topics: int = 30, dimension: int = DIMENSION) -> Vectors:
    """Unit vectors as a model makes them: topics on a surface of few dimensions, all in one cone."""
    plane = np.linalg.qr(np.random.default_rng(7).standard_normal((dimension, 9)))[0].T
    vectors = unit_vectors(rows, seed=seed, topics=topics, dimension=8) @ plane[1:] + 0.5 * plane[0]
    vectors += 0.02 * np.random.default_rng(seed).standard_normal((rows, dimension))
    found: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return found


def lane_of(vectors: Vectors, folder: Path, **spec: Any) -> Lane:
    """A lane whose table holds these rows, with a cluster trained on them."""
    made = lane_at(f"sqlite:///{folder / 'e.sqlite'}", folder / "work")
    made = replace(made, spec=replace(made.spec, dimension=DIMENSION, **spec))
    put_rows(made.engine, made.spec, payloads_of(vectors))
    train_cluster(made.engine, made.spec, made.cluster)
    return made


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    return lane_of(songs(ROWS), tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    return folder


def put_live(lane: Lane, built: Built, server: Path, **confirmed: bool) -> Deployment:
    return deploy(lane.spec, built.path, built.manifest, server, **confirmed)


def other_model(vectors: Vectors) -> Vectors:
    """The same songs embedded by another model: every distance is as before, every vector is another."""
    width = vectors.shape[1]
    turn = np.linalg.qr(np.random.default_rng(17).standard_normal((width, width)))[0]
    turned: Vectors = (vectors @ turn).astype(np.float32)
    return turned


def facts_of(built: Built, check: str) -> dict[str, Any]:
    return built.manifest.checks[check]


def drift_of(built: Built) -> dict[str, float]:
    return built.manifest.drift


def metadata_of(built: Built) -> dict[str, Any]:
    return index_metadata(built, NeighborPreview(()))


def before_and_after(built: Built) -> dict[str, tuple[str, str]]:
    table = metadata_of(built)["before_and_after"].records
    return {record.data["fact"]: (record.data["before"], record.data["after"]) for record in table}


# --- the rule ----------------------------------------------------------------------------------------

CALM = Drift(
    50_000, rows=1.9, imbalance=1.1, coarse_error=1.1, new_share=0.4, recall_drop=0.0, recall_noise=0.0
)


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ({"rows": 2.1}, "2.1 times the rows"),
        ({"imbalance": 1.2}, "1.20 times as uneven"),
        ({"coarse_error": 1.2}, "1.20 times as far from their centroids"),
        ({"recall_drop": 0.015}, "1.5 points lower"),
    ],
)
def test_each_ratio_alone_makes_a_retrain_worth_it(moved: dict[str, Any], said: str) -> None:
    assert CALM.reasons() == ()
    (reason,) = replace(CALM, **moved).reasons()
    assert said in reason
    small = replace(CALM, trained_rows=2_000, **moved)
    assert small.reasons() == ((reason,) if "rows" in moved else ()), "of a small table only growth tells"


def test_a_few_new_rows_and_chance_are_no_drift() -> None:
    assert replace(CALM, coarse_error=1.5, new_share=0.09).reasons() == ()
    assert replace(CALM, recall_drop=0.015, recall_noise=0.006).reasons() == ()
    assert replace(CALM, recall_drop=0.015, recall_noise=0.004).reasons() != ()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Lane:
    """As many rows as all ratios need, of half of the topics; the first day built."""
    made = lane_of(songs(10_000), tmp_path_factory.mktemp("large"))
    build(made)
    return made


def test_a_shift_is_told_and_a_retrain_ends_it(large: Lane) -> None:
    first = build(large)
    assert facts_of(first, DRIFT)["passed"]
    assert (drift_of(first)["rows"], drift_of(first)["new_share"], drift_of(first)["recall_drop"]) == (
        1,
        0,
        0,
    )
    assert drift_of(first)["imbalance"] == pytest.approx(1, abs=0.06)

    put_rows(large.engine, large.spec, payloads_of(songs(700, seed=5), 10_001))
    alike = build(large, 2)
    assert facts_of(alike, DRIFT)["passed"], facts_of(alike, DRIFT)["summary"]
    assert drift_of(alike)["coarse_error"] == pytest.approx(1, abs=0.25)

    put_rows(large.engine, large.spec, payloads_of(songs(1500, seed=6, topics=60), 10_701))
    moved = build(large, 3)
    assert moved.manifest.mode == "incremental"
    assert not facts_of(moved, DRIFT)["passed"]
    assert facts_of(moved, DRIFT)["summary"].endswith(": retrain.")
    assert drift_of(moved)["new_share"] == pytest.approx(2200 / 12_200, abs=0.001)
    assert drift_of(moved)["coarse_error"] > 1.2
    assert metadata_of(moved)["retrain_advised"] is True

    again = build(large, 3, full=True)
    assert again.manifest.drift == moved.manifest.drift, "it is of the rows, not of their history"
    assert again.manifest.sha256 == moved.manifest.sha256

    train_cluster(large.engine, large.spec, large.cluster)
    trained = build(large, 4)
    assert facts_of(trained, DRIFT)["passed"], facts_of(trained, DRIFT)["summary"]
    assert metadata_of(trained)["retrain_advised"] is False
    # Both on the new cluster's queries, or the comparison would be of two samples.
    previous = trained.manifest.previous_recall_at_10
    assert previous is not None
    assert before_and_after(trained)["recall@10"] == (
        f"{previous:.3f}",
        f"{trained.manifest.recall_at_10:.3f}",
    )
    assert previous != moved.manifest.recall_at_10


# --- another embedding model -------------------------------------------------------------------------


def refused(lane: Lane, day: int) -> GateFailed:
    with pytest.raises(GateFailed, match="another embedding model") as failed:
        build(lane, day)
    assert "retrain" in failed.value.next_step
    assert not lane.file(day).exists()
    assert not temps(lane)
    return failed.value


def test_a_table_embedded_anew_by_another_model_waits_for_a_retrain(lane: Lane, server: Path) -> None:
    put_live(lane, build(lane), server)
    put_rows(lane.engine, lane.spec, payloads_of(other_model(songs(ROWS))))
    assert "1,500 of 1,500 rows hold other vectors" in refused(lane, 2).what
    with pytest.raises(GateFailed, match="lie by no centroid"):
        build(lane, 2, full=True)  # a full build on the old cluster is no way round it

    train_cluster(lane.engine, lane.spec, lane.cluster)
    built = build(lane, 2)
    assert all(check.passed for check in built.checks)
    # The old model's file knows nothing of the new one's queries.
    assert built.manifest.previous_recall_at_10 is not None
    assert built.manifest.previous_recall_at_10 < 0.2
    assert put_live(lane, built, server).sha256 == built.manifest.sha256


def test_a_table_emptied_and_filled_by_another_model_waits_too(lane: Lane, server: Path) -> None:
    put_live(lane, build(lane), server)
    delete_rows(lane.engine, lane.spec, range(1, ROWS + 1))
    put_rows(lane.engine, lane.spec, payloads_of(other_model(songs(ROWS)), ROWS + 1))
    refused(lane, 2)
    train_cluster(lane.engine, lane.spec, lane.cluster)
    assert put_live(lane, build(lane, 2), server).sha256


@pytest.mark.parametrize(("a_day", "noticed"), [(150, 1), (15, 25)])
def test_another_model_is_noticed_before_most_rows_are_its(lane: Lane, a_day: int, noticed: int) -> None:
    """A tenth of the rows a day on the first day; a hundredth, too few to judge alone, by a third of them."""
    build(lane)
    anew = payloads_of(other_model(songs(ROWS)))
    for day in range(1, 30):
        rows = range((day - 1) * a_day + 1, day * a_day + 1)
        put_rows(lane.engine, lane.spec, {idx: anew[idx] for idx in rows})
        try:
            build(lane, 1 + day % 28)
        except GateFailed as failed:
            assert "lie by no centroid" in failed.what
            break
    assert day <= noticed
    assert day * a_day < ROWS / 3


def test_a_batch_by_the_same_model_is_taken(lane: Lane) -> None:
    """A third of the rows embedded again with other noise, and new rows of topics that nobody saw."""
    build(lane)
    again = songs(ROWS)[:500] + 0.06 * songs(500, seed=8)
    again /= np.linalg.norm(again, axis=1, keepdims=True)
    put_rows(lane.engine, lane.spec, payloads_of(again))
    put_rows(lane.engine, lane.spec, payloads_of(songs(300, seed=3, topics=60), ROWS + 1))
    built = build(lane, 2)
    assert built.manifest.reembedded > 200
    assert facts_of(built, EMBEDDING_MODEL)["passed"]
    assert facts_of(built, EMBEDDING_MODEL)["foreign_share"] < 0.1


def test_a_catalog_that_takes_any_vectors_does(lane: Lane) -> None:
    build(lane)
    put_rows(lane.engine, lane.spec, payloads_of(other_model(songs(ROWS))))
    open_lane = replace(lane, spec=replace(lane.spec, max_replaced_share=1.0, recall_gate=0.0))
    assert facts_of(build(open_lane, 2), EMBEDDING_MODEL)["foreign_share"] > 0.9


def test_vectors_of_another_length_after_a_retrain_are_built(tmp_path: Path) -> None:
    """The previous file cannot be asked the new queries at all."""
    long_lane = lane_of(songs(300), tmp_path)
    build(long_lane)
    short_lane = replace(long_lane, spec=replace(long_lane.spec, dimension=32))
    put_rows(short_lane.engine, short_lane.spec, payloads_of(songs(300, dimension=32)))
    train_cluster(short_lane.engine, short_lane.spec, short_lane.cluster)
    built = build(short_lane, 2)
    assert built.manifest.previous_recall_at_10 is None
    assert before_and_after(built)["recall@10"][0] == "unknown"


# --- recall that drops -------------------------------------------------------------------------------


def test_a_drop_of_recall_stops_the_deploy(lane: Lane, server: Path) -> None:
    first = build(lane)
    put_live(lane, first, server)
    before = first.manifest.recall_at_10
    hasty = replace(lane, spec=replace(lane.spec, nprobe=1))
    put_rows(lane.engine, lane.spec, payloads_of(songs(20, seed=1), ROWS + 1))
    second = build(hasty, 2)
    after = second.manifest.recall_at_10
    assert after < before - lane.spec.max_recall_drop
    with pytest.raises(
        PermanentFailure, match=rf"recall@10 of {after:.3f} .* live file's {before:.3f}"
    ) as told:
        put_live(lane, second, server)
    assert "confirm_recall: true" in told.value.what
    assert (server / lane.spec.live_file).read_bytes() == first.path.read_bytes()
    wide = replace(lane, spec=replace(lane.spec, max_recall_drop=0.5))
    assert put_live(wide, second, server).sha256 == second.manifest.sha256


def test_after_a_retrain_the_live_file_is_asked_the_same_queries(lane: Lane, server: Path) -> None:
    put_live(lane, build(lane), server)
    coarse = replace(lane, spec=replace(lane.spec, m=2))
    train_cluster(coarse.engine, coarse.spec, coarse.cluster)
    worse = build(coarse, 2)
    asked = worse.manifest.previous_recall_at_10
    assert asked is not None
    assert asked > worse.manifest.recall_at_10 + 0.1
    with pytest.raises(PermanentFailure, match=rf"live file's {asked:.3f}"):
        put_live(coarse, worse, server)
    assert put_live(coarse, worse, server, confirm_recall=True).sha256 == worse.manifest.sha256


# --- what no table may break -------------------------------------------------------------------------

DEGENERATE = {
    "one row": songs(1),
    "two rows": songs(2),
    "one vector": np.repeat(songs(1), 400, axis=0),
    "one vector, many rows": np.repeat(songs(1), 10 * QUERIES + 200, axis=0),
    "two vectors": np.repeat(songs(2), 100, axis=0),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_a_table_with_nothing_to_measure_is_built_all_the_same(kind: str, tmp_path: Path) -> None:
    lane = lane_of(DEGENERATE[kind], tmp_path, max_imbalance=1000.0)
    first = build(lane)
    assert facts_of(first, EMBEDDING_MODEL)["passed"]
    assert facts_of(first, DRIFT)["passed"]
    rows = len(DEGENERATE[kind])
    put_rows(lane.engine, lane.spec, {rows + 1: npy(DEGENERATE[kind][0])})
    second = build(lane, 2)
    assert second.manifest.rows == rows + 1
    assert all(np.isfinite(list(drift_of(second).values())))
    assert metadata_of(second)


# --- what people see ---------------------------------------------------------------------------------


@pytest.fixture
def installed(valkey_url: str, tmp_path: Path) -> Iterator[Installation]:
    databases: dict[str, Any] = {
        name: f"sqlite:///{tmp_path / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")
    }
    with dg.DagsterInstance.ephemeral() as instance:
        yield install(tmp_path, instance, **databases, redis_url=valkey_url, only=["title"])


def test_recall_and_drift_become_plots(installed: Installation) -> None:
    ran = installed.rebuild("title")
    installed.execute(f"DELETE FROM {installed.catalog.index('title').table} WHERE idx = 3")
    next_day = installed.build("title", DAY_TWO)
    for run in (ran, next_day):
        shown = run.metadata("title/index")
        for name in ("recall_at_1", "recall_at_10", "recall_at_100", "codes_scanned", "imbalance"):
            assert isinstance(shown[name], float), name
        for name in ("rows", "imbalance", "coarse_error", "new_share", "recall_drop"):
            assert isinstance(shown[f"drift_{name}"], int | float), name
        assert shown["retrain_advised"] is False
        assert run.checks[DRIFT]
    assert DAY_ONE < DAY_TWO
    for name in ("recall_at_10", "drift_rows", "drift_imbalance"):
        plotted = installed.instance.fetch_materializations(dg.AssetKey(["title", "index"]), limit=5).records
        assert (
            len(
                {
                    r.partition_key
                    for r in plotted
                    if r.asset_materialization and name in r.asset_materialization.metadata
                }
            )
            == 2
        )
