"""Bad rows, bad settings and servers that are down, each in a real run on a whole installation.

Whatever is wrong, the run is red, says which index, table or path and what to do next, and what the
search server reads is what it read before.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import redis
from sqlalchemy import bindparam, text
from sqlalchemy.engine import make_url

from muse_assets.catalog import CATALOG
from muse_assets_tests.conftest import Stores
from muse_assets_tests.installations import (
    DAY_ONE,
    DAY_TWO,
    Installation,
    Ran,
    hurry_retries,
    install,
)

INDEX = "artist"
SPEC = CATALOG.index(INDEX)
TABLE, COLUMN = SPEC.table, SPEC.embedding_column
ROWS = 200


@pytest.fixture
def live(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """One index live, and playlists in Redis as an earlier day left them."""
    hurry_retries(monkeypatch)
    with dg.DagsterInstance.ephemeral() as instance:
        installation = install(
            tmp_path,
            instance,
            embedding_db_url=stores.embedding_url,
            playlist_db_url=stores.playlist_url,
            redis_url=stores.redis_url,
            songs=ROWS,
            only=[INDEX],
        )
        installation.rebuild(INDEX)
        write_playlists(stores.redis_url)
        yield installation


def write_playlists(redis_url: str) -> None:
    """Every program's keys, as an earlier day left them."""
    with redis.Redis.from_url(redis_url) as client:
        for program in CATALOG.programs:
            client.mset({program.ids_key(spec.name): "[0, 1, 2]" for spec in CATALOG.indexes})
            client.set(program.update_key, "1767225600.0")


@contextlib.contextmanager
def nothing_changes(installation: Installation) -> Iterator[None]:
    """What the server may load and read is the same afterwards, and nothing is left lying about."""
    files, values = installation.server_files(), installation.redis_values()
    assert files
    assert values
    yield
    assert installation.server_files() == files
    assert installation.redis_values() == values
    assert installation.temp_files() == []


def assert_red(ran: Ran, *words: str, retries: int = 0) -> None:
    """The run failed without publishing and says `words`, what is live, and what to do next."""
    assert not ran.success
    assert ran.materialized == []
    for word in (*words, "\nLive: ", "\nNext: "):
        assert word in ran.failure
    assert ran.retries == retries


def rejected(ran: Ran) -> list[dict[str, Any]]:
    """The table of rejected rows that the UI shows."""
    records, _schema = ran.metadata(f"{INDEX}/index")["rejected_rows"]
    return [record.data for record in records]


def npy(vector: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, vector)
    return file.getvalue()


def set_payload(installation: Installation, payload: bytes, *idx: int) -> None:
    statement = text(f"UPDATE {TABLE} SET {COLUMN} = :payload WHERE idx IN :wanted")
    with installation.embeddings.begin() as connection:
        connection.execute(
            statement.bindparams(bindparam("wanted", expanding=True)),
            {"payload": payload, "wanted": list(idx)},
        )


VECTOR = np.ones(SPEC.dimension, np.float32) / np.sqrt(np.float32(SPEC.dimension))
WITH_NAN = VECTOR.copy()
WITH_NAN[7] = np.nan


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (npy(VECTOR)[:-3], "wrong_length"),
        (npy(WITH_NAN), "not_finite"),
    ],
    ids=["cut short", "NaN"],
)
def test_few_bad_rows_are_counted_and_many_are_refused(
    live: Installation, payload: bytes, reason: str
) -> None:
    set_payload(live, payload, 17)

    few = live.build(INDEX, DAY_TWO)

    assert few.success, few.failure
    facts = few.metadata(f"{INDEX}/index")
    assert (facts["rejected"], facts["dagster/row_count"]) == (1, ROWS - 1)
    assert rejected(few) == [{"reason": reason, "rows": 1, "idx": "17"}]
    assert live.deploy(INDEX).success

    set_payload(live, payload, 18, 19, 20)
    with nothing_changes(live):
        many = live.build(INDEX, "2026-01-03")
        assert_red(
            many, INDEX, TABLE, f"4 of {ROWS} rows", f"4 {reason}", "idx 17, 18, 19, 20", "max_rejected_share"
        )


def test_a_pickled_payload_is_data_and_never_run(live: Installation) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    set_payload(live, file.getvalue(), 5)
    assert rejected(live.build(INDEX, DAY_TWO)) == [{"reason": "unreadable", "rows": 1, "idx": "5"}]


