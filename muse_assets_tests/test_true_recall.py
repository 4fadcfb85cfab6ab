"""Recall against exact neighbors that are kept true, whatever the history, and against a slow count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from muse_assets.ivfpq.encoding import fill
from muse_assets.ivfpq.exact_neighbors import (
    LISTED,
    NearestRows,
    Neighbors,
    Queries,
    lists_suffice,
    no_neighbors,
)
from muse_assets.ivfpq.probing import Probe, ProbeCurve, choose_nprobe, measure_probes, probe_ladder
from muse_assets.ivfpq.training import train
from muse_assets.snapshots.cluster import load_cluster, train_cluster
from muse_assets.snapshots.queries import QUERIES
from muse_assets.snapshots.store import RowState, read_state
from muse_assets_tests.embedding_rows import delete_rows, npy, payloads_of, put_rows, unit_vectors
from muse_assets_tests.lanes import Lane, build, full_bytes, lane_at


def exact(
    queries: Queries, ids: NDArray[np.int64], vectors: NDArray[np.float32]
) -> list[NDArray[np.float64]]:
    """Every distance of each query to the other rows, ascending."""
    found = []
    for own, query in zip(queries.ids, queries.vectors, strict=True):
        others = vectors[ids != own].astype(np.float64)
        found.append(np.sort(np.square(others - query).sum(axis=1)))
    return found


def listed(queries: Queries, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> Neighbors:
    rows = NearestRows(queries, no_neighbors(queries))
    rows.take(ids, vectors)
    return rows.hand_over()


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], list[int]]]]:
    """Seed, and days: ids that go, ids that come (again). Many rows share a vector."""
    ids = st.lists(st.integers(0, 799), max_size=250, unique=True)
    return draw(st.integers(0, 9)), draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))


@given(histories())
@settings(max_examples=40, deadline=None)
def test_after_any_history_the_known_neighbors_are_the_exact_ones(
    history: tuple[int, list[tuple[list[int], list[int]]]],
) -> None:
    seed, days = history
    random = np.random.default_rng(seed)
    vectors = unit_vectors(800, seed=seed)
    vectors[100:400] = vectors[random.integers(0, 5, 300)]
    queries = Queries(np.array([3, 150, 900]), vectors[[3, 150, 600]].copy())
    held = np.zeros(800, bool)
    held[:600] = True
    rows = NearestRows(queries, no_neighbors(queries))
    for part in np.array_split(np.flatnonzero(held), 7):
        rows.take(part, vectors[part])
    lists = rows.hand_over()
    for gone, came in days:
        come = np.array(came, np.int64)
        # As a sync does: what comes again leaves first.
        lists = lists.without(np.isin(lists.ids, [*gone, *came]))
        held[gone] = False
        changed = random.permutation(come)[: len(come) // 2]
        vectors[changed] = vectors[random.integers(0, 800, len(changed))]
        held[come] = True
        rows = NearestRows(queries, lists)
        rows.take(come, vectors[come])
        lists = rows.hand_over()
        ids = np.flatnonzero(held)
        truth = exact(queries, ids, vectors[ids])
        for query, known in enumerate(lists.known()):
            assert known <= len(truth[query])
            np.testing.assert_allclose(lists.distances[query, :known], truth[query][:known], atol=1e-6)
            members = lists.ids[query, :known]
            assert held[members].all()
            assert len(set(members.tolist())) == known
            assert queries.ids[query] not in members
            if np.isinf(lists.horizon[query]):
                assert known == len(truth[query])


def test_lists_do_not_depend_on_how_rows_came() -> None:
    vectors = unit_vectors(3000, seed=1)
    vectors[500:900] = vectors[7]
    ids = np.arange(3000)
    queries = Queries(ids[:20], vectors[:20].copy())
    whole = listed(queries, ids, vectors)
    rows = NearestRows(queries, no_neighbors(queries))
    for part in np.array_split(np.random.default_rng(0).permutation(3000), 11):
        rows.take(part, vectors[part])
    pieces = rows.hand_over()
    for name in ("ids", "distances", "horizon"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name), err_msg=name)
    assert (whole.known() == LISTED).all()


def test_deletions_wear_a_list_down_and_near_rows_fill_it_again() -> None:
    vectors, ids = unit_vectors(1000), np.arange(1000)
    queries = Queries(np.array([2000]), vectors[:1] + np.float32(0.01))
    lists = listed(queries, ids, vectors)
    lists = lists.without(np.isin(lists.ids, lists.ids[0, 5:]))
    assert lists.known().tolist() == [5]
    assert not lists_suffice(lists)
    rows = NearestRows(queries, lists)
    far = np.repeat(-vectors[:1], 50, axis=0)
    rows.take(ids[:50] + 3000, far)
    assert rows.hand_over().known().tolist() == [5], "what lies beyond the horizon proves nothing"
    rows.take(ids[:5] + 4000, np.repeat(vectors[:1], 5, axis=0))
    assert lists_suffice(rows.hand_over())


def filled(rows: int = 3000) -> tuple[object, Queries, Neighbors, NDArray[np.float32]]:
    vectors, ids = unit_vectors(rows, seed=4, topics=60), np.arange(rows)
    index = train(vectors, nlist=100, m=8).index
    fill(index, [(ids, vectors)])
    asked = np.random.default_rng(2).permutation(rows)[:150]
    queries = Queries(ids[asked], vectors[asked])
    return index, queries, listed(queries, ids, vectors), vectors


def test_recall_is_what_a_slow_count_of_shared_neighbors_gives() -> None:
    index, queries, neighbors, vectors = filled()
    curve = measure_probes(index, queries, neighbors, fixed=3)
    index.nprobe = 3  # type: ignore[attr-defined]
    found = index.search(queries.vectors, 101)[1]  # type: ignore[attr-defined]
    for k in (1, 10, 100):
        shares = []
        for own, query, ids in zip(queries.ids, queries.vectors, found, strict=True):
            distances = np.square(vectors - query).sum(axis=1)
            distances[own] = np.inf
            nearest = set(np.argsort(distances)[:k].tolist())
            shares.append(len(nearest & set([i for i in ids.tolist() if i != own][:k])) / k)
        assert curve.at(3).recall[k] == pytest.approx(np.mean(shares), abs=0.002), k
    sizes = [probe.codes_scanned for probe in curve.probes]
    assert sizes == sorted(sizes)
    assert 0.9 * 3000 * 3 / 100 < curve.at(3).codes_scanned < 3 * 3000 * 3 / 100
    assert curve.queries == 150


def test_the_ladder_ends_where_more_lists_find_no_more() -> None:
    index, queries, neighbors, _ = filled()
    curve = measure_probes(index, queries, neighbors)
    last = curve.probes[-1]
    assert last.nprobe < 100
    index.nprobe = 100  # type: ignore[attr-defined]
    every = measure_probes(index, queries, neighbors, fixed=100).at(100)
    assert last.recall[10] == pytest.approx(every.recall[10], abs=0.01)
    assert curve.probes[0].recall[10] < last.recall[10] - 0.02


def test_any_of_more_identical_rows_than_are_listed_is_right() -> None:
    """An artist with 400 songs: 400 equal vectors, of which a list holds 160."""
    vectors = np.repeat(unit_vectors(10, seed=5), 400, axis=0)
    ids = np.random.default_rng(3).permutation(4000)
    index = train(vectors, nlist=8, m=8).index
    fill(index, [(ids, vectors)])
    queries = Queries(ids[::97], vectors[::97].copy())
    curve = measure_probes(index, queries, listed(queries, ids, vectors), fixed=8)
    assert curve.at(8).recall == {1: 1.0, 10: 1.0, 100: 1.0}
    # And a row of another artist is not.
    wrong = Queries(queries.ids, np.roll(queries.vectors, 8, axis=0).copy())
    assert measure_probes(index, wrong, listed(queries, ids, vectors), fixed=8).at(8).recall[100] < 0.3


@pytest.mark.parametrize("rows", [1, 2, 11, 101])
def test_tiny_indexes_are_measured(rows: int) -> None:
    vectors, ids = unit_vectors(rows), np.arange(rows)
    index = train(unit_vectors(300), nlist=4, m=8).index
    fill(index, [(ids, vectors)])
    queries = Queries(ids, vectors)
    curve = measure_probes(index, queries, listed(queries, ids, vectors), fixed=4)
    assert curve.probes[-1].recall[10] == (1.0 if rows <= 11 else pytest.approx(0.9, abs=0.1))
    assert (100 in curve.probes[-1].recall) == (rows == 101)
    assert choose_nprobe(curve, 0.6, 0.98) <= 4


def test_the_smallest_sufficient_nprobe_is_chosen() -> None:
    steps = zip((1, 2, 4, 8), (0.5, 0.7, 0.79, 0.8), strict=True)
    curve = ProbeCurve(tuple(Probe(n, {10: recall}, 100.0 * n) for n, recall in steps), 10)
    assert choose_nprobe(curve, 0.6, 0.8) == 2
    assert choose_nprobe(curve, 0.6, 0.98) == 4
    assert choose_nprobe(curve, 0.75, 0.5) == 4
    assert choose_nprobe(curve, 0.95, 0.5) == 8, "where nothing suffices, the most there is"
    assert choose_nprobe(curve, 0, 0) == 1
    assert choose_nprobe(curve, 0.95, 1.0, fixed=2) == 2
    assert probe_ladder(1) == (1,)
    assert probe_ladder(16) == (1, 2, 4, 8, 16)
    assert probe_ladder(17) == (1, 2, 4, 8, 16, 17)


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    """A table large enough that its queries are held out of training."""
    made = lane_at(f"sqlite:///{tmp_path / 'e.sqlite'}", tmp_path / "work")
    put_rows(made.engine, made.spec, payloads_of(unit_vectors(1500)))
    train_cluster(made.engine, made.spec, made.cluster)
    return made


def state_of(lane: Lane, sha256: str) -> RowState:
    state = read_state(lane.work, lane.spec.name, sha256)
    assert state is not None
    return state


def test_an_incremental_build_measures_what_a_full_one_does(lane: Lane) -> None:
    first = build(lane)
    assert first.manifest.queries == QUERIES
    frozen = state_of(lane, first.manifest.sha256).queries
    for day in (2, 3, 4):
        put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(90, seed=day), 1500 + 100 * day))
        put_rows(lane.engine, lane.spec, {100 * day: npy(unit_vectors(1, seed=day)[0])})
        # Queries' own rows go too.
        delete_rows(lane.engine, lane.spec, [*range(200 * day, 200 * day + 40), int(frozen.ids[day]) + 1])
        built = build(lane, day)
        assert built.manifest.mode == "incremental"
        facts, after = built.manifest, state_of(lane, built.manifest.sha256)
        np.testing.assert_array_equal(after.queries.vectors, frozen.vectors)
        assert built.path.read_bytes() == full_bytes(lane, day)
        again = build(lane, day, full=True)
        assert (again.manifest.probes, again.manifest.nprobe) == (facts.probes, facts.nprobe)
        full = state_of(lane, again.manifest.sha256).neighbors
        for query, known in enumerate(after.neighbors.known()):
            np.testing.assert_array_equal(
                after.neighbors.distances[query, :known], full.distances[query, :known]
            )


def test_queries_are_held_out_of_training_and_stay_with_the_cluster(lane: Lane) -> None:
    cluster = load_cluster(lane.cluster, lane.spec)
    assert cluster.queries is not None
    assert cluster.facts is not None
    assert cluster.facts.training_rows == 1500 - QUERIES
    assert 0 < cluster.facts.coarse_error < 2
    assert cluster.facts.imbalance >= 1
    rows = {npy(vector): idx for idx, vector in enumerate(unit_vectors(1500), 1)}
    assert [rows[npy(vector)] - 1 for vector in cluster.queries.vectors] == cluster.queries.ids.tolist()


@pytest.mark.parametrize("damage", ["lost", "cut", "junk"])
def test_lost_queries_are_drawn_anew(lane: Lane, damage: str) -> None:
    (path,) = (lane.work / ".manifests" / lane.spec.name).glob("*.cluster.queries.npz")
    content = path.read_bytes()
    path.unlink()
    if damage != "lost":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"junk")
    first = build(lane)
    assert first.manifest.queries == QUERIES
    assert build(lane, 2, full=True).path.read_bytes() == first.path.read_bytes(), "and kept"


def test_a_table_whose_neighbors_all_went_is_read_in_full(lane: Lane) -> None:
    first = build(lane)
    neighbors = state_of(lane, first.manifest.sha256).neighbors
    delete_rows(lane.engine, lane.spec, [int(idx) + 1 for idx in neighbors.ids[0, :155]])
    second = build(lane, 2, confirm_shrink=True)
    assert second.manifest.mode == "full"
    assert second.path.read_bytes() == full_bytes(lane, 2)


@given(histories(), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_lists_made_apart_and_merged_are_those_made_at_once(
    history: tuple[int, list[tuple[list[int], list[int]]]], apart: int
) -> None:
    """As parts of a table are compared by several workers, each with a horizon of some moment."""
    seed, days = history
    vectors = np.repeat(unit_vectors(200, seed=seed), 4, axis=0)
    queries = Queries(np.arange(0, 800, 100), vectors[::100])
    for _, came in days:
        ids = np.array(came, np.int64)
        merged = NearestRows(queries, no_neighbors(queries))
        horizon = merged.horizon
        for part in np.array_split(ids, apart):
            worker = NearestRows(queries, replace(no_neighbors(queries), horizon=horizon))
            worker.take(part, vectors[part])
            horizon = merged.horizon  # of before its own rows: a worker begins while others are at work
            merged.merge(worker.hand_over())
        at_once, lists = listed(queries, ids, vectors[ids]), merged.hand_over()
        np.testing.assert_array_equal(lists.ids, at_once.ids)
        np.testing.assert_array_equal(lists.distances, at_once.distances)
        np.testing.assert_array_equal(lists.horizon, at_once.horizon)
