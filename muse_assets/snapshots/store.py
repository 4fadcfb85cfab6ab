"""The work directory: which snapshots there are, what rows each one covers, which one to build on.

Here: finding, verifying and pruning dated snapshot files and their row facts. Not here: building one
(`building`), or the server's directory (`publishing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.decoding import Reason
from muse_assets.embeddings.digests import Digests, empty_digests
from muse_assets.failures import Conflict
from muse_assets.ivfpq.exact_neighbors import Neighbors, Queries, no_neighbors
from muse_assets.manifest import Manifest, identify, manifest_path
from muse_assets.snapshots.array_files import read_arrays, write_arrays
from muse_assets.snapshots.rotation import Verified, never

# Files by any other name came from the legacy verbs' --output.
_USUAL_NAME = re.compile(r"^muse_\w+_(\d{8}|cluster)\.index$")
_OF_CLUSTERS = ".cluster."
_ARRAYS = ("bucket", "rows", "idx_sum", "whole", "half", "rejected_idx", "rejected_reason")
_QUERIES = ("query_ids", "query_vectors", "neighbor_ids", "neighbor_distances", "horizon")
_VERIFIED = ("verified_bucket", "verified_day")


@dataclass(frozen=True)
class RowState:
    """The table rows a snapshot stands for: bucket digests, the rows that could not be indexed, and which
    of the others are nearest to the queries.

    rejected_idx (r,) int64 ascending; rejected_reason (r,) uint8 of `Reason`. verified: when
    the database was last asked for each bucket's digest.
    """

    digests: Digests
    rejected_idx: NDArray[np.int64]
    rejected_reason: NDArray[np.uint8]
    queries: Queries
    neighbors: Neighbors
    verified: Verified = field(default_factory=never)

    def rejected_counts(self) -> dict[str, int]:
        """Reason -> rows."""
        values, counts = np.unique(self.rejected_reason, return_counts=True)
        return {Reason(value).name.lower(): int(count) for value, count in zip(values, counts, strict=True)}


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot file: its bytes had this manifest when it was looked up."""

    path: Path
    day: date
    manifest: Manifest


def lock_file(work: Path, spec: IndexSpec) -> Path:
    """Held by whoever changes the index's snapshots or their facts."""
    return work / ".locks" / f"{spec.name}.lock"


def sweep(work: Path, spec: IndexSpec) -> None:
    """Remove the temp files that killed builds of any day left; call it under the index's lock."""
    facts = manifest_path(work, spec.name, "?" * 64)  # a pattern for every hash, as [0-9] for every day
    dated = work / f"muse_{spec.name}_{'[0-9]' * 8}.index"
    for pattern in (dated, facts, facts.with_suffix(".rows.npz")):
        durable_files.sweep(pattern)


def no_rows(queries: Queries) -> RowState:
    """The state before the first build."""
    nothing = np.empty(0, np.int64)
    return RowState(empty_digests(), nothing, nothing.astype(np.uint8), queries, no_neighbors(queries))


def snapshot_files(work: Path, spec: IndexSpec) -> list[tuple[date, Path]]:
    """Dated files of the index, newest day first, whatever they hold."""
    pattern = re.compile(rf"^muse_{re.escape(spec.name)}_(\d{{8}})\.index$")
    found = []
    for path in work.glob(f"muse_{spec.name}_*.index"):
        if match := pattern.match(path.name):
            try:
                found.append((datetime.strptime(match[1], "%Y%m%d").date(), path))
            except ValueError:
                continue
    return sorted(found, reverse=True)


def snapshots(work: Path, spec: IndexSpec, until: date | None = None) -> Iterator[Snapshot]:
    """Verified snapshots up to a day, newest first; damaged or unknown files are passed over."""
    for day, path in snapshot_files(work, spec):
        if until is None or day <= until:
            manifest = identify(work, spec.name, path)
            if manifest is not None:
                yield Snapshot(path, day, manifest)


