"""Memory of a full build as its table grows: of who coordinates it, in the process and on a cluster.

64-d vectors and 16-byte codes, so 24 bytes a row with the id, as the index has them in the file. Peaks are
above what a process holds after its imports, which is told apart for workers. They do not depend on load,
so other work may go on beside it. Not here: time (`bench_scale.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.dask_workers import on_dask
from muse_assets.snapshots.encoding_workers import in_process
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Series, begin, measure
from muse_assets_tests.benchmarks.tables import private_database, write_embeddings
from muse_assets_tests.benchmarks.vectors import clustered
from muse_assets_tests.dask_cluster import DaskCluster, dask_cluster, wait_for_workers

SPEC = replace(CATALOG.index("vibe"), dimension=64, m=16, nlist=1024, recall_gate=0.1)
_SIZES = (1_000_000, 2_000_000, 4_000_000)
_WORKERS = 2
_DAY = date(2026, 11, 1)
_MORNING = datetime(2026, 11, 1, 6)
_BLOCK_ROWS = 500_000
# A page of rows, a part's codes and the trained cluster: nothing of them grows.
_WORKER_GROWTH = 0.1


def rows(scale: float) -> Iterator[Series]:
    """The index's bytes, and the peaks of a build in this process, of one on a cluster, and of a worker."""
    sizes = tuple(int(size * scale) for size in _SIZES)
    spec = SPEC if scale == 1 else replace(SPEC, nlist=64)
    names = "the index itself", "full build in the process", "full build on a cluster", "a worker of it"
    found: list[tuple[Cost, ...]] = []
    with private_database() as url, tempfile.TemporaryDirectory(prefix="muse_memory_") as folder:
        work, before = Path(folder) / "work", 0
        for size in sizes:
            measure(append, url, before + 1, size)
            if not before:
                measure(train, url, work, spec)
            before = size
            alone = measure(build, url, work, spec)
            with dask_cluster(Path(folder) / "cluster") as cluster:
                for number in range(_WORKERS):
                    cluster.start_worker(str(number), {"MUSE_EMBEDDING_DB_URL": url})
                wait_for_workers(cluster.address, _WORKERS)
                on_cluster = measure(build, url, work, spec, cluster.address)
                worker = Cost(0, 0, max(_peaks(cluster)))
            if alone.facts["sha256"] != on_cluster.facts["sha256"]:
                raise RuntimeError("the cluster's index has other bytes")
            itself = Cost(0, 0, float(alone.facts["bytes"]) / 2**20)
            found.append((itself, alone, on_cluster, worker))
    for what, costs in zip(names, zip(*found, strict=True), strict=True):
        worker_only = what == names[-1]
        yield Series(
            what if not worker_only else f"{what}, imports included",
            "rows of the table",
            sizes,
            costs,
            "0" if worker_only else "1, above a constant",
            _WORKER_GROWTH if worker_only else 1.1,
            ("peak",),
        )


def append(url: str, first: int, last: int) -> Facts:
    """Rows of idx `first` to `last`, in blocks: a process that holds them all would be the largest here."""
    for start in range(first, last + 1, _BLOCK_ROWS):
        vectors = clustered(min(_BLOCK_ROWS, last + 1 - start), SPEC.dimension, seed=start)
        write_embeddings(url, SPEC, [vectors], first_idx=start, created_at=_MORNING)
    return {}


def train(url: str, work: Path, spec: IndexSpec) -> Facts:
    """A cluster of the smallest table, which all of them are built with."""
    train_cluster(engine_for(url), spec, work / spec.cluster_file)
    return {}


def build(url: str, work: Path, spec: IndexSpec, address: str | None = None) -> Facts:
    """A full build, gate and file included."""
    engine = engine_for(url)
    recruit = on_dask(address) if address else in_process
    begin()
    built = build_snapshot(engine, spec, work, _DAY, full=True, recruit=recruit)
    return {"bytes": built.manifest.size, "sha256": built.manifest.sha256}


def _peaks(cluster: DaskCluster) -> list[float]:
    """MB that each worker held at most."""
    found = []
    for process in cluster.workers.values():
        status = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
        found.append(int(dict(line.split(":", 1) for line in status)["VmHWM"].split()[0]) / 1024)
    return found
