"""The law of the sync: after any history, a day's file is the file that a full build of that day gives.

A machine makes the histories: writers that insert, delete, re-embed, swap, commit late and write junk;
operators that skip days, rebuild past ones, retrain and lose files.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine

from muse_assets.connections.databases import engine_for
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.exact_neighbors import Neighbors
from muse_assets.ivfpq.files import read_index
from muse_assets.snapshots.building import Built, build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.store import state_path
from muse_assets_tests.embedding_rows import SPEC, Payload, delete_rows, npy, put_rows, table_of, unit_vectors
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting, Ledger

DAY_ONE = date(2026, 11, 1)
VECTORS = unit_vectors(500, dimension=16)
JUNK: list[Payload] = [None, b"", b"junk", npy(np.zeros(16)), npy(np.full(16, np.nan)), npy(np.ones(15))]
NUMBERS = itertools.count()

PICKS = st.lists(st.integers(0, 10**6), min_size=1, max_size=6)
FEW = st.integers(1, 12)


@dataclass
class Row:
    """What the model knows of one row. vector: its number, or None for junk."""

    payload: Payload
    vector: int | None
    day: date


@dataclass
class History:
    """What has happened: the table as it has to be, and how often each thing was proved."""

    rows: dict[int, Row] = field(default_factory=dict)
    largest: int = 0
    day: date = DAY_ONE
    trainings: int = 0


class Law(RuleBasedStateMachine):
    """One index's table, its snapshots, and a full build beside each of them."""

    def __init__(self, engine: Engine, directory: Path, modes: list[str], ledger: Ledger) -> None:
        super().__init__()
        number = next(NUMBERS)
        self.engine, self.modes, self.ledger = engine, modes, ledger
        ledger.injected += 1
        self.directory = directory / f"law_{number}"
        self.work = self.directory / "work"
        self.spec = replace(
            SPEC,
            table=f"tb_law_{number}",
            dimension=16,
            m=4,
            recall_gate=0,
            max_imbalance=1e9,
            max_rejected_share=1,
            max_shrink_share=1,
            max_replaced_share=1,
        )
        self.history = History()

    @initialize(rows=st.integers(60, 200), bad=st.booleans())
    def first_day(self, rows: int, bad: bool) -> None:
        self._insert(rows)
        if bad:
            self.insert_junk([1, 2])
        self.retrain()

    # Writers

    @rule(count=FEW)
    def insert(self, count: int) -> None:
        self._insert(count)

    @rule(gap=st.integers(1, 100), count=FEW)
    def insert_after_a_gap(self, gap: int, count: int) -> None:
        """A rolled back transaction uses up its idx."""
        self.history.largest += gap
        self._insert(count)

    @rule(picks=PICKS, earlier=st.booleans())
    def commit_late(self, picks: list[int], earlier: bool) -> None:
        """Rows below the newest one appear, created when their transaction began."""
        missing = [idx for idx in range(1, self.history.largest) if idx not in self.history.rows]
        day = max(DAY_ONE, self.history.day - timedelta(days=1)) if earlier else self.history.day
        self._write({idx: self._good(pick, day) for idx, pick in self._chosen(missing, picks)})

    @rule(picks=PICKS)
    def delete(self, picks: list[int]) -> None:
        gone = [idx for idx, _ in self._chosen(list(self.history.rows), picks)]
        for idx in gone:
            del self.history.rows[idx]
        delete_rows(self.engine, self.spec, gone)

    @rule(first=st.integers(0, 10**6), count=st.integers(1, 70))
    def delete_a_stretch(self, first: int, count: int) -> None:
        """Whole buckets vanish."""
        if self.history.rows:
            start = sorted(self.history.rows)[first % len(self.history.rows)]
            gone = [idx for idx in range(start, start + count) if self.history.rows.pop(idx, None)]
            delete_rows(self.engine, self.spec, gone)

    @rule(picks=PICKS)
    def embed_again(self, picks: list[int]) -> None:
        """Rows get new vectors; invalid ones become valid."""
        rows = self.history.rows
        self._write({idx: self._good(p + 1, rows[idx].day) for idx, p in self._chosen(list(rows), picks)})

    @rule(picks=st.lists(st.integers(0, 10**6), min_size=2, max_size=2))
    def swap(self, picks: list[int]) -> None:
        rows = self.history.rows
        chosen = [idx for idx, _ in self._chosen(list(rows), picks)]
        if len(chosen) == 2:
            one, other = chosen
            self._write(
                {
                    one: replace(rows[other], day=rows[one].day),
                    other: replace(rows[one], day=rows[other].day),
                }
            )

    @rule(picks=PICKS)
    def insert_junk(self, picks: list[int]) -> None:
        new = {self.history.largest + 1 + n: self._junk(p, self.history.day) for n, p in enumerate(picks)}
        self._write(new)

    @rule(picks=PICKS)
    def spoil(self, picks: list[int]) -> None:
        """Valid rows become invalid."""
        rows = self.history.rows
        self._write({idx: self._junk(p, rows[idx].day) for idx, p in self._chosen(list(rows), picks)})

    # Operators

    @rule(days=st.integers(1, 3))
    def let_days_pass(self, days: int) -> None:
        self.history.day += timedelta(days=days)

    @precondition(lambda self: any(row.vector is not None for row in self.history.rows.values()))
    @rule()
    def retrain(self) -> None:
        self.history.trainings += 1
        train_cluster(self.engine, self.spec, self.work / self.spec.cluster_file, seed=self.history.trainings)

    @rule(pick=st.integers(0, 10**6), facts=st.booleans())
    def lose_a_file(self, pick: int, facts: bool) -> None:
        files = sorted(self.work.glob(f"muse_{self.spec.name}_2*.index"))
        if files:
            path = files[pick % len(files)]
            if facts:
                for lost in (self.work / ".manifests" / self.spec.name).glob("*.rows.npz"):
                    lost.unlink()
            else:
                path.unlink()

    @rule()
    def build_today(self) -> None:
        self._build(self.history.day)

    @rule(back=st.integers(1, 4))
    def build_a_past_day(self, back: int) -> None:
        self._build(max(DAY_ONE, self.history.day - timedelta(days=back)))

    @rule(writers=PICKS)
    def build_two_days_running(self, writers: list[int]) -> None:
        """What production does most."""
        self._build(self.history.day)
        self.let_days_pass(1)
        self.embed_again(writers)
        self._insert(2)
        self._build(self.history.day)

    @rule(first=st.integers(0, 10**6))
    def build_before_and_after_a_swap(self, first: int) -> None:
        """Two rows of one bucket exchange their vectors and nothing else happens: no count or XOR sees it."""
        rows = sorted(self.history.rows)
        if len(rows) >= 2:
            self._build(self.history.day)
            self.swap([first, first + 1])
            self._build(self.history.day)

    # The law

    def _build(self, day: date) -> None:
        covered = self._covered(day)
        valid = sorted(idx - 1 for idx, row in covered.items() if row.vector is not None)
        elsewhere = self.directory / "elsewhere"
        shutil.rmtree(elsewhere, ignore_errors=True)
        if not valid:
            with pytest.raises(PermanentFailure, match="no usable rows"):
                self._snapshot(day, self.work)
            return
        with self.ledger.recovery():
            built = self._snapshot(day, self.work)
        full = self._snapshot(day, elsewhere, full=True)
        self.modes.append(built.manifest.mode)
        assert sorted(list_ids(read_index(built.path)).tolist()) == valid
        assert built.path.read_bytes() == full.path.read_bytes()
        assert built.manifest.sha256 == full.manifest.sha256
        assert built.manifest.rejected == full.manifest.rejected
        assert built.manifest.newest_idx == full.manifest.newest_idx == max(covered)
        assert sum(built.manifest.rejected.values()) == len(covered) - len(valid)
        assert built.table_rows == len(covered)
        assert built.manifest.probes == full.manifest.probes
        states = [
            np.load(state_path(work, self.spec.name, built.manifest.sha256))
            for work in (self.work, elsewhere)
        ]
        lists = ("neighbor_ids", "neighbor_distances", "horizon")
        days = ("verified_bucket", "verified_day")
        for name in set(states[1]) - {*lists, *days}:
            np.testing.assert_array_equal(states[0][name], states[1][name])
        # How far a list is known depends on history; as far as both are, they are the same.
        ours, theirs = (Neighbors(*(state[name] for name in lists)) for state in states)
        for query, known in enumerate(np.minimum(ours.known(), theirs.known())):
            np.testing.assert_array_equal(ours.distances[query, :known], theirs.distances[query, :known])

    def _snapshot(self, day: date, work: Path, *, full: bool = False) -> Built:
        cluster = self.work / self.spec.cluster_file
        return build_snapshot(self.engine, self.spec, work, day, cluster_path=cluster, full=full)

    def _covered(self, day: date) -> dict[int, Row]:
        """Rows up to the newest one created by the end of the day."""
        newest = max((idx for idx, row in self.history.rows.items() if row.day <= day), default=0)
        return {idx: row for idx, row in self.history.rows.items() if idx <= newest}

    def _insert(self, count: int) -> None:
        first = self.history.largest + 1
        self._write({idx: self._good(idx * 7, self.history.day) for idx in range(first, first + count)})

    def _write(self, rows: dict[int, Row]) -> None:
        by_day: dict[date, dict[int, Payload]] = {}
        for idx, row in rows.items():
            by_day.setdefault(row.day, {})[idx] = row.payload
        for day, payloads in by_day.items():
            put_rows(self.engine, self.spec, payloads, datetime.combine(day, time(15)))
        self.history.rows |= rows
        self.history.largest = max([self.history.largest, *rows])

    @staticmethod
    def _good(pick: int, day: date) -> Row:
        vector = pick % len(VECTORS)
        return Row(npy(VECTORS[vector]), vector, day)

    @staticmethod
    def _junk(pick: int, day: date) -> Row:
        return Row(JUNK[pick % len(JUNK)], None, day)

    @staticmethod
    def _chosen(candidates: list[int], picks: list[int]) -> list[tuple[int, int]]:
        """Distinct candidates, each with the pick that chose it."""
        if not candidates:
            return []
        return list({candidates[pick % len(candidates)]: pick for pick in picks}.items())

    def teardown(self) -> None:
        table_of(self.spec).drop(self.engine, checkfirst=True)
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.mark.parametrize("database", ["sqlite", "mariadb"])
def test_any_history_ends_in_the_file_of_a_full_build(
    database: str, injecting: Injecting, times: Times, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = (
        f"sqlite:///{tmp_path / 'e.sqlite'}"
        if database == "sqlite"
        else request.getfixturevalue("mariadb_schema")
    )
    engine = engine_for(url)
    modes: list[str] = []
    numbers = "13, 14, 15, 16, 17, 22, 23"
    with injecting(numbers, f"histories on {database}: incremental = full, byte for byte") as ledger:

        def machine() -> Law:
            return Law(engine, tmp_path, modes, ledger)

        run_state_machine_as_test(
            cast(type[Law], machine),  # any callable that gives a machine
            settings=settings(
                max_examples=times(10, 100),
                stateful_step_count=25,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
        counts = {mode: modes.count(mode) for mode in ("full", "incremental", "unchanged")}
        ledger.note = ", ".join(f"{count:,} {mode}" for mode, count in counts.items()) + " builds"
    engine.dispose()
    # The histories led everywhere that a build can go.
    assert min(counts.values()) >= 3, counts
