"""Rows as writers really leave them: spoilt, late, gone, swapped, dated by another clock.

Here: each kind many times, on a real MariaDB, against a full build. Not here: histories that mix all of
them (`test_law.py`), or every spelling of a bad payload (`test_embeddings.py`).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.snapshots.building import Built, build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.embedding_rows import (
    NOON,
    Payload,
    clear,
    delete_rows,
    npy,
    payloads_of,
    put_rows,
    unit_vectors,
)
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.lanes import Lane, build, full_bytes, ids_in, lane_at, temps
from muse_assets_tests.servers import execute

TABLE = "tb_embedding_clap_h"
ROWS = 600
DIMENSION = 32
FIRST = payloads_of(unit_vectors(ROWS))
FRESH = payloads_of(unit_vectors(ROWS, seed=31))
COLUMNS = "idx, disccommseq, trackno, embedding_result, created_at"


@pytest.fixture
def lane(mariadb_schema: str, tmp_path: Path) -> Iterator[Lane]:
    made = lane_at(mariadb_schema, tmp_path / "work")
    put_rows(made.engine, made.spec, FIRST)
    train_cluster(made.engine, made.spec, made.cluster)
    yield made
    made.engine.dispose()


def restart(lane: Lane) -> None:
    """The first table and no snapshot."""
    clear(lane.engine, lane.spec)
    put_rows(lane.engine, lane.spec, FIRST)
    for path in lane.work.glob("muse_vibe_2*.index"):
        path.unlink()


def assert_exact(lane: Lane, built: Built, valid: Sequence[int], day: int) -> None:
    """The ids are those of the valid idx, and the bytes those of a full build."""
    assert ids_in(built.path) == sorted(idx - 1 for idx in valid)
    assert built.path.read_bytes() == full_bytes(lane, day)
    assert not temps(lane)


# 10, 11: what cannot be a vector


def cut_short(payload: bytes, by: int) -> bytes:
    return payload[: len(payload) - by]


def with_value(row: int, *values: float) -> bytes:
    vector = unit_vectors(ROWS)[row].copy()
    vector[row % DIMENSION : row % DIMENSION + len(values)] = values[: DIMENSION - row % DIMENSION]
    return npy(vector)


SPOILT: dict[str, dict[str, Callable[[int], bytes]]] = {
    "10": {
        "0 bytes": lambda row: b"",
        "-3 bytes": lambda row: cut_short(npy(unit_vectors(ROWS)[row]), 3),
        "-4 bytes": lambda row: cut_short(npy(unit_vectors(ROWS)[row]), 4),
        "doubled": lambda row: npy(unit_vectors(ROWS)[row]) * 2,
        "two vectors": lambda row: npy(np.tile(unit_vectors(ROWS)[row], 2)),
    },
    "11": {
        "NaN": lambda row: with_value(row, np.nan),
        "Inf": lambda row: with_value(row, np.inf),
        "-Inf, Inf": lambda row: with_value(row, -np.inf, np.inf),
        "zero": lambda row: npy(np.zeros(DIMENSION, np.float32)),
    },
}


@pytest.mark.parametrize(("number", "fault"), [("10", "wrong BLOB length"), ("11", "NaN, Inf, zero vectors")])
def test_spoilt_rows(number: str, fault: str, injecting: Injecting, times: Times, lane: Lane) -> None:
    """A few are counted and left out, many are refused and nothing changes; mended they come back."""
    choose = random.Random(int(number))
    with injecting(number, fault) as ledger:
        for n in range(times(2, 45)):
            kinds = SPOILT[number]
            name, spoil = list(kinds.items())[n % len(kinds)]
            with ledger.injection(name):
                build(lane)
                few = choose.sample(range(1, ROWS + 1), choose.randrange(1, 25))
                put_rows(lane.engine, lane.spec, {idx: spoil(idx - 1) for idx in few})
                built = build(lane, 2)
                assert sum(built.manifest.rejected.values()) == len(few)
                assert {idx for found in built.rejected_examples.values() for idx in found} <= set(few)
                assert_exact(lane, built, sorted(set(FIRST) - set(few)), 2)
                many = choose.sample(range(1, ROWS + 1), 40)
                put_rows(lane.engine, lane.spec, {idx: spoil(idx - 1) for idx in many})
                with pytest.raises(PermanentFailure, match=rf"rows of {TABLE} cannot be indexed") as red:
                    build(lane, 3)
                assert "embedding_result" in red.value.what
                assert not lane.file(3).exists()
                put_rows(lane.engine, lane.spec, {idx: FIRST[idx] for idx in {*few, *many}})
                with ledger.recovery():
                    healed = build(lane, 3)
                assert_exact(lane, healed, list(FIRST), 3)
                assert healed.manifest.rejected == {}
            restart(lane)


def test_a_dimension_that_is_not_the_tables(injecting: Injecting, times: Times, lane: Lane) -> None:
    choose = random.Random(12)
    before = lane.cluster.read_bytes()
    with injecting("12", "catalog's dimension differs from the table's") as ledger:
        for dimension in [16, 64, *(8 * choose.randrange(5, 200) for _ in range(times(0, 40)))]:
            wrong = replace(lane, spec=replace(lane.spec, dimension=dimension))
            with ledger.injection(dimension):
                with pytest.raises(PermanentFailure, match=rf"{TABLE}.*check `dimension`"):
                    train_cluster(wrong.engine, wrong.spec, wrong.cluster)
                with pytest.raises(PermanentFailure, match="dimension"):
                    build(wrong)
                assert lane.cluster.read_bytes() == before
                assert not list(lane.work.glob("muse_vibe_2*.index"))
                with ledger.recovery():
                    assert build(lane).manifest.rows == ROWS
                lane.file(1).unlink()


# 13, 14, 15: songs with several rows, gaps, late commits


def test_several_rows_of_one_song(injecting: Injecting, times: Times, lane: Lane) -> None:
    """All rows of these tables are of one song; here some even hold one vector."""
    choose = random.Random(13)
    with injecting("13", "several rows per song, equal vectors among them") as ledger:
        for n in range(times(2, 60)):
            with ledger.injection(n):
                build(lane)
                copies = choose.randrange(2, 50)
                same = FIRST[choose.randrange(1, ROWS)]
                put_rows(lane.engine, lane.spec, {ROWS + 1 + c: same for c in range(copies)})
                with ledger.recovery():
                    built = build(lane, 2)
                assert built.manifest.added == copies
                assert_exact(lane, built, range(1, ROWS + copies + 1), 2)
            restart(lane)


INSERT = (
    f"INSERT INTO {TABLE} (disccommseq, trackno, embedding_result, created_at) "
    "VALUES ('01', '01', :payload, '2026-11-01 12:00:00')"
)


def test_writers_that_commit_late_and_roll_back(injecting: Injecting, times: Times, lane: Lane) -> None:
    """Four writers, AUTO_INCREMENT, slow commits and rollbacks, builds all the while: none is missed.

    `idx > max` missed 234 of 5,118 such rows for ever.
    """
    vectors = [npy(vector) for vector in unit_vectors(64, seed=15)]
    stop = threading.Event()
    late = gaps = 0

    def write(seed: int) -> int:
        choose, rolled_back = random.Random(seed), 0
        engine = create_engine(lane.url, poolclass=NullPool)
        with engine.connect() as connection:
            while not stop.is_set():
                for _ in range(choose.randrange(1, 4)):
                    connection.execute(text(INSERT), {"payload": choose.choice(vectors)})
                if choose.random() < 0.2:
                    time.sleep(choose.uniform(0.05, 0.4))
                if choose.random() < 0.1:
                    connection.rollback()
                    rolled_back += 1
                else:
                    connection.commit()
                time.sleep(choose.uniform(0, 0.02))
        return rolled_back

    with injecting("14, 15", "late commits, rolled back inserts, during builds") as ledger:
        for n in range(times(1, 8)):
            stop.clear()
            before: set[int] = set()
            with ThreadPoolExecutor(4) as pool:
                writers = [pool.submit(write, 100 * n + seed) for seed in range(4)]
                try:
                    for _ in range(times(6, 20)):
                        with ledger.injection("build among writers"):
                            built = build(lane, 2)
                            ids = set(ids_in(built.path))
                            # Late: rows below what the last build had as newest, and which it did not have.
                            found = {i for i in ids - before if before and i < max(before)}
                            late += len(found)
                            assert before <= ids, "a row that was there is gone"
                            before = ids
                        time.sleep(0.05)
                finally:
                    stop.set()
                gaps += sum(writer.result(30) for writer in writers)
            with ledger.injection("build after them"), ledger.recovery():
                built = build(lane, 2)
            with ledger.injection("nothing missed"):
                assert_exact(lane, built, table_idx(lane), 2)
                assert built.manifest.rows < built.manifest.newest_idx, "rollbacks leave gaps"
            ledger.note = f"{late:,} rows found below the newest idx, {gaps:,} rollbacks"
            restart(lane)
    assert late > 0
    assert gaps > 0


def table_idx(lane: Lane) -> list[int]:
    with lane.engine.connect() as connection:
        return [idx for (idx,) in connection.execute(text(f"SELECT idx FROM {TABLE} ORDER BY idx")).all()]


# 16, 17: rows that go or change


def test_rows_that_go(injecting: Injecting, times: Times, lane: Lane) -> None:
    choose = random.Random(16)
    with injecting("16", "rows deleted: few go, a mass waits for confirmation") as ledger:
        for n in range(times(3, 40)):
            with ledger.injection(n):
                content = build(lane).path.read_bytes()
                few = choose.sample(range(1, ROWS + 1), choose.randrange(1, 30))
                delete_rows(lane.engine, lane.spec, few)
                built = build(lane, 2)
                left = sorted(set(FIRST) - set(few))
                assert_exact(lane, built, left, 2)
                kept = choose.sample(left, choose.randrange(1, ROWS // 2))
                delete_rows(lane.engine, lane.spec, set(left) - set(kept))
                for day, full in ((3, False), (3, True), (2, False), (1, True)):
                    with pytest.raises(PermanentFailure, match=rf"{TABLE} has .* vanished.*confirm_shrink"):
                        build(lane, day, full=full)
                assert lane.file(1).read_bytes() == content
                assert not lane.file(3).exists()
                with ledger.recovery():
                    # Too few rows for the gate are its own matter.
                    lenient = replace(lane, spec=replace(lane.spec, recall_gate=0, max_imbalance=1e9))
                    confirmed = build(lenient, 3, confirm_shrink=True)
                assert_exact(lenient, confirmed, kept, 3)
                execute(lane.url, f"TRUNCATE {TABLE}")
                for confirm in (False, True):
                    with pytest.raises(MuseError, match=TABLE):
                        build(lane, 4, confirm_shrink=confirm)
                assert not lane.file(4).exists()
            restart(lane)


def test_vectors_that_change_under_the_same_idx(injecting: Injecting, times: Times, lane: Lane) -> None:
    choose = random.Random(17)
    with injecting("17", "re-embedded rows; two rows' vectors swapped, nothing else") as ledger:
        table: dict[int, Payload] = dict(FIRST)
        build(lane)
        for n in range(times(4, 100)):
            first, second = choose.sample(range(1, ROWS + 1), 2)
            if n % 2:
                second = min(first + choose.randrange(1, 5), ROWS)  # of one bucket, mostly
                changed = {first: table[second], second: table[first]}
            else:
                changed = {idx: FRESH[choose.randrange(1, ROWS + 1)] for idx in (first, second)}
            with ledger.injection(f"{'swap' if n % 2 else 'new'} {first} {second}"):
                assert any(table[idx] != payload for idx, payload in changed.items()) or first == second
                table |= changed
                put_rows(lane.engine, lane.spec, changed)
                with ledger.recovery():
                    built = build(lane)
                assert built.manifest.mode == ("incremental" if first != second else "unchanged")
                assert (built.manifest.added, built.manifest.removed) == (0, 0)
                assert_exact(lane, built, list(FIRST), 1)


# 18: clocks


CHILD = "from muse_assets_tests.faults.test_rows import clock_child; clock_child()"
CLOCKS = [
    # (TZ, the time it is there): midnights, ends of months, and hours that zones skip or have twice.
    ("UTC", "2026-11-01 15:00:00"),
    ("Asia/Seoul", "2026-11-01 23:59:59"),
    ("America/New_York", "2026-11-01 01:30:00"),
    ("America/New_York", "2026-03-08 01:59:58"),
    ("Europe/London", "2026-10-25 01:30:00"),
    ("Pacific/Kiritimati", "2026-12-31 23:59:59"),
    ("Pacific/Pago_Pago", "2027-01-01 00:00:01"),
    ("Asia/Kathmandu", "2024-02-29 12:00:00"),
    ("Australia/Lord_Howe", "2026-04-05 01:45:00"),
    ("UTC", "2038-01-19 03:14:08"),
]


def facts_of(built: Built) -> dict[str, object]:
    """What must not depend on the clock: all but the moment of the build."""
    return {name: value for name, value in asdict(built.manifest).items() if name != "built_at"}


def clock_child() -> None:
    """Build the day that argv names from argv's database in argv's folder; print the facts."""
    url, work, cluster, day = sys.argv[1:]
    lane = lane_at(url, Path(work))
    built = build_snapshot(
        lane.engine, lane.spec, lane.work, date.fromisoformat(day), cluster_path=Path(cluster), full=True
    )
    print(json.dumps(facts_of(built) | {"clock": datetime.now().isoformat(" ")}))


def test_the_clock_and_the_time_zone(injecting: Injecting, times: Times, lane: Lane, tmp_path: Path) -> None:
    """Rows around Seoul's midnights, in a DATETIME or a TIMESTAMP column, read at any hour of any zone."""
    faketime = require_tool("faketime")
    midnight = datetime(2026, 11, 2)
    for at, seconds in enumerate((-3600, -1, 0, 1, 1800, 3600, 86_399, 86_400)):
        row = payloads_of(unit_vectors(1, seed=at), ROWS + 1 + at)
        put_rows(lane.engine, lane.spec, row, midnight + timedelta(seconds=seconds))
    # Stored in the session's zone, shown in the session's zone: ours is Seoul.
    put_rows(lane.engine, lane.spec, {ROWS + 20: FRESH[1]}, NOON + timedelta(days=2))
    expected = {}
    for day in (1, 2):
        alone = replace(lane, work=tmp_path / f"day_{day}")
        expected[day] = facts_of(build(alone, day, cluster_path=lane.cluster, full=True))
    assert expected[1]["newest_idx"] == ROWS + 2
    assert expected[2]["newest_idx"] == ROWS + 7
    global_zone = "SET GLOBAL time_zone = '{}'"

    def run(number: int, clock: tuple[str, str], day: int) -> dict[str, object]:
        zone, now = clock
        arguments = [lane.url, str(tmp_path / f"clock_{number}"), str(lane.cluster), f"2026-11-{day:02}"]
        # The cluster's facts lie beside it.
        done = subprocess.run(
            [faketime, "-f", f"@{now}", sys.executable, "-c", CHILD, *arguments],
            env={"TZ": zone, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        facts: dict[str, object] = json.loads(done.stdout)
        clock_there = datetime.fromisoformat(str(facts.pop("clock")))
        assert abs(clock_there - datetime.fromisoformat(now)) < timedelta(minutes=2), "the clock was ours"
        return facts

    try:
        with injecting("18", "TZ, clock, DST, the server's zone, DATETIME and TIMESTAMP") as ledger:
            for n in range(times(3, 30)):
                clock, day = CLOCKS[(n * 3 + 2) % len(CLOCKS)], 1 + n % 2
                with ledger.injection(f"{clock} day {day}"), ledger.recovery():
                    execute(lane.url, global_zone.format(("+00:00", "-05:00", "+09:00")[n % 3]))
                    facts = run(n, clock, day)
                    assert _as_json(facts) == _as_json(expected[day])
                if n == 1:
                    _become_timestamps(lane)
    finally:
        execute(lane.url, global_zone.format("SYSTEM"))


def _become_timestamps(lane: Lane) -> None:
    """By a session in Seoul, as the batch's is."""
    with lane.engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {TABLE} MODIFY created_at TIMESTAMP NULL"))


def _as_json(facts: dict[str, object]) -> str:
    return json.dumps(facts, sort_keys=True)
