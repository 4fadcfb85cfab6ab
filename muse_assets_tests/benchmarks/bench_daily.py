"""A day of one index: nothing new, and some rows of every kind changed, of a million.

Baselines: the digest's statements alone; the legacy daily add of the new rows by position, which sees
neither a deleted nor a re-embedded row. The table fits the buffer pool: warm.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, time
from pathlib import Path

import faiss
import numpy as np
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.ivfpq.contents import read_contents
from muse_assets.ivfpq.files import read_index
from muse_assets.snapshots.building import Built, build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.table_state import read_table_state
from muse_assets_tests.benchmarks.measuring import Facts, Row, begin, in_turn, measure
from muse_assets_tests.benchmarks.tables import (
    delete_embeddings,
    private_database,
    reembed,
    write_embeddings,
)
from muse_assets_tests.benchmarks.vectors import clustered

SPEC = replace(CATALOG.index("vibe"), recall_gate=0.4)
_ROWS, _NEW, _DELETED, _REEMBEDDED = 1_000_000, 5_000, 500, 500
_PAGE = 5_000
_FIRST, _SECOND = date(2026, 11, 1), date(2026, 11, 2)
_REPEATS = 3


def rows(scale: float) -> Iterator[Row]:
    """Fill a table, build its first day, then measure the days after it."""
    with private_database() as url, tempfile.TemporaryDirectory(prefix="muse_daily_") as folder:
        work, legacy = Path(folder) / "work", Path(folder) / "legacy.index"
        total, new = int(_ROWS * scale), max(int(_NEW * scale), 1)
        vectors = clustered(total + new, SPEC.dimension)
        write_embeddings(url, SPEC, [vectors[:total]], created_at=_noon(_FIRST))
        first = measure(build_first, url, work)
        measure(write_legacy_index, work, legacy)

        alone, unchanged = in_turn(
            _REPEATS, (digest_alone, (url,)), (build_day, (url, work, Path(folder) / "day"))
        )
        yield Row(
            f"day with nothing new, {total:,} rows",
            "the aggregate query alone",
            unchanged,
            alone,
            1.5,
            faster=False,
            note=f"{unchanged.facts['mode']}: a hard link, no file rewritten: {unchanged.facts['linked']}",
        )

        write_embeddings(url, SPEC, [vectors[total:]], first_idx=total + 1, created_at=_noon(_SECOND))
        changed = np.random.default_rng(1).permutation(total)[: _share(scale, _DELETED + _REEMBEDDED)] + 1
        delete_embeddings(url, SPEC, changed[: _share(scale, _DELETED)])
        reembed(url, SPEC, changed[_share(scale, _DELETED) :])
        added, synced = in_turn(
            _REPEATS, (add_legacy, (url, legacy)), (build_day, (url, work, Path(folder) / "day"))
        )
        full = measure(build_full, url, work, Path(folder) / "full")
        same = full.facts["sha256"] == synced.facts["sha256"]
        yield Row(
            f"daily sync: {synced.facts['added']:,} new, {synced.facts['removed']} deleted, "
            f"{synced.facts['reembedded']} re-embedded of {total:,}",
            f"legacy daily add of {added.facts['added']:,} by position",
            synced,
            added,
            2.0,
            faster=False,
            note=f"the bytes of a full build ({full.wall:.1f} s): {same}; recall@10 "
            f"{synced.facts['recall']:.3f}, {synced.facts['scanned']:,.0f} codes scanned at nprobe "
            f"{synced.facts['nprobe']}; first build of that table {first.wall:.1f} s",
        )
        if not same:
            raise RuntimeError("the incremental index has other bytes than the full one")


def build_first(url: str, work: Path) -> Facts:
    """Train the cluster and build the first day."""
    engine = engine_for(url)
    train_cluster(engine, SPEC, work / SPEC.cluster_file)
    begin()
    return _facts(build_snapshot(engine, SPEC, work, _FIRST))


def build_day(url: str, work: Path, copy: Path) -> Facts:
    """Build the second day in a copy of the work directory."""
    shutil.copytree(work, copy)
    try:
        begin()
        built = build_snapshot(engine_for(url), SPEC, copy, _SECOND)
        linked = built.path.samefile(copy / SPEC.snapshot_file(_FIRST))
        return {**_facts(built), "linked": str(linked)}
    finally:
        shutil.rmtree(copy)


def build_full(url: str, work: Path, copy: Path) -> Facts:
    """Build the second day without a parent."""
    shutil.copytree(work, copy)
    try:
        begin()
        return _facts(build_snapshot(engine_for(url), SPEC, copy, _SECOND, full=True))
    finally:
        shutil.rmtree(copy)


def digest_alone(url: str) -> Facts:
    """What `read_table_state` asks the database, as it asks it."""
    begin()
    state = read_table_state(engine_for(url), SPEC, _noon(_SECOND))
    return {"buckets": len(state.digests.bucket)}


def add_legacy(url: str, path: Path) -> Facts:
    """As the legacy batch: rows above `ntotal` by pages, `numpy.load` on each, `add`, `write_index`."""
    engine = create_engine(url, poolclass=NullPool)
    begin()
    index = faiss.read_index(str(path))
    before = index.ntotal
    page = text(
        f"SELECT idx, {SPEC.embedding_column} FROM {SPEC.table} WHERE idx > :after ORDER BY idx LIMIT {_PAGE}"
    )
    with engine.connect() as connection:
        newest = connection.execute(text(f"SELECT MAX(idx) FROM {SPEC.table}")).scalar_one()
        while index.ntotal < newest:
            found = connection.execute(page, {"after": index.ntotal}).all()
            vectors = [np.load(io.BytesIO(payload), allow_pickle=True).reshape(-1) for _, payload in found]
            index.add(np.array(vectors, np.float32))
    faiss.write_index(index, str(path.with_suffix(".new")))
    return {"added": index.ntotal - before}


def write_legacy_index(work: Path, path: Path) -> None:
    """Our first day as the legacy batch would have it: an HNSW coarse quantizer, ids by position."""
    ours = read_index(work / SPEC.snapshot_file(_FIRST))
    quantizer = faiss.IndexHNSWFlat(ours.d, 32)
    quantizer.add(faiss.downcast_index(ours.quantizer).reconstruct_n(0, ours.nlist))
    index = faiss.IndexIVFPQ(quantizer, ours.d, ours.nlist, ours.pq.M, ours.pq.nbits)
    faiss.copy_array_to_vector(faiss.vector_to_array(ours.pq.centroids), index.pq.centroids)
    index.is_trained = True
    held = read_contents(ours)
    for number in range(ours.nlist):
        here = held.lists == number
        ids, codes = np.ascontiguousarray(held.ids[here]), np.ascontiguousarray(held.codes[here])
        if len(ids):
            index.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    index.ntotal = len(held.ids)
    faiss.write_index(index, str(path))


def _facts(built: Built) -> dict[str, float | str]:
    facts = built.manifest
    scanned = facts.checks["recall_at_10"]["codes_scanned"]
    return {
        "mode": facts.mode,
        "added": facts.added,
        "removed": facts.removed,
        "reembedded": facts.reembedded,
        "sha256": facts.sha256,
        "recall": facts.recall_at_10,
        "nprobe": facts.nprobe,
        "scanned": scanned,
    }


def _share(scale: float, rows: int) -> int:
    return max(int(rows * scale), 1)


def _noon(day: date) -> datetime:
    return datetime.combine(day, time(12))
