"""A random sample of a table's vectors, drawn inside the database.

Here: which rows, and their usable vectors. Not here: training on them (`ivfpq.training`).

A table's order is its history (genre by genre, year by year), so the first rows are no sample, and
reading every row to choose some costs the whole table. Random primary keys are looked up instead.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import connected, read
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.reading import (
    Page,
    count_rows,
    every_idx,
    join_pages,
    rows_by_idx,
    table_columns,
)

_KEYS_A_ROUND = 4096
# Below one row in this many keys, listing the keys is cheaper than guessing them.
_SPARSE = 16
# Looking a random row up is work of the server's: on one connection the client waited for half of it.
_CONNECTIONS = 2


@dataclass(frozen=True)
class Sample:
    """vectors (n, d) float32 in random order, and their idx (n,) int64.

    table_rows: rows there are; rejected: reason -> rows.
    """

    idx: NDArray[np.int64]
    vectors: NDArray[np.float32]
    table_rows: int
    rejected: dict[str, int]


def sample_vectors(
    engine: Engine,
    spec: IndexSpec,
    wanted: Callable[[int], int],
    *,
    doing: str,
    seed: int,
    on_rows: Callable[[int, int], None] = lambda done, wanted: None,
) -> Sample:
    """Draw `wanted(table rows)` usable vectors at random over the whole table, the same for the same seed.

    Draws keys between the smallest and the largest idx without replacement until there are enough, so
    gaps only cost tries. Memory: the sample, and a few rounds of rows. doing: for failures, as in
    `connections.databases.explained`, which they are of; PermanentFailure for a missing table or column.
    """
    with connected(engine, doing) as connection:
        table_columns(connection, spec)
        table_rows, low, high = count_rows(connection, spec)
        sparse = high - low >= _SPARSE * table_rows
        every = every_idx(connection, spec) if sparse else None
    target = min(wanted(table_rows), table_rows)
    random = np.random.default_rng(seed)
    vectors, idx = np.empty((target, spec.dimension), np.float32), np.empty(target, np.int64)
    rejected: dict[str, int] = {}
    done = 0
    if every is not None:
        keys = random.permutation(every)
    else:
        keys = _random_keys(random, low, high, target, table_rows)
    likely = _keys_for(target, high - low + 1, table_rows)
    a_round = min(_KEYS_A_ROUND, likely)
    rounds = [keys[at : at + a_round] for at in range(0, len(keys), a_round)]
    for page in _looked_up(engine, spec, rounds, -(-likely // a_round), doing):
        decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
        for reason in Reason:
            if reason and (count := int((decoded.reasons == reason).sum())):
                rejected[reason.name.lower()] = rejected.get(reason.name.lower(), 0) + count
        # Rows come in key order: the first of a round would be the oldest of the table.
        usable = random.permutation(np.flatnonzero(decoded.reasons == Reason.OK))[: target - done]
        decoded.vectors.take(usable, axis=0, out=vectors[done : done + len(usable)], mode="clip")
        idx[done : done + len(usable)] = page.idx[usable]
        done += len(usable)
        on_rows(done, target)
        if done >= target:
            break
    return Sample(idx[:done], vectors[:done], table_rows, rejected)


def _looked_up(
    engine: Engine, spec: IndexSpec, rounds: Sequence[NDArray[np.int64]], likely: int, doing: str
) -> Iterator[Page]:
    """The rows of each round of keys, in order; those of the `likely` first ones ahead of being asked for."""

    def look_up(keys: NDArray[np.int64]) -> Page:
        return read(engine, doing, lambda connection: join_pages(rows_by_idx(connection, spec, keys)))

    with ThreadPoolExecutor(_CONNECTIONS, "sample") as pool:
        ahead: collections.deque[Future[Page]] = collections.deque()
        try:
            for number, keys in enumerate(rounds, 1):
                ahead.append(pool.submit(look_up, keys))
                while ahead and (len(ahead) > _CONNECTIONS or number >= likely):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _keys_for(target: int, span: int, table_rows: int) -> int:
    """Keys to look up for `target` rows at this density, with some room for bad luck."""
    return int(target * (span / max(table_rows, 1)) * 1.1) + 64


def _random_keys(
    random: np.random.Generator, low: int, high: int, target: int, table_rows: int
) -> NDArray[np.int64]:
    """Distinct keys in random order: all there are, or several times as many as the target needs."""
    span = high - low + 1 if table_rows else 0
    enough = _keys_for(target, span, table_rows) + _KEYS_A_ROUND
    if span <= 4 * enough:
        return low + random.permutation(span).astype(np.int64)
    keys = low + np.unique(random.integers(0, span, 2 * enough, dtype=np.int64))
    return random.permutation(keys)
