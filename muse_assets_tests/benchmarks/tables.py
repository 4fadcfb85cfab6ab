"""Embedding tables of full size on a private MariaDB, written as fast as the server takes them.

Here: the server, its memory, rows in bulk, and rows that change. Not here: the vectors (`vectors.py`), or
what is measured.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from muse_assets.catalog import IndexSpec
from muse_assets.sample.tables import embedding_table, encoded
from muse_assets_tests.benchmarks.vectors import clustered
from muse_assets_tests.servers import execute, private_mariadb

_CHUNK_ROWS = 16_384
_ROWS_A_SONG = 4
_TRACKS_A_DISC = 12
_FIRST_DAY = datetime(2026, 1, 1, 2)
_BULK = "SET SESSION unique_checks = 0, foreign_key_checks = 0"


@contextlib.contextmanager
def private_database(pool_megabytes: int = 6144) -> Iterator[str]:
    """SQLAlchemy URL of the empty schema `muse` on a MariaDB of the benchmark's own.

    pool_megabytes: InnoDB's buffer pool. The default holds every table that is measured, so each is read
    warm; InnoDB reads its files past the page cache, so a pool smaller than the table reads it cold.
    """
    options = (
        f"--innodb-buffer-pool-size={pool_megabytes}M",
        "--innodb-log-file-size=1G",
        "--skip-innodb-doublewrite",
        "--innodb-autoinc-lock-mode=2",
        "--local-infile=1",
    )
    with (
        tempfile.TemporaryDirectory(prefix="muse_bench_") as folder,
        private_mariadb(Path(folder), *options) as url,
    ):
        yield url


def write_embeddings(
    url: str,
    spec: IndexSpec,
    blocks: Iterable[NDArray[np.float32]],
    *,
    first_idx: int = 1,
    created_at: datetime | None = None,
) -> int:
    """Append the rows of `blocks`, (n, d) float32 each, from `first_idx` on; return the rows written.

    The table is created where it is missing. Four rows a song, twelve songs a disc, a thousand rows a day
    from 2026-01-01 on, unless all are of `created_at`. 1M x 512-d took 147 s while the load was 9.
    """
    target = embedding_table(spec)
    engine = create_engine(url, poolclass=NullPool, connect_args={"local_infile": True})
    target.table.create(engine, checkfirst=True)
    columns = ", ".join(column.name for column in target.table.columns)
    next_idx = first_idx
    with (
        tempfile.TemporaryDirectory(prefix="muse_rows_") as folder,
        ThreadPoolExecutor(1) as pool,
        engine.connect() as connection,
    ):
        connection.exec_driver_sql(_BULK)

        def load(path: Path) -> None:
            connection.exec_driver_sql(
                f"LOAD DATA LOCAL INFILE '{path}' INTO TABLE {spec.table} CHARACTER SET binary ({columns})"
            )
            connection.commit()
            path.unlink()

        loading = pool.submit(lambda: None)
        for vectors in _chunks(blocks):
            path = Path(folder) / f"{next_idx}.tsv"
            path.write_bytes(_lines(spec, next_idx, vectors, created_at))
            next_idx += len(vectors)
            loading.result()
            loading = pool.submit(load, path)
        loading.result()
    return next_idx - first_idx


def delete_embeddings(url: str, spec: IndexSpec, idx: NDArray[np.int64]) -> None:
    """Delete the rows with these idx."""
    execute(url, f"DELETE FROM {spec.table} WHERE idx IN ({', '.join(map(str, idx))})")


def reembed(url: str, spec: IndexSpec, idx: NDArray[np.int64], seed: int = 9) -> None:
    """Give the rows with these idx other vectors."""
    payloads = encoded(spec, clustered(len(idx), spec.dimension, seed=seed))
    update = text(f"UPDATE {spec.table} SET {spec.embedding_column} = :payload WHERE idx = :idx")
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(
            update, [{"payload": p, "idx": int(i)} for p, i in zip(payloads, idx, strict=True)]
        )


def _chunks(blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    for block in blocks:
        for start in range(0, len(block), _CHUNK_ROWS):
            yield block[start : start + _CHUNK_ROWS]


def _lines(
    spec: IndexSpec, first_idx: int, vectors: NDArray[np.float32], created_at: datetime | None
) -> bytes:
    """Tab-separated rows as LOAD DATA reads them, the payload's tabs, newlines and backslashes escaped."""
    part_column = embedding_table(spec).content.part_column
    payloads: Sequence[bytes | str] = encoded(spec, vectors)
    lines = []
    for idx, payload in enumerate(payloads, first_idx):
        song, part = divmod(idx - 1, _ROWS_A_SONG)
        disc, track = divmod(song, _TRACKS_A_DISC)
        when = created_at or _FIRST_DAY + timedelta(days=idx // 1000)
        keys = [f"{disc + 1:07d}", f"{track + 1:02d}"][: len(spec.song_key)]
        before = [str(idx), *keys, *([str(part)] if part_column else [])]
        raw = payload.encode() if isinstance(payload, str) else payload
        raw = raw.replace(b"\\", b"\\\\").replace(b"\t", b"\\\t").replace(b"\n", b"\\\n")
        lines.append(
            "\t".join(before).encode() + b"\t" + raw + f"\t{idx % 100}\t{when:%Y-%m-%d %H:%M:%S}\n".encode()
        )
    return b"".join(lines)
