"""The frozen queries of a trained cluster: drawn, kept beside its facts, read back.

Here: which rows they are, and their file. Not here: their neighbors (`store.RowState`), or searching for
them (`ivfpq.probing`).

They are drawn with the cluster's training sample and held out of it, and stay as long as the cluster does: so
recall of two days tells of the days, not of two samples.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.sampling import Sample, sample_vectors
from muse_assets.ivfpq.exact_neighbors import Queries
from muse_assets.snapshots.array_files import read_arrays, write_arrays

# The spread of recall@10 over queries is 0.25, so it is known to 2 points; its change from day to day far
# closer, since the same queries are asked.
QUERIES = 128
# A smaller table trains on its queries too: there every row counts.
_HELD_OUT_FROM = 10 * QUERIES


def hold_out(spec: IndexSpec, sample: Sample) -> tuple[Queries, int]:
    """The last rows of a random sample as queries, and how many rows before them are for training."""
    count = min(QUERIES, len(sample.idx))
    training = len(sample.idx) - (count if len(sample.idx) >= _HELD_OUT_FROM else 0)
    last = slice(len(sample.idx) - count, None)
    return Queries(sample.idx[last] + spec.id_offset, sample.vectors[last].copy()), training


def draw_queries(engine: Engine, spec: IndexSpec, *, seed: int) -> Queries:
    """Random rows of the table, for a cluster that came without queries; the same for the same seed."""
    doing = f"sampling {spec.table} to check {spec.name}"
    return hold_out(spec, sample_vectors(engine, spec, lambda rows: QUERIES, doing=doing, seed=seed))[0]


def queries_path(directory: Path, index: str, cluster_sha256: str) -> Path:
    """Where the queries of the cluster file with that content hash lie."""
    return directory / ".manifests" / index / f"{cluster_sha256}.cluster.queries.npz"


def write_queries(path: Path, queries: Queries) -> None:
    """Write them durably."""
    write_arrays(path, {"ids": queries.ids, "vectors": queries.vectors})


def read_queries(path: Path, dimension: int) -> Queries | None:
    """The queries, or None if they are missing or unreadable."""
    arrays = read_arrays(path, ("ids", "vectors"))
    if arrays is None:
        return None
    queries = Queries(arrays["ids"], arrays["vectors"])
    return queries if queries.vectors.shape == (len(queries.ids), dimension) else None
