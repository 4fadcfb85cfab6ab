"""Bucket digests: what a range of `idx` holds, in four numbers, computed by the database or from rows.

Here: the digest, its query and its twin in numpy. Not here: what to do when two digests differ
(`snapshots.sync`).

A bucket is BUCKET_ROWS consecutive idx. Its digest is the row count, SUM(idx) and two content sums of
CRC32 x idx, over the whole payload and over its first half. BIT_XOR(CRC32) misses every swap of two
vectors (0 of 100 found, the products 100 of 100). A re-embedding changes both halves, so it is missed with
a chance of 2^-62; a change confined to one half, which no model makes, with 2^-31.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text
from zlib_ng.zlib_ng import crc32

from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.payloads import Joined, Payload
from muse_assets.embeddings.reading import Bounds, joins_values, listed_numbers, pages, quoted

# The query's cost is the scan (2 s for 200k cold rows at 16 to 8192 a bucket alike), so buckets are small:
# one changed row makes 16 be pulled and encoded, at 42 us a row, and a bucket took 6 us to fetch when it came
# as a row. By these two figures, with 1,000 scattered rows of 1M changed, 32 a bucket cost 0.5 CPU-s more and
# 8 no less.
BUCKET_ROWS = 16
# Products are reduced modulo a prime, so that a bucket's sum fits SQLite's 64-bit integers; it is above
# 2^31 and weights are 1 to 2^31, so that no row weighs 0.
_MODULUS = 2_147_483_659
_IDX_MASK = 0x7FFFFFFF
# A million cold rows of 2 KB took 10 s, the read time-out is 120 s; and several steps can be asked at once.
_STEP_BUCKETS = 8192
_MAX_STEPS = 1000
# Not that of an empty payload, 0: the two are rejected for different reasons. Of half a payload both are 0,
# for SQLite calls half of an empty one NULL.
_CRC_OF_NULL = 1


@dataclass(frozen=True)
class Digests:
    """Non-empty buckets, ascending; every column (b,) int64. `rows` counts rejected rows too."""

    bucket: NDArray[np.int64]
    rows: NDArray[np.int64]
    idx_sum: NDArray[np.int64]
    whole: NDArray[np.int64]
    half: NDArray[np.int64]

    @property
    def total_rows(self) -> int:
        """Rows in the table, rejected ones included."""
        return int(self.rows.sum())

    def columns(self) -> NDArray[np.int64]:
        """(b, 5) int64: what two digests of one bucket have to agree in, and the bucket."""
        return np.stack([self.bucket, self.rows, self.idx_sum, self.whole, self.half], axis=1)

    def part(self, start: int, stop: int) -> Digests:
        """The buckets at places `start` to `stop`, as views."""
        return Digests(
            *(column[start:stop] for column in (self.bucket, self.rows, self.idx_sum, self.whole, self.half))
        )

    def select(self, buckets: NDArray[np.int64]) -> Digests:
        """Only those of `buckets`."""
        return _from_columns(self.columns()[np.isin(self.bucket, buckets)])

    def replaced(self, buckets: NDArray[np.int64], by: Digests) -> Digests:
        """With all that is known of `buckets` replaced by `by`."""
        kept = self.columns()[~np.isin(self.bucket, buckets)]
        return _from_columns(np.concatenate([kept, by.columns()]))


def empty_digests() -> Digests:
    """Of a table without rows."""
    return _from_columns(np.empty((0, 5), np.int64))


def changed_buckets(before: Digests, after: Digests) -> NDArray[np.int64]:
    """Buckets that differ, appeared or vanished, ascending."""
    both, was, now = np.intersect1d(before.bucket, after.bucket, assume_unique=True, return_indices=True)
    equal = (before.columns()[was] == after.columns()[now]).all(axis=1)
    return np.setdiff1d(np.union1d(before.bucket, after.bucket), both[equal], assume_unique=True)


def digest_rows(idx: NDArray[np.int64], payloads: Sequence[Payload]) -> Digests:
    """The digests of rows as pulled, equal to what the database says of the same rows."""
    if not len(idx):
        return empty_digests()
    found = _joined_crcs(payloads) if isinstance(payloads, Joined) else _listed_crcs(payloads)
    crcs = np.fromiter(found, np.uint64, 2 * len(idx)).reshape(-1, 2)
    weight = ((idx & _IDX_MASK) + 1).astype(np.uint64)
    products = ((crcs * weight[:, None]) % np.uint64(_MODULUS)).astype(np.int64)
    by_row = np.stack([np.ones_like(idx), idx, products[:, 0], products[:, 1]], axis=1)
    order = np.argsort(idx, kind="stable")
    bucket, first = np.unique(idx[order] // BUCKET_ROWS, return_index=True)
    return _from_columns(np.column_stack([bucket, np.add.reduceat(by_row[order], first, axis=0)]))


def _listed_crcs(payloads: Iterable[Payload]) -> Iterator[int]:
    """CRC32 of each whole payload, then of its first half; the former goes on from the latter."""
    for payload in payloads:
        if payload is None:
            yield from (_CRC_OF_NULL, 0)
            continue
        raw = memoryview(payload.encode("utf-8") if isinstance(payload, str) else payload)
        middle = len(raw) // 2
        half = crc32(raw[:middle])
        yield crc32(raw[middle:], half)
        yield half


def _joined_crcs(payloads: Joined) -> Iterator[int]:
    """The same without taking the payloads apart: 0.4 us a row of 2 KB, where one by one it is 0.85."""
    whole = memoryview(payloads.buffer)
    middles, ends = payloads.starts + payloads.lengths // 2, payloads.starts + payloads.lengths
    for start, middle, end in zip(payloads.starts.tolist(), middles.tolist(), ends.tolist(), strict=True):
        if end < start:  # NULL
            yield from (_CRC_OF_NULL, 0)
            continue
        half = crc32(whole[start:middle])
        yield crc32(whole[middle:end], half)
        yield half


def read_digests(connection: Connection, spec: IndexSpec, bounds: Sequence[Bounds]) -> Digests:
    """Digests of all rows within `bounds`, by aggregate queries; no payload leaves the database.

    A long range is digested in `steps`, a statement each. Call it within `reading.freeze` where all of
    them have to see one moment.

    A database without CRC32 (neither MySQL, MariaDB nor SQLite) is digested from pulled rows instead:
    the same answer at the cost of reading the table.
    """
    found = [empty_digests()]
    for bound in bounds:
        if connection.dialect.name in ("mysql", "mariadb", "sqlite"):
            found += [_aggregate(connection, spec, step) for step in steps(bound)]
        else:
            for page in pages(connection, spec, [bound], BUCKET_ROWS):
                found.append(digest_rows(page.idx, page.payloads))
    return join_digests(found)


def steps(bound: Bounds) -> Iterator[Bounds]:
    """Ranges of whole buckets, of _STEP_BUCKETS each, but at most about a thousand of them."""
    span = bound.high - bound.low + 1
    width = max(_STEP_BUCKETS, -(-span // (_MAX_STEPS * BUCKET_ROWS))) * BUCKET_ROWS
    low = bound.low
    while low <= bound.high:
        high = min((low // BUCKET_ROWS) * BUCKET_ROWS + width - 1, bound.high)
        yield Bounds(low, high)
        low = high + 1


def join_digests(parts: Iterable[Digests]) -> Digests:
    """Digests of ranges that share no bucket, as one."""
    return _from_columns(np.concatenate([part.columns() for part in parts]))


def _aggregate(connection: Connection, spec: IndexSpec, bound: Bounds) -> Digests:
    table, column = quoted(connection, spec.table), quoted(connection, spec.embedding_column)
    sqlite = connection.dialect.name == "sqlite"
    bucket = f"idx / {BUCKET_ROWS}" if sqlite else f"idx DIV {BUCKET_ROWS}"
    # Halves are of bytes, as in `digest_rows`: of text, LEFT and substr count characters.
    if sqlite or spec.encoding == "json":
        column = f"CAST({column} AS {'BLOB' if sqlite else 'BINARY'})"
    half = (
        f"substr({column}, 1, length({column}) / 2)" if sqlite else f"LEFT({column}, LENGTH({column}) DIV 2)"
    )
    weight = f"((idx & {_IDX_MASK}) + 1)"
    # A million rows of 2 KB: 1.16 CPU-s of the server; 1.5 with COALESCE around CRC32, which computes it
    # twice, and with sums of integers, which are DECIMAL. A bucket's sum is below 2^36: exact in a double.
    of_null = f"{_CRC_OF_NULL} * {weight}"
    query = (
        f"SELECT {bucket} AS bucket, COUNT(*) AS row_count, SUM(idx) AS idx_sum, "
        f"SUM(CASE WHEN {column} IS NULL THEN {of_null} "
        f"ELSE (CRC32({column}) * {weight}) % {_MODULUS} END * 1e0) AS whole, "
        f"COALESCE(SUM((CRC32({half}) * {weight}) % {_MODULUS} * 1e0), 0) AS half "
        f"FROM {table} WHERE idx >= :low AND idx <= :high GROUP BY {bucket}"
    )
    values = {"low": bound.low, "high": bound.high}
    columns = _joined_columns(connection, query, values) if joins_values(connection) else None
    if columns is None:
        rows = connection.execute(text(query), values).all()
        columns = np.array([[int(value) for value in row] for row in rows], np.int64).reshape(-1, 5)
    return _from_columns(columns)


def _joined_columns(connection: Connection, query: str, values: dict[str, int]) -> NDArray[np.int64] | None:
    """The buckets (b, 5) in one value; None where it was cut off.

    A bucket fetched as a row costs the client 5 us, in a list 0.5; the server's time is the same.
    """
    joined = (
        "SELECT COUNT(*), SUM(half), "
        "GROUP_CONCAT(bucket, ',', row_count, ',', idx_sum, ',', whole, ',', half) "
        f"FROM ({query}) AS buckets"
    )
    count, last_sum, listed = connection.execute(text(joined), values).one()
    numbers = listed_numbers(listed)
    # A list that was cut off within its last number has as many as it should.
    if len(numbers) != 5 * count or numbers[4::5].sum() != int(last_sum or 0):
        return None
    return numbers.reshape(-1, 5)


def _from_columns(columns: NDArray[np.int64]) -> Digests:
    columns = columns[np.argsort(columns[:, 0], kind="stable")]
    return Digests(*(np.ascontiguousarray(columns[:, i]) for i in range(5)))
