"""A random sample of a table's vectors, drawn inside the database.

Here: which rows, and their usable vectors. Not here: training on them (`ivfpq.training`).

A table's order is its history (genre by genre, year by year), so the first rows are no sample, and
reading every row to choose some costs the whole table. Random primary keys are looked up instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.reading import count_rows, rows_by_idx

_KEYS_A_ROUND = 8192


@dataclass(frozen=True)
class Sample:
    """vectors (n, d) float32 in random order; table_rows: rows there are; rejected: reason -> rows."""

    vectors: NDArray[np.float32]
    table_rows: int
    rejected: dict[str, int]


def sample_vectors(
    connection: Connection,
    spec: IndexSpec,
    wanted: Callable[[int], int],
    *,
    seed: int,
    on_rows: Callable[[int, int], None] = lambda done, wanted: None,
) -> Sample:
    """Draw `wanted(table rows)` usable vectors at random over the whole table, the same for the same seed.

    Draws keys between the smallest and the largest idx without replacement until there are enough, so
    gaps only cost tries. Memory: the sample.
    """
    table_rows, low, high = count_rows(connection, spec)
    target = min(wanted(table_rows), table_rows)
    random = np.random.default_rng(seed)
    vectors = np.empty((target, spec.dimension), np.float32)
    rejected: dict[str, int] = {}
    done = 0
    for keys in _key_rounds(random, low, high, target, table_rows):
        for page in rows_by_idx(connection, spec, keys):
            decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
            for reason in Reason:
                if reason and (count := int((decoded.reasons == reason).sum())):
                    rejected[reason.name.lower()] = rejected.get(reason.name.lower(), 0) + count
            usable = decoded.vectors[decoded.reasons == Reason.OK][: target - done]
            vectors[done : done + len(usable)] = usable
            done += len(usable)
        on_rows(done, target)
        if done >= target:
            break
    # Rows come back in key order within a query; training takes prefixes of the sample.
    return Sample(vectors[:done][random.permutation(done)], table_rows, rejected)


def _key_rounds(
    random: np.random.Generator, low: int, high: int, target: int, table_rows: int
) -> list[NDArray[np.int64]]:
    """Rounds of distinct random keys; together they cover every key there is."""
    if not table_rows:
        return []
    span = high - low + 1
    # Enough keys for the target at this density, with room for bad luck and rejected rows.
    enough = min(span, int(target * (span / table_rows) * 1.1) + _KEYS_A_ROUND)
    if span <= 4 * enough:
        keys = low + random.permutation(span).astype(np.int64)
    else:
        keys = low + np.unique(random.integers(0, span, 2 * enough, dtype=np.int64))
        random.shuffle(keys)
    return [keys[at : at + _KEYS_A_ROUND] for at in range(0, len(keys), _KEYS_A_ROUND)]
