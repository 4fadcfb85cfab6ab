"""Playlists: the right ids, changed together, refused when they would harm; on SQLite and MariaDB."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from sqlalchemy import text

from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets.connections.redis_server import connect, describe_url, explained
from muse_assets.failures import Conflict, PassingFailure, PermanentFailure
from muse_assets.playlists.cache import Refresh, read_ids, refresh
from muse_assets.playlists.ids import index_ids
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.playlists.songs import Layout, program_songs, song_titles, unknown_programs
from muse_assets_tests.conftest import Stores

VIBE = CATALOG.index("vibe")
ALBUM = CATALOG.index("album_name")
DRP = CATALOG.program("drp")
NAMES = [spec.name for spec in CATALOG.indexes]

# idx -> disc, track: several rows a song, gaps, padding on either side, another song of a wanted disc.
ROWS = {
    1: ("100", "01"),
    2: ("100", "02"),
    4: ("  200", "01"),
    5: ("200 ", " 01 "),
    7: ("100", "01"),
    8: ("300", "01"),
    9: ("1000", "01"),
    12: ("200", "03"),
}
SONGS = {("100", "01"), ("200", "01")}
SONG_IDS = [0, 3, 4, 6]
DISC_IDS = [0, 1, 3, 4, 6, 11]


def write(url: str, *statements: str, rows: tuple[str, list[dict[str, Any]]] | None = None) -> None:
    with engine_for(url).begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
        if rows and rows[1]:
            connection.execute(text(rows[0]), rows[1])


def create_index_table(url: str, spec: IndexSpec, rows: dict[int, tuple[Any, Any]], disc: str) -> None:
    write(
        url,
        f"CREATE TABLE {spec.table} (idx INTEGER PRIMARY KEY, disccommseq {disc}, trackno VARCHAR(20))",
        rows=(
            f"INSERT INTO {spec.table} VALUES (:idx, :disc, :track)",
            [{"idx": idx, "disc": key[0], "track": key[1]} for idx, key in rows.items()],
        ),
    )


def create_song_table(url: str, songs: list[tuple[Any, Any]]) -> None:
    write(
        url,
        f"CREATE TABLE {DRP.song_table} (idx INTEGER PRIMARY KEY, disc_id VARCHAR(20), track_no VARCHAR(20))",
        rows=(
            f"INSERT INTO {DRP.song_table} (idx, disc_id, track_no) VALUES (:idx, :disc, :track)",
            [{"idx": n + 1, "disc": disc, "track": track} for n, (disc, track) in enumerate(songs)],
        ),
    )


def create_pool(url: str, songs: list[tuple[str, str, str, Any]], flag: str = "INTEGER") -> None:
    write(
        url,
        "CREATE TABLE tb_program_m (id VARCHAR(20))",
        "INSERT INTO tb_program_m VALUES ('drp '), ('fgy'), ('심야')",
        "CREATE TABLE tb_playlist_song_pool_m (idx INTEGER PRIMARY KEY, program_id VARCHAR(20),"
        f" disc_id VARCHAR(20), track_no VARCHAR(20), is_banned {flag})",
        rows=(
            "INSERT INTO tb_playlist_song_pool_m VALUES (:idx, :program, :disc, :track, :banned)",
            [
                {"idx": n + 1, "program": program, "disc": disc, "track": track, "banned": banned}
                for n, (program, disc, track, banned) in enumerate(songs)
            ],
        ),
    )


def refreshed(stores: Stores, layout: Layout = "song_tables", **options: Any) -> Refresh:
    return refresh_program(
        engine_for(stores.embedding_url),
        engine_for(stores.playlist_url),
        connect(stores.redis_url),
        CATALOG,
        DRP,
        layout,
        **options,
    )


def fill(stores: Stores) -> None:
    for spec in CATALOG.indexes:
        create_index_table(stores.embedding_url, spec, ROWS, "VARCHAR(20)")


# --- which ids ------------------------------------------------------------------------------------


def test_a_refresh_writes_the_keys_as_the_search_server_reads_them(stores: Stores) -> None:
    fill(stores)
    create_song_table(stores.playlist_url, [(" 100 ", "01"), ("200", "01"), ("100", "01"), (None, "01")])
    result = refreshed(stores, now=1763797080.25)
    client = connect(stores.redis_url)
    for name in NAMES:
        expected = DISC_IDS if name == "album_name" else SONG_IDS
        assert json.loads(client.get(f"playlist_idx:drp_{name}") or b"") == expected
        assert read_ids(client, DRP, name).tolist() == expected
        assert client.ttl(f"playlist_idx:drp_{name}") == -1
    assert float(client.get("playlist_update:drp") or b"") == 1763797080.25
    assert client.ttl("playlist_update:drp") == -1
    assert client.dbsize() == 9
    assert result.counts == {name: 6 if name == "album_name" else 4 for name in NAMES}
    assert result.previous == dict.fromkeys(NAMES)
    assert result.changed and result.seconds > 0
    assert not refreshed(stores).changed


def test_the_pool_layout_leaves_banned_songs_and_other_programs_out(stores: Stores) -> None:
    fill(stores)
    pool = [("drp", "100", "01", 0), (" drp ", "200 ", "01", None), ("drp", "300", "01", 1)]
    create_pool(stores.playlist_url, [*pool, ("fgy", "1000", "01", 0)])
    refreshed(stores, "song_pool")
    assert read_ids(connect(stores.redis_url), DRP, "vibe").tolist() == SONG_IDS
    assert unknown_programs(engine_for(stores.playlist_url), CATALOG) == ["심야"]


def test_bans_written_as_letters_hold(stores: Stores) -> None:
    songs = [("drp", "100", "01", "N"), ("drp", "200", "01", "Y"), ("drp", "300", "01", "y")]
    create_pool(stores.playlist_url, songs, flag="CHAR(1)")
    assert program_songs(engine_for(stores.playlist_url), DRP, "song_pool") == {("100", "01")}


@pytest.mark.parametrize("disc", ["VARCHAR(20)", "CHAR(20)", "INTEGER"])
def test_ids_do_not_depend_on_column_type_or_chunk(stores: Stores, disc: str) -> None:
    rows: dict[int, tuple[Any, Any]] = dict(ROWS)
    if disc == "INTEGER":
        rows = {idx: (int(key[0]), key[1]) for idx, key in ROWS.items()}
    create_index_table(stores.embedding_url, VIBE, rows, disc)
    create_index_table(stores.embedding_url, ALBUM, rows, disc)
    engine = engine_for(stores.embedding_url)
    for chunk in (1, 2, 20_000):
        ids = index_ids(engine, VIBE, SONGS, chunk)
        assert ids.dtype == np.int64
        assert ids.tolist() == SONG_IDS
        assert index_ids(engine, ALBUM, SONGS, chunk).tolist() == DISC_IDS
    shifted = index_ids(engine, replace(VIBE, id_offset=100), SONGS)
    assert shifted.tolist() == [id_ + 101 for id_ in SONG_IDS]


def test_numbers_that_look_alike_are_other_songs(stores: Stores) -> None:
    create_index_table(stores.embedding_url, VIBE, {1: ("0100", "01"), 2: ("100", "1")}, "VARCHAR(20)")
    engine = engine_for(stores.embedding_url)
    assert index_ids(engine, VIBE, SONGS).tolist() == []
    assert index_ids(engine, VIBE, []).tolist() == []


def test_a_missing_table_is_named(stores: Stores) -> None:
    with pytest.raises(PermanentFailure, match=VIBE.table):
        index_ids(engine_for(stores.embedding_url), VIBE, SONGS)


def test_titles_come_from_tables_that_have_them(stores: Stores) -> None:
    engine = engine_for(stores.playlist_url)
    assert song_titles(engine, CATALOG, "song_tables", SONGS) == {}
    create_song_table(stores.playlist_url, [("100 ", "01"), ("300", "01")])
    assert song_titles(engine, CATALOG, "song_tables", SONGS) == {}
    write(
        stores.playlist_url,
        f"ALTER TABLE {DRP.song_table} ADD COLUMN song_name VARCHAR(100)",
        f"ALTER TABLE {DRP.song_table} ADD COLUMN artist_name VARCHAR(100)",
        f"UPDATE {DRP.song_table} SET song_name = '밤편지', artist_name = '아이유'",
    )
    assert song_titles(engine, CATALOG, "song_tables", SONGS) == {("100", "01"): ("밤편지", "아이유")}
    assert song_titles(engine, CATALOG, "song_tables", [("300",), ("9",)]) == {("300",): ("밤편지", "아이유")}
    assert song_titles(engine, CATALOG, "song_tables", []) == {}


# --- all or nothing -------------------------------------------------------------------------------


def generation(number: int) -> dict[str, np.ndarray]:
    return {name: np.arange(number, number + 2_000, dtype=np.int64) for name in NAMES}


def test_readers_see_whole_generations_only(stores: Stores) -> None:
    refresh(connect(stores.redis_url), DRP, generation(0), now=0.0)
    keys = [*(DRP.ids_key(name) for name in NAMES), DRP.update_key]
    seen: list[set[float]] = []
    done = threading.Event()

    def read() -> None:
        with connect(stores.redis_url) as client:
            while not done.is_set():
                with client.pipeline(transaction=True) as transaction:
                    for key in keys:
                        transaction.get(key)
                    *lists, updated = transaction.execute()
                seen.append({float(json.loads(ids)[0]) for ids in lists} | {float(updated)})

    reader = threading.Thread(target=read)
    reader.start()
    with connect(stores.redis_url) as writer:
        for number in range(1, 201):
            refresh(writer, DRP, generation(number), now=float(number))
    done.set()
    reader.join(timeout=30)
    assert all(len(numbers) == 1 for numbers in seen)
    assert len({min(numbers) for numbers in seen}) > 20, "the reader saw too few refreshes to prove anything"


def dump(client: redis.Redis) -> dict[Any, Any]:
    return {key: client.get(key) for key in client.scan_iter()}


@pytest.mark.parametrize("size", [0, 999])
def test_a_loss_is_refused_until_confirmed(stores: Stores, size: int) -> None:
    client = connect(stores.redis_url)
    refresh(client, DRP, generation(1), now=1.0)
    before = dump(client)
    smaller = {**generation(2), "lyrics": np.arange(size, dtype=np.int64)}
    with pytest.raises(PermanentFailure, match=f"drp .*드라이브 뮤직.* lyrics 2000 -> {size}") as refused:
        refresh(client, DRP, smaller, now=2.0)
    assert "vibe" not in refused.value.what
    assert dump(client) == before
    assert refresh(client, DRP, smaller, now=3.0, confirm_shrink=True).previous["lyrics"] == 2000
    assert read_ids(client, DRP, "lyrics").size == size
    # Confirmed once, not every day.
    assert refresh(client, DRP, smaller, now=4.0).counts["lyrics"] == size


def test_half_may_go_and_a_first_empty_list_may_not(stores: Stores) -> None:
    client = connect(stores.redis_url)
    with pytest.raises(PermanentFailure, match="vibe none -> 0"):
        refresh(client, DRP, {**generation(1), "vibe": np.empty(0, dtype=np.int64)}, now=1.0)
    assert client.dbsize() == 0
    refresh(client, DRP, generation(1), now=1.0)
    half = {name: ids[:1000] for name, ids in generation(1).items()}
    assert refresh(client, DRP, half, now=2.0).changed


def test_a_program_without_songs_is_refused(stores: Stores) -> None:
    fill(stores)
    create_song_table(stores.playlist_url, [])
    with pytest.raises(PermanentFailure, match=DRP.song_table):
        refreshed(stores, confirm_shrink=True)
    assert connect(stores.redis_url).dbsize() == 0


def test_damaged_keys_heal(stores: Stores) -> None:
    client = connect(stores.redis_url)
    client.set(DRP.ids_key("vibe"), b'[1, 2, "')
    client.sadd(DRP.ids_key("title"), 1)
    with pytest.raises(PermanentFailure, match=r"playlist_idx:drp_vibe .*not a JSON array"):
        read_ids(client, DRP, "vibe")
    with pytest.raises(PermanentFailure, match=r"playlist_idx:drp_artist .*does not exist"):
        read_ids(client, DRP, "artist")
    assert refresh(client, DRP, generation(1), now=1.0).previous["vibe"] is None
    assert read_ids(client, DRP, "title").size == 2000


def test_another_writer_is_noticed(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    client, other = connect(stores.redis_url), connect(stores.redis_url)
    mget = client.mget
    replies: list[Any] = []

    def mget_after_the_other(keys: list[str]) -> Any:
        if replies:
            other.set(DRP.ids_key("title"), b"[7]")
        replies.append(mget(keys))
        return replies[-1]

    monkeypatch.setattr(client, "mget", mget_after_the_other)
    with pytest.raises(Conflict, match="playlist_idx:drp_title"):
        refresh(client, DRP, generation(1), now=1.0)


# --- a Redis that cannot serve --------------------------------------------------------------------


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[str]:
    """A server whose settings the test may change."""
    with embedded_valkey(tmp_path / "valkey") as url:
        refresh(connect(url), DRP, generation(1), now=1.0)
        yield url


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"maxmemory": "1"}, "its memory is used up"),
        ({"replicaof": "127.0.0.1 1"}, "read-only replica"),
    ],
)
def test_a_server_that_takes_no_writes_keeps_its_keys(
    own_valkey: str, settings: dict[str, str], reason: str
) -> None:
    client = connect(own_valkey)
    before = dump(client)
    if "replicaof" in settings:
        client.replicaof(*settings["replicaof"].split())
    else:
        client.config_set("maxmemory", settings["maxmemory"])
    with pytest.raises(PassingFailure, match=reason):
        refresh(client, DRP, generation(2), now=2.0)
    assert dump(client) == before


def test_a_server_that_evicts_is_refused(own_valkey: str) -> None:
    client = connect(own_valkey)
    client.config_set("maxmemory-policy", "allkeys-lru")
    before = dump(client)
    with pytest.raises(PermanentFailure, match="allkeys-lru"):
        refresh(client, DRP, generation(2), now=2.0)
    assert dump(client) == before
    client.config_set("maxmemory-policy", "volatile-lru")
    refresh(client, DRP, generation(2), now=2.0)


def test_refused_login_and_permission_are_permanent_and_name_no_password(own_valkey: str) -> None:
    connect(own_valkey).acl_setuser(
        "reader",
        enabled=True,
        passwords=["+canary"],
        keys=["*"],
        commands=["+ping", "+info", "+mget", "+get"],
    )
    for query, reason in (("wrong-canary", "login refused"), ("canary", "permission for a command refused")):
        url = f"{own_valkey.replace('unix://', 'unix://reader@')}?password={query}"
        with pytest.raises(PermanentFailure, match=reason) as refused:
            refresh(connect(url), DRP, generation(2), now=2.0)
        assert "canary" not in f"{refused.value} {refused.value.__cause__} {describe_url(url)}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (redis.exceptions.BusyLoadingError("LOADING"), "loading"),
        (redis.ResponseError("MISCONF cannot persist to disk"), "cannot save"),
    ],
)
def test_passing_states_are_told_apart(error: redis.RedisError, reason: str) -> None:
    url = "redis://:canary@redis.example:6380/2"
    with (
        pytest.raises(PassingFailure, match=f"redis.example:6380 db 2, while reading: .*{reason}") as failed,
        explained(connect(url), "reading"),
    ):
        raise error
    assert "canary" not in str(failed.value)


def test_a_redis_that_is_down_fails_soon(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(PassingFailure, match="it is down"):
        refresh(connect(f"unix://{tmp_path}/none.sock"), DRP, generation(1), now=1.0)
    assert time.monotonic() - started < 5


def test_a_silent_redis_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_assets.connections.redis_server._REPLY_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(PassingFailure, match="no answer within"):
            refresh(connect(f"redis://127.0.0.1:{silent.getsockname()[1]}"), DRP, generation(1), now=1.0)
        assert time.monotonic() - started < 1.0


def test_a_url_of_no_redis_is_refused_without_its_password() -> None:
    with pytest.raises(PermanentFailure, match="Redis URL") as refused:
        connect("http://:canary@redis.example")
    assert "canary" not in str(refused.value)
    assert describe_url("rediss://user:canary@redis.example:6380/2") == "Redis redis.example:6380 db 2"
