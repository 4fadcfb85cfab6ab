"""Rows of an embedding table, by ranges of the primary key.

Here: the table's extent, pages of (idx, payload), rows by idx. Not here: decoding payloads (`decoding`)
or digests (`digests`).

Ranges of the key and not LIMIT/OFFSET, which is quadratic (15.2 s against 4.6 s a million rows). A page
covers whole buckets and is one statement, so InnoDB reads each bucket in one consistent view.

MySQL and MariaDB join a page's payloads into one value where they can: PyMySQL takes 4.3 us of the GIL for a
row of 2 KB, 0.8 us for its share of that value, and the server 2.2 us instead of 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, inspect, text
from sqlalchemy.exc import DBAPIError

from muse_assets.catalog import IndexSpec, checked_identifier
from muse_assets.embeddings.payloads import NULL, Joined, Payload, join
from muse_assets.failures import PermanentFailure

# Keys named one by one in a statement; from 1,000 on MariaDB looks them up by a join. With 1,000 a sample of
# 98,304 rows of 1M took 0.66 s in a new process, with 2,000 0.58; in one that had drawn before 0.51 and 0.47,
# with 4,000 0.51.
KEYS_A_QUERY = 2000
# A page's joined payloads are no more, even of float64. Servers send packets of 16 MB by default.
_JOINED_BYTES = 9 << 20
# What is sent beside them: idx and lengths as text, of some 2,000 rows.
_LISTS_BYTES = 1 << 20
_NPY_HEADER_BYTES = 128
_DENIED_MYSQL_ERRORS = (1142, 1143)
_AUTO_INCREMENT = re.compile(r"\bAUTO_INCREMENT=(\d+)")


@dataclass(frozen=True)
class Bounds:
    """Rows with low <= idx <= high."""

    low: int
    high: int


@dataclass(frozen=True)
class Page:
    """Rows as stored: idx (n,) int64 ascending, one payload each."""

    idx: NDArray[np.int64]
    payloads: Sequence[Payload]


@dataclass(frozen=True)
class Extent:
    """Oldest and newest idx the partition covers (0: no rows), the table's columns as name -> SQL type."""

    oldest_idx: int
    newest_idx: int
    columns: dict[str, str]

    @property
    def bounds(self) -> Bounds:
        """All rows the partition covers."""
        return Bounds(self.oldest_idx, self.newest_idx)


def freeze(connection: Connection) -> None:
    """Let all that the connection reads in its next transaction be of one moment, whoever writes."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN")  # its driver begins a transaction for writes alone
    elif connection.dialect.name in ("mysql", "mariadb", "postgresql"):
        # Not by execution_options: its errors come raw from the driver, and it costs a second statement.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def quoted(connection: Connection, name: str) -> str:
    """A checked identifier in the database's own quotes."""
    return connection.dialect.identifier_preparer.quote_identifier(checked_identifier(name))


def table_columns(connection: Connection, spec: IndexSpec) -> dict[str, str]:
    """The table's columns as name -> SQL type.

    Raises PermanentFailure when the table, `idx` or the embedding column is missing.
    """
    inspector = inspect(connection)
    if not inspector.has_table(spec.table):
        raise PermanentFailure(
            f"{spec.name}: table {spec.table} does not exist in {connection.engine.url.database}.",
            next_step="restore it, or correct `table` in the catalog.",
        )
    if connection.dialect.name in ("mysql", "mariadb"):
        # SQLAlchemy's own way is SHOW CREATE TABLE, which a grant of columns alone refuses.
        described = connection.execute(text(f"SHOW COLUMNS FROM {quoted(connection, spec.table)}")).all()
        columns = {str(row[0]): str(row[1]).upper() for row in described}
    else:
        columns = {column["name"]: str(column["type"]) for column in inspector.get_columns(spec.table)}
    missing = [name for name in ("idx", spec.embedding_column, *spec.song_key) if name not in columns]
    if missing:
        raise PermanentFailure(
            f"{spec.name}: table {spec.table} has no column {', '.join(missing)}.",
            next_step="correct the catalog, or grant this user SELECT on it; the table shows "
            f"{', '.join(columns)}.",
        )
    return columns


def next_auto_increment(connection: Connection, spec: IndexSpec) -> int | None:
    """The idx that the server would give the next row: every idx it ever had is below. None if unknown.

    MySQL and MariaDB only. SHOW CREATE TABLE is asked, for MySQL 8 caches that of information_schema for a
    day. A user with SELECT on columns alone may not ask it, and MariaDB's information_schema answers them.
    MySQL 5.7 forgets deleted idx at a restart.
    """
    if connection.dialect.name not in ("mysql", "mariadb"):
        return None
    try:
        shown = connection.execute(text(f"SHOW CREATE TABLE {quoted(connection, spec.table)}")).one()[1]
    except DBAPIError as error:
        if not error.orig or error.orig.args[0] not in _DENIED_MYSQL_ERRORS:
            raise
        return _shown_in_schema(connection, spec)
    if found := _AUTO_INCREMENT.search(shown):
        return int(found[1])
    # Of a table that was never written or was truncated the clause is left out.
    return 1 if " AUTO_INCREMENT" in shown else None


