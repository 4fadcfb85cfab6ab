"""The search server's contract, checked before a file goes live.

Here: pure comparison of facts. Not here: reading files, or deciding what to do about a violation.
"""

from __future__ import annotations

from muse_assets.catalog import IndexSpec
from muse_assets.manifest import Manifest
from muse_assets.publishing.live import LiveFile

# The server holds every file once per worker process, 32 times over.
MAX_GROWTH = 1.5
# A table of a few dozen rows lost 7 points with the first ones that came.
_ENOUGH_QUERIES = 100


def violations(
    spec: IndexSpec,
    candidate: Manifest,
    live: LiveFile | None,
    *,
    confirm_size: bool = False,
    confirm_shrink: bool = False,
    confirm_recall: bool = False,
) -> list[str]:
    """Why the server could not serve `candidate` in place of `live`; empty if it can.

    Against the catalog: index, dimension, metric, id offset, an IVF class. Against an undamaged live
    file: the same index class, dimension, metric and id offset, at most 1.5 times its size unless
    `confirm_size`, not fewer rows than the index's `max_shrink_share` allows unless `confirm_shrink`, and
    not less recall than `max_recall_drop` allows unless `confirm_recall`.
    An adopted file's rows are what its `ntotal` says, which is never fewer than it holds.
    """
    found = []
    if candidate.index != spec.name:
        found.append(f"it is a file of index {candidate.index}")
    if not candidate.index_class.startswith("IndexIVF"):
        found.append(f"index class {candidate.index_class} does not take the server's SearchParametersIVF")
    for field in ("dimension", "metric", "id_offset"):
        ours, theirs = getattr(candidate, field), getattr(spec, field)
        if ours != theirs:
            found.append(f"{field} is {ours}, the catalog says {theirs}")
    if live is None or live.manifest is None:
        return found
    for field in ("index_class", "dimension", "metric", "id_offset"):
        ours, theirs = getattr(candidate, field), getattr(live.manifest, field)
        if ours != theirs:
            found.append(f"{field} is {ours}, the live file has {theirs}")
    if candidate.size > MAX_GROWTH * live.size and not confirm_size:
        found.append(
            f"its {candidate.size:,} bytes are more than {MAX_GROWTH} times the live file's {live.size:,};"
            " a deploy with confirm_size: true takes it"
        )
    # The build compares with its parent snapshot, which need not be what the server has.
    if candidate.rows < live.manifest.rows * (1 - spec.max_shrink_share) and not confirm_shrink:
        found.append(
            f"its {candidate.rows:,} rows are over {spec.max_shrink_share:.0%} fewer than the live file's"
            f" {live.manifest.rows:,}; a deploy with confirm_shrink: true takes it"
        )
    before = _live_recall(candidate, live.manifest)
    if before is not None and candidate.recall_at_10 < before - spec.max_recall_drop and not confirm_recall:
        found.append(
            f"its recall@10 of {candidate.recall_at_10:.3f} is over {spec.max_recall_drop:.3f} below the live"
            f" file's {before:.3f}; retrain, or a deploy with confirm_recall: true takes it"
        )
    return found


def _live_recall(candidate: Manifest, live: Manifest) -> float | None:
    """recall@10 of the live file on the candidate's queries, where that is known and they are enough."""
    if candidate.queries < _ENOUGH_QUERIES:
        return None
    if live.sha256 == candidate.previous:
        return candidate.previous_recall_at_10
    return live.recall_at_10 if live.queries and live.cluster == candidate.cluster else None
