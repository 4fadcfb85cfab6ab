"""The embedding database is a replica, or was one, and shows an older table than a snapshot held.

Here: what went back in time and what only lost its newest rows, on a real primary and its replica; and what
a user who may read columns alone can be told. Not here: lost connections (`test_database.py`).
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from muse_assets.connections.databases import connected, engine_for
from muse_assets.embeddings.reading import next_auto_increment
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.embedding_rows import NOON, delete_rows, payloads_of, put_rows, table_of, unit_vectors
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.lanes import Lane, build, full_bytes, ids_in, lane_at, temps
from muse_assets_tests.servers import CANARY, MariaDb, execute, mariadb_server

TABLE = "tb_embedding_clap_h"
ROWS = 400
_CAUGHT_UP_SECONDS = 20.0


@dataclass(frozen=True)
class Replicated:
    """A lane that writes to the primary, and the same lane as the replica shows it."""

    primary: Lane
    replica: Lane
    replica_server: MariaDb

    def on_replica(self, statement: str) -> None:
        execute(self.replica_server.server_url, statement)

    def catch_up(self) -> None:
        """Wait until the replica shows all that the primary has."""
        deadline = time.monotonic() + _CAUGHT_UP_SECONDS
        while self._checksum(self.primary) != self._checksum(self.replica):
            assert time.monotonic() < deadline, "the replica does not catch up"
            time.sleep(0.02)

    @staticmethod
    def _checksum(lane: Lane) -> object:
        with contextlib.closing(create_engine(lane.url, poolclass=NullPool).connect()) as connection:
            return connection.execute(text(f"CHECKSUM TABLE {TABLE}")).one()[1]


@pytest.fixture
def replicated(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    require_tool("mariadbd")
    row = "--binlog-format=ROW"
    with (
        mariadb_server(tmp_path_factory.mktemp("primary"), "--log-bin=b", "--server-id=1", row) as primary,
        mariadb_server(tmp_path_factory.mktemp("replica"), "--server-id=2", row) as replica,
    ):
        with contextlib.closing(create_engine(primary.url, poolclass=NullPool).connect()) as connection:
            file, position, *_ = connection.execute(text("SHOW MASTER STATUS")).one()
        user = make_url(primary.url).username
        execute(
            replica.server_url,
            f"CHANGE MASTER TO master_host='127.0.0.1', master_port={primary.port}, master_user='{user}', "
            f"master_password='{CANARY}', master_log_file='{file}', master_log_pos={position}",
            "START SLAVE",
        )
        writing = lane_at(primary.url, tmp_path / "work")
        made = Replicated(writing, lane_at(replica.url, tmp_path / "work"), replica)
        put_rows(writing.engine, writing.spec, payloads_of(unit_vectors(ROWS)))
        train_cluster(writing.engine, writing.spec, writing.cluster)
        made.catch_up()
        yield made
        for lane in (made.primary, made.replica):
            lane.engine.dispose()


def table_ids(lane: Lane) -> list[int]:
    with contextlib.closing(create_engine(lane.url, poolclass=NullPool).connect()) as connection:
        rows = connection.execute(text(f"SELECT idx FROM {TABLE} ORDER BY idx")).all()
    return [idx - 1 for (idx,) in rows]


def test_a_replica_that_is_behind(injecting: Injecting, times: Times, replicated: Replicated) -> None:
    """What is built of it is what it shows; it never takes back what a snapshot held already."""
    primary, replica = replicated.primary, replicated.replica
    choose = random.Random(21)
    newest = ROWS
    with injecting("7", "replica behind (SQL thread stopped), then caught up") as ledger:
        for n in range(times(3, 100)):
            with ledger.injection(n):
                for path in replica.work.glob("muse_vibe_2*.index"):
                    path.unlink()
                replicated.on_replica("STOP SLAVE SQL_THREAD")
                # Few enough to pass for a deletion of the newest rows.
                count = choose.randrange(1, 20)
                put_rows(primary.engine, primary.spec, payloads_of(unit_vectors(count, seed=n), newest + 1))
                delete_rows(primary.engine, primary.spec, [choose.randrange(1, newest)])
                behind = build(replica)
                assert ids_in(behind.path) == table_ids(replica)
                assert behind.manifest.newest_idx == newest
                ahead = build(primary, 2)
                assert ids_in(ahead.path) == table_ids(primary)
                content = ahead.path.read_bytes()
                for day in (2, 3):
                    with pytest.raises(PassingFailure, match="went back in time") as red:
                        build(replica, day)
                    assert f"newest idx was {newest + count:,}, now it is {newest:,}" in red.value.what
                    assert f"AUTO_INCREMENT {newest + 1:,}" in red.value.what
                    assert "replica that is behind" in red.value.next_step
                    assert "confirm_shrink" in red.value.next_step
                assert ahead.path.read_bytes() == content
                assert not replica.file(3).exists()
                newest += count
                replicated.on_replica("START SLAVE SQL_THREAD")
                replicated.catch_up()
                with ledger.recovery():
                    healed = build(replica, 3)
                assert ids_in(healed.path) == table_ids(primary)
                assert healed.path.read_bytes() == content
                assert not temps(replica)
    replicated.on_replica("STOP SLAVE")


def recreate(lane: Lane, rows: int) -> None:
    """As a restore from a dump does it."""
    execute(lane.url, f"DROP TABLE {TABLE}")
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(rows)))


def truncate_and_fill(lane: Lane, rows: int) -> None:
    execute(lane.url, f"TRUNCATE {TABLE}")
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(rows)))


def test_a_table_restored_or_emptied_waits_for_confirmation(
    injecting: Injecting, times: Times, mariadb_schema: str, tmp_path: Path
) -> None:
    """One row fewer than the last snapshot is enough, which no limit on shrinking would notice."""
    lane = trained_lane(mariadb_schema, tmp_path)
    choose = random.Random(22)
    with injecting("16", "older restore, TRUNCATE and refill, of few rows fewer") as ledger:
        for n in range(times(4, 100)):
            rows = ROWS - choose.randrange(1, 20)
            harm = (recreate, truncate_and_fill)[n % 2]
            with ledger.injection(f"{harm.__name__} to {rows}"):
                content = build(lane).path.read_bytes()
                harm(lane, rows)
                for day, options in ((2, {}), (1, {}), (2, {"full": True})):
                    with pytest.raises(PassingFailure, match=f"{TABLE} went back in time"):
                        build(lane, day, **options)
                assert lane.file(1).read_bytes() == content
                assert not lane.file(2).exists()
                with ledger.recovery():
                    confirmed = build(lane, 2, confirm_shrink=True)
                assert ids_in(confirmed.path) == list(range(rows))
                assert build(lane, 3).manifest.mode == "unchanged", "confirmed once is enough"
                assert not temps(lane)
            for path in lane.work.glob("muse_vibe_2*.index"):
                path.unlink()
            recreate(lane, ROWS)
    lane.engine.dispose()


def test_deleting_the_newest_rows_needs_no_confirmation(
    injecting: Injecting, times: Times, mariadb_schema: str, tmp_path: Path
) -> None:
    lane = trained_lane(mariadb_schema, tmp_path)
    choose = random.Random(23)
    newest = ROWS
    build(lane)
    with injecting("16", "newest rows deleted, table rebuilt: not taken for going back") as ledger:
        for n in range(times(6, 100)):
            with ledger.injection(n):
                put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(15, seed=n), newest + 1))
                newest += 15
                build(lane)
                gone = choose.randrange(1, 15)
                delete_rows(lane.engine, lane.spec, range(newest - gone + 1, newest + 1))
                if n % 2:
                    execute(lane.url, f"ALTER TABLE {TABLE} FORCE")
                with ledger.recovery():
                    built = build(lane)
                assert ids_in(built.path) == table_ids(lane)
                assert built.manifest.newest_idx == newest - gone
                assert built.path.read_bytes() == full_bytes(lane)
    lane.engine.dispose()


def test_select_on_columns_is_grant_enough(
    injecting: Injecting, times: Times, mariadb_schema: str, tmp_path: Path
) -> None:
    """Builds, trains and even meets a table that went back; a column that is not granted is named."""
    lane = trained_lane(mariadb_schema, tmp_path)
    spec, schema = lane.spec, make_url(lane.url).database
    user = f"low_{str(schema)[-12:]}"
    wanted = ["idx", spec.embedding_column, spec.created_at_column, *spec.song_key]
    execute(lane.url, f"CREATE USER {user}@'%' IDENTIFIED BY '{CANARY}'")
    low_url = make_url(lane.url).set(username=user).render_as_string(hide_password=False)
    low = replace(lane, engine=engine_for(low_url), url=low_url)
    try:
        with injecting("28", "SELECT granted on columns alone") as ledger:
            # Without created_at a partition has no end of its day: that is a table as it is, not a fault.
            needed = [name for name in wanted if name != spec.created_at_column]
            for column in needed[: times(2, len(needed))]:
                with ledger.injection(column):
                    others = ", ".join(name for name in wanted if name != column)
                    execute(lane.url, f"GRANT SELECT ({others}) ON {schema}.{TABLE} TO {user}@'%'")
                    with pytest.raises(PermanentFailure, match=column) as red:
                        assert build(low).manifest.rows == -1, f"built without {column}"
                    assert TABLE in red.value.what
                    execute(lane.url, f"GRANT SELECT ({column}) ON {schema}.{TABLE} TO {user}@'%'")
                    with ledger.recovery():
                        built = build(low)
                    assert ids_in(built.path) == list(range(ROWS))
                    assert train_cluster(low.engine, spec, lane.work / "again.index").table_rows == ROWS
                    with connected(low.engine, "testing") as connection:
                        assert next_auto_increment(connection, spec) == ROWS + 1
                    truncate_and_fill(lane, ROWS - 1)
                    with pytest.raises(PassingFailure, match=f"AUTO_INCREMENT {ROWS}"):
                        build(low, 2)
                recreate(lane, ROWS)
                for path in lane.work.glob("muse_vibe_2*.index"):
                    path.unlink()
                execute(lane.url, f"REVOKE ALL, GRANT OPTION FROM {user}@'%'")
    finally:
        execute(lane.url, f"DROP USER {user}@'%'")
        low.engine.dispose()
        lane.engine.dispose()


def test_a_table_that_numbers_nothing_itself_is_left_to_the_other_checks(
    mariadb_schema: str, tmp_path: Path
) -> None:
    """Without AUTO_INCREMENT nothing is known, and nothing is claimed."""
    lane = trained_lane(mariadb_schema, tmp_path)
    execute(lane.url, f"ALTER TABLE {TABLE} MODIFY idx BIGINT NOT NULL")
    build(lane)
    delete_rows(lane.engine, lane.spec, [ROWS])
    with connected(lane.engine, "testing") as connection:
        assert next_auto_increment(connection, lane.spec) is None
    assert ids_in(build(lane, 2).path) == list(range(ROWS - 1))
    lane.engine.dispose()


def trained_lane(url: str, tmp_path: Path) -> Lane:
    lane = lane_at(url, tmp_path / "work")
    table_of(lane.spec).drop(lane.engine, checkfirst=True)
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(ROWS)), NOON)
    train_cluster(lane.engine, lane.spec, lane.cluster)
    return lane