def _shown_in_schema(connection: Connection, spec: IndexSpec) -> int | None:
    if not getattr(connection.dialect, "is_mariadb", False):
        return None
    query = text(
        "SELECT auto_increment FROM information_schema.tables "
        "WHERE table_schema = DATABASE() AND table_name = :name"
    )
    found = connection.execute(query, {"name": spec.table}).scalar()
    return None if found is None else int(found)


def table_extent(connection: Connection, spec: IndexSpec, before: datetime | None) -> Extent:
    """The newest idx among rows created before `before` (Seoul local time), from the key's tail.

    Without a `created_at` column, or without `before`: the newest of all.
    """
    columns = table_columns(connection, spec)
    table = quoted(connection, spec.table)
    condition, values = "", {}
    if before is not None and spec.created_at_column in columns:
        created = quoted(connection, spec.created_at_column)
        condition, values = f"WHERE {created} < :before OR {created} IS NULL ", {"before": before}
    newest = connection.execute(
        text(f"SELECT idx FROM {table} {condition}ORDER BY idx DESC LIMIT 1"),
        values,
    ).scalar()
    oldest = connection.execute(text(f"SELECT MIN(idx) FROM {table}")).scalar()
    return Extent(int(oldest or 0), int(newest or 0), columns)


def count_rows(connection: Connection, spec: IndexSpec) -> tuple[int, int, int]:
    """Rows, smallest and largest idx; zeros for an empty table."""
    table = quoted(connection, spec.table)
    row = connection.execute(
        text(f"SELECT COUNT(*), COALESCE(MIN(idx), 0), COALESCE(MAX(idx), 0) FROM {table}")
    ).one()
    return int(row[0]), int(row[1]), int(row[2])


def every_idx(connection: Connection, spec: IndexSpec) -> NDArray[np.int64]:
    """Every idx of the table, (n,) int64 ascending: 8 bytes a row, read from a key alone."""
    rows = connection.execute(
        text(f"SELECT idx FROM {quoted(connection, spec.table)}"), execution_options={"yield_per": 10_000}
    )
    # Sorted here: by ORDER BY the server would read the rows, or sort them itself.
    return np.sort(np.fromiter((row[0] for row in rows), np.int64))


