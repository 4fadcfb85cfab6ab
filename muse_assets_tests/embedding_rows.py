"""A small embedding table, changed row by row as writers change the real ones.

Here: the table, its payloads and its writes. Not here: the sample catalog, whose columns are never NULL.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
)

from muse_assets.catalog import CATALOG, IndexSpec

Payload = bytes | str | None
SPEC = replace(CATALOG.index("vibe"), dimension=32, m=8)
NOON = datetime(2026, 11, 1, 12)


@lru_cache
def table_of(spec: IndexSpec, *, dated: bool = True) -> Table:
    """The table that the spec names; without `dated` it has no created_at."""
    created = [Column(spec.created_at_column, DateTime)] if dated else []
    return Table(
        spec.table,
        MetaData(),
        Column("idx", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        *(Column(name, String(32)) for name in spec.song_key),
        Column(spec.embedding_column, Text() if spec.encoding == "json" else LargeBinary()),
        *created,
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )


def put_rows(
    engine: Engine,
    spec: IndexSpec,
    payloads: Mapping[int, Payload],
    created_at: datetime = NOON,
    *,
    dated: bool = True,
) -> None:
    """Insert or replace the rows by idx, in one transaction."""
    table = table_of(spec, dated=dated)
    table.create(engine, checkfirst=True)
    song = dict.fromkeys(spec.song_key, "01")
    created = {spec.created_at_column: created_at} if dated else {}
    rows: list[dict[str, Any]] = [
        {"idx": idx, spec.embedding_column: payload, **song, **created} for idx, payload in payloads.items()
    ]
    with engine.begin() as connection:
        _delete(connection, table, payloads)
        if rows:
            connection.execute(insert(table), rows)


def delete_rows(engine: Engine, spec: IndexSpec, idx: Iterable[int]) -> None:
    """Delete the rows with these idx."""
    with engine.begin() as connection:
        _delete(connection, table_of(spec), idx)


def clear(engine: Engine, spec: IndexSpec) -> None:
    """Create the table if it is missing, and delete every row."""
    table_of(spec).create(engine, checkfirst=True)
    with engine.begin() as connection:
        connection.execute(delete(table_of(spec)))


def npy(vector: Any) -> bytes:
    """What `numpy.save` writes of it."""
    file = io.BytesIO()
    np.save(file, vector, allow_pickle=False)
    return file.getvalue()


def unit_vectors(rows: int, *, seed: int = 0, dimension: int = SPEC.dimension, topics: int = 8) -> Any:
    """float32 (rows, dimension), unit length, around a few topics."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((topics, dimension))
    vectors = centers[random.integers(0, topics, rows)] + 0.5 * random.standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def payloads_of(vectors: Any, first_idx: int = 1) -> dict[int, Payload]:
    """idx -> npy payload, from `first_idx` on."""
    return {first_idx + row: npy(vector) for row, vector in enumerate(vectors)}


def _delete(connection: Any, table: Table, idx: Iterable[int]) -> None:
    wanted = list(idx)
    for at in range(0, len(wanted), 1000):
        connection.execute(delete(table).where(table.c.idx.in_(wanted[at : at + 1000])))
