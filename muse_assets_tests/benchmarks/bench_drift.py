"""Sixty days of a shift: a table that was trained on half of its topics, while the other half arrives.

Baseline: the same days without a retrain. And a table whose new rows are like the old ones: what the rule
must not call a drift. Costs of days, not of code: the figures that matter are in the notes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.ivfpq.exact_neighbors import NearestRows, Queries, no_neighbors
from muse_assets.ivfpq.files import read_index
from muse_assets.ivfpq.probing import K, measure_probes
from muse_assets.snapshots.building import Built, build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.benchmarks.measuring import Facts, Row, begin, measure
from muse_assets_tests.benchmarks.tables import private_database, write_embeddings
from muse_assets_tests.benchmarks.vectors import text

SPEC = replace(CATALOG.index("vibe"), dimension=256, m=32, recall_gate=0.3)
_FIRST = date(2026, 9, 1)
_DAYS, _ROWS, _A_DAY = 60, 40_000, 1_000
_TOPICS = 40
_TOLD_EVERY = 10
# Of the table's rows, the same ones in each arm; a cluster's own 128 know recall to 2 points alone.
_QUERIES = 1_000
# Codes are compared at this recall@10: the stored nprobe moves by powers of two, and recall with it.
_RECALL = 0.6


def rows(scale: float) -> Iterator[Row]:
    """The shift with and without a retrain, and days without a shift."""
    with private_database(1024) as url, tempfile.TemporaryDirectory(prefix="muse_drift_") as folder:
        first, a_day = int(_ROWS * scale), max(int(_A_DAY * scale), 1)
        for shift in (True, False):
            np.save(_vectors(Path(folder), shift), _in_order(first + _DAYS * a_day, first, shift=shift))
        left, retrained, steady = (
            measure(live_through, url, Path(folder), first, name, shift, retrains)
            for name, shift, retrains in (
                ("left_alone", True, False),
                ("retrained", True, True),
                ("steady", False, True),
            )
        )
        for what, cost in (("with retrains", retrained), ("without a shift", steady)):
            saved = float(left.facts["codes"]) / float(cost.facts["codes"])
            yield Row(
                f"{_DAYS} days, {what}",
                "a shift, left alone",
                cost,
                left,
                None,
                faster=False,
                metric="cpu",
                note=f"codes scanned on the last day, at equal recall: {saved:.2f} times fewer\n"
                f"{cost.facts['told']}\nleft alone:\n{left.facts['told']}",
            )


def live_through(url: str, folder: Path, first: int, name: str, shift: bool, retrains: bool) -> Facts:
    """Train on the `first` rows, then add a day's and build, 60 times; where drift is told, train anew."""
    spec, work = replace(SPEC, table=f"tb_{name}"), folder / name
    vectors = np.load(_vectors(folder, shift), mmap_mode="r")
    a_day = (len(vectors) - first) // _DAYS
    engine = engine_for(url)
    write_embeddings(url, spec, [vectors[:first]], created_at=_noon(_FIRST))
    begin()
    train_cluster(engine, spec, work / spec.cluster_file)
    built = build_snapshot(engine, spec, work, _FIRST)
    days = [_told(0, built, vectors[:first], "")]
    for day in range(1, _DAYS + 1):
        drift = built.manifest.checks["drift"]
        retrain = retrains and not drift["passed"]
        if retrain:
            train_cluster(engine, spec, work / spec.cluster_file)
        at = first + (day - 1) * a_day
        when = _FIRST + timedelta(days=day)
        write_embeddings(url, spec, [vectors[at : at + a_day]], first_idx=at + 1, created_at=_noon(when))
        built = build_snapshot(engine, spec, work, when)
        if retrain or day % _TOLD_EVERY == 0:
            days.append(_told(day, built, vectors[: at + a_day], drift["summary"] if retrain else ""))
    return {
        "codes": days[-1]["codes at equal recall"],
        "told": "\n".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in days),
        "days": json.dumps(days),
    }


def _told(day: int, built: Built, vectors: NDArray[np.float32], retrained: str) -> dict[str, Any]:
    """What the index finds of `vectors` (n, d), the table's rows in order of idx."""
    facts, index = built.manifest, read_index(built.path, precompute=True)
    ids = np.arange(len(vectors), dtype=np.int64)
    asked = np.random.default_rng(day).choice(ids, min(_QUERIES, len(ids) // 2), replace=False)
    queries = Queries(asked, vectors[asked])
    nearest = NearestRows(queries, no_neighbors(queries))
    for at in range(0, len(ids), 4096):
        nearest.take(ids[at : at + 4096], np.ascontiguousarray(vectors[at : at + 4096]))
    curve = measure_probes(index, queries, nearest.hand_over(), fixed=facts.nprobe)
    found = np.maximum.accumulate([probe.recall[K] for probe in curve.probes])
    codes = np.interp(_RECALL, found, [probe.codes_scanned for probe in curve.probes])
    return {
        "day": day,
        "rows": facts.rows,
        "recall@10": round(curve.at(facts.nprobe).recall[K], 3),
        "at most": round(float(found[-1]), 3),
        "nprobe": facts.nprobe,
        "scanned": round(curve.at(facts.nprobe).codes_scanned),
        "codes at equal recall": round(float(codes)),
        "imbalance": facts.imbalance,
        "coarse error": facts.drift["coarse_error"],
        **({"retrained, as": retrained} if retrained else {}),
    }


def _in_order(total: int, first: int, *, shift: bool) -> NDArray[np.float32]:
    """Real text in random order; with a shift, the first rows are of every other topic, the others follow."""
    vectors = text(2 * total, SPEC.dimension)
    if not shift:
        return vectors[:total]
    topics = faiss.Kmeans(SPEC.dimension, _TOPICS, niter=10, seed=1)
    topics.train(vectors[: 40 * 256])
    topic = topics.index.search(vectors, 1)[1][:, 0]
    by_size = np.argsort(np.bincount(topic, minlength=_TOPICS))
    early = np.isin(topic, by_size[::2])
    return np.concatenate([vectors[early][:first], vectors[~early][: total - first]])


def _vectors(folder: Path, shift: bool) -> Path:
    return folder / f"{'shift' if shift else 'steady'}.npy"


def _noon(day: date) -> datetime:
    return datetime.combine(day, time(12))
