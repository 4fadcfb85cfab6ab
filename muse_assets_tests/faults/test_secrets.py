"""Every secret an installation has, through every failure of what it opens: none is left anywhere (G9).

Here: `muse` as a process of its own and Dagster runs on a DAGSTER_HOME, on MariaDB and Redis, with each
outside system failing in turn; then a search through all that was written. Not here: what else has to hold
after those failures (the tests beside this).
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import dagster as dg
import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from muse_assets.connections import redis_server
from muse_assets.settings import Settings
from muse_assets_tests.conftest import Stores
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.tcp_proxy import Fault, tcp_proxy
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.installations import (
    DAY_ONE,
    DAY_TWO,
    Installation,
    hurry_retries,
    install,
    write_small_catalog,
)
from muse_assets_tests.servers import CANARY, free_port, fresh_schema, private_redis

MUSE = Path(sys.executable).with_name("muse")
INDEX = "title"
PROGRAM = "drp"
LEGACY = ("--model", "bgem3", "--type", "song_name", "--dimension", "1024")
# What the driver sends is escaped; what the operator typed is not. Both are secrets.
AWKWARD = f"p@ss/{CANARY}:#?"

BUILD = [("run", "--index", INDEX), ("train_faiss", *LEGACY, "--output", "x_cluster.index")]
PLAYLISTS = [("cache_playlist",)]


@dataclass(frozen=True)
class World:
    """An installation whose settings are this process's environment variables."""

    stores: Stores
    instance: dg.DagsterInstance
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def set(self, **settings: str) -> None:
        for name, value in settings.items():
            self.monkeypatch.setenv(f"MUSE_{name.upper()}", value)

    def reset(self) -> None:
        self.set(
            embedding_db_url=self.stores.embedding_url,
            playlist_db_url=self.stores.playlist_url,
            redis_url=self.stores.redis_url,
        )
        for name in ("MUSE_RELOAD", "MUSE_RELOAD_HEALTH"):
            self.monkeypatch.delenv(name, raising=False)

    @property
    def installed(self) -> Installation:
        """As after a restart of the code location under the environment of now."""
        return Installation(Settings(), self.instance)

    def muse(self, *arguments: str) -> int:
        """Run `muse`; what it prints is kept beside its other files, where the search finds it."""
        log = self.folder / "terminal.log"
        with log.open("ab") as output:
            done = subprocess.run(
                [MUSE, *arguments],
                cwd=self.folder,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
                timeout=180,
            )
        assert b"Traceback" not in log.read_bytes(), log.read_text("utf-8")[-3000:]
        return done.returncode

    def build(self) -> str:
        # In full, for an unchanged table is digested and not read.
        return self.installed.build(INDEX, DAY_TWO, full=True).failure

    def cache(self) -> str:
        return self.installed.cache(PROGRAM).failure

    def reload(self) -> str:
        # What was loaded before is not loaded again.
        (self.installed.server / ".loaded.json").unlink(missing_ok=True)
        return self.installed.run("reload", "server_reload").failure

    def embeddings_say(self, statement: str) -> None:
        with create_engine(self.stores.embedding_url).begin() as connection:
            connection.execute(text(statement))


Breaks = Callable[[World], AbstractContextManager[object]]


@dataclass(frozen=True)
class Failure:
    """breaks: makes it fail while open. door: the Dagster run that meets it. commands: of `muse` that do."""

    breaks: Breaks
    door: Callable[[World], str]
    commands: Sequence[tuple[str, ...]]


def setting(name: str, change: Callable[[World], str]) -> Breaks:
    @contextlib.contextmanager
    def breaks(world: World) -> Iterator[None]:
        world.set(**{name: change(world)})
        yield

    return breaks


def database(**parts: object) -> Callable[[World], str]:
    """The embedding database's URL with these parts of it wrong."""
    return lambda world: (
        make_url(world.stores.embedding_url).set(**parts).render_as_string(hide_password=False)  # type: ignore[arg-type]
    )


def playlist_database(**parts: object) -> Callable[[World], str]:
    return lambda world: (
        make_url(world.stores.playlist_url).set(**parts).render_as_string(hide_password=False)  # type: ignore[arg-type]
    )


@contextlib.contextmanager
def killed_connection(world: World) -> Iterator[None]:
    port = make_url(world.stores.embedding_url).port
    with tcp_proxy(f"mysql://127.0.0.1:{port}") as proxy:
        # Far enough for login and checks, not for the rows.
        proxy.arm(Fault.RESET, after=9_000, times=1_000)
        world.set(embedding_db_url=database(port=proxy.port)(world))
        yield
        assert proxy.done, "no connection was killed"


