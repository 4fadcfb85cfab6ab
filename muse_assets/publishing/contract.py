"""The search server's contract, checked before a file goes live.

Here: pure comparison of facts. Not here: reading files, or deciding what to do about a violation.
"""

from __future__ import annotations

from muse_assets.catalog import IndexSpec
from muse_assets.manifest import Manifest
from muse_assets.publishing.live import LiveFile

# The server holds every file once per worker process, 32 times over.
MAX_GROWTH = 1.5


def violations(
    spec: IndexSpec, candidate: Manifest, live: LiveFile | None, *, confirm_size: bool
) -> list[str]:
    """Why the server could not serve `candidate` in place of `live`; empty if it can.

    Against the catalog: index, dimension, metric, id offset, an IVF class. Against an undamaged live
    file: the same index class, dimension, metric and id offset, and at most 1.5 times its size unless
    `confirm_size`.
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
            " a deploy that confirms the size takes it"
        )
    return found
