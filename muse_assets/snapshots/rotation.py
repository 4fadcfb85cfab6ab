"""Which buckets a daily build digests anew, so that each of them comes round within `verify_days`.

Here: when each stretch of buckets was last digested and which stretches are due: numbers only. Not here:
asking the database (`table_state`), or keeping the days (`store`).

A stretch covers gaps too: a row that appears where no bucket was known is found when its stretch comes
round. By stretches, not by bucket: 100M rows are 6.25M buckets, but a rotation of 7 days is some ten of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray

from muse_assets.embeddings.digests import BUCKET_ROWS

# The newest 1,048,576 idx (8 steps of the digest) are digested every day: rows are appended, transactions
# commit late and fresh rows are corrected there. At 1.2 s of the server's CPU a million rows that is cheap.
TAIL_BUCKETS = 1_048_576 // BUCKET_ROWS


@dataclass(frozen=True)
class Verified:
    """When each bucket was last digested, gaps included.

    bucket, day (s,) int64: from bucket[i] to below bucket[i + 1] on day[i], the ordinal of a date, 0 for
    never. bucket ascends from 0; past the last one nothing was ever digested, so its day is 0.
    """

    bucket: NDArray[np.int64]
    day: NDArray[np.int64]

    @property
    def oldest(self) -> date | None:
        """The day since when no bucket has gone without a digest; None where there is none."""
        days = self.day[self.day > 0]
        return date.fromordinal(int(days.min())) if len(days) else None

    def on(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The days of `buckets` (n,), whether there are rows in them or not."""
        days: NDArray[np.int64] = self.day[np.searchsorted(self.bucket, buckets, side="right") - 1]
        return days

    def digested(self, low: int, high: int, asked: NDArray[np.int64], day: date) -> Verified:
        """After `asked` (k, 2), first and last buckets within low..high, was digested on `day`.

        A bucket keeps a newer day, as when a past day is built again. Outside low..high there are no rows.
        """
        edges = np.unique(np.concatenate([[0, low, high + 1], self.bucket, asked[:, 0], asked[:, 1] + 1]))
        days = np.where((edges >= low) & (edges <= high), self.on(edges), 0)
        days = np.where(covers(asked, edges), np.maximum(days, day.toordinal()), days)
        kept = np.concatenate([[True], days[1:] != days[:-1]])
        return Verified(edges[kept], days[kept])


def never() -> Verified:
    """Of a table that nobody digested."""
    return Verified(np.zeros(1, np.int64), np.zeros(1, np.int64))


def due_stretches(
    verified: Verified, known: NDArray[np.int64], low: int, high: int, day: date, verify_days: int
) -> NDArray[np.int64]:
    """What of the buckets low..high a build of `day` digests: (k, 2) first and last ones, ascending.

    That is the tail; whatever was not digested since `verify_days` days before; and, for each day since the
    last build, a `verify_days`th of the `known` buckets (b,), so that at one build a day nothing becomes due
    first. These go on in the order of idx, from the stretch digested longest ago: oldest first, whatever
    leaves the tail would stay a stretch of its own for good (one more statement for each day).
    """
    end = int(verified.bucket[-1])
    tail = max(low, min(end - 1, high) - TAIL_BUCKETS)
    edges = np.unique(np.clip([low, tail, *verified.bucket], low, tail))
    days, at = verified.on(edges[:-1]), np.searchsorted(known, edges)
    today = day.toordinal()
    overdue = days <= today - verify_days
    share = -(-len(known) // verify_days) * max(today - int(verified.day.max()), 0)
    share -= int(np.diff(at)[overdue].sum())
    asked = [(tail, high)]
    for piece in np.roll(np.arange(len(days)), -int(days.argmin()) if len(days) else 0):
        first, last = int(edges[piece]), int(edges[piece + 1]) - 1
        if not overdue[piece]:
            if share <= 0:
                continue
            begin, stop = int(at[piece]), int(at[piece + 1])
            if stop - begin > share:
                last = int(known[begin + share - 1])
            share -= stop - begin
        asked.append((first, last))
    return np.array(sorted(asked), np.int64)


def covers(stretches: NDArray[np.int64], buckets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `buckets` (n,) lie within the `stretches` (k, 2), k > 0, ascending: (n,) bool."""
    at = np.searchsorted(stretches[:, 0], buckets, side="right") - 1
    inside: NDArray[np.bool_] = (at >= 0) & (buckets <= stretches[at, 1])
    return inside