def sql(broken: str, mended: str) -> Breaks:
    @contextlib.contextmanager
    def breaks(world: World) -> Iterator[None]:
        table = world.installed.catalog.index(INDEX).table
        world.embeddings_say(broken.format(table=table))
        yield
        world.embeddings_say(mended.format(table=table))

    return breaks


@contextlib.contextmanager
def secret_parameters(world: World) -> Iterator[None]:
    """A statement fails whose bound parameters hold the secret: SQLAlchemy would show them."""
    playlist = create_engine(world.stores.playlist_url)
    table = world.installed.catalog.program(PROGRAM).song_table
    become = text(f"UPDATE {table} SET disc_id = :after WHERE disc_id = :before")
    with playlist.connect() as connection:
        disc = connection.execute(text(f"SELECT MIN(disc_id) FROM {table}")).scalar_one()
    with playlist.begin() as connection:
        connection.execute(become, {"before": disc, "after": CANARY})
    with sql("RENAME TABLE {table} TO aside", "RENAME TABLE aside TO {table}")(world):
        yield
    # Else it is a song that no table has, and shown as such.
    with playlist.begin() as connection:
        connection.execute(become, {"before": CANARY, "after": disc})


@contextlib.contextmanager
def full_redis(world: World) -> Iterator[None]:
    with redis.Redis.from_url(world.stores.redis_url) as admin:
        admin.config_set("maxmemory", 1)
        yield
        admin.config_set("maxmemory", 0)


REFUSED = f"http://127.0.0.1:1/reload?token={CANARY}"
FAILING = f"/bin/sh -c 'echo authorizing with {CANARY}; echo {CANARY} >&2; exit 3' --token={CANARY}"
FAILURES: dict[str, Failure] = {
    "embedding database: wrong password": Failure(
        setting("embedding_db_url", database(password=AWKWARD)), World.build, BUILD
    ),
    "embedding database: unknown host": Failure(
        setting("embedding_db_url", database(host="db.invalid")), World.build, BUILD
    ),
    "embedding database: refused": Failure(setting("embedding_db_url", database(port=1)), World.build, BUILD),
    "embedding database: unknown schema": Failure(
        setting("embedding_db_url", database(database="nowhere")), World.build, BUILD
    ),
    "embedding database: URL without a driver": Failure(
        setting("embedding_db_url", lambda _: f"mysql+nothing://muse:{CANARY}@127.0.0.1/muse"),
        World.build,
        BUILD,
    ),
    "embedding database: no URL at all": Failure(
        setting("embedding_db_url", lambda _: f"muse:{CANARY}@127.0.0.1/muse"), World.build, BUILD
    ),
    "embedding database: killed connections": Failure(killed_connection, World.build, BUILD[1:]),
    "embedding database: missing table": Failure(
        sql("RENAME TABLE {table} TO aside", "RENAME TABLE aside TO {table}"), World.build, BUILD
    ),
    "embedding database: missing column": Failure(
        sql(
            "ALTER TABLE {table} RENAME COLUMN song_name_embedding TO aside",
            "ALTER TABLE {table} RENAME COLUMN aside TO song_name_embedding",
        ),
        World.build,
        BUILD,
    ),
    "embedding database: SQL error with parameters": Failure(secret_parameters, World.cache, PLAYLISTS),
    "playlist database: wrong password": Failure(
        setting("playlist_db_url", playlist_database(password=AWKWARD)), World.cache, PLAYLISTS
    ),
    "playlist database: refused": Failure(
        setting("playlist_db_url", playlist_database(port=1)), World.cache, PLAYLISTS
    ),
    "Redis: wrong password": Failure(
        setting("redis_url", lambda w: w.stores.redis_url.replace(CANARY, quote(AWKWARD, safe=""))),
        World.cache,
        PLAYLISTS,
    ),
    "Redis: wrong user": Failure(
        setting("redis_url", lambda w: w.stores.redis_url.replace("//:", f"//{CANARY}:")),
        World.cache,
        PLAYLISTS,
    ),
    "Redis: refused": Failure(
        setting("redis_url", lambda _: f"redis://:{CANARY}@127.0.0.1:{free_port()}/0"), World.cache, PLAYLISTS
    ),
    "Redis: unknown host": Failure(
        setting("redis_url", lambda _: f"redis://:{CANARY}@redis.invalid:6379/0"), World.cache, PLAYLISTS
    ),
    "Redis: no URL of Redis": Failure(
        setting("redis_url", lambda _: f"http://:{CANARY}@127.0.0.1:6379/0"), World.cache, PLAYLISTS
    ),
    "Redis: full": Failure(full_redis, World.cache, PLAYLISTS),
    "reload: URL refused": Failure(setting("reload", lambda _: REFUSED), World.reload, []),
    "reload: command fails": Failure(setting("reload", lambda _: FAILING), World.reload, []),
    "reload: no command": Failure(setting("reload", lambda _: f"TOKEN={CANARY} reload"), World.reload, []),
}

