"""The trained cluster of one index: drawn from its table, written, and read back only when intact.

Here: `muse_<index>_cluster.index` and its facts. Not here: k-means itself (`ivfpq.training`).
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.sampling import sample_vectors
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.coarse_error import coarse_errors
from muse_assets.ivfpq.contents import trained_fingerprint
from muse_assets.ivfpq.exact_neighbors import Queries
from muse_assets.ivfpq.files import read_index, write_index
from muse_assets.ivfpq.quality import imbalance
from muse_assets.ivfpq.training import choose_nlist, train, training_rows
from muse_assets.manifest import read_manifest
from muse_assets.sealed_json import read_sealed, write_sealed
from muse_assets.snapshots.progress import Progress, silent
from muse_assets.snapshots.queries import QUERIES, hold_out, queries_path, read_queries, write_queries

SEED = 20241128
_DATED_NAME = re.compile(r"_\d{8}\.index$")


@dataclass(frozen=True)
class ClusterManifest:
    """Facts of one trained cluster file.

    newest_idx: of the sample, so of the table but for a few rows. coarse_error: mean squared distance of the
    held-out queries to their nearest centroids; imbalance: of the lists that the training rows would fill.
    What an index departs from (`drift`).
    """

    index: str
    sha256: str
    fingerprint: str
    trained_at: str
    dimension: int
    nlist: int
    m: int
    nbits: int
    table_rows: int
    training_rows: int
    coarse_error: float
    objective: tuple[float, ...]
    rejected: dict[str, int]
    seconds: float
    imbalance: float = 0.0
    newest_idx: int = 0


@dataclass(frozen=True)
class Cluster:
    """A trained, empty index in memory, its fingerprint, the file it came from, and what came with it.

    queries: None where they are lost. facts: None for a filled index that stands for its cluster.
    """

    index: Any
    fingerprint: str
    path: Path
    sha256: str
    queries: Queries | None
    facts: ClusterManifest | None


def train_cluster(
    engine: Engine, spec: IndexSpec, path: Path, *, seed: int = SEED, on_progress: Progress = silent
) -> ClusterManifest:
    """Sample the table, train, and write the cluster file with its facts; the old file stays till then.

    The same table and seed give the same file. Raises PermanentFailure for a missing table or column, an
    empty table, or vectors that are not what the catalog says.
    """
    start = time.monotonic()
    sample = sample_vectors(
        engine,
        spec,
        lambda rows: training_rows(choose_nlist(rows, spec.nlist)) + QUERIES,
        doing=f"sampling {spec.table} to train {spec.name}",
        seed=seed,
        on_rows=lambda done, wanted: on_progress("sampling", done, wanted),
    )
    drawn = len(sample.vectors) + sum(sample.rejected.values())
    if not len(sample.vectors) or sum(sample.rejected.values()) > spec.max_rejected_share * drawn:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sample.rejected.items()) or "no rows"
        raise PermanentFailure(
            f"{spec.name}: cannot train on {spec.table}.{spec.embedding_column}: of {drawn:,} sampled rows "
            f"{len(sample.vectors):,} hold {spec.dimension} finite floats as {spec.encoding} ({reasons}).",
            next_step="check `dimension` and `encoding` in the catalog against the table, or mend the rows.",
        )
    stages = 0

    def on_stage(text: str) -> None:
        nonlocal stages
        stages += 1
        on_progress(f"training: {text}", stages, 0)

    nlist = min(choose_nlist(sample.table_rows, spec.nlist), spec.nlist or len(sample.vectors))
    queries, rows = hold_out(spec, sample)
    trained = train(
        sample.vectors[:rows], nlist=nlist, m=spec.m, nbits=spec.nbits, seed=seed, on_stage=on_stage
    )
    return _write_cluster(
        path,
        spec,
        trained.index,
        queries,
        table_rows=sample.table_rows,
        newest_idx=int(sample.idx.max()),
        training_rows=rows,
        imbalance=trained.imbalance,
        objective=trained.objective,
        rejected=sample.rejected,
        start=start,
    )


def take_cluster(
    filled: Any, spec: IndexSpec, path: Path, queries: Queries, *, table_rows: int, newest_idx: int
) -> ClusterManifest:
    """Write what a filled index was trained to, as `train_cluster` would have; empties `filled`.

    Nobody knows on how many rows it was trained: that fact is 0. Its drift counts from now.
    """
    start = time.monotonic()
    lists = round(imbalance(filled), 4)
    filled.reset()
    filled.nprobe = 1
    unknown: dict[str, Any] = {"training_rows": 0, "objective": (), "rejected": {}}
    return _write_cluster(
        path,
        spec,
        filled,
        queries,
        table_rows=table_rows,
        newest_idx=newest_idx,
        imbalance=lists,
        start=start,
        **unknown,
    )


def _write_cluster(
    path: Path, spec: IndexSpec, index: Any, queries: Queries, *, start: float, **facts: Any
) -> ClusterManifest:
    """facts: fields of the manifest that the index does not show; start: monotonic seconds."""
    errors = coarse_errors(index, queries.vectors)
    coarse_error = float(errors.mean(dtype=np.float64)) if len(errors) else 0.0
    with (
        durable_files.explained(f"Index {spec.name}", path.parent, f"{path} was not replaced"),
        durable_files.locked(_lock_file(path, spec)),
    ):
        durable_files.sweep(path)
        for facts_of_any in (_manifest_path, _queries_path):
            durable_files.sweep(facts_of_any(path, spec, "?" * 64))
        staged = durable_files.stage(path, partial(write_index, index))
        manifest = ClusterManifest(
            index=spec.name,
            sha256=staged.sha256,
            fingerprint=trained_fingerprint(index),
            trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
            dimension=index.d,
            nlist=index.nlist,
            m=index.pq.M,
            nbits=index.pq.nbits,
            coarse_error=coarse_error,
            seconds=round(time.monotonic() - start, 2),
            **facts,
        )
        write_queries(_queries_path(path, spec, staged.sha256), queries)
        write_sealed(_manifest_path(path, spec, staged.sha256), asdict(manifest))
        durable_files.commit(staged)
        _forget_replaced(path, spec)
    return manifest


def load_cluster(path: Path, spec: IndexSpec) -> Cluster:
    """The trained cluster, verified against its facts and the catalog.

    Raises PermanentFailure when there is none, when its bytes changed, or when its shape is not the
    catalog's.
    """
    remedy = f"materialize {spec.name}/cluster (or launch the job `rebuild` for {spec.name})."
    if not path.exists():
        raise PermanentFailure(
            f"{spec.name} has no trained cluster: {path} does not exist.", next_step=remedy
        )
    sha256 = durable_files.file_sha256(path)
    facts = _read_facts(path, spec, sha256)
    if not facts and not read_manifest(path.parent, spec.name, sha256):
        raise PermanentFailure(
            f"{spec.name}: {path} is damaged or was not written by this system: no intact facts are of its"
            f" content {sha256[:12]}.",
            next_step=remedy,
        )
    index = read_index(path)
    index.reset()  # a filled index stands for the cluster it was filled from
    wanted = (spec.dimension, spec.nlist or index.nlist, spec.m, spec.nbits)
    found = (index.d, index.nlist, index.pq.M, index.pq.nbits)
    if wanted != found:
        raise PermanentFailure(
            f"{spec.name}: {path} was trained with (dimension, nlist, m, nbits) = {found}, "
            f"the catalog says {wanted}.",
            next_step=remedy,
        )
    queries = read_queries(_queries_path(path, spec, sha256), spec.dimension)
    return Cluster(index, trained_fingerprint(index), path, sha256, queries, facts)


def keep_queries(cluster: Cluster, spec: IndexSpec, queries: Queries) -> None:
    """Put queries drawn anew where the cluster's were."""
    with durable_files.locked(_lock_file(cluster.path, spec)):
        durable_files.sweep(_queries_path(cluster.path, spec, "?" * 64))
        write_queries(_queries_path(cluster.path, spec, cluster.sha256), queries)


