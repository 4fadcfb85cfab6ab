"""An index from nothing, train and fill, beside the legacy way and beside autofaiss.

Ours and the legacy way read MariaDB (warm), autofaiss reads the same vectors from .npy. All three give the
same nlist and m. autofaiss needs older packages than ours: an environment of its own, made when it is run.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.ivfpq.contents import list_sizes
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Row, begin, measure
from muse_assets_tests.benchmarks.tables import private_database, write_embeddings
from muse_assets_tests.benchmarks.vectors import clustered

SPEC = replace(CATALOG.index("vibe"), recall_gate=0.4)
_ROWS, _NLIST = 500_000, 1000
_PAGE = 5_000
_RESIDUES = (1, 21, 41, 61, 81)
_DAY = date(2027, 12, 31)
_PROBES = (8, 16, 32)
_QUERIES = 500
_AUTOFAISS = Path(".venv-autofaiss")
_AUTOFAISS_NEEDS = ("autofaiss==2.18.0", "numpy<2", "pyarrow<18")
_AUTOFAISS_RUN = """
import sys
from autofaiss import build_index
folder, out, key = sys.argv[1:]
build_index(folder, index_path=out, index_infos_path=out + ".json", index_key=key, metric_type="l2",
            index_param="nprobe=16", max_index_memory_usage="8G", current_memory_available="12G")
"""


def rows(scale: float) -> Iterator[Row]:
    """Fill a table, then make an index of it in three ways."""
    total = max(int(_ROWS * scale), 10_000)
    spec = replace(SPEC, nlist=max(round(_NLIST * (total / _ROWS) ** 0.5), 16))
    with private_database() as url, tempfile.TemporaryDirectory(prefix="muse_first_") as name:
        folder = Path(name)
        measure(make, folder, url, total)
        ours = _judged(folder, measure(build_ours, folder, url, spec))
        legacy = _judged(folder, measure(build_legacy, folder, url, spec))
        what = f"whole first build, {total:,} x {spec.dimension}, nlist {spec.nlist}, PQ{spec.m}"
        yield Row(what, "the legacy way, from MariaDB", ours, legacy, 8.0, note=_told(ours, legacy))
        try:
            make_environment()
        except subprocess.CalledProcessError as error:
            yield Row(
                what, "autofaiss: NOT MEASURED", ours, ours, 5.0, note=f"it could not be installed: {error}"
            )
            return
        theirs = _judged(folder, measure(build_autofaiss, folder, spec))
        yield Row(what, "autofaiss, from .npy", ours, theirs, 5.0, note=_told(ours, theirs))


def _told(ours: Cost, other: Cost) -> str:
    def curve(cost: Cost) -> str:
        return " ".join(
            f"{float(cost.facts[f'recall {n}']):.1%}/{float(cost.facts[f'scanned {n}']):,.0f}"
            for n in _PROBES
        )

    return f"recall@10/codes scanned at nprobe {_PROBES}: {curve(ours)}; theirs {curve(other)}"


def _judged(folder: Path, cost: Cost) -> Cost:
    return replace(cost, facts=measure(judge, folder, Path(str(cost.facts["file"]))).facts)


def judge(folder: Path, path: Path) -> Facts:
    """recall@10 and codes scanned of an index file by nprobe; its ids count from 0."""
    index = faiss.read_index(str(path))
    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "exact.npy")
    sizes = np.append(list_sizes(index), 0)
    facts: dict[str, float | str] = {}
    for nprobe in _PROBES:
        index.nprobe = nprobe
        found = index.search(queries, 10)[1]
        hits = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
        probed = faiss.downcast_index(index.quantizer).search(queries, nprobe)[1]
        facts[f"recall {nprobe}"] = float(np.mean(hits)) / 10
        facts[f"scanned {nprobe}"] = float(sizes[probed].sum(axis=1).mean())
    return facts


def make(folder: Path, url: str, total: int) -> None:
    """Write the vectors as .npy, the table, and the exact neighbors of some further vectors."""
    vectors = clustered(total + _QUERIES, SPEC.dimension)
    queries, vectors = vectors[total:], vectors[:total]
    (folder / "npy").mkdir()
    np.save(folder / "npy" / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "exact.npy", faiss.knn(queries, vectors, 10)[1])
    write_embeddings(url, SPEC, [vectors])


def build_ours(folder: Path, url: str, spec: Any) -> Facts:
    """Train, fill, gate, write: as `muse run --rebuild` does."""
    engine, work = engine_for(url), folder / "work"
    begin()
    train_cluster(engine, spec, work / spec.cluster_file)
    return {"file": str(build_snapshot(engine, spec, work, _DAY).path)}


def build_legacy(folder: Path, url: str, spec: Any) -> Facts:
    """5 % of the rows by residue into one array, HNSW32 quantizer, default train, `add` page by page."""
    path = folder / "legacy.index"
    begin()
    with create_engine(url, poolclass=NullPool).connect() as connection:
        residues = ", ".join(map(str, _RESIDUES))
        sample = np.concatenate(list(_pages(connection, f"AND idx_mod_100 IN ({residues})")))
        quantizer = faiss.IndexHNSWFlat(spec.dimension, 32)
        index = faiss.IndexIVFPQ(quantizer, spec.dimension, spec.nlist, spec.m, spec.nbits)
        index.train(sample)
        for vectors in _pages(connection):
            index.add(vectors)
    faiss.write_index(index, str(path))
    return {"file": str(path)}


def build_autofaiss(folder: Path, spec: Any) -> Facts:
    """The same shape by autofaiss, in a process of its own environment."""
    path = folder / "autofaiss.index"
    key = f"IVF{spec.nlist},PQ{spec.m}"
    command = [_python(), "-c", _AUTOFAISS_RUN, str(folder / "npy"), str(path), key]
    begin()
    subprocess.run(command, check=True, capture_output=True)
    return {"file": str(path)}


def make_environment() -> None:
    """The environment in which autofaiss works: it pins numpy below 2, which newer pyarrow has left."""
    if not Path(_python()).exists():
        subprocess.run([sys.executable, "-m", "venv", _AUTOFAISS], check=True, capture_output=True)
        subprocess.run(
            [_python(), "-m", "pip", "install", "--quiet", *_AUTOFAISS_NEEDS],
            check=True,
            capture_output=True,
        )


def _python() -> str:
    return str(_AUTOFAISS / "bin" / "python")


def _pages(connection: Connection, condition: str = "") -> Iterator[NDArray[np.float32]]:
    query = text(
        f"SELECT idx, {SPEC.embedding_column} FROM {SPEC.table} WHERE idx > :after {condition} "
        f"ORDER BY idx LIMIT {_PAGE}"
    )
    after = 0
    while found := connection.execute(query, {"after": after}).all():
        after = found[-1][0]
        vectors = [np.load(io.BytesIO(payload), allow_pickle=True).reshape(-1) for _, payload in found]
        yield np.array(vectors, np.float32)
