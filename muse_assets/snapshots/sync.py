"""Bucket sync: make an index hold exactly the table's rows, touching only the buckets that differ.

Here: comparing digests, pulling changed buckets, taking old rows out and putting new ones in. One
mechanism for new, late, deleted, re-embedded and swapped rows, and for a full build, where every bucket
differs. Not here: files, or judging the result (`building`, `gate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.digests import BUCKET_ROWS, changed_buckets, empty_digests, join_digests
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.ivfpq.contents import Contents, list_ids, read_contents, remove_ids, sort_lists
from muse_assets.ivfpq.encoding import add_codes
from muse_assets.ivfpq.exact_neighbors import NearestRows
from muse_assets.snapshots.encoding_workers import Recruit, encode_parts, in_process
from muse_assets.snapshots.parts import require_same_database
from muse_assets.snapshots.progress import Progress, silent
from muse_assets.snapshots.store import RowState
from muse_assets.snapshots.table_state import TableState


@dataclass(frozen=True)
class Synced:
    """The outcome: rows the index now stands for, the valid ids, and what changed.

    expected_ids (n,) int64 ascending; added_ids (a,), recoded_ids (r,) int64: those of them that are
    new, and that encode otherwise than before. encoded_on, dashboard: of those who did it.
    """

    state: RowState
    expected_ids: NDArray[np.int64]
    added_ids: NDArray[np.int64]
    recoded_ids: NDArray[np.int64]
    removed: int
    encoded_on: str = ""
    dashboard: str | None = None

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
    recruit: Recruit = in_process,
) -> Synced:
    """Change `index`, which holds the rows of `before`, to hold exactly the rows of `table`.

    The queries' exact neighbors follow: rows of the buckets that are pulled leave their lists, and the
    pulled ones are compared with every query. `recruit` says who encodes; memory here holds the index and
    the parts that came back. Raises PassingFailure when the table is emptied while it is read, or when its
    rows never agree with their digests.
    """
    held = list_ids(index)
    held_buckets = (held - spec.id_offset) // BUCKET_ROWS
    # Ids that no digest vouches for: an adopted file may hold rows that are gone, or filled otherwise.
    unproved = held_buckets[~np.isin(held_buckets, before.digests.bucket)]
    changed = np.union1d(changed_buckets(before.digests, table.digests), unproved)
    of_changed = np.isin(held_buckets, changed)
    touched, kept = held[of_changed], held[~of_changed]
    old = read_contents(index, only=touched)
    remove_ids(index, touched)

    listed = (before.neighbors.ids - spec.id_offset) // BUCKET_ROWS
    nearest = NearestRows(before.queries, before.neighbors.without(np.isin(listed, changed)))
    wanted = table.digests.select(changed)
    total = wanted.total_rows
    nothing = np.empty(0, np.int64)
    valid, moved, fresh = [nothing], [nothing], [empty_digests()]
    stays = ~np.isin(before.rejected_idx // BUCKET_ROWS, changed)
    rejected, reasons = [before.rejected_idx[stays]], [before.rejected_reason[stays]]
    done = 0
    with recruit(engine, spec, index, before.queries, total) as workers:
        watch = f", to be watched at {workers.dashboard}" if workers.dashboard else ""
        on_progress(f"encoding on {workers.where}{watch}", 0, 0)
        for part in encode_parts(workers, wanted, table.newest_idx, nearest):
            add_codes(index, part.ids, part.codes)
            nearest.merge(part.neighbors)
            valid.append(part.ids)
            rejected.append(part.rejected_idx)
            reasons.append(part.rejected_reason)
            moved.append(part.moved)
            fresh.append(part.digests)
            done += len(part.ids)
            on_progress("encoding", done, total)
    all_moved = np.concatenate(moved)
    if workers.own_database:
        require_same_database(engine, spec, table.digests, all_moved, table.newest_idx)
    sort_lists(index)
    digests = table.digests.replaced(all_moved, join_digests(fresh))
    require_still_there(spec, table.digests.total_rows, digests.total_rows)

    now_valid = np.concatenate(valid)
    rejected_idx, rejected_reason = np.concatenate(rejected), np.concatenate(reasons)
    order = np.argsort(rejected_idx, kind="stable")
    state = RowState(
        digests, rejected_idx[order], rejected_reason[order], before.queries, nearest.hand_over()
    )
    # Not by intersect1d, which takes 59 bytes and 1.7 us a row of a full build.
    known = np.isin(now_valid, old.ids)
    again = np.sort(now_valid[known])
    return Synced(
        state=state,
        expected_ids=np.sort(np.concatenate([kept, now_valid])),
        added_ids=now_valid[~known],
        recoded_ids=_recoded(index, old, again),
        removed=len(old.ids) - len(again),
        encoded_on=workers.where,
        dashboard=workers.dashboard,
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


def _recoded(index: Any, old: Contents, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of `ids` (n,) ascending whose list or code is not what it was."""
    new = read_contents(index, only=ids)
    rows = np.searchsorted(old.ids, ids)
    different = (old.lists[rows] != new.lists) | (old.codes[rows] != new.codes).any(axis=1)
    changed: NDArray[np.int64] = ids[different]
    return changed
