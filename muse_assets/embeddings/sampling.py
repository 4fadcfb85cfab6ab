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
from muse_assets.embeddings.decoding import Decoded, Reason, decode
from muse_assets.embeddings.reading import (
    KEYS_A_QUERY,
    count_rows,
    every_idx,
    join_pages,
    rows_by_idx,
    table_columns,
)

# Drawn beyond those that should be enough, for rows that are unusable.
_SPARE_KEYS = 4096
# Below one row in this many keys, listing the keys is cheaper than guessing them.
_SPARSE = 16
# Looking a random row up is 4 us of the server's, 1.8 of the client's, one after the other: 98,304 of 1M rows
# took 0.63 s on one connection, 0.40 on two, 0.34 on three, 0.33 on four and on six.
_CONNECTIONS = 4


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
    # Rows come near their neighbors of the table: where each goes is drawn apart.
    places = random.permutation(target)
    rejected: dict[str, int] = {}
    done, least = 0, 1
    if every is not None:
        keys, span = random.permutation(every), len(every)
    else:
        keys, span = _random_keys(random, low, high, target, table_rows), high - low + 1
    with ThreadPoolExecutor(_CONNECTIONS, "sample") as pool:
        while done < target and len(keys):
            expected = -(-(target - done) * span // table_rows)
            drawn, keys = np.split(keys, [max(expected, least)])
            # Where rows are unusable, what is missing yet would be drawn in ever smaller rounds.
            least = KEYS_A_QUERY
            for found, decoded in _looked_up(pool, engine, spec, _rounds(drawn, random), doing):
                for reason in Reason:
                    if reason and (count := int((decoded.reasons == reason).sum())):
                        rejected[reason.name.lower()] = rejected.get(reason.name.lower(), 0) + count
                usable = np.flatnonzero(decoded.reasons == Reason.OK)
                if len(usable) > target - done:
                    usable = random.permutation(usable)[: target - done]
                at = places[done : done + len(usable)]
                all_of_them = len(usable) == len(found)
                vectors[at] = decoded.vectors if all_of_them else decoded.vectors[usable]
                idx[at] = found[usable]
                done += len(usable)
                on_rows(done, target)
                if done >= target:
                    break
    if done < target:
        filled = np.sort(places[:done])
        vectors, idx = vectors[filled], idx[filled]
    return Sample(idx, vectors, table_rows, rejected)


def _rounds(keys: NDArray[np.int64], random: np.random.Generator) -> list[NDArray[np.int64]]:
    """Keys to look up at once: near each other, for the server takes 4 us a row then and 5 if they are not;
    in random order, for the last ones may not be needed."""
    ascending = np.sort(keys)
    rounds = [ascending[at : at + KEYS_A_QUERY] for at in range(0, len(keys), KEYS_A_QUERY)]
    return [rounds[number] for number in random.permutation(len(rounds))]


def _looked_up(
    pool: ThreadPoolExecutor,
    engine: Engine,
    spec: IndexSpec,
    rounds: Sequence[NDArray[np.int64]],
    doing: str,
) -> Iterator[tuple[NDArray[np.int64], Decoded]]:
    """idx (n,) and vectors of each round of keys, in order; the next rounds are looked up meanwhile."""

    def look_up(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], Decoded]:
        page = read(engine, doing, lambda connection: join_pages(rows_by_idx(connection, spec, keys)))
        return page.idx, decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)

    ahead: collections.deque[Future[tuple[NDArray[np.int64], Decoded]]] = collections.deque()
    try:
        for keys in rounds:
            ahead.append(pool.submit(look_up, keys))
            if len(ahead) > _CONNECTIONS:
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
    enough = _keys_for(target, span, table_rows) + _SPARE_KEYS
    if span <= 4 * enough:
        return low + random.permutation(span).astype(np.int64)
    # Not by np.unique, which hashes them: 440,000 took 0.11 to 0.2 s, so 0.02.
    keys = np.sort(random.integers(low, high + 1, 2 * enough, dtype=np.int64))
    return random.permutation(keys[np.diff(keys, prepend=low - 1) > 0])