# Of `make test`, with one command: each process costs 2 s.
FEW = (
    "embedding database: wrong password",
    "embedding database: SQL error with parameters",
    "Redis: wrong password",
    "reload: command fails",
)


@pytest.fixture
def world(
    tmp_path: Path,
    mariadb_url: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    require_tool("redis-server")
    home = tmp_path / "dagster"
    home.mkdir()
    settings = (importlib.resources.files("muse_assets") / "dagster.yaml").read_text("utf-8")
    (home / "dagster.yaml").write_text(settings, "utf-8")
    for name, value in {
        "DAGSTER_HOME": str(home),
        "MUSE_HOME": str(tmp_path / "home"),
        "MUSE_LOG_DIR": str(tmp_path / "logs"),
        "MUSE_CATALOG": str(write_small_catalog(tmp_path / "catalog.toml")),
    }.items():
        monkeypatch.setenv(name, value)
    hurry_retries(monkeypatch)
    monkeypatch.setattr(redis_server, "_RETRIES", 1)
    with (
        fresh_schema(mariadb_url) as embeddings,
        fresh_schema(mariadb_url) as playlists,
        private_redis(tmp_path_factory.mktemp("redis")) as redis_url,
        dg.DagsterInstance.get() as instance,
    ):
        world = World(Stores(embeddings, playlists, redis_url), instance, tmp_path, monkeypatch)
        world.set(server_dir=str(tmp_path / "home" / "server"))
        world.reset()
        install(
            tmp_path / "home",
            instance,
            embedding_db_url=world.stores.embedding_url,
            playlist_db_url=world.stores.playlist_url,
            redis_url=redis_url,
            songs=100,
        )
        world.installed.rebuild(INDEX, DAY_ONE)
        yield world


def test_no_failure_leaves_a_secret(world: World, tmp_path: Path, injecting: Injecting, times: Times) -> None:
    chosen = {name: FAILURES[name] for name in (FAILURES, FEW)[times(1, 0)]}
    commands = 0
    with injecting("30", "outside systems failing, secrets in every setting") as ledger:
        for name, failure in chosen.items():
            with ledger.injection(name):
                with failure.breaks(world):
                    said = failure.door(world)
                    for command in failure.commands[: times(commands == 0, 9)]:
                        commands += 1
                        assert world.muse(*command) == 1, f"{command} did not fail"
                world.reset()
                assert said, "the run did not fail"
                assert CANARY not in said, said
            if failure.door is World.cache:
                with ledger.recovery():
                    assert not world.cache()
        with ledger.injection("search through everything"):
            assert not (found := secrets_in(tmp_path, world.stores.redis_url)), found
        ledger.note = f"{len(chosen)} Dagster runs, {commands} commands"


def secrets_in(folder: Path, redis_url: str) -> list[str]:
    """Where the secret is: files, cells of SQLite tables (Dagster packs some of them), Redis."""
    found = [str(path) for path in files_of(folder) if CANARY.encode() in path.read_bytes()]
    for path in files_of(folder):
        if path.suffix in (".db", ".sqlite"):
            found += [f"{path}: {place}" for place, cell in cells(path) if CANARY.encode() in cell]
    with redis.Redis.from_url(redis_url) as client:
        found += [f"Redis {key!r}" for key in client.scan_iter() if CANARY in f"{key!r} {client.get(key)!r}"]
    return found


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def cells(file: Path) -> Iterator[tuple[str, bytes]]:
    """Table and content of every cell, unpacked: a secret across two pages is in no single one of them."""
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in connection.execute(f'SELECT * FROM "{table}"'):
                for cell in row:
                    content = cell if isinstance(cell, bytes) else str(cell).encode()
                    with contextlib.suppress(zlib.error):
                        content = zlib.decompress(content)
                    yield table, content
