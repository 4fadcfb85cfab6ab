"""Rotating verification: what a build digests, what it vouches for, and that nothing stays unseen.

Here: `verify_days` above 1. Not here: what is done about a bucket that differs (`test_snapshots.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from muse_assets.embeddings.digests import BUCKET_ROWS
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.snapshots.building import Built
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.rotation import TAIL_BUCKETS, Verified, covers, due_stretches, never
from muse_assets.snapshots.store import read_state, state_path
from muse_assets_tests.embedding_rows import delete_rows, npy, payloads_of, put_rows, unit_vectors
from muse_assets_tests.lanes import Lane, build, full_bytes, ids_in, lane_at
from muse_assets_tests.servers import execute

DAYS = 7
ROWS = 640
# The last row before the tail, and those of the tail: far enough that the old ones are not in it.
TAIL = 3_000_000
VECTORS = unit_vectors(400, seed=5)
GAP = range(20_000, 20_400)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SQLite table, most of whose rows are before the tail, its cluster and first build."""
    folder = tmp_path_factory.mktemp("rotating")
    made = _lane(f"sqlite:///{folder / 'e.sqlite'}", folder)
    _put_all(made)
    train_cluster(made.engine, made.spec, made.cluster)
    build(made)
    made.engine.dispose()
    return folder


@pytest.fixture
def lane(trained: Path, tmp_path: Path) -> Iterator[Lane]:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    made = _lane(f"sqlite:///{tmp_path / 'e.sqlite'}", tmp_path)
    yield made
    made.engine.dispose()


def _lane(url: str, folder: Path) -> Lane:
    made = lane_at(url, folder / "work")
    lenient = replace(made.spec, verify_days=DAYS, recall_gate=0, max_imbalance=1e9, max_replaced_share=1)
    return replace(made, spec=lenient)


def _put_all(lane: Lane) -> None:
    vectors = unit_vectors(ROWS + 50)
    put_rows(lane.engine, lane.spec, payloads_of(vectors[:ROWS]) | payloads_of(vectors[ROWS:], TAIL))