def test_a_mass_deletion_waits_for_confirmation(live: Installation) -> None:
    live.execute(f"DELETE FROM {TABLE} WHERE idx > {ROWS // 2}")
    with nothing_changes(live):
        assert_red(
            live.build(INDEX, DAY_TWO),
            TABLE,
            f"100 usable rows, the last snapshot had {ROWS}",
            "confirm_shrink: true",
        )
    confirmed = live.build(INDEX, DAY_TWO, confirm_shrink=True)
    assert confirmed.success, confirmed.failure
    assert_red(live.deploy(INDEX), "confirm_shrink")
    deployed = live.deploy(INDEX, confirm_shrink=True)
    assert deployed.metadata(f"{INDEX}/deployed")["dagster/row_count"] == ROWS // 2


def test_an_emptied_table_is_refused_even_when_confirmed(live: Installation) -> None:
    live.execute(f"DELETE FROM {TABLE}")
    with nothing_changes(live):
        assert_red(live.build(INDEX, DAY_TWO), TABLE, "0 usable rows")
        assert_red(
            live.build(INDEX, DAY_TWO, confirm_shrink=True), TABLE, "has no usable rows", "fill the table"
        )
        assert_red(live.run("rebuild", f"{INDEX}/cluster"), TABLE, "no rows")


def test_a_missing_table_is_named(live: Installation) -> None:
    live.execute(f"DROP TABLE {TABLE}")
    with nothing_changes(live):
        for ran in (live.build(INDEX, DAY_TWO), live.run("rebuild", f"{INDEX}/cluster")):
            assert_red(ran, f"{INDEX}: table {TABLE} does not exist", "restore it")
        assert_red(live.cache("drp"), "playlist_cache · drp", "tb_embedding_")


def test_a_missing_column_is_named(live: Installation) -> None:
    live.execute(f"ALTER TABLE {TABLE} RENAME COLUMN {COLUMN} TO vector_v2")
    with nothing_changes(live):
        for ran in (live.build(INDEX, DAY_TWO), live.run("rebuild", f"{INDEX}/cluster")):
            assert_red(ran, f"table {TABLE} has no column {COLUMN}", "vector_v2")


def test_a_dimension_that_is_not_the_tables_is_refused_before_training(live: Installation) -> None:
    wrong = live.with_settings(catalog=_catalog(live, "dimension = 512"))
    cluster = live.work / SPEC.cluster_file
    before = cluster.read_bytes()
    with nothing_changes(live):
        assert_red(
            wrong.run("rebuild", f"{INDEX}/cluster"),
            f"cannot train on {TABLE}.{COLUMN}",
            f"{ROWS} wrong_length",
            "check `dimension`",
        )
        assert cluster.read_bytes() == before
        # With the old cluster in place, the build is refused by its shape.
        assert_red(wrong.build(INDEX, DAY_TWO), str(cluster), "(1024, ", "the catalog says (512, ")


def test_an_unknown_schema_is_not_tried_again(live: Installation) -> None:
    if live.embeddings.dialect.name == "sqlite":
        elsewhere = f"sqlite:///{live.settings.root / 'elsewhere.sqlite'}"
        words = ("does not exist", "elsewhere.sqlite")
    else:
        url = make_url(live.settings.embedding_url()).set(database="no_such_schema")
        elsewhere = url.render_as_string(hide_password=False)
        words = ("no_such_schema", "correct the schema name")
    with nothing_changes(live):
        assert_red(live.with_settings(embedding_db_url=elsewhere).build(INDEX, DAY_TWO), *words)


def test_a_program_without_songs_is_named(live: Installation) -> None:
    program = CATALOG.program("k2k")
    with live.playlists.begin() as connection:
        connection.execute(text(f"DELETE FROM {program.song_table}"))
    with nothing_changes(live):
        ran = live.cache("k2k", confirm_shrink=True)
        assert_red(ran, "Program k2k (키스더라디오) has no songs in tb_song_k2k_m", "fill that table")


def test_a_missing_program_table_is_named(live: Installation) -> None:
    with live.playlists.begin() as connection:
        connection.execute(text("DROP TABLE tb_song_drp_m"))
    with nothing_changes(live):
        assert_red(live.cache("drp"), "playlist_cache · drp", "tb_song_drp_m")


# --- no store has a part in these ---------------------------------------------------------


@pytest.fixture
def alone(valkey_url: str, tmp_path: Path) -> Iterator[Installation]:
    """One index live on SQLite, and a newer snapshot of it waiting to be deployed."""
    with dg.DagsterInstance.ephemeral() as instance:
        installation = install(
            tmp_path,
            instance,
            embedding_db_url=f"sqlite:///{tmp_path / 'a.sqlite'}",
            playlist_db_url=f"sqlite:///{tmp_path / 'b.sqlite'}",
            redis_url=valkey_url,
            songs=ROWS,
            only=[INDEX],
        )
        installation.rebuild(INDEX)
        installation.execute(f"DELETE FROM {TABLE} WHERE idx = 1")
        assert installation.build(INDEX, DAY_TWO).success
        write_playlists(valkey_url)
        yield installation


