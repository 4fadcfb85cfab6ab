"""A full build from MariaDB beside the two things it cannot do without: reading the rows, encoding them.

The table fits the buffer pool: warm. CPU-seconds are this process's; the server's own are not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import connected, engine_for
from muse_assets.embeddings.decoding import decode
from muse_assets.embeddings.reading import Bounds, count_rows, pages
from muse_assets.ivfpq.encoding import fill
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import load_cluster, train_cluster
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Row, begin, in_turn, measure
from muse_assets_tests.benchmarks.tables import private_database, write_embeddings
from muse_assets_tests.benchmarks.vectors import clustered

SPEC = replace(CATALOG.index("vibe"), recall_gate=0.4)
_ROWS = 500_000
_PAGE_ROWS = 4096
_DAY = date(2027, 12, 31)
_ALLOWED_BYTES = 300e6  # above the index


def rows(scale: float) -> Iterator[Row]:
    """Fill a table, train, then measure reading, encoding and the build in turn."""
    total = max(int(_ROWS * scale), 5_000)
    with private_database() as url, tempfile.TemporaryDirectory(prefix="muse_build_") as folder:
        work, array = Path(folder) / "work", Path(folder) / "vectors.npy"
        measure(make, array, url, work, total)
        reading, encoding, built = in_turn(
            2, (read_alone, (url,)), (encode_alone, (array, work)), (build, (url, work))
        )
        peak, allowed = built.peak, (float(built.facts["bytes"]) + _ALLOWED_BYTES) / 2**20
        yield Row(
            f"full build from MariaDB, {total:,} x {SPEC.dimension}",
            "read alone + encode alone",
            built,
            Cost(reading.wall + encoding.wall, reading.cpu + encoding.cpu, allowed),
            1.1,
            faster=False,
            metric="cpu",
            note=f"read {reading.cpu:.2f} + encode {encoding.cpu:.2f} CPU-s; peak {peak:,.0f} MB of the "
            f"allowed {allowed:,.0f}: {'ok' if peak <= allowed else 'MISSED'}; recall@10 "
            f"{built.facts['recall']:.3f}, {built.facts['scanned']:,.0f} codes scanned",
        )


def make(array: Path, url: str, work: Path, total: int) -> None:
    """Write the vectors, the table and the trained cluster."""
    vectors = clustered(total, SPEC.dimension)
    np.save(array, vectors)
    write_embeddings(url, SPEC, [vectors])
    train_cluster(engine_for(url), SPEC, work / SPEC.cluster_file)


def read_alone(url: str) -> Facts:
    """Every row into float32 blocks, by the pages of a build."""
    engine = engine_for(url)
    begin()
    found = 0
    with connected(engine, "reading") as connection:
        _, low, high = count_rows(connection, SPEC)
        for page in pages(connection, SPEC, [Bounds(low, high)], _PAGE_ROWS):
            found += len(decode(page.payloads, SPEC.dimension, SPEC.encoding).vectors)
    return {"rows": found}


def encode_alone(array: Path, work: Path) -> Facts:
    """Encode and add the same vectors from memory."""
    index = load_cluster(work / SPEC.cluster_file, SPEC).index
    vectors = np.load(array)
    starts = range(0, len(vectors), _PAGE_ROWS)
    begin()
    batches = (
        (np.arange(at, min(at + _PAGE_ROWS, len(vectors))), vectors[at : at + _PAGE_ROWS]) for at in starts
    )
    return {"rows": fill(index, batches)}


def build(url: str, work: Path) -> Facts:
    """The build in full, gate and file included."""
    engine = engine_for(url)
    begin()
    built = build_snapshot(engine, SPEC, work, _DAY, full=True)
    facts = built.manifest
    return {
        "bytes": facts.size,
        "recall": facts.recall_at_10,
        "scanned": facts.checks["recall_at_10"]["codes_scanned"],
    }