def state_path(work: Path, index: str, sha256: str) -> Path:
    """Where the row facts of the file with that content hash lie."""
    return manifest_path(work, index, sha256).with_suffix(".rows.npz")


def write_state(work: Path, index: str, sha256: str, state: RowState) -> None:
    """Write the row facts durably."""
    digests = {name: getattr(state.digests, name) for name in _ARRAYS[:5]}
    truth = (state.queries.ids, state.queries.vectors, *asdict(state.neighbors).values())
    rejected: dict[str, NDArray[Any]] = {
        "rejected_idx": state.rejected_idx,
        "rejected_reason": state.rejected_reason,
    }
    named_truth = dict(zip(_QUERIES, truth, strict=True))
    verified = dict(zip(_VERIFIED, (state.verified.bucket, state.verified.day), strict=True))
    write_arrays(state_path(work, index, sha256), {**rejected, **digests, **named_truth, **verified})


def read_state(work: Path, index: str, sha256: str) -> RowState | None:
    """The row facts of the file with that content hash, or None if they are missing or unreadable.

    Facts of an older version, without days, count as never verified: the next build digests everything.
    """
    path, needed = state_path(work, index, sha256), _ARRAYS + _QUERIES
    columns = read_arrays(path, needed + _VERIFIED) or read_arrays(path, needed)
    if columns is None:
        return None
    verified = Verified(*(columns[name] for name in _VERIFIED)) if _VERIFIED[0] in columns else never()
    digests = Digests(*(columns[name] for name in _ARRAYS[:5]))
    ids, vectors, *neighbors = (columns[name] for name in _QUERIES)
    return RowState(
        digests,
        columns["rejected_idx"],
        columns["rejected_reason"],
        Queries(ids, vectors),
        Neighbors(*neighbors),
        verified,
    )


def prune(work: Path, spec: IndexSpec, *, today: date, keep_days: int = 7, keep_files: int = 2) -> list[Path]:
    """Remove snapshots older than `keep_days` beyond the newest `keep_files`, and facts nobody needs.

    Clusters keep their facts, since a cluster may have any name, and so do files by other names. While a
    build holds the index's lock, whose facts precede their file, nothing is removed; the next call does it.
    """
    try:
        with durable_files.locked(lock_file(work, spec)):
            return _prune(work, spec, today - timedelta(days=keep_days), keep_files)
    except Conflict:
        return []


def _prune(work: Path, spec: IndexSpec, oldest: date, keep_files: int) -> list[Path]:
    dated = snapshot_files(work, spec)
    old = [path for place, (day, path) in enumerate(dated) if place >= keep_files and day < oldest]
    other_names = (path for path in work.glob("*.index") if not _USUAL_NAME.match(path.name))
    kept = [*(path for _, path in dated if path not in old), *other_names]
    inodes = {_inode(path) for path in kept}
    # A day's prune reads the file that goes, not those that stay: of an index of 7 GB that is 7 GB, not 56.
    unneeded = {_sha256_of_none_of(kept, path) for path in old if _inode(path) not in inodes}
    for path in old:
        path.unlink()
    facts = [
        path for path in (work / ".manifests" / spec.name).glob("[!.]*") if _OF_CLUSTERS not in path.name
    ]
    contents = {path.name.split(".")[0] for path in facts}
    if len(contents - unneeded) > len(inodes):
        # Facts of killed builds or of damaged files: what all the others hold tells which.
        unneeded = contents - {durable_files.file_sha256(path) for path in kept}
    gone = [path for path in facts if path.name.split(".")[0] in unneeded]
    for path in gone:
        path.unlink()
    return old + gone


def _inode(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _sha256_of_none_of(kept: list[Path], path: Path) -> str:
    """The content hash of `path`; empty where one of `kept` has the same content."""
    sha256, size = durable_files.file_sha256(path), path.stat().st_size
    same = (one for one in kept if one.stat().st_size == size and durable_files.file_sha256(one) == sha256)
    return "" if next(same, None) else sha256
