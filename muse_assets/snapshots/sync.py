"""Bucket sync: make an index hold exactly the table's rows, touching only the buckets that differ.

Here: comparing digests, pulling changed buckets, taking old rows out and putting new ones in. One
mechanism for new, late, deleted, re-embedded and swapped rows, and for a full build, where every bucket
differs. Not here: files, or judging the result (`building`, `gate`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.digests import (
    BUCKET_ROWS,
    Digests,
    changed_buckets,
    digest_rows,
    read_digests,
)
from muse_assets.embeddings.reading import (
    Bounds,
    Page,
    freeze,
    read_ranges,
)
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.ivfpq.contents import Contents, list_ids, read_contents, remove_ids, sort_lists
from muse_assets.ivfpq.encoding import fill
from muse_assets.ivfpq.exact_neighbors import NearestRows
from muse_assets.snapshots.progress import Progress, silent
from muse_assets.snapshots.store import RowState
from muse_assets.snapshots.table_state import TableState

_PAGE_ROWS = 4096
_RANGES_A_PAGE = 100
# A page lost, or a bucket that moved: that page again, not the whole build.
_PAGE_TRIES = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Synced:
    """The outcome: rows the index now stands for, the valid ids, and what changed.

    expected_ids (n,) int64 ascending; added_ids (a,), recoded_ids (r,) int64: those of them that are
    new, and that encode otherwise than before.
    """

    state: RowState
    expected_ids: NDArray[np.int64]
    added_ids: NDArray[np.int64]
    recoded_ids: NDArray[np.int64]
    removed: int

    @property
    def added(self) -> int:
        """Rows that are new."""
        return len(self.added_ids)

    @property
    def reembedded(self) -> int:
        """Rows that encode otherwise than before."""
        return len(self.recoded_ids)

    @property
    def replaced(self) -> int:
        """Rows in whose place stands another vector: under their id, or under a new one."""
        return min(self.added, self.removed) + self.reembedded


def synchronize(
    engine: Engine,
    spec: IndexSpec,
    index: Any,
    before: RowState,
    table: TableState,
    on_progress: Progress = silent,
) -> Synced:
    """Change `index`, which holds the rows of `before`, to hold exactly the rows of `table`.

    The queries' exact neighbors follow: rows of the buckets that are pulled leave their lists, and the
    pulled ones are compared with every query, in the reading thread.

    A bucket whose pulled bytes do not digest to what the database said moved meanwhile, or arrived
    short: it is digested again as of the moment of the pull, and pulled again where that differs too.
    Raises PassingFailure when they never agree, or when the table is emptied while it is read.
    """
    held = list_ids(index)
    held_buckets = (held - spec.id_offset) // BUCKET_ROWS
    # Ids that no digest vouches for: an adopted file may hold rows that are gone, or filled otherwise.
    unproved = np.setdiff1d(held_buckets, before.digests.bucket)
    changed = np.union1d(changed_buckets(before.digests, table.digests), unproved)
    of_changed = np.isin(held_buckets, changed)
    touched, kept = held[of_changed], held[~of_changed]
    old = read_contents(index, only=touched)
    remove_ids(index, touched)

    listed = (before.neighbors.ids - spec.id_offset) // BUCKET_ROWS
    nearest = NearestRows(before.queries, before.neighbors.without(np.isin(listed, changed)))
    pulled = _Pulled(engine, spec, table, nearest)
    total = int(table.digests.select(changed).rows.sum())
    done = 0

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        on_progress("encoding", done, total)

    # Closed here and not when a kept traceback lets go: the reading thread ends with the build.
    with contextlib.closing(_ahead(pulled.batches(changed))) as batches:
        fill(index, batches, on_rows)
    sort_lists(index)
    require_still_there(spec, table.digests.total_rows, pulled.digests.total_rows)

    valid = np.concatenate([np.empty(0, np.int64), *pulled.valid])
    stays = ~np.isin(before.rejected_idx // BUCKET_ROWS, changed)
    rejected_idx = np.concatenate([before.rejected_idx[stays], *pulled.rejected_idx])
    rejected_reason = np.concatenate([before.rejected_reason[stays], *pulled.rejected_reason])
    order = np.argsort(rejected_idx, kind="stable")
    state = RowState(
        pulled.digests, rejected_idx[order], rejected_reason[order], before.queries, nearest.hand_over()
    )
    again = np.intersect1d(old.ids, valid)
    return Synced(
        state=state,
        expected_ids=np.sort(np.concatenate([kept, valid])),
        added_ids=np.setdiff1d(valid, again, assume_unique=True),
        recoded_ids=_recoded(index, old, again),
        removed=len(old.ids) - len(again),
    )


def require_plausible(spec: IndexSpec, synced: Synced, previous_rows: int, *, confirm_shrink: bool) -> None:
    """Raise PermanentFailure when too many rows are unusable, or vanished since the last snapshot."""
    rejected = synced.state.rejected_counts()
    rows = synced.state.digests.total_rows
    if sum(rejected.values()) > spec.max_rejected_share * rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        examples = ", ".join(str(idx) for idx in synced.state.rejected_idx[:5])
        raise PermanentFailure(
            f"{spec.name}: {sum(rejected.values()):,} of {rows:,} rows of {spec.table} cannot be indexed "
            f"({reasons}; column {spec.embedding_column}; idx {examples}), "
            f"more than {spec.max_rejected_share:.1%}.",
            next_step=f"mend those rows, or raise max_rejected_share of {spec.name} in the catalog.",
        )
    now = len(synced.expected_ids)
    if now < previous_rows * (1 - spec.max_shrink_share) and not confirm_shrink:
        raise PermanentFailure(
            f"{spec.name}: {spec.table} has {now:,} usable rows, the last snapshot had {previous_rows:,}: "
            f"more than {spec.max_shrink_share:.0%} vanished.",
            next_step="if that is right, launch the index again with confirm_shrink: true in its config; "
            "else restore the table. The live file still serves the old rows.",
        )
    if not now:
        raise PermanentFailure(
            f"{spec.name}: {spec.table} has no usable rows.", next_step="fill the table, then launch again."
        )


def require_still_there(spec: IndexSpec, digested: int, pulled: int) -> None:
    """Raise PassingFailure when more rows than may shrink away went while a build read them."""
    if pulled < digested * (1 - spec.max_shrink_share):
        raise PassingFailure(
            f"{spec.name}: {digested - pulled:,} of {digested:,} rows of {spec.table} vanished while they "
            "were read (TRUNCATE, or a mass deletion).",
            next_step="find out who empties the table; launch the run again when it stands still.",
        )


class _Pulled:
    """Pages of changed buckets, each proved against its digest, with what was learned on the way."""

    def __init__(
        self,
        engine: Engine,
        spec: IndexSpec,
        table: TableState,
        nearest: NearestRows,
    ) -> None:
        self.engine, self.spec, self.nearest = engine, spec, nearest
        self.newest_idx = table.newest_idx
        self.digests = table.digests
        self.valid: list[NDArray[np.int64]] = []
        self.rejected_idx: list[NDArray[np.int64]] = []
        self.rejected_reason: list[NDArray[np.uint8]] = []

    def batches(self, changed: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """FAISS ids (n,) int64 and vectors (n, d) float32 of the valid rows in the changed buckets."""
        for buckets in _page_plan(self.digests.select(changed)):
            page = self._pull(buckets)
            decoded = decode(page.payloads, self.spec.dimension, self.spec.encoding, self.spec.normalize)
            good = decoded.reasons == Reason.OK
            ids = page.idx[good] + self.spec.id_offset
            self.valid.append(ids)
            self.rejected_idx.append(page.idx[~good])
            self.rejected_reason.append(decoded.reasons[~good])
            vectors = decoded.vectors if good.all() else decoded.vectors[good]
            self.nearest.take(ids, vectors)
            yield ids, vectors

    def _pull(self, buckets: NDArray[np.int64]) -> Page:
        doing = f"reading {self.spec.table} for {self.spec.name}"
        return read(self.engine, doing, partial(self._pull_once, buckets), tries=_PAGE_TRIES)

    def _pull_once(self, buckets: NDArray[np.int64], connection: Connection) -> Page:
        # One view for both: without it, 110 updates/s to a page's rows outran five tries in 3 of 7 runs.
        freeze(connection)
        page = read_ranges(connection, self.spec, self._ranges(buckets))
        found = digest_rows(page.idx, page.payloads)
        moved = changed_buckets(self.digests.select(buckets), found)
        if len(moved):
            fresh = read_digests(connection, self.spec, self._ranges(moved))
            self.digests = self.digests.replaced(moved, fresh)
            if len(changed_buckets(self.digests.select(buckets), found)):
                raise PassingFailure(
                    f"{self.spec.name}: rows of {self.spec.table} near idx "
                    f"{int(moved[0]) * BUCKET_ROWS} arrived otherwise than the database digests them.",
                    next_step="launch the run again; if it recurs, check that the table is InnoDB and "
                    "the connection sound.",
                )
        return page

    def _ranges(self, buckets: NDArray[np.int64]) -> list[Bounds]:
        if not len(buckets):
            return []
        breaks = np.flatnonzero(np.diff(buckets) != 1) + 1
        return [
            Bounds(int(run[0]) * BUCKET_ROWS, min(int(run[-1] + 1) * BUCKET_ROWS - 1, self.newest_idx))
            for run in np.split(buckets, breaks)
        ]


def _page_plan(digests: Digests) -> Iterator[NDArray[np.int64]]:
    """Buckets to pull in one statement: about _PAGE_ROWS rows in at most _RANGES_A_PAGE runs."""
    start, rows, runs = 0, 0, 0
    for at in range(len(digests.bucket)):
        new_run = at == start or digests.bucket[at] != digests.bucket[at - 1] + 1
        if at > start and (rows + digests.rows[at] > _PAGE_ROWS or (new_run and runs == _RANGES_A_PAGE)):
            yield digests.bucket[start:at]
            start, rows, runs, new_run = at, 0, 0, True
        rows += int(digests.rows[at])
        runs += new_run
    if len(digests.bucket):
        yield digests.bucket[start:]


def _recoded(index: Any, old: Contents, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of `ids` (n,) ascending whose list or code is not what it was."""
    new = read_contents(index, only=ids)
    rows = np.searchsorted(old.ids, ids)
    different = (old.lists[rows] != new.lists) | (old.codes[rows] != new.codes).any(axis=1)
    changed: NDArray[np.int64] = ids[different]
    return changed


def _ahead(source: Iterable[T], depth: int = 2) -> Generator[T]:
    """Run `source` in a thread of its own, at most `depth` items ahead: reading overlaps encoding."""
    items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return items.put(item, timeout=0.2)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in source:
                put((item, None))
                if stopped.is_set():
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    reader = threading.Thread(target=run, name="read-ahead", daemon=True)
    reader.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        reader.join()