def asked_of(engine: Engine) -> list[tuple[int, int]]:
    """Ranges of idx that are digested from now on."""
    ranges: list[tuple[int, int]] = []

    def note(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if "SUM(" in statement:
            low, high = values.values() if isinstance(values, dict) else values
            ranges.append((low, high))

    event.listen(engine, "before_cursor_execute", note)
    return ranges


def old_buckets(ranges: list[tuple[int, int]]) -> set[int]:
    """Buckets before the tail that hold rows, of those ranges."""
    return {idx // BUCKET_ROWS for low, high in ranges for idx in range(low, min(high, ROWS) + 1)}


def verified_of(lane: Lane, built: Built) -> Verified:
    state = read_state(lane.work, lane.spec.name, built.manifest.sha256)
    assert state is not None
    return state.verified


# What is asked

EXTENTS = st.lists(st.integers(0, 40_000), min_size=1, max_size=60, unique=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    old=EXTENTS,
    verify_days=st.integers(2, 9),
    gaps=st.lists(st.integers(1, 12), min_size=5, max_size=25),
    grows=st.lists(st.integers(0, 4_000), min_size=25, max_size=25),
)
def test_shares_are_equal_and_every_bucket_comes_round(
    old: list[int], verify_days: int, gaps: list[int], grows: list[int]
) -> None:
    """Whatever the gaps in idx, the days without a build and the growth."""
    high = 120_000
    known = np.unique([*old, *range(high - 5, high + 1)]).astype(np.int64)
    verified, day = never(), date(2026, 11, 1)
    asked = due_stretches(verified, known, 0, high, day, verify_days)
    assert asked.tolist() == [[0, high]]
    verified = verified.digested(0, high, asked, day)
    for step, (wait, grow) in enumerate(zip([1] * 12 + gaps, [*grows[:12], *grows], strict=False)):
        day += timedelta(days=wait)
        before, end, high = verified, high, high + grow
        known = np.unique([*known, *range(high - 2, high + 1)])
        asked = due_stretches(verified, known, 0, high, day, verify_days)
        assert (asked[1:, 0] > asked[:-1, 1]).all()
        assert covers(asked, np.arange(max(0, end - TAIL_BUCKETS), high + 1)).all()
        verified = verified.digested(0, high, asked, day)
        ages = day.toordinal() - verified.on(np.arange(high + 1))
        assert ages.min() == 0
        assert ages.max() < verify_days, (step, verified)
        of_old = known[known < end - TAIL_BUCKETS]
        share = -(-len(known) // verify_days) * wait
        # What leaves the tail comes on top until the shares, which grow with it, have caught up.
        assert covers(asked, of_old).sum() <= share + 3 * verify_days
        # Nothing is called digested that was not.
        everywhere = np.arange(high + 1)
        moved = verified.on(everywhere) != before.on(everywhere)
        assert covers(asked, everywhere[moved]).all()
        assert len(verified.bucket) <= 2 * verify_days + 4


def test_a_day_asks_for_its_share_and_the_tail(lane: Lane) -> None:
    asked = asked_of(lane.engine)
    seen: set[int] = set()
    every = set(range(ROWS // BUCKET_ROWS + 1))
    for day in range(2, 2 + DAYS):
        asked.clear()
        built = build(lane, day)
        assert built.manifest.mode == "unchanged"
        assert len(old_buckets(asked)) <= -(-len(every) // DAYS) + 1
        assert all(any(low <= idx <= high for low, high in asked) for idx in (TAIL, TAIL + 49))
        seen |= old_buckets(asked)
        oldest = date.fromisoformat(built.manifest.verified_from)
        assert oldest == verified_of(lane, built).oldest
        assert date(2026, 11, day) - oldest < timedelta(days=DAYS)
    assert seen == every
    assert oldest >= date(2026, 11, 2)


@pytest.mark.parametrize("option", [{"verify_all": True}, {"full": True}, {"confirm_shrink": True}, {}])
def test_everything_is_asked_on_demand_and_with_verify_days_1(lane: Lane, option: dict[str, bool]) -> None:
    if not option:
        lane = replace(lane, spec=replace(lane.spec, verify_days=1))
    asked = asked_of(lane.engine)
    put_rows(lane.engine, lane.spec, {15_000: npy(VECTORS[0]), 300: npy(VECTORS[1])})
    built = build(lane, 2, **option)
    assert built.manifest.verified_from == "2026-11-02"
    assert sum(high - low + 1 for low, high in asked) >= TAIL + 49
    assert 14_999 in ids_in(built.path)
    parity = next(check for check in built.checks if check.name == "id_parity")
    assert parity.summary.endswith("As of 2026-11-02.")


def test_the_check_of_the_ids_says_since_when(lane: Lane) -> None:
    for day in (2, 3):
        put_rows(lane.engine, lane.spec, {TAIL + 60 + day: npy(VECTORS[day])})
        parity = next(check for check in build(lane, day).checks if check.name == "id_parity")
        assert f"As of 2026-11-0{day}; the oldest part verified 2026-11-01." in parity.summary
    again = next(check for check in build(lane, 4).checks if check.name == "id_parity")
    assert again.summary.count("As of") == 1
    assert again.facts["verified_from"] == "2026-11-01"


# What is found

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "embed", "swap", "gap", "tail", "first"]),
        st.integers(0, 10**6),
    ),
    max_size=8,
)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(history=st.lists(st.tuples(EDITS, st.booleans()), min_size=1, max_size=5), days=st.integers(2, 4))
def test_within_verify_days_any_history_ends_in_the_file_of_a_full_build(
    trained: Path, tmp_path: Path, history: list[tuple[list[tuple[str, int]], bool]], days: int
) -> None:
    folder = tmp_path / "history"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder)
    made = _lane(f"sqlite:///{folder / 'e.sqlite'}", folder)
    lane = replace(made, spec=replace(made.spec, verify_days=days, max_shrink_share=1))
    rows = set(range(1, ROWS + 1)) | set(range(TAIL, TAIL + 50))
    day = 1
    for edits, skipped in history:
        day += 2 if skipped else 1
        for kind, pick in edits:
            edit(lane, rows, kind, pick)
        built = build(lane, day)
        in_tail = [idx for idx in ids_in(built.path) if idx >= TAIL - 1]
        assert in_tail == sorted(idx - 1 for idx in rows if idx >= TAIL), "the tail is of today"
        ages = day_of(day).toordinal() - verified_of(lane, built).on(np.arange(min(rows) // 16, TAIL // 16))
        assert ages.max() < days
    for _ in range(days):
        day += 1
        built = build(lane, day)
    assert ids_in(built.path) == sorted(idx - 1 for idx in rows)
    assert built.path.read_bytes() == full_bytes(lane, day)
    lane.engine.dispose()


def day_of(day: int) -> date:
    return date(2026, 11, day)


def edit(lane: Lane, rows: set[int], kind: str, pick: int) -> None:
    """One writer's change, told to the model too."""
    vector, other = (npy(VECTORS[(pick + n) % len(VECTORS)]) for n in (0, 1))
    held = sorted(idx for idx in rows if 30 < idx < TAIL)
    idx = held[pick % len(held)]
    if kind == "insert":  # appended
        put_rows(lane.engine, lane.spec, {max(rows) + 1 + pick % 30: vector})
        rows.add(max(rows) + 1 + pick % 30)
    elif kind == "delete":
        gone = set(held[pick % len(held) :][:20])
        delete_rows(lane.engine, lane.spec, gone)
        rows -= gone
    elif kind == "embed":
        put_rows(lane.engine, lane.spec, {idx: vector})
    elif kind == "swap":
        put_rows(lane.engine, lane.spec, {idx: vector, held[(pick + 1) % len(held)]: other})
    elif kind == "gap":  # where there never was a bucket
        put_rows(lane.engine, lane.spec, {GAP[pick % len(GAP)]: vector})
        rows.add(GAP[pick % len(GAP)])
    elif kind == "tail":
        put_rows(lane.engine, lane.spec, {TAIL + pick % 80: vector})
        rows.add(TAIL + pick % 80)
    else:  # the oldest rows go, and one of them comes back
        delete_rows(lane.engine, lane.spec, range(1, 31))
        rows -= set(range(1, 31))
        put_rows(lane.engine, lane.spec, {1 + pick % 30: vector})
        rows.add(1 + pick % 30)


# What is refused the same day


def test_a_truncate_is_told_the_same_day(trained: Path, tmp_path: Path, mariadb_schema: str) -> None:
    shutil.copytree(trained / "work", tmp_path / "work")
    lane = _lane(mariadb_schema, tmp_path)
    _put_all(lane)
    assert build(lane, 2).manifest.mode == "unchanged"
    execute(mariadb_schema, f"TRUNCATE TABLE {lane.spec.table}")
    with pytest.raises(PassingFailure, match="went back in time"):
        build(lane, 3)
    put_rows(lane.engine, lane.spec, payloads_of(VECTORS[:10], TAIL + 45))  # refilled past where it was
    with pytest.raises(PermanentFailure, match="vanished"):
        build(lane, 3)
    assert not lane.file(3).exists()
    lane.engine.dispose()


def test_a_mass_deletion_among_rows_not_due_is_told_the_same_day(lane: Lane) -> None:
    asked = asked_of(lane.engine)
    build(lane, 2)
    gone = set(range(2, ROWS)) - set(range(ROWS // 3))
    delete_rows(lane.engine, lane.spec, gone)
    lane.file(2).unlink()
    asked.clear()
    with pytest.raises(PermanentFailure, match=r"counted rows are gone.*within 7 days") as red:
        build(lane, 2)
    assert "confirm_shrink: true" in red.value.next_step
    assert len(old_buckets(asked)) < 10
    assert not lane.file(2).exists()
    # What it says to do is right: everything is digested, and the shrink is taken.
    confirmed = build(lane, 2, confirm_shrink=True)
    assert confirmed.manifest.removed == len(gone)
    assert confirmed.path.read_bytes() == full_bytes(lane, 2)


# What is kept


def test_facts_without_days_are_built_on_and_verified_at_once(lane: Lane) -> None:
    sha256 = build(lane).manifest.sha256
    path = state_path(lane.work, lane.spec.name, sha256)
    with np.load(path) as arrays:
        older = {name: arrays[name] for name in arrays if not name.startswith("verified")}
    np.savez(path, **older)
    asked = asked_of(lane.engine)
    put_rows(lane.engine, lane.spec, {GAP[0]: npy(VECTORS[0])})
    built = build(lane, 2)
    assert (built.manifest.mode, built.manifest.added) == ("incremental", 1)
    assert sum(high - low + 1 for low, high in asked) >= TAIL
    assert built.manifest.verified_from == "2026-11-02"


def test_days_are_never_set_back(lane: Lane) -> None:
    for day in (2, 3, 4):
        newest = build(lane, day)
    before = verified_of(lane, newest)
    asked = asked_of(lane.engine)
    assert build(lane, 2).manifest.mode == "unchanged"  # a past day; its file is that of day 4
    assert not old_buckets(asked)
    after = verified_of(lane, newest)
    assert np.array_equal(before.bucket, after.bucket)
    assert np.array_equal(before.day, after.day)
    asked.clear()
    build(lane, 4)  # the same day again
    assert not old_buckets(asked)


@pytest.mark.parametrize("days", [0, -1, 2.5])
def test_verify_days_has_to_be_a_positive_whole_number(lane: Lane, days: Any) -> None:
    with pytest.raises(PermanentFailure, match=r"verify_days .* is not a positive whole number"):
        replace(lane.spec, verify_days=days)
