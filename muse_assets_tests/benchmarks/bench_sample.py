"""The training sample from the database against reading the whole table.

Here: drawing rows. Not here: training on them (`bench_train`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import connected, engine_for
from muse_assets.embeddings.digests import BUCKET_ROWS
from muse_assets.embeddings.reading import Bounds, count_rows, pages
from muse_assets.embeddings.sampling import Sample, sample_vectors
from muse_assets.ivfpq.training import choose_nlist, training_rows
from muse_assets_tests.benchmarks.measuring import Facts, Row, in_turn, measure
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
        # Twice each: where a hypervisor hands memory out, who touches it first pays 0.9 s for 400 MB.
        whole, drawn = in_turn(2, (_read_all, (url,)), (_draw, (url,)))
        hashes = {measure(_hash, url).facts["sha256"] for _ in range(2)}
    facts = drawn.facts
    yield Row(
        f"training sample of {facts['drawn']:,} from {total:,} x {SPEC.dimension}",
        "reading the whole table",
        drawn,
        whole,
        10,
        note=f"each tenth of the table gave {facts['shares']} of the sample and {facts['first_half']} of its "
        f"first half; the same for the same seed: {len(hashes) == 1}",
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
    drawn = _sample(url)
    place, half = drawn.vectors[:, 0], len(drawn.vectors) // 2
    shares, first = (np.histogram(part, _TENTHS, (0, 1))[0] / len(part) for part in (place, place[:half]))
    return {
        "drawn": len(place),
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
