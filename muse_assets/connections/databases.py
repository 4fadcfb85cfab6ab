"""SQL databases: engines for MySQL, MariaDB, SQLite or any other SQLAlchemy URL, and their failures.

Here: connecting with bounded time-outs, the functions SQLite lacks, and the boundary where driver errors
become failures without secrets. Not here: any query (`embeddings/`, `playlists/`).
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_exponential

from muse_assets.connections.authorities import check_authority
from muse_assets.failures import PassingFailure, PermanentFailure

# MySQL error numbers that the same statement will meet again.
_PERMANENT_MYSQL_ERRORS = {
    1044: "grant this user SELECT on the schema",
    1045: "correct the user or password in the URL variable",
    1049: "correct the schema name in the URL variable",
    1054: "correct the column name in the catalog",
    1142: "grant this user SELECT on the table",
    1143: "grant this user SELECT on the column",
    1146: "create the table, or correct its name in the catalog",
}
# The server offers no TLS though the URL asks for it.
_NO_TLS = 2026
# Of an ALTER or TRUNCATE under a read: the same statement succeeds when that is done.
_DDL_MYSQL_ERRORS = {1205, 1412}
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 120, "write_timeout": 120}
# A black hole is met twice (240 s of read time-outs), not as often as a cut connection, which shows at once.
_GIVE_UP_SECONDS = 150

_TLS_PARAMETERS = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_key_password")

T = TypeVar("T")


@lru_cache(maxsize=8)
def engine_for(url: str) -> Engine:
    """An engine for a SQLAlchemy URL; a connection that broke is replaced at its next use.

    MySQL and MariaDB: utf8mb4, Seoul session time (TIMESTAMP columns compare as the catalog's days do),
    `net_write_timeout` of 600 s so that a slow consumer is not cut off, a read time-out of 120 s so that
    a dead server is noticed; `?read_timeout=` and its like in the URL win. With `ssl_ca` the certificate
    and the host name are verified: PyMySQL alone accepts a wrong CA. Raises
    PermanentFailure for a URL that SQLAlchemy cannot read.
    """
    try:
        parsed = make_url(url)
        arguments: dict[str, Any] = {}
        if parsed.get_backend_name() in ("mysql", "mariadb") and parsed.get_driver_name() == "pymysql":
            arguments = {name: seconds for name, seconds in _TIMEOUTS.items() if name not in parsed.query}
            arguments |= {
                "init_command": "SET SESSION net_write_timeout=600, time_zone='+09:00'",
            }
            query = {"charset": "utf8mb4", **parsed.query}
            if "ssl_ca" in query:
                check_authority(str(query["ssl_ca"]), "ssl_ca")
                arguments |= {"ssl_verify_cert": True, "ssl_verify_identity": True}
                # Past SQLAlchemy, which puts them into a dict that PyMySQL drops beside ssl_verify_*.
                arguments |= {name: query.pop(name) for name in _TLS_PARAMETERS if name in query}
            parsed = parsed.set(query=query)
        elif parsed.get_backend_name() == "sqlite":
            arguments = {"timeout": 60}
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, hide_parameters=True, pool_recycle=300, connect_args=arguments)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise PermanentFailure(
            f"The database URL cannot be used ({type(error).__name__}).",
            next_step="give a SQLAlchemy URL such as mysql+pymysql://user:password@host/muse.",
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _equip_sqlite)
    return engine


def _equip_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Register CRC32 as MySQL has it, so that one digest query serves both."""
    connection.create_function("CRC32", 1, _crc32, deterministic=True)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _crc32(value: bytes | str | None) -> int | None:
    if value is None:
        return None
    return zlib.crc32(value.encode("utf-8") if isinstance(value, str) else value)


def describe_url(engine: Engine) -> str:
    """The database as it may be printed: without the password."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return f"sqlite {url.database}"
    return f"{url.get_backend_name()} {url.host}:{url.port or 'default port'}/{url.database}"


@contextlib.contextmanager
def explained(engine: Engine, doing: str) -> Iterator[None]:
    """Turn SQLAlchemy's and the driver's errors into failures that name the database, without secrets.

    `doing` completes "while ...", for example "reading tb_embedding_clap_h for vibe".
    """
    try:
        yield
    except (SQLAlchemyError, engine.dialect.loaded_dbapi.Error) as error:  # some come raw from the driver
        cause = getattr(error, "orig", None) or error
        number = cause.args[0] if cause.args and isinstance(cause.args[0], int) else None
        text = " ".join(str(part) for part in cause.args) or type(cause).__name__
        if engine.url.password:
            text = text.replace(str(engine.url.password), "***")
        what = f"{describe_url(engine)}, while {doing}: {text}."
        if number in _PERMANENT_MYSQL_ERRORS:
            raise PermanentFailure(what, next_step=f"{_PERMANENT_MYSQL_ERRORS[number]}.") from None
        if number == _NO_TLS or "CERTIFICATE_VERIFY_FAILED" in text:
            raise PermanentFailure(
                what,
                next_step="name the CA that signed its certificate (?ssl_ca=/path/ca.pem) and a host that it "
                "is for in the URL variable, and turn TLS on at that server; nothing was sent unencrypted.",
            ) from None
        if "no such table" in text or "no such column" in text:
            raise PermanentFailure(
                what,
                next_step="create it, or correct the name in the catalog; `muse sample` writes a sample.",
            ) from None
        if number in _DDL_MYSQL_ERRORS:
            raise PassingFailure(
                what, next_step="wait until nobody alters or locks the table, then launch the run again."
            ) from None
        raise PassingFailure(
            what, next_step="check that the database is up and reachable, then launch the run again."
        ) from None


@contextlib.contextmanager
def connected(engine: Engine, doing: str) -> Iterator[Connection]:
    """A connection for reading or writing; its errors are `explained`. Nothing is committed by itself."""
    with explained(engine, doing), engine.connect() as connection:
        yield connection


def read(engine: Engine, doing: str, query: Callable[[Connection], T], *, tries: int = 2) -> T:
    """What `query` reads on a connection, which is then given back; lost ones are replaced `tries - 1` times.

    For reads that are short and can be repeated whole. Bounded: a server that never answers costs two read
    time-outs, or `tries` of them where the URL sets shorter ones than 75 s.
    """
    retrying = Retrying(
        retry=retry_if_exception_type(PassingFailure),
        stop=stop_after_attempt(tries) | stop_after_delay(_GIVE_UP_SECONDS),
        wait=wait_exponential(0.2, max=5),
        reraise=True,
    )

    def once() -> T:
        with connected(engine, doing) as connection:
            return query(connection)

    return retrying(once)