def restore_cluster(snapshot: Path, path: Path, spec: IndexSpec) -> bool:
    """Write the cluster file anew from an intact index that was filled from it, to the same bytes.

    Returns False, and writes nothing, when no intact facts are of those bytes: then only training helps.
    """
    index = read_index(snapshot)
    index.reset()
    index.nprobe = 1
    with durable_files.locked(_lock_file(path, spec)):
        staged = durable_files.stage(path, partial(write_index, index))
        if read_sealed(_manifest_path(path, spec, staged.sha256)) is None:
            durable_files.discard(staged)
            return False
        durable_files.commit(staged)
    return True


def _read_facts(path: Path, spec: IndexSpec, sha256: str) -> ClusterManifest | None:
    content = read_sealed(_manifest_path(path, spec, sha256))
    known = {field.name for field in fields(ClusterManifest)}
    return ClusterManifest(**{k: v for k, v in content.items() if k in known}) if content else None


def _manifest_path(path: Path, spec: IndexSpec, sha256: str) -> Path:
    return path.parent / ".manifests" / spec.name / f"{sha256}.cluster.json"


def _queries_path(path: Path, spec: IndexSpec, sha256: str) -> Path:
    return queries_path(path.parent, spec.name, sha256)


def _forget_replaced(path: Path, spec: IndexSpec) -> None:
    """Remove the facts of clusters that no file beside `path` is any more; a cluster may have any name.

    Without this every retrain leaves a file for ever. What fails here is done at the next training.
    """
    facts = _manifest_path(path, spec, "?" * 64)
    with contextlib.suppress(OSError):
        files = [
            file
            for file in path.parent.glob("[!.]*")
            if file.is_file() and not _DATED_NAME.search(file.name)  # snapshots may be gigabytes
        ]
        present = {durable_files.file_sha256(file) for file in files}
        for pattern in (facts, _queries_path(path, spec, "?" * 64)):
            for known in pattern.parent.glob(pattern.name):
                if known.name.split(".")[0] not in present:
                    known.unlink()


def _lock_file(path: Path, spec: IndexSpec) -> Path:
    return path.parent / ".locks" / f"{spec.name}.cluster.lock"