def test_a_database_that_is_down_is_tried_thrice(
    alone: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry_retries(monkeypatch)
    # Nothing listens on port 1; the password is the one thing that must not be repeated.
    dead = "mysql+pymysql://muse:hunter2@127.0.0.1:1/muse"
    down = alone.with_settings(embedding_db_url=dead, playlist_db_url=dead)
    with nothing_changes(alone):
        for ran in (down.build(INDEX, DAY_TWO), down.run("rebuild", f"{INDEX}/cluster"), down.cache("drp")):
            assert_red(ran, "mysql 127.0.0.1:1/muse", "check that the database is up", retries=2)
            assert "hunter2" not in ran.failure
    # G8: nothing but the next run is needed.
    assert alone.build(INDEX, DAY_TWO).success


def test_redis_that_is_down_is_tried_thrice(alone: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_retries(monkeypatch)
    down = alone.with_settings(redis_url="redis://:hunter2@127.0.0.1:1/0")
    with nothing_changes(alone):
        ran = down.cache("drp")
        assert_red(ran, "Redis 127.0.0.1:1 db 0", "start it", retries=2)
        assert "hunter2" not in ran.failure


def test_a_missing_server_directory_is_named_and_not_created(alone: Installation) -> None:
    missing = alone.settings.root / "not-mounted"
    with nothing_changes(alone):
        ran = alone.with_settings(server_dir=missing).deploy(INDEX)
        assert_red(ran, f"The server directory {missing} does not exist", "MUSE_SERVER_DIR")
        assert_red(alone.with_settings(server_dir=missing).run("reload"), str(missing))
        assert not missing.exists()


def test_a_file_in_place_of_a_directory_is_named(alone: Installation) -> None:
    file = alone.settings.root / "file"
    file.write_text("not a directory")
    with nothing_changes(alone):
        assert_red(alone.with_settings(server_dir=file).deploy(INDEX), str(file), "MUSE_SERVER_DIR")
        assert_red(alone.with_settings(work_dir=file).deploy(INDEX), str(file), "MUSE_WORK_DIR")
        assert_red(
            alone.with_settings(work_dir=file / "below").build(INDEX, DAY_ONE), str(file), "MUSE_WORK_DIR"
        )
    assert file.read_text() == "not a directory"


def test_a_home_that_is_a_file_is_named(alone: Installation) -> None:
    file = alone.settings.root / "file"
    file.touch()
    ran = alone.with_settings(home=file, server_dir=None, work_dir=alone.work).deploy(INDEX)
    assert_red(ran, f"The directory {file / 'server'} cannot be created", "MUSE_SERVER_DIR")


def test_a_read_only_directory_changes_nothing(alone: Installation) -> None:
    with nothing_changes(alone):
        with read_only(alone.server):
            ran = alone.deploy(INDEX)
            assert_red(ran, str(alone.server), "read-only")
        with read_only(alone.work):
            # Its lock file is there already, so the staged file is the first that cannot be written.
            alone.execute(f"DELETE FROM {TABLE} WHERE idx = 2")
            assert_red(alone.build(INDEX, DAY_TWO), str(alone.work), "read-only")
    assert alone.build(INDEX, DAY_TWO).success
    assert alone.deploy(INDEX).metadata(f"{INDEX}/deployed")["dagster/row_count"] == ROWS - 2


def test_the_work_directory_cannot_be_the_servers(alone: Installation) -> None:
    with nothing_changes(alone):
        assert_red(alone.with_settings(server_dir=alone.work).deploy(INDEX), str(alone.work), "MUSE_WORK_DIR")


def test_two_at_once_on_one_index_is_a_conflict(alone: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_retries(monkeypatch)
    lock = alone.work / ".locks" / f"{INDEX}.lock"
    with nothing_changes(alone), held(lock):
        assert_red(alone.build(INDEX, DAY_TWO), str(lock), "Another process is at work here", retries=2)


@contextlib.contextmanager
def held(lock: Path) -> Iterator[None]:
    """Another process holds the lock."""
    holder = subprocess.Popen(
        ["flock", str(lock), "sh", "-c", "echo held; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stdin
    assert holder.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Permissions do not bind root: as root the directory is bound onto itself, read-only."""
    if os.geteuid() != 0:
        directory.chmod(0o555)
        try:
            yield
        finally:
            directory.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", str(directory), str(directory)], check=False).returncode:
        pytest.skip("MOUNT REFUSED: as root this test needs bind mounts; run it as another user instead")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def _catalog(installation: Installation, *lines: str) -> Path:
    path = installation.settings.root / "catalog.toml"
    path.write_text("\n".join([f"[index.{INDEX}]", *lines, ""]), "utf-8")
    return path