def pages(
    connection: Connection, spec: IndexSpec, bounds: Sequence[Bounds], align: int, rows: int = 4096
) -> Iterator[Page]:
    """All rows within `bounds` (ascending, disjoint), in pages of about `rows` by primary key.

    A page ends at a multiple of `align` idx, so that no bucket is split between two statements.
    """
    table, column = quoted(connection, spec.table), quoted(connection, spec.embedding_column)
    width = max(rows // align, 1) * align
    for bound in bounds:
        low = bound.low
        while low <= bound.high:
            # The next existing row decides where the page starts: gaps cost nothing.
            start = connection.execute(
                text(f"SELECT MIN(idx) FROM {table} WHERE idx >= :low AND idx <= :high"),
                {"low": low, "high": bound.high},
            ).scalar()
            if start is None:
                break
            end = min((int(start) // align) * align + width - 1, bound.high)
            query = f"SELECT idx, {column} FROM {table} WHERE idx >= :low AND idx <= :high ORDER BY idx"
            yield _page(connection.execute(text(query), {"low": low, "high": end}).all())
            low = end + 1


def page_rows(spec: IndexSpec) -> int:
    """Rows to ask for at once: 2,048 of 512-d, half as many of 1024-d.

    Two threads at 4,096 rows of 512-d held 30 MB more, and were no faster.
    """
    width = 8 * spec.dimension + _NPY_HEADER_BYTES
    return min(max(_JOINED_BYTES // width // 256, 1) * 256, 2048)


def read_ranges(connection: Connection, spec: IndexSpec, ranges: Sequence[Bounds]) -> Page:
    """The rows of several short ranges in one statement, so in one consistent view."""
    condition = " OR ".join(f"idx BETWEEN {int(r.low)} AND {int(r.high)}" for r in ranges)
    return _rows_where(connection, spec, condition)


def rows_by_idx(connection: Connection, spec: IndexSpec, idx: NDArray[np.int64]) -> Iterator[Page]:
    """The rows with these idx, 2,000 at most at a time by primary key; missing ones are left out."""
    wanted = np.sort(idx).astype(np.int64)
    rows = min(KEYS_A_QUERY, page_rows(spec))
    for at in range(0, len(wanted), rows):
        # Written out, being integers: as bound parameters each cost 2 of a row's 8 us.
        keys = ",".join(map(str, wanted[at : at + rows].tolist()))
        yield _rows_where(connection, spec, f"idx IN ({keys})")


def _rows_where(connection: Connection, spec: IndexSpec, condition: str) -> Page:
    """The rows that satisfy a condition on idx, in one statement or, where its answer is cut off, two."""
    binary = spec.encoding != "json"
    if binary and joins_values(connection) and (page := _joined_rows(connection, spec, condition)):
        return page
    table, column = quoted(connection, spec.table), quoted(connection, spec.embedding_column)
    query = f"SELECT idx, {column} FROM {table} WHERE {condition} ORDER BY idx"
    return _page(connection.exec_driver_sql(query).all())


def joins_values(connection: Connection) -> bool:
    """Whether this connection may ask for values joined by GROUP_CONCAT, as is found out at its first use."""
    if connection.dialect.name not in ("mysql", "mariadb"):
        return False
    known: dict[Any, Any] = connection.info
    if joins_values not in known:
        # Past the packet's size the server cuts an answer off too, or refuses to send the row.
        largest = int(connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one())
        connection.exec_driver_sql(f"SET SESSION group_concat_max_len = {_JOINED_BYTES}")
        known[joins_values] = largest >= _JOINED_BYTES + _LISTS_BYTES
    return bool(known[joins_values])


def _joined_rows(connection: Connection, spec: IndexSpec, condition: str) -> Page | None:
    """The rows, their payloads joined; None where the column is no BLOB, or the answer was cut off."""
    table, column = quoted(connection, spec.table), quoted(connection, spec.embedding_column)
    query = (
        f"SELECT COUNT(*), SUM(idx), GROUP_CONCAT(idx), GROUP_CONCAT(COALESCE(LENGTH({column}), {NULL})), "
        f"GROUP_CONCAT({column} SEPARATOR '') FROM {table} WHERE {condition}"
    )
    count, idx_sum, idx_listed, lengths_listed, buffer = connection.exec_driver_sql(query).one()
    idx, lengths = (listed_numbers(listed) for listed in (idx_listed, lengths_listed))
    sizes = np.maximum(lengths, 0)
    if not isinstance(buffer, bytes | None) or not len(idx) == len(lengths) == count:
        return None
    # A list that was cut off within its last number has as many as it should.
    if len(buffer or b"") != sizes.sum() or idx.sum() != int(idx_sum or 0):
        return None
    order = np.argsort(idx, kind="stable")
    starts = np.cumsum(sizes) - sizes
    return Page(idx[order], Joined(buffer or b"", starts[order], lengths[order]))


def listed_numbers(listed: str | bytes | None) -> NDArray[np.int64]:
    """The integers of a list as GROUP_CONCAT gives it, (n,)."""
    text_of = listed.decode("ascii") if isinstance(listed, bytes) else listed or ""
    return np.fromstring(text_of, np.int64, sep=",") if text_of else np.empty(0, np.int64)


def song_keys(connection: Connection, spec: IndexSpec, idx: NDArray[np.int64]) -> dict[int, tuple[str, ...]]:
    """idx -> the row's song key as stored, trimmed; missing rows are left out."""
    columns = ", ".join(quoted(connection, name) for name in spec.song_key)
    query = text(
        f"SELECT idx, {columns} FROM {quoted(connection, spec.table)} WHERE idx IN :wanted"
    ).bindparams(bindparam("wanted", expanding=True))
    rows = connection.execute(query, {"wanted": [int(value) for value in idx]}).all()
    return {int(row[0]): tuple(str(value).strip(" ") for value in row[1:]) for row in rows}


def join_pages(found: Iterable[Page]) -> Page:
    """Many pages as one."""
    every = list(found)
    idx = np.concatenate([page.idx for page in every]) if every else np.empty(0, np.int64)
    return Page(idx, join([page.payloads for page in every]))


def _page(rows: Sequence[Any]) -> Page:
    idx = np.fromiter((row[0] for row in rows), np.int64, len(rows))
    return Page(idx, [_stored(value) for _, value in rows])


def _stored(value: Any) -> Payload:
    """As bytes or text, whatever the driver hands out; bytes(5) of a numeric column would be five zeros."""
    if isinstance(value, bytes | str | None):
        return value
    return bytes(value) if isinstance(value, bytearray | memoryview) else str(value)
