"""Encoding and adding vectors against `add_with_ids`, and against the matrix products alone.

Here: vectors in memory, a trained index. Not here: training (`bench_train`) or reading them from a database.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from muse_assets.ivfpq.encoding import encode_all, fill
from muse_assets.ivfpq.training import train
from muse_assets_tests.benchmarks.measuring import Facts, Row, begin, in_turn, measure
from muse_assets_tests.benchmarks.vectors import clustered

_ROWS = 500_000
_NLIST, _M = 1000, 64
_FAISS_BLOCK = 5_000
_PAGE_ROWS = 4_096
_COMPARED_ROWS = 50_000
_REPEATS = 3


def rows(scale: float) -> Iterator[Row]:
    """500k vectors of 512 and of 1024 floats."""
    count = int(_ROWS * scale)
    for dimension, reach in ((512, 1.4), (1024, 2.5)):
        with tempfile.TemporaryDirectory() as folder:
            vectors, empty = Path(folder, "vectors.npy"), Path(folder, "empty.index")
            measure(_prepare, vectors, empty, count, dimension)
            ours, by_faiss, products = in_turn(
                _REPEATS, *((work, (vectors, empty)) for work in (_fill, _add_with_ids, _matrix_products))
            )
            facts = measure(_agreement, vectors, empty).facts
        what = f"fill {count:,} x {dimension}, nlist {_NLIST}, PQ{_M}"
        note = ", ".join(f"{name} {value}" for name, value in facts.items())
        yield Row(what, f"add_with_ids, blocks of {_FAISS_BLOCK:,}", ours, by_faiss, reach, note=note)
        share, speed = products.wall / ours.wall, count / ours.wall
        note = f"{share:.0%} of the bound that sgemm sets, {speed:,.0f} vectors/s"
        yield Row(what, "its matrix products", ours, products, None, faster=False, note=note)


def _prepare(vectors: Path, empty: Path, rows: int, dimension: int) -> None:
    made = clustered(rows, dimension)
    np.save(vectors, made)
    sample = made[np.random.default_rng(1).permutation(rows)[: 128 * _NLIST]]
    faiss.write_index(train(sample, nlist=_NLIST, m=_M).index, str(empty))


def _loaded(vectors: Path, empty: Path) -> tuple[Any, Any, Any]:
    index, rows = faiss.read_index(str(empty)), np.load(vectors)
    return index, rows, np.arange(len(rows))


def _fill(vectors: Path, empty: Path) -> None:
    index, rows, ids = _loaded(vectors, empty)
    begin()
    fill(
        index,
        ((ids[at : at + _PAGE_ROWS], rows[at : at + _PAGE_ROWS]) for at in range(0, len(rows), _PAGE_ROWS)),
    )


def _add_with_ids(vectors: Path, empty: Path) -> None:
    index, rows, ids = _loaded(vectors, empty)
    begin()
    for at in range(0, len(rows), _FAISS_BLOCK):
        index.add_with_ids(rows[at : at + _FAISS_BLOCK], ids[at : at + _FAISS_BLOCK])


def _matrix_products(vectors: Path, empty: Path) -> None:
    """The multiplications that assigning (d x nlist) and encoding (d x 256) take, by numpy on every core."""
    index, rows, _ = _loaded(vectors, empty)
    columns = np.random.default_rng(1).standard_normal((index.d, index.nlist + index.pq.ksub), np.float32)
    out = np.empty((_PAGE_ROWS, columns.shape[1]), np.float32)
    begin()
    for at in range(0, len(rows), _PAGE_ROWS):
        block = rows[at : at + _PAGE_ROWS]
        np.matmul(block, columns, out=out[: len(block)])


def _agreement(vectors: Path, empty: Path) -> Facts:
    """How far the codes are FAISS's, and the squared error of the vectors that they stand for."""
    index, rows, _ = _loaded(vectors, empty)
    rows = rows[np.random.default_rng(2).permutation(len(rows))[:_COMPARED_ROWS]]
    ours, by_faiss = encode_all(index, rows), index.sa_encode(rows)
    errors = [
        np.square(rows - index.sa_decode(codes), dtype=np.float64).sum(axis=1).mean()
        for codes in (ours, by_faiss)
    ]
    equal = (ours == by_faiss).all(axis=1).mean()
    return {"codes equal to FAISS's": f"{equal:.4%}", "squared error": f"{errors[0]:.7f} to {errors[1]:.7f}"}
