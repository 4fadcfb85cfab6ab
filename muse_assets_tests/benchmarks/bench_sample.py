"""The training sample from the database against reading the whole table.

Here: drawing rows. Not here: training on them (`bench_train`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import connected, engine_for
from muse_assets.embeddings.digests import BUCKET_ROWS
from muse_assets.embeddings.reading import Bounds, count_rows, pages
from muse_assets.embeddings.sampling import Sample, sample_vectors
from muse_assets.ivfpq.training import choose_nlist, training_rows
from muse_assets_tests.benchmarks.measuring import Facts, Row, begin, in_turn, measure
from muse_assets_tests.benchmarks.tables import private_database, write_embeddings
from muse_assets_tests.benchmarks.vectors import clustered

SPEC = CATALOG.index("vibe")
_ROWS, _BLOCK = 2_000_000, 100_000
_TENTHS = 10


def rows(scale: float) -> Iterator[Row]:
    """2M rows of 512 floats whose first one tells the row's place in the table."""
    total = int(_ROWS * scale)
    with private_database() as url:
        write_embeddings(url, SPEC, _blocks(total))
        whole, drawn = in_turn(3, (_read_all, (url,)), (_draw, (url,)))
        hashes = {measure(_hash, url).facts["sha256"] for _ in range(2)}
    facts = drawn.facts
    yield Row(
        f"training sample of {facts['drawn']:,} from {total:,} x {SPEC.dimension}",
        "reading the whole table",
        drawn,
        whole,
        10,
        note=f"in memory that was in use before, in new {facts['in_new_memory']} s; each tenth of the table "
        f"gave {facts['shares']} of the sample and {facts['first_half']} of its first half; the same for the "
        f"same seed: {len(hashes) == 1}",
    )


def _blocks(total: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, total, _BLOCK):
        block = clustered(min(_BLOCK, total - start), SPEC.dimension, seed=start)
        block[:, 0] = np.arange(start, start + len(block)) / total
        yield block


def _read_all(url: str) -> Facts:
    with connected(engine_for(url), "reading it all") as connection:
        _, low, high = count_rows(connection, SPEC)
        return {"rows": sum(len(p.idx) for p in pages(connection, SPEC, [Bounds(low, high)], BUCKET_ROWS))}


def _draw(url: str) -> Facts:
    # Memory is warm, as the table is: a hypervisor that has yet to find 400 MB takes 0.5 to 1 s for them,
    # which are none of drawing's. What it is with them is told beside it.
    started = time.perf_counter()
    vectors = _sample(url).vectors
    in_new_memory = time.perf_counter() - started
    place, half = vectors[:, 0].copy(), len(vectors) // 2
    shares, first = (np.histogram(part, _TENTHS, (0, 1))[0] / len(part) for part in (place, place[:half]))
    del vectors
    begin()
    _sample(url)
    return {
        "drawn": len(place),
        "in_new_memory": f"{in_new_memory:.2f}",
        "shares": f"{shares.min():.1%} to {shares.max():.1%}",
        "first_half": f"{first.min():.1%} to {first.max():.1%}",
    }


def _hash(url: str) -> Facts:
    drawn = _sample(url)
    return {"sha256": hashlib.sha256(drawn.idx.tobytes() + drawn.vectors.tobytes()).hexdigest()}


def _sample(url: str) -> Sample:
    return sample_vectors(
        engine_for(url),
        SPEC,
        lambda found: training_rows(choose_nlist(found)),
        doing="sampling",
        seed=1,
    )
